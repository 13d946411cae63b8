"""spike_ and unspike_: what becomes of a model, layer by layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from spiking import DTYPES, ROUNDING, epilogue_bound, generator, same
from tiny_lm import logits, spiking_llama, tiny_llama, token_batch
from torch import Tensor, nn

import ranvier
from ranvier import SpikeConfig
from ranvier.methods.spikellm import LayerReport, SpikeReport, salient_mask
from ranvier.nn import SpikingLinear
from ranvier.ops import spike_encode

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def batches() -> list[Tensor]:
    return [token_batch(32, seed=1), token_batch(7, seed=2), token_batch(19, seed=3)]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def layers(model: nn.Module) -> dict[str, SpikingLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikingLinear)}


def inputs_of(model: nn.Module, modules: dict[str, nn.Module], calls: list) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(input, output) of every module in every call."""
    seen: dict[str, list] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, x, y, name=name: seen[name].append((x[0].clone(), y.clone())))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for ids in calls:
            model(ids)
    for hook in hooks:
        hook.remove()
    return seen


class Plain(nn.Module):
    """Not of transformers: one Linear under two names, a subclass of Linear, one without bias, nested containers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = self.again = nn.Linear(16, 16)
        self.rest = nn.Sequential(nn.Linear(16, 24, bias=False), nn.GELU(), nn.ModuleDict({"proj": nn.Linear(24, 8)})["proj"])
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.again(self.first(x).relu())
        return self.rest(x + self.attention(x, x, x)[0]) * scale


def rows(count: int = 20, seed: int = 4) -> Tensor:
    return torch.randn(count, 16, generator=generator(seed))


# --- what is replaced -------------------------------------------------------------------------------------------------


def test_every_linear_that_is_not_skipped_is_replaced() -> None:
    """In place, in the model's order, with sizes and configuration; every other module stays the same object."""
    model = tiny_llama()
    before, names = dict(model.named_modules()), list(linears(model))
    config = SpikeConfig(steps=4, group_size=32)
    report = ranvier.spike_(model, config, batches())
    after = layers(model)
    assert [layer.name for layer in report.layers] == list(after) == [name for name in names if name != "lm_head"]
    assert report.skipped == ["lm_head"] and len(after) == 14
    for name, layer in after.items():
        assert (layer.in_features, layer.out_features) == (before[name].in_features, before[name].out_features)
        assert layer.config == config and not layer.training
    for name, module in model.named_modules():
        assert name in after or module is before[name]


def test_plain_modules() -> None:
    """A shared Linear is replaced at both places by one layer; a subclass of Linear stays."""
    model = Plain()
    out = model.attention.out_proj
    report = ranvier.spike_(model, SpikeConfig(salient=0.25), [rows()])
    assert [layer.name for layer in report.layers] == ["first", "rest.0", "rest.2"]
    assert model.first is model.again and isinstance(model.first, SpikingLinear)
    assert model.attention.out_proj is out and type(out) is not nn.Linear
    assert report.calibration_tokens == 40  # the shared layer reads the 20 rows twice
    with torch.no_grad():
        assert model(rows()).shape == (20, 8)
    back = ranvier.unspike_(model)
    assert back is model and model.first is model.again and type(model.first) is nn.Linear


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("proj", "head", "q", "model.layers"), []),
        (("q_proj",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (("1", "mlp", "lm_head"), None),
        ((), []),
    ],
    ids=["parts-of-names", "one-name", "containers", "nothing"],
)
def test_skip_is_a_whole_component(skip: tuple[str, ...], left: list[str] | None) -> None:
    """A name in skip leaves out what has it as a component of its dotted path, and nothing else."""
    model = tiny_llama()
    if left is None:
        left = [name for name in linears(model) if ".1." in name or ".mlp." in name or name == "lm_head"]
    report = ranvier.spike_(model, SpikeConfig(skip=skip, salient=0))
    assert list(linears(model)) == report.skipped == left
    assert len(report.layers) + len(left) == 15


def test_tied_head_stays_tied() -> None:
    """The head is skipped by default and still is the embedding's weight; converted on demand, the embedding stays."""
    model = spiking_llama()
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    weight = model.model.embed_tokens.weight
    before = weight.detach().clone()
    everything = spiking_llama(skip=())
    assert isinstance(everything.lm_head, SpikingLinear)
    assert same(everything.model.embed_tokens.weight.detach(), before)


def test_modes_and_gradient_flags_are_kept() -> None:
    """Training flags of every module and requires_grad of every bias are those of the float model."""
    model = tiny_llama().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.train(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "norm" in name)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for change in (lambda: ranvier.spike_(model, calibration=batches()), lambda: ranvier.unspike_(model)):
        change()
        assert {name: module.training for name, module in model.named_modules()} == modes
        biases = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name}
        assert biases == {name: flags[name] for name in biases} and len(biases) == 8 + 5


