"""The scorer in its three forms, and the penalty's control."""

import pickle
from copy import deepcopy

import pytest
import torch

from lte.layout import Layout
from lte.scorer import RetentionScorer
from lte.sparsity import PenaltyControl, RetentionStats, retention_stats
from tests.op_modes import NoReading


def build(heads=3, dim=16, **kwargs):
    torch.manual_seed(0)
    scorer = RetentionScorer(heads, dim, **kwargs).eval()
    with torch.no_grad():
        for p in scorer.parameters():
            p.normal_(std=0.3)
    return scorer


def test_default_size_and_reach():
    scorer = RetentionScorer(16, 64)
    assert sum(p.numel() for p in scorer.parameters()) == 16 * 32385
    assert scorer.lookahead == 6
    assert torch.all(scorer.out_bias == 0.5)
    shared = RetentionScorer(16, 64, share_heads=True)
    assert sum(p.numel() for p in shared.parameters()) == 32385


def test_start_from_keeping_everything():
    """However large keys and values are; with Kaiming weights only small ones start there."""
    torch.manual_seed(0)
    x = torch.randn(2, 37, 3, 32)
    kaiming, zero = RetentionScorer(3, 16).eval(), RetentionScorer(3, 16, init_scale=0.0).eval()
    assert (kaiming(0.01 * x) > 0).all()
    assert not (kaiming(100 * x) > 0).all()
    logits = zero(100 * x)
    assert (logits == 0.5).all()
    logits.backward(torch.randn_like(logits))
    assert zero.out_weight.grad.abs().min() > 0


def test_agrees_with_grouped_convolutions():
    scorer = build()
    x = torch.randn(2, 37, 3, 32)
    y = x.permute(0, 2, 3, 1).reshape(2, 3 * 32, 37)
    for weight, bias in zip(scorer.weights, scorer.biases, strict=True):
        kernel = weight.permute(0, 3, 2, 1).reshape(-1, weight.shape[2], 3)  # [H * O, C, taps]
        y = torch.nn.functional.silu(
            torch.nn.functional.conv1d(y, kernel, bias.flatten(), padding="same", dilation=2, groups=3)
        )
    y = y.view(2, 3, -1, 37)
    expected = torch.einsum("bhct,hc->bth", y, scorer.out_weight) + scorer.out_bias
    torch.testing.assert_close(scorer(x), expected, atol=1e-5, rtol=1e-5)


def test_receptive_field_is_thirteen():
    scorer = build()
    x = torch.randn(1, 60, 3, 32, requires_grad=True)
    scorer(x)[0, 30].sum().backward()
    touched = x.grad[0].abs().sum((1, 2)).nonzero().flatten().tolist()
    assert (touched[0], touched[-1]) == (24, 36)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("sizes", "dilations"), [((3, 3, 3), (2, 2, 2)), ((5, 3), (1, 3))])
def test_streaming_in_any_split_gives_the_parallel_logits(share, sizes, dilations):
    scorer = build(kernel_sizes=sizes, dilations=dilations, share_heads=share)
    generator = torch.Generator().manual_seed(1)
    total, batch, ahead = 71, 3, scorer.lookahead
    x = torch.randn(batch, total, 3, 32, generator=generator)
    expected = scorer(x)
    state = scorer.allocate_state(batch, dtype=x.dtype, device=x.device)
    addresses = [s.data_ptr() for s in state.inputs]
    seen = torch.zeros(batch, dtype=torch.int64)
    while int(seen.min()) < total:
        size = int(torch.randint(1, 20, (), generator=generator))
        lengths = torch.randint(0, size + 1, (batch,), generator=generator).minimum(total - seen)
        if int((total - seen).min()) >= 1 and torch.rand((), generator=generator) < 0.4:
            size, lengths = 1, torch.ones(batch, dtype=torch.int64)
        index = (seen[:, None] + torch.arange(size)).clamp(max=total - 1)
        full = size == 1 and bool((lengths == 1).all())
        out = scorer.stream(x[torch.arange(batch)[:, None], index], state, seen, None if full else lengths)
        for b in range(batch):
            for t in range(int(lengths[b])):
                j = int(seen[b]) + t - ahead
                if j >= 0:
                    torch.testing.assert_close(out[b, t], expected[b, j], atol=1e-5, rtol=1e-5)
        seen = seen + lengths
    assert [s.data_ptr() for s in state.inputs] == addresses


