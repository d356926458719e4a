"""The L1 penalty on retention, and the control that steers its weight λ to a target density.

Shapes: B batch, T tokens, H KV heads, L attention layers.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from lte.exact import ExactTensors
from lte.layout import Layout

FORGOTTEN = 1000  # training passes without an update that no accumulation of gradients explains


class RetentionStats(NamedTuple):
    """What one layer's scorer decided in one forward pass.

    Attributes:
        penalty: [H] mean over real tokens of relu(r - 0.5), differentiable.
        kept: [H] eligible positions with a positive logit; eligible: [H] positions that a later query of the
            same document could read only by retention.
        tokens: real tokens of the batch.
    """

    penalty: Tensor
    kept: Tensor
    eligible: Tensor
    tokens: Tensor


def retention_stats(logits_BTH: Tensor, *, window: int, sinks: int, layout: Layout | None = None) -> RetentionStats:
    """Penalty and density of retention logits [B, T, H] under a window and sinks."""
    layout = layout or Layout()
    batch, length, heads = logits_BTH.shape
    key = ("eligible", batch, length, heads, window, sinks, logits_BTH.device)
    padding_BT1, eligible_BT1, eligible_H, tokens = layout.once(
        key, lambda: _eligible(batch, length, heads, window, sinks, layout, logits_BTH.device)
    )
    excess_BTH = torch.relu(logits_BTH.sigmoid() - 0.5)
    if padding_BT1 is None:
        penalty_H = excess_BTH.mean((0, 1))
    else:
        # the mean over none is 0
        penalty_H = excess_BTH.masked_fill(padding_BT1, 0.0).sum((0, 1)) / tokens.clamp(min=1)
    kept_H = ((logits_BTH > 0) & eligible_BT1).sum((0, 1), dtype=torch.float32)
    return RetentionStats(penalty=penalty_H, kept=kept_H, eligible=eligible_H, tokens=tokens)


def _eligible(
    batch: int, length: int, heads: int, window: int, sinks: int, layout: Layout, device: torch.device
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Which tokens are padding (None where none can be) and which can be retained, [B, T, 1] each; how many can be
    retained [H], and how many are real."""
    position_BT = layout.positions(batch, length, device)
    left_BT = layout.document_ends(batch, length, device) - torch.arange(length, device=device)
    real_BT = position_BT >= 0
    eligible_BT = real_BT & (position_BT >= sinks) & (left_BT > window)
    padding_BT1 = None if layout.lengths is None else ~real_BT[..., None]
    return padding_BT1, eligible_BT[..., None], eligible_BT.sum().to(torch.float32).expand(heads), real_BT.sum()


class PenaltyControl(ExactTensors):
    """λ of every attention layer and KV head, raised while too much is kept and lowered while too little.

    Every `interval` optimizer steps a moving average of the kept density is compared with the target: above it
    λ grows by half (from `minimum` if it was 0), below 0.95 of it λ is halved (0 under `minimum`). λ, the averages
    and the step count are buffers, so they are in every checkpoint; counts are summed over data-parallel ranks.

    Args:
        layers, heads: L and H.
        target: kept density to steer to, budget / (training length - window).
        interval: optimizer steps between two comparisons.
        minimum, maximum: bounds of a non-zero λ.
        smoothing: weight of the newest step in the moving average.
    """

    EXACT = ("penalty_weight", "density", "counts")  # a λ of 1e-9 is 0 in half precision

    def __init__(
        self,
        layers: int,
        heads: int,
        target: float,
        *,
        interval: int = 32,
        minimum: float = 1e-9,
        maximum: float = 1.0,
        smoothing: float = 0.1,
    ):
        super().__init__()
        self.target, self.interval = target, interval
        self.minimum, self.maximum, self.smoothing = minimum, maximum, smoothing
        # float32 whatever the model's dtype: λ starts at 1e-9, and its steps are small
        f32 = torch.float32
        self.register_buffer("penalty_weight", torch.zeros(layers, heads, dtype=f32))
        self.register_buffer("density", torch.full((layers, heads), -1.0, dtype=f32))  # -1: nothing seen yet
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # counts since the last optimizer step: kept and eligible
        self.register_buffer("counts", torch.zeros(2, layers, heads, dtype=f32), persistent=False)
        self._known: tuple[Tensor, int, int] | None = None
        self._know(0)
        self._passes = 0  # since the last update

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.penalty_weight.zero_()
        self.density.fill_(-1.0)
        self.steps.zero_()
        self.counts.zero_()
        self._know(0)

    def __getstate__(self) -> dict:
        # a copy's tensors count their versions anew
        return {**self.__dict__, "_known": None}

    @torch.compiler.disable
    def steps_done(self) -> int:
        """Optimizer steps so far.

        The device is waited for only where the buffer was written by something else than `update`: a loaded
        checkpoint, a move to another device.
        """
        if self.steps.is_inference():  # has no version
            return int(self.steps)
        if not self._is_known():
            self._know(int(self.steps))
        return self._known[2]

    def _know(self, count: int) -> None:
        """The buffer holds `count` for as long as it is this tensor in this version."""
        self._known = None if self.steps.is_inference() else (self.steps, self.steps._version, count)

    def _is_known(self) -> bool:
        return self._known is not None and self._known[0] is self.steps and self._known[1] == self.steps._version

    def penalty(self, stats: list[RetentionStats]) -> Tensor:
        """Σ λ(l, h) · mean relu(r - 0.5), a scalar; `stats` holds one entry a layer."""
        per_head_LH = torch.stack([s.penalty for s in stats])
        return (self.penalty_weight.to(per_head_LH.dtype) * per_head_LH).sum()

    def count_pass(self) -> None:
        """Note a training pass; warns once if so many came without `update` that it must have been forgotten."""
        if torch.compiler.is_compiling():
            return  # a number that changes would be compiled again and again
        self._passes += 1
        if self._passes == FORGOTTEN:
            warnings.warn(
                f"{FORGOTTEN} training passes without an update of the retention penalty: λ and keep_all_steps stand "
                "still; call model.update_retention_penalty() after each optimizer step, or give the Trainer "
                "callbacks=[lalte.RetentionCallback()]",
                stacklevel=2,
            )

    @torch.no_grad()
    def observe(self, stats: list[RetentionStats]) -> None:
        """Add one forward pass to the counts of the running optimizer step."""
        self.counts += torch.stack([torch.stack([s.kept for s in stats]), torch.stack([s.eligible for s in stats])])

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: fold the counts into the averages and, when due, move λ."""
        self._passes = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        kept_LH, eligible_LH = self.counts
        now_LH = kept_LH / eligible_LH.clamp(min=1)
        mean_LH = torch.where(self.density < 0, now_LH, torch.lerp(self.density, now_LH, self.smoothing))
        self.density.copy_(torch.where(eligible_LH > 0, mean_LH, self.density))
        self.counts.zero_()
        count = self._known[2] if self._is_known() else None
        self.steps += 1
        if count is not None:
            self._know(count + 1)
        weight_LH = self.penalty_weight
        raised = torch.where(weight_LH > 0, 1.5 * weight_LH, self.minimum).clamp(max=self.maximum)
        lowered = torch.where(weight_LH / 2 < self.minimum, 0.0, weight_LH / 2)
        moved = torch.where(self.density > self.target, raised, weight_LH)
        moved = torch.where((self.density >= 0) & (self.density < 0.95 * self.target), lowered, moved)
        weight_LH.copy_(torch.where(self.steps % self.interval == 0, moved, weight_LH))