def test_layers_whose_weight_their_owner_reads_are_left_alone() -> None:
    """nn.TransformerEncoderLayer's fast path reads its linear layers' weights: they are skipped and it goes on working."""
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    report = ranvier.spike_(model, SpikeConfig(salient=0))
    assert [a.name for a in report.layers] == ["0"] and {"1.linear1", "1.linear2"} <= set(report.skipped)
    with torch.no_grad():
        assert bool(model(torch.randn(2, 3, 16)).isfinite().all())


# --- masks and groups -------------------------------------------------------------------------------------------------


def test_layers_that_read_one_tensor_share_mask_and_encoding(encodings: list[int]) -> None:
    """q, k, v and gate, up have one mask object and one group; a forward in eager mode encodes once for each."""
    model = tiny_llama()
    report = ranvier.spike_(model, SpikeConfig(salient=0.25), batches())
    for block in model.model.layers:
        for parent, names in ((block.self_attn, QKV), (block.mlp, GATE_UP)):
            members = [parent.get_submodule(name) for name in names]
            assert len({id(layer.group) for layer in members}) == 1 and members[0].group is not None
            assert len({id(layer.salient_mask) for layer in members}) == 1
        assert block.self_attn.o_proj.group is None and block.mlp.down_proj.group is None
    prefix = "model.layers.1."
    groups = {layer.name: layer.group for layer in report.layers}
    assert groups[prefix + "self_attn.k_proj"] == tuple(f"{prefix}self_attn.{name}" for name in QKV)
    assert groups[prefix + "mlp.down_proj"] == (prefix + "mlp.down_proj",)
    logits(model)
    assert len(encodings) == 2 * 2


def test_masks_are_those_of_the_calibration_inputs() -> None:
    """Every mask marks the largest mean scores, computed by hand from what the float model's layers read."""
    model = tiny_llama()
    seen = inputs_of(model, linears(model), batches())
    weights = {name: layer.weight.detach().double() for name, layer in linears(model).items()}
    ranvier.spike_(model, SpikeConfig(salient=0.25), batches())
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for prefix, names in ((attention, QKV), (attention, ("o_proj",)), (mlp, GATE_UP), (mlp, ("down_proj",))):
            x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in seen[prefix + names[0]]]).double()
            stacked = torch.cat([weights[prefix + name] for name in names])
            scores = (x * (x @ stacked.T @ stacked)).mean(0)
            expected = salient_mask(scores, 0.25)
            ordered = scores.sort(descending=True).values
            count = int(expected.sum())
            # Far more than float32 rounding separates the last salient channel from the first other one.
            assert ordered[count - 1] - ordered[count] > 1e-4 * ordered[0]
            assert torch.equal(model.get_submodule(prefix + names[-1]).salient_mask, expected)


def test_fused_layer_is_its_parts() -> None:
    """q, k and v stacked into one layer with their mask give the bits of the three.  # spec spikellm O22"""
    for config in (SpikeConfig(salient=0.25), SpikeConfig(salient=0.25, span="separate", group_size=32)):
        model, source = tiny_llama(), tiny_llama()
        ranvier.spike_(model, config, batches())
        parts = [model.model.layers[1].self_attn.get_submodule(name) for name in QKV]
        floats = [source.model.layers[1].self_attn.get_submodule(name) for name in QKV]
        fused = nn.Linear(64, sum(layer.out_features for layer in floats))
        fused.weight.data = torch.cat([layer.weight.data for layer in floats])
        fused.bias.data = torch.cat([layer.bias.data for layer in floats])
        fused = SpikingLinear.from_linear(fused, config, parts[0].salient_mask)
        x = torch.randn(13, 64, generator=generator())
        with torch.no_grad():
            assert same(fused(x), torch.cat([layer(x) for layer in parts], -1))


# --- what it computes -------------------------------------------------------------------------------------------------


def assert_dequantized(layer: SpikingLinear, x: Tensor, y: Tensor) -> None:
    """y = x^ W^T + b: within the epilogue's bound, the rounding of x^ and W^ themselves and that of y's type."""
    decoded, weight, form = layer.dequantized_input(x).double(), layer.dequantized_weight().double(), layer.format
    bias = None if layer.bias is None else layer.bias.detach()
    truth = decoded @ weight.T + (0 if bias is None else bias.double())
    encoded = spike_encode(x, layer.salient_mask, **form.rule, group_size=layer.config.group_size, backend="reference")
    bound = epilogue_bound(encoded, layer.packed_weight, form, layer.out_features, bias)
    bound = bound + 4 * 2.0**-24 * (decoded.abs() @ weight.abs().T)
    bound = bound + (truth.abs() + bound) * ROUNDING[y.dtype] + (2.0**-25 if y.dtype == torch.float16 else 0)
    assert ((y.double() - truth).abs() <= bound).all()


