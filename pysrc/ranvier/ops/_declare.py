"""The one mechanism behind every op: schema, checks, fake, backends, gradient, and the short way for eager calls.

An op is defined once in the ``ranvier::`` namespace, where the compiler, autograd, autocast and fake tensors find it. An
eager call that needs none of them runs the backend's function itself and saves the dispatcher's 5 to 20 microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ranvier.backend import BackendError, choose, default_backend
from ranvier.ops._args import check_is_tensor

LIBRARY = torch.library.Library("ranvier", "DEF")
OPS: dict[str, Op] = {}

# Bound once: this test stands before every eager call, where each attribute looked up is a few percent of a small layer.
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_any_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_grad_enabled = torch.is_grad_enabled


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether something has to see this call as an op: a compiler or tracer, a mode, functorch, autocast, a gradient."""
    if (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _any_autocast()
        or _tracing_state() is not None
    ):
        return True
    grad = _grad_enabled()
    for t in tensors:
        if t is not None and ((type(t) is not Tensor and type(t) is not Parameter) or (grad and t.requires_grad)):
            return True
    return False


@dataclass
class Op:
    """A declared op. Call it with the schema's arguments; ``backend`` names one, None takes the device's.

    Gradients flow where the device's backend runs; another one asked for by name raises when a gradient is needed.
    """

    name: str
    places: tuple[str, ...]
    implementations: dict[str, Callable]
    check: Callable[..., None]
    dtypes: tuple[torch.dtype, ...]
    differentiable: bool = False
    exact: bool = False
    kernels_of: str = ""
    overload: Any = field(default=None, repr=False)
    mutated: tuple[int, ...] = ()

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        check_is_tensor(self.name, "the input", args[0])
        tensors, device = [a for a in args if isinstance(a, Tensor)], args[0].device
        own = backend is None or backend == default_backend(device)
        if own and (device.type == "meta" or needs_dispatcher(*tensors)):
            self._refuse_tangents(tensors)
            return self.overload(*args)
        self.check(*args)
        run = choose(self.name, self.implementations, device, backend)
        if not own and self.differentiable and _grad_enabled() and any(t.requires_grad for t in tensors):
            raise BackendError(
                f"{self.name}: backend {backend!r} has no gradient here; leave backend out, or call it under torch.no_grad()"
            )
        if self.mutated:
            self.bump_versions(args)
        return run(*args)

    def bump_versions(self, args: tuple) -> None:
        """Let autograd see that the op writes into these tensors; those of inference mode count no versions."""
        for i in self.mutated:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])

    def _refuse_tangents(self, tensors: list[Tensor]) -> None:
        """Raises BackendError under forward-mode AD, where torch would take the op for a constant, with tangents of zero."""
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            other = "; use the backward one" if self.differentiable else ""
            raise BackendError(f"{self.name}: there is no forward-mode derivative{other}")


# What a backward pass reaches behind an op without a gradient. It is an op itself, so that a compiler, which traces the
# backward pass together with the forward one, can put it off until somebody runs it.
LIBRARY.define("refuse_gradient(Tensor gradient, SymInt[] shape, ScalarType dtype, str message) -> Tensor")


def _refuse_gradient(gradient: Tensor, shape: list[int], dtype: torch.dtype, message: str) -> Tensor:
    raise RuntimeError(message)


LIBRARY.impl("refuse_gradient", _refuse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ranvier::refuse_gradient", lambda gradient, shape, dtype, _: gradient.new_empty(shape, dtype=dtype), lib=LIBRARY
)


class _Forward(torch.autograd.Function):
    """An op that has no gradient: None in place of one would be taken for zero."""

    @staticmethod
    def forward(ctx: Any, op: Op, message: str, keys: Any, *args: Any) -> Any:
        ctx.message = message
        ctx.inputs = [(a.shape, a.dtype) if isinstance(a, Tensor) else None for a in args]
        return _below_autograd(op, keys, args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        given = next(g for g in gradients if g is not None)
        wanted = zip(ctx.inputs, ctx.needs_input_grad[3:], strict=True)
        refused = [torch.ops.ranvier.refuse_gradient(given, *a, ctx.message) if need else None for a, need in wanted]
        return None, None, None, *refused


def _below_autograd(op: Op, keys: Any, args: tuple) -> Any:
    op.bump_versions(args)
    with torch._C._AutoDispatchBelowAutograd():
        return op.overload.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _forward_only(op: Op, instead: str) -> Callable:
    message = f"{op.name}: it has no gradient; call it under torch.no_grad()" + (f", or {instead}" if instead else "")

    def forward(keys: Any, *args: Any) -> Any:
        if _grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _Forward.apply(op, message, keys, *args)
        return _below_autograd(op, keys, args)

    return forward


def _autocast(op: Op, device: str) -> Callable:
    def cast(x: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            narrow = x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            return op.overload(narrow, *rest)

    return cast


def declare(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable,
    reference: Callable,
    cpu: Callable | None = None,
    triton: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    instead: str = "",
    exact: bool = False,
    autocast: bool = False,
    places: tuple[str, ...],
    kernels_of: str = "",
    dtypes: tuple[torch.dtype, ...],
) -> Op:
    """Define an op and return what calls it.

    check(*args) raises ValueError or TypeError and is shared by every way in; fake returns empty tensors of the result's
    shapes; reference, cpu and triton compute; backward and setup_context are torch.library's, and exact says that they are
    the derivative itself and no straight-through one. Without them a backward pass that reaches the op raises RuntimeError,
    which says what to do instead. With autocast the first argument is cast as torch's own linear casts it. places lists
    where the op's stem is found (reference, csrc, kernels, ops, nn, tests, benchmarks; none for an op that shares another's
    stem); a test walks them. kernels_of names the op whose Triton kernels this one launches where it has no file of its own.
    dtypes are those that check allows the first tensor.
    """
    name = schema.split("(", 1)[0]
    given = {"cpu": cpu, "triton": triton, "reference": reference}
    op = Op(
        name, places, {k: v for k, v in given.items() if v is not None}, check, dtypes, backward is not None, exact, kernels_of
    )
    LIBRARY.define(schema)
    op.overload = getattr(torch.ops.ranvier, name).default
    arguments = op.overload._schema.arguments
    op.mutated = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)

    def run(*args: Any) -> Any:
        check(*args)
        return choose(name, op.implementations, args[0].device)(*args)

    def run_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ranvier::{name}", run_fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"ranvier::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    else:
        LIBRARY.impl(name, _forward_only(op, instead), "Autograd", with_keyset=True)
    if autocast:
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast(op, device), f"Autocast{device.upper()}")
    OPS[name] = op
    return op
