"""What a spiking conversion is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

SPANS = ("shared", "separate")
GRIDS = ("consistent", "compat")
GROUP_SIZES = (None, 32, 64, 128)
WEIGHT_BITS = (8, 4, 2)
WEIGHT_GRIDS = ("uniform", "ternary")
SALIENCY = ("signed", "absolute")
HEAD_BITS = (None, 8)
QUANT_METHOD = "ranvier-spike"  # the name of this quantization among those of transformers
PIPELINES = ("rtn", "gptq", "omniquant")
SALIENT_WEIGHT_LEVELS = 16  # codes of a salient column of a 2-bit weight are stored in 4 bits


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

    weight_bits: bits of a weight, asymmetric: 4, 2, or 8 (W8A8, no spikes, round to nearest). With 4 the extra steps are the
        activations'; with 2 they are the weights': a salient input channel's column sums ``steps`` spikes of 2 bits, and
        activations take one step.
    act_bits: bits of one time step of an activation, 1 to 8: ``2**act_bits`` levels a step. 8 is symmetric,
        ``max|x| / 127``, and takes no further steps. None leaves activations as they are (weight-only).
    steps: time steps T on salient channels; the others take one.
    salient: share of salient input channels, 0 to 1: ``K - int((1 - salient) * K)`` of K.
    span: ``"shared"``: one range a token, extra steps refine it on salient channels (the paper). ``"separate"``: salient
        channels leave that range and have a symmetric 8-bit one of their own; ``steps`` is then not used.
    grid: ``"consistent"``: scales are in the exact ratio T, so every code is a sum of T spikes. ``"compat"``: the released
        code's fake quantization, whose ratio is ``(2**(act_bits + log2 T) - 1) / (2**act_bits - 1)``; T a power of two.
    group_size: channels that share a weight scale and zero point: 32, 64, 128, or None for the whole row.
    skip: names of submodules that stay as they are; each is one whole component of a dotted path.
    pipeline: how weights are quantized: ``"rtn"`` round to nearest, ``"gptq"`` with the Hessian of the layer's input,
        ``"omniquant"`` with learned weight clipping and a learned equivalent transform. Salient channels need calibration
        in each of them, gptq and omniquant always.
    rotate: fold a randomized Hadamard rotation into the weights first.
    act_clip: share of a token's range that its codes span, above 0 to 1; values beyond it saturate.
    weight_grid: with ``weight_bits=2``: ``"uniform"``, four levels a step, or ``"ternary"``, spikes of -1, 0 and 1.
    saliency: which channels count as salient: those with the largest ``"signed"`` scores (the released code) or
        ``"absolute"`` ones.
    head_bits: 8 converts the model's output layer (lm_head) too, whatever ``skip`` says: 8-bit weights, rounded to nearest, and
        8-bit activations (:class:`ranvier.nn.Int8Linear`). None leaves it to ``skip``.
    calibration: an iterable of batches, or the path of a text file, for the ways in that take no such argument. It is no
        part of the configuration's value: not compared, not written out.

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
    pipeline: str = "rtn"
    rotate: bool = False
    act_clip: float = 1.0
    weight_grid: str = "uniform"
    saliency: str = "signed"
    head_bits: int | None = None
    calibration: Any = field(default=None, compare=False, repr=False)

    # What transformers asks of a quantization_config (ranvier.integrations.transformers.register).
    quant_method = QUANT_METHOD

    def __deepcopy__(self, memo: dict) -> SpikeConfig:
        # Nothing of it changes, and calibration may be an iterator, which cannot be copied.
        return self

    def __post_init__(self) -> None:
        _one_of("weight_bits", self.weight_bits, WEIGHT_BITS)
        if self.act_bits is not None:
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
        _one_of("pipeline", self.pipeline, PIPELINES)
        _one_of("rotate", self.rotate, (True, False))
        clip = self.act_clip
        if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip <= 1:
            raise ValueError(f"SpikeConfig.act_clip is {clip!r}; allowed is a share above 0 and up to 1")
        _one_of("weight_grid", self.weight_grid, WEIGHT_GRIDS)
        _one_of("saliency", self.saliency, SALIENCY)
        _one_of("head_bits", self.head_bits, HEAD_BITS)
        object.__setattr__(self, "act_clip", float(clip))
        object.__setattr__(self, "salient", float(salient))
        object.__setattr__(self, "skip", tuple(self.skip))
        self._check_codes_fit()

    @property
    def _of_bytes(self) -> tuple:
        """What has one value with 8-bit weights."""
        return self.act_bits, self.salient, self.act_clip, self.group_size, self.pipeline

    def _check_weight_codes_fit(self) -> None:
        if self.weight_bits == 8 and self._of_bytes != (8, 0.0, 1.0, None, "rtn"):
            raise ValueError(
                "SpikeConfig.weight_bits is 8 (W8A8): allowed with it are act_bits, salient, act_clip, group_size and pipeline"
                f" (8, 0.0, 1.0, None, 'rtn'); got {self._of_bytes}"
            )
        if self.weight_bits != 2:
            if self.weight_grid != "uniform":
                raise ValueError(
                    f"SpikeConfig.weight_grid is {self.weight_grid!r} with weight_bits={self.weight_bits}; allowed is 'uniform'"
                )
            return
        if self.group_size is not None:
            raise ValueError(f"SpikeConfig.group_size is {self.group_size} with weight_bits=2; allowed is None")
        if self.weight_grid == "uniform" and self.grid == "compat" and self.steps & (self.steps - 1):
            raise ValueError(f"SpikeConfig.steps is {self.steps} with grid='compat'; allowed are powers of two")
        levels = 2 * self.steps + 1 if self.weight_grid == "ternary" else 3 * self.steps + 1
        if levels > SALIENT_WEIGHT_LEVELS:
            raise ValueError(
                f"SpikeConfig.steps is {self.steps} with weight_bits=2 and weight_grid={self.weight_grid!r}: {levels} levels"
                f" do not fit {SALIENT_WEIGHT_LEVELS}; lower steps"
            )

    def _check_codes_fit(self) -> None:
        self._check_weight_codes_fit()
        if self.act_bits is None or self.spikes == "weights":
            return
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
    def spikes(self) -> str:
        """What the extra steps refine: "activations" or, with 2-bit weights, "weights"."""
        return "weights" if self.weight_bits == 2 else "activations"

    @property
    def salient_share(self) -> float:
        """``salient``, or 0 where nothing spikes: 4-bit weights under activations that stay as they are."""
        return 0.0 if self.act_bits is None and self.spikes == "activations" else self.salient

    @property
    def code_steps(self) -> int:
        """T as an activation's codes use it: 1 where 8 bits leave no room for a second step."""
        if self.spikes == "weights" or self.act_bits is None:
            return 1
        return 1 if self.span == "separate" or self.act_bits == 8 else self.steps

    @property
    def needs_calibration(self) -> bool:
        """Whether a conversion has to see inputs: to measure saliency, or for a pipeline that fits to them."""
        return self.pipeline != "rtn" or self.salient_share not in (0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain json values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return {**values, "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpikeConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for names it does not know."""
        known = {f.name for f in fields(cls) if f.compare}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"SpikeConfig does not know {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
        if not isinstance(values.get("skip", ()), (list, tuple)):
            raise ValueError(f"SpikeConfig.skip is {values['skip']!r}; pass a list of names")
        return cls(**{**values, **({"skip": tuple(values["skip"])} if "skip" in values else {})})
