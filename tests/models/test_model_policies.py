"""Eviction policies on trained layers: one function in three ways, at equal memory, chosen without training."""

import copy

import pytest
import torch

from lte.layout import Layout
from lte.policies import POLICIES
from models import HybridForCausalLM
from models.delta_rule import recurrent_gated_delta_rule
from models.gated_deltanet import decay_and_strength, l2_normalize
from tests.tiny_models import (
    assert_close,
    make_config,
    make_ids,
    make_model,
    random_split,
    run_in_pieces,
)

LENGTH = 90
KINDS = {
    "rope": {},
    "rope_in_cache": {"position_encoding": "rope_in_cache"},
    "none": {"position_encoding": "none"},
}


def make_under(policy, **changes):
    model = make_model(**changes)
    model.set_retention(policy)
    return model


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_parallel_is_chunked_is_token_by_token(policy, budget):
    model, ids = make_under(policy, budget=budget), make_ids(2, LENGTH)
    expected = model(ids).logits
    for seed in range(2):
        assert_close(run_in_pieces(model, ids, random_split(LENGTH, seed)), expected)
    assert_close(run_in_pieces(model, ids, [1] * LENGTH), expected)
    assert_close(model(ids, use_cache=True).logits, expected)


@pytest.mark.parametrize("kind", ["rope_in_cache", "none"])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_position_encodings(policy, kind):
    model, ids = make_under(policy, **KINDS[kind]), make_ids(2, 60)
    expected = model(ids).logits
    assert_close(run_in_pieces(model, ids, random_split(60, 1)), expected)
    assert_close(run_in_pieces(model, ids, [25] + [1] * 35), expected)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_padding_and_packing(policy):
    """Left-padded rows, a second turn of mixed lengths, and packed documents, against each text alone."""
    model = make_under(policy)
    first = [make_ids(1, n, seed=n) for n in (1, 30, 61)]
    second = [make_ids(1, n, seed=100 + n) for n in (28, 1, 3)]
    alone = [model(torch.cat(pair, 1)).logits[0] for pair in zip(first, second, strict=True)]

    def left_padded(texts):
        width = max(text.shape[1] for text in texts)
        ids, mask = make_ids(len(texts), width, seed=99), torch.zeros(len(texts), width, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, width - text.shape[1] :], mask[row, width - text.shape[1] :] = text[0], 1
        return ids, mask

    ids, mask = left_padded(first)
    cache = model.new_cache(3)
    cached, parallel = model(ids, mask, past_key_values=cache).logits, model(ids, mask).logits
    turn = model(*left_padded(second), past_key_values=cache).logits
    bounds = torch.tensor([0, *(text.shape[1] for text in first)]).cumsum(0).int()
    packed = model(torch.cat(first, 1), cu_seqlens=bounds).logits[0]
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        length, more = a.shape[1], b.shape[1]
        assert_close(parallel[row, -length:], alone[row][:length])
        assert_close(cached[row, -length:], alone[row][:length])
        assert_close(turn[row, -more:], alone[row][length:])
        assert_close(packed[bounds[row] : bounds[row + 1]], alone[row][:length])


@torch.no_grad()
def test_equal_memory_in_the_same_slots():
    model, ids = make_model(), make_ids(2, LENGTH)
    learned = model.new_cache(2)
    outputs = {"lte": model(ids).logits}
    for policy in POLICIES:
        model.set_retention(policy)
        cache = model.new_cache(2)
        assert [s.kv.nbytes for s in cache.states[1::2]] == [s.kv.nbytes for s in learned.states[1::2]]
        assert cache.nbytes == learned.nbytes - sum(s.scorer.nbytes for s in learned.states[1::2])
        places, size = {name: x.data_ptr() for name, x in cache.tensors().items()}, cache.nbytes
        run_in_pieces(model, ids, [40, 1, 1, 48], cache)
        assert {name: x.data_ptr() for name, x in cache.tensors().items()} == places
        assert cache.nbytes == size
        retained = cache.states[1].kv.positions[:, :, 2:5]
        assert (retained >= 2).all(), "the budget is full"
        assert (retained < LENGTH - 17).all(), "and holds what has left the window"
        outputs[policy] = model(ids).logits
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert (outputs[a] - outputs[b]).abs().max() > 0.01, f"{a} is {b}"


@torch.no_grad()
def test_back_to_the_learned_policy():
    model, ids = make_model(), make_ids(1, LENGTH)
    own, weights = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    zero = make_model(budget=0)
    zero.load_state_dict(weights)
    model.set_retention("none")
    assert_close(model(ids).logits, zero(ids).logits)
    assert_close(run_in_pieces(model, ids, [50, 1, 39]), zero(ids).logits)
    assert model.new_cache().nbytes == zero.new_cache().nbytes
    for policy in (*POLICIES, None):
        model.set_retention(policy)
    assert torch.equal(model(ids).logits, own)
    assert model.config.retention == "lte"
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
    model.set_retention("h2o")
    model.set_retention("lte")
    assert_close(run_in_pieces(model, ids, [50, 1, 39]), own)


