"""Intervals of 95 % for what `results.wilson` doesn't cover, and when a difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

HIGHER_IS_BETTER = {"accuracy": True, "tokens_per_s": True}  # every other metric: lower


def bootstrap(
    values_NF: Sequence[Sequence[float]],
    statistic: Callable[[torch.Tensor], torch.Tensor],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float | None, float | None]:
    """Percentile interval of a statistic of N samples with F features each; (None, None) of one, which says nothing.

    Args:
        statistic: takes the features' means over samples, float64 [draws, F]; gives [draws].
        draws: resamples.
        seed: of the resampling.
    """
    if len(values_NF) < 2:
        return None, None
    data_NF = torch.tensor(values_NF, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(draws):
        picked_N = torch.randint(len(data_NF), (len(data_NF),), generator=generator)
        means.append(data_NF[picked_N].mean(0))
    drawn = statistic(torch.stack(means)).sort().values
    return float(drawn[int(0.025 * draws)]), float(drawn[min(draws - 1, int(0.975 * draws))])


class Moments:
    """Mean and standard error of numbers that come in batches, in constant memory."""

    def __init__(self, count: int = 0, total: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.total, self.squares = count, total, squares

    def add(self, values: torch.Tensor) -> None:
        """Adds all entries of a tensor, summed in float64."""
        values = values.double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    @property
    def mean(self) -> float:
        """NaN without a number."""
        return self.total / self.count if self.count else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite below two numbers."""
        if self.count < 2:
            return math.inf
        variance = max(0.0, self.squares / self.count - self.mean**2) * self.count / (self.count - 1)
        return math.sqrt(variance / self.count)


def winner(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the rows of one case and metric, if its interval lies apart from all others; else None.

    Nothing wins where only one system was measured, or where an interval is missing.
    """
    rows = list(rows)
    if len(rows) < 2 or any(row["low"] is None or row["high"] is None for row in rows):
        return None
    sign = 1 if HIGHER_IS_BETTER.get(rows[0]["metric"], False) else -1
    best = max(rows, key=lambda row: sign * row["median"])
    worst_of_best = best["low"] if sign > 0 else -best["high"]
    for other in rows:
        best_of_other = other["high"] if sign > 0 else -other["low"]
        if other is not best and best_of_other >= worst_of_best:
            return None
    return best
