"""Decoding by graphs: the fused step against the model itself, and the loops around it.

On a CPU the kernels run through Triton's interpreter, and a stand-in that computes steps eagerly takes the graph's
place; graphs themselves are tested under the marker `gpu`.
"""

import copy
import os
import re

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

pytest.importorskip("triton")

from accelerate import Accelerator  # noqa: E402
from safetensors.torch import load_model, save_model  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from models import HybridForCausalLM, decoding  # noqa: E402
from models.decode_step import DecodeStep, addresses, fuse_projections, side_by_side, unsupported  # noqa: E402
from models.decoding import GraphedDecoder, served_sampling  # noqa: E402
from models.generation import Sampling, decode, decode_one_token, prefill, sample  # noqa: E402
from tests.tiny_models import VOCAB, assert_close, make_ids, make_model, make_variant, run_in_pieces  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
gpu = pytest.mark.gpu
PAIR = {"layer_types": ["gated_deltanet", "attention"]}
GREEDY_NUCLEUS = Sampling(temperature=0.9, top_k=20, top_p=0.9)


def filled(model, batch, length, seed=1):
    cache = model.new_cache(batch)
    ids = make_ids(batch, length, seed).to(model.device)
    return cache, prefill(model, ids, cache)


# ---- the fused step


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2] if ON_GPU else [1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scorer_sharing": "layers", "head_dim": 16, "num_attention_heads": 2},
        {"position_encoding": "none", "retention": "none", "budget": 0, "gdn_expand_v": 2.0},
        {"position_encoding": "rope_in_cache"},
        {"scorer_kernel_sizes": [1, 1], "scorer_dilations": [1, 1]},
        {"sink_token": "learnable", "softmax_off_by_one": True},
    ],
    ids=["lalte", "one scorer", "no positions", "rope_in_cache", "no lookahead", "both sinks"],
)
def test_fused_step_is_the_model(batch, changes):
    model = make_model(**PAIR, **changes).to(DEVICE)
    (ours, _), (theirs, logits) = (filled(model, batch, 25) for _ in range(2))
    assert unsupported(model, ours) is None
    before = addresses(model, ours)
    step = DecodeStep(model, ours)
    assert addresses(model, ours) != before, "parameters were put side by side"
    before = addresses(model, ours)
    for _ in range(4):
        token = logits.argmax(-1, keepdim=True)
        logits = decode_one_token(model, token, theirs)
        assert_close(step(token), logits)
    for name, got in ours.tensors().items():
        torch.testing.assert_close(got, theirs.tensors()[name], rtol=1e-4, atol=1e-4, msg=name)
    assert addresses(model, ours) == before


def test_parameters_side_by_side_stay_what_they_were(tmp_path):
    model = make_model()
    names = dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    fuse_projections(model)
    assert dict(model.named_parameters()).keys() == names.keys()
    assert all(parameter is names[name] for name, parameter in model.named_parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    # no second copy of anything
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    assert sum(storages.values()) == sum(x.nbytes for x in model.parameters())
    q, k = model.model.layers[1].mixer.q_proj.weight, model.model.layers[1].mixer.k_proj.weight
    assert k.data_ptr() == q.data_ptr() + q.nbytes
    where = q.data_ptr()
    fuse_projections(model)
    assert q.data_ptr() == where
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path)
    clone = copy.deepcopy(model)
    ids = make_ids(1, 20)
    want = model(ids).logits
    assert torch.equal(loaded(ids).logits, want)
    assert torch.equal(clone(ids).logits, want)


