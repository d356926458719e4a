"""The forms of the gated delta rule and of the short convolution agree with their definitions.

Shapes: B batch, T tokens, H heads, K key channels, V value channels, C channels, L remembered inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from lte.layout import Layout
from models.delta_rule import (
    causal_conv1d,
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
    step_causal_conv1d,
    step_gated_delta_rule,
)

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
DOCUMENTS = (1, 2, 7, 300)


def relative_rms(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean().clamp_min(1e-30)).sqrt().item()


def make_inputs(length, *, batch=2, heads=2, key_dim=16, value_dim=16, decay=1.0, seed=0):
    """q, k (unit length), v, g in (-decay, 0), beta, initial state: float32 leaves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    q, k = (F.normalize(normal(batch, length, heads, key_dim), dim=-1) for _ in range(2))
    v = normal(batch, length, heads, value_dim)
    g, beta = -decay * uniform(batch, length, heads), uniform(batch, length, heads)
    return q, k, v, g, beta, normal(batch, heads, key_dim, value_dim)


def leaves(tensors, dtype=torch.float32):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def scalar(*tensors):
    """A loss with another weight for every element."""
    total = 0
    for x in tensors:
        weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).cos().reshape(x.shape)
        total = total + (x.double() * weight).sum()
    return total


@pytest.mark.parametrize("length", [1, 2, 63, 65, 130])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (16, 32), (20, 20), (20, 40)])
def test_chunks_agree_with_the_loop(length, key_dim, value_dim):
    inputs = make_inputs(length, key_dim=key_dim, value_dim=value_dim)
    single, double = leaves(inputs), leaves(inputs, torch.float64)
    actual = chunk_gated_delta_rule(*single[:5], initial_state=single[5], output_final_state=True)
    expected = recurrent_gated_delta_rule(*double)
    for name, a, e in zip(("output", "state"), actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_rms(a, e) <= 1e-5, name
    scalar(*actual).backward()
    scalar(*expected).backward()
    for name, a, e in zip(NAMES, single, double, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-5, name


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 200])
def test_chunk_size_does_not_matter(chunk_size):
    *inputs, state = make_inputs(45)
    actual = chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True, chunk_size=chunk_size)
    expected = recurrent_gated_delta_rule(*[x.double() for x in (*inputs, state)])
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms(a, e) <= 1e-5


def test_float64_is_kept():
    inputs = leaves(make_inputs(70), torch.float64)
    actual = chunk_gated_delta_rule(*inputs[:5], initial_state=inputs[5], output_final_state=True)
    for a, e in zip(actual, recurrent_gated_delta_rule(*inputs), strict=True):
        assert a.dtype == torch.float64
        assert relative_rms(a, e) <= 1e-12


@pytest.mark.parametrize("mixed", [False, True])
def test_strong_decay(mixed):
    """Down to exp(-20) a token; mixed with weak ones, the weak ones keep their digits."""
    inputs = make_inputs(150, decay=20.0)
    if mixed:
        strong = torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(1)) < 0.7
        inputs[3].copy_(torch.where(strong, torch.tensor(-20.0), inputs[3] / 2000))
    single, double = leaves(inputs), leaves(inputs, torch.float64)
    actual = chunk_gated_delta_rule(*single[:5], initial_state=single[5], output_final_state=True)
    expected = recurrent_gated_delta_rule(*double)
    scalar(*actual).backward()
    scalar(*expected).backward()
    for a, e in zip((*actual, *(x.grad for x in single)), (*expected, *(x.grad for x in double)), strict=True):
        assert a.isfinite().all()
        assert relative_rms(a, e) <= 1e-5


def test_equal_keys_without_decay():
    """The triangular system at its hardest: every token overwrites the same key."""
    q, k, v, g, beta, state = make_inputs(130)
    k, g, beta = k[:, :1].expand_as(k), torch.zeros_like(g), torch.ones_like(beta)
    actual, _ = chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    expected, _ = recurrent_gated_delta_rule(*[x.double() for x in (q, k, v, g, beta, state)])
    assert relative_rms(actual, expected) <= 1e-5


