"""The cache of a whole model: constant memory, copies, files, reordering, and what is refused."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from models import HybridCache
from tests.tiny_models import VARIANTS, assert_close, make_ids, make_model, make_variant, run_in_pieces

CONSTANT = ["lalte", "gdn", "gdn-swa", "streaming", "lalte, rope_in_cache", "lalte, one scorer"]


def addresses(cache):
    return {name: x.data_ptr() for name, x in cache.tensors().items()}


@pytest.mark.parametrize("variant", CONSTANT)
@torch.no_grad()
def test_memory_is_constant_and_in_place(variant):
    model = make_variant(variant)
    cache = model.new_cache(2)
    places, size = addresses(cache), cache.nbytes
    ids = make_ids(2, 150)
    for sizes in ([1], [1] * 30, [70], [49]):
        run_in_pieces(model, ids[:, : sum(sizes)], sizes, cache)
        assert addresses(cache) == places
        assert cache.nbytes == size
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :13] = 0
    model(ids[:, :20], mask, past_key_values=cache)
    assert addresses(cache) == places
    assert cache.nbytes == size == sum(x.nbytes for x in cache.tensors().values())


NSA = {"nsa_num_heads": 4, "nsa_num_key_value_heads": 2, "nsa_head_dim": 6, "nsa_block_size": 4, "nsa_window": 9}


def make_for(variant):
    """One of VARIANTS, an eviction policy, or native sparse attention."""
    if variant in VARIANTS:
        return make_variant(variant)
    if variant == "nsa":
        return make_model("gdn", layer_types=["gated_deltanet", "nsa"], **NSA)
    return make_model(retention=variant)


@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.parametrize("variant", [*VARIANTS, "h2o", "key_norm", "nsa"])
def test_gradients_of_several_calls(variant, piece):
    """All at once they are the sum of each call's own: later tokens don't change what earlier ones come through."""
    model, ids, gradients = make_for(variant), make_ids(2, 27), []
    for at_once in (False, True):
        cache, loss = model.new_cache(2), torch.zeros(())
        for tokens in ids.split(piece, 1):
            own = model(tokens, past_key_values=cache).logits.square().sum()
            if at_once:
                loss = loss + own
            else:
                own.backward()
        if at_once:
            loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("variant", [*VARIANTS, "h2o", "key_norm", "nsa"])
def test_no_graph_is_kept_where_gradients_are_on(variant):
    """Else its memory would grow with every token, and the cache couldn't be copied."""
    model, ids = make_for(variant), make_ids(2, 40)
    caches = [model.new_cache(2) for _ in range(2)]
    for sizes in ([1, 1, 20], [18]):
        for piece in ids[:, : sum(sizes)].split(sizes, 1):
            output = model(piece, past_key_values=caches[0])
            output.logits.square().sum().backward()
        assert not any(x.requires_grad for x in caches[0].tensors().values())
        with torch.no_grad():
            expected = run_in_pieces(model, ids[:, : sum(sizes)], sizes, caches[1])
        assert_close(output.logits.detach(), expected[:, -sizes[-1] :])
        caches = [copy.deepcopy(cache) for cache in caches]


@pytest.mark.parametrize("variant", [*VARIANTS, "h2o", "key_norm", "nsa"])
@torch.no_grad()
def test_inference_mode_and_others_mix(variant, tmp_path):
    """A cache made, filled, grown and loaded in inference mode goes on outside, and the other way round."""
    model, ids = make_for(variant), make_ids(1, 330)
    expected = model(ids).logits[:, -20:]
    sizes = [280, 1, 29, 20]  # beyond a growing cache's first memory
    for inside in (False, True):
        with torch.inference_mode(inside):
            cache, loaded = model.new_cache(), model.new_cache()
        for piece in ids.split(sizes, 1):
            with torch.inference_mode(inside):
                logits = model(piece, past_key_values=cache).logits
                if piece.shape[1] == 29:
                    cache.save(tmp_path / "session")
                    loaded.load(tmp_path / "session")
            inside = not inside
        assert_close(logits, expected)
        assert_close(model(ids[:, -20:], past_key_values=loaded).logits, expected)
        cache.reset()


@torch.no_grad()
def test_generate_takes_the_same_memory_for_one_token_and_for_50_thousand():
    """The prompt is read in chunks; the cache and the allocations of a chunk don't grow with it."""
    changes = {"layer_types": ["gated_deltanet", "attention"], "prefill_chunk": 256, "window": 61, "budget": 40}
    model = make_model("lalte", **changes)
    sizes, texts = [], []
    for length in (1, 50_000):
        cache = model.new_cache()
        places = addresses(cache)
        out = model.generate(make_ids(1, length), past_key_values=cache, max_new_tokens=3, do_sample=False)
        assert addresses(cache) == places
        assert cache.columns == length + 2  # the last token isn't read yet
        assert int(cache.states[1].kv.seen) == length + 2
        sizes.append(cache.nbytes)
        texts.append(out[0, length:])
    assert sizes[0] == sizes[1]
    assert len(texts[1]) == 3


