"""The configuration of a training run: defaults < file < command line, strictly typed, unknown keys are errors."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.files import SHIPPED, atomic_path, config_path
from training.data import DataConfig, StageConfig
from training.tokenizer import TokenizerConfig
from training.wording import NeedleConfig


@dataclass
class ModelSection:
    """The model to train.

    config: a model configuration file (JSON). overrides: changes to it, for example {vocab_size: 4096}.
    weights: folder of a saved model to start from; null starts from scratch. Weights alone are taken: the λ control
    (λ, kept densities, the steps that count towards keep_all_steps) starts anew, as the optimizer does.
    The length trained on, data.sequence_length, becomes max_position_embeddings (the target density follows from
    it) unless overrides names another.
    """

    config: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class OptimizerConfig:
    """AdamW, and a cosine schedule: linear warm-up, then down to lr · min_lr_ratio at the last step.

    clip: largest gradient norm; 0 leaves gradients as they are.
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1


@dataclass
class BatchConfig:
    """sequences: rows of data.sequence_length tokens per device and micro-batch. accumulation: micro-batches a step.

    tokens_per_step: tokens of an optimizer step over all devices. The number of micro-batches follows from it and the
    number of devices, and `sequences` becomes the most rows that a device takes at a time. Null: a step has
    sequences · accumulation rows a device, so that more devices make a larger batch.
    In a stage with shorter rows there are more of them, so that a micro-batch has about the same tokens.
    """

    sequences: int = 8
    accumulation: int = 1
    tokens_per_step: int | None = None


@dataclass
class CheckpointConfig:
    """every: optimizer steps between checkpoints (one is always written at the end).

    keep: newest whole ones that stay, up to the one just written; damaged ones go.
    """

    every: int = 500
    keep: int = 2


@dataclass
class LogConfig:
    """every: optimizer steps between log entries (the last step always has one). tensorboard: write event files to
    the run's folder `tensorboard`.

    report_to: further reporting integrations of transformers: wandb, trackio. progress: show a progress bar.
    peak_tflops: what the device can do in bfloat16, for the MFU; null: looked up by its name (training/flops.py).
    """

    every: int = 10
    tensorboard: bool = True
    report_to: list[str] = field(default_factory=list)
    progress: bool = True
    peak_tflops: float | None = None


@dataclass
class TrainConfig:
    """A whole run.

    steps: optimizer steps. precision: fp32, or bf16 (mixed precision, weights stay float32). device: auto, cpu, cuda.
    output: the run's folder. resume: auto goes on from the newest whole checkpoint in it, never starts anew (and
    wants an empty folder), a path goes on from that checkpoint, whose run must have had this configuration (compared
    if its config.yaml lies beside the checkpoint); in another folder than that run's, later from what was reached.
    compile: torch.compile. gradient_checkpointing: recompute blocks in the backward pass. fsdp: shard the model over
    the ranks that torchrun started (FSDP2), instead of copying it to each.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    curriculum: list[StageConfig] = field(default_factory=list)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    steps: int = 1000
    seed: int = 0
    precision: str = "fp32"
    device: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    output: str = "runs/default"
    resume: str = "auto"


# what may differ between a run and its continuation: it changes neither the data nor the model nor the schedule;
# the rows of a step, which may be cut differently, are compared with those of the checkpoint
FREE_ON_RESUME = (
    *("output", "resume", "device", "log", "checkpoint", "data.cache_dir", "data.workers"),
    *("batch", "compile", "gradient_checkpointing", "fsdp"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and merge command-line changes (`optimizer.lr=3e-4`, `data.sources.0.path=x.txt`) over it.

    A name such as configs/train/lalte-0.4b.yaml is found from any working folder (`models.files.config_path`).
    A file may begin with `extends: other.yaml`, a file beside it or one of configs/, whose settings it changes:
    lists are replaced, mappings merged, and {} empties model.overrides.
    The output folder is runs/<name of the file> unless it is set.
    Raises: ValueError naming the key, its value and what would do.
    """
    config = OmegaConf.structured(TrainConfig(output=f"runs/{Path(path).stem}"))
    for file, given in reversed(_read(config_path(path))):
        _check_keys(given, TrainConfig, "", str(file))
        try:
            config = OmegaConf.merge(config, OmegaConf.create(dict(given)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{file}: {_first_line(error)}") from None
        _empty(config, given)
    for change in overrides:
        _apply(config, change)
    result = OmegaConf.to_object(config)
    check_config(result)
    return result


def _read(path: Path) -> list[tuple[Path, Mapping]]:
    """What a file says, then what the one says that it extends, and so on."""
    found: list[tuple[Path, Mapping]] = []
    while True:
        if not path.is_file():
            by = f" (extends in {found[-1][0]})" if found else ""
            raise ValueError(
                f"the configuration {path}{by} is no file: name a YAML file, such as one of configs/train"
            )
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"the configuration {path} is no YAML: {error}") from None
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"the configuration {path} holds {type(given).__name__}: keys and values are expected")
        if any(path.resolve() == file.resolve() for file, _ in found):
            raise ValueError(f"extends={path.name!r} in {found[-1][0]}: the files extend each other; name another")
        found.append((path, {key: value for key, value in given.items() if key != "extends"}))
        if "extends" not in given:
            return found
        name = str(given["extends"])
        beside = path.parent / name
        path = config_path(name) if name.startswith(f"{SHIPPED}/") and not beside.exists() else beside


