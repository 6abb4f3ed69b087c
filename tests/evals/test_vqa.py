"""Questions about images: official accuracy, the forms of data sets, and a probe that finds what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visft_ds.evals.judge import questions, vqa
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.evals.judge.questions import Question, QuestionSet, read_questions, words_alone
from visft_ds.evals.judge.vqa_accuracy import accuracy, normalised


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        ("yes", ["yes"] * 3 + ["no"] * 7, (3 * 2 / 3 + 7) / 10),
        ("no", ["yes"] * 3 + ["no"] * 7, 1.0),
        ("yes", ["yes"] * 2 + ["no"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("yes", ["yes"] + ["no"] * 9, 9 * 1 / 3 / 10),
        ("maybe", ["yes"] + ["no"] * 9, 0.0),
        ("The dogs!", ["dogs"] * 4 + ["2 dogs"] * 6, 1.0),
        ("two dogs", ["dogs"] * 4 + ["2 dogs"] * 6, 1.0),
        ("two", ["2"] * 10, 0.0),  # where all agree as they write, the script of record brings to no form
        ("2\n", ["2"] * 10, 1.0),
        ("Two", ["2"], 1.0),  # GQA has one answer
    ],
)
def test_accuracy_by_hand(answer: str, truths: list[str], expected: float) -> None:
    assert accuracy(answer, truths) == pytest.approx(expected)


def test_answers_are_normalised_as_the_script_of_record_does() -> None:
    forms = {
        "A T-shirt.": "t shirt",
        "red, blue": "red blue",
        "red/blue": "red blue",
        "1,000 (dogs)": "1000 dogs",
        "2.5": "2.5",
        "3. U.S.": "3 us",
        "12:30": "12:30",
        "None": "0",
        "ten an hour": "10 hour",
        "Dont, couldn'tve": "don't couldn't've",
        "somebody'd": "somebodyd",
        "lets": "lets",
    }
    assert {answer: normalised(answer) for answer in forms} == forms


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def _write_vqa(root: Path, start: str, split: str, image: str) -> None:
    """Two questions about the image 9."""
    asked = [{"image_id": 9, "question": f"What is {n}?", "question_id": n} for n in (1, 2)]
    answers: list[dict[str, Any]] = []
    for entry, kind in zip(asked, ("number", "other"), strict=True):
        given = [{"answer": word} for word in ["The Dog"] * 4 + ["dog"] * 3 + ["cat"] * 3]
        ids = {"image_id": 9, "question_id": entry["question_id"]}
        answers.append({**ids, "answer_type": kind, "answers": given})
    (root / f"{start}OpenEnded_{split}_questions.json").write_text(json.dumps({"questions": asked}))
    (root / f"{start}{split}_annotations.json").write_text(json.dumps({"annotations": answers}))
    _picture(root / image)


def test_forms_of_data_sets(tmp_path: Path) -> None:
    """VQAv2 and OK-VQA as they are unpacked; questions without answers (test2015) are no split."""
    for split in ("train", "val"):
        names = f"mscoco_{split}2014", f"{split}2014/COCO_{split}2014_000000000009.jpg"
        _write_vqa(tmp_path, "v2_", *names)
    (tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json").write_text("{}")
    train, test = read_questions(str(tmp_path))
    assert test.images.names == ["val2014/COCO_val2014_000000000009.jpg"] and test.owners.tolist() == [0, 0]
    assert [(q.text, q.kind, q.answer) for q in train.questions] == [
        ("What is 1?", "number", "dog"),
        ("What is 2?", "other", "dog"),
    ]
    benchmark = parse_benchmark(f"vqa={tmp_path},name=x", QUICK)
    assert benchmark.names == ["answers", "answers (number)", "answers (other)"]
    assert benchmark.notes == [
        "vqa/x: the most frequent answer of training to the same words is right in 100.0% of 2 questions."
    ]
    with pytest.raises(ValueError, match="it has those of train, val"):
        read_questions(str(tmp_path), None, "test")
    _write_vqa(tmp_path, "", "mscoco_val2014", "x.jpg")
    with pytest.raises(ValueError, match="several files of questions of val"):
        read_questions(str(tmp_path))


def test_form_of_gqa(tmp_path: Path) -> None:
    for split in ("train", "testdev"):
        entry = {"imageId": "n16", "question": "Is it?", "answer": "yes", "types": {"structural": "verify"}}
        (tmp_path / f"{split}_balanced_questions.json").write_text(json.dumps({"07": entry}))
    with pytest.raises(ValueError, match=r"no image of n16, such as train/.* or images/n16\.jpg"):
        read_questions(str(tmp_path))
    _picture(tmp_path / "images/n16.jpg")
    _, test = read_questions(str(tmp_path))
    assert test.questions == (Question("Is it?", ("yes",), "verify"),)


def _asked(count: int, seed: int) -> tuple[QuestionSet, torch.Tensor]:
    """(questions about a colour and a shape of each image, maps (n, 6, 2, 2) that hold both)."""
    rng = np.random.default_rng(seed)
    answers = {"colour": ("red", "blue"), "shape": ("star", "bar", "ring")}
    texts: list[Question] = []
    maps = rng.normal(size=(count, 6, 2, 2)) * 0.3
    for number in range(count):
        for kind, names in answers.items():
            answer = int(rng.integers(len(names)))
            texts.append(Question(f"Which {kind} is it?", (names[answer],), kind))
            channel = answer + (2 if kind == "shape" else 0)
            maps[number, channel, int(rng.integers(2)), int(rng.integers(2))] += 3
    images = ImageSet([""] * count, lambda _: Image.new("RGB", (2, 2)), str(seed))
    owners = np.repeat(np.arange(count), 2)
    return QuestionSet(images, tuple(texts), owners), torch.from_numpy(maps).float()


def test_a_probe_answers_what_the_cells_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of question by its own number; noise answers as often as words alone."""
    monkeypatch.setattr(vqa, "STEPS", 50)
    monkeypatch.setattr(vqa, "RESAMPLES", 1)
    train, train_maps = _asked(100, 0)
    test, test_maps = _asked(60, 1)
    benchmark = vqa.vqa("vqa/x", train, test)
    assert benchmark.names == ["answers", "answers (colour)", "answers (shape)"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    features = {"train": {"cells": train_maps}, "test": {"cells": test_maps}}
    scores = {score.name: score for score in benchmark.scores(features, benchmark.names)}
    assert torch.equal(torch.get_rng_state(), before)
    assert min(score.value for score in scores.values()) > 0.9
    assert len(scores["answers (shape)"].values) == 60
    assert np.array_equal(scores["answers"].groups, test.owners)
    assert scores["answers"].retrained is not None and scores["answers"].retrained[0] > 0.8
    noise = {"train": features["train"], "test": {"cells": torch.randn_like(test_maps)}}
    monkeypatch.setattr(vqa, "RESAMPLES", 0)
    (of_noise, *_) = benchmark.scores(noise, ["answers"])
    assert of_noise.value < 0.65 and 0.3 < words_alone(train, test) < 0.6


def test_more_images_than_are_read_give_every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "MOST", {"train": 2, "test": 2})
    for split in ("train", "val"):
        entries = {}
        for number in range(4):
            entry = {"imageId": str(number), "question": "?", "answer": str(number)}
            entries[f"{number}"] = {**entry, "types": {"structural": "query"}}
            _picture(tmp_path / f"images/{number}.jpg")
        (tmp_path / f"{split}_balanced_questions.json").write_text(json.dumps(entries))
    assert [question.answers for question in read_questions(str(tmp_path))[0].questions] == [("0",), ("2",)]
