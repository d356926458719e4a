"""Native sparse attention: the op by its definition, documents, splits, rows, states, models, and fla's forms.

Shapes: B batch, T tokens, N query heads, H KV heads, D head dimension, C hidden size.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import HybridConfig, HybridForCausalLM, fla_adapter, nsa_reference
from models.mixer import Context
from models.native_sparse_attention import NativeSparseAttention, NativeSparseState
from models.nsa_reference import native_sparse_attention
from models.rotary import rotary_angles

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
DOCUMENTS = (1, 2, 7, 100)
SIZES = {"block_size": 4, "selected_blocks": 3, "window": 5}
HIDDEN = 20


def relative_rms(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean().clamp_min(1e-30)).sqrt().item()


def make_inputs(batch, length, heads=4, kv_heads=2, dim=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim), (heads, 3)]
    # keys with a large spread: some blocks matter, so that the selection isn't of equals
    q, k, v, gates = (torch.randn(batch, length, *s, generator=g, dtype=torch.float64) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in (q * 2, k * 2, v, gates.sigmoid())]


def bounds_of(documents):
    return F.pad(torch.tensor(documents), (1, 0)).cumsum(0).int()


def by_definition(q, k, v, gates, *, block_size, selected_blocks, window):
    """One document, query by query, in plain indexing; also the blocks selected for each query and KV head."""
    batch, length, heads, dim = q.shape
    group = heads // k.shape[2]
    rows, chosen_blocks = [], {}
    for b in range(batch):
        for t in range(length):
            outputs = []
            for h in range(k.shape[2]):
                mine = slice(h * group, (h + 1) * group)
                query = q[b, t, mine] * dim**-0.5
                full = [range(s, s + block_size) for s in range(0, t + 2 - block_size, block_size)]
                compressed, importance = torch.zeros_like(query), torch.zeros(length, dtype=q.dtype)
                if full:
                    means = [torch.stack([x[b, block, h].mean(0) for block in full]) for x in (k, v)]
                    weight = (query @ means[0].T).softmax(-1)
                    compressed = weight @ means[1]
                    importance[: len(full)] = weight.detach().sum(0)
                own = t // block_size
                always = {0, own, max(0, own - 1)}
                others = sorted(set(range(own)) - always, key=lambda c: (-importance[c].item(), c))
                chosen = sorted([*always, *others[: selected_blocks - len(always)]])
                chosen_blocks[b, t, h] = chosen
                tokens = [j for c in chosen for j in range(c * block_size, (c + 1) * block_size) if j <= t]
                near = list(range(max(0, t - window + 1), t + 1))
                read = [(query @ k[b, j, h].T).softmax(-1) @ v[b, j, h] for j in (tokens, near)]
                g = gates[b, t, mine]
                outputs.append(g[:, :1] * compressed + g[:, 1:2] * read[0] + g[:, 2:] * read[1])
            rows.append(torch.cat(outputs))
    return torch.stack(rows).view(batch, length, heads, dim), chosen_blocks


@pytest.mark.parametrize(
    ("sizes", "heads", "kv_heads"),
    [
        (SIZES, 4, 2),
        ({"block_size": 4, "selected_blocks": 5, "window": 1}, 3, 1),
        ({"block_size": 7, "selected_blocks": 4, "window": 80}, 2, 2),
    ],
)
def test_op_by_definition(sizes, heads, kv_heads):
    actual_in, expected_in = (make_inputs(2, 53, heads, kv_heads) for _ in range(2))
    actual = native_sparse_attention(*actual_in, **sizes)
    expected, chosen = by_definition(*expected_in, **sizes)
    assert relative_rms(actual, expected) <= 1e-12
    late = [blocks for (_, t, _), blocks in chosen.items() if t // sizes["block_size"] >= sizes["selected_blocks"]]
    # the inputs are such that the choice is one: it differs between queries, and leaves blocks out
    assert {len(blocks) for blocks in late} == {sizes["selected_blocks"]}
    assert sizes["selected_blocks"] == 3 or len({blocks[1] for blocks in late}) > 1
    grad = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual.backward(grad)
    expected.backward(grad)
    for a, e in zip(actual_in, expected_in, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-11


def test_every_length():
    q, k, v, gates = make_inputs(1, 70)
    expected, _ = by_definition(q, k, v, gates, **SIZES)
    for length in range(1, 71):
        actual = native_sparse_attention(*[x[:, :length] for x in (q, k, v, gates)], **SIZES)
        assert relative_rms(actual, expected[:, :length]) <= 1e-12, length


def test_query_pieces_are_one(monkeypatch):
    inputs = make_inputs(2, 37)
    expected = native_sparse_attention(*inputs, **SIZES)
    monkeypatch.setattr(nsa_reference, "_GATHERED", 3000)
    assert torch.allclose(native_sparse_attention(*inputs, **SIZES), expected, rtol=0, atol=1e-13)


def test_precisions():
    expected = native_sparse_attention(*make_inputs(2, 61), **SIZES)
    actual = native_sparse_attention(*make_inputs(2, 61, dtype=torch.float32), **SIZES)
    assert actual.dtype == torch.float32
    assert relative_rms(actual, expected) <= 1e-5
    rounded = make_inputs(2, 61, dtype=torch.bfloat16)
    actual = native_sparse_attention(*rounded, **SIZES)
    assert actual.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blocks = nsa_reference.parallel_blocks(
            *[x.float() for x in rounded], block_size=4, selected_blocks=3, layout=Context()
        )
    expected = nsa_reference.parallel_blocks(
        *[x.float() for x in rounded], block_size=4, selected_blocks=3, layout=Context()
    )
    assert torch.equal(blocks, expected)


def test_equal_blocks_go_to_the_earlier():
    """All keys alike: every block has the same importance, and the earliest fill the free place."""
    q, k, v, gates = (x.detach() for x in make_inputs(1, 40, 2, 1))
    k = torch.ones_like(k)
    gates = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand_as(gates)
    sizes = {**SIZES, "selected_blocks": 4}
    actual = native_sparse_attention(q, k, v, gates, **sizes)
    expected = torch.cat([v[0, :8, 0], v[0, 32:40, 0]]).mean(0)  # blocks 0, 1, 8, 9 of the last query
    assert torch.allclose(actual[0, -1], expected.expand(2, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("documents", [DOCUMENTS, (5, 0, 1, 13, 0)])
def test_packed_documents_are_alone(documents):
    packed, alone = (make_inputs(1, sum(documents)) for _ in range(2))
    actual = native_sparse_attention(*packed, **SIZES, cu_seqlens=bounds_of(documents))
    parts = zip(*[x.split(documents, dim=1) for x in alone], strict=True)
    expected = torch.cat([native_sparse_attention(*x, **SIZES) for x in parts if x[0].shape[1]], dim=1)
    assert relative_rms(actual, expected) <= 1e-12
    grad = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual.backward(grad)
    expected.backward(grad)
    for a, e in zip(packed, alone, strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-11


@pytest.mark.parametrize("documents", [None, (1, 2, 7, 41)])
def test_agrees_with_the_naive_form_of_fla(documents):
    """Compressed and selected branch, and which blocks are selected, in float32."""
    naive = pytest.importorskip("fla.ops.nsa.naive")
    length = 51
    q, k, v, gates = (x.detach() for x in make_inputs(1, length, 16, 1, 8, torch.float32))
    cu_seqlens = None if documents is None else bounds_of(documents).long()
    layout = Context(cu_seqlens=cu_seqlens)
    start = nsa_reference.block_starts(length, 4, layout, q.device)
    end = layout.document_ends(1, length, q.device)[0, start]
    means = [
        torch.stack([x[0, a : min(a + 4, b)].mean(0) for a, b in zip(start.tolist(), end.tolist(), strict=True)])[
            None
        ]
        for x in (k, v)
    ]
    compressed, _ = naive.naive_nsa_compression(q, *means, 4, 8**-0.5, cu_seqlens)
    blocks = naive.naive_nsa_topk(q, means[0], 3, 4, 8**-0.5, cu_seqlens)
    selected = naive.naive_nsa_selection(q, k, v, blocks, 4, 8**-0.5, cu_seqlens)
    for index, expected in enumerate((compressed, selected)):
        only = torch.zeros_like(gates)
        only[..., index] = gates[..., index]
        actual = nsa_reference.parallel_blocks(q, k, v, only, block_size=4, selected_blocks=3, layout=layout)
        assert relative_rms(actual, expected * gates[..., index, None]) <= 1e-5


def test_refuses_what_does_not_fit():
    inputs = make_inputs(1, 9)
    with pytest.raises(ValueError, match="selected_blocks=2 must be at least 3"):
        native_sparse_attention(*inputs, block_size=4, selected_blocks=2, window=5)
    with pytest.raises(ValueError, match="block_size=0"):
        native_sparse_attention(*inputs, block_size=0, selected_blocks=3, window=5)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        native_sparse_attention(*inputs, **SIZES, cu_seqlens=torch.tensor([0, 8]))


# the mixer


def make_config(**fields):
    sizes = {
        "vocab_size": 61,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "layer_types": ["nsa", "nsa"],
        "nsa_num_heads": 4,
        "nsa_num_key_value_heads": 2,
        "nsa_head_dim": 6,
        "nsa_block_size": 4,
        "nsa_selected_blocks": 3,
        "nsa_window": 5,
        "num_attention_heads": 2,
        "gdn_num_heads": 2,
        "gdn_head_dim": 6,
        "retention": "none",
        "budget": 0,
        "initializer_range": 0.3,
        "prefill_chunk": 11,
    }
    return HybridConfig(**{**sizes, **fields})


def make_mixer(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    mixer = NativeSparseAttention(make_config(**fields)).to(dtype)
    for projection in (mixer.q_proj, mixer.k_proj):
        projection.weight.data *= 3
    return mixer


def make_input(batch, length, seed=1, hidden=HIDDEN):
    return torch.randn(batch, length, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_context(batch, length, state=None, device="cpu", dim=6, **layout):
    """A context with the rotary angles that a model would give."""
    positions = Context(**layout).positions(batch, length, torch.device(device))
    if state is not None:
        positions = state.seen[:, None] + torch.arange(length, device=device)
    return Context(**layout, nsa_rotary=rotary_angles(positions, dim, 10000.0))


def run(mixer, x, state=None, **layout):
    return mixer(x, make_context(*x.shape[:2], state, x.device, mixer.head_dim, **layout), state).hidden


def run_in_pieces(mixer, x, sizes, state):
    return torch.cat([run(mixer, piece, state) for piece in x.split(sizes, dim=1)], dim=1)


def random_sizes(total, seed):
    draw, sizes = random.Random(seed), []
    while sum(sizes) < total:
        sizes.append(min(draw.choice([1, 1, 2, 3, 4, 5, 9, 17, 30]), total - sum(sizes)))
    return tuple(sizes)


def test_mixer_by_definition():
    """Projections, gates, rotation and their order, against float64 written out; gradients of every parameter."""
    mixer, plain = make_mixer(), make_mixer()
    x = make_input(2, 35)
    actual = run(mixer, x)

    def rotated(y):
        angle = torch.arange(35.0).double()[:, None, None] * 10000.0 ** (-torch.arange(3.0).double() / 3)
        turned = torch.view_as_complex(torch.stack(y.chunk(2, -1), -1)) * torch.polar(torch.ones(()).double(), angle)
        return torch.cat([turned.real, turned.imag], -1)

    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, 6)) for p in (plain.q_proj, plain.k_proj, plain.v_proj))
    gates = (x @ plain.g_proj.weight.T).sigmoid().unflatten(-1, (4, 3))
    out, _ = by_definition(rotated(q), rotated(k), v, gates, **SIZES)
    expected = out.flatten(2) @ plain.o_proj.weight.T
    assert relative_rms(actual, expected) <= 1e-6  # the angles are float32
    weight = torch.linspace(0, 9, expected.numel(), dtype=torch.float64).cos().view_as(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, a), e in zip(mixer.named_parameters(), plain.parameters(), strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-5, name


def test_mixer_packed_documents_are_alone():
    mixer, alone = make_mixer(), make_mixer()
    x = make_input(1, sum(DOCUMENTS))
    actual = run(mixer, x, cu_seqlens=bounds_of(DOCUMENTS))
    expected = torch.cat([run(alone, part) for part in x.split(DOCUMENTS, dim=1)], dim=1)
    assert relative_rms(actual, expected) <= 1e-12
    actual.square().sum().backward()
    expected.square().sum().backward()
    for (name, a), e in zip(mixer.named_parameters(), alone.parameters(), strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-11, name


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11, 16, 70])
@torch.no_grad()
def test_any_split_is_one_pass(length):
    mixer, x = make_mixer(), make_input(2, length)
    expected = run(mixer, x)
    splits = [(length,), (1,) * length, *[random_sizes(length, seed) for seed in range(6)]]
    for sizes in splits:
        state = mixer.allocate_state(2, torch.float64, "cpu")
        assert relative_rms(run_in_pieces(mixer, x, sizes, state), expected) <= 1e-11, sizes
        assert state.seen.tolist() == [length] * 2


@torch.no_grad()
def test_rows_of_mixed_lengths_continue():
    """Chunks of mixed lengths, padding filled with NaN, then steps, equal each row alone."""
    mixer = make_mixer()
    chunks = [(0, 1, 5, 67), (3, 0, 30, 1), (1, 1, 1, 1), (1, 1, 1, 1), (2, 9, 0, 4), (1, 1, 1, 1)]
    totals = [sum(n) for n in zip(*chunks, strict=True)]
    x = make_input(4, max(totals))
    state = mixer.allocate_state(4, torch.float64, "cpu")
    done, outputs = [0] * 4, [[] for _ in totals]
    for lengths in chunks:
        piece = torch.full((4, max(lengths), HIDDEN), float("nan"), dtype=torch.float64)
        for row, n in enumerate(lengths):
            piece[row, :n] = x[row, done[row] : done[row] + n]
        layout = {} if lengths == (1, 1, 1, 1) else {"lengths": torch.tensor(lengths)}
        hidden = run(mixer, piece, state, **layout)
        assert hidden.isfinite().all()
        for row, n in enumerate(lengths):
            outputs[row].append(hidden[row, :n])
            done[row] += n
    assert state.seen.tolist() == totals
    for row, total in enumerate(totals):
        expected = run(mixer, x[row : row + 1, :total])[0]
        assert relative_rms(torch.cat(outputs[row]), expected) <= 1e-11


@torch.no_grad()
def test_padding_on_the_right_without_a_state():
    mixer, x = make_mixer(), make_input(3, 23)
    lengths = torch.tensor([23, 0, 6])
    x[1], x[2, 6:] = float("nan"), float("nan")
    hidden = run(mixer, x, lengths=lengths)
    assert hidden.isfinite().all()
    assert relative_rms(hidden[2, :6], run(mixer, x[2:, :6])[0]) <= 1e-12
    assert relative_rms(hidden[0], run(mixer, x[:1])[0]) <= 1e-12


@torch.no_grad()
def test_state_reset_and_reorder():
    mixer, x = make_mixer(), make_input(3, 40)
    state = mixer.allocate_state(3, torch.float64, "cpu")
    run(mixer, make_input(3, 29, seed=5), state)
    state.reset()
    run(mixer, x[:, :30], state)
    order = torch.tensor([2, 0, 0])
    state.reorder(order)
    actual = run_in_pieces(mixer, x[order][:, 30:], (1, 6, 1, 2), state)
    assert relative_rms(actual, run(mixer, x)[order][:, 30:]) <= 1e-11


def test_state_counts_what_it_has_allocated():
    state = NativeSparseState(2, 3, 10, block_size=4, capacity=10, dtype=torch.bfloat16)
    seen = []
    for length in (1, 10, 1, 30, 100):
        state.append(*torch.randn(2, 2, length, 3, 10).bfloat16())
        slots = state.k.shape[2]
        assert slots > int(state.longest)
        assert state.nbytes == 2 * 2 * (2 * 3 * 10) * (slots + slots // 4) + 2 * 8
        seen.append(slots)
    assert seen == [12, 12, 24, 48, 144]
    address, nbytes = state.k.data_ptr(), state.nbytes
    state.append(*torch.randn(2, 2, 1, 3, 10).bfloat16())
    assert (state.k.data_ptr(), state.nbytes) == (address, nbytes)
    means = state.k[:, :, :140].float().unflatten(2, (35, 4)).mean(3)
    assert torch.equal(state.pooled_k[:, :, :35], means.bfloat16())
    meta = NativeSparseState(2, 3, 10, block_size=4, capacity=144, dtype=torch.bfloat16, device="meta")
    assert meta.nbytes == nbytes


def test_gradients_through_a_state():
    """The first chunk's gradient reaches the weights as without a state."""
    mixer, plain, x = make_mixer(), make_mixer(), make_input(2, 19)
    run(mixer, x, mixer.allocate_state(2, torch.float64, "cpu")).square().sum().backward()
    run(plain, x).square().sum().backward()
    for (name, a), e in zip(mixer.named_parameters(), plain.parameters(), strict=True):
        assert relative_rms(a.grad, e.grad) <= 1e-11, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsa_selected_blocks": 2}, "nsa_selected_blocks=2 must be at least 3"),
        ({"nsa_num_heads": 3}, "nsa_num_heads=3 is not divisible by nsa_num_key_value_heads=2"),
        ({"nsa_head_dim": 7}, "nsa_head_dim=7 must be even"),
        ({"nsa_window": 0}, "nsa_window=0 must be at least 1"),
        ({"nsa_block_size": 0}, "nsa_block_size=0 must be at least 1"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        make_mixer(**fields)


def test_state_refuses_packed_documents():
    mixer = make_mixer()
    state = mixer.allocate_state(1, torch.float64, "cpu")
    with pytest.raises(ValueError, match="lengths instead of cu_seqlens"):
        run(mixer, make_input(1, 6), state, cu_seqlens=torch.tensor([0, 6]))


# the kernels' door, with the PyTorch form in their place


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.bfloat16, 16, 64, 64, 16), None),
        ((torch.float16, 32, 16, 32, 16), None),
        ((torch.float32, 16, 64, 64, 16), "TF32"),
        ((torch.bfloat16, 8, 64, 64, 16), "8 query heads"),
        ((torch.bfloat16, 48, 64, 64, 16), "48 query heads"),
        ((torch.bfloat16, 16, 8, 64, 16), "head_dim is 8"),
        ((torch.bfloat16, 16, 64, 48, 16), "block size is 48"),
        ((torch.bfloat16, 16, 64, 64, 12), "12 blocks"),
        ((torch.bfloat16, 16, 64, 64, 64), "64 blocks"),
    ],
)
def test_obstacle(arguments, reason):
    actual = fla_adapter.nsa_obstacle(*arguments)
    assert actual is None if reason is None else reason in actual


