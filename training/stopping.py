"""A run that is told to stop ends its step, writes a checkpoint and leaves: machines are taken back with notice."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send some time before they kill
GRACE = 120  # seconds that processes which prepare batches go on after the signal


class Stopped(Exception):
    """A run was told to stop and has written a checkpoint of the step that it was in.

    Attributes: signal, the number of the signal.
    """

    def __init__(self, number: int, step: int, folder: Any) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}: {folder} is whole; the same command goes on from it")
        self.signal = number


class StopOnSignal(TrainerCallback):
    """Ends training behind a checkpoint once one of `SIGNALS` has come, on all ranks after the same step.

    A signal may reach some ranks only, and each at another time. So ranks sum up after every step what they have
    heard, and read a step later what came out, when the device needn't be waited for any more.

    Attributes: agreed, the signal's number once training ends by it, else 0.
    """

    def __init__(self) -> None:
        self.agreed = 0
        self._heard = 0
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals inside of the block; after it they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield  # handlers belong to the main thread
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        self._heard = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        number = self._heard if args.world_size == 1 else self._of_all(args.device)
        if number and state.global_step < state.max_steps:
            self.agreed = number
            control.should_save = control.should_training_stop = True

    def _of_all(self, device: torch.device) -> int:
        """What any rank had heard when the step before ended."""
        before = self._asked
        heard = torch.full((), self._heard, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
        event = None
        if device.type == "cuda":
            heard = heard.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._asked = heard, event
        if before is None:
            return 0
        heard, event = before
        if event is not None:
            event.synchronize()
        return int(heard)


def outlive(worker: int) -> None:
    """For a process that prepares batches: a signal to all of a run's processes must not end it before the run.

    It is killed later, so that one which hangs can't keep the run from leaving.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
