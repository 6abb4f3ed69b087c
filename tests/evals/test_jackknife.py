"""Intervals of changes: those of Student's t for a mean, none where images differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from visft_ds.data.shards import Manifest
from visft_ds.evals import jackknife
from visft_ds.evals.compare import Evaluation
from visft_ds.evals.jackknife import changes


@pytest.fixture(autouse=True)
def mean_score(monkeypatch: pytest.MonkeyPatch, split: Manifest) -> None:
    """A task whose number is a mean over the images of its truth: for that, the jackknife is known exactly."""

    def measure(truth: list[int], results: list[dict[str, Any]], *_: object) -> dict[str, float]:
        assert [one["image_id"] for one in results] == truth
        return {"box/AP": float(np.mean([one["score"] for one in results])), "box/APl": -1.0}

    ids = split.index["image_id"]
    task = SimpleNamespace(truth=lambda _, places: ids[list(places)].tolist(), measure=measure)
    monkeypatch.setattr(jackknife, "TASKS", {"detection": task})
    monkeypatch.setattr(jackknife, "PARTS", 4)


def _evaluation(folder: Path, manifest: Manifest, scores: list[float], **data: Any) -> Evaluation:
    folder.mkdir()
    box = {"category_id": 1, "bbox": [0, 0, 1, 1]}
    pairs = zip(manifest.index["image_id"].tolist(), scores, strict=False)
    results = [{"image_id": image_id, "score": score, **box} for image_id, score in pairs]
    (folder / "detection_results.json").write_text(json.dumps(results))
    metrics = {"box/AP": float(np.mean(scores)), "box/APl": -1.0}
    given = {"images": len(scores), "fingerprint": manifest.fingerprint, **data}
    of = {key: value for key, value in given.items() if value is not None}
    return Evaluation(folder.name, folder, {"metrics": metrics, "data": of})


@pytest.mark.parametrize("most", [1000, 8])
def test_of_a_mean_it_is_the_t_interval_of_the_parts(
    most: int, split: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jackknife, "MOST_IMAGES", most)
    old, new = np.random.default_rng(0).uniform(0, 1, (2, 12))
    first, last = (_evaluation(tmp_path / name, split, s.tolist()) for name, s in (("old", old), ("new", new)))
    found = changes(first, last, split)
    assert list(found) == ["box/AP"], "a number that no image has is left out"
    used = min(most, 12)
    parts = [(new - old)[part:used:4].mean() for part in range(4)]
    expected = stats.ttest_1samp(parts, 0).confidence_interval(0.95)
    change, margin = (new - old).mean(), (expected.high - expected.low) / 2 * math.sqrt(used / 12)
    assert found["box/AP"].value == pytest.approx(change)
    assert (found["box/AP"].low, found["box/AP"].high) == pytest.approx((change - margin, change + margin))


def test_the_same_predictions_have_changed_nothing(split: Manifest, tmp_path: Path) -> None:
    pair = [_evaluation(tmp_path / name, split, [0.5] * 12) for name in ("a", "b")]
    assert not changes(*pair, split)["box/AP"].sure


@pytest.mark.parametrize(
    ("count", "data", "said"),
    [
        (11, {}, "a and b were not judged on the same images"),
        (12, {"fingerprint": "other"}, "the same images"),
        (12, {"fingerprint": None}, "the same images"),  # of a run whose images are not here
    ],
)
def test_other_images_are_refused(count: int, data: dict[str, Any], said: str, split: Manifest, tmp_path: Path) -> None:
    first = _evaluation(tmp_path / "a", split, [0.5] * 12)
    with pytest.raises(ValueError, match=said):
        changes(first, _evaluation(tmp_path / "b", split, [0.5] * count, **data), split)


def test_few_images_are_refused(split: Manifest, tmp_path: Path) -> None:
    pair = [_evaluation(tmp_path / name, split, [0.5] * 7) for name in ("a", "b")]
    with pytest.raises(ValueError, match="7 images are too few, 8 are needed"):
        changes(*pair, split)