def test_training_goes_on_after_fusing():
    losses = []
    for fuses in (False, True):
        model = make_model(**PAIR)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if fuses and step == 1:
                with torch.inference_mode():
                    fuse_projections(model)
            loss = model(make_ids(1, 30), labels=make_ids(1, 30)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.data_ptr() != model.model.layers[0].mlp.gate_proj.weight.data_ptr()
    model.double()
    fuse_projections(model)
    assert weight.dtype == torch.float64
    assert weight.data_ptr() == model.model.layers[0].mlp.gate_proj.weight.data_ptr() + weight.nbytes


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"position_encoding": "rope_in_cache"}])
def test_kernels_read_a_cache_under_autocast(changes):
    """The cache has the weights' dtype, queries have autocast's, and the kernels want one."""
    model, ids = make_model(**PAIR, **changes, attention_backend="triton").to(DEVICE), make_ids(2, 40).to(DEVICE)
    expected = model(ids).logits
    with torch.autocast(DEVICE, torch.bfloat16):
        cached = run_in_pieces(model, ids, [20, 1, 19])
    assert_close(cached.float(), expected, 5e-2)


def test_a_fused_model_is_saved_whole(tmp_path):
    """Also by those who take tensors of one storage for one tensor."""
    model, other = make_model(**PAIR), make_model(**PAIR, seed=1)
    for _ in range(2):
        fuse_projections(model)
    state = model.state_dict()
    assert len({x.untyped_storage().data_ptr() for x in state.values()}) == len(state) - 1, "but for tied embeddings"
    for name, x in model.named_parameters():
        assert state[name].data_ptr() == x.data_ptr(), "still the model's own memory"
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        expected = {name: x.clone() for name, x in model.named_parameters()}
        for x in model.parameters():
            x.zero_()
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(x, expected[name]) for name, x in model.named_parameters())
    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    assert all(torch.equal(x, expected[name]) for name, x in other.named_parameters())
    mlp = model.model.layers[0].mlp
    assert side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]) is not None
    assert copy.deepcopy(model).state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("transformer", {}, "layer 0 attends to everything"),
        ("gdn-full", {}, "layer 1 attends to everything"),
        ("lalte", {"layer_types": ["nsa"], "nsa_num_heads": 4, "nsa_head_dim": 8}, "NativeSparseAttention"),
        ("lalte", {"head_dim": 260}, "head_dim 260"),
    ],
)
def test_what_has_no_graph_is_named(family, changes, reason):
    model = make_model(family, **changes)
    assert reason in unsupported(model, model.new_cache())


def test_changed_modules_have_no_graph():
    class Adapted(torch.nn.Linear):
        pass

    model = make_model(**PAIR)
    cache = model.new_cache()
    assert unsupported(model, cache) is None
    assert decoding.obstacle(model, cache) == (None if ON_GPU else "the model is on cpu")
    with model.model.layers[1].mlp.register_forward_hook(lambda *_: None):
        assert "layers.1.mlp has hooks" in unsupported(model, cache)
    model.model.layers[0].mixer.q_proj = Adapted(36, 20, bias=False)
    assert re.search(r"layers\.0\.mixer\.q_proj is a .*\.Adapted, which no kernel", unsupported(model, cache))
    model = make_model(**PAIR)
    model.model.layers[0].mixer.q_proj.bias = torch.nn.Parameter(torch.zeros(20))
    assert "layers.0.mixer.q_proj has a bias" in unsupported(model, cache)
    model = make_model(**PAIR)
    model.model.layers[0].mlp.up_proj.double()
    assert "up_proj.weight is in torch.float64" in unsupported(model, cache)
    model = make_model(**PAIR)
    model.set_retention("recency")
    assert "retains by Recency" in unsupported(model, model.new_cache())


class LowRank(torch.nn.Module):
    """An adapter as PEFT builds them: no linear map itself, but with the weight of the one inside."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return 2 * self.base_layer(x)


@pytest.mark.parametrize(
    "name", ["lm_head", "model.embed_tokens", "model.layers.0.mixer.q_conv1d", "model.layers.1.mlp.up_proj"]
)
def test_adapters_have_no_graph(name):
    """The step would read the weight that they show, which isn't all that they compute."""
    model = make_model(**PAIR)
    owner, _, last = name.rpartition(".")
    owner = model.get_submodule(owner)
    setattr(owner, last, LowRank(getattr(owner, last)))
    assert re.match(rf"{name} is a .*\.LowRank, which no kernel", unsupported(model, model.new_cache()))


