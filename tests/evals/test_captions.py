"""Captions of judged towers: CIDEr-D by hand and by domain, the forms of data sets, and a run's own head."""

from __future__ import annotations

import json
from math import exp, sqrt
from pathlib import Path

import pytest
from PIL import Image

from tests import finished
from tests.golden.judge import record_in, run
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.evals.judge.captions import CaptionedSet, read_captioned
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.toy.coco import write_toy_coco


def _values(references: list[list[str]], captions: list[str], domains: list[str]) -> dict[str, list[float]]:
    images = ImageSet([""] * len(captions), lambda _: Image.new("RGB", (2, 2)), "")
    data = CaptionedSet(images, tuple(map(tuple, references)), tuple(domains))
    return {score.name: score.values.tolist() for score in data.scores(captions)}


def test_cider_d_by_hand() -> None:
    """Of two words there is no n-gram of order 3 or 4, so that a perfect caption has half of 10."""
    found = _values([["a b"], ["c d"]], ["a b", "a d"], ["", ""])
    assert found == {"CIDEr-D": pytest.approx([5.0, 10 / 4 * 1 / 2])}
    # Too long by one: eq. 4 of the paper, with sigma 6; a repeated word counts as often as in the reference.
    found = _values([["a b"], ["c d"]], ["a b b", ""], ["", ""])
    expected = 10 / 4 * exp(-1 / 72) * (2 / (sqrt(5) * sqrt(2)) + 1 / sqrt(2))
    assert found["CIDEr-D"] == pytest.approx([expected, 0.0])


def test_a_domain_counts_words_over_its_own_images() -> None:
    """A word of both images of a domain says nothing there; of two in four it weighs half of a rare one."""
    references = [["x a"], ["x c"], ["d e"], ["f g"]]
    found = _values(references, ["x b", "x c", "d e", "f g"], ["near", "near", "out", "out"])
    assert list(found) == ["CIDEr-D", "CIDEr-D (near)", "CIDEr-D (out)"]
    assert found["CIDEr-D"][0] == pytest.approx(10 / 4 * 1 / 5)
    assert found["CIDEr-D (near)"] == pytest.approx([0.0, 5.0])
    assert found["CIDEr-D (out)"] == pytest.approx([5.0, 5.0])


def test_the_form_of_nocaps(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / name)
    images = [
        {"id": 0, "file_name": "1.jpg", "domain": "in-domain"},
        {"id": 1, "file_name": "2.jpg", "domain": "out-domain"},
    ]
    captions = [{"image_id": image, "caption": f"a {n}"} for image in (0, 1) for n in range(10)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}))
    data = read_captioned(str(tmp_path), None)
    assert list(data.images.names) == ["images/1.jpg", "images/2.jpg"] and len(data.references[0]) == 10
    assert [number.name for number in data.parts][1:] == ["CIDEr-D (in-domain)", "CIDEr-D (out-domain)"]
    with pytest.raises(ValueError, match="give vlm=FOLDER"):
        parse_benchmark(f"caption={tmp_path}", QUICK)
    path.write_text(json.dumps({"images": images, "annotations": captions[:10]}))
    with pytest.raises(ValueError, match="1 images have no caption"):
        read_captioned(str(tmp_path), None)


@pytest.mark.slow
def test_the_head_of_a_run_reads_each_tower(tmp_path: Path) -> None:
    write_toy_coco(tmp_path / "toy", train=1, val=6, height=56, width=56)
    runs = finished.runs()
    words = ["--primary", "caption/toy CIDEr-D", "--layers", "last", "--quick", "--out", tmp_path / "out"]
    models = [f"base={runs}/stage1", f"tuned={runs}/stage2"]
    status, _, errors = run(*models, "--on", f"caption={tmp_path}/toy,head={runs}/stage1", *words)
    assert status == 0, errors
    (row,) = record_in(tmp_path / "out")["rows"]
    assert row["items"] == 6
