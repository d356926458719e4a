"""The tokenizer of a run: from a folder, from a hub name, or trained on the run's own text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNKNOWN, BEGIN, END, PAD = "<unk>", "<s>", "</s>", "<pad>"


@dataclass
class TokenizerConfig:
    """Exactly one of `path` (folder), `hub` (hub name) and `train_vocab_size` is set.

    train_vocab_size: train a byte-level BPE of this many entries, special tokens included.
    split_digits: a trained tokenizer gives every digit a token of its own.
    train_characters: how much text (in characters, from the sources in turn) a trained tokenizer sees.
    train_needles: how many needle wordings with their keys it sees besides, if the run has needle documents.
    """

    path: str | None = None
    hub: str | None = None
    train_vocab_size: int | None = None
    split_digits: bool = True
    train_characters: int = 20_000_000
    train_needles: int = 2000


def check_tokenizer_config(config: TokenizerConfig) -> None:
    """Raises: ValueError if not exactly one way to a tokenizer is chosen, or the folder is missing."""
    chosen = [name for name in ("path", "hub", "train_vocab_size") if getattr(config, name) is not None]
    if len(chosen) != 1:
        raise ValueError(
            f"tokenizer: {', '.join(chosen) or 'nothing'} is set: set exactly one of tokenizer.path, tokenizer.hub "
            "and tokenizer.train_vocab_size"
        )
    if config.path is not None and not Path(config.path).expanduser().is_dir():
        raise ValueError(f"tokenizer.path={config.path!r} is no folder: name one that holds a tokenizer")
    if config.train_vocab_size is not None and config.train_vocab_size < 260:
        raise ValueError(
            f"tokenizer.train_vocab_size={config.train_vocab_size} is below 260: 256 bytes and 4 special tokens "
            "are always in it"
        )


def load_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config.path` or `config.hub` names.

    Raises: ValueError if it can't be loaded or has no end-of-text token.
    """
    # a folder of one of this project's models is found through the Auto classes, which this import registers with
    import models.auto  # noqa: F401

    where, field = (config.path, "tokenizer.path") if config.path is not None else (config.hub, "tokenizer.hub")
    name = str(Path(where).expanduser()) if config.path is not None else where
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}={where!r} can't be loaded as a tokenizer: {error}") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{field}={where!r} has no eos_token, which separates documents: set one in its files")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, split_digits: bool = True, characters: int = 20_000_000
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on at most `characters` characters of `texts`.

    Raises: ValueError if there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytewise])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Limited(texts, characters)
    bpe.train_from_iterator(seen, trainer)
    if seen.count == 0:
        raise ValueError(
            f"tokenizer.train_vocab_size={vocab_size}, but data.sources hold no text to train on: name files that "
            "aren't empty"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, pad_token=PAD
    )


class _Limited:
    """The first `characters` characters of some texts; `count` says how many texts were given out."""

    def __init__(self, texts: Iterable[str], characters: int) -> None:
        self.texts, self.left, self.count = texts, characters, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.left <= 0:
                return
            yield text[: self.left]
            self.left -= len(text)
            self.count += 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises: ValueError if the tokenizer has ids that the model's embedding lacks."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries but the model's vocab_size is {vocab_size}: raise "
            "model.overrides.vocab_size or choose a smaller tokenizer"
        )


def check_begin(tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> None:
    """Raises: ValueError if documents are to begin with a token that the tokenizer lacks."""
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(
            "data.add_bos=True, but the tokenizer has no bos_token: set one in its files, or leave add_bos off"
        )
