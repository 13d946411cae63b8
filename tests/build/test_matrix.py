"""The table of what runs where: the README's is the one that the declared ops give, and its cells are so."""

from __future__ import annotations

import pytest
import torch
from compiled import ROOT
from spiking import CONFIGS, linear, spiking, tokens

from ranvier import SpikeConfig
from ranvier.cli import main
from ranvier.nn import SpikingLinear, TernaryLinear
from ranvier.ops import KVFormat, kv_encode, spike_encode
from ranvier.ops._declare import OPS
from ranvier.ops._matrix import COLUMNS, markdown_matrix
from ranvier.ops.spike_linear import _arguments

TYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
ONE_TYPE = {"flash_attention"}  # all tensors have the first one's
CELLS = [row.strip("| ").split(" | ") for row in markdown_matrix()[2:]]
ROWS = {cells[0].strip("`"): dict(zip(COLUMNS, cells, strict=True)) for cells in CELLS}


def call_of(name: str) -> list:
    """Arguments that the op takes, its first tensor in front."""
    layer, x = spiking(CONFIGS[0]), tokens()
    weight_only = SpikingLinear.from_linear(linear(), SpikeConfig(act_bits=None))
    form, weight = layer.format, layer.packed_weight
    rule = (form.act_bits, form.steps, form.span, form.grid, form.group_size)
    codes = (layer.salient_mask, form.salient_count, *rule)
    given = _arguments(weight, layer.salient_mask, layer.bias.detach(), form, layer.out_features)
    kv_mask, keys = torch.arange(32).repeat(2, 1) < 3, torch.randn(1, 2, 5, 32)
    cache = KVFormat(32, 3, 3).empty(1, 2, 1)
    kv_encode(keys, keys, cache, kv_mask, kv_mask, 0, form=KVFormat(32, 3, 3))
    row = torch.tensor([0])
    ternary = TernaryLinear.from_linear(linear(), None, layer.salient_mask)
    ternary_rest = (ternary.salient_mask, ternary.bias.detach(), ternary.out_features, ternary.salient_count)
    return {
        "hadamard": lambda: [torch.randn(3, 48), 24, False],
        "flash_attention": lambda: [torch.randn(1, 4, 3, 32), keys, keys, True, 0.2],
        "kv_attention": lambda: [torch.randn(1, 4, 1, 32), cache, kv_mask, kv_mask, row + 5, None, None, 3, 3, 0.2],
        "kv_attention_encode": lambda: [keys, keys, cache, kv_mask, kv_mask, row, 3, 3],
        "spike_encode": lambda: [x, layer.salient_mask, form.salient_count, *rule],
        "spike_rms_norm": lambda: [x, torch.ones(x.shape[-1]), 1e-5, "after_cast", *codes],
        "spike_silu_mul": lambda: [x, x.clone(), *codes],
        "spike_linear": lambda: [*spike_encode(x, layer.salient_mask, **form.rule), *given, torch.float32],
        "spike_linear_dynamic": lambda: [x, *given],
        "ternary_linear": lambda: [
            *spike_encode(x, act_bits=8, steps=1)[:2], *ternary.packed_weight[:3], *ternary_rest, torch.float32,
        ],
        "ternary_linear_dynamic": lambda: [x, *ternary.packed_weight[:3], *ternary_rest, 8],
        "weight_only_linear": lambda: [x, *weight_only.packed_weight[:3], layer.bias.detach(), layer.out_features, 0],
        "spike_events": lambda: [
            torch.tensor([[3, 0, -2]], dtype=torch.int32), torch.ones(3, 5, dtype=torch.int16),
            torch.zeros(3, dtype=torch.int64), 1, "unary", 1,
        ],
    }[name]()  # fmt: skip


def test_readme_has_the_declared_table() -> None:
    """The table under "What runs where" is the one printed by the library, line for line."""
    section = (ROOT / "README.md").read_text().split("## What runs where\n")[1].split("\n## ")[0]
    table = section.strip().split("\n\n")[0].splitlines()
    assert table == markdown_matrix(), "replace the README's table by the output of: ranvier info --markdown"


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """ranvier info --markdown prints those lines and nothing else."""
    assert main(["info", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == markdown_matrix()


def test_every_op_has_a_row() -> None:
    """One row an op, no other."""
    assert list(ROWS) == sorted(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_dtypes_are_those_that_run(name: str) -> None:
    """The first tensor's types that the table names run on every named backend, every other raises TypeError."""
    row, (first, *others) = ROWS[name], call_of(name)
    for dtype in TYPES:
        rest = [t.to(dtype) if name in ONE_TYPE and isinstance(t, torch.Tensor) else t for t in others]
        declared = str(dtype)[6:] in row["dtypes"].split(", ")
        for backend in ("cpu", "reference"):
            assert row[backend] == "yes"
            if declared:
                OPS[name](first.to(dtype), *rest, backend=backend)
            else:
                with pytest.raises(TypeError, match=str(dtype)):
                    OPS[name](first.to(dtype), *rest, backend=backend)


@pytest.mark.parametrize("name", sorted(OPS))
def test_backward_is_where_the_table_says(name: str) -> None:
    """A gradient reaches the first tensor where the table has one; elsewhere none is recorded, or asking for it raises."""
    first, *rest = call_of(name)
    first = first.requires_grad_() if first.is_floating_point() else first
    outputs = OPS[name](first, *rest)
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    differentiable = [y for y in outputs if y.requires_grad]
    if ROWS[name]["backward"] == "-":
        for y in differentiable:
            with pytest.raises(RuntimeError, match=rf"{name}: it has no gradient; call it under torch\.no_grad\(\)"):
                torch.autograd.grad(y.sum(), first)
    else:
        (gradient,) = torch.autograd.grad(differentiable[0].sum(), first)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", sorted(OPS))
def test_compiles_in_one_graph(name: str) -> None:
    """torch.compile(fullgraph=True) takes the op and gives eager's values."""
    torch._dynamo.reset()
    first, *rest = call_of(name)
    op = OPS[name]
    compiled = torch.compile(lambda x: op.overload(x, *rest), fullgraph=True, backend="aot_eager")(first)
    eager = op.overload(first, *rest)
    pairs = zip(compiled, eager, strict=True) if isinstance(eager, tuple | list) else [(compiled, eager)]
    assert ROWS[name]["compile"] == "yes" and all(torch.equal(a, b) for a, b in pairs)