def _apply(config: Any, change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ValueError(f"{change!r} is no change to the configuration: write key=value, for example steps=100")
    _check_path(key.split("."), TrainConfig, key)
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        OmegaConf.update(config, key, value, merge=not _empties(config, key, value))
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"{change}: {_first_line(error)}") from None


def _empties(config: Any, key: str, value: Any) -> bool:
    """Whether {} is given for a setting of free keys, such as model.overrides: merging would leave it as it was."""
    return value == {} and _is_free(OmegaConf.select(config, key))


def _is_free(node: Any) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def _empty(config: Any, given: Mapping) -> None:
    for key, value in given.items():
        if _empties(config, key, value):
            config[key] = {}
        elif isinstance(value, Mapping) and not _is_free(config[key]):
            _empty(config[key], value)


def _first_line(error: Exception) -> str:
    where = getattr(error, "full_key", None)
    text = str(error).splitlines()[0]
    return f"{where}: {text}" if where else text


def _unknown(key: str, known: Sequence[str], prefix: str, where: str) -> ValueError:
    close = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
    return ValueError(f"{where}: unknown key {prefix}{key}; {advice}")


def _check_keys(given: Mapping, schema: type, prefix: str, where: str) -> None:
    types = get_type_hints(schema)
    for key, value in given.items():
        if key not in types:
            raise _unknown(str(key), list(types), prefix, where)
        kind = types[key]
        if get_origin(kind) is list and isinstance(value, Mapping):
            raise ValueError(f"{where}: {prefix}{key} holds keys and values: a list is expected")
        if (get_origin(kind) is dict or is_dataclass(kind)) and isinstance(value, list):
            raise ValueError(f"{where}: {prefix}{key} holds a list: keys and values are expected")
        if is_dataclass(kind) and isinstance(value, Mapping):
            _check_keys(value, kind, f"{prefix}{key}.", where)
        elif get_origin(kind) is list and is_dataclass(get_args(kind)[0]) and isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, Mapping):
                    _check_keys(item, get_args(kind)[0], f"{prefix}{key}[{i}].", where)


def _check_path(parts: list[str], schema: type, key: str) -> None:
    prefix = ""
    kind: Any = schema
    for part in parts:
        if get_origin(kind) is list:
            kind = get_args(kind)[0]
        elif is_dataclass(kind):
            types = get_type_hints(kind)
            if part not in types:
                raise _unknown(part, list(types), prefix, f"{key}=…")
            kind = types[part]
        elif kind is not Any and get_origin(kind) is not dict:
            raise ValueError(f"{key}=…: {prefix.rstrip('.')} has no keys below it")
        else:
            return
        prefix += part + "."


