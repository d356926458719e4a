"""The parts that a run is put together from: model, tokenizer, arguments, and the state of its folder."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from training import checkpoints
from training.config import TrainConfig, difference
from training.data import Stage, plan_stages
from training.sources import iter_documents
from training.store import open_store
from training.tokenizer import (
    TokenizerConfig,
    check_begin,
    check_tokenizer_config,
    load_tokenizer,
    train_tokenizer,
)
from training.wording import variants, wordings

ORIGIN = "origin.json"  # in the folder of a trained tokenizer: the settings that it was made from


def check_device(config: TrainConfig) -> None:
    """Raises: ValueError if the device asked for isn't there, or there are no ranks to shard over."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' but no CUDA device is visible: use device=auto or device=cpu")
    if config.fsdp and "RANK" not in os.environ:
        raise ValueError("fsdp=True shards over the processes that torchrun starts: use it, with one or more")
    if config.fsdp and config.device == "cpu" and torch.cuda.is_available():
        raise ValueError("fsdp=True with device='cpu' where CUDA devices are visible: use device=auto")


def world_size() -> int:
    """Number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def split_batch(config: TrainConfig, world: int) -> tuple[int, int]:
    """Rows of a micro-batch of one rank, and micro-batches of a step.

    Raises: ValueError if batch.tokens_per_step can't be cut into whole rows for every rank.
    """
    batch, length = config.batch, config.data.sequence_length
    if batch.tokens_per_step is None:
        return batch.sequences, batch.accumulation
    rows, rest = divmod(batch.tokens_per_step, length * world)
    if rest or not rows:
        raise ValueError(
            f"batch.tokens_per_step={batch.tokens_per_step} can't be cut into rows of data.sequence_length={length} "
            f"for each of {world} ranks: use a multiple of {length * world}, or another number of ranks"
        )
    accumulation = next(a for a in range(1, rows + 1) if rows % a == 0 and rows // a <= batch.sequences)
    return rows // accumulation, accumulation


def plan_steps(config: TrainConfig, world: int) -> tuple[list[Stage], int]:
    """The stages of a run on `world` ranks, and the micro-batches of a step.

    Raises: ValueError if a step can't be cut into rows as configured.
    """
    sequences, accumulation = split_batch(config, world)
    stages = plan_stages(
        config.data,
        config.needles,
        config.curriculum,
        steps=config.steps,
        sequences=sequences,
        parts=accumulation * world,
        tokens_per_step=config.batch.tokens_per_step,
    )
    return stages, accumulation


def same_steps(config: TrainConfig, world: int, rows: list[int]) -> str:
    """How to get steps of so many rows (by stage) on `world` ranks, in words."""
    stages, _ = plan_steps(config, world)
    tokens = rows[-1] * stages[-1].sequence_length
    try:
        planned, _ = plan_steps(replace(config, batch=replace(config.batch, tokens_per_step=tokens)), world)
    except ValueError:
        planned = []
    if [stage.step_rows for stage in planned] == rows:
        return f"set batch.tokens_per_step={tokens}"
    return "go on with that run's batch settings on as many ranks as it had"


def resume_point(config: TrainConfig, output: Path) -> Path | None:
    """The checkpoint to continue from; None to start from scratch.

    Raises: ValueError if the folder, or that of the checkpoint, belongs to another configuration, or no whole
    checkpoint can be used.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={config.output!r} is a file: name a folder")
    saved = output / "config.yaml"
    begun = bool(checkpoints.checkpoints(output)) or (output / "model.safetensors").is_file()
    # a run may also have failed before its first step
    own = begun or (saved.is_file() and (output / "log.jsonl").is_file())
    if config.resume == "never" and own:
        raise ValueError(
            f"output={config.output!r} holds a run already and resume='never': name another output folder"
        )
    if own and not saved.is_file():
        raise ValueError(f"output={config.output!r} holds a model but no config.yaml: name another output folder")
    if own:
        _check_same(saved, config, f"output={config.output!r} holds", "name another output folder")
    if config.resume in ("auto", "never"):
        return checkpoints.newest(output)
    folder = Path(config.resume).expanduser()
    wrong = checkpoints.defect(folder)
    if wrong is not None:
        raise ValueError(
            f"resume={config.resume!r} can't be continued: {wrong}; use auto, never or a whole checkpoint"
        )
    checkpoints.step_of(folder)
    # the optimizer's state carries learning rate and weight decay, and the model's what is left of keep_all_steps
    instead = "start a new run from a saved model (model.weights)"
    _check_same(folder.parent / "config.yaml", config, f"resume={config.resume!r} belongs to", instead)
    if folder.parent.resolve() != output.resolve():
        # the same command again goes on with what it has done since
        own_newest = checkpoints.newest(output)
        if own_newest is not None and checkpoints.step_of(own_newest) > checkpoints.step_of(folder):
            return own_newest
    return folder


