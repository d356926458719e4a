"""A small tokenizer and a small foreign model, for evaluations."""

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    "line 17: REGISTER_CONTENT is <31415> Question: what is the REGISTER_CONTENT of line 9? Answer:",
    "A special magic number is hidden within the following text. Make sure to memorize it.",
    "Information about Publisher. The report was written in June 2010. Publisher: Applicant: Device name:",
]


def make_tokenizer(size: int = 400, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE; with `bos` every text begins with a token of its own."""
    cutter = Tokenizer(token_models.BPE())
    cutter.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cutter.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>", "<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cutter.train_from_iterator(SENTENCES, trainer)
    if bos:
        cutter.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=cutter, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>" if bos else None
    )


def make_llama(size: int = 400, positions: int = 4096) -> LlamaForCausalLM:
    """Random, with large weights, so that its predictions differ from place to place."""
    import torch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()
