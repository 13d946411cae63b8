"""SpikeConfig: what it refuses, naming the field, and that it survives a round trip through json."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from ranvier import SpikeConfig
from ranvier.nn import SpikingLinear


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("weight_bits", v) for v in (3, 8, 4.5, "4", None, 4.0)],
        *[("act_bits", v) for v in (0, 9, -1, 4.0, "4", True)],
        *[("steps", v) for v in (0, -2, 128, 2.0, True, None)],
        *[("salient", v) for v in (-0.1, 1.1, float("nan"), "0.1", True, None)],
        *[("span", v) for v in ("both", "", None, 1, "Shared")],
        *[("grid", v) for v in ("exact", None, 0)],
        *[("group_size", v) for v in (0, 16, 48, 64.5, "64", -32, True, 64.0)],
        *[("pipeline", v) for v in ("awq", None, "GPTQ", 1)],
        *[("rotate", v) for v in (1, 0, "yes", None)],
        *[("act_clip", v) for v in (0, -0.5, 1.01, "1", True, None, float("nan"))],
        *[("weight_grid", v) for v in ("ternary", "int", None)],
        *[("saliency", v) for v in ("abs", None, True)],
        *[("skip", v) for v in ("lm_head", (1,), None, ("lm_head", None))],
    ],
)
def test_every_field_is_checked_by_name(field: str, value: object) -> None:
    """A wrong value is a ValueError that begins with the field and shows the value."""
    with pytest.raises(ValueError, match=rf"^SpikeConfig\.{field} is ") as caught:
        SpikeConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", {"steps": 9}),
        ("steps", {"act_bits": 7, "steps": 2}),
        ("steps", {"act_bits": 8, "steps": 2}),
        ("steps", {"steps": 3, "grid": "compat"}),
        ("steps", {"act_bits": 5, "steps": 8, "grid": "compat"}),
        ("act_bits", {"act_bits": 8, "steps": 1, "grid": "compat"}),
        ("steps", {"weight_bits": 2, "act_bits": 8, "steps": 6}),
        ("steps", {"weight_bits": 2, "act_bits": 8, "steps": 8, "weight_grid": "ternary"}),
        ("steps", {"weight_bits": 2, "act_bits": 8, "steps": 3, "grid": "compat"}),
        ("group_size", {"weight_bits": 2, "group_size": 64}),
    ],
)
def test_codes_have_to_fit(field: str, values: dict) -> None:
    """Combinations whose codes leave int8 are refused, with the limit in the message."""
    with pytest.raises(ValueError, match=rf"^SpikeConfig\.{field} is "):
        SpikeConfig(**values)


def test_defaults_are_the_papers_w4a4() -> None:
    """W4A4, two steps on a tenth of the channels, one shared range, exact ratio of scales."""
    assert dataclasses.asdict(SpikeConfig()) == {
        "weight_bits": 4,
        "act_bits": 4,
        "steps": 2,
        "salient": 0.10,
        "span": "shared",
        "grid": "consistent",
        "group_size": None,
        "skip": ("lm_head",),
        "pipeline": "rtn",
        "rotate": False,
        "act_clip": 1.0,
        "weight_grid": "uniform",
        "saliency": "signed",
        "head_bits": None,
        "calibration": None,
    }


def test_calibration_is_no_part_of_the_value() -> None:
    """Two configs that differ in calibration are equal, and it is not written out."""
    config = SpikeConfig(calibration="text.txt")
    assert config == SpikeConfig() and hash(config) == hash(SpikeConfig())
    assert "calibration" not in config.to_dict() and config.calibration == "text.txt"
    with pytest.raises(ValueError, match="does not know calibration"):
        SpikeConfig.from_dict({"calibration": "text.txt"})


@pytest.mark.parametrize(
    ("values", "spikes", "code_steps", "share", "needs"),
    [
        ({}, "activations", 2, 0.1, True),
        ({"salient": 0.0}, "activations", 2, 0.0, False),
        ({"salient": 0.0, "pipeline": "gptq"}, "activations", 2, 0.0, True),
        ({"span": "separate"}, "activations", 1, 0.1, True),
        ({"act_bits": 8, "salient": 0.0}, "activations", 1, 0.0, False),
        ({"act_bits": None}, "activations", 1, 0.0, False),
        ({"act_bits": None, "pipeline": "omniquant"}, "activations", 1, 0.0, True),
        ({"weight_bits": 2, "act_bits": 8}, "weights", 1, 0.1, True),
        ({"weight_bits": 2, "act_bits": None, "weight_grid": "ternary", "steps": 7}, "weights", 1, 0.1, True),
        ({"weight_bits": 2, "act_bits": 8, "salient": 0}, "weights", 1, 0.0, False),
    ],
)
def test_what_spikes_and_what_it_needs(values: dict, spikes: str, code_steps: int, share: float, needs: bool) -> None:
    """Extra steps are the activations' with 4-bit weights and the weights' with 2; only what is measured needs data."""
    config = SpikeConfig(**values)
    got = (config.spikes, config.code_steps, config.salient_share, config.needs_calibration)
    assert got == (spikes, code_steps, share, needs)


def test_round_trip_through_json() -> None:
    """from_dict(json(to_dict)) is the same config, for every kind of value."""
    for span, group in itertools.product(("shared", "separate"), (None, 32, 128)):
        config = SpikeConfig(act_bits=3, steps=4, salient=1, span=span, group_size=group, skip=["a", "b"])
        again = SpikeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config and hash(again) == hash(config) and isinstance(again.skip, tuple)
    assert SpikeConfig.from_dict({}) == SpikeConfig()


def test_from_dict_refuses_what_it_does_not_know() -> None:
    """An unknown name, a wrong kind of skip and a wrong value are named."""
    with pytest.raises(ValueError, match="does not know bits, tau"):
        SpikeConfig.from_dict({"tau": 1, "bits": 4})
    with pytest.raises(ValueError, match=r"SpikeConfig\.skip is 'lm_head'"):
        SpikeConfig.from_dict({"skip": "lm_head"})
    with pytest.raises(ValueError, match=r"SpikeConfig\.span"):
        SpikeConfig.from_dict({"span": "wide"})


def test_a_config_does_not_change() -> None:
    """Frozen: layers may share one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpikeConfig().steps = 4


