"""SmolLM2-135M: tokens a second in decoding and prefill, at the level of the op, of the module and of the whole model.

Decoding is batch 1 with a cache, 512-token prefill gives all logits or the last one's only. The model is transformers',
lm_head stays a float layer. op: the functional call of all 210 linear layers once; module: the layers' own calls, which
share an encoding where they read one tensor; model: everything; part: where a model's time goes. "fused": after
ranvier.fuse_, with ranvier's attention of prompts. "lm_head bfloat16": float32 residual stream, lm_head alone in bfloat16;
torch's counterpart has every linear layer in bfloat16 under a float32 residual stream. "lm_head 8 bits": what
SpikeConfig(head_bits=8) makes of it. Next to them llama.cpp with the same GGUF file.

    python benchmarks/smollm2.py --quick
    python benchmarks/smollm2.py --csv smollm2.csv --plot smollm2.png --check
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from _claims import print_claims, smollm2_claims
from _harness import Bench, Candidate, Measured, arguments, check_values, quantile, some_outputs
from _parts import seconds_by_part
from _plots import plot_model
from _report import print_table, was_quiet, write
from peers.base import BFLOAT16, FLOAT32
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.integrations import flash_attention
from ranvier.integrations.transformers import load_causal_lm, smollm2_path
from ranvier.methods.spikellm.data import calibration_batches, topics_text
from ranvier.nn import Int8Linear, SpikingLinear
from ranvier.ops.spike_linear import spike_linear_dynamic

CONTEXT, NEW, PREFILL = 64, 32, 512
LLAMA_CPP = "llama.cpp Q4_1 (its lm_head is quantized)"
Linears = list[tuple[str, nn.Module]]


def linears(model: nn.Module) -> Linears:
    """The linear layers of the decoder blocks, in the order they run."""
    kinds = (nn.Linear, SpikingLinear)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and "lm_head" not in name]


def check_layers(name: str, model: nn.Module, ids: Tensor) -> None:
    """Every spiking layer on its own input of a real forward, against its float64 product."""
    dtype = next(model.parameters()).dtype
    tolerance = BFLOAT16 if dtype == torch.bfloat16 else FLOAT32

    def check(layer: SpikingLinear, args: tuple, y: Tensor) -> None:
        outputs = some_outputs(layer.out_features)
        weight = layer.dequantized_weight()[outputs].double()
        x = layer.dequantized_input(args[0].float()).double()
        bias = 0.0 if layer.bias is None else layer.bias[outputs].double()
        check_values(name, y[..., outputs], x @ weight.T + bias, x.abs() @ weight.abs().T, tolerance)

    layers = [layer for _, layer in linears(model) if isinstance(layer, SpikingLinear)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    model(ids)
    for hook in hooks:
        hook.remove()
    if not layers:
        raise ValueError(f"{name}: the model has no spiking layer")


class BFloat16Linear(nn.Module):
    """A linear layer in bfloat16 between float32 neighbours."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = copy.deepcopy(linear).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.bfloat16()).float()


def with_bfloat16(model: nn.Module, every: bool) -> nn.Module:
    """A copy whose lm_head, or every linear layer, is in bfloat16; all else stays float32."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and (every or name == "lm_head"):
            model.set_submodule(name, BFloat16Linear(module))
    return model


def with_8_bits(model: nn.Module) -> nn.Module:
    """A copy whose lm_head is what ``SpikeConfig(head_bits=8)`` makes of it."""
    model = copy.deepcopy(model)
    model.lm_head = Int8Linear.from_linear(model.lm_head)
    return model


def fused(model: nn.Module) -> nn.Module:
    """A copy after fuse_, with the attention of integrations/flash_attention.py."""
    model = copy.deepcopy(model)
    ranvier.fuse_(model)
    flash_attention.register()
    model.set_attn_implementation(flash_attention.NAME)
    return model


def more_models(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What only the model level is measured with."""
    mixed = with_bfloat16(models["ranvier float32"], every=False)
    return {
        "ranvier fused float32": fused(models["ranvier float32"]),
        "ranvier fused bfloat16": fused(models["ranvier bfloat16"]),
        "ranvier float32, lm_head bfloat16": mixed,
        "ranvier fused float32, lm_head bfloat16": fused(mixed),
        "ranvier fused float32, lm_head 8 bits": fused(with_8_bits(models["ranvier float32"])),
        "torch float32, linears bfloat16": with_bfloat16(models["torch float32"], every=True),
    }