@torch.no_grad()
def test_a_cache_keeps_its_policy():
    model, ids = make_under("h2o"), make_ids(2, LENGTH)
    expected = model(ids).logits
    cache = model.new_cache(2)
    run_in_pieces(model, ids[:, :50], [50], cache)
    model.set_retention("recency")
    copied, index = copy.deepcopy(cache), torch.tensor([1, 0])
    assert_close(run_in_pieces(model, ids[:, 50:], [3, 1, 36], cache), expected[:, 50:])
    copied.reorder_cache(index)
    assert_close(run_in_pieces(model, ids[index, 50:], [3, 1, 36], copied), expected[index, 50:])
    cache.reset()
    assert_close(run_in_pieces(model, ids, [50, 1, 39], cache), expected)
    model.set_retention("delta_error")
    cache = model.new_cache(2)
    model.set_retention("lte")
    with pytest.raises(ValueError, match=r"delta_error.*none reports"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_configured_from_the_start(policy, tmp_path):
    """A policy in the config needs no scorer; the model is saved, loaded, trained on and generates with it."""
    model, ids = make_model(retention=policy), make_ids(2, 60)
    assert not any("scorer" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    made = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    for place in range(60, 65):
        assert torch.equal(loaded(made[:, :place]).logits[:, -1].argmax(-1), made[:, place])
    output = loaded.train()(ids, labels=ids)
    assert_close(output.logits, model(ids).logits)  # the budget holds in training: nothing else limits these sets
    output.loss.backward()
    for name, parameter in loaded.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_of_an_observing_policy_are_those_of_its_mask():
    """Against attention written out with the keys that a decoding cache held, in float64."""
    changes = {"layer_types": ["attention"], "position_encoding": "none"}
    model, ids = make_under("h2o", **changes).double(), make_ids(1, 40)
    mixer = model.model.layers[0].mixer
    read = torch.zeros(2, 40, 40, dtype=torch.bool)
    cache = model.new_cache(1)
    with torch.no_grad():
        for t in range(40):
            model(ids[:, t : t + 1], past_key_values=cache)
            held = cache.states[0].kv.positions[0]
            for head in range(2):
                read[head, t, held[head][held[head] >= 0]] = True
    x = model.model.layers[0].mixer_norm(model.model.embed_tokens(ids)).detach().requires_grad_()
    weight = torch.randn(1, 40, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (mixer(x, model.model._context(x, None, None, None, False)).hidden * weight).sum().backward()
    got, x.grad = x.grad, None
    q = mixer.q_proj(x).view(40, 2, 3, 12).permute(1, 2, 0, 3)
    k, v = (f(x).view(40, 2, 12).transpose(0, 1)[:, None] for f in (mixer.k_proj, mixer.v_proj))
    score = (q @ k.mT * 12**-0.5).masked_fill(~read[:, None], -torch.inf)
    out = (score.softmax(-1) @ v).permute(2, 0, 1, 3).reshape(1, 40, 72)
    (mixer.o_proj(out) * weight).sum().backward()
    assert_close(got, x.grad, 1e-9)


@torch.no_grad()
def test_delta_error_reads_the_writes_of_the_layer_before():
    """‖u_t‖ = β ‖v - read‖ out of the token loop, whose states differ by k_t u_tᵀ, with keys of unit length."""
    model, ids = make_under("delta_error"), make_ids(2, 37)
    mixer = model.model.layers[2].mixer
    x = torch.randn(2, 37, 36, generator=torch.Generator().manual_seed(3))
    layout = Layout(lengths=torch.tensor([37, 21]))
    writes = mixer(x, layout).writes
    q, k, v = (
        conv(proj(x), Layout())
        for conv, proj in (
            (mixer.q_conv1d, mixer.q_proj),
            (mixer.k_conv1d, mixer.k_proj),
            (mixer.v_conv1d, mixer.v_proj),
        )
    )
    q, k, v = mixer._heads(q, k, v)
    g, beta = decay_and_strength(mixer.a_proj(x), mixer.b_proj(x), mixer.A_log, mixer.dt_bias)
    q, k = l2_normalize(q), l2_normalize(k)
    state = torch.zeros(2, 2, 10, 10)
    expected = torch.empty(2, 37, 2)
    for t in range(37):
        new = recurrent_gated_delta_rule(*(a[:, t : t + 1] for a in (q, k, v, g, beta)), state)[1]
        added = new - state * g[:, t].exp()[..., None, None]
        expected[:, t] = added.square().sum((-1, -2)).sqrt() / k[:, t].norm(dim=-1)
        state = new
    assert_close(writes[0], expected[0])
    assert_close(writes[1, :21], expected[1, :21])
    assert not writes[1, 21:].any()
    stepped, memory = [], mixer.allocate_state(2, x.dtype)
    for t in range(37):
        stepped.append(mixer(x[:, t : t + 1], Layout(), memory).writes)
    assert_close(torch.cat(stepped, 1), expected)
    seen = []
    for layer in (1, 3):
        model.model.layers[layer].mixer.register_forward_hook(lambda m, args, out: seen.append(args[1].writes))
    model(ids)
    assert not torch.equal(*seen), "each attention layer reads the layer before it"
    model.set_retention("random")
    model(ids)
    assert seen[2] is seen[3] is None


@torch.no_grad()
def test_models_trained_without_a_scorer():
    """A sliding-window model gets a budget of its own for any policy but the learned one."""
    model, ids = make_model("gdn-swa"), make_ids(1, 80)
    own = model(ids).logits
    with pytest.raises(ValueError, match=r"budget=4: this model has no retention scorer.*set_retention"):
        model.set_retention_budget(4)
    model.set_retention("tova")
    assert torch.equal(model(ids).logits, own)
    model.set_retention_budget(4)
    assert (model(ids).logits - own).abs().max() > 0.01
    assert_close(run_in_pieces(model, ids, [33, 1, 46]), model(ids).logits)


def test_policy_and_budget_for_a_while():
    model = make_model()

    def in_force():
        mixer = model.model.layers[1].mixer
        assert (model.retention, model.retention_budget) == (mixer.retention, mixer.budget)
        return model.retention, model.retention_budget, model.model.layers[2].mixer.reports_writes

    assert in_force() == ("lte", 3, False)
    model.use_retention("tova", 9)
    with model.with_retention("delta_error"):
        assert in_force() == ("delta_error", 9, True)
        with model.with_retention(budget=0):
            assert in_force() == ("delta_error", 0, True)
        with model.with_retention():
            assert in_force() == ("delta_error", 9, True)
    assert in_force() == ("tova", 9, False)
    with pytest.raises(ValueError, match=r"budget=-1 must be 0 or more"), model.with_retention("random", -1):
        pass
    assert in_force() == ("tova", 9, False)
    with pytest.raises(RuntimeError, match="in between"), model.with_retention("random", 1):
        raise RuntimeError("in between")
    assert in_force() == ("tova", 9, False)
    with pytest.raises(ValueError, match=r"retention='none' retains nothing, so budget=4"):
        model.use_retention("none", 4)
    window = make_model("gdn-swa")
    assert (window.retention, window.retention_budget) == ("none", 0)
    with pytest.raises(ValueError, match=r"retention='h2o' has no slots to fill: this model's budget is 0; give a"):
        window.use_retention("h2o")
    with pytest.raises(ValueError, match=r"retention='lru' is unknown"):
        window.use_retention("lru")
    with window.with_retention("h2o", 4):
        assert (window.retention, window.retention_budget) == ("h2o", 4)
    assert (window.retention, window.retention_budget) == ("none", 0)
    with pytest.raises(ValueError, match=r"no attention layers"):
        make_model("gdn").use_retention("h2o", 4)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"retention='lru' is unknown; use one of none, lte, recency, random, h2o"):
        make_model().set_retention("lru")
    with pytest.raises(ValueError, match=r"retention='lte': this model has no retention scorer"):
        make_model("gdn-swa").set_retention("lte")
    with pytest.raises(ValueError, match=r"window=null keeps every token"):
        make_model("gdn-full").set_retention("h2o")
    with pytest.raises(ValueError, match=r"retention='h2o': this model has no attention layers"):
        make_model("gdn").set_retention("h2o")
    with pytest.raises(ValueError, match=r"retention='delta_error' needs a gated_deltanet layer before"):
        make_model(layer_types=["attention", "gated_deltanet"]).set_retention("delta_error")
    with pytest.raises(ValueError, match=r"retention='delta_error' needs a gated_deltanet layer before"):
        make_config(layer_types=["attention", "gated_deltanet"], retention="delta_error")
    with pytest.raises(ValueError, match=r"window=null keeps every token"):
        make_config(window=None, retention="tova")
    make_model("gdn").set_retention("none")


@torch.no_grad()
def test_a_scorer_without_lookahead_has_a_cache_too():
    model, ids = make_model(scorer_kernel_sizes=[1], scorer_dilations=[1]), make_ids(2, 80)
    expected = model(ids).logits
    assert_close(run_in_pieces(model, ids, [30, 1, 1, 48]), expected)
    model.set_retention_budget(0)
    assert (model(ids).logits - expected).abs().max() > 0.01
