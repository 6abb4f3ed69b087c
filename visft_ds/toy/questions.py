"""Questions about drawings with true answers, in VQAv2's form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from visft_ds.toy.scenes import Scene, Shape
from visft_ds.toy.styles import Style

PEOPLE = 10  #: who answer each question, here all alike
_APART = 0.15  # of the image's width, the least distance of what is left or right of something


class Asked(NamedTuple):
    """Question with its answer."""

    kind: str  #: count, colour, shape, there or relation
    question: str
    answer: str


def with_article(words: str) -> str:
    """`a star`, `an hourglass`."""
    vowel = words[0] in "aeiou" or words.startswith("hour")
    return f"an {words}" if vowel else f"a {words}"


def ask(rng: np.random.Generator, scene: Scene, style: Style) -> list[Asked]:
    """Questions about a scene, at most one of each kind, two of colours.

    Which answer "is there" gets is drawn before its shape: words alone say nothing about it. Crowds of tiny
    shapes are hard to count and to name, so scenes with one are asked about colours and shapes alone.
    """
    crowded: set[str] = set()
    if scene.crowd is not None:
        crowded = {scene.crowd.category, scene.crowd.colour}
    counts = Counter(shape.category for shape in scene.shapes)
    single = []
    for shape in scene.shapes:
        if counts[shape.category] == 1 and shape.category not in crowded:
            single.append(shape)
    asked = []
    for shape in single[:2]:
        asked.append(Asked("colour", f"What colour is the {shape.category}?", shape.colour))
    colours = Counter(shape.colour for shape in scene.shapes)
    for shape in scene.shapes:
        if colours[shape.colour] == 1 and shape.colour not in crowded:
            asked.append(Asked("shape", f"Which shape is {shape.colour}?", shape.category))
            break
    if scene.crowd is not None:
        return asked
    asked.append(Asked("count", "How many shapes are there?", str(len(scene.shapes))))
    asked.append(_is_there(rng, list(counts), style.categories))
    asked += _beside(rng, single, scene.shapes)
    return asked


def _is_there(rng: np.random.Generator, present: Sequence[str], categories: Sequence[str]) -> Asked:
    absent = [name for name in categories if name not in present]
    is_there = bool(present) and (not absent or rng.random() < 0.5)
    names = present if is_there else absent
    name = names[int(rng.integers(len(names)))]
    return Asked("there", f"Is there {with_article(name)}?", "yes" if is_there else "no")


def _beside(rng: np.random.Generator, single: Sequence[Shape], shapes: Sequence[Shape]) -> list[Asked]:
    """A question about what is left or right of a shape, if that is one shape and clearly so."""
    if len(single) < 2:
        return []
    anchor = single[int(rng.integers(len(single)))]
    side = ("left", "right")[int(rng.integers(2))]
    there = []
    for shape in shapes:
        if shape is anchor:
            continue
        distance = shape.middle[0] - anchor.middle[0]
        if abs(distance) < _APART:
            return []  # nobody could say where it is
        if (distance < 0) == (side == "left"):
            there.append(shape)
    if len(there) != 1:
        return []
    return [Asked("relation", f"What is {side} of the {anchor.category}?", there[0].category)]


def entries(image_id: int, asked: Sequence[Asked]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(questions, annotations) of an image, as VQAv2's files list them."""
    questions = []
    annotations = []
    for number, (kind, question, answer) in enumerate(asked):
        ids = {"image_id": image_id, "question_id": 1000 * image_id + number}
        questions.append({**ids, "question": question})
        answers = []
        for person in range(1, PEOPLE + 1):
            answers.append({"answer": answer, "answer_confidence": "yes", "answer_id": person})
        kinds = {"question_type": kind, "answer_type": kind}
        annotations.append({**ids, **kinds, "multiple_choice_answer": answer, "answers": answers})
    return questions, annotations
