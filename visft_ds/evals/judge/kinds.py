"""The benchmarks of a command line: `KIND=SOURCE[,key=value...]`, or `digits`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from visft_ds.evals.judge import classes, dense_sets, objects
from visft_ds.evals.judge.dense import dense
from visft_ds.evals.judge.objects import grounding
from visft_ds.evals.judge.ocr import ocr, read_words
from visft_ds.evals.judge.probes import probe
from visft_ds.evals.judge.protocol import Benchmark
from visft_ds.evals.judge.retention import read_images, retention
from visft_ds.evals.judge.retrieval import read_captions, retrieval

Make = Callable[[str, str, str | None, str | None], Benchmark]  #: of label, source, part to train on, part to judge

#: Kind -> (what makes it, keys of its options). `evals.cli` describes them.
KINDS: Mapping[str, tuple[Make, tuple[str, ...]]] = {
    "zero_shot": (
        lambda label, at, _, split: classes.zero_shot(label, classes.read_classes(at, split)),
        ("split", "name"),
    ),
    "probe": (lambda label, *at: probe(label, *classes.read_train_and_test(*at)), ("split", "train", "name")),
    "retrieval": (lambda label, at, _, split: retrieval(label, read_captions(at, split)), ("split", "name")),
    "objects": (lambda label, *at: grounding(label, *objects.read_train_and_test(*at)), ("split", "train", "name")),
    "dense": (lambda label, *at: dense(label, *dense_sets.read_train_and_test(*at)), ("split", "train", "name")),
    "retention": (lambda label, at, *_: retention(label, read_images(at)), ("name",)),
    "ocr": (lambda label, at, *_: ocr(label, read_words(Path(at, "train")), read_words(Path(at, "test"))), ("name",)),
}


def parse_benchmark(text: str) -> Benchmark:
    """Read one benchmark of a command line; opens its data set, so far as to know what there is.

    Raises:
        ValueError: an unknown kind or key, or whatever is wrong with the data set.
    """
    name, _, rest = (f"probe={text}" if text == classes.DIGITS else text).partition("=")
    if name not in KINDS or not rest:
        raise ValueError(f"--benchmark {text}: give KIND=SOURCE[,key=value] with a kind of {', '.join(KINDS)}")
    make, allowed = KINDS[name]
    source, *pairs = rest.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := [key for key, value in options.items() if key not in allowed or not value]:
        raise ValueError(f"--benchmark {text}: {unknown[0]!r} is no setting of {name}; allowed: {', '.join(allowed)}")
    label = f"{name}/{options.get('name') or Path(source).name}"
    return make(label, source, options.get("train"), options.get("split"))


def parse_benchmarks(texts: Sequence[str], primary: str | None = None) -> list[Benchmark]:
    """All benchmarks of a command line.

    Raises:
        ValueError: as `parse_benchmark`; also if two have the same name, or none has the primary number.
    """
    found = [parse_benchmark(text) for text in texts]
    labels = [benchmark.label for benchmark in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two benchmarks are called {twice[0]}: give one of them another name, as in ...,name=NAME")
    numbers = [f"{benchmark.label} {number}" for benchmark in found for number in benchmark.numbers]
    if primary is not None and primary not in numbers:
        raise ValueError(f"--primary {primary}: no such number; there are {', '.join(numbers)}")
    return found