# ---- what of transformers' processors a graph serves


@pytest.mark.parametrize(
    ("processors", "do_sample", "want"),
    [
        ([], False, Sampling()),
        ([], True, Sampling(1.0)),
        ([TemperatureLogitsWarper(0.7)], True, Sampling(0.7)),
        ([TopKLogitsWarper(5)], True, Sampling(1.0, 5)),
        ([TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)], True, Sampling(0.7, 5, 0.9)),
        ([TopPLogitsWarper(0.9), TemperatureLogitsWarper(0.7)], True, "processors in another order"),
        ([TopKLogitsWarper(5, min_tokens_to_keep=2)], True, "TopKLogitsWarper"),
        ([TopKLogitsWarper(5, filter_value=0.0)], True, "TopKLogitsWarper"),
        ([TemperatureLogitsWarper(0.7)], False, "TemperatureLogitsWarper"),
        ([MinLengthLogitsProcessor(3, 1)], False, "MinLengthLogitsProcessor"),
    ],
)
def test_served_sampling(processors, do_sample, want):
    assert served_sampling(LogitsProcessorList(processors), do_sample) == want


@torch.no_grad()
def test_served_sampling_draws_from_the_same_tokens():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3))
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.8)])
    allowed = processors(None, logits.clone()) > -torch.inf
    drawn = torch.zeros_like(allowed)
    sampling = served_sampling(processors, True)
    for seed in range(400):
        drawn.scatter_(1, sample(logits, sampling, torch.Generator().manual_seed(seed)), True)
    assert not (drawn & ~allowed).any()
    assert drawn.sum() >= 0.8 * allowed.sum()


# ---- the loops, with a stand-in for the graph


class EagerStep:
    """`DecodeStep` by the model's own forward."""

    frequencies = None

    def __init__(self, model, cache, overlap=False):
        fuse_projections(model)
        self.model, self.cache = model, cache

    def __call__(self, token, block=None):
        logits = decode_one_token(self.model, token, self.cache)
        self.cache.columns -= 1
        return logits


@pytest.fixture
def no_graph(monkeypatch):
    """Graphs on a CPU: "captured" steps are computed when they are replayed."""
    if ON_GPU:
        pytest.skip("graphs are tested themselves")

    def capture(self, step):
        captures.append(step)

        def replay():
            self.logits = step(self.token)
            self._draw(self.logits)

        return replay

    captures = []
    monkeypatch.setattr(decoding, "DecodeStep", EagerStep)
    monkeypatch.setattr(decoding, "obstacle", unsupported)
    monkeypatch.setattr(GraphedDecoder, "_capture", capture)
    plain = HybridForCausalLM._sample

    def through_graphs(self, *args, **kwargs):
        return decoding.generate(self, lambda *a, **k: plain(self, *a, **k), *args, **kwargs)

    monkeypatch.setattr(HybridForCausalLM, "_sample", through_graphs)
    return captures


