"""The arithmetic of benchmarks: ranks, recalls, probes, reading words; against slow or other versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from visft_ds.evals.judge import few_shots, knn, retrieval
from visft_ds.evals.judge.benchmark import ImageSet, resamples
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.classification import classification
from visft_ds.evals.judge.logistic import logistic_regression
from visft_ds.evals.judge.ocr import read
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.evals.judge.ranking import rank_of
from visft_ds.evals.judge.rows import Rows


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
    ranks = retrieval.rank_of_own(images, texts, torch.arange(6), owners)
    backward = retrieval.rank_of_own(texts, images, owners, torch.arange(6))
    alike = retrieval.rank_of_own(torch.zeros(6, 8), texts, torch.arange(6), owners)
    assert alike.tolist() == [8, 10, 9, 10, 8, 10]  # equal answers do not count as right
    for index in range(6):
        order = (texts @ images[index]).argsort(descending=True).tolist()
        first = next(number for number, caption in enumerate(order) if owners[caption] == index)
        assert ranks[index] == first  # all that come before are captions of others
    for index in range(11):
        order = (images @ texts[index]).argsort(descending=True).tolist()
        assert backward[index] == order.index(int(owners[index]))


def _rows(features: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Rows:
    return Rows(torch.from_numpy(features), torch.from_numpy(labels), torch.arange(len(labels)))


def test_neighbours_against_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr(knn, "QUERIES", 7)
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    centres = rng.normal(size=(4, 6))
    train, test = (centres[own] + rng.normal(size=(len(own), 6)) for own in (labels, truth))
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = model.fit(train, labels).predict(test) == truth
    actual = knn.knn("kNN", _rows(train, labels), _rows(test, truth))
    assert actual.values.tolist() == expected.astype(float).tolist() and 0.3 < expected.mean() < 1
    places = np.repeat(np.arange(60), resamples(60, 1)[1])
    again = model.fit(train[places], labels[places]).predict(test) == truth
    assert actual.retrained is not None and actual.retrained[0] == again.mean()


def test_regression_ignores_the_scale_of_features_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    labels, truth = np.arange(100) % 2, np.arange(80) % 2
    train, test = (rng.normal(size=(len(own), 5)).astype(np.float32) for own in (labels, truth))
    train[:, 0] += 6 * labels
    test[:, 0] += 6 * truth
    known, asked = _rows(train, labels), _rows(test, truth)
    score = logistic_regression("linear", known, asked)
    assert score.value > 0.95 and score.retrained is not None and score.retrained.min() > 0.7
    scaled = (replace(of, features=of.features * 1000 + 5) for of in (known, asked))
    assert (logistic_regression("linear", *scaled).values == score.values).all()
    noise = replace(known, features=torch.from_numpy(rng.normal(size=(100, 5)).astype(np.float32)))
    assert 0.2 < logistic_regression("linear", noise, asked).value < 0.8
    one = logistic_regression("linear", known.subset(torch.arange(1)), asked)  # one class is all it knows
    assert (one.values == (truth == 0)).all()


def test_classification_reads_class_token_and_mean_patch_and_chooses_by_training_images() -> None:
    """kNN reads the class token alone, which is noise here."""
    data = ClassSet(
        ImageSet([""] * 40, lambda _: Image.new("RGB", (2, 2)), "x"), np.arange(40) % 2, ("a", "b")
    )
    benchmark = classification("classification/x", data, data, QUICK)
    drawn = torch.randn(2, 2, 40, 5, generator=torch.Generator().manual_seed(0))
    drawn[:, 1, :, 0] += 8 * torch.from_numpy(data.labels)
    parts = {
        part: {"pooled": token, "mean": mean}
        for part, (token, mean) in zip(("train", "test"), drawn, strict=True)
    }
    noise, linear = benchmark.scores(parts, ["kNN", "linear"])
    assert (noise.name, linear.name) == ("kNN", "linear") and linear.value > 0.95 > noise.value
    assert benchmark.layer_choice is not None
    held_out = benchmark.layer_choice.held_out
    assert held_out(parts["train"], "linear") > 0.85 > held_out(parts["train"], "kNN")


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
    said = read(features[:80], texts[:80], features[80:], 80)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.mean([one == other for one, other in zip(said, texts[80:], strict=True)]) > 0.9
    assert any("aa" in text for text in texts[80:])


def _noisy(count: int, seed: int, spread: float) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(features (n, 3), labels (n,)) of three classes around corners."""
    labels = np.arange(count) % 3
    drawn = np.random.default_rng(seed).normal(size=(count, 3)) * spread
    return drawn + 5 + np.eye(3)[labels], labels


def test_few_shots_are_nearest_class_means_of_ten_draws() -> None:
    """Against scikit-learn, on the images that are drawn; those of one shot are among those of two."""
    from sklearn.neighbors import NearestCentroid

    features, labels = _noisy(24, 0, 0.5)
    asked, truth = _noisy(45, 1, 0.5)
    drawn = {shots: list(few_shots._drawn(labels, np.arange(24), shots, 10)) for shots in (1, 2)}
    assert all((one == two[:, :1]).all() for one, two in zip(drawn[1], drawn[2], strict=True))
    expected = []
    for images in (draw.numpy().flatten() for draw in drawn[2]):
        assert len(set(images)) == 6 and labels[images].tolist() == [0, 0, 1, 1, 2, 2]
        centre = features[images].mean(axis=0)
        known, new = (
            of / np.linalg.norm(of, axis=1)[:, None] for of in (features[images] - centre, asked - centre)
        )
        expected.append(NearestCentroid().fit(known, labels[images]).predict(new) == truth)
    score = few_shots.few_shots("2-shot", _rows(features, labels), _rows(asked, truth))
    np.testing.assert_allclose(score.values, np.mean(expected, axis=0))
    assert 0.4 < score.value < 1 and score.retrained is not None
    # Two of eight images: any two draws share a quarter, so the error is that of s^2 (1/10 + 1/3).
    levels = np.mean(expected, axis=1)
    assert score.retrained.std(ddof=1) == pytest.approx(levels.std(ddof=1) * (13 / 30) ** 0.5)
    assert score.retrained.mean() == pytest.approx(score.value)


def test_shots_are_those_that_the_smallest_class_allows_twice() -> None:
    """With groups, of a class's groups; a draw takes no two images of one group."""
    labels = np.array([0] * 8 + [1] * 20)
    data = ClassSet(ImageSet([""] * 28, lambda _: Image.new("RGB", (2, 2)), "x"), labels, ("a", "b"))
    benchmark = classification("c/x", data, data, QUICK)
    assert benchmark.names == ["kNN", "linear", "1-shot", "2-shot", "4-shot"]
    assert len(benchmark.notes) == 1 and "has 8 training images" in benchmark.notes[0]
    groups = np.arange(28) // 2
    of_groups = replace(data, images=replace(data.images, groups=groups))
    assert classification("c/x", of_groups, data, QUICK).names[-1] == "2-shot"
    for images in few_shots._drawn(labels, groups, 2, 10):
        assert all(len(set(groups[of_class])) == 2 for of_class in images.numpy())
    parts = {part: {"pooled": torch.randn(28, 4), "mean": torch.randn(28, 4)} for part in ("train", "test")}
    names = [score.name for score in benchmark.scores(parts, ["1-shot", "4-shot"])]
    assert names == ["1-shot", "4-shot"]
