"""The Hugging Face Trainer with this project's data, schedule and checkpoints, and `train(config)` around it."""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from models import HybridConfig
from training import checkpoints, setup
from training.callbacks import LogCallback, RetentionCallback
from training.config import TrainConfig, save_config
from training.data import StepBatches, TrainingRows, check_data
from training.flops import peak_flops, train_flops_per_token
from training.rows import IGNORED, collate
from training.saving import SavingTrainer
from training.stopping import StopOnSignal, Stopped, outlive
from training.tokenizer import check_tokenizer_config


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the checkpoints written before are kept."""


class HybridTrainer(SavingTrainer):
    """Trainer over `TrainingRows`.

    Batches are packed ([1, N] with cu_seqlens) and are a function of the step; the optimizer's groups come from
    `model.parameter_groups`; a loss that is not finite ends the run.
    """

    def __init__(self, config: TrainConfig, *, rows: TrainingRows, **kwargs: Any) -> None:
        self.config, self.rows, self.keep = config, rows, config.checkpoint.keep
        super().__init__(train_dataset=rows, data_collator=collate, **kwargs)
        # the model divides by the predicted tokens of the whole step, which get_batch_samples counts
        self.model_accepts_loss_kwargs = True
        self.cursors: dict[str, Any] = {}
        device = self.args.device
        # this rank's shares of loss, lm_loss and penalty since the last log entry; mps has no float64
        self.sums = torch.zeros(3, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.micro_batches = 0
        self.tokens, self.tokens_logged, self.time_logged, self.step_logged = 0, 0, time.perf_counter(), 0
        self.flops: float | None = None  # of the peak, of all devices
        if config.precision == "bf16" or config.log.peak_tflops is not None:
            peak = peak_flops(device, config.log.peak_tflops) if self.args.should_save else None
            self.flops = None if peak is None else peak * self.args.world_size
        # micro-batches of a step over all ranks; they are of equal size
        self.parts = self.args.gradient_accumulation_steps * self.args.world_size

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.config.fsdp and not self.is_fsdp_enabled:
            # Accelerate shards only where it finds an accelerator, though all of it works on a CPU too
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        # Accelerate puts autocast around a whole model only
        return self.accelerator.autocast() if self.is_fsdp_enabled and self.args.bf16 else nullcontext()

    # ---- data and optimization ----

    def get_train_dataloader(self) -> DataLoader:
        batches = StepBatches(
            self.rows.stages,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=outlive,
            # an own generator: starting the loader must not move the global one
            generator=torch.Generator(),
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            o = self.config.optimizer
            groups = self.model.parameter_groups(weight_decay=o.weight_decay, lr=o.lr)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=fused)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            o = self.config.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: cosine(step, num_training_steps, o.warmup_steps, o.min_lr_ratio),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.cursors = inputs.pop("cursors", self.cursors)
        self.tokens += inputs["input_ids"].numel() * self.args.world_size
        # dropout depends on seed, place in the run and rank alone: a run that is resumed anywhere draws the same
        place = [self.config.seed, self.state.global_step, self.micro_batches, self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        last = self.micro_batches + 1 == self.args.gradient_accumulation_steps
        self.micro_batches = 0 if last else self.micro_batches + 1
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_input(self, data: Any) -> Any:
        # on CUDA batches lie in pinned memory, so that the host needn't wait for their copies
        if isinstance(data, torch.Tensor) and self.args.device.type == "cuda":
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Predicted tokens of an optimizer step over all ranks: labelled ones that begin no document."""
        count = torch.zeros((), dtype=torch.int64)
        for batch in batch_samples:
            labelled = batch["labels"][0] != IGNORED
            count += labelled.sum() - labelled[batch["cu_seqlens"][:-1].long()].sum()
        count = count.to(device, non_blocking=device.type == "cuda")
        return self.accelerator.reduce(count, reduction="sum").clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        # the penalty is a mean over all tokens, of which every micro-batch has as many, whatever it predicts
        penalty = torch.zeros_like(outputs.lm_loss) if outputs.aux_loss is None else outputs.aux_loss / self.parts
        loss = outputs.lm_loss + penalty
        self.sums += torch.stack([x.detach().float() for x in (loss, outputs.lm_loss, penalty)]).to(self.sums)
        # ranks average their gradients, while the loss was divided by the tokens of all ranks
        loss = loss * self.args.world_size
        step = self.state.global_step + 1
        unseen = (self.first_bad < 0) & ~torch.isfinite(loss.detach())
        self.first_bad = torch.where(unseen, step, self.first_bad)
        if loss.device.type == "cpu":
            self.check_finite()
        return (loss, outputs) if return_outputs else loss

    def check_finite(self) -> None:
        """Raises: NonFiniteLoss if a loss since the start was NaN or infinite (waits for the device)."""
        step = int(self.first_bad.item())
        if step >= 0:
            raise self._non_finite(f"the loss is not finite at step {step}")

    def check_state(self) -> None:
        """Raises: NonFiniteLoss if a loss or a weight is NaN or infinite (waits for the device).

        A gradient that isn't finite spoils the weights while the loss of its step still is.
        """
        self.check_finite()
        finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        for parameter in self.model.parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            finite &= torch.isfinite(own.detach()).all()
        if not finite:
            raise self._non_finite(f"the weights are not finite after step {self.state.global_step}")

    def _non_finite(self, what: str) -> NonFiniteLoss:
        last = checkpoints.whole(Path(self.args.output_dir))
        kept = f"{last[-1]} is kept" if last else "there is no whole checkpoint"
        precise = ", or use precision=fp32" if self.config.precision != "fp32" else ""
        return NonFiniteLoss(
            f"{what}: {kept}; lower optimizer.lr (now {self.config.optimizer.lr:g}), raise "
            f"optimizer.warmup_steps{precise}, each in a new run with another output folder"
        )

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_finite()
            logs.update(self._measured())
        # the entries go to the log file and the reports, not into the state that every checkpoint repeats
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _measured(self) -> dict[str, float]:
        sums = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        now = time.perf_counter()
        speed = (self.tokens - self.tokens_logged) / max(now - self.time_logged, 1e-9)
        stage = next(s for s in self.rows.stages if self.state.global_step <= s.last)
        self.sums.zero_()
        # every micro-batch of every rank added its share to a step's loss
        steps = self.state.global_step - self.step_logged
        self.tokens_logged, self.time_logged, self.step_logged = self.tokens, now, self.state.global_step
        model = self.accelerator.unwrap_model(self.model)
        used = {}
        if self.flops is not None and isinstance(model.config, HybridConfig):
            used = {"mfu": train_flops_per_token(model.config, stage.sequence_length) * speed / self.flops}
        return {
            "loss": sums[0] / steps,
            "lm_loss": sums[1] / steps,
            "retention_penalty": sums[2] / steps,
            **model.retention_report(),
            "sequence_length": stage.sequence_length,
            "tokens": self.tokens,
            "tokens_per_s": speed,
            **used,
        }

    # ---- checkpoints ----

    def progress(self) -> dict[str, Any]:
        return {
            "cursors": self.cursors,
            "lanes": self.rows.lanes,
            "tokens": self.tokens,
            "sums": self.sums.tolist(),
            "step_logged": self.step_logged,
            "step_rows": [stage.step_rows for stage in self.rows.stages],
            "text": self.rows.text,
        }

    def load_progress(self, folder: Path) -> None:
        """Take up the running sums and the places in streamed sources from a checkpoint of any number of ranks.

        Raises: ValueError if the rows of a step, the lanes of streamed sources, or the text in the cache were others.
        """
        ranks = checkpoints.read_progress(folder)
        there, here = ranks[0] if ranks else {}, self.progress()
        there = {"text": here["text"], **there}  # earlier versions didn't keep it
        if there.keys() != here.keys():
            raise ValueError(f"the checkpoint {folder} was written by another version of this program: start anew")
        if there["step_rows"] != here["step_rows"]:
            batch = self.config.batch
            raise ValueError(
                f"batch.tokens_per_step={batch.tokens_per_step}, batch.sequences={batch.sequences} and "
                f"batch.accumulation={batch.accumulation} on {self.args.world_size} ranks make {here['step_rows']} "
                f"rows a step (by stage), but the checkpoint {folder} was made with {there['step_rows']}: "
                f"{setup.same_steps(self.config, self.args.world_size, there['step_rows'])}"
            )
        if self.rows.streams and there["lanes"] != here["lanes"]:
            raise ValueError(
                f"the checkpoint {folder} read its streams in {there['lanes']} lanes, now there are {here['lanes']}: "
                "continue with as many ranks, or set data.lanes from the start"
            )
        # earlier versions kept nothing of streamed sources
        text = {name: here["text"].get(name) for name in there["text"]}
        if there["text"] != text:
            raise ValueError(
                f"the text has changed since the checkpoint {folder}, which would go on with other rows: there were "
                f"{there['text']} (documents and tokens, or files and bytes of a stream), now there are {text}; "
                "bring the text back, or start a new run from a saved model (model.weights)"
            )
        if self.args.process_index == 0:
            self.sums += torch.tensor([rank["sums"] for rank in ranks], dtype=torch.float64).sum(0).to(self.sums)
        self.step_logged = there["step_logged"]
        self.tokens = self.tokens_logged = there["tokens"]
        self.rows.load_cursors({lane: cursor for rank in ranks for lane, cursor in rank["cursors"].items()})
        self.cursors = dict(self.rows.cursors)  # those of this rank's lanes


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor of the learning rate for the optimizer step after `step` steps: warm-up, half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