def test_missing_fla_says_how_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.nsa.parallel", None)
    with pytest.raises(ImportError, match=r"fla\.ops\.nsa.*pip install"):
        fla_adapter.nsa_blocks(*make_inputs(1, 5), block_size=4, selected_blocks=3)


def test_has_kernel_only_on_cuda():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not make_mixer()._has_kernel(torch.zeros(1))


def blocks_of_documents(q, k, v, gates, *, block_size, selected_blocks, cu_seqlens):
    """What the kernels compute, document by document; a document's queries are its last tokens."""
    bounds_q, bounds_k = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    pieces = []
    for n in range(len(bounds_q) - 1):
        (a, b), (c, d) = bounds_q[n : n + 2].tolist(), bounds_k[n : n + 2].tolist()
        assert 0 < b - a <= d - c
        front = d - c - (b - a)
        padded = [F.pad(x[:, a:b], (0, 0, 0, 0, front, 0)) for x in (q, gates)]
        pieces.append(
            nsa_reference.parallel_blocks(
                padded[0],
                k[:, c:d],
                v[:, c:d],
                padded[1],
                block_size=block_size,
                selected_blocks=selected_blocks,
                layout=Context(),
            )[:, front:]
        )
    return torch.cat(pieces, 1)


@torch.no_grad()
def test_chunks_reach_the_kernels_packed(monkeypatch):
    mixer, x = make_mixer(), make_input(3, 60)
    chunks = [(7, 30, 0), (0, 3, 0), (1, 1, 1), (20, 2, 9)]
    plain, packed = (mixer.allocate_state(3, torch.float64, "cpu") for _ in range(2))
    begin = 0
    for lengths in chunks:
        piece = x[:, begin : begin + max(lengths)]
        begin += max(lengths)
        layout = {"lengths": torch.tensor(lengths)}
        expected = run(mixer, piece, plain, **layout)
        with monkeypatch.context() as patch:
            patch.setattr(fla_adapter, "nsa_blocks", blocks_of_documents)
            patch.setattr(mixer, "_has_kernel", lambda q: True)
            actual = run(mixer, piece, packed, **layout)
        for row, n in enumerate(lengths):
            assert torch.allclose(actual[row, :n], expected[row, :n], rtol=0, atol=1e-11)


