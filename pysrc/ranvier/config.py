"""What a spiking conversion is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

SPANS = ("shared", "separate")
GRIDS = ("consistent", "compat")
GROUP_SIZES = (None, 32, 64, 128)
WEIGHT_BITS = (4,)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"SpikeConfig.{name} is {value!r}; allowed are whole numbers from {low} to {high}")
    return value


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"SpikeConfig.{name} is {value!r}; allowed {'are' if len(allowed) > 1 else 'is'} {choices}")


@dataclass(frozen=True)
class SpikeConfig:
    """Bits, steps and ranges of a spiking linear layer (SpikeLLM, arXiv 2407.04752).

    weight_bits: bits of a weight; 4, asymmetric, round to nearest.
    act_bits: bits of one time step of an activation, 1 to 8: ``2**act_bits`` levels a step. 8 is symmetric,
        ``max|x| / 127``, and takes no further steps.
    steps: time steps T on salient channels; the others take one.
    salient: share of salient input channels, 0 to 1: ``K - int((1 - salient) * K)`` of K.
    span: ``"shared"``: one range a token, extra steps refine it on salient channels (the paper). ``"separate"``: salient
        channels leave that range and have a symmetric 8-bit one of their own; ``steps`` is then not used.
    grid: ``"consistent"``: scales are in the exact ratio T, so every code is a sum of T spikes. ``"compat"``: the released
        code's fake quantization, whose ratio is ``(2**(act_bits + log2 T) - 1) / (2**act_bits - 1)``; T a power of two.
    group_size: channels that share a weight scale and zero point: 32, 64, 128, or None for the whole row.
    skip: names of submodules that stay as they are; each is one whole component of a dotted path.

    Raises ValueError, naming the field.
    """

    weight_bits: int = 4
    act_bits: int = 4
    steps: int = 2
    salient: float = 0.10
    span: str = "shared"
    grid: str = "consistent"
    group_size: int | None = None
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        _one_of("weight_bits", self.weight_bits, WEIGHT_BITS)
        _whole("act_bits", self.act_bits, 1, 8)
        _whole("steps", self.steps, 1, 127)
        salient = self.salient
        if isinstance(salient, bool) or not isinstance(salient, (int, float)) or not 0 <= salient <= 1:
            raise ValueError(f"SpikeConfig.salient is {salient!r}; allowed is a share from 0 to 1")
        _one_of("span", self.span, SPANS)
        _one_of("grid", self.grid, GRIDS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        if not isinstance(self.skip, (tuple, list)) or not all(isinstance(name, str) for name in self.skip):
            raise ValueError(f"SpikeConfig.skip is {self.skip!r}; pass a tuple of names, such as ('lm_head',)")
        object.__setattr__(self, "salient", float(salient))
        object.__setattr__(self, "skip", tuple(self.skip))
        self._check_codes_fit()

    def _check_codes_fit(self) -> None:
        if self.grid == "compat":
            if self.act_bits == 8:
                raise ValueError(
                    "SpikeConfig.act_bits is 8 with grid='compat', whose raw codes 0..255 leave int8; use 7 or less"
                )
            if self.steps & (self.steps - 1):
                raise ValueError(f"SpikeConfig.steps is {self.steps} with grid='compat'; allowed are powers of two")
        if self.span == "separate":
            return
        if self.act_bits == 8:
            if self.steps > 1 and self.salient > 0:
                raise ValueError(
                    f"SpikeConfig.steps is {self.steps} with act_bits=8, whose codes already fill int8; use steps=1"
                )
            return
        top = (self.steps << self.act_bits) - 1 if self.grid == "compat" else self.steps * (2**self.act_bits - 1)
        if top > 127:
            raise ValueError(
                f"SpikeConfig.steps is {self.steps} with act_bits={self.act_bits}: codes reach {top} and int8 ends at 127;"
                " lower steps or act_bits"
            )

    @property
    def code_steps(self) -> int:
        """T as the codes use it: 1 where 8 bits leave no room for a second step."""
        return 1 if self.span == "separate" or self.act_bits == 8 else self.steps

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain json values."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpikeConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for names it does not know."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"SpikeConfig does not know {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        if not isinstance(values.get("skip", ()), (list, tuple)):
            raise ValueError(f"SpikeConfig.skip is {values['skip']!r}; pass a list of names")
        return cls(**{**values, **({"skip": tuple(values["skip"])} if "skip" in values else {})})
