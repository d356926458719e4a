"""Checkpoints of other projects become ours, and ours theirs, without a change to a single number.

The folder of an imported model keeps the other project's configuration in import.json; with it, an export gives back
what was imported, bit by bit. Only safetensors are read: other files could run code when they are opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.config import HybridConfig, load_config
from models.conversion_layouts import DELTA, FORMATS, HYBRID, NSA, TRANSFORMER, read_config, write_config
from models.conversion_tensors import (
    KEPT,
    LAMBDA,
    OWN_DENSITY,
    OWN_LAMBDA,
    OWN_STEPS,
    foreign_kept,
    foreign_lambda,
    own_density,
    own_lambda,
    pairs,
)
from models.files import atomic_path
from models.modeling import HybridForCausalLM

WEIGHTS, INDEX, RECORD = "model.safetensors", "model.safetensors.index.json", "import.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD, EMBEDDINGS = "lm_head.weight", "model.embeddings.weight"
# kept in float32 where all else has 16 bits
EXACT = ("A_log", "dt_bias", LAMBDA, KEPT)
# fields that no other kind has, and that don't change what a model computes
_OWN_FIELDS = (
    *("dtype", "transformers_version", "architectures", "_name_or_path", "use_cache", "prefill_chunk"),
    *("attention_backend", "scorer_lr_scale", "scorer_init_scale"),
    *("straight_through", "keep_all_steps", "embedding_range"),
)


@dataclass(frozen=True)
class Converted:
    """A model in another form: its configuration (ours, or config.json of another kind) and its tensors by name."""

    config: HybridConfig | dict[str, Any]
    tensors: dict[str, Tensor]


# ---- folders ----


def import_checkpoint(source: str | Path, out: str | Path) -> HybridConfig:
    """Convert a checkpoint of another project into a folder that `load` and transformers read.

    Args:
        source: a folder with config.json and safetensors, or the name of a repository on the Hugging Face hub.
        out: a new or empty folder. The tokenizer's files are copied as they are.

    Returns:
        The configuration that was written.

    Raises:
        ValueError: naming what is missing, unknown or doesn't fit; nothing is written then.
    """
    folder, out = _source_folder(source), _empty_folder(out)
    foreign = _read_json(folder / "config.json")
    tensors = read_tensors(folder)
    converted = to_own(foreign, tensors)
    record = {"config": foreign, "tensors": sorted(tensors)}
    if KEPT in tensors:
        record["num_kept"] = tensors[KEPT].tolist()
        record["lambda_dimensions"] = tensors[LAMBDA].ndim
    _write(out, converted.tensors, folder)
    _write_json(out / RECORD, record)
    converted.config.save_pretrained(out)
    return converted.config


def export_checkpoint(folder: str | Path, out: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Convert a model of ours into another project's checkpoint.

    Args:
        folder: of the model.
        out: a new or empty folder.
        kind: one of `FORMATS`; None: the one it was imported from, or else the plainest that can hold it.

    Returns:
        The config.json that was written.

    Raises:
        ValueError: the model has something that this kind can't express, or one of the folders isn't right.
    """
    folder, out = Path(folder).expanduser(), _empty_folder(out)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a model")
    config = load_config(folder)
    record = _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    converted = to_foreign(config, read_tensors(folder), kind, record)
    _write(out, converted.tensors, folder)
    _write_json(out / "config.json", converted.config)
    return converted.config


# ---- conversion ----