def generate(model, ids, *, eager=False, **options):
    """With transformers' loop or ours."""
    options.setdefault("pad_token_id", 0)
    config = GenerationConfig(**{"do_sample": False, "max_new_tokens": 20, **options})
    if not eager:
        return model.generate(ids, generation_config=config, **options.pop("extra", {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridForCausalLM, "_sample", super(HybridForCausalLM, HybridForCausalLM)._sample)
        return model.generate(ids, generation_config=config)


class Collect(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


def loops_agree(model):
    ids = make_ids(3, 23).to(model.device)
    want = generate(model, ids, eager=True)
    assert torch.equal(generate(model, ids), want)
    new = want[:, 23:]
    # ends that come at different places, and one that never comes for the first row
    ends = [int(new[1, 4]), int(new[2, 9])]
    for eos in (ends[0], ends):
        want = generate(model, ids, eager=True, eos_token_id=eos)
        assert torch.equal(generate(model, ids, eos_token_id=eos), want)
    alone = generate(model, ids[1:2], eager=True, eos_token_id=ends[0])
    assert alone.shape[1] < 43
    assert torch.equal(generate(model, ids[1:2], eos_token_id=ends[0]), alone)
    return ids, ends


@pytest.mark.parametrize("sink", ["none", "learnable"])
def test_generate_is_that_of_transformers(no_graph, sink):
    model = make_model(**PAIR, sink_token=sink)
    loops_agree(model)
    assert no_graph, "graphs were used"


def test_streamer_and_own_criteria(no_graph):
    class After(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.tensor([ids.shape[1] >= 30 + row for row in range(len(ids))])

    model = make_model(**PAIR)
    ids = make_ids(2, 23)
    config = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0)
    want = generate(model, ids, eager=True)[:, :31]
    assert torch.equal(model.generate(ids, generation_config=config, stopping_criteria=[After()]), want)
    streamer = Collect()
    model.generate(ids[:1], generation_config=config, streamer=streamer)
    assert streamer.ended
    assert [x for piece in streamer.pieces for x in piece] == generate(model, ids[:1], eager=True)[0].tolist()


def test_a_second_turn_continues_exactly(no_graph):
    model = make_model(**PAIR)
    ids = make_ids(2, 23)
    cache = model.new_cache(2)
    config = GenerationConfig(do_sample=False, max_new_tokens=9, pad_token_id=0, return_dict_in_generate=True)
    first = model.generate(ids, generation_config=config, past_key_values=cache)
    assert first.past_key_values is cache
    assert cache.columns == 23 + 8, "the last token isn't read"
    assert int(cache.states[1].kv.seen[0]) == 31
    turn = torch.cat([first.sequences, make_ids(2, 5, seed=9)], 1)
    captured = len(no_graph)
    second = model.generate(turn, generation_config=config, past_key_values=cache).sequences
    assert len(no_graph) == captured, "the same cache, the same graph"
    assert torch.equal(second, generate(model, turn, eager=True, max_new_tokens=9))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"repetition_penalty": 1.3}, "RepetitionPenalty"),
        ({"use_cache": False}, "without the model's cache"),
    ],
)
def test_fallback_warns_and_gives_the_same(no_graph, options, reason):
    model = make_model(**PAIR)
    ids = make_ids(1, 15)
    with pytest.warns(UserWarning, match=reason):
        got = generate(model, ids, **options)
    want = generate(model, ids, eager=True, **options)
    assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
    assert not no_graph


def test_beams_need_no_graph(no_graph, recwarn):
    generate(make_model(**PAIR), make_ids(1, 15), num_beams=3)
    assert not no_graph


def test_own_cache_and_graph_are_used_again(no_graph):
    model = make_model(**PAIR)
    ids = make_ids(2, 23)
    kept = decoding.take_cache(model, 2)
    assert kept.is_own
    decoding._CACHES[model] = decoding._kind(model, 2), kept
    prefill(model, ids, kept)
    assert decoding.take_cache(model, 2) is kept
    assert kept.columns == 0
    assert not any(x.any() for name, x in kept.tensors().items() if name.endswith("seen"))
    assert decoding.take_cache(model, 2) is not kept, "it is out"
    decoding._CACHES[model] = decoding._kind(model, 2), kept
    model.set_retention_budget(1)
    assert decoding.take_cache(model, 2) is not kept, "another budget"
    decoding._CACHES[model] = decoding._kind(model, 2), kept
    decoding.release(model)
    assert model not in decoding._CACHES