@pytest.mark.parametrize("documents", [DOCUMENTS, (64, 64, 3), (3, 0, 61, 1, 64)])
def test_packed_documents_are_alone(documents):
    length = sum(documents)
    inputs = make_inputs(length, batch=1, decay=0.1)[:5]
    packed, alone = leaves(inputs), leaves(inputs, torch.float64)
    cu_seqlens = F.pad(torch.tensor(documents), (1, 0)).cumsum(0).int()
    actual, _ = chunk_gated_delta_rule(*packed, layout=Layout(cu_seqlens=cu_seqlens))
    parts = [x.split(documents, dim=1) for x in alone]
    expected = torch.cat(
        [recurrent_gated_delta_rule(*part)[0] for part in zip(*parts, strict=True) if part[0].shape[1]], dim=1
    )
    assert relative_rms(actual, expected) <= 1e-5
    scalar(actual).backward()
    scalar(expected).backward()
    for name, a, e in zip(NAMES[:5], packed, alone, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-5, name


def test_documents_do_not_see_their_neighbours():
    """Exactly: another first document changes no bit of the second's output."""
    inputs = make_inputs(100, batch=1, decay=0.1)[:5]
    layout = Layout(cu_seqlens=torch.tensor([0, 37, 100]))
    before, _ = chunk_gated_delta_rule(*inputs, layout=layout)
    inputs[2][:, :37] += 100
    after, _ = chunk_gated_delta_rule(*inputs, layout=layout)
    assert not torch.equal(before[:, :37], after[:, :37])
    assert torch.equal(before[:, 37:], after[:, 37:])


def test_packed_documents_have_no_state():
    *inputs, state = make_inputs(9, batch=1)
    layout = Layout(cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunk_gated_delta_rule(*inputs, initial_state=state, layout=layout)
    with pytest.raises(ValueError, match="cu_seqlens"):
        chunk_gated_delta_rule(*inputs, output_final_state=True, layout=layout)
    with pytest.raises(ValueError, match="cu_seqlens"):
        causal_conv1d(torch.zeros(1, 9, 3), torch.zeros(3, 4), torch.zeros(1, 3, 3), layout)


def test_padding_leaves_the_state():
    lengths = (0, 1, 70, 130)
    *inputs, state = make_inputs(130, batch=4)
    actual, final = chunk_gated_delta_rule(
        *inputs, initial_state=state, output_final_state=True, layout=Layout(lengths=torch.tensor(lengths))
    )
    assert torch.equal(final[0], state[0])
    for row, n in enumerate(lengths[1:], start=1):
        expected = recurrent_gated_delta_rule(
            *[x[row : row + 1, :n].double() for x in inputs], state[row : row + 1].double()
        )
        assert relative_rms(actual[row, :n], expected[0][0]) <= 1e-5
        assert relative_rms(final[row], expected[1][0]) <= 1e-5


def test_random_splits_continue():
    *inputs, state = make_inputs(197)
    expected, expected_state = chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    for sizes in ((1, 1, 195), (64, 64, 69), (3, 130, 1, 63)):
        outputs, carried = [], state
        for part in zip(*[x.split(sizes, dim=1) for x in inputs], strict=True):
            output, carried = chunk_gated_delta_rule(*part, initial_state=carried, output_final_state=True)
            outputs.append(output)
        assert relative_rms(torch.cat(outputs, dim=1), expected) <= 1e-5
        assert relative_rms(carried, expected_state) <= 1e-5


def test_steps_agree_with_chunks():
    *inputs, state = make_inputs(70, value_dim=24)
    expected, expected_state = chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    address = state.data_ptr()
    outputs = [step_gated_delta_rule(*[x[:, t : t + 1] for x in inputs], state) for t in range(70)]
    assert state.data_ptr() == address
    assert relative_rms(torch.cat(outputs, dim=1), expected) <= 1e-5
    assert relative_rms(state, expected_state) <= 1e-5


def test_autocast_does_not_lower_the_precision():
    *inputs, state = make_inputs(70)
    expected = chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chunk_gated_delta_rule(*inputs, initial_state=state, output_final_state=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_agrees_with_the_naive_form_of_fla():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    q, k, v, g, beta, state = make_inputs(130, value_dim=32)
    expected = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True)
    actual = chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms(a, e) <= 1e-5


def conv_inputs(length, batch=2, channels=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, channels, generator=generator)
    weight = torch.randn(channels, width, generator=generator)
    return x, weight, torch.randn(batch, channels, width - 1, generator=generator)


def conv_by_definition(x_BTC, weight_CW, state_BCL):
    """Every output as a sum over its taps, token by token."""
    history_BSC = torch.cat([state_BCL.mT, x_BTC], dim=1)
    width = weight_CW.shape[1]
    rows = [(history_BSC[:, t : t + width] * weight_CW.T).sum(1) for t in range(x_BTC.shape[1])]
    return F.silu(torch.stack(rows, dim=1))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("width", [2, 4])
def test_convolution(length, width):
    x, weight, state = conv_inputs(length, width=width)
    expected = conv_by_definition(x.double(), weight.double(), state.double())
    history = torch.cat([state.mT, x], dim=1)
    address = state.data_ptr()
    assert relative_rms(causal_conv1d(x, weight, state), expected) <= 1e-6
    assert state.data_ptr() == address
    assert torch.equal(state, history[:, -(width - 1) :].mT)
    expected = conv_by_definition(x.double(), weight.double(), torch.zeros(2, 5, width - 1).double())
    assert relative_rms(causal_conv1d(x, weight), expected) <= 1e-6


def test_convolution_of_packed_documents():
    x, weight, state = conv_inputs(sum(DOCUMENTS), batch=1)
    packed, alone = leaves((x, weight)), leaves((x, weight), torch.float64)
    cu_seqlens = F.pad(torch.tensor(DOCUMENTS), (1, 0)).cumsum(0)
    actual = causal_conv1d(*packed, layout=Layout(cu_seqlens=cu_seqlens))
    nothing = torch.zeros_like(state, dtype=torch.float64)
    expected = torch.cat(
        [conv_by_definition(part, alone[1], nothing) for part in alone[0].split(DOCUMENTS, dim=1)], dim=1
    )
    scalar(actual).backward()
    scalar(expected).backward()
    assert relative_rms(actual, expected) <= 1e-6
    for a, e in zip(packed, alone, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-5


def test_convolution_state_of_padded_rows():
    x, weight, state = conv_inputs(6, batch=4)
    history = torch.cat([state.mT, x], dim=1)
    lengths = (0, 1, 4, 6)
    expected = conv_by_definition(x, weight, state)
    actual = causal_conv1d(x, weight, state, Layout(lengths=torch.tensor(lengths)))
    for row, n in enumerate(lengths):
        assert torch.allclose(actual[row, :n], expected[row, :n], rtol=1e-5, atol=1e-6)
        assert torch.equal(state[row], history[row, n : n + 3].mT)


def test_convolution_steps():
    x, weight, state = conv_inputs(7)
    stepped = state.clone()
    address = stepped.data_ptr()
    expected = causal_conv1d(x, weight, state)
    actual = torch.stack([step_causal_conv1d(x[:, t], weight, stepped) for t in range(7)], dim=1)
    assert relative_rms(actual, expected) <= 1e-6
    assert stepped.data_ptr() == address
    assert torch.equal(stepped, state)
