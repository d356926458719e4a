"""What layers of one forward pass share: computed once a layout, and not taken over by another one."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lte.layout import Layout
from lte.sparsity import retention_stats
from lte.visibility import lifetimes, visible
from tests.op_modes import CountOps

LAYOUTS = {
    "rows": (3, Layout),
    "packed": (1, lambda: Layout(cu_seqlens=torch.tensor([0, 9, 9, 31, 45]))),
    "padded": (3, lambda: Layout(lengths=torch.tensor([45, 7, 20]))),
}
LENGTH, HEADS, RULE = 45, 2, dict(window=7, sinks=2)
# what only makes or moves around numbers that depend on the layout
OF_THE_LAYOUT = {"arange", "searchsorted", "index", "full", "expand", "minimum"}


def layer(layout: Layout, logits: torch.Tensor) -> Counter:
    """Operations of what one attention layer asks of its layout."""
    with CountOps() as ops:
        retention_stats(logits, **RULE, layout=layout)
        lifetimes(logits, batch=len(logits), length=LENGTH, heads=HEADS, **RULE, layout=layout)
        lifetimes(None, batch=len(logits), length=LENGTH, heads=HEADS, **RULE, budget=0, layout=layout)
    return ops.names


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_share_what_depends_on_the_layout(name):
    batch, make = LAYOUTS[name]
    torch.manual_seed(1)
    logits = torch.randn(batch, LENGTH, HEADS)
    layout = make()
    first, second, third = (layer(layout, logits) for _ in range(3))
    assert second == third
    assert not OF_THE_LAYOUT & set(second), second
    assert OF_THE_LAYOUT & set(first), "the first layer computes it"
    assert second.total() <= 15 < first.total(), second


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("budget", [0, 3, 100, None])
def test_layers_of_one_layout_may_have_different_rules(name, budget):
    batch, make = LAYOUTS[name]
    torch.manual_seed(2)
    logits = torch.randn(batch, LENGTH, HEADS)
    layout = make()
    index = torch.arange(LENGTH)
    for window, sinks in ((7, 2), (11, 0), (None, 1), (7, 2)):
        for z in (logits, None):
            rule = dict(batch=batch, length=LENGTH, heads=HEADS, window=window, sinks=sinks, budget=budget)
            end = lifetimes(z, **rule, layout=layout).transpose(1, 2)[:, :, None]
            seen = (index <= index[:, None]) & (index[:, None] < end)
            assert torch.equal(seen, visible(z, **rule, layout=layout))


def test_another_layout_takes_nothing_over():
    layout = Layout(cu_seqlens=torch.tensor([0, 20, 45]))
    before = layout.positions(1, LENGTH, torch.device("cpu"))
    other = replace(layout, cu_seqlens=torch.tensor([0, 45]))
    assert other.positions(1, LENGTH, torch.device("cpu"))[0].tolist() == list(range(LENGTH))
    assert before[0].tolist() == [*range(20), *range(25)]
    assert layout.positions(1, LENGTH, torch.device("cpu")) is before
    assert Layout().positions(2, 5, torch.device("cpu")).shape == (2, 5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_penalty_and_counts_by_hand(name):
    batch, make = LAYOUTS[name]
    torch.manual_seed(3)
    logits = torch.randn(batch, LENGTH, HEADS, dtype=torch.float64, requires_grad=True)
    layout = make()
    for _ in range(2):
        stats = retention_stats(logits, window=7, sinks=2, layout=layout)
        where = Layout(layout.cu_seqlens, layout.lengths)
        position = where.positions(batch, LENGTH, logits.device)
        stop = where.document_ends(batch, LENGTH, logits.device)
        real = position >= 0
        late = (position >= 2) & (torch.arange(LENGTH) + 7 < stop)
        excess = (logits.sigmoid() - 0.5).clamp(min=0)[real].sum(0) / real.sum()
        torch.testing.assert_close(stats.penalty, excess, rtol=1e-12, atol=0)
        assert stats.kept.tolist() == (logits[late] > 0).sum(0).tolist()
        assert stats.eligible.tolist() == [int(late.sum())] * HEADS
        assert int(stats.tokens) == int(real.sum())
        assert stats.kept.dtype == stats.eligible.dtype == torch.float32
        (grad,) = torch.autograd.grad(stats.penalty.sum(), logits)
        (expected,) = torch.autograd.grad(excess.sum(), logits)
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)
