"""Operations and bytes by formula, against what runs, what the rule lets through, and the tables of the docs."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lte.visibility import visible
from models import HybridForCausalLM
from models.config import load_config
from models.costs import Costs, costs
from models.info import as_json, describe
from tests.tiny_models import FAMILIES, make_config, make_ids, make_model

ROOT = Path(__file__).parents[2]
MODELS = ("transformer", "gdn-full", "nsa", "lansa", "gdn", "gdn-swa", "streaming", "lalte")
NSA = {"nsa_num_heads": 4, "nsa_num_key_value_heads": 1, "nsa_head_dim": 8}


@torch.no_grad()
def counted(config, length):
    """Operations of the matrix products of one step after so many tokens, by PyTorch's own counter."""
    model = HybridForCausalLM(config).eval()
    cache = model.new_cache(1)
    model(make_ids(1, length), past_key_values=cache)
    with FlopCounterMode(display=False) as counter:
        model(make_ids(1, 1), past_key_values=cache)
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_that_pytorch_counts(family):
    """Linear maps, convolutions and the scorer; of the delta rule reading and output, whose rest isn't a product."""
    config = make_config(family)
    found, cost = counted(config, 30), costs(config, 30, torch.float32)
    assert found["aten.mm"] == cost.linear_operations
    kinds = config.layer_types
    gdn, scorers = kinds.count("gated_deltanet"), kinds.count("attention") if config.has_scorer else 0
    assert found.get("aten.convolution", 0) == gdn * 2 * 4 * 2 * 3 * 10
    scorer = 2 * 2 * 3 * (24 * 12 + 12 * 6 + 6 * 3)
    assert found.get("aten.bmm", 0) == gdn * 4 * 2 * 10 * 10 + scorers * scorer
    if gdn:
        assert cost.mixers["gated_deltanet"].step_operations == 7 * 2 * 10 * 10 + 2 * 4 * 2 * 3 * 10
    if scorers:
        without = costs(make_config(family, retention="recency"), 30, torch.float32).mixers["attention"]
        assert cost.mixers["attention"].step_operations - without.step_operations == scorer + 2 * 2 * 3


@pytest.mark.parametrize("length", [5, 21, 22, 90])
@pytest.mark.parametrize("family", ["lalte", "gdn-swa", "gdn-full", "streaming"])
def test_keys_that_are_read(family, length):
    """A full budget: every score is positive."""
    config = make_config(family)
    wanted = torch.ones(1, length + 1, 2) if config.budget else None
    seen = visible(
        wanted,
        batch=1,
        length=length + 1,
        heads=2,
        window=config.window,
        sinks=config.sinks,
        budget=config.budget,
    )
    reads = seen.expand(1, 2, length + 1, length + 1)[0, 0].sum(-1)
    cost = costs(make_config(family, retention="recency" if config.budget else "none"), length, torch.float32)
    attention = cost.mixers["attention"]
    assert attention.step_operations == 4 * 6 * 12 * int(reads[-1])
    assert attention.step_bytes == 2 * 2 * 12 * 4 * int(reads[-1])
    assert attention.training_operations == round(4 * 6 * 12 * float(reads[:-1].double().mean()))