def test_packed_documents_give_what_each_gives_alone():
    scorer = build()
    x = torch.randn(1, 310, 3, 32, requires_grad=True)
    out = scorer(x, Layout(cu_seqlens=torch.tensor([0, 1, 3, 10, 310])))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    for start, stop in [(0, 1), (1, 3), (3, 10), (10, 310)]:
        piece = x[:, start:stop].detach().requires_grad_()
        alone = scorer(piece)
        torch.testing.assert_close(out[:, start:stop], alone, atol=1e-5, rtol=1e-5)
        (piece_grad,) = torch.autograd.grad(alone.square().sum(), piece)
        torch.testing.assert_close(grad[:, start:stop], piece_grad, atol=1e-4, rtol=1e-4)


def test_gradients_against_float64():
    scorer = build()
    x = torch.randn(2, 33, 3, 32)
    names = [n for n, _ in scorer.named_parameters()]
    single = torch.autograd.grad(scorer(x).square().sum(), list(scorer.parameters()))
    double = torch.autograd.grad(scorer.double()(x.double()).square().sum(), list(scorer.parameters()))
    for name, a, b in zip(names, single, double, strict=True):
        assert ((a.double() - b).pow(2).mean() / b.pow(2).mean()).sqrt() < 1e-5, name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel_sizes": (3, 4, 3)}, "kernel_sizes"),
        ({"kernel_sizes": (3, 3)}, "one of each"),
        ({"dilations": (2, 0, 2)}, "dilations"),
    ],
)
def test_bad_sizes_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RetentionScorer(2, 16, **kwargs)
    with pytest.raises(ValueError, match="head_dim=18"):
        RetentionScorer(2, 18)


def test_stats_count_what_only_retention_can_serve():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0, 4.0, 1.0, 1.0, 9.0, 9.0])[None, :, None]
    stats = retention_stats(logits, window=2, sinks=1, layout=Layout(cu_seqlens=torch.tensor([0, 6, 8, 10])))
    # first document: positions 1, 2, 3 leave the window before it ends; the others are shorter than the window
    assert stats.eligible.tolist() == [3.0]
    assert stats.kept.tolist() == [2.0]
    expected = (logits.sigmoid() - 0.5).clamp(min=0).mean()
    torch.testing.assert_close(stats.penalty, expected[None])
    padded = retention_stats(logits, window=2, sinks=1, layout=Layout(lengths=torch.tensor([6])))
    torch.testing.assert_close(padded.penalty, (logits[:, :6].sigmoid() - 0.5).clamp(min=0).mean()[None])
    assert int(padded.tokens) == 6


def feed(control, density):
    """One optimizer step at a given density."""
    shape = control.penalty_weight.shape
    hundred = torch.full((shape[1],), 100.0)
    stats = [RetentionStats(torch.zeros(shape[1]), d * 100, hundred, torch.tensor(1)) for d in density]
    control.observe(stats)
    control.update()


def test_penalty_control_moves_every_interval_and_keeps_its_bounds():
    control = PenaltyControl(1, 3, target=0.2)
    for step in range(1, 33):
        feed(control, torch.tensor([[0.9, 0.1, 0.195]]))
        assert control.penalty_weight.any() == (step == 32)
    torch.testing.assert_close(control.penalty_weight, torch.tensor([[1e-9, 0.0, 0.0]]), atol=0, rtol=1e-6)
    for _ in range(32):
        feed(control, torch.tensor([[0.9, 0.1, 0.195]]))
    torch.testing.assert_close(control.penalty_weight, torch.tensor([[1.5e-9, 0.0, 0.0]]), atol=0, rtol=1e-6)
    for _ in range(32 * 60):
        feed(control, torch.tensor([[0.9, 0.1, 0.195]]))
    assert control.penalty_weight[0, 0] == 1.0
    for _ in range(32 * 3):
        feed(control, torch.tensor([[0.195, 0.1, 0.9]]))
    between = control.penalty_weight[0, 0].item()
    for _ in range(32 * 5):
        feed(control, torch.tensor([[0.195, 0.1, 0.9]]))
    assert control.penalty_weight[0, 0] == between  # 0.95 to 1 times the target: unchanged
    for _ in range(32 * 40):
        feed(control, torch.tensor([[0.0, 0.0, 0.0]]))
    assert not control.penalty_weight.any()


def test_a_penalty_is_halved_down_to_its_minimum():
    control = PenaltyControl(1, 4, target=0.25, interval=1)
    control.penalty_weight.copy_(torch.tensor([[1.0, 2e-9, 1.9e-9, 0.5]]))
    feed(control, torch.tensor([[0.1, 0.1, 0.1, 0.25]]))
    expected = torch.tensor([[0.5, 1e-9, 0.0, 0.5]])  # at the target: unchanged
    torch.testing.assert_close(control.penalty_weight, expected, atol=0, rtol=1e-6)


