"""In-context segmentation against scikit-learn's nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsRegressor

from visft_ds.evals.judge import knn
from visft_ds.evals.judge.benchmark import resamples
from visft_ds.evals.judge.crops import NO_CLASS
from visft_ds.evals.judge.in_context import recall, remember, shares_of
from visft_ds.evals.judge.knn import RESAMPLES, vote
from visft_ds.evals.judge.rows import Rows

IN_CONTEXT = (30, 0.02)  # neighbours and temperature, as published


def _memory(rng: np.random.Generator, images: int, patches: int) -> Rows:
    features = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(images * patches, 12))), dim=1)
    labels = torch.from_numpy(rng.dirichlet(np.ones(5), size=len(features)))
    return Rows(features, labels, torch.arange(images).repeat_interleave(patches))


def test_votes_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a resample, which is a memory with copies; and a bank in parts gives what it gives as a
    whole.
    """
    rng = np.random.default_rng(0)
    memory, queries = _memory(rng, 40, 10), rng.normal(size=(60, 12))
    found = vote(memory, torch.from_numpy(queries), *IN_CONTEXT).numpy()
    assert len(found) == 1 + RESAMPLES
    for number, copies in enumerate(resamples(40, RESAMPLES)[:4]):
        places = np.repeat(np.arange(400), copies[memory.owners.numpy()])
        model = KNeighborsRegressor(
            IN_CONTEXT[0],
            metric="cosine",
            weights=lambda distance: np.exp(-distance / IN_CONTEXT[1]),
            algorithm="brute",
        )
        model.fit(memory.features.numpy()[places], memory.labels.numpy()[places])
        np.testing.assert_allclose(found[number], model.predict(queries), atol=1e-6)
    monkeypatch.setattr(knn, "_BANK", 37)
    np.testing.assert_allclose(vote(memory, torch.from_numpy(queries), *IN_CONTEXT).numpy(), found)


def test_two_patches_by_hand() -> None:
    """Void has no share in any class, and a patch of nothing else is not kept."""
    label = torch.tensor([[0, 1, NO_CLASS, NO_CLASS], [0, NO_CLASS, NO_CLASS, NO_CLASS]])
    np.testing.assert_array_equal(shares_of(label, (1, 2), 2), [[0.5, 0.25], [0, 0]])
    patches = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).unsqueeze(1)  # the first looks along the first axis
    other = torch.ones(2, 4, dtype=torch.int64)
    memory = remember([(0, patches, label), (1, patches.flip(2), other)], 2, most=2, each=2)
    assert memory.owners.tolist() == [0, 1, 1] and memory.features[0].tolist() == [1, 0]
    (seen,) = recall(memory, [torch.tensor([[[[1.0]], [[0.98]]]])])
    near = 1 / np.hypot(1, 0.98)
    weights = np.exp(np.array([near, near, 0.98 * near]) / IN_CONTEXT[1])
    expected = weights @ [[0.5, 0.25], [0, 1], [0, 1]] / weights.sum()
    np.testing.assert_allclose(seen[0, :, 0, 0], expected, rtol=1e-4)


def test_rare_classes_are_kept_first() -> None:
    label = torch.zeros(8, 8, dtype=torch.int64)
    label[0, 0] = 1
    memory = remember([(0, torch.randn(3, 8, 8), label)], 2, most=1, each=2)
    assert sorted(memory.labels.argmax(dim=1).tolist()) == [0, 1]