def agree(args: TrainingArguments, output: Path, resume: Path | None, finished: bool) -> tuple[Path | None, bool]:
    """Where all ranks start: what rank 0 found, since another machine may see the folder as it was a while ago.

    resume: the checkpoint that this rank would go on from. finished: whether it has nothing to do.
    Raises: ValueError, on all ranks, if one doesn't see rank 0's folder, or not the whole checkpoint.
    """
    if args.world_size == 1:
        return resume, finished
    mark = output / f".start-{uuid4().hex}"
    if args.process_index == 0:
        mark.touch()
    said = [(mark.name, None if resume is None else str(resume), finished)]
    broadcast_object_list(said)
    name, folder, finished = said[0]
    resume = None if folder is None else Path(folder)
    sees = lambda: (output / name).is_file() and (resume is None or checkpoints.defect(resume) is None)
    blind = [rank for rank, seen in enumerate(gather_object([checkpoints.wait_for(sees)])) if not seen]
    if args.process_index == 0:
        mark.unlink(missing_ok=True)
    if blind:
        also = "" if resume is None else f" or not all of {resume}"
        raise ValueError(
            f"output={str(output)!r} is another folder for some ranks: {blind} don't see what rank 0 has there"
            f"{also}: use a folder that all machines share"
        )
    return resume, finished


def _check_same(saved: Path, config: TrainConfig, what: str, instead: str) -> None:
    """Raises: ValueError if the run's configuration in `saved`, if there is one, isn't the one to go on with."""
    differs = difference(saved, config) if saved.is_file() else None
    if differs is not None:
        raise ValueError(
            f"{what} a run with another configuration: {differs}; set it back to continue that run, or {instead}"
        )


def is_finished(config: TrainConfig, output: Path, resume: Path) -> bool:
    """Whether the run's last step is done and its final model is saved."""
    return checkpoints.step_of(resume) >= config.steps and (output / "model.safetensors").is_file()


def model_config(config: TrainConfig) -> Any:
    """The model's configuration: the file, with the overrides and the length trained on.

    Raises: ValueError for a missing or broken file, an unknown field, and whatever the model's configuration refuses.
    """
    from models.config import load_config

    changes = {"max_position_embeddings": config.data.sequence_length, **config.model.overrides}
    try:
        return load_config(config.model.config, changes)
    except ValueError as error:
        raise ValueError(f"model.config={config.model.config!r}: {error}") from error


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A `HybridForCausalLM` with fresh weights, or those of `model.weights`; special ids are the tokenizer's.

    The λ control starts anew in both cases. Raises: ValueError if `model.weights` holds no model, or one that differs
    in more than its scorer.
    """
    from models import HybridForCausalLM
    from models.loading import load_weights

    settings = model_config(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(settings, name, getattr(tokenizer, name))
    if config.model.weights is None:
        return HybridForCausalLM(settings)
    folder = Path(config.model.weights).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.weights={config.model.weights!r} holds no model: name a folder with config.json")
    try:
        model = load_weights(folder, settings)
    except ValueError as error:
        raise ValueError(f"model.weights={config.model.weights!r}: {error}") from error
    if model.penalty_control is not None:
        # its count of steps would end keep_all_steps at once; a run that goes on reads its own from its checkpoint
        model.penalty_control.reset_parameters()
    return model


def make_tokenizer(config: TrainConfig, output: Path, save: bool) -> PreTrainedTokenizerBase:
    """The run's tokenizer. A trained one is kept in the run's folder `tokenizer` and read from there later on, as
    long as the settings that it was made from are the same.

    Raises: ValueError if it can't be loaded or trained.
    """
    if config.tokenizer.train_vocab_size is None:
        return load_tokenizer(config.tokenizer)
    kept = output / "tokenizer"
    origin = json.dumps(_origin(config), indent=1)
    # a run that never began leaves its tokenizer behind; one without an origin was kept by an older version
    fits = not (kept / ORIGIN).is_file() or (kept / ORIGIN).read_text(encoding="utf-8") == origin
    if not fits or not (kept / "tokenizer_config.json").is_file():
        trained = train_tokenizer(
            _in_turn(config),
            config.tokenizer.train_vocab_size,
            config.tokenizer.split_digits,
            config.tokenizer.train_characters,
        )
        if not save:
            return trained
        # beside its place first: half a tokenizer is never taken for a whole one
        saving = kept.with_name(f".saving-{kept.name}")
        for old in (saving, kept):
            shutil.rmtree(old, ignore_errors=True)
        trained.save_pretrained(saving)
        (saving / ORIGIN).write_text(origin, encoding="utf-8")
        os.rename(saving, kept)
    return load_tokenizer(TokenizerConfig(path=str(kept)))


def _origin(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a trained tokenizer."""
    sources = [asdict(replace(source, weight=1.0, streaming=False)) for source in config.data.sources]
    needles = {"needles": asdict(config.needles), "curriculum": [asdict(stage) for stage in config.curriculum]}
    return {"tokenizer": asdict(config.tokenizer), "sources": sources, **needles, "seed": config.seed}