# ---- a whole run ----


def train(
    config: TrainConfig, build: Callable[[TrainConfig, PreTrainedTokenizerBase], PreTrainedModel] | None = None
) -> Path:
    """Train a model as configured; returns the run's folder, which then holds a loadable model with its tokenizer.

    Besides the model the folder holds config.yaml (the resolved configuration), log.jsonl, tensorboard event files
    and the newest checkpoints. Called again with the same configuration it goes on where it was stopped.
    build: makes the model from the configuration and the tokenizer; by default a `HybridForCausalLM`.

    Raises: ValueError for anything a user can get wrong, before long work; NonFiniteLoss; CheckpointError; Stopped,
    behind a checkpoint, if the process was told to stop (SIGTERM, SIGUSR1).
    """
    setup.check_device(config)
    output = Path(config.output).expanduser()
    resume = setup.resume_point(config, output)
    finished = resume is not None and setup.is_finished(config, output, resume)
    if finished and setup.world_size() == 1:
        return output
    model_settings = setup.model_config(config)
    build = build or setup.build_model
    stages, accumulation = setup.plan_steps(config, setup.world_size())
    check_data(config.data, stages)
    check_tokenizer_config(config.tokenizer)
    args = setup.training_arguments(
        config, output, accumulation=accumulation, may_skip_parameters=model_settings.keep_all_steps > 0
    )
    resume, finished = setup.agree(args, output, resume, finished)
    if finished:
        return output
    with args.main_process_first(desc="tokenise"):
        tokenizer = setup.make_tokenizer(config, output, save=args.should_save)
        rows = TrainingRows(
            config.data,
            stages,
            tokenizer,
            seed=config.seed,
            rank=args.process_index,
            world=args.world_size,
            progress=config.log.progress and args.should_save,
            vocab_size=model_settings.vocab_size,
        )
    set_seed(config.seed)
    model = build(config, tokenizer)
    if resume is not None:
        checkpoints.check_fits(resume, model)
    # worker processes are forked: the tokenizer's threads must not be used in them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return _run(config, args, rows, tokenizer, model, output, resume)


def _run(
    config: TrainConfig,
    args: TrainingArguments,
    rows: TrainingRows,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    output: Path,
    resume: Path | None,
) -> Path:
    if config.gradient_checkpointing:
        # by the model itself, which restores dropout's random numbers; what Accelerate wraps around shards doesn't
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    args.use_cache = bool(getattr(model.config, "use_cache", True))
    log, stop = LogCallback(output / "log.jsonl", config.log.progress), StopOnSignal()
    callbacks = [RetentionCallback(), log, stop]
    trainer = HybridTrainer(
        config, rows=rows, model=model, args=args, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    if config.log.tensorboard and args.should_save:
        trainer.add_callback(setup.tensorboard(output, resume))
    if resume is not None:
        trainer.load_progress(resume)
    if args.should_save:
        # only now: a refused continuation leaves the configuration of the run's checkpoints
        save_config(config, output / "config.yaml")
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            if stop.agreed:
                step = trainer.state.global_step
                raise Stopped(stop.agreed, step, output / f"checkpoint-{step}")
            trainer.check_state()
            trainer.save_final()
    finally:
        log.close()
    return output
