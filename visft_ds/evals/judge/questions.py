"""Questions about images with true answers.

| form | files, in the folder or one below |
|---|---|
| VQAv2, OK-VQA, drawings of visft toy | `*OpenEnded*_questions.json`, `*_annotations.json` |
| GQA | `train_balanced_questions.json`, `val_balanced_questions.json`, `testdev_balanced_questions.json` |

Images are below the folder, called by their ids: `train2014/COCO_train2014_000000000009.jpg`,
`train2017/000000000009.jpg`, `images/2370799.jpg`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from visft_ds.evals.judge.benchmark import ImageSet, IntArray
from visft_ds.evals.judge.images import digest, every, from_files, read_json
from visft_ds.evals.judge.vqa_accuracy import accuracy, normalised
from visft_ds.files import checked_name, reading

#: Images that are read of a split; of more every k-th.
MOST = {"train": 2000, "test": 1000}
_SPLIT = re.compile(r"(?<![a-z])(train|val|testdev|test)(\d{4})?(?![a-z])")
_TESTS = ("val", "testdev", "test")  # that are judged, the first one that is there


@dataclass(frozen=True)
class Question:
    """Question about an image."""

    text: str
    answers: tuple[str, ...]  #: of ten people; or the only true one
    kind: str  #: as the data name it: "yes/no", "number", "other"; "query", ...; "colour", ...

    @property
    def answer(self) -> str:
        """The most frequent answer, in its usual form."""
        return Counter(map(normalised, self.answers)).most_common(1)[0][0]

    @property
    def words(self) -> list[str]:
        """Its words, in lower case."""
        return re.findall(r"[a-z0-9']+", self.text.lower())


@dataclass(frozen=True)
class QuestionSet:
    """Images and questions about them."""

    images: ImageSet
    questions: tuple[Question, ...]
    owners: IntArray  #: (questions,) numbers of their images

    @property
    def fingerprint(self) -> str:
        """Other questions or answers, other fingerprint."""
        return digest([repr(self.questions), repr(self.owners.tolist())])


def read_questions(
    source: str, train: str | None = None, test: str | None = None
) -> tuple[QuestionSet, QuestionSet]:
    """(questions that teach, questions that are judged) of a data set in one of the forms above.

    Raises:
        ValueError: no such files or split, another content, or images that are not there.
    """
    root = Path(source)
    files = _files(root)
    train = train or "train"
    test = test or next((name for name in _TESTS if name in files), _TESTS[0])
    if train == test or train not in files or test not in files:
        raise ValueError(
            f"{source}: no questions with answers of {train} and {test}, two splits; "
            f"it has those of {', '.join(files) or 'none'} (*_questions.json, *_annotations.json)"
        )
    return _read(root, files[train], MOST["train"]), _read(root, files[test], MOST["test"])


def words_alone(train: QuestionSet, test: QuestionSet) -> float:
    """Accuracy of the most frequent answer of training to the same words, or else to all: without images."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in train.questions:
        answers[" ".join(question.words)][question.answer] += 1
    all_answers = Counter(question.answer for question in train.questions)
    total = 0.0
    for question in test.questions:
        known = answers.get(" ".join(question.words), all_answers)
        total += accuracy(known.most_common(1)[0][0], question.answers)
    return total / len(test.questions)


def _files(root: Path) -> dict[str, Path]:
    """Split -> its file of questions, where there are answers, too."""
    files: dict[str, Path] = {}
    for path in sorted([*root.glob("*questions.json"), *root.glob("*/*questions.json")]):
        match = _SPLIT.search(path.name)
        if match is None or (_is_vqa(path) and _annotations(path) is None):
            continue
        if match[1] in files:
            raise ValueError(
                f"{root} has several files of questions of {match[1]}: {files[match[1]].name}, {path.name}"
            )
        files[match[1]] = path
    return files


def _is_vqa(path: Path) -> bool:
    """Return True for the form of VQA, whose answers are in a file of their own."""
    return "OpenEnded" in path.name


def _annotations(questions: Path) -> Path | None:
    """The file of the answers to questions, beside these or in a folder beside theirs."""
    name = questions.name.replace("OpenEnded_", "").replace("_questions.json", "_annotations.json")
    if (questions.parent / name).is_file():
        return questions.parent / name
    return next(iter(sorted(questions.parent.parent.glob(f"*/{name}"))), None)


def _read(root: Path, path: Path, most: int) -> QuestionSet:
    questions = _of_vqa(path) if _is_vqa(path) else _of_gqa(path)
    if not questions:
        raise ValueError(f"{path} has no question with an answer")
    ids = list(questions)
    chosen = [ids[number] for number in every(len(ids), most)]
    images = from_files(_image_files(root, path, chosen), root)
    texts: list[Question] = []
    owners: list[int] = []
    for number, image in enumerate(chosen):
        texts += questions[image]
        owners += [number] * len(questions[image])
    return QuestionSet(images, tuple(texts), np.array(owners, dtype=np.int64))


def _of_vqa(path: Path) -> Mapping[str, list[Question]]:
    """Id of an image -> its questions, in VQA's form."""
    annotations = _annotations(path)
    assert annotations is not None, path
    with reading(path, "questions of VQA"):
        asked = {entry["question_id"]: entry for entry in read_json(path)["questions"]}
    questions: dict[str, list[Question]] = {}
    with reading(annotations, f"answers to {path.name}"):
        for entry in read_json(annotations)["annotations"]:
            text = str(asked[entry["question_id"]]["question"])
            answers = tuple(str(answer["answer"]) for answer in entry["answers"])
            if answers:
                question = Question(text, answers, str(entry.get("answer_type", "other")))
                questions.setdefault(str(entry["image_id"]), []).append(question)
    return questions


def _of_gqa(path: Path) -> Mapping[str, list[Question]]:
    """Id of an image -> its questions, in GQA's form."""
    questions: dict[str, list[Question]] = {}
    with reading(path, "questions of GQA"):
        for entry in read_json(path).values():
            kind = str(entry["types"]["structural"])
            question = Question(str(entry["question"]), (str(entry["answer"]),), kind)
            questions.setdefault(str(entry["imageId"]), []).append(question)
    return questions


def _image_files(root: Path, path: Path, ids: Sequence[str]) -> list[Path]:
    """The files of images by their ids, as the first one is called."""
    match = _SPLIT.search(path.name)
    assert match is not None, path
    split = match[0]
    first = ids[0]
    folders = (root / split, root / "images" / split, root / "images", root)
    for folder, start, width in product(folders, (f"COCO_{split}_", ""), (12, 0)):
        if (folder / f"{start}{first:0>{width}}.jpg").is_file():
            return [folder / checked_name(f"{start}{name:0>{width}}.jpg", path) for name in ids]
    raise ValueError(
        f"{root}: no image of {first}, such as {split}/COCO_{split}_{first:0>12}.jpg or images/{first}.jpg"
    )
