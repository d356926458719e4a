"""Loads a saved model and its tokenizer, refusing what is missing or broken, and names a model's weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from models.auto import HybridForCausalLM
from models.config import HybridConfig, load_config

M = TypeVar("M", bound=PreTrainedModel)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# fields of a config that don't change what a model computes, but for rounding
NEUTRAL = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "attention_backend", "prefill_chunk"),
    # of training alone
    *(
        "initializer_range",
        "embedding_range",
        "straight_through",
        "keep_all_steps",
        "scorer_dropout",
        "scorer_lr_scale",
        "scorer_init_scale",
    ),
    *("penalty_interval", "penalty_min", "penalty_max"),
)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} can't be used ({reason}); use auto, cpu or cuda") from error


def pick_dtype(dtype: str | torch.dtype = "auto") -> str | torch.dtype:
    """A dtype by name; `auto` is the one that was saved.

    Raises:
        ValueError: another one than float32, bfloat16 and float16.
    """
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[HybridForCausalLM, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder, ready for evaluation.

    Args:
        folder: what `save_pretrained` of both wrote, or the folder of a training run.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        dtype: `auto` (as saved), `float32`, `bfloat16` or `float16`. Decays and the penalty's state stay float32.

    Raises:
        ValueError: something is missing, truncated, foreign or doesn't belong together; the message names it.
    """
    model = load_model(folder, device, dtype)
    return model, load_tokenizer(folder, model.config.vocab_size)


def load_any(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load`, for any causal model of transformers: baselines, and models to stream with.

    Args:
        folder: as for `load`; or a file *.gguf, which holds both. Its weights are taken to float32 unless `dtype`
            says otherwise.

    Raises:
        ValueError: something is missing, truncated or doesn't belong together; the message names it.
    """
    folder = Path(folder).expanduser()
    if folder.suffix == ".gguf":
        return _from_gguf(folder, pick_device(device), pick_dtype(dtype))
    _check_folder(folder)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} can't be read ({error}); copy the folder again") from error
    if kind == HybridConfig.model_type:
        return load(folder, device, dtype)
    target, dtype = pick_device(device), pick_dtype(dtype)
    _check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(f"{folder}: its config.json can't be used ({error}); is transformers new enough?") from error
    tokenizer = load_tokenizer(folder, config.get_text_config().vocab_size)
    return _from_pretrained(AutoModelForCausalLM, folder, config, dtype).to(target).eval(), tokenizer


def _from_gguf(
    path: Path, device: torch.device, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a GGUF file, or the folder of a trained model")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except ImportError as error:
        raise ValueError(f"{path} needs the packages gguf and accelerate ({error}); install them") from error
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} can't be loaded ({error}); is the copy complete?") from error
    _check_vocabulary(tokenizer, path, model.config.get_text_config().vocab_size)
    return model.to(device).eval(), tokenizer


def load_model(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> HybridForCausalLM:
    """The model of `load`; weights are read from safetensors only, never from pickle."""
    folder = Path(folder).expanduser()
    target, dtype = pick_device(device), pick_dtype(dtype)
    _check_folder(folder)
    config = load_config(folder)
    _check_weights(folder)
    return _from_pretrained(HybridForCausalLM, folder, config, dtype).to(target).eval()


def load_weights(folder: str | Path, config: HybridConfig) -> HybridForCausalLM:
    """A model of another configuration with the weights in a folder, in float32, to train it further.

    Scorers and their control may be there on one side only: a scorer that the folder lacks starts anew.

    Raises:
        ValueError: other tensors are missing, left over or of another shape, or they can't be read.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    _check_weights(folder)
    return _from_pretrained(HybridForCausalLM, folder, config, torch.float32, free=("scorer.", "penalty_control."))


def _from_pretrained(
    kind: type[M], folder: Path, config: Any, dtype: str | torch.dtype, free: tuple[str, ...] = ()
) -> M:
    """The model with every tensor of the folder in its place.

    Args:
        free: parts of the names of tensors that may be missing or left over.

    Raises:
        ValueError: tensors are missing, left over or of another shape, or they can't be read.
    """
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"the weights in {folder} can't be read ({error}); copy the folder again") from error
    for kind, words in (
        ("missing_keys", "tensors of the model are missing"),
        ("mismatched_keys", "tensors have another shape"),
        ("unexpected_keys", "tensors don't exist in the model"),
    ):
        found = sorted(report.get(kind) or (), key=str)
        if kind != "mismatched_keys":
            found = [name for name in found if not any(part in name for part in free)]
        if found:
            names = ", ".join(_tensor_name(each) for each in found[:3]) + (", …" if len(found) > 3 else "")
            raise ValueError(
                f"the weights in {folder} don't fit {'the configuration' if free else 'its config.json'}: "
                f"{len(found)} {words} ({names}); use the config.json that was saved with them"
            )
    return model


def load_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ValueError: there is none, it can't be read, or it has more entries than the model's vocabulary.
    """
    folder = Path(folder).expanduser()
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"{folder} holds no tokenizer; save the one of the training there with save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds, some of them bare Exceptions
        raise ValueError(f"the tokenizer in {folder} can't be read ({error}); save it anew") from error
    _check_vocabulary(tokenizer, folder, vocab_size)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, place: Path, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {place} has {len(tokenizer)} entries, the model's vocab_size is {vocab_size}; use "
            "the tokenizer that the model was trained with"
        )


def fingerprint(model: HybridForCausalLM) -> str:
    """A name for what a model computes: 64 hexadecimal digits, the same after saving and loading.

    It is the SHA-256 of the configuration (JSON, without `NEUTRAL` fields) and of each parameter's name, shape, dtype
    and up to 256 evenly spaced values. So it is quick for any size, and tells models apart unless they differ
    in single values only.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in NEUTRAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 256)][:256].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give the folder of a trained model, or take one from the hub with lalte import"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that save_pretrained or a training wrote")


def _check_weights(folder: Path) -> None:
    """Every file of weights is there and whole, as far as its header tells."""
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} can't be read ({error}); copy the folder again") from error
        files = [folder / name for name in sorted(set(names))]
    for file in files:
        if not file.is_file():
            pickled = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            note = f" ({', '.join(sorted(pickled)[:3])} is never read: opening it could run code)" if pickled else ""
            raise ValueError(f"{file} is missing{note}; save the model with save_pretrained as safetensors")
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}); copy it again") from error


def _tensor_name(key: object) -> str:
    """A tensor as transformers reports it: a name, or a name with two shapes."""
    return key if isinstance(key, str) else f"{key[0]}: {tuple(key[1])} saved, {tuple(key[2])} here"