def check_config(config: TrainConfig) -> None:
    """Check the plain numbers of a run. Raises: ValueError naming the field, its value and the remedy."""

    def need(good: bool, name: str, value: Any, remedy: str) -> None:
        if not good:
            raise ValueError(f"{name}={value!r}: {remedy}")

    o, b = config.optimizer, config.batch
    need(
        config.model.config is not None, "model.config", None, "name a model configuration, a JSON of configs/models"
    )
    need(config.steps >= 1, "steps", config.steps, "use 1 or more")
    need(0 <= config.seed < 1 << 32, "seed", config.seed, "use 0 to 4294967295")
    need(config.data.sequence_length >= 2, "data.sequence_length", config.data.sequence_length, "use 2 or more")
    need(b.sequences >= 1, "batch.sequences", b.sequences, "use 1 or more")
    need(b.accumulation >= 1, "batch.accumulation", b.accumulation, "use 1 or more")
    if b.tokens_per_step is not None:
        need(b.tokens_per_step >= 2, "batch.tokens_per_step", b.tokens_per_step, "use 2 or more, or null")
        need(b.accumulation == 1, "batch.accumulation", b.accumulation, "leave it at 1: tokens_per_step decides")
    lanes = config.data.lanes
    need(lanes is None or lanes >= 1, "data.lanes", lanes, "use 1 or more, or null")
    need(0 < o.lr < math.inf, "optimizer.lr", o.lr, "use a positive learning rate")
    need(0 <= o.weight_decay < math.inf, "optimizer.weight_decay", o.weight_decay, "use 0 or more")
    need(0 < o.eps < math.inf, "optimizer.eps", o.eps, "use a small positive number, such as 1e-8")
    need(o.clip >= 0, "optimizer.clip", o.clip, "use a positive norm, or 0 for no clipping")
    need(o.warmup_steps >= 0, "optimizer.warmup_steps", o.warmup_steps, "use 0 or more")
    need(0 <= o.min_lr_ratio <= 1, "optimizer.min_lr_ratio", o.min_lr_ratio, "use a share from 0 to 1")
    need(
        len(o.betas) == 2 and all(0 <= x < 1 for x in o.betas), "optimizer.betas", list(o.betas), "use two in [0, 1)"
    )
    need(config.checkpoint.every >= 1, "checkpoint.every", config.checkpoint.every, "use 1 or more")
    need(config.checkpoint.keep >= 1, "checkpoint.keep", config.checkpoint.keep, "use 1 or more")
    need(config.log.every >= 1, "log.every", config.log.every, "use 1 or more")
    peak = config.log.peak_tflops
    need(peak is None or peak > 0, "log.peak_tflops", peak, "use a positive number of TFLOP/s, or null")
    need(config.precision in ("fp32", "bf16"), "precision", config.precision, "use fp32 or bf16")
    need(config.device in ("auto", "cpu", "cuda"), "device", config.device, "use auto, cpu or cuda")


def as_yaml(config: TrainConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, whole or not at all: a run with half of it would be another one."""
    with atomic_path(path) as part:
        part.write_text(as_yaml(config), encoding="utf-8")


def difference(old: Path, config: TrainConfig) -> str | None:
    """The first key, with both values, in which a saved configuration differs from `config`; None if they agree.

    Keys that change neither data, model nor schedule (`FREE_ON_RESUME`) may differ.
    """
    saved = _flat(yaml.safe_load(old.read_text(encoding="utf-8")))
    now = _flat(OmegaConf.to_container(OmegaConf.structured(config)))
    for key in [*now, *(k for k in saved if k not in now)]:
        if any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME):
            continue
        if saved.get(key) != now.get(key):
            return f"{key} (there {saved.get(key)!r}, now {now.get(key)!r})"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            k: v
            for name, item in value.items()
            for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
        }
    if isinstance(value, list) and value:
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{prefix}[{i}]").items()}
    return {prefix: value}
