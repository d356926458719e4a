"""The Gated DeltaNet mixer: sizes, splits, documents, padding, states, and fla's kernels on a GPU.

Shapes: B batch, T tokens, C hidden size.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from lte.layout import Layout
from models import delta_rule, fla_adapter
from models.gated_deltanet import GatedDeltaNet, GatedDeltaNetState, decay_and_strength, l2_normalize

HIDDEN = 24
DOCUMENTS = (1, 2, 7, 300)


def relative_rms(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean().clamp_min(1e-30)).sqrt().item()


def make_mixer(expand_v=1.0, dtype=torch.float32, seed=0, head_dim=20, heads=2, hidden=HIDDEN):
    torch.manual_seed(seed)
    return GatedDeltaNet(hidden, heads, head_dim, expand_v=expand_v).to(dtype)


def make_input(batch, length, seed=1, hidden=HIDDEN):
    return torch.randn(batch, length, hidden, generator=torch.Generator().manual_seed(seed))


def run_in_pieces(mixer, x, sizes, state):
    pieces = x.split(sizes, dim=1)
    return torch.cat([mixer(piece, Layout(), state).hidden for piece in pieces], dim=1)


@pytest.mark.parametrize(("hidden", "heads", "head_dim", "expand_v"), [(1024, 8, 128, 1.0), (96, 3, 32, 2.0)])
def test_parameter_count(hidden, heads, head_dim, expand_v):
    with torch.device("meta"):
        mixer = GatedDeltaNet(hidden, heads, head_dim, expand_v=expand_v)
    keys, values = heads * head_dim, int(heads * head_dim * expand_v)
    linear = hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    rest = 4 * (2 * keys + values) + 2 * heads + int(head_dim * expand_v)
    assert sum(p.numel() for p in mixer.parameters()) == linear + rest
    if hidden == 1024:
        assert linear + rest == 5_271_696


def test_start_values():
    torch.manual_seed(0)
    mixer = GatedDeltaNet(8, 400, 2)
    rate, step = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert 0 < rate.min() < 1 < 15 < rate.max() <= 16
    assert 1e-3 * 0.999 <= step.min() < 2e-3 < 5e-2 < step.max() <= 0.1 * 1.001
    assert mixer.q_conv1d.weight.abs().max() <= 0.5
    before = mixer.v_conv1d.weight.clone()
    mixer.o_norm.weight.data.zero_()
    mixer.reset_parameters()
    assert not torch.equal(before, mixer.v_conv1d.weight)
    assert torch.equal(mixer.o_norm.weight, torch.ones_like(mixer.o_norm.weight))


@pytest.mark.parametrize("expand_v", [1.0, 2.0])
def test_mixer_by_definition(expand_v):
    """Forward and every gradient against float64, written with the token loop."""
    mixer, x = make_mixer(expand_v), make_input(2, 67).requires_grad_()
    double, x_double = make_mixer(expand_v, torch.float64), make_input(2, 67).double().requires_grad_()
    actual = mixer(x, Layout()).hidden

    def convolved(name):
        inputs = getattr(double, f"{name}_proj")(x_double).mT
        weight = getattr(double, f"{name}_conv1d").weight
        channels = weight.shape[0]
        return F.silu(F.conv1d(F.pad(inputs, (3, 0)), weight, groups=channels)).mT.unflatten(-1, (2, -1))

    q, k, v = convolved("q"), convolved("k"), convolved("v")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -double.A_log.exp() * F.softplus(double.a_proj(x_double) + double.dt_bias)
    o, _ = delta_rule.recurrent_gated_delta_rule(q, k, v, g, double.b_proj(x_double).sigmoid())
    o = F.rms_norm(o, o.shape[-1:], double.o_norm.weight, eps=1e-6)
    expected = double.o_proj((o * F.silu(double.g_proj(x_double).unflatten(-1, (2, -1)))).flatten(2))

    assert relative_rms(actual, expected) <= 1e-5
    weight = torch.linspace(0, 9, expected.numel(), dtype=torch.float64).cos().reshape(expected.shape)
    (actual.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_rms(x.grad, x_double.grad) <= 1e-5
    reference = dict(double.named_parameters())
    for name, parameter in mixer.named_parameters():
        assert relative_rms(parameter.grad, reference[name].grad) <= 1e-5, name


def test_packed_documents_are_alone():
    mixer, alone = make_mixer(), make_mixer(dtype=torch.float64)
    x = make_input(1, sum(DOCUMENTS)).requires_grad_()
    x_alone = x.detach().double().requires_grad_()
    cu_seqlens = F.pad(torch.tensor(DOCUMENTS), (1, 0)).cumsum(0).int()
    actual = mixer(x, Layout(cu_seqlens=cu_seqlens)).hidden
    expected = torch.cat([alone(part, Layout()).hidden for part in x_alone.split(DOCUMENTS, dim=1)], dim=1)
    assert relative_rms(actual, expected) <= 1e-5
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert relative_rms(x.grad, x_alone.grad) <= 1e-5
    reference = dict(alone.named_parameters())
    for name, parameter in mixer.named_parameters():
        assert relative_rms(parameter.grad, reference[name].grad) <= 1e-5, name


@pytest.mark.parametrize("sizes", [(133,), (1, 132), (2, 1, 1, 64, 65), (128, 5)])
@torch.no_grad()
def test_any_split_is_one_pass(sizes):
    mixer, x = make_mixer(2.0), make_input(2, 133)
    state = mixer.allocate_state(2, torch.float32)
    addresses = state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()
    expected = mixer(x, Layout()).hidden
    assert relative_rms(run_in_pieces(mixer, x, sizes, state), expected) <= 1e-5
    assert (state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()) == addresses


@torch.no_grad()
def test_steps_are_one_pass():
    mixer, x = make_mixer(), make_input(2, 70)
    state = mixer.allocate_state(2, torch.float32)
    addresses = state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()
    actual = run_in_pieces(mixer, x, (1,) * 70, state)
    whole = mixer.allocate_state(2, torch.float32)
    assert relative_rms(actual, mixer(x, Layout(), whole).hidden) <= 1e-5
    assert relative_rms(state.recurrent_BHKV, whole.recurrent_BHKV) <= 1e-5
    assert relative_rms(state.conv_BCL, whole.conv_BCL) <= 1e-6
    assert (state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()) == addresses


@torch.no_grad()
def test_rows_of_mixed_lengths_continue():
    """Three chunks of mixed lengths, padding filled with NaN, equal each row alone."""
    mixer = make_mixer()
    chunks = [(0, 1, 5, 67), (3, 0, 67, 1), (1, 1, 1, 1)]
    totals = [sum(n) for n in zip(*chunks, strict=True)]
    x = make_input(4, max(totals))
    state = mixer.allocate_state(4, torch.float32)
    done, outputs = [0] * 4, [[] for _ in totals]
    for lengths in chunks:
        piece = torch.full((4, max(lengths), HIDDEN), float("nan"))
        for row, n in enumerate(lengths):
            piece[row, :n] = x[row, done[row] : done[row] + n]
        before = state.recurrent_BHKV.clone(), state.conv_BCL.clone()
        hidden = mixer(piece, Layout(lengths=torch.tensor(lengths)), state).hidden
        assert hidden.isfinite().all()
        for row, n in enumerate(lengths):
            outputs[row].append(hidden[row, :n])
            done[row] += n
            if n == 0:
                assert torch.equal(state.recurrent_BHKV[row], before[0][row])
                assert torch.equal(state.conv_BCL[row], before[1][row])
    for row, n in enumerate(totals):
        alone = mixer.allocate_state(1, torch.float32)
        expected = mixer(x[row : row + 1, :n], Layout(), alone).hidden[0]
        assert relative_rms(torch.cat(outputs[row]), expected) <= 1e-5
        assert relative_rms(state.recurrent_BHKV[row], alone.recurrent_BHKV[0]) <= 1e-5
        assert torch.allclose(state.conv_BCL[row], alone.conv_BCL[0], atol=1e-6)


def test_gradients_with_a_state():
    """A state is a constant: gradients flow through the chunk, one token long too, and stop at the state."""
    mixer, x = make_mixer(), make_input(2, 75)
    state = mixer.allocate_state(2, torch.float32)
    with torch.no_grad():
        mixer(x[:, :5], Layout(), state)
    kept = GatedDeltaNetState(state.conv_BCL.clone(), state.recurrent_BHKV.clone())
    for size in (70, 1):
        piece = x[:, 5 : 5 + size].clone().requires_grad_()
        output = mixer(piece, Layout(), state).hidden
        output.sum().backward()
        assert piece.grad.abs().min() > 0
        assert not state.recurrent_BHKV.requires_grad
        state.conv_BCL.copy_(kept.conv_BCL)
        state.recurrent_BHKV.copy_(kept.recurrent_BHKV)
        with torch.no_grad():
            assert relative_rms(mixer(piece, Layout(), state).hidden, output) <= 1e-5
        state.conv_BCL.copy_(kept.conv_BCL)
        state.recurrent_BHKV.copy_(kept.recurrent_BHKV)


@torch.no_grad()
def test_state():
    mixer = make_mixer(2.0)
    state = mixer.allocate_state(3, torch.bfloat16)
    assert state.conv_BCL.shape == (3, 2 * (20 + 20 + 40), 3)
    assert state.conv_BCL.dtype == torch.bfloat16
    assert state.recurrent_BHKV.shape == (3, 2, 20, 40)
    assert state.recurrent_BHKV.dtype == torch.float32
    assert state.nbytes == 3 * (160 * 3 * 2 + 2 * 20 * 40 * 4)

    state = mixer.allocate_state(3, torch.float32)
    addresses = state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()
    mixer(make_input(3, 9), Layout(), state)
    conv, recurrent = state.conv_BCL.clone(), state.recurrent_BHKV.clone()
    index = torch.tensor([2, 0, 0])
    state.reorder(index)
    assert torch.equal(state.conv_BCL, conv[index])
    assert torch.equal(state.recurrent_BHKV, recurrent[index])
    state.reset()
    assert not state.conv_BCL.any()
    assert not state.recurrent_BHKV.any()
    assert (state.conv_BCL.data_ptr(), state.recurrent_BHKV.data_ptr()) == addresses


@torch.no_grad()
def test_bfloat16_keeps_its_dtypes():
    mixer, x = make_mixer(dtype=torch.bfloat16), make_input(2, 66).bfloat16()
    state = mixer.allocate_state(2, torch.bfloat16)
    actual = run_in_pieces(mixer, x, (65, 1), state)
    assert actual.dtype == torch.bfloat16
    double = make_mixer(dtype=torch.bfloat16).double()
    assert relative_rms(actual, double(x.double(), Layout()).hidden) <= 2e-2


def test_errors():
    with pytest.raises(ValueError, match="num_heads"):
        GatedDeltaNet(8, 0, 4)
    with pytest.raises(ValueError, match="expand_v"):
        GatedDeltaNet(8, 1, 5, expand_v=1.5)
    with pytest.raises(ValueError, match="conv_size"):
        GatedDeltaNet(8, 1, 4, conv_size=1)
    mixer = make_mixer()
    with pytest.raises(ValueError, match="cu_seqlens"):
        mixer(
            make_input(1, 5),
            Layout(cu_seqlens=torch.tensor([0, 2, 5])),
            mixer.allocate_state(1, torch.float32),
        )


def test_a_missing_library_is_named(monkeypatch):
    for name in {"fla", *(name for name in sys.modules if name.startswith("fla."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"fla\.ops.*pip install"):
        fla_adapter.gated_delta_rule(*[torch.zeros(1)] * 7)


def cuda_inputs(length, key_dim, value_dim, heads=3, batch=2, dtype=torch.bfloat16):
    """q, k, v, a, b in `dtype`, A_log, dt_bias and a state in float32."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k = (normal(batch, length, heads, key_dim).to(dtype) for _ in range(2))
    v = normal(batch, length, heads, value_dim).to(dtype)
    a, b = (normal(batch, length, heads).to(dtype) for _ in range(2))
    A_log, dt_bias = normal(heads), normal(heads) - 4
    return [q, k, v, a, b, A_log, dt_bias, normal(batch, heads, key_dim, value_dim)]