@torch.no_grad()
def test_prefill_never_holds_a_tensor_of_the_prompt():
    """No activation has more tokens than a chunk and the slots, unless all logits are asked for."""
    model = make_model(prefill_chunk=16)
    longest = 0

    def watch(module, args, output):
        nonlocal longest
        for x in (*args, output):
            if isinstance(x, torch.Tensor) and x.ndim >= 3:
                longest = max(longest, x.shape[1])

    for module in model.modules():
        module.register_forward_hook(watch)
    model(make_ids(1, 300), use_cache=True, logits_to_keep=1)
    assert 16 <= longest < 30


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_file_copy_and_reset_restore_a_session(variant, tmp_path):
    """Saved in the middle of a text longer than a growing cache's first memory, and continued elsewhere."""
    model, ids = make_variant(variant), make_ids(2, 290)
    cache = model.new_cache(2)
    run_in_pieces(model, ids[:, :270], [130, 140], cache)
    cache.save(tmp_path / "session", {"model": "m"})
    twin = copy.deepcopy(cache)
    expected = run_in_pieces(model, ids[:, 270:], [7, 1, 1, 11], cache)
    restored = model.new_cache(2)
    metadata = restored.load(tmp_path / "session", expect={"model": "m"})
    assert (metadata["columns"], metadata["model"], metadata.keys() - {"rule"}) == ("270", "m", {"columns", "model"})
    used = model.new_cache(2)
    run_in_pieces(model, make_ids(2, 300, seed=5), [300], used)
    used.load(tmp_path / "session")
    for other in (restored, used, twin):
        assert other.columns == 270
        assert torch.equal(run_in_pieces(model, ids[:, 270:], [7, 1, 1, 11], other), expected)
    cache.reset()
    assert cache.columns == 0
    fresh = run_in_pieces(model, ids[:, :40], [40], model.new_cache(2))
    assert_close(run_in_pieces(model, ids[:, :40], [40], cache), fresh)


@torch.no_grad()
def test_copy_is_independent():
    model, ids = make_model(), make_ids(1, 60)
    cache = model.new_cache()
    run_in_pieces(model, ids, [60], cache)
    before = {name: x.clone() for name, x in cache.tensors().items()}
    run_in_pieces(model, ids, [60], copy.deepcopy(cache))
    for name, x in cache.tensors().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_reorder(variant):
    """Row b continues as the former row index[b]."""
    model, ids = make_variant(variant), make_ids(3, 80)
    index = torch.tensor([2, 0, 2])
    cache = model.new_cache(3)
    run_in_pieces(model, ids[:, :50], [50], cache)
    places = addresses(cache)
    cache.reorder_cache(index)
    assert addresses(cache) == places
    tail = ids[:, 50:]
    expected = model(torch.cat([ids[index, :50], tail], 1)).logits[:, 50:]
    assert_close(run_in_pieces(model, tail, [1, 1, 1, 27], cache), expected)
    with pytest.raises(ValueError, match=r"beam_idx \(1,\) must name a former row for each of 3 rows"):
        cache.reorder_cache(index[:1])


@torch.no_grad()
def test_files_that_are_refused(tmp_path):
    model = make_model()
    cache, file = model.new_cache(), tmp_path / "session"
    run_in_pieces(model, make_ids(1, 30), [30], cache)
    cache.save(file, {"model": "mine"})
    before = {name: x.clone() for name, x in cache.tensors().items()}
    with pytest.raises(ValueError, match=r"belongs to another model, .* \(model is 'mine', here 'other'\)"):
        cache.load(file, expect={"model": "other"})
    with pytest.raises(ValueError, match=r"was written with budget=3, this cache has budget=5; use budget=3"):
        make_model(budget=5).new_cache().load(file)
    with pytest.raises(ValueError, match=r"with sinks=2, window=17, this cache has sinks=3, window=18"):
        make_model(sinks=3, window=18).new_cache().load(file)
    with pytest.raises(ValueError, match=r"was written with batch=1, this cache has batch=2"):
        model.new_cache(2).load(file)
    with pytest.raises(ValueError, match=r"1.kv.k is \(1, 2, 22, 12\).* has \(1, 2, 22, 16\)"):
        make_model(head_dim=16).new_cache().load(file)
    with pytest.raises(ValueError, match=r"float32, this model's cache has .* torch.bfloat16"):
        make_model().bfloat16().new_cache().load(file)
    with pytest.raises(ValueError, match="holds other tensors"):
        make_model("gdn").new_cache().load(file)
    save_file(load_file(file), tmp_path / "silent", {"columns": "30", "model": "mine"})
    with pytest.raises(ValueError, match="is not a session of this model"):
        cache.load(tmp_path / "silent")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="holds other tensors"):
        cache.load(tmp_path / "foreign")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut is not a session file"):
        cache.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="nowhere is not a session file"):
        cache.load(tmp_path / "nowhere")
    for name, x in cache.tensors().items():
        assert torch.equal(x, before[name]), name


