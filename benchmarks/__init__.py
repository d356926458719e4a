"""Measurements of ours beside its peers in one run, and their results in benchmarks/results."""
