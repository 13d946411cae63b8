"""The speed that was promised, each claim held against the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

LARGE = ((4096, 4096), (11008, 4096), (4096, 11008))
SMALL = (64, 64)
OURS = "ranvier"


@dataclass(frozen=True)
class Claim:
    """text says what is promised; needed is the least value of what was measured (the most, where most is set)."""

    text: str
    value: float | None
    needed: float
    most: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.needed if self.most else self.value >= self.needed

    def line(self) -> str:
        word = {True: "reached", False: "NOT reached", None: "not measured"}[self.reached]
        measured = (
            "" if self.value is None else f": {self.value:.2f} ({'at most' if self.most else 'at least'} {self.needed:g})"
        )
        return f"{word:<13} {self.text}{measured}{'; ' + self.detail if self.detail else ''}"


def print_claims(claims: Iterable[Claim], quiet: bool) -> None:
    print()
    if not quiet:
        print("The machine was not quiet: these verdicts mean nothing.")
    for claim in claims:
        print(claim.line())


class Rows:
    """Rows of an op's run, looked up by provider, shape and M."""

    def __init__(self, rows: list[dict], op: str = "spike_linear") -> None:
        self._by_key = {(r["provider"], r["N"], r["K"], r["M"]): r for r in rows if r["metric"] == "time" and r["op"] == op}
        self._sweep = [r for r in rows if r["metric"] == "sweep time"]

    def get(self, provider: str, shape: tuple[int, int], m: int, column: str) -> float | None:
        row = self._by_key.get((provider, *shape, m))
        return None if row is None else row[column]

    def least(self, providers: Iterable[str], shape: tuple[int, int], m: int, column: str) -> float | None:
        found = [v for p in providers if (v := self.get(p, shape, m, column)) is not None]
        return min(found, default=None)

    def worst(self, value: Callable[[tuple[int, int], int], float | None], sizes: Iterable[int], most: bool) -> tuple:
        """The worst over the large shapes and sizes, and where it was."""
        found = [(v, f"{n} x {k}, M = {m}") for n, k in LARGE for m in sizes if (v := value((n, k), m)) is not None]
        if not found:
            return None, ""
        return max(found) if most else min(found)

    def sizes(self) -> list[int]:
        return sorted({m for provider, n, k, m in self._by_key if provider == OURS and (n, k) in LARGE})

    def worst_step(self) -> tuple[float | None, str]:
        """The greatest rise of the time per token from one M of the sweep to the next."""
        steps = [(row["per_token_step"], f"at M = {row['M']}") for row in self._sweep if row.get("per_token_step")]
        return max(steps, default=(None, ""))


def spike_linear_claims(rows: list[dict]) -> list[Claim]:
    """What the op was built to reach on two cores with AVX-512 VNNI; the worst shape counts."""
    table = Rows(rows)

    def against(peers: tuple[str, ...] | str) -> Callable:
        names = (peers,) if isinstance(peers, str) else peers
        return lambda shape, m: table.least(names, shape, m, "ratio_to_ours")

    def own(column: str, provider: str = OURS) -> Callable:
        return lambda shape, m: table.get(provider, shape, m, column)

    def claim(text: str, value: Callable, sizes: Iterable[int], needed: float, most: bool = False) -> Claim:
        worst, where = table.worst(value, sizes, most)
        return Claim(text, worst, needed, most, where and f"worst at {where}")

    limit, sizes = own("limit_fraction"), table.sizes()
    claims = [
        claim("M = 1, share of the limit (read bandwidth)", limit, [1], 0.85),
        claim("M = 1, times as fast as llama.cpp Q4_0 repacked", against("llama.cpp Q4_0 repacked"), [1], 1.3),
        claim("M = 1, times as fast as torch bfloat16", against("torch bfloat16"), [1], 3.5),
        claim("M = 512, share of the limit (VNNI peak)", limit, [512], 0.85),
        claim("M = 512, times as fast as llama.cpp Q4_0 repacked", against("llama.cpp Q4_0 repacked"), [512], 2.5),
        claim("M = 512, times as fast as llama.cpp Q4_K", against("llama.cpp Q4_K"), [512], 1.6),
        claim("M = 512, times as fast as torch bfloat16", against("torch bfloat16"), [512], 1.8),
        claim(
            "M = 512, times as fast as torch._int_mm on ready-made int8 (its faster layout)",
            against(("torch._int_mm, W^T view", "torch._int_mm, W [K, N]")), [512], 1.0,
        ),
        claim("M = 8, share of the lower of the two limits", limit, [8], 0.7),
        claim("M = 64, share of the lower of the two limits", limit, [64], 0.7),
    ]  # fmt: skip
    for name, most in (("separate", 1.15), ("compat", 1.15), ("group 128", 1.10)):
        text = f"{name}, time against the plain layer"
        claims.append(claim(text, own("ratio_to_ours", f"{OURS} {name}"), sizes, most, most=True))
    step, where = table.worst_step()
    claims.append(Claim("no cliff: rise of the time per token when M grows", step, 1.05, True, where and f"worst {where}"))
    claims.append(claim("AVX2 at M = 1, time against VNNI", own("ratio_to_ours", f"{OURS} avx2"), [1], 2.0, most=True))
    small = table.get("torch float32", SMALL, 1, "ratio_to_ours")
    claims.append(Claim("64 x 64 layer at M = 1, times as fast as nn.Linear", small, 1.0))
    return claims


