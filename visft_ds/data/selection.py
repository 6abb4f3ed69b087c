"""Bit set of the eligible samples of a split: 12.5 MB for 100 million, where a list takes 800.

Shape letters: N samples of the split, K samples asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_BLOCK_BYTES = 64  # bits are counted in blocks of 512, for which 8 bytes more are kept
_BLOCK = 8 * _BLOCK_BYTES
_CHUNK = 2048 * _BLOCK  # samples that are looked at together
_RANKS = 1 << 14  # positions that are found together: 64 bytes of work space for each, twice

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # (256, 8)
_ONES = _BITS.sum(axis=1, dtype=np.uint8)  # (256,) bits that are set
#: (256, 8) place of the first, second, ... bit that is set; 8 where there are fewer.
_PLACES = np.sort(np.where(_BITS == 1, np.arange(8), 8), axis=1).astype(np.int64)


@dataclass(frozen=True)
class Selection:
    """The eligible ones of N samples, in the order of the split. `len(selection)` is their number."""

    samples: int  #: N
    bits: npt.NDArray[np.uint8] | None  #: (blocks * 64,), the lowest bit first; None if all are eligible
    counts: Int64Array  #: (blocks + 1,) how many are eligible before each block, and in all

    @classmethod
    def all(cls, samples: int) -> Selection:
        """Every sample; takes no memory."""
        return cls(samples, None, np.array([0, samples], dtype=np.int64))

    @classmethod
    def positive(cls, column: npt.NDArray[np.integer], release: Callable[[], object] = lambda: None) -> Selection:
        """The samples whose value in an index column (N,) is above 0.

        `release` is called after each part of the column that was looked at, to give memory back where it is mapped.
        """
        blocks = -(-len(column) // _BLOCK)
        bits = np.zeros(blocks * _BLOCK_BYTES, dtype=np.uint8)
        for first in range(0, len(column), _CHUNK):
            packed = np.packbits(np.asarray(column[first : first + _CHUNK]) > 0, bitorder="little")
            bits[first // 8 : first // 8 + len(packed)] = packed
            release()
        counts = np.zeros(blocks + 1, dtype=np.int64)
        for first in range(0, blocks, _CHUNK // _BLOCK):
            part = bits[first * _BLOCK_BYTES : first * _BLOCK_BYTES + _CHUNK // 8].reshape(-1, _BLOCK_BYTES)
            counts[first + 1 : first + 1 + len(part)] = _ONES[part].sum(axis=1, dtype=np.int64)
        return cls(len(column), bits, np.cumsum(counts))

    def __len__(self) -> int:
        return int(self.counts[-1])

    def positions(self, ranks: Int64Array) -> Int64Array:
        """Positions (K,) int64 of the i-th eligible samples in the split, for each i of `ranks` (K,), in any order."""
        ranks = np.asarray(ranks, dtype=np.int64)
        assert not ranks.size or 0 <= ranks.min() <= ranks.max() < len(self)
        if self.bits is None:
            return ranks.copy()
        found = np.empty(ranks.shape, dtype=np.int64)
        for first in range(0, len(ranks), _RANKS):
            found[first : first + _RANKS] = self._positions(self.bits, ranks[first : first + _RANKS])
        return found

    def _positions(self, bits: npt.NDArray[np.uint8], ranks: Int64Array) -> Int64Array:
        block = np.searchsorted(self.counts, ranks, side="right") - 1
        left = ranks - self.counts[block]
        content = bits.reshape(-1, _BLOCK_BYTES)[block]  # (K, 64)
        upto = np.cumsum(_ONES[content], axis=1, dtype=np.int64)
        byte = (upto <= left[:, None]).sum(axis=1)  # the first byte that goes beyond
        rows = np.arange(len(ranks))
        value = content[rows, byte]
        left -= upto[rows, byte] - _ONES[value]
        return block * _BLOCK + byte * 8 + _PLACES[value, left]
