"""Learnable token eviction: the visibility rule, the retention scorer, the attention op and the cache."""
