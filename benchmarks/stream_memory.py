"""Peak memory of convert_folder on a Llama-2-7B-shaped model of a few layers: ``python benchmarks/stream_memory.py``.

Builds the model on disk (random weights in bfloat16, one tensor in memory at a time), converts it in a process of its own
and prints that process's peak resident memory beside the bytes of the model. Random token ids: the text does not matter here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MIDDLE, HEADS, VOCABULARY = 4096, 11008, 32, 32000


def build(folder: Path, layers: int) -> int:
    """A transformers folder with one shard a layer; returns the bytes of its weights."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config = LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    generator, files, total = torch.Generator().manual_seed(0), {}, 0

    def write(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {}
        for key, shape in shapes.items():
            norm = len(shape) == 1
            tensors[key] = torch.ones(shape) if norm else torch.randn(shape, generator=generator).mul_(0.02)
            tensors[key] = tensors[key].to(torch.bfloat16)
            total += tensors[key].numel() * 2
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shapes, name))

    write("outside.safetensors", {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)})
    write("norm.safetensors", {"model.norm.weight": (HIDDEN,)})
    for i in range(layers):
        begin = f"model.layers.{i}"
        square = {f"{begin}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        mlp = {f"{begin}.mlp.{name}_proj.weight": (MIDDLE, HIDDEN) for name in ("gate", "up")}
        norms = {f"{begin}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        write(f"layer-{i}.safetensors", {**square, **mlp, f"{begin}.mlp.down_proj.weight": (HIDDEN, MIDDLE), **norms})
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def convert(folder: Path, target: Path, batches: int, window: int, pipeline: str) -> dict[str, float]:
    """Run in a process of its own: peak resident bytes before and after the conversion, and seconds."""
    from ranvier import SpikeConfig
    from ranvier.integrations.stream import convert_folder
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (1, window), generator=generator) for _ in range(batches)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    report = convert_folder(folder, target, SpikeConfig(pipeline=pipeline), ids)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before, "peak": peak, "seconds": seconds, "packed": report.bytes_after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--pipeline", default="gptq")
    parser.add_argument("--run", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        done = convert(*map(Path, options.run), options.batches, options.window, options.pipeline)
        print(json.dumps(done))
        return
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "source", Path(name) / "target"
        total = build(source, options.layers)
        same = [f"--{key}={getattr(options, key)}" for key in ("batches", "window", "pipeline")]
        command = [sys.executable, __file__, *same, "--run", str(source), str(target)]
        done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    tokens = options.batches * options.window
    print(f"{options.layers} layers, {total / 1e9:.2f} GB of weights, {tokens} calibration tokens, pipeline {options.pipeline}")
    print(f"peak resident memory {done['peak'] / 1e9:.2f} GB ({done['before'] / 1e9:.2f} GB before), {done['seconds']:.0f} s")
    streams = tokens * HIDDEN * 2
    whole = done["peak"] - streams + 262_144 * HIDDEN * 2
    print(
        f"with 128 x 2048 tokens hidden states take {262_144 * HIDDEN * 2 / 1e9:.2f} GB: {whole / 1e9:.2f} GB, layers add none"
    )


if __name__ == "__main__":
    main()
