"""A language model small enough for tests, its tokenizer, and a spiking version of it."""

from __future__ import annotations

import functools

import torch

import ranvier

WORDS = [
    "<eos>",
    "the",
    "a",
    "node",
    "of",
    "ranvier",
    "lets",
    "nerve",
    "impulse",
    "leap",
    "far",
    "while",
    "work",
    "rests",
]
TEXT = " ".join(WORDS[1:] * 40)


def tiny_llama(tied: bool = True, dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "attention_bias": True}
    config = LlamaConfig(**sizes, **heads, eos_token_id=0, bos_token_id=0, pad_token_id=0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.to(dtype)


@functools.cache
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<eos>", pad_token="<eos>")


def token_batch(length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, len(WORDS), (1, length), generator=torch.Generator().manual_seed(seed))


def spiking_llama(tied: bool = True, dtype: torch.dtype = torch.float32, **fields):
    model = tiny_llama(tied, dtype)
    ranvier.spike_(model, ranvier.SpikeConfig(**fields), [token_batch(32, seed=1)])
    return model


@torch.no_grad()
def logits(model, length: int = 12) -> torch.Tensor:
    return model(token_batch(length)).logits
