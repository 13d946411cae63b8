"""``ranvier info``: versions, instruction sets, threads, and which backend runs which op."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("ranvier", "torch", "triton", "numba", "numpy", "safetensors", "transformers", "gguf")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("info", help="versions, instruction sets, threads, and which backend runs which op")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print json")
    form.add_argument("--markdown", action="store_true", help="print what the library declares as a markdown table")
    return parser


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """What info prints, as plain json values; under "ops" None means that the backend runs, a text why it cannot."""
    import torch

    from ranvier import _C
    from ranvier.backend import BACKENDS, connect_threads, why_not
    from ranvier.ops._declare import OPS  # the package declares every op

    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}},
        "cpu": {
            "brand": _C.cpu_features()["brand"].strip(),
            "isa": _C.isa(),
            "detected_isa": _C.detected_isa(),
            "isa_levels": list(_C.isa_levels()),
            "RANVIER_ISA": os.environ.get("RANVIER_ISA"),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": {"count": torch.get_num_threads(), "torch_pool": connect_threads()},
        "ops": {name: {b: why_not(b, op.implementations) for b in BACKENDS} for name, op in sorted(OPS.items())},
    }


def run(args: argparse.Namespace) -> int:
    if args.markdown:
        from ranvier.ops._matrix import markdown_matrix

        print("\n".join(markdown_matrix()))
        return 0
    found = facts()
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    cpu, threads = found["cpu"], found["threads"]
    versions = [f"{name} {version or 'not installed'}" for name, version in found["versions"].items()]
    cap = f"RANVIER_ISA={cpu['RANVIER_ISA']}" if cpu["RANVIER_ISA"] else "RANVIER_ISA not set"
    pool = "torch's own pool" if threads["torch_pool"] else "torch's pool is not connected, so kernels run serially"
    lines = [
        f"versions  {', '.join(versions[:5])}",
        f"          {', '.join(versions[5:])}",
        f"cpu       {cpu['brand']}",
        f"isa       {cpu['isa']} (detected {cpu['detected_isa']}; {cap}; levels {', '.join(cpu['isa_levels'])})",
        f"gpu       {found['gpu'] or 'none'}",
        f"threads   {threads['count']}, {pool}",
    ]
    return "\n".join([*lines, "", *_matrix(found["ops"])])


def _matrix(ops: dict[str, dict[str, str | None]]) -> list[str]:
    """One line an op, one column a backend, and the reasons below."""
    from ranvier.backend import BACKENDS

    width = max(map(len, ops), default=2)
    cells = {name: ["runs" if row[b] is None else "no" for b in BACKENDS] for name, row in ops.items()}
    lines = [f"{'op':{width}}  " + "  ".join(f"{b:9}" for b in BACKENDS)]
    lines += [f"{name:{width}}  " + "  ".join(f"{cell:9}" for cell in row) for name, row in cells.items()]
    reasons = [f"{name}, {b}: {row[b]}" for name, row in ops.items() for b in BACKENDS if row[b] is not None]
    return [line.rstrip() for line in lines] + (["", *reasons] if reasons else [])
