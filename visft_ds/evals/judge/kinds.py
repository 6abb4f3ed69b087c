"""Data that models are judged on, as a command line names it: `KIND=SOURCE[,key=value...]`, or `digits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from visft_ds.config.fields import nearest
from visft_ds.evals.judge import classes, dense_sets
from visft_ds.evals.judge.depth import depth
from visft_ds.evals.judge.kept import kept, read_images
from visft_ds.evals.judge.ocr import ocr, read_words
from visft_ds.evals.judge.probes import classification, grounding
from visft_ds.evals.judge.protocol import Benchmark
from visft_ds.evals.judge.protocols import Protocol
from visft_ds.evals.judge.retrieval import read_captions, retrieval
from visft_ds.evals.judge.segmentation import segmentation

SEGMENTATION = "segmentation"
#: Kind -> what makes it of protocol, label, source, part to train on and part to judge. `evals.cli` describes them.
KINDS: dict[str, Callable[[Protocol, str, str, str | None, str | None], Benchmark]] = {
    SEGMENTATION: lambda how, label, *at: segmentation(label, *dense_sets.read_train_and_test(how.images, *at), how),
    "depth": lambda how, label, *at: depth(label, *dense_sets.read_depth(how.images, *at), how),
    "classification": lambda _, label, *at: classification(label, *classes.read_train_and_test(*at)),
    "zero_shot": lambda _, label, at, __, part: classes.zero_shot(label, classes.read_classes(at, part)),
    "retrieval": lambda _, label, at, __, part: retrieval(label, *read_captions(at, part)),
    "objects": lambda how, label, *at: grounding(label, *dense_sets.read_train_and_test(how.images, *at)),
    "ocr": lambda _, label, at, *__: ocr(label, read_words(Path(at, "train")), read_words(Path(at, "test"))),
    "kept": lambda _, label, at, *__: kept(label, read_images(at)),
}
#: Kind -> keys of its options, where they are not `split`, `train` and `name`.
FEWER = {"zero_shot": ("split", "name"), "retrieval": ("split", "name"), "ocr": ("name",), "kept": ("name",)}


def parse_benchmark(text: str, protocol: Protocol) -> Benchmark:
    """Read one --on of a command line; opens its data set, so far as to know what there is.

    Raises:
        ValueError: an unknown kind or key, or whatever is wrong with the data set.
    """
    name, _, rest = (f"classification={text}" if text == classes.DIGITS else text).partition("=")
    if name not in KINDS or not rest:
        raise ValueError(f"--on {text}: give KIND=SOURCE[,key=value] with a kind of {', '.join(KINDS)}")
    source, *pairs = rest.split(",")
    allowed = FEWER.get(name, ("split", "train", "name"))
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if unknown := [key for key, value in options.items() if key not in allowed or not value]:
        raise ValueError(f"--on {text}: {unknown[0]!r} is not a setting of {name}; allowed: {', '.join(allowed)}")
    label = f"{name}/{options.get('name') or Path(source).name}"
    return KINDS[name](protocol, label, source, options.get("train"), options.get("split"))


def parse_benchmarks(
    texts: Sequence[str], primary: str | None, protocol: Protocol, wanted: Sequence[str] = ()
) -> tuple[list[Benchmark], str]:
    """(all benchmarks of a command line, the number that decides: by default the first of the first segmentation).

    Args:
        wanted: names of numbers, whole or without their data set; none: all.

    Raises:
        ValueError: as `parse_benchmark`; also if two have the same name, or none has the primary or a wanted number.
    """
    found = [parse_benchmark(text, protocol) for text in texts]
    labels = [benchmark.label for benchmark in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two of --on are called {twice[0]}: give one of them another name, as in ...,name=NAME")
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
        raise ValueError(f"--numbers {unknown[0]}: no such number{like}; there are {', '.join(sorted(short))}")
    found = []
    for benchmark in benchmarks:
        pairs = zip(benchmark.numbers, benchmark.names, strict=True)
        asked = [number for number, name in pairs if number in wanted or name in wanted]
        left_out = [number for number in benchmark.numbers if number not in asked]
        if asked:
            found.append(replace(benchmark, numbers=asked, left_out=left_out))
    return found
