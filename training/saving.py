"""The part of the Trainer that writes and reads checkpoints: whole or absent, and for any number of ranks."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from training import checkpoints, sharded
from training.checkpoints import CheckpointError


class SavingTrainer(Trainer):
    """Trainer whose checkpoints appear whole or not at all.

    A sharded model (FSDP2) writes its parts (training/sharded.py), any other whole files; each reads both, over any
    number of ranks. Subclasses say what else a rank keeps (`progress`) and stop before a bad state is saved
    (`check_state`).
    """

    keep: int  # newest whole checkpoints that stay
    saving: Path | None = None

    def progress(self) -> dict[str, Any]:
        """What this rank keeps beside weights and optimizer; JSON values."""
        return {}

    def check_state(self) -> None:
        """Raise where the state must not be saved."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_state()
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
            checkpoints.write_progress(folder, self.args.process_index, self.progress())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.await_progress(folder, self.args.world_size)
                checkpoints.seal(folder)
                checkpoints.publish(folder, output / folder.name)
                checkpoints.rotate(output, self.keep, step)
        except Exception as error:
            raise save_failed(error, output / folder.name) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self.saving, ignore_errors=True)
            self.saving = None
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:  # a checkpoint holds the shards, beside the optimizer's
            whole = sharded.gather(uncompiled(self.model), keep=self.args.should_save)
            if self.args.should_save:
                self._save(output_dir, state_dict=whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save(Path(output_dir), uncompiled(self.model), self.optimizer)
        if self.args.should_save:
            (Path(output_dir) / "scheduler.json").write_text(json.dumps(self.lr_scheduler.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder, target = Path(resume_from_checkpoint), uncompiled(self.model if model is None else model)
        if sharded.is_sharded(folder):
            sharded.load(folder, target)
            return
        state = load_file(folder / "model.safetensors")
        if self.is_fsdp_enabled:
            set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True, strict=False))
        else:
            # names and shapes were checked before; only the second name of tied weights is not in the file
            target.load_state_dict(state, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if sharded.is_sharded(folder):
            sharded.load(folder, uncompiled(self.model), self.optimizer)
            self.lr_scheduler.load_state_dict(json.loads((folder / "scheduler.json").read_text()))
        else:
            optimizer, scheduler = (
                torch.load(folder / name, map_location="cpu", weights_only=True)
                for name in ("optimizer.pt", "scheduler.pt")
            )
            if self.is_fsdp_enabled:
                sharded.spread_optimizer(optimizer, self.optimizer)
            else:
                self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

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
                # the weights last: where they are, a run is taken for finished
                for file in sorted(folder.iterdir(), key=lambda file: file.suffix == ".safetensors"):
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


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model without torch.compile's wrapper, which would be part of every name."""
    return getattr(model, "_orig_mod", model)


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
    older = [p for p in checkpoints.whole(target.parent) if p != target]
    left = f"{older[-1]} is whole and stays" if older else "there is no earlier checkpoint"
    return CheckpointError(
        f"{target} could not be saved ({type(error).__name__}: {error}): {left}; make room on the disk and start the "
        "same command again"
    )