def test_every_valid_config_makes_a_layer() -> None:
    """What the config accepts, the kernels accept: with no, some and all channels salient."""
    linear, x = torch.nn.Linear(32, 5), torch.randn(3, 32)
    made = 0
    all_steps, spans, grids = (1, 2, 3, 4, 8, 16, 127), ("shared", "separate"), ("consistent", "compat")
    for bits, steps, span, grid in itertools.product(range(1, 9), all_steps, spans, grids):
        for share in (0.0, 0.25, 1.0):
            try:
                config = SpikeConfig(act_bits=bits, steps=steps, span=span, grid=grid, salient=share)
            except ValueError:
                continue
            layer = SpikingLinear.from_linear(linear, config, torch.arange(32) < 32 * share)
            with torch.no_grad():
                assert layer(x).isfinite().all()
            made += 1
    assert made > 150


@pytest.mark.parametrize(
    "values",
    [
        {"act_bits": 8, "steps": 2, "salient": 0.0},
        {"weight_bits": 2, "act_bits": 8, "steps": 5},
        {"weight_bits": 2, "act_bits": 8, "steps": 7, "weight_grid": "ternary"},
        {"act_bits": 6, "steps": 2},
    ],
    ids=str,
)
def test_the_last_values_that_fit(values: dict) -> None:
    """8 bits with steps that no channel takes, 16 and 15 levels in 4 bits, codes up to 126."""
    assert SpikeConfig(**values).to_dict().items() >= values.items()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight_bits": 2, "act_bits": 8, "steps": 6}, "19 levels do not fit 16"),
        ({"weight_bits": 2, "act_bits": 8, "steps": 8, "weight_grid": "ternary"}, "17 levels do not fit 16"),
        ({"act_bits": 6, "steps": 3}, "codes reach 189"),
    ],
    ids=str,
)
def test_the_first_values_that_do_not_fit(values: dict, says: str) -> None:
    """The error counts what does not fit."""
    with pytest.raises(ValueError, match=says):
        SpikeConfig(**values)
