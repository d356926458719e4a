"""What happens around an optimizer step: the control of the retention penalty, the log file, the progress bar."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from models.files import atomic_path


class RetentionCallback(TrainerCallback):
    """Lets a model steer its own retention penalty after each optimizer step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Raises: ValueError where the Trainer's loss leaves the penalty out, or copies of a model count in vain."""
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and the Trainer copies the model for every step "
                "(DataParallel), so that what is kept can't be counted; start it with torchrun, or set "
                "CUDA_VISIBLE_DEVICES to one"
            )
        if args.label_smoothing_factor and model.config.has_scorer:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer makes that loss of logits alone, "
                "without the model's penalty on retention; set it to 0"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.update_retention_penalty()


class LogCallback(TrainerCallback):
    """Appends each log entry to `log.jsonl` as one JSON object, and shows a progress bar.

    After a resume, entries of steps that are about to be done again are dropped.
    """

    def __init__(self, file: Path, progress: bool) -> None:
        self.file, self.progress = file, progress
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # a resumed state carries the intervals of the run before; the present settings count
        state.compute_steps(args, state.max_steps)
        if not state.is_world_process_zero:
            return
        drop_after(self.file, state.global_step)
        if self.progress:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last interval may be a shorter one
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or "loss" not in logs:
            return
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if self.bar is not None:
            self.bar.set_postfix_str(summary(logs))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the progress bar off the terminal's last line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def summary(logs: dict[str, float]) -> str:
    """One line for the progress bar: loss, kept tokens per head, mean λ, tokens per second, MFU."""
    parts = [f"loss {logs['loss']:.3f}"]
    if "kept_per_head" in logs:
        parts.append(f"kept/head {logs['kept_per_head']:.1f}")
    if "lambda_mean" in logs:
        parts.append(f"λ {logs['lambda_mean']:.1e}")
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s'] / 1000:.1f} k tok/s")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    return "  ".join(parts)


def drop_after(file: Path, step: int) -> None:
    """Remove the entries of a log that lie after `step`, and a last line that was cut off."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("step", 0) <= step:
            kept.append(line + "\n")
    with atomic_path(file) as work:
        work.write_text("".join(kept), encoding="utf-8")
