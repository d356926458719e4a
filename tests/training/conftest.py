"""A small text, a tokenizer trained on it, and a tiny model configuration."""

import json
import random

import pytest

from training.tokenizer import train_tokenizer

TINY_MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "window": 9,
    "sinks": 2,
    "budget": 5,
    "gdn_num_heads": 2,
    "gdn_head_dim": 8,
    "initializer_range": 0.02,
    "penalty_interval": 2,
    "penalty_min": 0.01,
}

WORDS = ["river", "stone", "cloud", "under", "bright", "walks", "sings", "seven", "lamp", "often", "cold", "the", "a"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        sentences = [
            " ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(1 + number % 7)
        ]
        texts.append(f"Text {number}. " + " ".join(sentences))
    return texts


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(60)


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, 300)


@pytest.fixture
def text_file(tmp_path, texts):
    path = tmp_path / "texts.txt"
    path.write_text("\n<end>\n".join(texts))
    return path


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path
