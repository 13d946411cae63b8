"""``ranvier demo``: a real language model made spiking, and what that changed."""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranvier.cli._options import positive

PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Setting:
    """One row of the table: how it is made from the float32 model (with the bytes of its linear weights), and what it is."""

    name: str
    make: Callable[[Any, Any], tuple[Any, int]]
    spiking: bool
    note: str = ""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("demo", help="convert SmolLM2-135M and show perplexity, bytes, speed and spikes")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the model, table and plots")
    parser.add_argument("--windows", type=positive, default=6, help="evaluation windows of 512 tokens (default 6)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    return parser


def _converted(**fields: Any) -> Callable[[Any, Any], tuple[Any, int]]:
    def make(model: Any, calibration: Any) -> tuple[Any, int]:
        import ranvier

        # Without salient channels nothing is measured; one batch shows which layers read the same tensor.
        batches = calibration if fields["salient"] else calibration[:1]
        report = ranvier.spike_(model, ranvier.SpikeConfig(**fields), batches)
        return model, report.bytes_after

    return make


def _weights_only(model: Any, calibration: Any) -> tuple[Any, int]:
    import ranvier

    model, stored = _converted(salient=0.0, steps=1)(model, calibration)
    return ranvier.unspike_(model), stored


def _float(dtype: str) -> Callable[[Any, Any], tuple[Any, int]]:
    def make(model: Any, _: Any) -> tuple[Any, int]:
        import torch

        from ranvier.methods.spikellm.convert import find_linears

        layers, _skipped = find_linears(model.to(getattr(torch, dtype)), skip=("lm_head",))
        return model, sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values())

    return make


SETTINGS = (
    Setting("float32", _float("float32"), False),
    Setting("bfloat16", _float("bfloat16"), False),
    Setting("W4A16", _weights_only, False, "4-bit weights, multiplied in float32"),
    Setting("W4A8", _converted(act_bits=8, steps=1, salient=0.0), False, "one integer product, no spikes"),
    Setting("W4A4", _converted(steps=1, salient=0.0), False, "one step on every channel"),
    Setting("spiking T=2, 10 %", _converted(steps=2, salient=0.10), True, "the paper's setting"),
    Setting("spiking T=4, 10 %", _converted(steps=4, salient=0.10), True),
    Setting("spiking, separate span", _converted(span="separate", salient=0.10), True, "salient channels at 8 bits"),
)
CONTINUED = ("float32", "spiking, separate span")


def _measure(setting: Setting, model: Any, stored: int, tokenizer: Any, text: str, windows: int) -> dict:
    from ranvier.methods.spikellm.evaluate import perplexity
    from ranvier.methods.spikellm.measure import generation_speed, spikes_per_token

    ids = tokenizer(text[:20000], return_tensors="pt").input_ids[:, :512]
    result = perplexity(model, tokenizer, text, window=512, max_windows=windows, progress=False)
    rate = generation_speed(model, ids, repeats=2)
    row = {
        "name": setting.name,
        "note": setting.note,
        "spiking": setting.spiking,
        "perplexity": result.value,
        "weight_bytes": stored,
        "prefill_tokens_per_second": rate.prefill,
        "decode_tokens_per_second": rate.decode,
    }
    return row | spikes_per_token(model, ids[:, :128])


def _table(rows: list[dict]) -> str:
    head = (
        f"{'':24} {'perplexity':>10} {'weights':>9} {'prefill':>9} {'decode':>8} {'spikes/token':>19}"
        f" {'accumulates/token':>19}\n"
        f"{'':24} {'':>10} {'MB':>9} {'tokens/s':>9} {'tokens/s':>8} {'u':>9} {'c':>9} {'u':>9} {'c':>9}"
    )
    lines = [head]
    for r in rows:
        counts = [f"{r[key] / 1e6:8.2f}M" if r[key] is not None else f"{'-':>9}" for key in ("spikes_u", "spikes_c")]
        adds = [f"{r[key] / 1e9:8.2f}G" if r[key] is not None else f"{'-':>9}" for key in ("accumulates_u", "accumulates_c")]
        lines.append(
            f"{r['name']:24} {r['perplexity']:10.2f} {r['weight_bytes'] / 1e6:9.1f} {r['prefill_tokens_per_second']:9.0f}"
            f" {r['decode_tokens_per_second']:8.1f} {' '.join(counts)} {' '.join(adds)}"
        )
    return "\n".join(lines)