def test_decoder_fits_only_its_own(no_graph):
    model = make_model(**PAIR)
    cache, _ = filled(model, 1, 12)
    other = model.new_cache()
    decoder = decoding.decoder_for(model, cache)
    assert decoder.fits(model, cache)
    assert not decoder.fits(model, other)
    assert decoding.decoder_for(model, cache) is decoder
    assert decoding.decoder_for(model, cache, Sampling(0.5)) is not decoder
    decoder = decoding.decoder_for(model, cache)
    model.model.layers[0].mlp.down_proj.weight.data = model.model.layers[0].mlp.down_proj.weight.data.clone()
    assert not decoder.fits(model, cache)
    assert decoding.decoder_for(model, cache) is not decoder
    decoder._cache = lambda: None  # what a weak reference to something freed says
    with pytest.raises(ValueError, match="freed"):
        decoder.step()


def test_warming_up_changes_nothing(no_graph, monkeypatch):
    model = make_model(**PAIR)
    cache, _ = filled(model, 2, 21)
    before = {name: x.clone() for name, x in cache.tensors().items()}
    generator = torch.Generator().manual_seed(5)
    drawn = generator.get_state()
    decoder = GraphedDecoder(model, cache, GREEDY_NUCLEUS, generator)
    with torch.no_grad():
        decoder._warm_up(DecodeStep(model, cache))
    for name, x in cache.tensors().items():
        assert torch.equal(x, before[name]), name
    assert torch.equal(generator.get_state(), drawn)
    assert cache.columns == 21


def test_decoding_without_transformers(no_graph):
    model = make_model(**PAIR)
    (ours, logits), (theirs, _) = (filled(model, 2, 21) for _ in range(2))
    got = list(decoding.decode_graphed(model, logits, ours, 12))
    want = list(decode(model, logits, theirs, 12, step=decode_one_token))
    assert torch.equal(torch.cat(got, 1), torch.cat(want, 1))
    assert ours.columns == theirs.columns == 21 + 11
    assert_close(decode_one_token(model, got[-1], ours), decode_one_token(model, want[-1], theirs))


# ---- graphs themselves


def teacher_forced(model, decoder, ids, tolerance):
    """Logits of a graph's steps and of the model's, both reading the same tokens."""
    cache = decoder.cache
    other = model.new_cache(cache.batch)
    prefill(model, ids[:, :25], other)
    differences = []
    for t in range(25, ids.shape[1]):
        decoder.token.copy_(ids[:, t : t + 1])
        decoder.step()
        want = decode_one_token(model, ids[:, t : t + 1], other)
        assert_close(decoder.logits, want, tolerance)
        differences.append((decoder.token == want.argmax(-1, keepdim=True)).float().mean())
    return torch.stack(differences).mean().item()


@gpu
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(
    "name",
    [
        "lalte",
        "gdn",
        "gdn-swa",
        "streaming",
        "lalte, one scorer",
        "lalte, rope_in_cache",
        "lalte, no positions",
        "lalte, zero sink",
        "lalte, learned sink",
    ],
)
def test_graph_is_the_model_over_200_steps(name, batch):
    model = make_variant(name).cuda()
    ids = make_ids(batch, 225).cuda()
    cache = model.new_cache(batch)
    prefill(model, ids[:, :25], cache)
    before = {key: x.data_ptr() for key, x in cache.tensors().items()}
    decoder = GraphedDecoder(model, cache)
    assert teacher_forced(model, decoder, ids, 1e-4) > 0.99
    assert cache.columns == 225
    assert before == {key: x.data_ptr() for key, x in cache.tensors().items()}


