"""Options that several commands have. Imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse


def add_retention_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds how many tokens are retained, and what chooses them."""
    add = parser.add_argument
    add("--budget", metavar="N", type=int, help="retained tokens per head (0: none); default: the model's own")
    policies = "lte (its scorer), none, recency, random, h2o, tova, key_norm or delta_error"
    add("--retention", metavar="NAME", help=f"what chooses them: {policies}; default: the model's own")
