"""Where a language model's time goes, by module: each part's own time, without what it calls of other parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PARTS = ("norms", "attention's linears", "attention", "MLPs", "lm_head", "rest")


def part_of(name: str) -> str | None:
    """The part that a module of a Llama-like model belongs to by its name, None for what is only a container."""
    last = name.rpartition(".")[2]
    if last in ATTENTION:
        return "attention's linears"
    if last.endswith("norm"):
        return "norms"
    return {"self_attn": "attention", "mlp": "MLPs", "lm_head": "lm_head"}.get(last)


def seconds_by_part(model: nn.Module, run: Callable[[int], None], repeats: int = 5) -> dict[str, float]:
    """Seconds of one run by part, the median of `repeats`; the hooks that measure cost each module some microseconds."""
    own: dict[str, float] = defaultdict(float)
    stack: list[list] = []

    def enter(*_: object) -> None:
        stack.append([time.perf_counter(), 0.0])

    def leave(part: str) -> Callable:
        def hook(*_: object) -> None:
            begin, inside = stack.pop()
            spent = time.perf_counter() - begin
            own[part] += spent - inside
            if stack:
                stack[-1][1] += spent

        return hook

    hooks = []
    for name, module in model.named_modules():
        if (part := part_of(name)) is not None:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(part))]
    found = []
    try:
        for i in range(repeats + 1):
            own.clear()
            begin = time.perf_counter()
            run(i)
            total = time.perf_counter() - begin
            found.append({**own, "rest": total - sum(own.values())})
    finally:
        for hook in hooks:
            hook.remove()
    middle = {part: sorted(times.get(part, 0.0) for times in found[1:])[repeats // 2] for part in PARTS}
    return middle