# whole models


def make_model(family, **fields):
    torch.manual_seed(0)
    kinds = {
        "nsa": ["nsa", "nsa"],
        "lansa": ["gated_deltanet", "nsa"],
        "mixed": ["attention", "nsa"],
        "no rope": ["nsa", "gated_deltanet"],
    }
    if family == "mixed":
        fields = {"head_dim": 8, "window": 9, "sinks": 2, **fields}
    if family == "no rope":
        fields = {"position_encoding": "none", **fields}
    return HybridForCausalLM(make_config(layer_types=kinds[family], **fields)).double().eval()


def make_ids(batch, length, seed=3):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


FAMILIES = ("nsa", "lansa", "mixed", "no rope")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model_one_function_three_ways(family):
    model, ids = make_model(family), make_ids(2, 45)
    expected = model(ids).logits
    for sizes in ((45,), (1,) * 45, random_sizes(45, 1), random_sizes(45, 2)):
        cache = model.new_cache(2)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        assert relative_rms(torch.cat(pieces, 1), expected) <= 1e-6, sizes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_model_rows_and_documents_are_independent(family):
    model, lengths = make_model(family), (3, 45, 17)
    ids = make_ids(3, 45)
    mask = torch.arange(45) >= 45 - torch.tensor(lengths)[:, None]
    outputs = {
        "padded": model(ids, attention_mask=mask).logits,
        "cached": model(ids, attention_mask=mask, past_key_values=model.new_cache(3)).logits,
    }
    alone = [model(ids[row : row + 1, 45 - n :]).logits[0] for row, n in enumerate(lengths)]
    for name, logits in outputs.items():
        for row, n in enumerate(lengths):
            assert relative_rms(logits[row, 45 - n :], alone[row]) <= 1e-6, (name, row)
    packed = torch.cat([ids[row, 45 - n :] for row, n in enumerate(lengths)])[None]
    logits = model(packed, cu_seqlens=bounds_of(lengths)).logits[0]
    for piece, expected in zip(logits.split(lengths), alone, strict=True):
        assert relative_rms(piece, expected) <= 1e-6


