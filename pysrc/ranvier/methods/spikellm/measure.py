"""How fast a causal language model reads and writes, and what its spiking layers fire."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor, nn

from ranvier.methods.spikellm.evaluate import evaluating
from ranvier.nn.spike_linear import SpikingLinear
from ranvier.ops.spike_events import spike_events, spike_raster

COUNTS = ("spikes_u", "spikes_c", "accumulates_u", "accumulates_c", "zero_fraction_u", "zero_fraction_c", "macs", "ace")


class GenerationSpeed(NamedTuple):
    """Tokens a second: prefill of the whole prompt with all its logits, decode token by token."""

    prefill: float
    decode: float


def generation_speed(
    model: nn.Module, ids: Tensor, new_tokens: int = 24, context: int = 64, repeats: int = 3
) -> GenerationSpeed:
    """Medians over ``repeats`` prefills of ids [1, L] and over ``new_tokens`` greedy steps after ``context`` tokens.

    model(ids, use_cache=True) returns logits and past_key_values, which it takes again, as transformers' models do.
    """
    prefill, decode = [], []
    with evaluating(model):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(ids, use_cache=False)
            prefill.append(time.perf_counter() - start)
        state = model(ids[:, :context], use_cache=True)
        for _ in range(new_tokens + 1):
            start = time.perf_counter()
            token = state.logits[:, -1:].argmax(-1)
            state = model(token, past_key_values=state.past_key_values, use_cache=True)
            decode.append(time.perf_counter() - start)
    return GenerationSpeed(ids.shape[1] / median(prefill[1:]), 1.0 / median(decode[1:]))


def spiking_layers(model: nn.Module) -> dict[str, SpikingLinear]:
    """The spiking layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}


@contextmanager
def watching(layers: list[SpikingLinear], see: Callable[[SpikingLinear, Tensor], Any]) -> Iterator[None]:
    """Calls ``see(layer, x)`` before each forward of a layer."""

    def hook(module: SpikingLinear, args: tuple, kwargs: dict) -> None:
        see(module, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spikes_per_token(model: nn.Module, ids: Tensor) -> dict[str, float | None]:
    """Spikes, accumulates, multiply-accumulates and ACE a token of all spiking layers, reading ids [1, L] once.

    A spike is one unit of a code: of the unsigned u, as the paper counts them, or of the centred, signed c. Layers that
    share an encoding share its spikes and add up their own accumulates. A layer that sees some of the tokens only, such
    as an expert, counts for those. Zero fractions are means over codes. Weight-only layers fire nothing and are left out;
    all None where no layer is spiking.

    Raises ValueError where no spiking layer is reached.
    """
    layers = [layer for layer in spiking_layers(model).values() if layer.config.act_bits is not None]
    if not layers:
        return dict.fromkeys(COUNTS)
    totals, silent, codes = dict.fromkeys(COUNTS, 0.0), {"u": 0.0, "c": 0.0}, 0.0
    encoded = {id(layer.group or layer): layer for layer in reversed(layers)}

    def see(layer: SpikingLinear, x: Tensor) -> None:
        nonlocal codes
        count, share = spike_events(layer, x, "unary", execute=False).per_token(), x.shape[:-1].numel() / ids.numel()
        for name in ("accumulates_u", "accumulates_c", "macs", "ace"):
            totals[name] += share * count[name]
        if encoded[id(layer.group or layer)] is layer:
            codes += share * count["codes"]
            for code in silent:
                totals[f"spikes_{code}"] += share * count[f"spikes_{code}"]
                silent[code] += share * count[f"silent_{code}"]

    with evaluating(model), watching(layers, see):
        model(ids)
    if codes == 0:
        raise ValueError("spikes_per_token: these tokens reach no spiking layer; pass tokens that do")
    return totals | {f"zero_fraction_{code}": silent[code] / codes for code in silent}


def layer_raster(model: nn.Module, layer: SpikingLinear, ids: Tensor) -> Tensor:
    """The spikes that reach one layer while the model reads ids [1, L]: int32 [L, steps, K], levels of each time step."""
    seen: list[Tensor] = []
    with (
        evaluating(model),
        watching([layer], lambda module, x: seen.append(spike_raster(module, x.reshape(-1, x.shape[-1])))),
    ):
        model(ids)
    return seen[0]
