"""hadamard: rows times an orthogonal matrix of +-1 / sqrt(n), by additions.

    y = x (I_b (x) H_n) / sqrt(n),    H_n = C_m (x) S_p,    H_n H_n^T = n I,    b n channels

S_p is Sylvester's matrix of order p = 2^k, S_2p = [[S_p, S_p], [S_p, -S_p]]; C_m, the core, is a Hadamard matrix whose
order m is 1 or 4 times an odd number times a power of two. Cores come from three constructions, the first that fits:

    Paley I      m = q + 1, q = 3 mod 4 prime:      I + [[0, 1], [-1, Q]],  Q_ij = chi(i - j) mod q
    Paley II     m = 2 (q + 1), q = 1 mod 4 prime:  [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]
    Williamson   m = 4 p: four symmetric circulants with A A + B B + C C + D D = 4 p I, in Hamilton's array

chi is the quadratic character (R. Paley, J. Math. and Phys. 12, 1933; J. Williamson, Duke Math. J. 11, 1944). That covers
cores of 12, 20, 28, 36, 44, 60, 76, 84, 104, 108, 140, 148, 172 and most others up to :data:`LARGEST_CORE`.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

LARGEST_CORE = 256  # a core of order m costs m additions an element
WILLIAMSON = {172: 43}  # order: prime of the circulants


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _family(m: int) -> str | None:
    """The construction of a core of order m; None where there is none here."""
    if m in (1, 2):
        return "sylvester"
    if m % 4:
        return None
    if _is_prime(m - 1):
        return "paley 1"
    if (m // 2 - 1) % 4 == 1 and _is_prime(m // 2 - 1):
        return "paley 2"
    return "williamson" if m in WILLIAMSON else None


def hadamard_core(order: int) -> int | None:
    """m of the smallest core of H_order = C_m (x) S_p; None where no construction here gives this order."""
    if order < 1:
        return None
    odd = order // (order & -order)
    if odd == 1:
        return 1
    m = 4 * odd
    while order % m == 0 and m <= LARGEST_CORE:
        if _family(m) is not None:
            return m
        m *= 2
    return None


@functools.cache
def hadamard_order(channels: int) -> int:
    """The largest n that divides ``channels`` and is the order of a Hadamard matrix known here.

    n = channels for nearly every width that models have; else the transform is block-diagonal, channels / n blocks of n.
    """
    divisors = {d for i in range(1, math.isqrt(channels) + 1) if channels % i == 0 for d in (i, channels // i)}
    return max(d for d in divisors if hadamard_core(d) is not None)


def _quadratic(q: int) -> list[list[int]]:
    """Q_ij = chi(i - j): 0, 1 for squares, -1 for others."""
    squares = {i * i % q for i in range(1, q)}
    chi = [0, *(1 if i in squares else -1 for i in range(1, q))]
    return [[chi[(i - j) % q] for j in range(q)] for i in range(q)]


def _paley_1(m: int) -> Tensor:
    s = torch.zeros(m, m, dtype=torch.int64, device="cpu")
    s[0, 1:], s[1:, 0] = 1, -1
    s[1:, 1:] = torch.tensor(_quadratic(m - 1), device="cpu")
    return s + torch.eye(m, dtype=torch.int64, device="cpu")


def _paley_2(m: int) -> Tensor:
    q = m // 2 - 1
    c = torch.zeros(q + 1, q + 1, dtype=torch.int64, device="cpu")
    c[0, 1:], c[1:, 0] = 1, 1
    c[1:, 1:] = torch.tensor(_quadratic(q), device="cpu")
    pair, single = torch.tensor([[1, 1], [1, -1]], device="cpu"), torch.tensor([[1, -1], [-1, -1]], device="cpu")
    return torch.kron(c, pair) + torch.kron(torch.eye(q + 1, dtype=torch.int64, device="cpu"), single)


def _williamson_rows(p: int) -> list[list[int]]:
    """First rows of four circulants: 1 at 0, constant on the cosets of the subgroup of order 6 of the units mod p.

    A circulant's eigenvalues are then one for each coset besides the row's sum; pairs of rows are matched so that the
    squares of all four add up to 4 p.
    """
    subgroup = {s * x % p for x in range(1, p) if pow(x, 3, p) == 1 for s in (1, p - 1)}
    cosets = sorted({tuple(sorted(x * s % p for s in subgroup)) for x in range(1, p)})
    sums = [[sum(math.cos(2 * math.pi * k * x / p) for x in c) for c in cosets] for k in (0, *(c[0] for c in cosets))]
    choices = list(itertools.product((1, -1), repeat=len(cosets)))
    powers = [[(1 + sum(a * b for a, b in zip(s, row, strict=True))) ** 2 for row in sums] for s in choices]
    pairs = {}
    for i, j in itertools.combinations(range(len(choices)), 2):
        total = [a + b for a, b in zip(powers[i], powers[j], strict=True)]
        pairs[tuple(round(t, 6) + 0.0 for t in total)] = (i, j)
        other = pairs.get(tuple(round(4 * p - t, 6) + 0.0 for t in total))
        if other is not None:
            signs = [choices[n] for n in (i, j, *other)]
            return [[1, *(next(s for s, c in zip(sign, cosets, strict=True) if x in c) for x in range(1, p))] for sign in signs]
    raise ValueError(f"there are no Williamson matrices of order {p} that are constant on these cosets")


def _williamson(m: int) -> Tensor:
    p = WILLIAMSON[m]
    index = (torch.arange(p, device="cpu")[None, :] - torch.arange(p, device="cpu")[:, None]) % p
    a, b, c, d = (torch.tensor(row, device="cpu")[index] for row in _williamson_rows(p))
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in rows])


@functools.cache
def _core(m: int) -> Tensor:
    family = _family(m)
    if family == "sylvester":
        return torch.tensor([[1, 1], [1, -1]], device="cpu")[:m, :m]
    return {"paley 1": _paley_1, "paley 2": _paley_2, "williamson": _williamson}[family](m)


def core_matrix(m: int) -> Tensor:
    """C_m: int64 [m, m] of +-1. Raises ValueError for an order without a construction here."""
    if _family(m) is None:
        raise ValueError(f"core_matrix: there is no Hadamard matrix of order {m} here; take hadamard_order({m})")
    return _core(m).clone()


def hadamard_matrix(order: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """H_n, dense: [n, n] of +-1. Raises ValueError for an order that is not known here."""
    core = hadamard_core(order)
    if core is None:
        known = hadamard_order(order) if order > 0 else 1
        raise ValueError(f"hadamard_matrix: there is no Hadamard matrix of order {order} here; the largest divisor is {known}")
    h = _core(core)
    while h.shape[0] < order:
        h = torch.kron(h, torch.tensor([[1, 1], [1, -1]], device="cpu"))
    return h.to(dtype)


def walsh(x: Tensor) -> Tensor:
    """x S_p over the last dimension, whose length p is a power of two: butterflies of growing distance."""
    shape, distance = x.shape, 1
    while distance < shape[-1]:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance)
        low, high = pairs.unbind(-2)
        x = torch.stack([low + high, low - high], -2)
        distance *= 2
    return x.reshape(shape)


def hadamard(x: Tensor, order: int, transpose: bool = False) -> Tensor:
    """y = x (I (x) H_n) / sqrt(n) over the last dimension, with H_n^T where ``transpose``; the inverse of one is the other.

    x [..., b n], any float type; float32 inside for narrower ones. Differentiable.
    """
    core = hadamard_core(order)
    working = x if x.dtype == torch.float64 else x.float()
    blocks = walsh(working.reshape(*x.shape[:-1], x.shape[-1] // order, core, order // core))
    if core > 1:
        matrix = _core(core).to(working)
        blocks = (matrix if transpose else matrix.T) @ blocks
    return (blocks / math.sqrt(order)).reshape(x.shape).to(x.dtype)