def pytorch_form(q, k, v, a, b, A_log, dt_bias, state, layout=None):
    """The rule in float32 on the raw inputs of the kernels."""
    q, k, v, a, b = (x.float() for x in (q, k, v, a, b))
    return delta_rule.chunk_gated_delta_rule(
        l2_normalize(q),
        l2_normalize(k),
        v,
        *decay_and_strength(a, b, A_log, dt_bias),
        initial_state=state,
        output_final_state=state is not None,
        layout=layout,
    )


NAMES = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "state")
GATES = NAMES[3:7]
SIZES = [(64, 64), (60, 120), (256, 256)]
LENGTHS = [1, 63, 130]


def require_gradients(names, kernel, pytorch, tolerance=1e-2):
    """The gradients of these inputs agree (relative RMS)."""
    errors = {name: relative_rms(a.grad, e.grad) for name, a, e in zip(NAMES, kernel, pytorch, strict=False)}
    wrong = {name: f"{errors[name]:.4f}" for name in names if not errors[name] <= tolerance}
    assert not wrong, wrong


def random_gradients(outputs):
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(x.shape, generator=generator, device="cuda") for x in outputs]


def half_squared_norm(outputs):
    return [x.detach() for x in outputs]


def run_both(inputs, upstream, cu_seqlens=None):
    """Inputs of the kernels and of the float32 form, with gradients, after both agreed forward.

    Args:
        inputs: of `cuda_inputs`, with the state or without.
        upstream: the expected outputs -> gradients of the loss with respect to them.
        cu_seqlens: boundaries of packed documents.
    """
    kernel, pytorch = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    state = len(inputs) > 7
    actual = fla_adapter.gated_delta_rule(
        *kernel[:7],
        initial_state_NHKV=kernel[7] if state else None,
        output_final_state=state,
        cu_seqlens=cu_seqlens,
    )
    layout = None if cu_seqlens is None else Layout(cu_seqlens=cu_seqlens)
    expected = pytorch_form(*pytorch[:7], pytorch[7] if state else None, layout)
    actual, expected = ([x for x in pair if x is not None] for pair in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        assert relative_rms(a, e) <= 5e-3
    grads = upstream(expected)
    torch.autograd.backward(actual, [g.to(x.dtype) for g, x in zip(grads, actual, strict=True)])
    torch.autograd.backward(expected, grads)
    return kernel, pytorch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
def test_kernels_agree(length, key_dim, value_dim, dtype):
    both = run_both(cuda_inputs(length, key_dim, value_dim, dtype=dtype), random_gradients)
    require_gradients([name for name in NAMES if dtype == torch.float16 or name not in GATES], *both)


@pytest.mark.gpu
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("key_dim", "value_dim"), SIZES)
def test_gradients_of_half_the_squared_norm(length, key_dim, value_dim):
    """Those of the gates add up over tokens here; with random gradients above they cancel."""
    inputs = cuda_inputs(length, key_dim, value_dim, dtype=torch.float16)
    require_gradients(NAMES, *run_both(inputs, half_squared_norm), tolerance=5e-3)


