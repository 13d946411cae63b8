"""One model under several settings, side by side: perplexity, bytes, speed, spikes, operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ranvier.config import SpikeConfig
from ranvier.methods.spikellm.convert import find_linears, spike_
from ranvier.methods.spikellm.evaluate import perplexity
from ranvier.methods.spikellm.measure import generation_speed, spikes_per_token, spiking_layers


@dataclass(frozen=True)
class Setting:
    """A row: the model as it is, its parameters in ``dtype`` where one is given, or converted by ``config``."""

    name: str
    config: SpikeConfig | None = None
    note: str = ""
    dtype: torch.dtype | None = None

    @property
    def spiking(self) -> bool:
        """Whether extra steps or a range of their own set some channels apart."""
        return self.config is not None and self.config.salient_share > 0


def plain_settings() -> list[Setting]:
    """What a conversion is held against: the float model and quantization without spikes, round to nearest."""
    none = {"steps": 1, "salient": 0.0}
    return [
        Setting("float32", dtype=torch.float32),
        Setting("bfloat16", dtype=torch.bfloat16),
        Setting("W4A16", SpikeConfig(act_bits=None, **none), "4-bit weights, activations as they are"),
        Setting("W4A8", SpikeConfig(act_bits=8, **none), "one integer product, no spikes"),
        Setting("W4A4", SpikeConfig(**none), "one step on every channel"),
    ]


def spiking_settings(**fields: Any) -> list[Setting]:
    """The paper's two settings and the separate span; ``fields`` go into every config."""
    return [
        Setting("spiking T=2, 10 %", SpikeConfig(steps=2, salient=0.10, **fields), "the paper's setting"),
        Setting("spiking T=4, 5 %", SpikeConfig(steps=4, salient=0.05, **fields), "the paper's other setting"),
        Setting("spiking, separate span", SpikeConfig(span="separate", salient=0.10, **fields), "salient channels at 8 bits"),
    ]


def linear_bytes(model: nn.Module) -> int:
    """Bytes of all linear weights outside lm_head, packed or not, a mask that several share counted once."""
    linears, _ = find_linears(model, skip=("lm_head",))
    held = [layer.weight for layer in linears.values()]
    for layer in spiking_layers(model).values():
        held += [t for t in (*layer.packed_weight, layer.salient_mask) if t is not None]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())


def apply(setting: Setting, model: nn.Module, calibration: list[Any]) -> tuple[nn.Module, int]:
    """A model of its own for this setting, and the bytes of its linear weights (lm_head left out)."""
    model = copy.deepcopy(model)
    if setting.config is None:
        for parameter in model.parameters() if setting.dtype is not None else ():
            parameter.data = parameter.data.to(setting.dtype)  # buffers, such as rotary frequencies, stay as they are
        return model, linear_bytes(model)
    # Without salient channels nothing is measured; one batch shows which layers read the same tensor.
    report = spike_(model, setting.config, calibration if setting.config.needs_calibration else calibration[:1])
    return model, report.bytes_after


def measure(
    setting: Setting, model: nn.Module, stored: int, tokenizer: Any, text: str, windows: int | None, window: int = 512
) -> dict[str, Any]:
    """The row of a model that :func:`apply` gave: plain json values."""
    ids = torch.tensor([tokenizer(text[: 40 * window], verbose=False)["input_ids"][:window]])
    result = perplexity(model, tokenizer, text, window=window, max_windows=windows, progress=False)
    rate = generation_speed(model, ids, repeats=2, context=min(64, ids.shape[1] // 2))
    row = {
        "name": setting.name,
        "note": setting.note,
        "spiking": setting.spiking or any(layer.salient_count for layer in spiking_layers(model).values()),
        "perplexity": result.value,
        "windows": result.windows,
        "weight_bytes": stored,
        "prefill_tokens_per_second": rate.prefill,
        "decode_tokens_per_second": rate.decode,
    }
    return row | spikes_per_token(model, ids[:, :128])


def compare(
    model: nn.Module,
    tokenizer: Any,
    settings: Iterable[Setting],
    text: str,
    calibration: list[Any],
    windows: int | None = None,
    window: int = 512,
    see: Callable[[Setting, nn.Module], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """A row a setting, as each is done; ``see(setting, converted model)`` looks at every one. ``model`` stays as it is."""
    for setting in tqdm(list(settings), desc="settings", unit="setting"):
        variant, stored = apply(setting, model, calibration)
        row = measure(setting, variant, stored, tokenizer, text, windows, window)
        if see is not None:
            see(setting, variant)
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
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
