"""The Hugging Face Trainer with this project's data, schedule and checkpoints, and `train(config)` around it."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from training import checkpoints, setup
from training.callbacks import LogCallback, RetentionCallback
from training.checkpoints import CheckpointError
from training.config import TrainConfig, save_config
from training.data import StepBatches, TrainingRows, check_data, plan_stages
from training.rows import IGNORED, collate
from training.tokenizer import check_tokenizer_config


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the checkpoints written before are kept."""


class HybridTrainer(Trainer):
    """Trainer over `TrainingRows`.

    Batches are packed ([1, N] with cu_seqlens) and are a function of the step; the optimizer's groups come from
    `model.parameter_groups`; checkpoints appear whole or not at all; a loss that is not finite ends the run.
    """

    def __init__(self, config: TrainConfig, *, rows: TrainingRows, **kwargs: Any) -> None:
        super().__init__(train_dataset=rows, data_collator=collate, **kwargs)
        # the model divides by the predicted tokens of the whole step, which get_batch_samples counts
        self.model_accepts_loss_kwargs = True
        self.config, self.rows = config, rows
        self.cursors: dict[str, Any] = {}
        self.saving: Path | None = None
        device = self.args.device
        # sums of loss, lm_loss, penalty and micro-batches since the last log entry; mps has no float64
        self.sums = torch.zeros(4, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.tokens, self.tokens_logged, self.time_logged = 0, 0, time.perf_counter()

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
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Predicted tokens of an optimizer step over all ranks: labelled ones that begin no document."""
        count = torch.zeros((), dtype=torch.int64)
        for batch in batch_samples:
            labelled = batch["labels"][0] != IGNORED
            count += labelled.sum() - labelled[batch["cu_seqlens"][:-1].long()].sum()
        return self.accelerator.reduce(count.to(device), reduction="sum").clamp(min=1)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        penalty = outputs.aux_loss
        seen = [outputs.loss, outputs.lm_loss, torch.zeros_like(outputs.loss) if penalty is None else penalty]
        self.sums[:3] += torch.stack([x.detach().float() for x in seen]).to(self.sums)
        self.sums[3] += 1
        # ranks average their gradients, while the loss was divided by the tokens of all ranks
        loss = outputs.loss * self.args.world_size
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
            last = checkpoints.checkpoints(Path(self.args.output_dir))
            kept = f"{last[-1]} is kept" if last else "no checkpoint was written yet"
            raise NonFiniteLoss(
                f"the loss is not finite at step {step}: {kept}; lower optimizer.lr (now "
                f"{self.config.optimizer.lr:g}), raise optimizer.warmup_steps, or use precision=fp32"
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
        steps = sums[3] / (self.args.gradient_accumulation_steps * self.args.world_size)
        self.tokens_logged, self.time_logged = self.tokens, now
        return {
            "loss": sums[0] / steps,
            "lm_loss": sums[1] / steps,
            "retention_penalty": sums[2] / sums[3],
            **self.accelerator.unwrap_model(self.model).retention_report(),
            "sequence_length": stage.sequence_length,
            "tokens": self.tokens,
            "tokens_per_s": speed,
        }

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        output, step = Path(self.args.output_dir), self.state.global_step
        self.saving = output / checkpoints.SAVING
        folder = self.saving / f"checkpoint-{step}"
        try:
            if self.args.should_save:
                shutil.rmtree(self.saving, ignore_errors=True)
                folder.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with no_progress_bars():
                super()._save_checkpoint(model, trial)
            checkpoints.write_progress(folder, self.args.process_index, self._progress())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(folder)
                checkpoints.publish(folder, output / folder.name)
                checkpoints.rotate(output, self.config.checkpoint.keep)
        except Exception as error:
            raise save_failed(error, output / folder.name) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self.saving, ignore_errors=True)
            self.saving = None
        self.accelerator.wait_for_everyone()

    def _progress(self) -> dict[str, Any]:
        return {"cursors": self.cursors, "tokens": self.tokens, "sums": self.sums.tolist()}

    def load_progress(self, folder: Path) -> None:
        """Take up the running sums and the places in streamed sources from a checkpoint."""
        progress = checkpoints.read_progress(folder, self.args.process_index)
        self.sums = torch.tensor(progress["sums"], dtype=torch.float64, device=self.sums.device)
        self.tokens = self.tokens_logged = progress["tokens"]
        self.cursors = progress["cursors"]
        self.rows.load_cursors(self.cursors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        target = self.model if model is None else model
        if self.is_fsdp_enabled:
            set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            # names and shapes were checked before; only the second name of tied weights is not in the file
            target.load_state_dict(state, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for target, name in ((self.optimizer, "optimizer.pt"), (self.lr_scheduler, "scheduler.pt")):
            target.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def save_final(self) -> None:
        """Put the trained model and its tokenizer into the run's folder, file by file, each whole.

        Raises: CheckpointError, with the newest checkpoint untouched.
        """
        output = Path(self.args.output_dir)
        folder = output / checkpoints.SAVING
        try:
            with no_progress_bars():
                self.save_model(str(folder))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for file in sorted(folder.iterdir()):
                    os.replace(file, output / file.name)
        except Exception as error:
            raise save_failed(error, output / "model.safetensors") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # safetensors and JSON only: no pickled arguments beside the weights
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(
            folder, state_dict=state_dict
        )
        self.processing_class.save_pretrained(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars that transformers draws while saving: they would break the run's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save_failed(error: Exception, target: Path) -> CheckpointError:
    """The error of a checkpoint that could not be written, with what is left and what to do."""
    older = [p for p in checkpoints.checkpoints(target.parent) if p != target and checkpoints.defect(p) is None]
    left = f"{older[-1]} is whole and stays" if older else "there is no earlier checkpoint"
    return CheckpointError(
        f"{target} could not be saved ({type(error).__name__}: {error}): {left}; make room on the disk and start the "
        "same command again"
    )


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

    Raises: ValueError for anything a user can get wrong, before long work; NonFiniteLoss; CheckpointError.
    """
    setup.check_device(config)
    output = Path(config.output).expanduser()
    resume = setup.resume_point(config, output)
    if resume is not None and setup.is_finished(config, output, resume):
        return output
    model_settings = setup.model_config(config)
    build = build or setup.build_model
    stages = plan_stages(
        config.data, config.needles, config.curriculum, steps=config.steps, sequences=config.batch.sequences
    )
    check_data(config.data, stages)
    check_tokenizer_config(config.tokenizer)
    args = setup.training_arguments(config, output, may_skip_parameters=model_settings.keep_all_steps > 0)
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
    if args.should_save:
        save_config(config, output / "config.yaml")
    args.use_cache = bool(getattr(model.config, "use_cache", True))
    log = LogCallback(output / "log.jsonl", config.log.progress)
    trainer = HybridTrainer(
        config, rows=rows, model=model, args=args, processing_class=tokenizer, callbacks=[RetentionCallback(), log]
    )
    trainer.remove_callback(PrinterCallback)
    if config.log.tensorboard and args.should_save:
        trainer.add_callback(setup.tensorboard(output, resume))
    if resume is not None:
        trainer.load_progress(resume)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.check_finite()
        trainer.save_final()
    finally:
        log.close()
    return output
