"""The model and the tokenizer that an evaluation measures, and names for them that tell trained states apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

PROBE = "The quick brown fox: 1234567 jumps over a1b2-c3d4!"  # text to try a model and a tokenizer with
# of a config: where and with what it was saved, not what the model computes
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def load_model(folder: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) for evaluation: any causal model of transformers; see `models.loading.load_any`.

    Raises:
        ValueError: it can't be loaded, or gives no finite logits, whose answers would count as wrong ones.
    """
    from models.loading import load_any

    model, tokenizer = load_any(folder, device, dtype)
    ids = tokenizer(PROBE, return_tensors="pt", verbose=False).input_ids.to(next(model.parameters()).device)
    with torch.no_grad():
        finite = model(input_ids=ids, use_cache=True).logits.isfinite().all()  # read as prompts are
    if not finite:
        raise ValueError(
            f"model: the logits of {folder} in {model.dtype} are not finite; its weights are damaged, or the dtype "
            "is too small for it (--dtype)"
        )
    return model, tokenizer


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a model's folder, without the model.

    Raises:
        ValueError: it can't be read.
    """
    from transformers import AutoTokenizer

    import models.auto  # noqa: F401 - a model's folder names its class, which has to be known

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"tokenizer: {folder} can't be read ({reason}); give a model's folder") from error


def positions(model: torch.nn.Module) -> int | None:
    """Tokens that a foreign model can tell the places of, by its config; None: no limit is known.

    A model of this project names the length that it was trained on, which it may leave.
    """
    if hasattr(model, "new_cache"):
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "max_position_embeddings", None)


def system_name(model: torch.nn.Module) -> str:
    """What a model is called in results unless it is given a name: its kind."""
    return getattr(model.config, "model_type", None) or type(model).__name__


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def model_identity(model: torch.nn.Module) -> str:
    """Class and a digest of config, dtypes and up to 64 values of each tensor: tells trained states apart."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    config = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    parts = [json.dumps(config, sort_keys=True, default=str).encode()]
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.numpy().tobytes())
    return f"{type(model).__name__} {_digest(*parts)}"


def tokenizer_identity(tokenizer: Any) -> str:
    """Class, size, and a digest of vocabulary and of how a probe sentence is cut."""
    probe = tokenizer(PROBE, verbose=False).input_ids
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return f"{type(tokenizer).__name__} {len(tokenizer)} {_digest(vocabulary, json.dumps(probe).encode())}"
