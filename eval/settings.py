"""Settings of an evaluation's command: defaults < file < command line. Imports nothing heavy: --help is quick."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from models.files import config_path
from models.options import add_retention_arguments

PATHS = ("out", "data", "text", "squad", "swde")  # settings that name files and folders
T = TypeVar("T")


@dataclass
class ModelSettings:
    """Settings of every evaluation of a model: which one, how it is loaded and run, and where the results go."""

    model: str | None = None
    out: str | None = None
    budget: int | None = None
    retention: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    resume: bool = True


@dataclass
class PromptSettings(ModelSettings):
    """Of every evaluation by separate prompts."""

    seed: int = 0
    batch_size: int = 8
    save_prompts: bool = False


@dataclass
class StreamSettings(ModelSettings):
    """Of every evaluation that reads endless text."""

    chunk: int = 256
    sinks: int | None = None
    window: int | None = None


@dataclass
class CacheSettings(StreamSettings):
    """Of those that read it through one kind of cache."""

    cache: str = "auto"


def names(text: str) -> list[str]:
    """The entries of `a,b`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[int]:
    """The whole numbers of `512,1024`; an argument error if one isn't."""
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 512,1024") from None


def describe(parser: argparse.ArgumentParser, description: str, epilog: str) -> None:
    """Sets the texts of --help, printed as they are."""
    parser.description, parser.epilog = description, epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def add_run_arguments(parser: argparse.ArgumentParser, batch: str | None = "prompts at once; default: 8") -> None:
    """Adds what every evaluation of a model takes.

    Args:
        batch: help of --batch-size; None: there is no such option.
    """
    add = parser.add_argument
    add("--model", metavar="DIR", help="folder of model and tokenizer, or a GGUF file; any model of transformers")
    add("--out", metavar="DIR", help="folder for the results; an interrupted run in it is continued")
    add("--config", metavar="FILE", help="YAML with any of these settings; options given here win")
    if batch is not None:
        add("--batch-size", metavar="N", type=int, help=batch)
    add_retention_arguments(parser)
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, …")
    add("--dtype", metavar="NAME", help="auto (default: as saved), float32, bfloat16, float16")
    flag = argparse.BooleanOptionalAction
    add("--resume", action=flag, default=None, help="continue a run in --out (default), or refuse to")


def add_prompt_arguments(parser: argparse.ArgumentParser, seed: str = "of the drawing; default: 0") -> None:
    """Adds what every evaluation by separate prompts takes; `seed` is the help of --seed."""
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--seed", metavar="N", type=int, help=seed)
    add("--save-prompts", action=flag, default=None, help="keep each prompt in samples/*.jsonl (default: no)")
    add_run_arguments(parser)


def add_cache_arguments(parser: argparse.ArgumentParser, chunk: int, kinds: bool = True) -> None:
    """Adds how a text is read; `chunk` is the default that --help names, `kinds` whether there is --cache."""
    add = parser.add_argument
    add("--chunk", metavar="N", type=int, help=f"tokens read at once; default: {chunk}")
    if kinds:
        add(
            "--cache",
            metavar="KIND",
            help="auto (default: the model's own, else full), full, or stream (takes --budget)",
        )
    of = "of --cache stream" if kinds else "of streaming"
    add("--sinks", metavar="N", type=int, help=f"{of}; default: 4")
    add("--window", metavar="N", type=int, help=f"{of}; default: 1020")


def _read_file(path: str, known: Sequence[str]) -> Any:
    from omegaconf import DictConfig, OmegaConf

    file = config_path(path)
    if not file.is_file():
        raise ValueError(f"config: {path} is not a file; the folder configs/eval has examples")
    try:
        loaded = OmegaConf.load(file)
    except Exception as error:
        raise ValueError(f"config: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"config: {path} is not a list of `name: value` lines")
    for name in loaded:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"config: {path} has the unknown setting {name!r}; {hint}")
    for name, value in OmegaConf.to_container(loaded).items():
        if isinstance(value, dict):
            raise ValueError(f"config: {name}: {path} has keys and values there; give a value or a list")
    return loaded


def resolve(kind: type[T], args: argparse.Namespace, needed: Sequence[str] = ("model", "out")) -> T:
    """Defaults < file < command line, as an object of the dataclass `kind`.

    Args:
        needed: settings that must be given.

    Raises:
        ValueError: a setting that is unknown, of the wrong type, or missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = [f.name for f in fields(kind)]
    given = {name: getattr(args, name, None) for name in known}
    given = {name: value for name, value in given.items() if value is not None}
    layers = [_read_file(args.config, known)] if getattr(args, "config", None) else []
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), *layers, given))
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {error.full_key}: {str(error).splitlines()[0]}") from error
    for name in needed:
        if not getattr(config, name):
            raise ValueError(f"{name}: missing; give --{name.replace('_', '-')}")
    for name in PATHS:  # no shell does it in a file, or after --out=
        if isinstance(value := getattr(config, name, None), str):
            setattr(config, name, _at_home(value))
        elif isinstance(value, list):
            setattr(config, name, [_at_home(each) for each in value])
    return config


def _at_home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load(config: ModelSettings) -> tuple[Any, Any]:
    """The model and the tokenizer of a run.

    Raises:
        ValueError: something is missing or broken; the message names it.
    """
    from .loading import load_model

    return load_model(config.model, config.dtype, config.device)


def options(config: ModelSettings, *left_out: str) -> dict[str, Any]:
    """Settings by name as an evaluation's function takes them: without those of loading, and the ones named."""
    return {
        name: value
        for name, value in asdict(config).items()
        if name not in ("model", "out", "dtype", "device", *left_out)
    }


def keep(config: Any) -> None:
    """Writes the settings of a command into its folder, as config.yaml."""
    from omegaconf import OmegaConf

    from .results import write_bytes

    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    write_bytes(Path(config.out) / "config.yaml", text.encode(), overwrite=True)