def to_own(foreign: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Converted:
    """Our form of another project's model.

    Args:
        foreign: its config.json.
        tensors: all of its tensors, by name.

    Raises:
        ValueError: naming a tensor that is unknown, missing, or of another shape or dtype; or a field.
    """
    config = read_config(foreign)
    left = dict(tensors)
    config.dtype = _common_dtype(left)
    _take_tied_head(left, config)
    shapes = _own_shapes(config)
    own: dict[str, Tensor] = {}
    for pair in pairs(config):
        if pair.own in own and pair.foreign not in left:
            continue  # shared by all layers, and stored once
        _check(pair.foreign, left, tuple(pair.to_foreign(shapes[pair.own]).shape))
        value = pair.to_own(left.pop(pair.foreign)).contiguous()
        if pair.own in own and not torch.equal(own[pair.own], value):
            raise ValueError(f"{pair.foreign} differs from that of other layers, which all share it (routing_shared)")
        own[pair.own] = value
    if config.has_scorer:
        for name in (LAMBDA, KEPT):
            _check(name, left, tuple(shapes[OWN_DENSITY].shape) if name == KEPT else None)
        own[OWN_LAMBDA] = own_lambda(left.pop(LAMBDA), config)
        own[OWN_DENSITY] = own_density(left.pop(KEPT), config)
        own[OWN_STEPS] = torch.zeros((), dtype=torch.int64)
    _check_all_taken(left)
    assert own.keys() == shapes.keys(), "every tensor of the model is mapped"
    return Converted(config, own)


def to_foreign(
    config: HybridConfig, tensors: Mapping[str, Tensor], kind: str | None = None, record: Mapping | None = None
) -> Converted:
    """Another project's form of a model of ours.

    Args:
        config, tensors: all of the model.
        kind: as in `export_checkpoint`.
        record: the content of import.json.

    Raises:
        ValueError: as in `export_checkpoint`, or tensors that aren't those of the configuration.
    """
    record = record or {}
    remembered = record.get("config")
    kind = kind or (remembered or {}).get("model_type") or plainest(config)
    same = remembered is not None and remembered["model_type"] == kind and _means(remembered, config)
    foreign = dict(remembered) if same else write_config(config, kind)
    left, shapes = dict(tensors), _own_shapes(config)
    if config.tie_word_embeddings:
        left.pop(HEAD, None)
    for name, expected in shapes.items():
        _check(name, left, tuple(expected.shape))
    # copies where layers share a tensor: a file holds no two names of one memory
    shared = config.scorer_sharing == "layers"
    found = {}
    for pair in pairs(config):
        value = pair.to_foreign(left[pair.own]).contiguous()
        found[pair.foreign] = value.clone() if shared and "scorer" in pair.own else value
    _check_all_taken({name: x for name, x in left.items() if name not in shapes})
    if config.tie_word_embeddings and same and HEAD in record["tensors"]:
        found[HEAD] = found[EMBEDDINGS].clone()
    if config.has_scorer:
        found[LAMBDA] = foreign_lambda(left[OWN_LAMBDA], record["lambda_dimensions"] if same else 2)
        found[KEPT] = foreign_kept(left[OWN_DENSITY], config)
        if same:
            remembered_kept = torch.tensor(record["num_kept"], dtype=torch.float32)
            if torch.equal(own_density(remembered_kept, config), left[OWN_DENSITY]):
                found[KEPT] = remembered_kept  # unrounded by a division
    if same:
        found = {name: x for name, x in found.items() if name in record["tensors"]}
    else:
        foreign["torch_dtype"] = str(_common_dtype(found)).removeprefix("torch.")
    return Converted(foreign, found)


def plainest(config: HybridConfig) -> str:
    """The kind with the fewest features that can hold a model."""
    kinds = set(config.layer_types)
    if kinds == {"attention"} and not config.has_scorer:
        return TRANSFORMER
    if kinds == {"nsa"}:
        return NSA
    return HYBRID if "nsa" in kinds or config.has_scorer else DELTA


def _means(foreign: Mapping[str, Any], config: HybridConfig) -> bool:
    """Whether a remembered configuration still says what ours says."""
    before, now = (
        {name: value for name, value in each.to_dict().items() if name not in _OWN_FIELDS}
        for each in (read_config(foreign), config)
    )
    return before == now


def _own_shapes(config: HybridConfig) -> dict[str, Tensor]:
    """All tensors that a saved model of ours has, on the meta device."""
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    shapes = dict(model.state_dict())
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


# ---- checks ----


def _check(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> None:
    if name not in tensors:
        raise ValueError(f"{name} is missing in the weights; copy the checkpoint again, or correct its config.json")
    if shape is not None and tuple(tensors[name].shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensors[name].shape)}, by config.json it is {shape}; correct config.json"
        )


def _check_all_taken(left: Mapping[str, Tensor]) -> None:
    if left:
        some = ", ".join(f"{name} {tuple(x.shape)}" for name, x in sorted(left.items())[:4])
        raise ValueError(
            f"{len(left)} tensors have no place in this kind of model: {some}{', …' if len(left) > 4 else ''}; "
            "the checkpoint holds something that isn't known here"
        )


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all tensors, some of which may be in float32 in any case."""
    found: dict[torch.dtype, str] = {}
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is in {x.dtype}; {', '.join(map(str, DTYPES))} can be converted")
        if x.dtype != torch.float32 or not name.endswith(EXACT):
            found.setdefault(x.dtype, name)
    if len(found) > 1:
        some = ", ".join(f"{name} in {dtype}" for dtype, name in found.items())
        raise ValueError(f"the tensors have several dtypes ({some}); save the model in one")
    return next(iter(found), torch.float32)


def _take_tied_head(left: dict[str, Tensor], config: HybridConfig) -> None:
    """Remove a stored copy of the embeddings, which must be one."""
    if not config.tie_word_embeddings or HEAD not in left:
        return
    if not torch.equal(left.pop(HEAD), left.get(EMBEDDINGS, torch.empty(0))):
        raise ValueError(
            f"{HEAD} differs from {EMBEDDINGS}, but tie_word_embeddings=true says they are one; "
            "set it to false in config.json if the weights are right"
        )


# ---- files ----


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors of a folder.

    Raises:
        ValueError: there are none, one is truncated or missing, or only pickled weights are there.
    """
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            files = [folder / name for name in sorted(set(_read_json(folder / INDEX)["weight_map"].values()))]
        except (LookupError, AttributeError, TypeError):
            raise ValueError(f"{folder / INDEX} has no weight_map; copy the checkpoint again") from None
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLED)
            if not pickled:
                raise ValueError(f"{file} is missing; copy the checkpoint again")
            raise ValueError(
                f"{folder} has {', '.join(pickled[:3])} in place of {file.name}, and opening that could run code; "
                "where you trust it, load it with its own library and save_pretrained(..., safe_serialization=True)"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or no safetensors file ({error}); copy it again") from error
    return tensors


def _source_folder(source: str | Path) -> Path:
    """A folder, or a repository of the hub downloaded to one."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise ValueError(f"{source} is neither a folder nor the name of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["config.json", "*.safetensors", INDEX, *TOKENIZER]
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:  # the library raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{source} is no folder here, and the hub doesn't give it ({reason}); check the name"
        ) from error


def _empty_folder(out: str | Path) -> Path:
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and isn't an empty folder; give another one")
    return out


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a JSON object is expected")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write(out: Path, tensors: dict[str, Tensor], source: Path) -> None:
    """Weights and tokenizer; the configuration comes last, so that a folder written by half is none."""
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


__all__ = ["FORMATS", "Converted", "export_checkpoint", "import_checkpoint", "plainest", "to_foreign", "to_own"]
