"""What runs where, read off the declared ops: the table of the README and of ``ranvier info --markdown``."""

from __future__ import annotations

from ranvier.backend import BACKENDS
from ranvier.ops._declare import OPS, Op

COLUMNS = ("op", *BACKENDS, "dtypes", "forward", "backward", "compile")


def _cells(op: Op) -> list[str]:
    """Forward and compile are what declaring gives every op: an implementation, a schema and a fake."""
    backends = ["yes" if backend in op.implementations else "-" for backend in BACKENDS]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in op.dtypes)
    backward = ("exact" if op.exact else "straight-through") if op.differentiable else "-"
    return [f"`{op.name}`", *backends, dtypes, "yes", backward, "yes"]


def markdown_matrix() -> list[str]:
    """The lines of a markdown table, one row an op; dtypes are those of the op's first tensor."""
    header, *rows = [f"| {' | '.join(row)} |" for row in (COLUMNS, *(_cells(op) for _, op in sorted(OPS.items())))]
    return [header, "|" + "---|" * len(COLUMNS), *rows]
