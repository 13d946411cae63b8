"""``ranvier demo``: a real language model made spiking, and what that changed."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ranvier.cli._options import positive

PROMPT = "The capital of France is"
CONTINUED = ("float32", "spiking, separate span")
RASTER = "spiking T=2, 10 %"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("demo", help="convert SmolLM2-135M and show perplexity, bytes, speed and spikes")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the model, table and plots")
    parser.add_argument("--windows", type=positive, default=6, help="evaluation windows of 512 tokens (default 6)")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue")
    return parser


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

    import ranvier
    from ranvier.integrations.folder import check_folder
    from ranvier.integrations.transformers import encode_prompt, generate, load_causal_lm, smollm2_path
    from ranvier.methods.spikellm.compare import Setting, compare, plain_settings, spiking_settings, table
    from ranvier.methods.spikellm.data import calibration_batches, topics_text, wikitext2_path
    from ranvier.methods.spikellm.plots import check_matplotlib

    started, out = time.perf_counter(), args.out
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out / "model")
    check_matplotlib()
    model, tokenizer = load_causal_lm(smollm2_path())
    encode_prompt(tokenizer, args.prompt)  # a mistake to be found now, not after the first settings
    file = wikitext2_path()
    text = file.read_text(encoding="utf-8") if file else topics_text(1)
    text_name = "WikiText-2" if file else "the second half of pydoc_data.topics"
    calibration = list(calibration_batches(tokenizer, topics_text(0)[:40000]))
    continued, kept = {}, {}

    def see(setting: Setting, variant: Any) -> None:
        if setting.name in CONTINUED:
            continued[setting.name] = generate(variant, tokenizer, args.prompt, 24)
        if setting.name == CONTINUED[-1]:
            ranvier.save(variant, out / "model", tokenizer=tokenizer)
        if setting.name == RASTER:
            kept[setting.name] = variant

    settings = [*plain_settings(), *spiking_settings()]
    rows = list(compare(model, tokenizer, settings, text, calibration, args.windows, see=see))
    # Beside their place first, so that an interrupt leaves no half of a file.
    with tempfile.TemporaryDirectory(prefix=".ranvier-demo-", dir=out) as folder:
        stage = Path(folder)
        _write_pictures(stage, rows, kept[RASTER], calibration[0], text_name)
        seconds = time.perf_counter() - started
        about = {
            "model": "SmolLM2-135M-Instruct", "text": text_name, "windows": args.windows, "window": 512,
            "threads": torch.get_num_threads(), "isa": ranvier._C.isa(), "torch": torch.__version__,
            "seconds": round(seconds, 1),
        }  # fmt: skip
        found = {"about": about, "rows": rows, "continued": {"prompt": args.prompt, **continued}}
        (stage / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        for file in stage.iterdir():
            os.replace(file, out / file.name)
    threads = f"{about['threads']} threads, {about['isa']}"
    print(f"\n{about['model']}, {args.windows} windows of 512 tokens of {text_name}; {threads}\n")
    print(table(rows))
    print(
        "\nu: spikes of the unsigned code, as the paper counts them; c: signed spikes of the centred code that is multiplied.\n"
    )
    for name, words in continued.items():
        print(f"{name}: {words!r}")
    print(f"\nwrote {out}/model, {out}/table.json, {out}/perplexity.png and {out}/raster.png; go on with")
    print(f"  ranvier generate {out}/model --prompt {args.prompt!r}")
    print(f"{seconds:.0f} s")
    return 0
