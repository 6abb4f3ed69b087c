"""The arithmetic of benchmarks: ranks, recalls, intervals, probes, reading words; against slow or other versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from visft_ds.evals.judge import probes, retrieval
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.images import from_arrays
from visft_ds.evals.judge.intervals import resampled
from visft_ds.evals.judge.ocr import _steps, fit, read
from visft_ds.evals.judge.probes import linear_probe, nearest_neighbours, probe
from visft_ds.evals.judge.protocol import Score, mean_ratio, rank_of
from visft_ds.evals.judge.table import rows_of, section


def test_equal_answers_do_not_count_as_right() -> None:
    """A model that says the same to everything must not be first by the order of columns."""
    flat = torch.zeros(3, 4)
    assert rank_of(flat, torch.tensor([0, 1, 3])).tolist() == [3, 3, 3]
    assert rank_of(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2])).tolist() == [1]


def test_recall_against_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows that do not divide the sizes evenly; images have one to three captions."""
    monkeypatch.setattr(retrieval, "_ROWS", 4)
    torch.manual_seed(0)
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5])
    images, texts = torch.randn(6, 8), torch.randn(11, 8)
    ranks = retrieval.image_to_text(images, texts, owners)
    backward = retrieval.text_to_image(images, texts, owners)
    for place in range(6):
        order = (texts @ images[place]).argsort(descending=True).tolist()
        first = next(number for number, caption in enumerate(order) if owners[caption] == place)
        assert ranks[place] == first  # all that come before are captions of others
    for place in range(11):
        order = (images @ texts[place]).argsort(descending=True).tolist()
        assert backward[place] == order.index(int(owners[place]))


def test_bootstrap_is_that_of_resampled_items() -> None:
    """Spread of the mean against plain resampling and, for shares, the formula; several arrays share the draws."""
    rng = np.random.default_rng(0)
    values = rng.random(200)
    means = resampled([values], None, rng)[0]
    plain = values[rng.integers(0, 200, (4000, 200))].mean(axis=1)
    # the standard error of a standard deviation of 4,000 draws is 1.1 %
    assert means.std() == pytest.approx(plain.std(), rel=0.06)
    assert means.mean() == pytest.approx(values.mean(), abs=0.002)
    right = (rng.random(1000) < 0.3).astype(np.float64)
    share = right.mean()
    assert resampled([right], None, rng)[0].std() == pytest.approx(math.sqrt(share * (1 - share) / 1000), rel=0.06)
    unions = rng.integers(50, 100, (60, 1, 3)).astype(np.float64)  # and of a mean of ratios of sums
    ratios = np.concatenate([unions * rng.random((60, 1, 3)), unions], axis=1)
    plain = mean_ratio(ratios[rng.integers(0, 60, (4000, 60))].sum(axis=1))
    means = resampled([ratios, ratios + np.array([1.0, 0.0])[:, None]], None, rng)
    assert means[0].std() == pytest.approx(plain.std(), rel=0.06)
    assert (means[1] - means[0]).std() < means[0].std() / 5


def test_items_of_a_group_are_drawn_together() -> None:
    """Five captions that all say the same about an image are one piece of evidence, not five."""
    rng = np.random.default_rng(0)
    once = rng.random(100)
    alone = resampled([once], None, rng)[0].std()
    grouped = resampled([np.repeat(once, 5)], np.repeat(np.arange(100), 5), rng)[0].std()
    assert grouped == pytest.approx(alone, rel=0.06)
    # groups of other sizes: the mean over items, not over groups
    values, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 7])
    assert set(np.unique(resampled([values], groups, rng)[0]).tolist()) == {0.0, 0.75, 1.0}


def test_differences_are_paired() -> None:
    """Both models fail on the same items but one: the difference is sure, though each number is not."""
    base = np.array([0.0, 1.0] * 100)
    better = base.copy()
    better[:40:2] = 1.0
    results = {"base": {"a": Score("a", base)}, "new": {"a": Score("a", better)}, "poor": {}}
    (row,) = rows_of(results)
    change = row.differences["new"]
    assert change.value == pytest.approx(0.1) and change.sure and 0.05 < change.low < change.high < 0.15
    assert row.values["new"].high - row.values["new"].low > change.high - change.low
    assert row.values.keys() == {"base", "new"} and row == rows_of(results)[0]
    lines = section([row], ["base", "new", "poor"]).rows
    assert lines[0][2:5] == ["50.00", "new", "60.00"] and lines[0][5].startswith("+10.00 [")
    assert lines[1][3:] == ["poor", "", ""]


def test_neighbours_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(probes, "_ROWS", 7)
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    centres = rng.normal(size=(4, 6))
    train, test = (centres[own] + rng.normal(size=(len(own), 6)) for own in (labels, truth))
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    wanted = model.fit(train, labels).predict(test) == truth
    found = nearest_neighbours(torch.from_numpy(train), labels, torch.from_numpy(test), truth, 4)
    assert found.tolist() == wanted.astype(float).tolist() and 0.3 < wanted.mean() < 1


def test_linear_probe_ignores_the_scale_of_features_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    labels, truth = np.arange(100) % 2, np.arange(80) % 2
    train, test = (rng.normal(size=(len(own), 5)).astype(np.float32) for own in (labels, truth))
    train[:, 0] += 6 * labels
    test[:, 0] += 6 * truth
    right = linear_probe(train, labels, test, truth)
    assert right.mean() > 0.95
    assert (linear_probe(train * 1000 + 5, labels, test * 1000 + 5, truth) == right).all()
    assert 0.2 < linear_probe(rng.normal(size=(100, 5)).astype(np.float32), labels, test, truth).mean() < 0.8
    assert (linear_probe(train[:1], labels[:1], test, truth) == (truth == 0)).all()  # one class is all it knows


def test_shots_are_as_many_as_the_rarest_class_has_and_the_same_for_every_model() -> None:
    images = from_arrays(np.zeros((12, 2, 2), dtype=np.uint8), "x")
    data = ClassSet(images, np.repeat(np.arange(3), 4), ("a", "b", "c"))
    benchmark = probe("probe/x", data, data)
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    both = {"train": {"pooled": features}, "test": {"pooled": features}}
    found = list(benchmark.scores(both))
    assert [one.name for one in found] == ["knn", "linear", "1-shot", "2-shot", "4-shot"]
    # with all images of a class drawn in every draw, all draws are the same
    assert set(found[-1].values.tolist()) <= {0.0, 1.0}
    again = list(benchmark.scores(both))
    assert all((one.values == other.values).all() for one, other in zip(found, again, strict=True))
    assert list(benchmark.numbers) == [one.name for one in found]


def test_a_reader_learns_words_that_stand_in_the_columns() -> None:
    """Each column holds one character; equal neighbours need the blank between them."""
    rng = np.random.default_rng(0)
    alphabet = ["a", "b", "c"]
    codes = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))  # the last one: nothing there

    def columns(word: str) -> torch.Tensor:
        return torch.stack([codes[alphabet.index(c)] for c in word] + [codes[3]] * (5 - len(word)), dim=1)

    texts = ["".join(rng.choice(alphabet, rng.integers(1, 5))) for _ in range(120)]
    features = torch.stack([columns(text) for text in texts])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reader = fit(features[:80], texts[:80], alphabet, 80)
    assert torch.equal(torch.get_rng_state(), before)
    said = read(reader, features[80:], alphabet)
    assert np.mean([one == other for one, other in zip(said, texts[80:], strict=True)]) > 0.9
    assert any(_steps(text) > len(text) for text in texts[80:])