def _write_pictures(out: Path, rows: list[dict], model: Any, ids: Any, text_name: str) -> None:
    from ranvier.methods.spikellm.measure import layer_raster, spiking_layers
    from ranvier.methods.spikellm.plots import perplexity_against_bytes, spike_raster

    perplexity_against_bytes(rows, out / "perplexity.png", f"SmolLM2-135M, perplexity on {text_name}")
    layers = list(spiking_layers(model).items())
    name, layer = layers[len(layers) // 2]
    counts = layer_raster(model, layer, ids[:, :24])
    spike_raster(counts, layer.salient_mask, out / "raster.png", f"spikes into {name}")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    import ranvier
    from ranvier.integrations.folder import check_folder
    from ranvier.integrations.transformers import encode_prompt, generate, load_causal_lm, smollm2_path
    from ranvier.methods.spikellm.data import calibration_batches, topics_text, wikitext2_path
    from ranvier.methods.spikellm.plots import check_matplotlib

    started, out = time.perf_counter(), args.out
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out / "model")
    check_matplotlib()
    model, tokenizer = load_causal_lm(smollm2_path())
    encode_prompt(tokenizer, args.prompt)  # a mistake to be found now, not after the first settings
    found = wikitext2_path()
    text = found.read_text(encoding="utf-8") if found else topics_text(1)
    text_name = "WikiText-2" if found else "the second half of pydoc_data.topics"
    calibration = list(calibration_batches(tokenizer, topics_text(0)[:40000]))
    rows, continued, rasters = [], {}, None
    for setting in tqdm(SETTINGS, desc="settings", unit="setting"):
        variant, stored = setting.make(copy.deepcopy(model), calibration)
        rows.append(_measure(setting, variant, stored, tokenizer, text, args.windows))
        if setting.name in CONTINUED:
            continued[setting.name] = generate(variant, tokenizer, args.prompt, 24)
        if setting.name == CONTINUED[-1]:
            ranvier.save(variant, out / "model", tokenizer=tokenizer)
        if setting.name == "spiking T=2, 10 %":
            rasters = variant
    # Beside their place first, so that an interrupt leaves no half of a file.
    with tempfile.TemporaryDirectory(prefix=".ranvier-demo-", dir=out) as folder:
        stage = Path(folder)
        _write_pictures(stage, rows, rasters, calibration[0], text_name)
        seconds = time.perf_counter() - started
        about = {
            "model": "SmolLM2-135M-Instruct", "text": text_name, "windows": args.windows, "window": 512,
            "threads": torch.get_num_threads(), "isa": ranvier._C.isa(), "torch": torch.__version__,
            "seconds": round(seconds, 1),
        }  # fmt: skip
        table = {"about": about, "rows": rows, "continued": {"prompt": args.prompt, **continued}}
        (stage / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    threads = f"{about['threads']} threads, {about['isa']}"
    print(f"\n{about['model']}, {args.windows} windows of 512 tokens of {text_name}; {threads}\n")
    print(_table(rows))
    print(
        "\nu: spikes of the unsigned code, as the paper counts them; c: signed spikes of the centred code that is multiplied.\n"
    )
    for name, words in continued.items():
        print(f"{name}: {words!r}")
    print(f"\nwrote {out}/model, {out}/table.json, {out}/perplexity.png and {out}/raster.png; go on with")
    print(f"  ranvier generate {out}/model --prompt {args.prompt!r}")
    print(f"{seconds:.0f} s")
    return 0