@pytest.mark.parametrize("family", ["nsa", "lansa"])
@torch.no_grad()
def test_generate_with_left_padding(family):
    """Greedy text of a padded batch, by a cache and two turns of it, is that of each row without one."""
    model, ids = make_model(family), make_ids(2, 13)
    mask = torch.tensor([[0] * 10 + [1] * 3, [1] * 13])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, first in ((0, 10), (1, 0)):
        text = ids[row : row + 1, first:]
        for _ in range(12):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
        assert batch[row, 13:].tolist() == text[0, -12:].tolist()


@pytest.mark.parametrize("family", ["nsa", "lansa"])
def test_model_learns(family):
    """Twenty steps on one sentence, with gradients in every weight of the mixer."""
    model, ids = make_model(family, initializer_range=0.1).float().train(), make_ids(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        mixer = next(layer.mixer for layer in model.model.layers if isinstance(layer.mixer, NativeSparseAttention))
        assert all(p.grad.abs().max() > 0 for p in mixer.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_cache_grows_and_says_so():
    """Constant memory is the one property that NSA can't have."""
    model = make_model("lansa")
    cache = model.new_cache(1)
    sizes = []
    for _ in range(3):
        model(make_ids(1, 200), past_key_values=cache)
        sizes.append(cache.nbytes)
    per_token = 2 * 8 * 2 * 6 * (1 + 1 / 4)  # k and v, float64, two heads of 6, and the means of blocks of 4
    assert sizes[0] < sizes[1] < sizes[2]
    assert cache.states[1].bytes_per_token == per_token
    assert cache.states[0].bytes_per_token == 0
    assert sizes[2] >= 600 * per_token


@torch.no_grad()
def test_cache_on_disk_continues(tmp_path):
    """Also one that has grown, read into a cache that has not."""
    model, ids = make_model("lansa"), make_ids(2, 310)
    cache, other = model.new_cache(2), model.new_cache(2)
    model(ids[:, :300], past_key_values=cache)
    cache.save(tmp_path / "session")
    other.load(tmp_path / "session")
    expected = model(ids[:, 300:], past_key_values=cache).logits
    assert torch.equal(model(ids[:, 300:], past_key_values=other).logits, expected)
    assert int(other.states[1].longest) == 310


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("nsa-0.4b", 349_750_272),
        ("lansa-0.4b", 358_353_600),
        ("nsa-1.4b", 1_180_272_640),
        ("lansa-1.4b", 1_323_308_224),
        ("nsa-tiny", 2_422_464),
        ("lansa-tiny", 2_258_920),
    ],
)
def test_shipped_configs(name, count):
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    assert fields.pop("model_type") == "lalte"
    config = HybridConfig(**fields)
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count
    group = config.nsa_num_heads // config.nsa_num_key_value_heads
    sizes = config.nsa_head_dim, config.nsa_block_size, config.nsa_selected_blocks
    assert fla_adapter.nsa_obstacle(torch.bfloat16, group, *sizes) is None
    expected = [
        "nsa" if name.startswith("nsa") or i % 2 else "gated_deltanet" for i in range(len(config.layer_types))
    ]
    assert config.layer_types == expected