@torch.no_grad()
def test_a_refused_file_leaves_a_growing_cache_as_it_was(tmp_path):
    """What doesn't fit is found before memory is taken for longer texts."""
    longer = make_model("gdn-full").bfloat16()
    saved = longer.new_cache()
    run_in_pieces(longer, make_ids(1, 290), [290], saved)
    saved.save(tmp_path / "session")
    cache = make_model("gdn-full").new_cache()
    run_in_pieces(make_model("gdn-full"), make_ids(1, 30), [30], cache)
    before = {name: x.clone() for name, x in cache.tensors().items()}
    with pytest.raises(ValueError, match=r"0.conv_BCL is .* torch.bfloat16, this model's cache has .* torch.float32"):
        cache.load(tmp_path / "session")
    for name, x in cache.tensors().items():
        assert torch.equal(x, before[name]), name


@torch.no_grad()
def test_a_file_names_its_policy(tmp_path):
    """Caches of two policies can hold the same tensors; only the record tells them apart."""
    model, file = make_model(), tmp_path / "session"
    assert model.new_cache(2).rule == {"batch": "2", "retention": "lte", "budget": "3", "sinks": "2", "window": "17"}
    for own, other in (("h2o", "recency"), ("recency", "lte"), ("lte", "random")):
        model.set_retention(own)
        cache = model.new_cache()
        run_in_pieces(model, make_ids(1, 30), [30], cache)
        cache.save(file)
        model.new_cache().load(file)
        model.set_retention(other)
        with pytest.raises(ValueError, match=f"written with retention={own}, this cache has retention={other}"):
            model.new_cache().load(file)
    model.set_retention("none")
    with pytest.raises(ValueError, match=r"with retention=lte, budget=3, this cache has retention=none, budget=0"):
        model.new_cache().load(file)
    model.set_retention("tova")
    model.set_retention_budget(0)
    assert model.new_cache().rule["retention"] == "none"
    assert make_model("gdn-full").new_cache().rule == make_model("gdn").new_cache().rule == {"batch": "1"}


@torch.no_grad()
def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, file = make_model(), tmp_path / "session"
    cache = model.new_cache()
    cache.save(file)
    whole = file.read_bytes()
    run_in_pieces(model, make_ids(1, 9), [9], cache)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("models.cache.save_file", full)
    with pytest.raises(OSError, match="No space"):
        cache.save(file)
    assert file.read_bytes() == whole
    assert [f.name for f in tmp_path.iterdir()] == ["session"]


def test_growing_caches_say_so():
    cache = make_model("transformer").new_cache(2)
    assert [state.bytes_per_token for state in cache.states] == [2 * 2 * 12 * 4] * 3
    assert all(state.bytes_per_token == 0 for state in make_model().new_cache().states)
    size = cache.nbytes
    run_in_pieces(make_model("transformer"), make_ids(2, 300), [300], cache)
    assert cache.nbytes > size


def test_interface_of_transformers():
    cache = make_model().new_cache(2)
    assert isinstance(cache, HybridCache)
    assert cache.get_seq_length() == 0
    assert cache.get_max_cache_shape() == -1
    assert cache.batch_size == 2
    assert len(cache) == 4
    assert not cache.is_compileable
    assert "4 layers, batch 2, 0 columns" in repr(cache)
    with pytest.raises(ValueError, match="can't be cropped"):
        cache.crop(3)


def test_what_other_caches_do_is_refused():
    """The base class would do it to a list of layers that is empty here: nothing, or an IndexError."""
    cache = make_model().new_cache(2)
    with pytest.raises(ValueError, match=r"rows of a HybridCache are fixed; make another one with model.new_cache"):
        cache.batch_repeat_interleave(3)
    with pytest.raises(ValueError, match=r"rows of a HybridCache are fixed; make another one with model.new_cache"):
        cache.batch_select_indices(torch.tensor([1]))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()
    with pytest.raises(ValueError, match="past_key_values: a HybridCache holds no keys of this model"):
        other(make_ids(2, 3), past_key_values=cache)
