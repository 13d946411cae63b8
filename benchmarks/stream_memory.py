"""Memory of convert_folder on a Llama-2-7B-shaped model of a few layers: ``python benchmarks/stream_memory.py --csv FILE``.

Builds the model on disk (random weights in bfloat16, one tensor in memory at a time), converts it in a process of its own
and says what that process held at most in each phase, by the kernel's high-water mark of resident memory (Linux). One batch
of 2048 random tokens is what a conversion holds of activations whatever its number of batches; hidden states and position
embeddings of the other batches are added by their sizes. A run that was stopped goes on in the same ``--folder``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
from _harness import Run, _relative
from safetensors.torch import save_file

HIDDEN, MIDDLE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
WHOLE_LAYERS, WHOLE_TOKENS = 32, 128 * 2048
# The innermost of these functions on the stack names the phase.
PHASES = {
    "_key": "reading: hashes", "_fill": "reading: weights", "capture": "embedding", "run": "block: forward",
    "_observe": "block: statistics", "fit": "gptq: grid", "inverse_factor": "gptq: factor", "gptq": "gptq: columns",
    "from_linear": "block: packing", "from_quantized": "block: packing", "weight_error": "block: weight error",
    "add": "writing: block", "assemble": "end: assembling", "save": "end: saving",
}  # fmt: skip
COLUMNS = (
    "pipeline", "layers", "model_bytes", "packed_bytes", "batches", "window", "phase", "peak_bytes", "anonymous_bytes",
    "seconds", "threads", "isa", "cpu", "commit", "dirty", "torch", "ranvier", "python", "date", "mode", "command",
)  # fmt: skip


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


class Watch:
    """Peak resident bytes, those of them that no file backs, and seconds of each phase of the main thread.

    The high-water mark is begun anew at each look, so that a peak between two of them is not missed. What was seen is
    written to ``path`` every second and taken up from there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stop = path, threading.Event()
        self.seen: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        self._main, self._thread = threading.main_thread().ident, threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _phase(self) -> str:
        frame: FrameType | None = sys._current_frames().get(self._main)
        while frame is not None:
            code = frame.f_code
            if code.co_name in PHASES and f"{os.sep}ranvier{os.sep}" in code.co_filename:
                return PHASES[code.co_name]
            frame = frame.f_back
        return "other"

    def _watch(self) -> None:
        last = written = time.perf_counter()
        while not self._stop.wait(0.01):
            phase, (peak, anonymous) = self._phase(), memory()
            now = time.perf_counter()
            before = self.seen.get(phase, (0, 0, 0.0))
            self.seen[phase] = [max(before[0], peak), max(before[1], anonymous), before[2] + now - last]
            last = now
            if now - written > 1:
                self._write()
                written = now

    def _write(self) -> None:
        stage = self.path.with_suffix(".new")
        stage.write_text(json.dumps(self.seen))
        os.replace(stage, self.path)


def memory() -> tuple[int, int]:
    """(most resident bytes since the last call, resident bytes now that no file backs)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return tuple(int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))


def convert(folder: Path, pipeline: str, batches: int, window: int) -> None:
    """Run in a process of its own; its phases go to PIPELINE.json in the folder, with the run and the packed bytes."""
    from ranvier import SpikeConfig
    from ranvier.integrations.stream import convert_folder
    from ranvier.integrations.transformers import import_transformers

    import_transformers()
    start = folder / f"{pipeline}.start.json"
    if not start.is_file():
        start.write_text(json.dumps(asdict(Run.start("full"))))
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (1, window), generator=generator) for _ in range(batches)]
    with Watch(folder / f"{pipeline}.phases.json") as watch:
        watch.seen.setdefault("imports", [*memory(), 0.0])
        report = convert_folder(folder / "source", folder / pipeline, SpikeConfig(pipeline=pipeline), ids)
    done = {"run": json.loads(start.read_text()), "packed": report.bytes_after, "phases": watch.seen}
    (folder / f"{pipeline}.json").write_text(json.dumps(done))


def rows_of(done: dict, shared: dict) -> list[dict]:
    """A row a phase, and the whole run."""
    phases = done["phases"]
    whole = [max(values[0] for values in phases.values()), max(values[1] for values in phases.values())]
    found = {**phases, "whole": [*whole, sum(values[2] for values in phases.values())]}
    return [
        {**shared, "packed_bytes": done["packed"], "phase": phase, "peak_bytes": int(values[0]),
         "anonymous_bytes": int(values[1]), "seconds": f"{values[2]:.1f}"}
        for phase, values in found.items()
    ]  # fmt: skip


def at_full_size(rows: list[dict], batches: int, window: int) -> str:
    """What the run says of 32 layers and 128 x 2048 tokens."""
    peak = next(row["peak_bytes"] for row in rows if row["phase"] == "whole")
    more = WHOLE_TOKENS - batches * window
    hidden, positions = 2 * HIDDEN * more, 2 * 2 * (HIDDEN // HEADS) * more
    total = (peak + hidden + positions) / 1e9
    return f"+ {hidden / 1e9:.2f} GB hidden states + {positions / 1e9:.2f} GB position embeddings = {total:.2f} GB"


def measure(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Build the model unless it is there, and convert it with each pipeline that is not done."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "source" / f"{options.layers}-layers"
    if not marker.is_file():
        (folder / "source").mkdir(exist_ok=True)
        marker.write_text(str(build(folder / "source", options.layers)))
    total, rows = int(marker.read_text()), []
    line = " ".join(["python", *map(_relative, sys.argv)])
    same = [f"--{key}={getattr(options, key)}" for key in ("batches", "window")]
    for pipeline in options.pipelines:
        result = folder / f"{pipeline}.json"
        if not result.is_file():
            command = [sys.executable, __file__, *same, "--folder", str(folder), "--run", pipeline]
            subprocess.run(command, check=True)
        done = json.loads(result.read_text())
        shared = {"pipeline": pipeline, "layers": options.layers, "model_bytes": total}
        shared |= {"batches": options.batches, "window": options.window, **done["run"], "command": line}
        found = rows_of(done, shared)
        rows += found
        print(f"{pipeline}: {options.layers} layers, {total / 1e9:.2f} GB, {options.batches} x {options.window} tokens")
        for row in found:
            size = f"{row['peak_bytes'] / 1e9:6.2f} GB, {row['anonymous_bytes'] / 1e9:6.2f} without files"
            print(f"  {row['phase']:22} {size} {row['seconds']:>8} s")
        print(f"  128 x 2048 tokens: {at_full_size(found, options.batches, options.window)}; layers add none")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="rows of the same pipelines are replaced")
    parser.add_argument("--folder", type=Path, help="where model and work go, and stay; else a temporary folder")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--pipelines", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        convert(options.folder, options.run, options.batches, options.window)
        return
    if options.folder:
        rows = measure(options.folder, options)
    else:
        with tempfile.TemporaryDirectory() as name:
            rows = measure(Path(name), options)
    if options.csv:
        write(options.csv, rows)


def write(path: Path, rows: list[dict]) -> None:
    """Put rows in a CSV, in the place of those of the same pipelines."""
    kept, measured = [], {row["pipeline"] for row in rows}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["pipeline"] not in measured]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
