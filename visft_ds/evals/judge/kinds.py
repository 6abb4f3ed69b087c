"""Data that models are judged on, as a command line names it: `KIND=SOURCE[,key=value...]`, or `digits`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from visft_ds.evals.judge import classes, dense_sets
from visft_ds.evals.judge.classification import classification
from visft_ds.evals.judge.depth import depth
from visft_ds.evals.judge.images import grouped
from visft_ds.evals.judge.kept import kept, read_images
from visft_ds.evals.judge.objects import grounding
from visft_ds.evals.judge.ocr import ocr, read_words
from visft_ds.evals.judge.protocol import Benchmark, ImageSet
from visft_ds.evals.judge.protocols import Protocol
from visft_ds.evals.judge.retrieval import read_captions, retrieval
from visft_ds.evals.judge.segmentation import segmentation
from visft_ds.settings.fields import nearest

SEGMENTATION = "segmentation"


@dataclass(frozen=True)
class Request:
    """Data set that a command line names."""

    protocol: Protocol
    label: str
    source: str
    train: str | None  #: part to learn from
    test: str | None  #: part that is judged
    groups: str | None  #: of images, see `images.grouped`
    void: int | None  #: number that means no class in label maps

    @property
    def parts(self) -> tuple[str, str | None, str | None]:
        """Source and both parts."""
        return self.source, self.train, self.test

    def grouped(self, images: ImageSet) -> ImageSet:
        """The images with their groups, if there are such."""
        return images if self.groups is None else grouped(images, self.groups)


def _segmentation(request: Request) -> Benchmark:
    learnt, held = dense_sets.read_train_and_test(request.protocol.images, *request.parts, request.void)
    train = replace(learnt, images=request.grouped(learnt.images))
    test = replace(held, images=request.grouped(held.images))
    benchmark = segmentation(request.label, train, test, request.protocol)
    return replace(benchmark, notes=[*learnt.notes, *held.notes])


def _depth(request: Request) -> Benchmark:
    learnt, held = dense_sets.read_depth(request.protocol.images, *request.parts)
    train = replace(learnt, images=request.grouped(learnt.images))
    test = replace(held, images=request.grouped(held.images))
    return depth(request.label, train, test, request.protocol)


def _classification(request: Request) -> Benchmark:
    learnt, held = classes.read_train_and_test(*request.parts)
    train = replace(learnt, images=request.grouped(learnt.images))
    test = replace(held, images=request.grouped(held.images))
    return classification(request.label, train, test, request.protocol)


def _zero_shot(request: Request) -> Benchmark:
    data = classes.read_classes(request.source, request.test)
    return classes.zero_shot(request.label, replace(data, images=request.grouped(data.images)))


def _retrieval(request: Request) -> Benchmark:
    images, captions, owners = read_captions(request.source, request.test)
    return retrieval(request.label, request.grouped(images), captions, owners)


def _objects(request: Request) -> Benchmark:
    learnt, held = dense_sets.read_objects(request.protocol.images, *request.parts)
    train = replace(learnt, images=request.grouped(learnt.images))
    test = replace(held, images=request.grouped(held.images))
    return grounding(request.label, train, test)


def _ocr(request: Request) -> Benchmark:
    folder = Path(request.source)
    return ocr(request.label, read_words(folder / "train"), read_words(folder / "test"))


def _kept(request: Request) -> Benchmark:
    return kept(request.label, request.grouped(read_images(request.source)))


_ALL = ("split", "train", "groups", "name")
#: Kind -> (what makes it, keys of its options). `evals.cli` describes them.
KINDS: dict[str, tuple[Callable[[Request], Benchmark], tuple[str, ...]]] = {
    SEGMENTATION: (_segmentation, (*_ALL, "void")),
    "depth": (_depth, _ALL),
    "classification": (_classification, _ALL),
    "zero_shot": (_zero_shot, ("split", "groups", "name")),
    "retrieval": (_retrieval, ("split", "groups", "name")),
    "objects": (_objects, _ALL),
    "ocr": (_ocr, ("name",)),
    "kept": (_kept, ("groups", "name")),
}


def parse_benchmark(text: str, protocol: Protocol) -> Benchmark:
    """Read one --on of a command line; opens its data set, so far as to know what there is.

    Raises:
        ValueError: an unknown kind or key, or whatever is wrong with the data set.
    """
    name, _, rest = (f"classification={text}" if text == classes.DIGITS else text).partition("=")
    if name not in KINDS or not rest:
        raise ValueError(f"--on {text}: give KIND=SOURCE[,key=value] with a kind of {', '.join(KINDS)}")
    make, allowed = KINDS[name]
    source, *pairs = re.split(r",(?=\w+=)", rest)  # a pattern of groups may hold commas
    options = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in allowed or not value:
            raise ValueError(
                f"--on {text}: {key!r} is not a setting of {name}; allowed: {', '.join(allowed)}"
            )
        options[key] = value
    void = options.get("void")
    if void is not None and not void.isdecimal():
        raise ValueError(f"--on {text}: void={void} is not a number from 0 to 255")
    return make(
        Request(
            protocol,
            label=f"{name}/{options.get('name') or Path(source).name}",
            source=source,
            train=options.get("train"),
            test=options.get("split"),
            groups=options.get("groups"),
            void=None if void is None else int(void),
        )
    )


def parse_benchmarks(
    texts: Sequence[str], primary: str | None, protocol: Protocol, wanted: Sequence[str] = ()
) -> tuple[list[Benchmark], str]:
    """(all benchmarks of a command line, the number that decides: by default the first of the first
    segmentation).

    Args:
        wanted: names of numbers, whole or without their data set; none: all.

    Raises:
        ValueError: as `parse_benchmark`; also if two have the same name, or none has the primary or a wanted
        number.
    """
    found = [parse_benchmark(text, protocol) for text in texts]
    labels = [benchmark.label for benchmark in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(
            f"two of --on are called {twice[0]}: give one of them another name, as in ...,name=NAME"
        )
    if wanted:
        found = _with_numbers(found, wanted)
    numbers = [name for benchmark in found for name in benchmark.names]
    primary = primary or next((number for number in numbers if number.startswith(f"{SEGMENTATION}/")), None)
    if primary is None:
        raise ValueError(f"no --on {SEGMENTATION}=SOURCE: give one, or the --primary of {', '.join(numbers)}")
    if primary not in numbers:
        raise ValueError(f"--primary {primary}: no such number{nearest(primary, numbers)}")
    return found, primary


def _with_numbers(benchmarks: Sequence[Benchmark], wanted: Sequence[str]) -> list[Benchmark]:
    """The benchmarks with the wanted numbers alone, without those that have none of them."""
    short = {number for benchmark in benchmarks for number in benchmark.numbers}
    known = short | {name for benchmark in benchmarks for name in benchmark.names}
    if unknown := [name for name in wanted if name not in known]:
        like = nearest(unknown[0], sorted(known))
        raise ValueError(
            f"--numbers {unknown[0]}: no such number{like}; there are {', '.join(sorted(short))}"
        )
    found = []
    for benchmark in benchmarks:
        pairs = zip(benchmark.numbers, benchmark.names, strict=True)
        asked = [number for number, name in pairs if number in wanted or name in wanted]
        left_out = [number for number in benchmark.numbers if number not in asked]
        if asked:
            found.append(replace(benchmark, numbers=asked, left_out=left_out))
    return found