def load_models(quick: bool) -> tuple[dict[str, nn.Module], Tensor]:
    """The same model in float32 and bfloat16, spiking (and checked) and not; and the tokens it is timed on."""
    plain, tokenizer = load_causal_lm(smollm2_path())
    spiking = copy.deepcopy(plain)
    ranvier.spike_(spiking, SpikeConfig(), calibration_batches(tokenizer, topics_text(0), 512 if quick else 2048))
    models = {
        "ranvier float32": spiking,
        "torch float32": plain,
        "ranvier bfloat16": copy.deepcopy(spiking).bfloat16(),
        "torch bfloat16": copy.deepcopy(plain).bfloat16(),
    }
    ids = next(iter(calibration_batches(tokenizer, topics_text(1), PREFILL, PREFILL)))
    for name in ("ranvier float32", "ranvier bfloat16"):
        check_layers(name, models[name], ids[:, :CONTEXT])
    return models, ids


# Model level


def decode(model: nn.Module, ids: Tensor, new: int) -> Callable[[int], None]:
    """`new` steps of one token each after the first CONTEXT tokens; then the cache is cut back."""
    cache = model(ids[:, :CONTEXT], use_cache=True).past_key_values

    def run(_: int) -> None:
        for t in range(CONTEXT, CONTEXT + new):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits.argmax()
        cache.crop(-new)

    return run


def prefill(model: nn.Module, ids: Tensor, kept: int) -> Callable[[int], None]:
    return lambda _: model(ids, use_cache=True, logits_to_keep=kept)


class LlamaCpp:
    """The same file in llama.cpp, on as many threads."""

    def __init__(self, ids: Tensor) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._ids = ids[0].tolist()
        self._model = Llama(str(smollm2_path()), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(self, new: int) -> Callable[[int], None]:
        self._model.reset()
        self._model.eval(self._ids[:CONTEXT])

        def run(_: int) -> None:
            self._model.n_tokens = CONTEXT
            for t in range(CONTEXT, CONTEXT + new):
                self._model.eval(self._ids[t : t + 1])

        return run

    def prefill(self) -> Callable[[int], None]:
        def run(_: int) -> None:
            self._model.reset()
            self._model.eval(self._ids)

        return run


# Op and module level


def by_input(layers: Linears) -> Iterator[list[nn.Module]]:
    """Layers that read one tensor: q, k and v; gate and up; o; down."""
    inputs = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}

    def read_by(item: tuple[str, nn.Module]) -> str:
        last = item[0].rpartition(".")[2]
        return inputs.get(last, last)

    for _, group in groupby(layers, read_by):
        yield [layer for _, layer in group]


def all_modules(model: nn.Module, x: dict[int, Tensor]) -> Callable[[int], None]:
    """Every layer's call; a new tensor for every group, as in the model."""
    groups = list(by_input(linears(model)))

    def run(_: int) -> None:
        for layers in groups:
            given = x[layers[0].in_features].detach()
            for layer in layers:
                layer(given)

    return run


def all_ops(model: nn.Module, x: dict[int, Tensor]) -> Callable[[int], None]:
    """The functional call of every layer, each with an encoding of its own."""
    calls = []
    for _, layer in linears(model):
        if isinstance(layer, SpikingLinear):
            mask = layer.salient_mask if layer.salient_count else None
            arguments_ = (layer.packed_weight, layer.format, layer.out_features, layer.bias, mask)
            calls.append((spike_linear_dynamic, x[layer.in_features], arguments_))
        else:
            calls.append((nn.functional.linear, x[layer.in_features], (layer.weight, layer.bias)))

    def run(_: int) -> None:
        for function, given, rest in calls:
            function(given, *rest)

    return run


def inputs_for(model: nn.Module, m: int) -> dict[int, Tensor]:
    dtype = next(model.parameters()).dtype
    sizes = sorted({layer.in_features for _, layer in linears(model)})
    return {k: torch.randn(1, m, k, generator=torch.Generator().manual_seed(k)).to(dtype) for k in sizes}


# The run


def tokens_a_second(results: list[Measured], rows: list[dict], metric: str, tokens: int) -> list[dict]:
    for result, row in zip(results, rows, strict=True):
        rates = [tokens / t for t in result.seconds]
        row.update(metric=metric, value=tokens / result.median, unit="tokens/s")
        row.update(p20=quantile(rates, 0.2), p80=quantile(rates, 0.8), ms_per_call=1e3 * result.median)
    return rows


