"""The arms of a comparison, as a command line names them: a model, or seeds of one recipe.

    MODEL                            one model, as `models` reads it
    LABEL=MODEL,MODEL,MODEL          one arm: trainings that differ by their seed

What stands behind the last model of a list counts for those without an end of their own:
LABEL=RUN1,RUN2#blocks.5@0.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visft_ds.evals.benchmarks.models import LABEL, ModelSpec, parse_model

_NUMBER = r"[-+]?[0-9.]+(?:e[-+]?[0-9]+)?"
_ENDS = re.compile(rf"(.+?)((?:#[^#@]+)?(?:@{_NUMBER})?)")


@dataclass(frozen=True)
class Contender:
    """Arm of a comparison: one model, or several that differ by the seed of their training."""

    label: str
    models: tuple[ModelSpec, ...]


def parse_arms(texts: Sequence[str]) -> list[Contender]:
    """All arms of a command line; files are looked for, not opened.

    Raises:
        ValueError: as `parse_model`; also for a list without label, two arms or models of one
            name, and numbers of seeds that cannot be paired with those of the first arm.
    """
    arms = [_arm(text) for text in texts]
    labels = [label for arm in arms for label in {arm.label, *(model.label for model in arm.models)}]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two models are called {twice[0]}: give one of them a label, as in LABEL={twice[0]}...")
    first = len(arms[0].models)
    for arm in arms:
        if 1 != len(arm.models) != first != 1:
            raise ValueError(
                f"{arm.label} has {len(arm.models)} seeds and {arms[0].label}, which it is compared with, {first}: "
                f"give as many, in the same order, or one"
            )
    return arms


def _arm(text: str) -> Contender:
    match = LABEL.fullmatch(text)
    listed = (match[2] if match else text).split(",")
    if len(listed) == 1 or Path(",".join(listed)).exists():
        model = parse_model(text)
        return Contender(model.label, (model,))
    if match is None:
        raise ValueError(f"--model {text}: several models are one arm; give it a name, as in NAME={text}")
    if not all(listed):
        raise ValueError(f"--model {text}: a model of the list is empty")
    label, end = match[1].strip(), _end_of(listed[-1])
    paths = [path if _end_of(path) else path + end for path in listed]
    models = [replace(parse_model(path), label=f"{label} {number}") for number, path in enumerate(paths, 1)]
    return Contender(label, tuple(models))


def _end_of(text: str) -> str:
    """End of a model behind its path: where it is read, and the scale of its adapter."""
    match = None if Path(text).exists() else _ENDS.fullmatch(text)
    return match[2] if match else ""
