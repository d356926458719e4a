"""What users set and read of a model's retention: the policy, the budget, the L1 penalty's control.

Shapes: L attention layers with a scorer, H KV heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte.sparsity import PenaltyControl, RetentionStats
from models.config import HybridConfig


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
        for layer in self.model.layers:
            layer.mixer.set_retention(retention)

    def set_retention_budget(self, budget: int | None) -> None:
        """Enforce another budget in evaluation and in caches made from now on; None: the config's.

        Raises:
            ValueError: negative, or nothing fills it.
        """
        if budget is not None and budget < 0:
            raise ValueError(f"budget={budget} must be 0 or more, or None for the config's {self.config.budget}")
        mixers = [layer.mixer for layer in self.model.layers]
        if budget and not self.config.has_scorer and all(mixer.retention == "none" for mixer in mixers):
            raise ValueError(
                f"budget={budget}: this model has no retention scorer to fill it; use 0 or None, or choose a policy "
                "first with set_retention"
            )
        for mixer in mixers:
            mixer.set_budget(self.config.budget if budget is None else budget)

    def update_retention_penalty(self) -> None:
        """After each optimizer step: steer the L1 penalty's weight to the target density (lte/sparsity.py)."""
        if self.penalty_control is not None:
            self.penalty_control.update()

    @torch.no_grad()
    def retention_report(self) -> dict[str, float]:
        """Kept density (and tokens per head at the training length) and λ, averaged over layers and heads."""
        control = self.penalty_control
        if control is None:
            return {}
        density = control.density.clamp(min=0)
        eligible = max(0, self.config.max_position_embeddings - self.config.window)
        report = {
            "kept_density": density.mean(),
            "kept_per_head": density.mean() * eligible,
            "lambda_mean": control.penalty_weight.mean(),
            "lambda_max": control.penalty_weight.max(),
        }
        for layer, row in enumerate(density):
            report[f"kept_per_head/layer_{layer}"] = row.mean() * eligible
            report[f"lambda/layer_{layer}"] = control.penalty_weight[layer].mean()
        return {name: float(value) for name, value in report.items()}

    def _keeps_all(self) -> bool:
        """Whether training is still in the steps that keep everything."""
        control = self.penalty_control
        if control is None or not self.training or self.config.keep_all_steps == 0:
            return False
        return int(control.steps) < self.config.keep_all_steps

    def _penalty_of(self, stats: list[RetentionStats] | None) -> Tensor | None:
        """The L1 penalty of one forward pass, which counts towards the densities while training."""
        if not stats:
            return None
        if self.training:
            self.penalty_control.observe(stats)
        return self.penalty_control.penalty(stats)