def test_a_measured_density_of_zero_is_averaged_with_what_follows():
    control = PenaltyControl(1, 1, target=0.25)
    feed(control, torch.tensor([[0.0]]))
    feed(control, torch.tensor([[1.0]]))
    torch.testing.assert_close(control.density, torch.tensor([[control.smoothing]]))


def test_penalty_control_starts_anew():
    control = PenaltyControl(1, 2, target=0.25, interval=1)
    feed(control, torch.tensor([[0.9, 0.9]]))
    assert control.penalty_weight.all()
    control.reset_parameters()
    fresh = PenaltyControl(1, 2, target=0.25, interval=1)
    assert all(torch.equal(x, fresh.state_dict()[name]) for name, x in control.state_dict().items())
    assert (control.steps_done(), control.counts.any()) == (0, False)


def test_penalty_control_steers_a_simulated_density_to_the_target():
    """Density falls as λ grows, as it does in training: the control settles around the target."""
    control = PenaltyControl(2, 2, target=0.25)
    sensitivity = torch.tensor([[1e2, 1e3], [1e4, 1e5]])
    history = []
    for step in range(32 * 150):
        density = 1 / (1 + sensitivity * control.penalty_weight)
        feed(control, density)
        if step > 32 * 100:
            history.append(density)
    mean = torch.stack(history).mean(0)
    assert ((mean > 0.15) & (mean < 0.35)).all(), mean


def test_penalty_control_is_in_the_state_dict_without_running_counts():
    control = PenaltyControl(1, 2, target=0.1)
    assert set(control.state_dict()) == {"penalty_weight", "density", "steps"}
    stats = RetentionStats(torch.tensor([0.1, 0.2]), torch.ones(2), torch.ones(2), torch.tensor(1))
    control.penalty_weight.copy_(torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(control.penalty([stats]), torch.tensor(0.8))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_penalty_control_stays_in_float32(convert, device):
    """In half precision a λ of 1e-9 is 0, and in bfloat16 an average near its target doesn't move."""
    control = PenaltyControl(1, 2, target=0.2)
    control.penalty_weight.fill_(1e-9)
    control.density.fill_(0.1234567)
    before = {name: value.to(device) for name, value in control.named_buffers()}
    convert(torch.nn.Sequential(control.to(device)))
    for name, value in control.named_buffers():
        assert (value.dtype, value.device.type) == (before[name].dtype, device)
        assert device == "meta" or torch.equal(value, before[name])


def test_steps_without_eligible_positions_leave_the_average():
    control = PenaltyControl(1, 1, target=0.1)
    control.update()
    assert control.density.item() == -1
    feed(control, torch.tensor([[0.5]]))
    control.update()
    assert control.density.item() == 0.5


def test_steps_are_known_without_reading_the_buffer():
    control = PenaltyControl(1, 2, target=0.2)
    with NoReading():
        assert control.steps_done() == 0
        for step in range(1, 4):
            control.update()
            assert control.steps_done() == step
        control.reset_parameters()
        assert control.steps_done() == 0
    with NoReading(), pytest.raises(AssertionError, match="is read"):
        int(control.steps)


def written_in_place(control):
    control.steps.fill_(9)
    return control


def loaded(control):
    control.load_state_dict({**control.state_dict(), "steps": torch.tensor(9)})
    return control


def replaced(control):
    control.load_state_dict({**control.state_dict(), "steps": torch.tensor(9)}, assign=True)
    return control


def copied(control):
    other = deepcopy(written_in_place(control))
    control.steps.fill_(1)
    return other


def pickled(control):
    return pickle.loads(pickle.dumps(written_in_place(control)))


def moved(control):
    control.to("meta")
    control.steps = torch.tensor(9)
    return control


@pytest.mark.parametrize("change", [written_in_place, loaded, replaced, copied, pickled, moved])
@pytest.mark.parametrize("updates", range(1, 5))
def test_steps_done_is_the_buffer_whoever_wrote_it(change, updates):
    control = PenaltyControl(1, 2, target=0.2)
    for _ in range(updates):
        control.update()
    assert control.steps_done() == updates
    other = change(control)
    if change is not moved:
        for step in range(5):
            other.update()
            assert int(other.steps) == 10 + step
            if step == 3:
                continue  # not asked after every step
            assert other.steps_done() == 10 + step
    else:
        assert other.steps_done() == 9


def test_a_copy_that_is_not_asked_for_a_while_counts_right():
    control = PenaltyControl(1, 2, target=0.2)
    for _ in range(3):
        control.update()
    for later in range(8):
        other = deepcopy(control)
        for _ in range(later):
            other.update()
        assert other.steps_done() == int(other.steps) == 3 + later