@dtypes
@pytest.mark.parametrize(
    "config",
    [SpikeConfig(), SpikeConfig(span="separate", salient=0.3, group_size=32), SpikeConfig(grid="compat", steps=4)],
    ids=["shared", "separate", "compat"],
)
def test_every_layer_computes_the_dequantized_product(config: SpikeConfig, dtype: torch.dtype) -> None:
    """On the inputs that each layer of a running model really gets, in every float type."""
    model = tiny_llama(dtype=dtype)
    ranvier.spike_(model, config, batches())
    found = layers(model)
    for name, calls in inputs_of(model, found, [token_batch(12)]).items():
        assert len(calls) == 1 and calls[0][0].dtype == calls[0][1].dtype == dtype, name
        assert_dequantized(found[name], *calls[0])


@dtypes
def test_types_are_kept(dtype: torch.dtype) -> None:
    """A half-width model keeps its biases' type and gives logits in it; undone, its weights have it again."""
    model = tiny_llama(dtype=dtype)
    ranvier.spike_(model, calibration=batches())
    assert all(layer.bias is None or layer.bias.dtype == layer.dtype == dtype for layer in layers(model).values())
    assert logits(model).dtype == dtype and bool(logits(model).isfinite().all())
    ranvier.unspike_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("salient", [0, 1])
@pytest.mark.parametrize("calibration", [None, "batches"])
def test_none_and_all_need_no_calibration(salient: int, calibration: str | None, encodings: list[int]) -> None:
    """With salient 0 and 1 the masks are empty and full; batches are optional and then only show the groups."""
    model = tiny_llama()
    report = ranvier.spike_(model, SpikeConfig(salient=salient), batches() if calibration else None)
    assert report.calibration_tokens == (58 if calibration else 0)
    for layer in layers(model).values():
        assert bool((layer.salient_mask == bool(salient)).all()) and layer.salient_count == salient * layer.in_features
    other = tiny_llama()
    ranvier.spike_(other, SpikeConfig(salient=salient), None if calibration else batches())
    encodings.clear()
    assert same(logits(model), logits(other))
    assert len(encodings) == 4  # one of the two has groups


@pytest.mark.parametrize("form", ["generator", "dicts", "BatchEncoding", "tuple"])
def test_calibration_comes_in_many_forms(form: str) -> None:
    """Ids in any iterable and keyword dicts, with values that are no tensors too, give one result."""
    from transformers import BatchEncoding

    given = {
        "generator": lambda: (batch for batch in batches()),
        "dicts": lambda: [{"input_ids": b, "attention_mask": torch.ones_like(b), "use_cache": False} for b in batches()],
        "BatchEncoding": lambda: [BatchEncoding({"input_ids": batch}) for batch in batches()],
        "tuple": lambda: tuple(batches()),
    }[form]()
    model, wanted = tiny_llama(), tiny_llama()
    report = ranvier.spike_(model, calibration=given)
    ranvier.spike_(wanted, calibration=batches())
    assert report.calibration_tokens == 58
    assert all(same(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())


def test_conversions_are_deterministic_and_independent() -> None:
    """Two conversions give identical states; the second model shares no memory with the first."""
    model, twin = tiny_llama(), tiny_llama()
    for each in (model, twin):
        ranvier.spike_(each, SpikeConfig(salient=0.25), batches())
    one, other = model.state_dict(), twin.state_dict()
    assert one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    assert not {t.data_ptr() for t in one.values()} & {t.data_ptr() for t in other.values()}


def test_masks_survive_save_and_load(tmp_path) -> None:
    """ranvier.save and ranvier.load keep every mask, and with them every tensor and the output.  # spec spikellm O21"""
    model = spiking_llama(salient=0.25, span="separate")
    ranvier.save(model, tmp_path / "model")
    loaded = ranvier.load(tmp_path / "model")
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(same(before[name], after[name]) for name in before)
    masks = [name for name in after if name.endswith("salient_mask")]
    assert len(masks) == 14 and all(after[name].any() for name in masks)
    assert same(logits(loaded), logits(model))


# --- the report -------------------------------------------------------------------------------------------------------


def quantized_by_row(weight: np.ndarray) -> np.ndarray:
    """Round to nearest on each row's 16 levels that include zero, in float64."""
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(weight / scale) + zero, 0, 15) - zero)