def ternary_linear_claims(rows: list[dict]) -> list[Claim]:
    """What 2-bit weights were to reach on two cores with AVX-512 VNNI; the worst shape counts."""
    table = Rows(rows, "ternary_linear")

    def bandwidth(shape: tuple[int, int], m: int) -> float | None:
        """The share of the read bandwidth at 2 bits a weight, salient ones too."""
        seconds, read = table.get(OURS, shape, m, "value"), table.get(OURS, shape, m, "read_gbs")
        return None if seconds is None else shape[0] * shape[1] / 4 / (seconds * 1e-6) / (read * 1e9)

    def peer(name: str):
        return lambda shape, m: table.get(name, shape, m, "ratio_to_ours")

    def claim(text: str, value: Callable, m: int, needed: float) -> Claim:
        worst, where = table.worst(value, [m], most=False)
        return Claim(text, worst, needed, detail=where and f"worst at {where}")

    tq2, bfloat16 = peer("llama.cpp TQ2_0"), peer("torch bfloat16")
    return [
        claim("M = 1, share of the read bandwidth at 2 bits a weight", bandwidth, 1, 0.70),
        claim("M = 1, times as fast as llama.cpp TQ2_0", tq2, 1, 1.6),
        claim("M = 1, times as fast as torch bfloat16", bfloat16, 1, 6.0),
        claim("M = 512, times as fast as llama.cpp TQ2_0", tq2, 512, 3.0),
        claim("M = 512, GOPS", lambda shape, m: table.get(OURS, shape, m, "gops"), 512, 220.0),
        claim("M = 512, share of the limit (VNNI peak)", lambda s, m: table.get(OURS, s, m, "limit_fraction"), 512, 0.85),
    ]


WHOLE = "fused float32"  # all that is ours: fuse_ and the attention of prompts


def smollm2_claims(rows: list[dict]) -> list[Claim]:
    """What the whole model was to gain over torch, in float32 and with its linear layers in bfloat16."""
    found = {(r["provider"], r["metric"]): r["value"] for r in rows if r.get("level") == "model"}

    def times(metric: str, ours: str = "ranvier float32", peer: str = "torch float32") -> float | None:
        rates = [found.get((name, metric)) for name in (ours, peer)]
        return None if None in rates else rates[0] / rates[1]

    mixed = (f"ranvier {WHOLE}, lm_head bfloat16", "torch float32, linears bfloat16")
    eight = (f"ranvier {WHOLE}, lm_head 8 bits", mixed[1])
    return [
        Claim("SmolLM2-135M decode, times as fast as torch float32", times("decode"), 2.0),
        Claim("SmolLM2-135M prefill of 512 tokens, all logits, times as fast as torch float32", times("prefill"), 1.6),
        Claim("fused, lm_head in bfloat16: decode, times as fast as torch's linears in bfloat16", times("decode", *mixed), 1.6),
        Claim("fused, lm_head in bfloat16: prefill, all logits, times as fast", times("prefill", *mixed), 1.4),
        Claim("fused, lm_head at 8 bits: decode, times as fast", times("decode", *eight), 1.6),
        Claim("fused, lm_head at 8 bits: prefill, all logits, times as fast", times("prefill", *eight), 1.4),
    ]