@gpu
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 5])
def test_graph_in_bfloat16(batch):
    """A graph's steps are as close to the same weights in float32 as the model's own steps are."""
    model = make_model(hidden_size=128, intermediate_size=200, gdn_head_dim=40, head_dim=36).cuda().bfloat16()
    model.set_retention_budget(0)  # which token is kept hangs on the last digit
    exact = copy.deepcopy(model).float()
    ids = make_ids(batch, 225).cuda()
    caches = [m.new_cache(batch) for m in (model, model, exact)]
    for m, cache in zip((model, model, exact), caches, strict=True):
        prefill(m, ids[:, :25], cache)
    decoder = GraphedDecoder(model, caches[0])
    errors, size = [0.0, 0.0], 0.0
    for token in ids[:, 25:].split(1, 1):
        decoder.token.copy_(token)
        decoder.step()
        found = decoder.logits, decode_one_token(model, token, caches[1])
        want = decode_one_token(exact, token, caches[2]).double()
        size += float(want.square().sum())
        errors = [e + float((x.double() - want).square().sum()) for e, x in zip(errors, found, strict=True)]
    graph, eager = ((e / size) ** 0.5 for e in errors)
    assert graph <= 1.2 * eager
    assert graph <= 5e-2


@gpu
@torch.no_grad()
def test_generate_by_graphs():
    model = make_model().cuda()
    ids, ends = loops_agree(model)
    generate(model, ids)
    assert model in decoding._CACHES
    kept = decoding._CACHES[model][1]
    decoder = decoding._DECODERS[kept]
    generate(model, ids)
    assert decoding._CACHES[model][1] is kept
    assert decoding._DECODERS[kept] is decoder
    generate(model, ids, eos_token_id=ends)
    assert decoding._CACHES[model][1] is kept
    assert decoding._DECODERS[kept].ending is not None
    decoding.release(model)
    with pytest.warns(UserWarning, match="attends to everything"):
        generate(make_model("transformer").cuda(), ids)


@gpu
@torch.no_grad()
def test_sampling_follows_the_seed():
    model = make_model().cuda()
    ids = make_ids(2, 25).cuda()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, ids, do_sample=True, temperature=1.5, top_k=0, max_new_tokens=60))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    drawn = []
    for seed in (3, 3, 4):
        cache, logits = filled(model, 2, 25)
        generator = torch.Generator("cuda").manual_seed(seed)
        drawn.append(torch.cat(list(decode(model, logits, cache, 40, GREEDY_NUCLEUS, generator)), 1))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@gpu
@torch.no_grad()
def test_second_turn_and_reordering_after_a_graph():
    model = make_model().cuda()
    ids = make_ids(3, 60).cuda()
    order = torch.tensor([2, 0, 0], device="cuda")

    def run(cache, step):
        prefill(model, ids[:, :25], cache)
        for t in range(25, 40):
            step(ids[:, t : t + 1])
        cache.reorder_cache(order)
        chunk = run_in_pieces(model, ids[:, 40:50], [10], cache)
        logits = [step(ids[:, t : t + 1]) for t in range(50, 60)]
        return torch.cat([chunk, torch.stack(logits, 1)], 1)

    cache, other = model.new_cache(3), model.new_cache(3)
    decoder = GraphedDecoder(model, cache)

    def replay(token):
        decoder.token.copy_(token)
        decoder.step()
        return decoder.logits.clone()

    want = run(other, lambda token: decode_one_token(model, token, other))
    assert_close(run(cache, replay), want, 1e-4)
    assert decoder.fits(model, cache)


@gpu
@torch.no_grad()
def test_steps_neither_wait_nor_allocate():
    model = make_model().cuda()
    cache, logits = filled(model, 2, 25)
    decoder = GraphedDecoder(model, cache, GREEDY_NUCLEUS)
    decoder.start(logits)
    decoder.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(300):
            decoder.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert int(decoder.token.max()) < VOCAB


@gpu
@torch.no_grad()
def test_the_eager_step_does_not_wait_either():
    model = make_model().cuda()
    cache, logits = filled(model, 2, 25)
    token = logits.argmax(-1, keepdim=True)
    decode_one_token(model, token, cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_one_token(model, token, cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
