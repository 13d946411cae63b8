"""Triton without a GPU: ops run by its interpreter on CPU tensors, launches compiled for four processors and looked at.

interpreted(): within it the ops' Triton functions run. resources(): what a launch needs on a processor.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ranvier.ops import _kv_triton, _spike_triton, _ternary_triton, _triton
from ranvier.ops._triton import Launch

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are neither interpreted nor compiled")
tl = pytest.importorskip("triton.language")

# Bytes of shared memory that one program may have, and registers of one thread.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
TARGETS = tuple(SHARED)
LAUNCHING = (_spike_triton, _ternary_triton, _kv_triton)  # the modules that choose launches
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.int16: "i16",
}  # fmt: skip


def _in_the_language() -> object:
    """Nothing: a function among whose globals the language is."""
    return tl


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run by the interpreter, in this process and on CPU tensors: the ops' Triton functions can be called as they are.

    Our kernels are imported anew; triton's own functions of the language, made when it was imported, are rewritten when called.
    The language is patched here, once, and put back: a call of a function would patch it each time and for good.
    """
    from triton.runtime.interpreter import InterpretedFunction, _patch_lang, interpreter_builder
    from triton.runtime.jit import JITFunction

    def call(self: object, *args: object, **options: object) -> object:
        function = self if isinstance(self, InterpretedFunction) else InterpretedFunction(self.fn)
        return function.rewrite()(*args, **options)

    names = [f"ranvier.kernels.{p.stem}" for p in (Path(__file__).parents[1] / "kernels").glob("*.py")]
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    before = triton.knobs.runtime.interpret, JITFunction.__call__, InterpretedFunction.__call__
    triton.knobs.runtime.interpret = True
    # Overflow is asserted in debug mode only, but looked for in any; that is two fifths of the time.
    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)
    JITFunction.__call__ = InterpretedFunction.__call__ = call
    scopes = [_patch_lang(function) for function in (_in_the_language, triton.language.standard.sum.fn)]
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        for scope in reversed(scopes):
            scope.restore()
        interpreter_builder.options = options
        triton.knobs.runtime.interpret, JITFunction.__call__, InterpretedFunction.__call__ = before
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@dataclass(frozen=True)
class Resources:
    """What a compiled launch needs: of one thread registers and bytes of spills, of a program bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    text: str  # ptx or amdgcn

    def check(self, target: str) -> None:
        """Fails unless the launch fits the processor with nothing spilled."""
        assert self.shared <= SHARED[target], f"{self.shared} bytes of shared memory, {target} has {SHARED[target]}"
        assert self.registers <= REGISTERS[target]
        assert self.spills == 0, f"{self.spills} bytes of spills on {target}"


def _specialized(value: object) -> tuple[str, list]:
    """The type that a launch gives an argument, and what it says of its divisibility."""
    sixteen = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", sixteen if value.data_ptr() % 16 == 0 else []
    if isinstance(value, float):
        return "fp32", []
    return "i32", sixteen if value % 16 == 0 else []


def compiled(launch: Launch, target: str) -> object:
    """The launch's kernel, compiled as a launch on this processor would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = target.startswith("sm_")
    place = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    kernel = getattr(importlib.import_module(f"ranvier.kernels.{launch.stem}"), launch.kernel)
    arguments = dict(launch.arguments)
    if "DOT" in arguments:
        arguments["DOT"] = place.backend
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        once = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or once:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name], divisible = _specialized(value)
            if divisible and not parameter.do_not_specialize:
                attributes[(index,)] = divisible
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=place, options={**launch.options, "enable_fp_fusion": False})


def resources(launch: Launch, target: str, folder: Path) -> Resources:
    """Compiles the launch and reads what it needs from the binary."""
    kernel = compiled(launch, target)
    if target.startswith("sm_"):
        binary = folder / f"{launch.kernel}.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        shown = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
        use = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout + shown.stderr))
        return Resources(int(use["REG"]), int(use["STACK"]) + int(use["LOCAL"]), kernel.metadata.shared, kernel.asm["ptx"])
    text = kernel.asm["amdgcn"]
    number = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size")}
    return Resources(number["vgpr_count"], number["private_segment_fixed_size"], kernel.metadata.shared, text)


@contextlib.contextmanager
def device(target: str, used: set[tuple[str, tuple]]) -> Iterator[None]:
    """Launches made within take the tables of this processor; ``used`` collects the entries."""
    names, configuration = _triton.device_names, _triton.configuration

    def noted(stem: str, kernel: str, device: torch.device, **sizes: int) -> tuple[dict, dict]:
        use, options = configuration(stem, kernel, device, **sizes)
        used.add((kernel, tuple(sorted({**use, **options}.items()))))
        return use, options

    _triton.device_names = lambda _: (target, "default")
    for module in LAUNCHING:
        module.configuration = noted
    try:
        yield
    finally:
        _triton.device_names = names
        for module in LAUNCHING:
            module.configuration = configuration


def shipped(stem: str, target: str) -> dict[str, list[dict]]:
    """What a launch table has for a processor: of each kernel the shapes of its entries."""
    table = _triton.launch_table(stem)
    kernels = {**table["default"], **table.get(target, {})}
    return {kernel: [entry["use"] for entry in entries] for kernel, entries in kernels.items()}


def assert_all_fit(
    stem: str, target: str, launches: list[Launch], used: set[tuple[str, tuple]], folder: Path
) -> list[Resources]:
    """Every entry of the table was used, and every launch compiles within the processor's limits, nothing spilled."""
    there = {(kernel, tuple(sorted(use.items()))) for kernel, uses in shipped(stem, target).items() for use in uses}
    assert used == there, f"no launch of this test takes {sorted(there - used)}"
    found = []
    for launch in launches:
        needs = resources(launch, target, folder)
        needs.check(target)
        found.append(needs)
    return found
