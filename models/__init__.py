"""Hybrid language models. A name is imported when it is asked for, and all are registered with transformers then
(models/auto.py): commands of this package show their --help without loading PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.auto import HybridCache, HybridConfig, HybridForCausalLM, HybridModel, HybridOutput

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "HybridModel", "HybridOutput"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("models.auto"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
