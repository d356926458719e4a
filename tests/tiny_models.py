"""Models small enough to be run token by token, with a rule that is at work within 200 tokens."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models import HybridCache, HybridConfig, HybridForCausalLM

VOCAB = 61
HYBRID = ["gated_deltanet", "attention", "gated_deltanet", "attention"]
FAMILIES = {
    "lalte": {"layer_types": HYBRID},
    "gdn": {"layer_types": ["gated_deltanet"] * 3, "budget": 0, "retention": "none"},
    "gdn-swa": {"layer_types": HYBRID, "window": 19, "sinks": 0, "budget": 0, "retention": "none"},
    "gdn-full": {"layer_types": HYBRID, "window": None, "sinks": 0, "budget": 0, "retention": "none"},
    "transformer": {"layer_types": ["attention"] * 3, "window": None, "sinks": 0, "budget": 0, "retention": "none"},
    "streaming": {"layer_types": HYBRID, "sinks": 4, "budget": 0, "retention": "none"},
}
VARIANTS = {
    **{name: (name, {}) for name in FAMILIES},
    "lalte, one scorer a layer": ("lalte", {"scorer_sharing": "heads"}),
    "lalte, one scorer": ("lalte", {"scorer_sharing": "layers"}),
    "lalte, rope_in_cache": ("lalte", {"position_encoding": "rope_in_cache"}),
    "lalte, no positions": ("lalte", {"position_encoding": "none"}),
    "transformer, rope_in_cache": ("transformer", {"position_encoding": "rope_in_cache"}),
    "lalte, zero sink": ("lalte", {"softmax_off_by_one": True}),
    "lalte, learned sink": ("lalte", {"sink_token": "learnable"}),
    "transformer, both sinks": ("transformer", {"sink_token": "learnable", "softmax_off_by_one": True}),
}


def make_config(family: str = "lalte", **changes) -> HybridConfig:
    layers = changes.get("layer_types", FAMILIES[family]["layer_types"])
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 36,
        "intermediate_size": 44,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "window": 17,
        "sinks": 2,
        "budget": 3,
        "scorer_dropout": 0.0,
        "gdn_num_heads": 2,
        "gdn_head_dim": 10,
        "max_position_embeddings": 200,
        "prefill_chunk": 37,
        "initializer_range": 0.2,  # large, so that every layer changes the logits
    }
    return HybridConfig(**{**values, **FAMILIES[family], **changes})


def make_model(family: str = "lalte", seed: int = 0, **changes) -> HybridForCausalLM:
    """In evaluation mode; about half of the retention logits are positive."""
    torch.manual_seed(seed)
    model = HybridForCausalLM(make_config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scorer.out_bias"):
                parameter.fill_(-0.1)
            elif name.endswith("scorer.out_weight"):
                parameter.mul_(3)
    return model


def make_variant(name: str) -> HybridForCausalLM:
    family, changes = VARIANTS[name]
    return make_model(family, **changes)


def make_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_split(length: int, seed: int) -> list[int]:
    """Sizes from 1 to 40 that add up to `length`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    while sum(sizes) < length:
        size = int(torch.randint(1, 41, (), generator=generator))
        sizes.append(min(size, length - sum(sizes)))
    return sizes


@torch.no_grad()
def run_in_pieces(
    model: HybridForCausalLM, ids: Tensor, sizes: list[int], cache: HybridCache | None = None
) -> Tensor:
    cache = cache if cache is not None else model.new_cache(len(ids))
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, 1)], 1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative root mean square of the difference."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    assert scale > 1e-3, "nothing is compared with nothing"
    assert difference <= tolerance * scale, f"relative RMS {float(difference / scale):.2e} > {tolerance:.0e}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries; a character outside ASCII takes several tokens."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the other fox laughs"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