@pytest.mark.gpu
@pytest.mark.xfail(
    strict=True,
    reason="bfloat16 rounds gradients of decay and strength by more than 1 % (docs/numerics.md)",
)
def test_random_gradients_of_decay_and_strength_in_bfloat16():
    for length in LENGTHS:
        for key_dim, value_dim in SIZES:
            require_gradients(GATES, *run_both(cuda_inputs(length, key_dim, value_dim), random_gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_agree_on_packed_documents(dtype):
    inputs = cuda_inputs(sum(DOCUMENTS), 64, 64, batch=1, dtype=dtype)[:7]
    cu_seqlens = F.pad(torch.tensor(DOCUMENTS), (1, 0)).cumsum(0).int().cuda()
    names = NAMES[:7]
    held = [name for name in names if dtype == torch.float16 or name not in GATES]
    require_gradients(held, *run_both(inputs, random_gradients, cu_seqlens))


@pytest.mark.gpu
def test_step_kernel_agrees():
    inputs = cuda_inputs(9, 64, 128)
    state = inputs[7].clone()
    address = state.data_ptr()
    tokens = [[x[:, t : t + 1] for x in inputs[:5]] for t in range(9)]
    steps = [fla_adapter.gated_delta_rule_step(*token, *inputs[5:7], state) for token in tokens]
    expected, expected_state = pytorch_form(*inputs)
    assert relative_rms(torch.cat(steps, dim=1), expected) <= 5e-3
    assert relative_rms(state, expected_state) <= 5e-3
    assert state.data_ptr() == address


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_kernel_agrees(packed):
    torch.manual_seed(0)
    length = sum(DOCUMENTS)
    cu_seqlens = F.pad(torch.tensor(DOCUMENTS), (1, 0)).cumsum(0).int().cuda() if packed else None
    x, weight = torch.randn(1, length, 96, device="cuda"), torch.randn(96, 4, device="cuda")
    state = None if packed else torch.randn(1, 96, 3, device="cuda").bfloat16()
    kernel, pytorch = ([t.bfloat16().requires_grad_() for t in (x, weight)] for _ in range(2))
    actual = fla_adapter.causal_conv1d(*kernel, state_NCL=state, cu_seqlens=cu_seqlens)
    expected = delta_rule.causal_conv1d(
        *[t.float() for t in pytorch],
        None if state is None else state.float(),
        Layout(cu_seqlens=cu_seqlens),
    )
    assert relative_rms(actual, expected) <= 5e-3
    grad = torch.randn_like(expected)
    actual.backward(grad.to(actual.dtype))
    expected.backward(grad)
    for a, e in zip(kernel, pytorch, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-2


@pytest.mark.gpu
def test_mixer_on_cuda_agrees_with_cpu():
    """The whole mixer in bfloat16: parallel, padded chunks with a state, then steps, against float32 on a CPU."""
    mixer = make_mixer(dtype=torch.bfloat16, head_dim=64, heads=4, hidden=256)
    x, lengths = make_input(3, 90, hidden=256).bfloat16(), torch.tensor([90, 0, 33])
    on_cpu = make_mixer(dtype=torch.bfloat16, head_dim=64, heads=4, hidden=256).float()
    on_cuda = mixer.cuda()
    states = on_cpu.allocate_state(3, torch.float32), on_cuda.allocate_state(3, torch.bfloat16, "cuda")
    with torch.no_grad():
        expected = on_cpu(x.float(), Layout(lengths=lengths), states[0]).hidden
        actual = on_cuda(x.cuda(), Layout(lengths=lengths.cuda()), states[1]).hidden.cpu()
        for row, n in ((0, 90), (2, 33)):
            assert relative_rms(actual[row, :n], expected[row, :n]) <= 2e-2
        assert not states[1].recurrent_BHKV[1].any()
        for t in range(5):
            token = x[:, t : t + 1]
            expected = on_cpu(token.float(), Layout(), states[0]).hidden
            actual = on_cuda(token.cuda(), Layout(), states[1]).hidden.cpu()
            assert relative_rms(actual, expected) <= 2e-2
        assert relative_rms(states[1].recurrent_BHKV.cpu(), states[0].recurrent_BHKV) <= 2e-2


@pytest.mark.gpu
def test_step_is_captured_as_a_graph():
    mixer = make_mixer(dtype=torch.bfloat16, head_dim=64, heads=4, hidden=256).cuda()
    x = make_input(2, 12, hidden=256).bfloat16().cuda()
    state, eager = (mixer.allocate_state(2, torch.bfloat16, "cuda") for _ in range(2))
    token = torch.zeros_like(x[:, :1])
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            mixer(token, Layout(), state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = mixer(token, Layout(), state).hidden
        state.reset()
        for t in range(12):
            token.copy_(x[:, t : t + 1])
            graph.replay()
            assert torch.equal(output, mixer(x[:, t : t + 1], Layout(), eager).hidden)