# on a GPU


def cuda_inputs(batch, length, seed=0):
    inputs = make_inputs(batch, length, 32, 2, 64, seed=seed)
    return [x.detach().cuda().bfloat16().requires_grad_() for x in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length", "documents"),
    [(1, 1, None), (2, 63, None), (2, 1500, None), (1, 3001, (1, 2, 7, 0, 100, 64, 2827))],
)
def test_kernels_agree(batch, length, documents):
    kernel = cuda_inputs(batch, length)
    cu_seqlens = None if documents is None else bounds_of(documents).cuda()
    sizes = {"block_size": 64, "selected_blocks": 16}
    actual = fla_adapter.nsa_blocks(*kernel, **sizes, cu_seqlens=cu_seqlens)
    layout = Context(cu_seqlens=cu_seqlens)
    # not in float32: both round the means of blocks to bfloat16, or they could select other blocks
    pytorch = [x.detach().requires_grad_() for x in kernel]
    expected = nsa_reference.parallel_blocks(*pytorch, **sizes, layout=layout)
    assert relative_rms(actual, expected) <= 5e-3
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).cuda()
    actual.backward(grad.to(actual.dtype))
    expected.backward(grad.to(expected.dtype))
    for index, (a, e) in enumerate(zip(kernel, pytorch, strict=True)):
        if length == 1 and index == 0:
            assert a.grad.abs().max() <= 1e-2  # one key: the query has no influence
        elif index == 3:
            assert relative_rms(a.grad[..., :2], e.grad[..., :2]) <= 1e-2
        elif length > 1 or index == 2:
            assert relative_rms(a.grad, e.grad) <= 1e-2, index


