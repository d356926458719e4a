"""What users set and read of a model's retention: the policy, the budget, the L1 penalty's control.

Shapes: L attention layers with a scorer, H KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lte.sparsity import PenaltyControl, RetentionStats
from models.config import HybridConfig
from models.mixer import Mixer


def build_penalty_control(config: HybridConfig) -> PenaltyControl | None:
    """λ of every layer and head as the config describes its control; None without a scorer."""
    if not config.has_scorer:
        return None
    return PenaltyControl(
        config.layer_types.count("attention"),
        config.num_key_value_heads,
        config.target_density,
        interval=config.penalty_interval,
        minimum=config.penalty_min,
        maximum=config.penalty_max,
    )


class RetentionControls:
    """The part of `HybridForCausalLM` that concerns retention.

    Attributes:
        penalty_control: λ and the kept densities [L, H] (lte/sparsity.py); None without a scorer.
    """

    penalty_control: PenaltyControl | None

    @property
    def retention(self) -> str:
        """What fills the budget now; `none` in a model without retained tokens."""
        return next((m.retention for m in self._mixers() if m.retention != "none"), "none")

    @property
    def retention_budget(self) -> int:
        """Slots for retained tokens of each KV head, enforced in evaluation and in caches made now."""
        return max(mixer.budget for mixer in self._mixers())

    def set_retention(self, retention: str | None) -> None:
        """Fill the budget by another policy, without training, in forwards and in caches made from now on.

        Slots and memory stay as they are; the policy only chooses other tokens (lte/policies.py). A model that was
        trained without a scorer has a budget of 0: raise it with `set_retention_budget`.

        Args:
            retention: `lte`, `none` (nothing is retained), `recency`, `random`, `h2o`, `tova`, `key_norm` or
                `delta_error`; None: the config's.

        Raises:
            ValueError: unknown, or this model lacks what it needs.
        """
        retention = self.config.retention if retention is None else retention
        self.config.check_retention(retention)
        if retention == "lte" and not self.config.has_scorer:
            raise ValueError("retention='lte': this model has no retention scorer; use another policy, or train one")
        if retention != "none" and "attention" not in self.config.layer_types:
            raise ValueError(f"retention={retention!r}: this model has no attention layers; use another model")
        for mixer in self._mixers():
            mixer.set_retention(retention)

    def set_retention_budget(self, budget: int | None) -> None:
        """Enforce another budget in evaluation and in caches made from now on; None: the config's.

        Raises:
            ValueError: negative, or nothing fills it.
        """
        if budget is not None and budget < 0:
            raise ValueError(f"budget={budget} must be 0 or more, or None for the config's {self.config.budget}")
        if budget and not self.config.has_scorer and self.retention == "none":
            raise ValueError(
                f"budget={budget}: this model has no retention scorer to fill it; use 0 or None, or choose a policy "
                "first with set_retention"
            )
        for mixer in self._mixers():
            mixer.set_budget(self.config.budget if budget is None else budget)

    def use_retention(self, retention: str | None = None, budget: int | None = None) -> None:
        """Policy and budget as a command line gives them; None leaves one of them as it is.

        Raises:
            ValueError: as `set_retention` and `set_retention_budget`, or a policy that has no slots.
        """
        if retention == "none" and budget:
            raise ValueError(
                f"retention='none' retains nothing, so budget={budget} has no use; leave one of them out"
            )
        if retention not in (None, "none") and budget is None and self.retention_budget == 0:
            self.config.check_retention(retention)
            raise ValueError(
                f"retention={retention!r} has no slots to fill: this model's budget is 0; give a budget, such as 512"
            )
        if retention is not None:
            self.set_retention(retention)
        if budget is not None:
            self.set_retention_budget(budget)

    @contextmanager
    def with_retention(self, retention: str | None = None, budget: int | None = None) -> Iterator[None]:
        """`use_retention` for a while; afterwards policy and budget are those from before."""
        before = [(mixer, self.retention, mixer.budget) for mixer in self._mixers()]
        try:
            self.use_retention(retention, budget)
            yield
        finally:
            for mixer, own, slots in before:
                mixer.set_retention(own)
                mixer.set_budget(slots)

    def _mixers(self) -> list[Mixer]:
        return [layer.mixer for layer in self.model.layers]

    def update_retention_penalty(self) -> None:
        """After each optimizer step: steer the L1 penalty's weight to the target density (lte/sparsity.py)."""
        if self.penalty_control is not None:
            self.penalty_control.update()

    @torch.no_grad()
    def retention_report(self) -> dict[str, float]:
        """Kept density (and tokens per head at the training length) and λ, averaged over layers and heads.

        Without the kept ones as long as nothing was measured: in `keep_all_steps`, and with rows within the window.
        """
        control = self.penalty_control
        if control is None:
            return {}
        report = {"lambda_mean": control.penalty_weight.mean(), "lambda_max": control.penalty_weight.max()}
        for layer, row in enumerate(control.penalty_weight):
            report[f"lambda/layer_{layer}"] = row.mean()
        if bool((control.density >= 0).all()):
            eligible = max(0, self.config.max_position_embeddings - self.config.window)
            report["kept_density"] = control.density.mean()
            report["kept_per_head"] = control.density.mean() * eligible
            for layer, row in enumerate(control.density):
                report[f"kept_per_head/layer_{layer}"] = row.mean() * eligible
        return {name: float(value) for name, value in report.items()}

    def _keeps_all(self) -> bool:
        """Whether training is still in the steps that keep everything."""
        control = self.penalty_control
        if control is None or not self.training or self.config.keep_all_steps == 0:
            return False
        return control.steps_done() < self.config.keep_all_steps

    def _penalty_of(self, stats: list[RetentionStats] | None) -> Tensor | None:
        """The L1 penalty of one forward pass, which counts towards the densities while training."""
        if self.training and self.penalty_control is not None and torch.is_grad_enabled():
            self.penalty_control.count_pass()
        if not stats:
            return None
        if self.training and torch.is_grad_enabled():
            self.penalty_control.observe(stats)
        return self.penalty_control.penalty(stats)
