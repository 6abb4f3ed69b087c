"""A model and a data set -> scores of single items, kept on disk under a hash of what they depend on.

Several processes share the folder: each makes its share of all results and reads those of the others. A
killed command has lost what it was at: one data set by one model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from visft_ds import distributed
from visft_ds.errors import RankError
from visft_ds.evals.judge.benchmark import Benchmark, Score
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings, encode, groups
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.files import write_text, writing
from visft_ds.monitor.console import gauge

VERSION = 6  #: changes when the same model and data would give other scores
_Result = TypeVar("_Result")
Named = dict[str, Score]  #: full name of a number -> its score


def shared(calls: Sequence[Callable[[bool], _Result]], what: str) -> list[_Result]:
    """Results of calls that keep them on disk; each is made by one of the processes.

    Args:
        calls: given True, to make what is not there; given False, to wait until another process has made it.
        what: is made, for the line that shows how many are there.
    """
    made: dict[int, _Result] = {}
    with gauge(what, len(calls), "results") as bar:
        try:
            for number in range(distributed.rank(), len(calls), distributed.world_size()):
                made[number] = calls[number](True)
                bar.update()
        except ValueError as error:
            raise RankError(str(error)) from error  # the others, which wait, do not meet it
        for number, call in enumerate(calls):
            if number not in made:
                made[number] = call(False)
                bar.update()
    return [made[number] for number in range(len(calls))]


def remembered(
    key: Mapping[str, Any], settings: Settings, make: Callable[[], _Result], own: bool | None = None
) -> _Result:
    """Result of `make`, in JSON's types, computed once for the same key.

    Args:
        own: it is made here if it is not there, and otherwise by another process; None: by the main process.
    """
    path = settings.cache / f"{_hash(key, settings)}.json"
    if own is None:
        own = distributed.is_main()
    if own and not path.is_file():
        write_text(path, json.dumps(make()))
    result: _Result = json.loads(_present(path).read_text(encoding="utf-8"))
    return result


@dataclass(frozen=True)
class Work:
    """A model to score on a data set."""

    spec: ModelSpec
    benchmark: Benchmark
    blocks: Mapping[str, int]  #: of the model; bytes of an image's map after each
    numbers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  #: block -> numbers


def score(work: Work, load: Callable[..., Encoder], settings: Settings, own: bool) -> dict[str, Named]:
    """Block -> the numbers of a model that are asked of it. Images are encoded once for all blocks that fit.

    Args:
        load: (blocks) -> the model, read after them; of several, names of features begin with `BLOCK `.
        own: see `remembered`.

    Raises:
        ValueError: an image that cannot be read, features that are NaN.
    """
    benchmark = work.benchmark
    model = {"of": work.spec.identity}
    if benchmark.asks_classifier:
        model["classifier"] = (work.spec.origin or work.spec).identity
    data = {name: images.fingerprint for name, images in benchmark.sets.items()}
    key = {"model": model, "images": data, "benchmark": benchmark.settings}
    paths: dict[str, Path] = {}
    missing: dict[str, int] = {}
    for block, numbers in work.numbers.items():
        hashed = _hash({**key, "block": block, "numbers": sorted(numbers)}, settings)
        paths[block] = settings.cache / f"{hashed}.npz"
        if own and not paths[block].is_file():
            missing[block] = work.blocks[block]
    if benchmark.published is not None:
        for block in missing:
            scores = benchmark.published(load(block), settings, work.numbers[block])
            _save(paths[block], scores, work.numbers[block])
    else:
        images = sum(map(len, benchmark.sets.values()))
        what = f"{work.spec.label}: {benchmark.label}"
        for blocks in groups(missing, images):
            features = encode(load(*blocks), blocks, benchmark, settings, what)
            for block in blocks:
                scores = benchmark.scores(features[block], work.numbers[block])
                _save(paths[block], scores, work.numbers[block])
    return {block: _load(_present(path), benchmark) for block, path in paths.items()}


def _present(path: Path) -> Path:
    """The same path, once a process has written it; a process that fails ends them all."""
    while not path.is_file():
        time.sleep(0.5)
    return path


def _hash(key: Mapping[str, Any], settings: Settings) -> str:
    """A name for what depends on these things, and on how models are run."""
    whole = {**key, "version": VERSION, "precision": settings.precision, "device": settings.device.type}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:24]


def _save(path: Path, scores: Iterable[Score], names: Collection[str]) -> None:
    """Write an archive of the scores of these names, whose arrays are called `NUMBER/values` and so on."""
    arrays: dict[str, Any] = {}
    for score in scores:
        if score.name in names:
            assert np.isfinite(score.values).all() and len(score.values), score.name
            parts = {part: array for part, array in vars(score).items() if array is not None}
            name = parts.pop("name")
            arrays |= {f"{name}/{part}": array for part, array in parts.items()}
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


def _load(path: Path, benchmark: Benchmark) -> Named:
    """Full name -> score, whose items belong to the groups of their images."""
    arrays: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            name, _, part = key.rpartition("/")
            arrays.setdefault(name, {})[part] = file[key]
    scores: Named = {}
    groups_of_images = benchmark.sets["test"].groups
    for name, parts in arrays.items():
        if groups_of_images is not None:
            owners = parts.get("groups")
            parts["groups"] = groups_of_images if owners is None else groups_of_images[owners]
        scores[f"{benchmark.label} {name}"] = Score(name, **parts)
    return scores
