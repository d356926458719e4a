"""Configurations: what is refused and in which words, the shipped files with their exact sizes, and `describe`."""

import json
import math
from pathlib import Path

import pytest
import torch

from models import HybridConfig, HybridForCausalLM
from models.config import load_config
from models.info import describe, render
from tests.tiny_models import FAMILIES, make_config, make_model

FOLDER = Path(__file__).parents[2] / "configs" / "models"
COUNTS = {
    "transformer-0.4b": 341_099_520,
    "transformer-1.4b": 1_213_302_784,
    "gdn-0.4b": 366_956_928,
    "gdn-1.4b": 1_466_343_808,
    "gdn-swa-0.4b": 354_028_224,
    "gdn-swa-1.4b": 1_339_823_296,
    "gdn-full-0.4b": 354_028_224,
    "gdn-full-1.4b": 1_339_823_296,
    "streaming-0.4b": 354_028_224,
    "streaming-1.4b": 1_339_823_296,
    "nsa-0.4b": 349_750_272,
    "nsa-1.4b": 1_180_272_640,
    "lansa-0.4b": 358_353_600,
    "lansa-1.4b": 1_323_308_224,
    "lalte-0.4b": 360_246_144,
    "lalte-1.4b": 1_342_932_256,
}
REQUIRED = [name for name in COUNTS if "nsa" not in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 6}, r"window=6 must be larger than the scorer's lookahead 6"),
        ({"window": 0, "retention": "none", "budget": 0}, r"window=0 must be at least 1"),
        ({"window": None}, r"window=null keeps every token; use retention='none'"),
        ({"num_key_value_heads": 4}, r"num_attention_heads=6 is not divisible by num_key_value_heads=4"),
        ({"head_dim": None, "hidden_size": 37}, r"hidden_size=37 is not divisible by num_attention_heads=6"),
        (
            {"head_dim": 13, "retention": "none", "budget": 0},
            r"head_dim=13 must be even for position_encoding='rope'",
        ),
        ({"head_dim": 14}, r"head_dim=14 can't be halved 2 times"),
        ({"layer_types": ["attention", "mamba"], "num_hidden_layers": 2}, r"layer_types has 'mamba'; use gated_del"),
        ({"num_hidden_layers": 3}, r"layer_types names 4 layers, num_hidden_layers=3"),
        ({"layer_types": "attention"}, r"layer_types='attention' must be a list"),
        ({"retention": "lru"}, r"retention='lru' is unknown; use one of none, lte"),
        ({"retention": "none"}, r"budget=3 has nothing to fill it"),
        ({"position_encoding": "alibi"}, r"position_encoding='alibi' is unknown"),
        ({"scorer_sharing": "all"}, r"scorer_sharing='all' is unknown"),
        ({"straight_through": "some"}, r"straight_through='some' is unknown; use one of all, beyond_window, weight_"),
        (
            {"straight_through": "beyond_window", "position_encoding": "rope_in_cache"},
            r"straight_through='beyond_window' is not defined for position_encoding='rope_in_cache'",
        ),
        (
            {"straight_through": "beyond_window", "attention_backend": "flex"},
            r"straight_through='beyond_window' has no gradient in attention_backend='flex'",
        ),
        ({"attention_backend": "cudnn"}, r"attention_backend='cudnn' is unknown"),
        ({"scorer_kernel_sizes": [3, 3]}, r"scorer_kernel_sizes=\[3, 3\] and scorer_dilations=\[2, 2, 2\]"),
        ({"scorer_kernel_sizes": [3, 4, 3]}, r"scorer_kernel_sizes=\[3, 4, 3\] must be odd"),
        ({"scorer_dropout": 1.0}, r"scorer_dropout=1.0 must lie in \[0, 1\)"),
        ({"budget": -1}, r"budget=-1 must be at least 0"),
        ({"sinks": -2}, r"sinks=-2 must be at least 0"),
        ({"sink_token": "zero"}, r"sink_token='zero' is unknown; use one of none, learnable"),
        ({"sink_token": "learnable", "sinks": 0}, r"sinks=0 would evict the learned sink token"),
        (
            {"softmax_off_by_one": True, "layer_types": ["nsa"], "num_hidden_layers": 1},
            r"softmax_off_by_one=true is not defined for nsa layers",
        ),
        ({"prefill_chunk": 0}, r"prefill_chunk=0 must be at least 1"),
        ({"vocab_size": "61"}, r"vocab_size='61' must be a whole number"),
        ({"hidden_size": 36.5}, r"hidden_size=36.5 must be a whole number"),
        ({"sinks": True}, r"sinks=True must be a whole number"),
        ({"window": "17"}, r"window='17' must be a whole number or null"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings=1 must be true or false"),
        ({"gdn_expand_v": 1.25}, r"gdn_expand_v=1.25 times gdn_head_dim=10 must be a positive whole number"),
        ({"gdn_conv_size": 1}, r"gdn_conv_size=1 must be at least 2"),
        ({"penalty_max": 1e-12}, r"penalty_max=1e-12 is below penalty_min=1e-09"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps=0.0 must be positive"),
        ({"rope_theta": math.inf}, r"rope_theta=inf must be a finite number"),
        ({"embedding_range": math.nan}, r"embedding_range=nan must be a finite number or null"),
        ({"penalty_min": 0}, r"penalty_min=0, from which λ would never grow; .* or penalty_max=0 for no λ"),
        ({"penalty_max": -1.0}, r"penalty_max=-1.0 must be at least 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, r"rope_parameters=\{.* set rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters=\{.*linear.*\} is not read",
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_window_of_lookahead_and_one_is_enough():
    assert make_config(window=7).lookahead == 6
    assert make_config(window=3, scorer_dilations=[1, 1, 1], scorer_kernel_sizes=[3, 1, 3]).lookahead == 2


def test_defaults_follow_the_hidden_size():
    small, large = HybridConfig(hidden_size=1024), HybridConfig(hidden_size=2048, num_attention_heads=32)
    assert (small.intermediate_size, large.intermediate_size) == (2816, 5632)
    assert (small.head_dim, large.head_dim) == (64, 64)
    assert small.layer_types == ["gated_deltanet", "attention"] * 12
    assert small.target_density == 512 / (4096 - 768)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_round_trip(family, tmp_path):
    config = make_config(family, eos_token_id=[3, 4], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    again = load_config(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert load_config(tmp_path / "config.json").to_dict() == config.to_dict()
    assert HybridConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_load_config_refuses(tmp_path):
    def file(content):
        (tmp_path / "model.json").write_text(content)
        return tmp_path / "model.json"

    good = json.loads((FOLDER / "lalte-tiny.json").read_text())
    assert load_config(file(json.dumps(good)), {"window": 77}).window == 77
    assert load_config(file(json.dumps({**good, "dtype": "bfloat16", "id2label": None}))).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"model.json: unknown field windw=9; did you mean window\?"):
        load_config(file(json.dumps({**good, "windw": 9})))
    with pytest.raises(ValueError, match=r"overrides: unknown field buget=9; did you mean budget\?"):
        load_config(file(json.dumps(good)), {"buget": 9})
    with pytest.raises(ValueError, match=r"with overrides: window=6 must be larger"):
        load_config(file(json.dumps(good)), {"window": 6})
    with pytest.raises(ValueError, match=r"model.json: layer_types names"):
        load_config(file(json.dumps({**good, "num_hidden_layers": 5})))
    with pytest.raises(ValueError, match=r"model_type='llama' is another kind of model; 'lalte' is read here"):
        load_config(file(json.dumps({**good, "model_type": "llama"})))
    with pytest.raises(ValueError, match=r"model.json is not JSON \(Expecting"):
        load_config(file("{"))
    with pytest.raises(ValueError, match=r"holds a list; a JSON object"):
        load_config(file("[]"))
    with pytest.raises(ValueError, match=r"nowhere.json is no file"):
        load_config(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"config.json is no file"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"float17"):
        load_config(file(json.dumps({**good, "dtype": "float17"})))


def test_required_files_exist():
    tiny = ("transformer-tiny", "gdn-tiny", "gdn-swa-tiny", "gdn-full-tiny", "streaming-tiny", "lalte-tiny")
    for name in (*REQUIRED, *tiny):
        assert (FOLDER / f"{name}.json").is_file(), name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_config(path):
    """Every file builds, with exactly the parameters it is meant to have, and nothing left out by part."""
    info = describe(load_config(path))
    assert sum(info.parameters.values()) == info.total
    least, most = {"tiny": (1_000_000, 5_000_000), "small": (31_000_000, 32_000_000)}.get(
        path.stem.rpartition("-")[2], (COUNTS.get(path.stem),) * 2
    )
    assert least <= info.total <= most
    constant = not path.stem.startswith(("transformer", "gdn-full", "nsa", "lansa"))
    assert (info.cache_per_token == 0) == constant


def test_sizes_of_lalte_04b():
    """By hand: 12 layers of slots in bfloat16 with positions, logits and streams, and 12 of Gated DeltaNet."""
    config = load_config(FOLDER / "lalte-0.4b.json")
    slots, heads, dim = 4 + 512 + 768, 16, 64
    attention = 2 * slots * heads * dim * 2 + slots * heads * (8 + 4) + 8
    scorer = 4 * heads * (128 + 64 + 32) * 2
    gdn = 8 * 128 * 128 * 4 + 3 * (3 * 1024) * 2
    info = describe(config)
    assert info.cache_fixed == 12 * (attention + scorer + gdn)
    assert describe(config, batch=5).cache_fixed == 5 * info.cache_fixed
    learnable = describe(make_config(sink_token="learnable"))
    assert sum(learnable.parameters.values()) == learnable.total == describe(make_config()).total + 36
    assert (
        describe(load_config(FOLDER / "transformer-0.4b.json"), batch=3).cache_per_token == 3 * 24 * 2 * 16 * 64 * 2
    )
    parameters = info.parameters
    assert parameters["head"] == 0
    assert parameters["embeddings"] == 32000 * 1024
    assert parameters["MLP"] == 24 * 3 * 1024 * 2816
    assert parameters["attention"] == 12 * 4 * 1024 * 1024
    assert parameters["norms"] == 49 * 1024


@pytest.mark.parametrize("family", FAMILIES)
def test_described_is_what_is_built(family):
    model = make_model(family)
    info = describe(model.config, batch=3, dtype=torch.float32)
    assert info.total == sum(p.numel() for p in model.parameters())
    if not info.cache_per_token:
        assert info.cache_fixed == model.new_cache(3).nbytes


def test_described_in_words():
    text = render(load_config(FOLDER / "lalte-0.4b.json"), 1, torch.bfloat16)
    for words in (
        "360,246,144",
        "4 sinks + 512 retained + window of 768 = 1284",
        "the same at any length",
        "tied to",
    ):
        assert words in text
    text = render(load_config(FOLDER / "gdn-full-0.4b.json"), 2, torch.float32)
    for words in (
        "354,028,224",
        "196,608 bytes more with every token",
        "grows without limit",
        "2 sequences in float32",
    ):
        assert words in text
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        describe(make_config(), batch=0)


def test_auto_classes():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    values = make_config().to_dict()
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    assert isinstance(config, HybridConfig)
    assert isinstance(AutoModelForCausalLM.from_config(config), HybridForCausalLM)
    assert type(AutoModel.from_config(config)).__name__ == "HybridModel"


def test_settings_changed_while_loading_are_checked_too(tmp_path):
    make_model("lalte").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="straight_through='some' is unknown"):
        HybridForCausalLM.from_pretrained(tmp_path, straight_through="some")
    with pytest.raises(ValueError, match="budget=None must be a whole number"):
        HybridForCausalLM.from_pretrained(tmp_path, budget=None)
    with pytest.raises(ValueError, match="window='wide' must be a whole number or null"):
        HybridForCausalLM.from_pretrained(tmp_path, window="wide")
    assert HybridForCausalLM.from_pretrained(tmp_path, straight_through="beyond_window").config.budget > 0
