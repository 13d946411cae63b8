"""One tiny configuration of every family of transformers that the conversion is tested with."""

from __future__ import annotations

import torch

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GATED = {**SIZES, **TOKENS, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
OPT_SIZES = {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": True}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**GATED, "tie_word_embeddings": False}),
    "mistral": ("MistralForCausalLM", {**GATED, "sliding_window": 8, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {**GATED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**GATED, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**GATED, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3ForCausalLM", {**GATED, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "opt": ("OPTForCausalLM", {**SIZES, **TOKENS, **OPT_SIZES}),
}


def tiny_model(family: str):
    import transformers

    name, fields = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(11)
    model = cls(cls.config_class(**fields)).eval()
    assert model.config.model_type == family
    with torch.no_grad():  # norms and biases are ones and zeros otherwise
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def ids(length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model, length: int = 12) -> torch.Tensor:
    return model(ids(length)).logits


def continued(model, tokens: int = 6) -> torch.Tensor:
    return model.generate(ids(5), max_new_tokens=tokens, do_sample=False)
