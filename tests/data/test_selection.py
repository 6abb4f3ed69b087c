"""A selection finds what numpy finds, from a bit for each sample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.data.selection import Selection


@given(st.integers(0, 3000), st.sampled_from([0.0, 0.001, 0.3, 0.9, 1.0]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_positions_are_those_of_numpy(samples: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    column = np.where(rng.random(samples) < share, rng.integers(1, 9, samples), rng.integers(-2, 1, samples))
    selection = Selection.positive(column.astype(np.int32))
    expected = np.flatnonzero(column > 0)
    assert len(selection) == len(expected) and selection.samples == samples
    ranks = rng.permutation(len(expected))
    found = selection.positions(ranks)
    assert found.dtype == np.int64 and found.tolist() == expected[ranks].tolist()


@pytest.mark.parametrize("samples", [511, 512, 513, 2048 * 512 + 5])
def test_the_edges_of_blocks_and_chunks(samples: int) -> None:
    column = np.zeros(samples, dtype=np.int32)
    chosen = np.unique([0, 7, 8, min(511, samples - 1), samples // 2, samples - 1])
    column[chosen] = 1
    assert Selection.positive(column).positions(np.arange(len(chosen))).tolist() == chosen.tolist()


def test_all_needs_no_memory() -> None:
    everything = Selection.all(10**12)
    assert len(everything) == 10**12 and everything.bits is None
    assert everything.positions(np.array([10**12 - 1, 0])).tolist() == [10**12 - 1, 0]


def test_no_ranks_give_no_positions() -> None:
    assert Selection.positive(np.array([0, 1, 1])).positions(np.array([], dtype=np.int64)).shape == (0,)


def test_memory_is_a_bit_and_an_eighth_for_each_sample() -> None:
    selection = Selection.positive(np.ones(1 << 20, dtype=np.int8))
    assert selection.bits is not None
    assert selection.bits.nbytes + selection.counts.nbytes <= (1 << 20) / 8 * 1.13
