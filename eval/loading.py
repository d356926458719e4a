"""Loads a model and its tokenizer from a folder, checks that they are whole and belong together, and names them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# of a config: where and with what it was saved, not what the model computes
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"model: {folder} is not a folder; give the folder of a trained model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: {folder} has no config.json; give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model: {folder} has no *.safetensors file; other weight formats are not read")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); save the tokenizer of the "
            "training there with tokenizer.save_pretrained"
        )


def pick_device(device: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU.

    Raises:
        ValueError: the name is unknown, or there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} can't be used ({error}); use auto, cpu or cuda") from error


def load_model(folder: str | Path, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Loads (model, tokenizer) for evaluation: any causal model of transformers, or one of this project.

    Args:
        folder: what save_pretrained of model and tokenizer wrote; weights are safetensors, never pickle. Or a file
            *.gguf, which holds both; its weights are taken to float32 unless `dtype` says otherwise.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:1, …

    Raises:
        ValueError: something is missing, truncated, or doesn't belong together; the message names it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    folder = Path(folder)
    target = pick_device(device)
    model, tokenizer = _from_gguf(folder, dtype) if folder.suffix == ".gguf" else _from_folder(folder, dtype)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: {len(tokenizer)} tokens, but the model in {folder} has a vocab_size of "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    return model.to(target).eval(), tokenizer


def _from_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise ValueError(f"model: {path} is not a file; give a GGUF file, or the folder of a trained model")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=DTYPES[dtype])
        return model, AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise ValueError(f"model: {path} needs the packages gguf and accelerate ({error}); install them") from error
    except Exception as error:
        raise ValueError(f"model: {path} can't be loaded ({error}); is the copy complete?") from error


def _from_folder(folder: Path, dtype: str) -> tuple[Any, Any]:
    _check_folder(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import models  # noqa: F401 - registers the project's models with transformers

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"model: the tokenizer in {folder} can't be read ({error}); save it anew") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(f"model: {folder} can't be loaded ({error}); is the copy complete?") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(kind):
            example = ", ".join(str(key) for key in sorted(report[kind], key=str)[:3])
            raise ValueError(
                f"model: the weights in {folder} don't fit its config.json: {len(report[kind])} "
                f"{kind.replace('_', ' ')} ({example}, …); use the config that the weights were saved with"
            )
    return model, tokenizer


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
    probe = tokenizer("The quick brown fox: 1234567 jumps over a1b2-c3d4!", verbose=False).input_ids
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return f"{type(tokenizer).__name__} {len(tokenizer)} {_digest(vocabulary, json.dumps(probe).encode())}"
