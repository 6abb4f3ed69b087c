"""The benchmarks of a command line: `KIND=SOURCE[,key=value...]`, or `digits`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from visft_ds.evals.benchmarks import classes, dense_sets, objects, ocr, retention, retrieval
from visft_ds.evals.benchmarks.dense import Dense
from visft_ds.evals.benchmarks.probes import Probe
from visft_ds.evals.benchmarks.protocol import Benchmark
from visft_ds.evals.benchmarks.zero_shot import ZeroShot

Options = Mapping[str, str]


def _zero_shot(label: str, source: str, options: Options) -> Benchmark:
    return ZeroShot(label, classes.read_classes(source, options.get("split")))


def _probe(label: str, source: str, options: Options) -> Benchmark:
    return Probe(label, *classes.read_train_and_test(source, options.get("train"), options.get("split")))


def _retrieval(label: str, source: str, options: Options) -> Benchmark:
    return retrieval.Retrieval(label, retrieval.read_captions(source, options.get("split")))


def _objects(label: str, source: str, options: Options) -> Benchmark:
    train, test = objects.read_train_and_test(source, options.get("train"), options.get("split"))
    return objects.Objects(label, test, train)


def _dense(label: str, source: str, options: Options) -> Benchmark:
    return Dense(label, *dense_sets.read_train_and_test(source, options.get("train"), options.get("split")))


def _ocr(label: str, source: str, options: Options) -> Benchmark:
    return ocr.Words(label, ocr.read_words(Path(source) / "train"), ocr.read_words(Path(source) / "test"))


def _retention(label: str, source: str, options: Options) -> Benchmark:
    return retention.AnswersKept(label, retention.read_images(source))


#: Kind -> (its constructor of label, source and options; keys of its options). `evals.cli` describes them.
KINDS: Mapping[str, tuple[Callable[[str, str, Options], Benchmark], tuple[str, ...]]] = {
    "zero_shot": (_zero_shot, ("split", "name")),
    "probe": (_probe, ("split", "train", "name")),
    "retrieval": (_retrieval, ("split", "name")),
    "objects": (_objects, ("split", "train", "name")),
    "dense": (_dense, ("split", "train", "name")),
    "retention": (_retention, ("name",)),
    "ocr": (_ocr, ("name",)),
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
    return make(f"{name}/{options.get('name') or Path(source).name}", source, options)


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