def make_cuda_mixers():
    fields = {
        "hidden_size": 256,
        "nsa_num_heads": 32,
        "nsa_head_dim": 64,
        "nsa_block_size": 64,
        "nsa_selected_blocks": 16,
        "nsa_window": 512,
        "initializer_range": 0.02,
    }
    return [make_mixer(torch.bfloat16, **fields) for _ in range(2)]


@pytest.mark.gpu
@torch.no_grad()
def test_mixer_on_cuda_agrees_with_cpu():
    """Parallel, padded chunks with a state, then steps, in bfloat16 against float32 on the CPU."""
    on_cuda, on_cpu = make_cuda_mixers()
    on_cuda, on_cpu = on_cuda.cuda(), on_cpu.float()
    x = make_input(2, 1300, hidden=256).bfloat16()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="native sparse attention runs in PyTorch")
        actual = run(on_cuda, x.cuda()).cpu()
    expected = run(on_cpu, x.float())
    assert relative_rms(actual, expected) <= 2e-2
    state = on_cuda.allocate_state(2, torch.bfloat16, "cuda")
    pieces = [run(on_cuda, piece.cuda(), state).cpu() for piece in x.split((1, 700, 590, 1, 1, 1, 6), dim=1)]
    assert relative_rms(torch.cat(pieces, 1), expected) <= 2e-2
    state = on_cuda.allocate_state(2, torch.bfloat16, "cuda")
    lengths = torch.tensor([1299, 70]).cuda()
    padded = run(on_cuda, x[:, :1299].cuda(), state, lengths=lengths).cpu()
    assert relative_rms(padded[0], expected[0, :1299]) <= 2e-2
    assert relative_rms(padded[1, :70], expected[1, :70]) <= 2e-2
    token = torch.stack([x[0, 1299:], x[1, 70:71]])
    step = run(on_cuda, token.cuda(), state).cpu()
    assert relative_rms(step[0, 0], expected[0, 1299]) <= 2e-2
    assert relative_rms(step[1, 0], expected[1, 70]) <= 2e-2


@pytest.mark.gpu
def test_decoding_never_waits_for_the_device():
    mixer = make_cuda_mixers()[0].cuda()
    state = mixer.allocate_state(2, torch.bfloat16, "cuda")
    x = make_input(2, 40, hidden=256).bfloat16().cuda()
    with torch.no_grad():
        run(mixer, x[:, :30], state)
        run(mixer, x[:, 30:31], state)
        contexts = [make_context(2, 1, state, "cuda", 64) for _ in range(9)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t, context in enumerate(contexts):
                mixer(x[:, 31 + t : 32 + t], context, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_mixer_warns_where_the_kernels_do_not_fit():
    mixer = make_cuda_mixers()[0].cuda().float()
    with pytest.warns(UserWarning, match="runs in PyTorch.*TF32"):
        run(mixer, make_input(1, 70, hidden=256).float().cuda())
