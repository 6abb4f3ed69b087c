"""The benchmarks of a command line: `KIND=SOURCE[,key=value...]`, or the name of a built-in data set."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds.evals.benchmarks import class_sets, dense_sets, objects, retention, retrieval, word_sets
from visft_ds.evals.benchmarks.dense import Dense
from visft_ds.evals.benchmarks.objects import Objects
from visft_ds.evals.benchmarks.probes import Probe
from visft_ds.evals.benchmarks.protocol import Benchmark
from visft_ds.evals.benchmarks.retention import AnswersKept
from visft_ds.evals.benchmarks.retrieval import Retrieval
from visft_ds.evals.benchmarks.words import Words
from visft_ds.evals.benchmarks.zero_shot import ZeroShot

Options = Mapping[str, str]


@dataclass(frozen=True)
class Kind:
    """Kind of benchmark: its constructor, its options and their help text."""

    make: Callable[[str, str, Options], Benchmark]  #: (label, source, options)
    options: tuple[str, ...]
    help: str


def _zero_shot(label: str, source: str, options: Options) -> Benchmark:
    return ZeroShot(label, class_sets.read_classes(source, options.get("split")))


def _probe(label: str, source: str, options: Options) -> Benchmark:
    return Probe(label, *class_sets.read_train_and_test(source, options.get("train"), options.get("split")))


def _retrieval(label: str, source: str, options: Options) -> Benchmark:
    return Retrieval(label, retrieval.read_captions(source, options.get("split")))


def _objects(label: str, source: str, options: Options) -> Benchmark:
    train, test = objects.read_train_and_test(source, options.get("split"), options.get("train"))
    return Objects(label, test, train)


def _dense(label: str, source: str, options: Options) -> Benchmark:
    train, test = dense_sets.read_train_and_test(source, options.get("train"), options.get("split"))
    if "only" not in options:
        return Dense(label, train, test)
    return Dense(label, train, dense_sets.only_objects(test, options["only"].split("+")), only_objects=True)


def _ocr(label: str, source: str, options: Options) -> Benchmark:
    characters = options.get("characters", word_sets.CHARACTERS[0])
    return Words(label, *word_sets.read_train_and_test(source, options.get("train"), options.get("split"), characters))


def _retention(label: str, source: str, options: Options) -> Benchmark:
    return AnswersKept(label, retention.read_images(source))


KINDS: Mapping[str, Kind] = {
    "zero_shot": Kind(_zero_shot, ("split", "name"), "classes by text similarity: folders, ImageNet's family, shards"),
    "probe": Kind(_probe, ("split", "train", "name"), "kNN, linear probe and few-shot on frozen features"),
    "retrieval": Kind(_retrieval, ("split", "name"), "captions: COCO, Karpathy's JSON, Flickr30k"),
    "objects": Kind(_objects, ("split", "train", "name"), "names of boxed objects: COCO tree, or FILE.json:IMAGES"),
    "dense": Kind(
        _dense,
        ("split", "train", "only", "name"),
        "segmentation and objects by patches: COCO, shards, ADE20k, VOC, CamVid; only=A+B: these objects are judged",
    ),
    "retention": Kind(_retention, ("name",), "answers of the first model's own classifier that stay: any images"),
    "ocr": Kind(_ocr, ("split", "train", "name", "characters"), "words read by a small head: ICDAR, mmocr, MJSynth"),
}


def parse_benchmark(text: str) -> Benchmark:
    """Read one benchmark of a command line; opens its data set, so far as to know what there is.

    Raises:
        ValueError: an unknown kind or key (with the nearest one), or whatever is wrong with the data set.
    """
    if text in class_sets.BUILT_IN:
        text = f"probe={text}"
    name, equals, rest = text.partition("=")
    if name not in KINDS or not equals or not rest:
        near = difflib.get_close_matches(name, [*KINDS, *class_sets.BUILT_IN], n=1)
        raise ValueError(
            f"--benchmark {text}: give KIND=SOURCE[,key=value] with a kind of {', '.join(KINDS)}; or one of "
            f"{', '.join(class_sets.BUILT_IN)}" + (f". Did you mean {near[0]}?" if near and near[0] != name else "")
        )
    kind = KINDS[name]
    source, *pairs = rest.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := [key for key, value in options.items() if key not in kind.options or not value]:
        near = difflib.get_close_matches(unknown[0], kind.options, n=1)
        raise ValueError(
            f"--benchmark {text}: {unknown[0]!r} is no setting of {name}; allowed: {', '.join(kind.options)}"
            + (f". Did you mean {near[0]}?" if near and near[0] != unknown[0] else "")
        )
    return kind.make(label_of(text), source, options)


def label_of(text: str) -> str:
    """Name of a benchmark of a command line, which is not opened."""
    name, _, rest = text.partition("=")
    source, *pairs = rest.split(",")
    options = dict(pair.partition("=")[::2] for pair in pairs)
    return f"{name}/{options.get('name') or Path(source.rpartition(':')[2]).name}"


def parse_benchmarks(texts: Sequence[str]) -> list[Benchmark]:
    """All benchmarks of a command line.

    Raises:
        ValueError: as `parse_benchmark`; also where two would have the same name.
    """
    found = [parse_benchmark(text) for text in texts]
    labels = [benchmark.label for benchmark in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two benchmarks are called {twice[0]}: give one of them another name, as in ...,name=NAME")
    return found


def check_numbers(names: Sequence[str], benchmarks: Sequence[Benchmark]) -> None:
    """Raise ValueError for the name of a number that is of none of the benchmarks."""
    for name in names:
        if not any(name.startswith(f"{benchmark.label} ") for benchmark in benchmarks):
            labels = ", ".join(f"{benchmark.label} ..." for benchmark in benchmarks)
            raise ValueError(f"{name!r} is no number of these benchmarks, whose names begin with {labels}")


def averages(benchmarks: Sequence[Benchmark]) -> dict[str, list[str]]:
    """Rows that are means over data sets: zero-shot top-1 over ImageNet and its relatives."""
    family = [each.label for each in benchmarks if isinstance(each, ZeroShot) and each.data.family == "imagenet"]
    if len(family) < 2:
        return {}
    return {f"zero_shot/mean of {len(family)} top1": [f"{label} top1" for label in family]}