def test_report_is_what_happened() -> None:
    """Sizes, salient channels, bytes and weight errors are those of an independent count."""
    model = tiny_llama()
    source = {name: layer.weight.detach().double().numpy() for name, layer in linears(model).items()}
    report = ranvier.spike_(model, SpikeConfig(salient=0.1), batches())
    assert report.calibration_tokens == 32 + 7 + 19
    for a in report.layers:
        weight, layer = source[a.name], model.get_submodule(a.name)
        assert (a.out_features, a.in_features) == weight.shape
        assert a.salient == int(layer.salient_mask.sum()) == a.in_features - int(0.9 * a.in_features)
        assert a.bytes_before == 4 * weight.size
        # Per block of 32 outputs: half a byte a weight, K a multiple of 4 here; a scale of 4 bytes and a zero point of 1 an
        # output; the mask with the first of its group.
        blocks = -(-a.out_features // 32)
        assert a.bytes_after == blocks * (16 * a.in_features + 32 * 5) + (a.in_features if a.name == a.group[0] else 0)
        error = np.linalg.norm(weight - quantized_by_row(weight)) / np.linalg.norm(weight)
        # A sum of up to 6144 squares in float32, and weights of a few roundings: well below 1e-4 of the error itself.
        assert a.weight_error == pytest.approx(error, rel=1e-4) and 0.03 < error < 0.3
    assert report.bytes_before == sum(4 * weight.size for name, weight in source.items() if name != "lm_head")
    assert report.bytes_after == sum(a.bytes_after for a in report.layers)


def test_report_reads_well() -> None:
    """As text one row a layer and the sums; as a dict nothing but json values."""
    model = tiny_llama(dtype=torch.bfloat16)
    report = ranvier.spike_(model, calibration=batches())
    lines = str(report).splitlines()
    assert len(lines) == 1 + 14 + 1 and lines[0].split()[:4] == ["layer", "K", "N", "salient"]
    for line, a in zip(lines[1:], report.layers, strict=False):
        assert line.split()[:4] == [a.name, str(a.in_features), str(a.out_features), str(a.salient)]
        assert line.split()[-1] == f"{a.weight_error:.4f}"
    assert lines[-1].startswith("14 layers, ") and lines[-1].endswith("skipped 1")
    assert report.layers[0].bytes_before == 2 * 64 * 64
    values = json.loads(json.dumps(report.to_dict()))
    assert SpikeConfig.from_dict(values["config"]) == report.config
    again = [LayerReport(**{**layer, "group": tuple(layer["group"])}) for layer in values["layers"]]
    assert SpikeReport(report.config, again, values["skipped"], values["calibration_tokens"]) == report


def test_weight_of_zeros_has_no_error() -> None:
    """An all-zero layer converts, and its error is 0, not a division by zero."""
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    assert ranvier.spike_(model, SpikeConfig(salient=0)).layers[0].weight_error == 0


# --- back -------------------------------------------------------------------------------------------------------------


@dtypes
def test_unspike_is_to_linear_everywhere(dtype: torch.dtype) -> None:
    """Every spiking layer becomes what its to_linear gives; everything else stays; it can be converted again."""
    model = spiking_llama(dtype=dtype, salient=0.25)
    expected = {name: layer.to_linear() for name, layer in layers(model).items()}
    before = {name: module for name, module in model.named_modules() if name not in expected}
    assert ranvier.unspike_(model) is model and not layers(model)
    for name, linear in expected.items():
        got = model.get_submodule(name)
        assert type(got) is nn.Linear and same(got.weight.detach(), linear.weight.detach())
        assert (got.bias is None) == (linear.bias is None) and (got.bias is None or same(got.bias, linear.bias))
    assert all(model.get_submodule(name) is module for name, module in before.items())
    with pytest.raises(ValueError, match="unspike_: LlamaForCausalLM has no spiking layer"):
        ranvier.unspike_(model)
    ranvier.spike_(model, calibration=batches())
    assert len(layers(model)) == 14


def test_unspike_refuses_a_single_layer() -> None:
    """A model that is itself one spiking layer cannot be replaced in place: it is refused, not silently kept."""
    layer = SpikingLinear.from_linear(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"itself one SpikingLinear.*use to_linear"):
        ranvier.unspike_(layer)
    assert isinstance(layer, SpikingLinear) and layer.to_linear().weight.shape == (4, 8)


def test_weight_only_needs_no_calibration_and_is_the_float_model_of_its_weights() -> None:
    """act_bits=None: logits are those of the model with dequantized weights, up to the rounding of float sums."""
    model = tiny_llama()
    report = ranvier.spike_(model, SpikeConfig(act_bits=None))
    assert report.calibration_tokens == 0 and all(layer.salient == 0 for layer in report.layers)
    spiking = logits(model)
    # Two layers of float32 with sums of some hundred terms: relative errors of 1e-5 of the largest logit.
    torch.testing.assert_close(spiking, logits(ranvier.unspike_(model)), rtol=0, atol=2e-5 * float(spiking.abs().max()))
