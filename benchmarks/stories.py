"""stories260K, a trained model in float32: what each pipeline's 4-bit and 2-bit weights cost, activations as they are.

Its weights were never quantized before, unlike SmolLM2's. A row is a pipeline and a kind of weight: the mean relative weight
error of the layers, and the cross-entropy the converted model has on text that the float model wrote (sampled by seed),
against the float model's own.

    RANVIER_DATA=folder python benchmarks/stories.py --csv stories.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import struct
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm.convert import find_linears
from ranvier.methods.spikellm.saliency import salient_mask, weight_saliency
from ranvier.methods.spikellm.spike_grid import binarize_by_gptq
from ranvier.reference.ternary_linear import binarize_partially

WEIGHT_ONLY = {"act_bits": None, "steps": 1, "salient": 0.0}
WEIGHTS = {
    "4 bits": WEIGHT_ONLY,
    "2 bits": {**WEIGHT_ONLY, "weight_bits": 2},
    "2 bits, T=2 on 5 %": {"act_bits": None, "weight_bits": 2, "steps": 2, "salient": 0.05},
    "2 bits, T=4 on 5 %": {"act_bits": None, "weight_bits": 2, "steps": 4, "salient": 0.05},
    "ternary": {**WEIGHT_ONLY, "weight_bits": 2, "weight_grid": "ternary"},
    "ternary, T=7 on 5.8 %": {"act_bits": None, "weight_bits": 2, "weight_grid": "ternary", "steps": 7, "salient": 0.058},
    "ternary, T=2 on 35 %": {"act_bits": None, "weight_bits": 2, "weight_grid": "ternary", "steps": 2, "salient": 0.35},
}
PIPELINES = {
    "rtn": {},
    "gptq": {"pipeline": "gptq"},
    "omniquant": {"pipeline": "omniquant"},
    "rotate": {"rotate": True},
    "rotate + gptq": {"rotate": True, "pipeline": "gptq"},
}
WINDOW, CALIBRATION, EVALUATION = 256, 16, 16
COLUMNS = ("weights", "pipeline", "weight_error", "cross_entropy", "perplexity_ratio", "note")


def read_model(path: Path) -> torch.nn.Module:
    """The llama2.c file of version 0 as transformers' Llama. q and k rows go from interleaved pairs to halves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", data[:28])
    flat, at = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = math.prod(shape)
        at += size
        return flat[at - size : at].view(shape).clone()

    width = dim // heads
    state = {"model.embed_tokens.weight": take(vocab, dim)}
    parts = [("input_layernorm", (dim,)), *[(f"self_attn.{n}_proj", s) for n, s in (
        ("q", (dim, dim)), ("k", (kv_heads * width, dim)), ("v", (kv_heads * width, dim)), ("o", (dim, dim)))],
        ("post_attention_layernorm", (dim,)), ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim))]  # fmt: skip
    for name, shape in parts:
        for layer, weight in enumerate(take(layers, *shape)):
            pairs = name.endswith(("q_proj", "k_proj"))
            halves = weight.view(-1, width // 2, 2, dim).transpose(1, 2) if pairs else weight
            state[f"model.layers.{layer}.{name}.weight"] = halves.reshape(weight.shape)
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=context, rms_norm_eps=1e-5,
            rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def write_text(model: torch.nn.Module, count: int, seed: int) -> list[torch.Tensor]:
    """Windows that the model samples itself at temperature 1."""
    torch.manual_seed(seed)
    start = torch.ones((count, 1), dtype=torch.int64)
    # Only the length ends a story: a padded rest would be the same token over and over.
    ids = model.generate(start, do_sample=True, top_k=0, max_new_tokens=WINDOW - 1, min_new_tokens=WINDOW - 1, pad_token_id=0)
    return list(ids.split(1))


@torch.no_grad()
def cross_entropy(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    losses = [torch.nn.functional.cross_entropy(model(x).logits[0, :-1], x[0, 1:]) for x in batches]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def binarize_(model: torch.nn.Module, calibration: list[torch.Tensor], by_gptq: bool, share: float = 0.05) -> float:
    """Partial binarization of every layer, block inputs those of the float model: the mean relative weight error.

    1.35 steps a weight, as ternary with T=2 on 35 % or T=7 on 5.8 %.
    """
    layers, _ = find_linears(model, ("lm_head",))
    grams = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.flatten(0, -2)
        grams[name] += flat.T @ flat

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0])) for name, layer in layers.items()
    ]
    for batch in calibration:
        model(batch)
    for hook in hooks:
        hook.remove()
    errors = []
    for name, layer in layers.items():
        mask = salient_mask(weight_saliency(layer.weight, grams[name]), share)
        weight = binarize_by_gptq(layer.weight, grams[name], mask) if by_gptq else binarize_partially(layer.weight, mask)
        errors.append(float((weight - layer.weight).norm() / layer.weight.norm()))
        layer.weight.copy_(weight)
    return sum(errors) / len(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    folder = Path(os.environ.get("RANVIER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    path = folder / "stories260k" / "stories260K.bin"
    if not path.is_file():
        print(f"{path} is not here; RANVIER_DATA names the folder that holds stories260k", file=sys.stderr)
        return 2
    model = read_model(path)
    calibration, texts = write_text(model, CALIBRATION, 0), write_text(model, EVALUATION, 1)
    base = cross_entropy(model, texts)
    rows = [{"weights": "float32", "pipeline": "", "weight_error": 0.0, "cross_entropy": base, "perplexity_ratio": 1.0}]
    cells = [(w, p) for w in WEIGHTS for p in PIPELINES]
    for weights, pipeline in tqdm(cells, desc="cells", unit="cell"):
        variant, row = copy.deepcopy(model), {"weights": weights, "pipeline": pipeline}
        try:
            report = ranvier.spike_(variant, SpikeConfig(**WEIGHTS[weights], **PIPELINES[pipeline]), calibration)
        except ValueError as error:
            rows.append({**row, "note": str(error)})
            continue
        loss = cross_entropy(variant, texts)
        row["weight_error"] = sum(layer.weight_error for layer in report.layers) / len(report.layers)
        rows.append({**row, "cross_entropy": loss, "perplexity_ratio": math.exp(loss - base)})
    for pipeline, by_gptq in (("rtn", False), ("gptq", True)):
        variant = copy.deepcopy(model)
        error = binarize_(variant, calibration, by_gptq)
        loss = cross_entropy(variant, texts)
        row = {"weights": "partial binarization, 8 bits on 5 %", "pipeline": pipeline, "weight_error": error}
        rows.append({**row, "cross_entropy": loss, "perplexity_ratio": math.exp(loss - base)})
    for row in rows:
        shown = "  ".join(f"{row[key]:.4f}" if key in row else "-" for key in COLUMNS[2:5])
        print(f"{row['weights']:36} {row['pipeline']:14} {shown}  {row.get('note', '')}")
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