@dataclass
class Job:
    """What is timed for every provider in the same rounds; a call handles `tokens` tokens, M at a time."""

    level: str
    metric: str
    m: int
    tokens: int
    calls: dict[str, Callable[[int], None]]

    def candidates(self) -> list[Candidate]:
        labels = {"op": "smollm2", "level": self.level, "N": None, "K": None, "M": self.m}
        dtypes = {name: "float32" if "float32" in name else "bfloat16" for name in self.calls}
        return [Candidate(name, call, labels={**labels, "dtype": dtypes[name]}) for name, call in self.calls.items()]


def jobs(models: dict[str, nn.Module], llama: LlamaCpp | None, ids: Tensor, new: int) -> Iterator[Job]:
    """Each level and phase. One at a time: llama.cpp has one cache for all of them."""

    def of_each(make: Callable[[nn.Module], Callable]) -> dict[str, Callable]:
        return {name: make(model) for name, model in models.items()}

    for m, metric in ((1, "decode"), (PREFILL, "prefill")):
        yield Job("op", metric, m, m, of_each(lambda model, m=m: all_ops(model, inputs_for(model, m))))
        yield Job("module", metric, m, m, of_each(lambda model, m=m: all_modules(model, inputs_for(model, m))))
    models = {**models, **more_models(models)}
    peer = {} if llama is None else {LLAMA_CPP: llama.decode(new)}
    yield Job("model", "decode", 1, new, of_each(lambda model: decode(model, ids, new)) | peer)
    yield Job("model", "prefill", PREFILL, PREFILL, of_each(lambda model: prefill(model, ids, 0)))
    peer = {} if llama is None else {LLAMA_CPP: llama.prefill()}
    yield Job("model", "prefill, last logits", PREFILL, PREFILL, of_each(lambda model: prefill(model, ids, 1)) | peer)


def compare(models: dict[str, nn.Module], bench: Bench, llama: LlamaCpp | None, ids: Tensor) -> list[dict]:
    """The rows of every job; decode has M = 1, prefill M = PREFILL."""
    rows = []
    for job in jobs(models, llama, ids, 8 if bench.quick else NEW):
        results, measured = bench.compare(job.candidates())
        rows += tokens_a_second(results, measured, job.metric, job.tokens)
        speeds = ", ".join(f"{r['provider']} {r['value']:.0f}" for r in measured)
        print(f"{job.level} {job.metric}: {speeds} tokens/s", file=sys.stderr)
    return rows


def parts(models: dict[str, nn.Module], bench: Bench, ids: Tensor) -> list[dict]:
    """Milliseconds by part: of a token in decoding, of a prefill."""
    rows, new = [], 8
    for name, model in {**models, **more_models(models)}.items():
        for metric, run, m, calls in (
            ("decode", decode(model, ids, new), 1, new),
            ("prefill", prefill(model, ids, 0), PREFILL, 1),
        ):
            seconds = seconds_by_part(model, run)
            labels = {"op": "smollm2", "level": "part", "provider": name, "M": m, **vars(bench.run)}
            for part, spent in seconds.items():
                rows.append({**labels, "metric": f"{metric}: {part}", "value": 1e3 * spent / calls, "unit": "ms"})
            line = ", ".join(f"{part} {1e3 * spent / calls:.2f}" for part, spent in seconds.items())
            print(f"part {metric} {name}: {line} ms", file=sys.stderr)
    return rows


def main() -> None:
    options = arguments(__doc__, claims=True).parse_args()
    bench = Bench.begin(options)
    with torch.no_grad():
        models, ids = load_models(bench.quick)
        llama, absent = None, []
        if importlib.util.find_spec("llama_cpp") is not None:
            llama = LlamaCpp(ids)
        else:
            note = "not installed: pip install llama-cpp-python (builds for some ten minutes; make bench-peers)"
            absent = [{"op": "smollm2", "provider": LLAMA_CPP, "metric": "absent", "note": note, **vars(bench.run)}]
        rows = absent + compare(models, bench, llama, ids) + parts(models, bench, ids)
    print_table(rows)
    write(rows, options, plot_model)
    if options.check:
        print_claims(smollm2_claims(rows), was_quiet(rows))


if __name__ == "__main__":
    main()
