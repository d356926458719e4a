"""Import and export of other projects' checkpoints, against forwards written from the description of their layout."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from models import HybridForCausalLM
from models.conversion import export_checkpoint, import_checkpoint, read_tensors, to_own
from models.conversion_cli import KINDS
from models.conversion_layouts import FORMATS, read_config, write_config
from models.loading import load_model
from tests.tiny_models import assert_close, make_config, make_ids, make_model, make_tokenizer

VOCAB, HIDDEN, INNER = 61, 24, 40
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "norm_eps": 1e-5,
    "max_position_embeddings": 90,
    "hidden_act": "swish",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "use_cache": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "fuse_cross_entropy": True,
}
DELTA = {"num_heads": 2, "head_dim": 6, "expand_v": 2, "conv_size": 3, "use_gate": True, "use_short_conv": True}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": None, "rope_theta": 500.0}
SPARSE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": False, "block_size": 4, "block_counts": 4}
SPARSE |= {"window_size": 6, "rope_theta": 500.0}
EVICTION = {
    "attn_type": "lte",
    **ATTENTION,
    "head_dim": 8,
    "window_size": 9,
    "conv_size": [3, 3],
    "conv_dilation": [2, 1],
    "dropout_prob": 0.1,
    "buffer_size": 6,
    "sink_size": 2,
    "routing_method": "sigmoid",
    "routing_grad": True,
    "routing_shared": "head",
    "routing_freeze_steps": 0,
    "l1_lambda_min": 1e-9,
    "l1_lambda_max": 1.0,
    "l1_alpha": 1.5,
    "l1_lambda_update_steps": 32,
    "l1_lambda_shared": "head",
    "l1_lambda_tolerate": [0.95, 1.0],
}
del EVICTION["head_dim"]
HYBRID = {"num_hidden_layers": 4, **SHARED, **DELTA}


def hybrid(attn, kind="hybrid_gated_deltanet", **changes):
    return {"model_type": kind, **HYBRID, "attn": attn and {"layers": [1, 3], **attn}, **changes}


SOURCES = {
    "lte": hybrid(EVICTION),
    "lte, a stack a layer": hybrid({**EVICTION, "routing_shared": "layer", "l1_lambda_shared": "layer"}),
    "lte, one stack": hybrid({**EVICTION, "routing_shared": "all", "l1_lambda_shared": "all"}),
    "lte, untied": hybrid(EVICTION, tie_word_embeddings=False),
    "hybrid nsa": hybrid({"attn_type": "nsa", **SPARSE}),
    "hybrid attention": hybrid({"attn_type": "attn", **ATTENTION}),
    "hybrid window": hybrid({**ATTENTION, "window_size": 7}),
    "delta": hybrid(None, "gated_deltanet", num_hidden_layers=2),
    "delta and window": hybrid(
        {**ATTENTION, "window_size": 7}, "gated_deltanet", num_v_heads=None, allow_neg_eigval=False
    ),
    "transformer": {"model_type": "transformer", "num_hidden_layers": 2, **SHARED, **ATTENTION, "qk_norm": False},
    "transformer, untied": {
        "model_type": "transformer",
        "num_hidden_layers": 2,
        **{**SHARED, "tie_word_embeddings": False, "intermediate_size": None, "hidden_ratio": 4},
        **{**ATTENTION, "num_kv_heads": None, "window_size": 11},
    },
    "nsa": {"model_type": "nsa", "num_hidden_layers": 2, **SHARED, **SPARSE},
}


# ---- folders of other projects, small and random ----


def attention_kind(source, layer):
    if source["model_type"] in ("transformer", "nsa"):
        return {"transformer": "attn", "nsa": "nsa"}[source["model_type"]], source
    attn = source["attn"]
    if attn is None or layer not in attn["layers"]:
        return "delta", source
    return attn.get("attn_type", "attn"), attn


def inner_size(source):
    return source["intermediate_size"] or 256  # of a hidden size of 24, rounded up


def tensor_shapes(source):
    shapes = {"model.embeddings.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not source["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(source["num_hidden_layers"]):
        name, (kind, sizes) = f"model.layers.{layer}", attention_kind(source, layer)
        shapes |= {f"{name}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "mlp_norm")}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (inner_size(source), HIDDEN) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, inner_size(source))
        heads = sizes["num_heads"]
        kv_heads = sizes.get("num_kv_heads") or heads
        if kind == "delta":
            keys, values = heads * sizes["head_dim"], heads * sizes["head_dim"] * sizes["expand_v"]
            widths = {"q": keys, "k": keys, "v": values, "g": values, "a": heads, "b": heads}
            shapes |= {f"{name}.attn.{part}_conv1d.weight": (widths[part], 1, sizes["conv_size"]) for part in "qkv"}
            shapes |= {f"{name}.attn.A_log": (heads,), f"{name}.attn.dt_bias": (heads,)}
            shapes[f"{name}.attn.o_norm.weight"] = (values // heads,)
        else:
            dim = sizes["head_dim"] if kind == "nsa" else HIDDEN // heads
            widths = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
            values = heads * dim
            if kind == "nsa":
                widths["g"] = 3 * heads
        shapes |= {f"{name}.attn.{part}_proj.weight": (width, HIDDEN) for part, width in widths.items()}
        shapes[f"{name}.attn.o_proj.weight"] = (HIDDEN, values)
        if kind == "lte":
            groups, stack, channels = (
                kv_heads if sizes["routing_shared"] == "head" else 1,
                f"{name}.attn.router.conv_stack",
                2 * dim,
            )
            for place, taps in enumerate(sizes["conv_size"]):
                shapes[f"{stack}.convs.{place}.weight"] = (groups * channels // 2, channels, 1, taps)
                shapes[f"{stack}.convs.{place}.bias"] = (groups * channels // 2,)
                channels //= 2
            shapes |= {f"{stack}.proj.weight": (groups, channels, 1, 1), f"{stack}.proj.bias": (groups,)}
            count = len(source["attn"]["layers"])
            shared = {"head": (count, kv_heads), "layer": (count,), "all": ()}[sizes["l1_lambda_shared"]]
            shapes |= {"model.l1_lambda": shared, "model.num_kept": (count, kv_heads)}
    return shapes


def make_tensors(source, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in tensor_shapes(source).items():
        x = torch.randn(shape, generator=generator)
        exact = name.endswith(("A_log", "dt_bias", "l1_lambda", "num_kept"))
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif exact:
            x = x.abs() * (30 if name.endswith("num_kept") else 0.3)
        elif "conv_stack" in name:
            x = x * 0.3
        elif x.ndim == 2 and "embeddings" not in name:
            x = x * 1.5 / shape[1] ** 0.5
        tensors[name] = x if exact else x.to(dtype)
    if source.get("attn") and source["attn"].get("routing_shared") == "all":
        for name in tensors:
            if ".layers.3." in name and "conv_stack" in name:
                tensors[name] = tensors[name.replace(".layers.3.", ".layers.1.")].clone()
    return tensors


def make_folder(path, name, dtype=torch.float32, tensors=None, **extra):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SOURCES[name] | extra))
    tensors = make_tensors(SOURCES[name], dtype) if tensors is None else tensors
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path, tensors


# ---- what such a checkpoint computes ----


def norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotated(x_THD, theta):
    length, _, dim = x_THD.shape
    angle = torch.arange(length).double()[:, None] * theta ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angle.cos().to(x_THD.dtype)[:, None], angle.sin().to(x_THD.dtype)[:, None]
    a, b = x_THD[..., : dim // 2], x_THD[..., dim // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def delta_layer(x, t, sizes, eps):
    heads, length = sizes["num_heads"], len(x)

    def channels(part):
        y = x @ t[f"{part}_proj.weight"].T
        weight = t[f"{part}_conv1d.weight"]
        y = F.conv1d(F.pad(y.T[None], (weight.shape[2] - 1, 0)), weight, groups=len(weight))[0].T
        return F.silu(y).view(length, heads, -1)

    q, k, v = map(channels, "qkv")
    q, k = (y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for y in (q, k))
    decay = (-t["A_log"].exp() * F.softplus(x @ t["a_proj.weight"].T + t["dt_bias"])).exp()
    beta = (x @ t["b_proj.weight"].T).sigmoid()
    gate = F.silu((x @ t["g_proj.weight"].T).view(length, heads, -1))
    outputs = torch.empty_like(v)
    for h in range(heads):
        state = torch.zeros(k.shape[2], v.shape[2])
        for i in range(length):
            state = decay[i, h] * state
            state = state + beta[i, h] * torch.outer(k[i, h], v[i, h] - k[i, h] @ state)
            outputs[i, h] = q[i, h] @ state * k.shape[2] ** -0.5
    return (norm(outputs, t["o_norm.weight"], eps) * gate).flatten(1) @ t["o_proj.weight"].T


def scores(k, v, t, sizes):
    """sigmoid - 0.5 of each token and head, by the grouped 2-D convolutions themselves."""
    length, heads = k.shape[:2]
    per_head = sizes["routing_shared"] == "head"
    x = torch.cat([k, v], -1)  # [T, H, 2 D]
    x = x.flatten(1).T[None, :, None] if per_head else x.permute(1, 2, 0)[:, :, None]
    groups = heads if per_head else 1
    for place, dilation in enumerate(sizes["conv_dilation"]):
        weight, bias = (t[f"router.conv_stack.convs.{place}.{part}"] for part in ("weight", "bias"))
        x = F.silu(F.conv2d(x, weight, bias, padding="same", dilation=(1, dilation), groups=groups))
    x = F.conv2d(x, t["router.conv_stack.proj.weight"], t["router.conv_stack.proj.bias"], groups=groups)
    return x.reshape(heads, length).T.sigmoid() - 0.5


def attention_layer(x, t, sizes, kind):
    length, heads = len(x), sizes["num_heads"]
    kv_heads, dim = sizes["num_kv_heads"] or heads, HIDDEN // heads
    q, k, v = ((x @ t[f"{part}_proj.weight"].T).view(length, -1, dim) for part in "qkv")
    score = scores(k, v, t, sizes) if kind == "lte" else None
    q, k = rotated(q, sizes["rope_theta"]), rotated(k, sizes["rope_theta"])
    out = torch.empty(length, heads, dim)
    for i in range(length):
        for h in range(kv_heads):
            if kind == "lte":
                near = sizes["window_size"]  # so many previous tokens, and the query's own
                sinks = range(min(sizes["sink_size"], i + 1))
                old = [j for j in range(sizes["sink_size"], i - near) if score[j, h] > 0]
                old.sort(key=lambda j, h=h: (-score[j, h].item(), j))
                buffer = [*sinks, *old][: sizes["buffer_size"]]
                keys = sorted({*buffer, *range(max(0, i - near), i + 1)})
            else:
                near = i + 1 if sizes["window_size"] is None else sizes["window_size"]  # the query's own among them
                keys = list(range(max(0, i + 1 - near), i + 1))
            group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
            out[i, group] = (q[i, group] @ k[keys, h].T * dim**-0.5).softmax(-1) @ v[keys, h]
    return out.flatten(1) @ t["o_proj.weight"].T


def sparse_layer(x, t, sizes):
    length, heads, dim, size = len(x), sizes["num_heads"], sizes["head_dim"], sizes["block_size"]
    q, k, v = ((x @ t[f"{part}_proj.weight"].T).view(length, -1, dim) for part in "qkv")
    gates = (x @ t["g_proj.weight"].T).view(length, heads, 3).sigmoid()
    q, k = rotated(q, sizes["rope_theta"]) * dim**-0.5, rotated(k, sizes["rope_theta"])
    per_group = heads // sizes["num_kv_heads"]
    out = torch.zeros(length, heads, dim)
    for i in range(length):
        own, full = i // size, (i + 1) // size
        for h in range(sizes["num_kv_heads"]):
            group = slice(h * per_group, (h + 1) * per_group)
            weight = torch.zeros(per_group, full)
            if full:
                k_mean, v_mean = (y[: full * size, h].view(full, size, dim).mean(1) for y in (k, v))
                weight = (q[i, group] @ k_mean.T).softmax(-1)
                out[i, group] += gates[i, group, :1] * (weight @ v_mean)
            chosen = {0, own, max(own - 1, 0)}
            rest = sorted(set(range(own)) - chosen, key=lambda c, w=weight: (-w[:, c].sum().item(), c))
            chosen |= set(rest[: sizes["block_counts"] - len(chosen)])
            selected = [j for j in range(i + 1) if j // size in chosen]
            near = list(range(max(0, i + 1 - sizes["window_size"]), i + 1))
            for branch, keys in ((1, selected), (2, near)):
                read = (q[i, group] @ k[keys, h].T).softmax(-1) @ v[keys, h]
                out[i, group] += gates[i, group, branch, None] * read
    return out.flatten(1) @ t["o_proj.weight"].T


@torch.no_grad()
def forward(source, tensors, ids):
    """Logits [T, V] of one text."""
    t = {name: x.float() for name, x in tensors.items()}
    x, eps = t["model.embeddings.weight"][ids], source["norm_eps"]
    for layer in range(source["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        own = {key.removeprefix(f"{name}attn."): value for key, value in t.items() if key.startswith(f"{name}attn.")}
        kind, sizes = attention_kind(source, layer)
        y = norm(x, t[f"{name}attn_norm.weight"], eps)
        if kind == "delta":
            x = x + delta_layer(y, own, sizes, eps)
        elif kind == "nsa":
            x = x + sparse_layer(y, own, sizes)
        else:
            x = x + attention_layer(y, own, sizes, kind)
        y = norm(x, t[f"{name}mlp_norm.weight"], eps)
        gate, up, down = (t[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    head = t["model.embeddings.weight"] if source["tie_word_embeddings"] else t["lm_head.weight"]
    return norm(x, t["model.norm.weight"], eps) @ head.T


# ---- tests ----


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_imported_logits(name, tmp_path):
    source, tensors = make_folder(tmp_path / "theirs", name)
    config = import_checkpoint(source, tmp_path / "ours")
    model = load_model(tmp_path / "ours", "cpu")
    assert model.config.to_dict() == {**config.to_dict(), "_name_or_path": model.config._name_or_path}
    ids = make_ids(2, 48)
    expected = torch.stack([forward(SOURCES[name], tensors, row) for row in ids])
    assert_close(model(ids).logits, expected, 2e-5)
    assert_close(model(ids, use_cache=True).logits, expected, 2e-5)
    if "lte" in name:  # the scores decide something
        model.set_retention_budget(0)
        assert (model(ids).logits - expected).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_round_trip_is_bit_exact(name, dtype, tmp_path):
    source, tensors = make_folder(tmp_path / "theirs", name, dtype, torch_dtype=str(dtype).removeprefix("torch."))
    import_checkpoint(source, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
        assert back[key].dtype == x.dtype, key
        assert torch.equal(back[key], x), key
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("name", ["lte", "lte, one stack", "hybrid nsa", "delta and window", "transformer", "nsa"])
@torch.no_grad()
def test_export_without_a_memory_of_the_source(name, tmp_path):
    """The configuration is then written anew, and means the same."""
    source, tensors = make_folder(tmp_path / "theirs", name)
    import_checkpoint(source, tmp_path / "ours")
    (tmp_path / "ours/import.json").unlink()
    kind = SOURCES[name]["model_type"]
    written = export_checkpoint(tmp_path / "ours", tmp_path / "back", kind)
    assert written["model_type"] == kind
    back = read_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for key, x in tensors.items():
        if not key.startswith(("model.l1_lambda", "model.num_kept")):
            assert torch.equal(back[key], x), key
    if "lte" in name:
        torch.testing.assert_close(back["model.num_kept"], tensors["model.num_kept"])
        assert torch.equal(back["model.l1_lambda"], tensors["model.l1_lambda"].expand(2, 2))
    ids = make_ids(1, 40)
    assert_close(forward(written, back, ids[0])[None], load_model(tmp_path / "ours", "cpu")(ids).logits, 2e-5)


@pytest.mark.parametrize("kind", FORMATS)
@torch.no_grad()
def test_our_models_in_their_kinds(kind, tmp_path):
    """A model made here, exported, read back."""
    layers = {"transformer": ["attention"] * 2, "nsa": ["nsa"] * 2}.get(kind, ["gated_deltanet", "attention"])
    changes = {"layer_types": layers, "hidden_size": 72, "nsa_num_heads": 4, "nsa_head_dim": 10, "nsa_block_size": 5}
    changes |= {"nsa_selected_blocks": 3, "nsa_window": 7}
    if kind != "hybrid_gated_deltanet":
        changes |= {"retention": "none", "sinks": 0, "budget": 0}
    model, ids = make_model(**changes), make_ids(1, 50)
    model.save_pretrained(tmp_path / "ours")
    make_tokenizer().save_pretrained(tmp_path / "ours")
    written = export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    assert written["model_type"] == kind, "the plainest kind that can hold it"
    assert (tmp_path / "theirs/tokenizer.json").read_bytes() == (tmp_path / "ours/tokenizer.json").read_bytes()
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again", "cpu")(ids).logits, model(ids).logits)
    for key, x in model.state_dict().items():
        again = read_tensors(tmp_path / "again").get(key)
        assert again is None or torch.equal(again, x) or key == "penalty_control.density", key


def test_the_rule_of_learned_eviction():
    """Numbers of the published configuration: 768 previous tokens, and a buffer of 512 that holds 4 sinks."""
    published = {
        "window_size": 768,
        "buffer_size": 512,
        "sink_size": 4,
        "conv_size": [3] * 3,
        "conv_dilation": [2] * 3,
    }
    attn = {**EVICTION, **published, "layers": list(range(1, 24, 2)), "num_heads": 16, "num_kv_heads": 16}
    config = read_config(
        hybrid(
            attn,
            hidden_size=1024,
            num_hidden_layers=24,
            intermediate_size=None,
            num_heads=8,
            head_dim=128,
            expand_v=1,
            conv_size=4,
        )
    )
    assert (config.window, config.sinks, config.budget, config.lookahead) == (769, 4, 508, 6)
    assert (config.intermediate_size, config.head_dim, config.num_hidden_layers) == (2816, 64, 24)
    assert config.layer_types == ["gated_deltanet", "attention"] * 12
    with torch.device("meta"):
        model = HybridForCausalLM(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == 360_246_144 - 32_000 * 1024 + VOCAB * 1024


def test_state_of_the_penalty(tmp_path):
    for name, shape in (("lte", (2, 2)), ("lte, a stack a layer", (2,)), ("lte, one stack", ())):
        source, tensors = make_folder(tmp_path / name, name)
        import_checkpoint(source, tmp_path / f"ours {name}")
        control = load_model(tmp_path / f"ours {name}", "cpu").penalty_control
        there = tensors["model.l1_lambda"]
        assert there.shape == shape
        assert torch.equal(control.penalty_weight, there.reshape(*shape, *[1] * (2 - len(shape))).expand(2, 2))
        torch.testing.assert_close(control.density, tensors["model.num_kept"] / (90 - 10))
        assert int(control.steps) == 0
    tensors = make_tensors(SOURCES["lte"]) | {"model.num_kept": torch.zeros(2, 2)}
    assert (to_own(SOURCES["lte"], tensors).tensors["penalty_control.density"] == -1).all()


@torch.no_grad()
def test_trained_on_after_the_import(tmp_path):
    """What has changed is exported as it is now, in the remembered configuration."""
    source, tensors = make_folder(tmp_path / "theirs", "lte")
    import_checkpoint(source, tmp_path / "ours")
    model = load_model(tmp_path / "ours", "cpu")
    model.model.layers[1].mixer.scorer.out_bias += 1
    model.penalty_control.density += 0.125
    model.penalty_control.penalty_weight[0, 1] = 0.5
    model.save_pretrained(tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    stack = "model.layers.1.attn.router.conv_stack.proj.bias"
    assert torch.equal(back[stack], tensors[stack] + 1)
    torch.testing.assert_close(back["model.num_kept"], tensors["model.num_kept"] + 0.125 * 80)
    assert float(back["model.l1_lambda"][0, 1]) == 0.5
    assert json.loads((tmp_path / "back/config.json").read_text()) == SOURCES["lte"]
    source, _ = make_folder(tmp_path / "one", "lte, one stack")
    import_checkpoint(source, tmp_path / "one ours")
    model = load_model(tmp_path / "one ours", "cpu")
    model.penalty_control.penalty_weight[0, 1] = 0.5
    model.save_pretrained(tmp_path / "one ours")
    with pytest.raises(ValueError, match=r"penalty_weight differs between heads or layers"):
        export_checkpoint(tmp_path / "one ours", tmp_path / "one back")


def test_shards_tied_heads_and_scorers_stored_once(tmp_path):
    name = "lte, one stack"
    tensors = make_tensors(SOURCES[name])
    tensors = {key: x for key, x in tensors.items() if ".layers.3." not in key or "conv_stack" not in key}
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"].clone()
    folder, _ = make_folder(tmp_path / "theirs", name, tensors=tensors)
    names = sorted(tensors)
    for part, some in (("a", names[::2]), ("b", names[1::2])):
        save_file({key: tensors[key] for key in some}, folder / f"{part}.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_checkpoint(folder, tmp_path / "ours")
    with safe_open(tmp_path / "ours/model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert sorted(back) == names
    assert all(torch.equal(back[key], x) for key, x in tensors.items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b.safetensors is missing; copy the checkpoint again"):
        import_checkpoint(folder, tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.1.attn.q_norm.weight": torch.ones(6)},
            r"1 tensors have no place .*layers.1.attn.q_norm.weight \(6,\)",
        ),
        ({"model.layers.0.attn.A_log": None}, r"model.layers.0.attn.A_log is missing in the weights"),
        ({"model.num_kept": None}, r"model.num_kept is missing"),
        ({"model.num_kept": torch.ones(2)}, r"model.num_kept has shape \(2,\), by config.json it is \(2, 2\)"),
        ({"model.l1_lambda": torch.ones(3)}, r"model.l1_lambda has shape \(3,\); \(2, 2\)"),
        (
            {"model.layers.1.attn.router.conv_stack.convs.1.weight": torch.ones(6, 6, 1, 1)},
            r"convs.1.weight has shape \(6, 6, 1, 1\), by config.json it is \(6, 6, 1, 3\)",
        ),
        (
            {"model.layers.2.mlp.up_proj.weight": torch.ones(40, 24).half()},
            r"several dtypes .*up_proj.weight in torch.float16",
        ),
        ({"model.norm.weight": torch.ones(24, dtype=torch.int8)}, r"model.norm.weight is in torch.int8"),
        ({"lm_head.weight": torch.ones(VOCAB, HIDDEN)}, r"lm_head.weight differs from model.embeddings.weight"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_tensors_that_are_refused(change, message, tmp_path):
    """The import fails, names the tensor, and writes nothing."""
    tensors = {key: x for key, x in (make_tensors(SOURCES["lte"]) | change).items() if x is not None}
    folder, _ = make_folder(tmp_path / "theirs", "lte", tensors=tensors)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_shared_scorer_that_differs():
    tensors = make_tensors(SOURCES["lte, one stack"])
    tensors["model.layers.3.attn.router.conv_stack.proj.bias"] += 1
    with pytest.raises(
        ValueError, match=r"layers.3.attn.router.conv_stack.proj.bias differs from that of other layers"
    ):
        to_own(SOURCES["lte, one stack"], tensors)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"model_type": "llama"}, r"model_type='llama' can't be imported; known are hybrid_gated_deltanet, gated"),
        (SOURCES["transformer"] | {"qk_norm": True}, r"qk_norm=True is not supported; only False"),
        (SOURCES["transformer"] | {"soft_cap": 30}, r"soft_cap=30 is a field that isn't known"),
        (SOURCES["delta"] | {"allow_neg_eigval": True}, r"allow_neg_eigval=True"),
        (SOURCES["delta"] | {"num_v_heads": 4}, r"num_v_heads=4 is not supported"),
        (SOURCES["delta"] | {"attn": [{}, {}]}, r"attn has 2 kinds of attention layers"),
        (
            hybrid({**EVICTION, "routing_method": "relu"}),
            r"attn.routing_method='relu' is not supported; only 'sigmoid'",
        ),
        (hybrid({**EVICTION, "routing_shared": "row"}), r"attn.routing_shared='row' is unknown"),
        (hybrid({**EVICTION, "buffer_size": 1}), r"attn.buffer_size=1 holds the 2 sinks too"),
        (hybrid({**EVICTION, "window_size": None}), r"attn.window_size is missing"),
        (hybrid({**EVICTION, "temperature": 2}), r"attn.temperature=2 is a field that isn't known"),
        (hybrid(EVICTION, "gated_deltanet"), r"attn.attn_type='lte' belongs to model_type='hybrid_gated_deltanet'"),
        (hybrid({**ATTENTION, "layers": [1, 4]}), r"attn.layers=\[1, 4\] names layers beyond num_hidden_layers=4"),
        (hybrid({**ATTENTION, "num_heads": 5}), r"num_heads=5 doesn't divide hidden_size=24"),
        (SOURCES["nsa"] | {"window_size": None}, r"window_size=None of the nsa layers must be a whole number"),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_configurations_that_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_config(source)


def test_value_heads_as_many_as_heads_are_none_of_their_own():
    assert read_config(SOURCES["delta"] | {"num_v_heads": 2}).gdn_num_heads == 2


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({}, "gated_deltanet", r"retention='lte' has no place in format 'gated_deltanet'"),
        ({}, "transformer", r"format 'transformer' has no place for layer_types"),
        ({"hidden_size": 36}, "hybrid_gated_deltanet", r"head_dim=12 has no place .* which has 6"),
        ({"retention": "h2o"}, "hybrid_gated_deltanet", r"retention='h2o' has no place"),
        ({"retention": "none", "budget": 0}, "gated_deltanet", r"sinks=2 has no place"),
        ({"position_encoding": "rope_in_cache"}, "hybrid_gated_deltanet", r"position_encoding='rope_in_cache'"),
        ({"layer_types": ["attention", "nsa"]}, "hybrid_gated_deltanet", r"no place for layer_types"),
        ({}, "mamba", r"format 'mamba' is unknown"),
    ],
)
def test_models_that_are_not_exported(changes, kind, message):
    with pytest.raises(ValueError, match=message):
        write_config(make_config(**{"hidden_size": 72, **changes}), kind)


def test_folders_that_are_refused(tmp_path):
    folder, _ = make_folder(tmp_path / "theirs", "delta")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin in place of model.safetensors.*safe_serialization=True"):
        import_checkpoint(folder, tmp_path / "ours")
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        import_checkpoint(folder, tmp_path / "ours")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        import_checkpoint(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"exists already and isn't an empty folder"):
        import_checkpoint(folder, folder)
    with pytest.raises(ValueError, match=r"neither a folder nor the name of a model on the hub"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"nobody/nothing is no folder here, and the hub doesn't give it"):
        import_checkpoint("nobody/nothing", tmp_path / "ours")
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "back")
    assert not (tmp_path / "ours").exists()


def test_command_line(tmp_path, capsys):
    import argparse

    from models.conversion_cli import (
        add_export_arguments,
        add_import_arguments,
        export_from_arguments,
        import_from_arguments,
    )

    assert set(KINDS) == set(FORMATS)
    folder, _ = make_folder(tmp_path / "theirs", "lte")
    parser = argparse.ArgumentParser()
    add_import_arguments(parser)
    assert import_from_arguments(parser.parse_args([str(folder), "--out", str(tmp_path / "ours")])) == 0
    printed = capsys.readouterr().out
    assert '"window": 10' in printed
    assert f"parameters; the model is in {tmp_path / 'ours'}" in printed
    parser = argparse.ArgumentParser()
    add_export_arguments(parser)
    back = ["--out", str(tmp_path / "back"), "--format", "hybrid_gated_deltanet"]
    assert export_from_arguments(parser.parse_args([str(tmp_path / "ours"), *back])) == 0
    assert "a checkpoint of kind hybrid_gated_deltanet is in" in capsys.readouterr().out
