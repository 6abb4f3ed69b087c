"""Interleaving of names in given proportions: tasks over the steps of a run, data sets over the steps of a task."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

from visft_ds.data.permutation import GOLDEN, WORD


class Interleaving:
    """Map from turn i to its name, and to the number of turns that a name had before: pure functions of i.

    Turn i is a point on a circle, and each name an arc of it as long as its share. The points form a golden-ratio
    (low-discrepancy) sequence, so a name's count stays within a few of its exact share at every moment; independent
    draws would be off by the square root of the count.

    Args:
        shares: name -> share relative to the others, above 0.
        offset: where on the circle to begin, in [0, 2**64).
    """

    def __init__(self, shares: Mapping[str, float], offset: int) -> None:
        assert shares and all(share > 0 for share in shares.values()), shares
        self._names = list(shares)
        parts = [Fraction(share) for share in shares.values()]
        total = sum(parts)
        self._bounds = [0, *(round(part * WORD / total) for part in accumulate(parts))]
        self._offset = offset

    def at(self, turn: int) -> str:
        """The name that has this turn."""
        place = (turn * GOLDEN + self._offset) % WORD
        for name, bound in zip(self._names, self._bounds[1:], strict=True):
            if place < bound:
                return name
        raise AssertionError("the last bound is 2**64")

    def before(self, turn: int, name: str) -> int:
        """Number of turns of `name` in [0, turn); exact, and as fast for turn 10**9 as for 10."""
        number = self._names.index(name)
        return self._below(turn, self._bounds[number + 1]) - self._below(turn, self._bounds[number])

    def _below(self, turns: int, bound: int) -> int:
        # (x mod M < bound) equals floor(x / M) - floor((x - bound) / M), and x is linear in the turn.
        above = _floor_sum(turns, WORD, GOLDEN, self._offset - bound)
        return _floor_sum(turns, WORD, GOLDEN, self._offset) - above


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Sum of floor((a * i + b) / m) for i in [0, n), in O(log m) steps (Euclid-like reduction)."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b = divmod(top, m)
        m, a = a, m