def test_native_sparse_attention():
    sizes = {**NSA, "nsa_block_size": 8, "nsa_selected_blocks": 4, "nsa_window": 16}
    config = make_config("transformer", layer_types=["nsa"], num_hidden_layers=1, **sizes)
    found = counted(config, 63)
    products = sum(found.values()) - found["aten.mm"]
    cost = costs(config, 63, torch.float32)
    assert found["aten.mm"] == cost.linear_operations
    attention = cost.mixers["nsa"]
    assert products == 4 * 4 * 8 * (8 + 4 * 8)
    assert attention.step_operations == products + 4 * 4 * 8 * 16
    assert attention.step_bytes == 2 * 8 * 4 * (8 + 32 + 16)
    places = range(1, 62)  # tokens that a query may read, of a row of 61
    mean = sum(place // 8 + min(place, 32) + min(place, 16) for place in places) / 61
    assert costs(config, 61).mixers["nsa"].training_operations == round(4 * 4 * 8 * mean)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_the_formulas(name):
    """The formulas of docs/mixers.md, with 2 bytes a number."""
    config = load_config(ROOT / f"configs/models/{name}-0.4b.json")
    heads, dim, e = config.num_key_value_heads, config.head_dim, 2
    slots = config.sinks + config.budget + (config.window or 0)
    scorer = 14 * heads * dim * e if config.has_scorer else 0
    growth = 2 * config.nsa_num_key_value_heads * config.nsa_head_dim * e
    values = round(config.gdn_head_dim * config.gdn_expand_v)
    state = 4 * config.gdn_head_dim * values + 3 * (2 * config.gdn_head_dim + values) * e
    expected = {
        "attention": (0, 2 * heads * dim * e)
        if config.window is None
        else (heads * slots * (2 * dim * e + 12) + scorer + 8, 0),
        "gated_deltanet": (config.gdn_num_heads * state, 0),
        "nsa": (0, growth + growth // config.nsa_block_size),
    }
    found = costs(config)
    for kind, cost in found.mixers.items():
        assert (cost.cache_fixed, cost.cache_per_token) == expected[kind]
    info = describe(config)
    assert sum(cost.layers * cost.cache_fixed for cost in found.mixers.values()) == info.cache_fixed
    assert sum(cost.layers * cost.cache_per_token for cost in found.mixers.values()) == info.cache_per_token


def test_weights_and_totals():
    for tied in (True, False):
        model = make_model(tie_word_embeddings=tied)
        numbers = sum(p.numel() for p in model.parameters())
        cost = costs(model.config, 40, torch.float32)
        assert cost.weight_bytes == 4 * (numbers - (0 if tied else 61 * 36))
    scorer = 4 * sum(p.numel() for name, p in model.named_parameters() if "scorer." in name)
    mixers = [cost.mixers[kind] for kind in model.config.layer_types]
    assert cost.step_operations == cost.linear_operations + sum(mixer.step_operations for mixer in mixers)
    assert cost.training_operations == cost.linear_operations + sum(mixer.training_operations for mixer in mixers)
    assert cost.step_bytes == cost.weight_bytes - scorer + sum(mixer.step_bytes for mixer in mixers)
    shared = costs(make_config(scorer_sharing="heads"), 40).mixers["attention"]
    own = costs(make_config(), 40).mixers["attention"]
    assert shared.step_operations == own.step_operations
    assert own.step_bytes - shared.step_bytes == 2 * (3 * (24 * 12 + 12 * 6 + 6 * 3) + 3)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        costs(make_config(), 0)


def test_json_for_programs():
    config = make_config()
    found = json.loads(as_json(config, 3, torch.float32, 50))
    assert found["cache_fixed"] == make_model().new_cache(3).nbytes
    assert found["costs"]["length"] == 50
    assert Costs(**found["costs"]).step_bytes == costs(config, 50, torch.float32).step_bytes
    assert found["rules"]["retention"].startswith("lte")


def _row(name: str) -> str:
    """A row of the table of operations and bytes in docs/mixers.md."""
    cells = [name]
    for size in ("0.4b", "1.4b"):
        config = load_config(ROOT / f"configs/models/{name}-{size}.json")
        near, far = costs(config), costs(config, 1 << 20)
        cells += [f"{cost.step_operations / 1e9:.2f}, {cost.step_bytes / 1e9:.2f}" for cost in (near, far)]
        cells.append(f"{near.training_operations / 1e9:.2f}")
    return f"| {' | '.join(cells)} |"


def test_the_tables_of_the_docs():
    text = (ROOT / "docs/mixers.md").read_text()
    for name in MODELS:
        assert _row(name) in text
        for size in ("0.4b", "1.4b"):
            info = describe(load_config(ROOT / f"configs/models/{name}-{size}.json"))
            bytes_ = rf"\| {name} \|(.*\|)? {info.cache_fixed:,} \| {info.cache_per_token:,} \|"
            assert re.search(bytes_, text), f"bytes of {name}-{size}"
