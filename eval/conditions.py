"""Conditions that a model is measured under, and that are as before when the measuring is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def retained(model: Any, budget: int | None = None, retention: str | None = None) -> AbstractContextManager[None]:
    """Runs a model with another number of retained tokens per head, or with others; None: with its own.

    Args:
        budget: retained tokens per KV head; 0 for none.
        retention: what chooses them, as in `HybridForCausalLM.set_retention`.

    Raises:
        ValueError: the model retains no tokens, or can't in this way.
    """
    if budget is None and retention is None:
        return nullcontext()
    if budget is not None and budget < 0:
        raise ValueError(f"budget: {budget} is negative; give the retained tokens per head, 0 for none")
    if not hasattr(model, "with_retention"):
        name = "budget" if budget is not None else "retention"
        raise ValueError(f"{name}: {type(model).__name__} retains no tokens; leave {name} out")
    return model.with_retention(retention, budget)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_habits(model: Any) -> Iterator[None]:
    """Sets the model's own generation settings aside: generate() would take what isn't given from there."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