def _in_turn(config: TrainConfig) -> Iterator[str]:
    if config.needles.fraction or any(stage.needles.get("fraction") for stage in config.curriculum):
        kinds = variants(config.needles, "needles")
        for i, kind in enumerate(kinds):
            yield from wordings(kind, config.seed + i, config.tokenizer.train_needles // len(kinds))
    texts = [iter_documents(source, f"data.sources[{i}]") for i, source in enumerate(config.data.sources)]
    for group in zip_longest(*texts):
        yield from (text for text in group if text is not None)


def tokenise(config: TrainConfig) -> dict[str, int]:
    """Do what a run begins with and ranks wait for: train the tokenizer, and put sources that aren't streamed into
    the cache. Returns the tokens of each such source.

    Raises: ValueError for anything wrong with tokenizer or sources.
    """
    check_tokenizer_config(config.tokenizer)
    output = Path(config.output).expanduser()
    if config.tokenizer.train_vocab_size is not None:
        resume_point(config, output)  # the folder of another run keeps its tokenizer
    tokenizer = make_tokenizer(config, output, save=True)
    check_begin(tokenizer, config.data.add_bos)
    flags = {"add_bos": config.data.add_bos, "add_eos": config.data.add_eos, "progress": config.log.progress}
    cache = Path(config.data.cache_dir)
    return {
        name: open_store(source, tokenizer, cache, name=name, **flags).total
        for name, source in ((f"data.sources[{i}]", s) for i, s in enumerate(config.data.sources))
        if not source.streaming
    }


def training_arguments(
    config: TrainConfig, output: Path, *, accumulation: int, may_skip_parameters: bool
) -> TrainingArguments:
    """The Hugging Face arguments of a run.

    accumulation: micro-batches of a step. may_skip_parameters: there are steps in which some parameters get no
    gradient.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={config.output!r} can't be made ({error.strerror}): name another folder") from None
    for name in config.log.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"log.report_to={list(config.log.report_to)}: {name} is unknown: use wandb or trackio")
    extra: dict[str, Any] = {}
    if config.fsdp:
        extra = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        # a batch is one packed sequence, whatever the number of its rows
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.optimizer.lr,
        max_grad_norm=config.optimizer.clip,
        bf16=config.precision == "bf16",
        logging_strategy="steps",
        logging_steps=config.log.every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint.every,
        seed=config.seed,
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        report_to=list(config.log.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=config.data.workers,
        torch_compile=config.compile,
        # the model keeps its buffers equal over ranks itself, by summing their counts
        ddp_broadcast_buffers=False,
        # while everything is kept the scorer takes no part in the loss
        ddp_find_unused_parameters=may_skip_parameters,
        **extra,
    )
    if config.fsdp:
        # parameters and their gradients travel as the float32 they are, and products are taken in 16 bits under
        # autocast, as without shards; Accelerate's own policy would round decays, gradients and the loss to bf16
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    if args.n_gpu > 1:
        # several visible devices without torchrun: one is used, since replicating modules would split packed rows
        args._n_gpu = 1
    return args


def tensorboard(output: Path, resume: Path | None) -> TrainerCallback:
    """A callback that writes event files; steps that a resumed run does again are overwritten."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    purge = None if resume is None else checkpoints.step_of(resume) + 1
    return TensorBoardCallback(SummaryWriter(str(output / "tensorboard"), purge_step=purge))
