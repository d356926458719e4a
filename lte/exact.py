"""Numbers that 16 bits are too coarse for, in models that are converted to 16 bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class ExactTensors(nn.Module):
    """A module of which some parameters and buffers keep their dtype when a model is converted.

    They move to other devices as ever; `half()`, `bfloat16()` and `to(dtype)` leave them as they are.

    Attributes:
        EXACT: their names.
    """

    EXACT: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactTensors:
        before = {name: getattr(self, name).detach() for name in self.EXACT}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                new.data = new.data.to(old.dtype) if old.is_meta else old.to(new.device)
                if new.grad is not None:
                    new.grad = new.grad.to(old.dtype)
        return self
