"""Kinds of data that models are judged on, and data sets as a command line names them.

`KIND=SOURCE[,key=value...]`, or `digits`. The table KINDS is all that a command knows of a benchmark before
it opens one; what costs seconds to import is imported then.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.fields import nearest

if TYPE_CHECKING:
    from visft_ds.evals.judge.benchmark import Benchmark, ImageSet, Number
    from visft_ds.evals.judge.captions import CaptionedSet
    from visft_ds.evals.judge.classes import ClassSet
    from visft_ds.evals.judge.dense_sets import DenseSet
    from visft_ds.evals.judge.protocol import Protocol
    from visft_ds.evals.judge.questions import QuestionSet

SEGMENTATION = "segmentation"
OF_BANDS = (SEGMENTATION, "depth", "classification")  #: what models of bands can be judged on
DIGITS = "digits"  #: scikit-learn's, a data set that needs no file
_Data = TypeVar("_Data", "CaptionedSet", "ClassSet", "DenseSet", "QuestionSet")


@dataclass(frozen=True)
class Request:
    """Data set that a command line names."""

    protocol: Protocol
    label: str
    source: str
    bands: Bands | None = None  #: that the models read
    train: str | None = None  #: part to learn from
    split: str | None = None  #: part that is judged
    groups: str | None = None  #: of images, see `images.grouped`
    void: str | None = None  #: number that means no class in label maps
    vlm: str | None = None  #: folder of a vision-language model
    head: str | None = None  #: run with a captioning head

    def grouped(self, images: ImageSet) -> ImageSet:
        """The images in the bands that the models read, with their groups, if there are such."""
        from visft_ds.evals.judge.images import grouped, in_bands

        images = in_bands(images, self.bands)
        return images if self.groups is None else grouped(images, self.groups)

    def with_groups(self, *parts: _Data) -> list[_Data]:
        """Parts of a data set with the groups of their images."""
        return [replace(part, images=self.grouped(part.images)) for part in parts]


@dataclass(frozen=True)
class Kind:
    """Kind of data."""

    name: str  #: of the module with all NUMBERS that it gives, and with `benchmark`
    keys: tuple[str, ...]  #: that may follow its source
    about: str  #: what is measured, and which layouts are read; for --help

    @property
    def module(self) -> ModuleType:
        """Its module."""
        return import_module(f"visft_ds.evals.judge.{self.name}")

    @property
    def numbers(self) -> Sequence[Number]:
        """All numbers that it gives."""
        numbers: Sequence[Number] = self.module.NUMBERS
        return numbers


_TRAINED = ("split", "train", "groups", "name")  # keys of kinds that learn from training images

KINDS: Mapping[str, Kind] = {
    SEGMENTATION: Kind(
        "segmentation",
        (*_TRAINED, "void"),
        "by patches, and names of objects: shards, ADE20k, VOC, images/ with labels/, COCO, Roboflow, YOLO, "
        "and what else visft shards reads",
    ),
    "depth": Kind(
        "depth",
        _TRAINED,
        "metres by a linear head: images/ with depth/, 16-bit PNG of millimetres",
    ),
    "classification": Kind(
        "classification",
        _TRAINED,
        f"kNN, linear and few images a class on frozen features: folders of classes, {DIGITS}",
    ),
    "zero_shot": Kind(
        "zero_shot",
        ("split", "groups", "name"),
        "classes by text similarity: folders of classes, ImageNet's family, ObjectNet",
    ),
    "retrieval": Kind("retrieval", ("split", "groups", "name"), "captions and images: COCO, Karpathy's JSON"),
    "objects": Kind(
        "objects",
        _TRAINED,
        "names of boxed objects, in crops and in whole images with the box drawn in: data as for "
        "segmentation; boxes are enough",
    ),
    "ocr": Kind("ocr", ("name",), "words read by a small head: train/ and test/ with gt.txt or labels.txt"),
    "vqa": Kind(
        "vqa",
        (*_TRAINED, "vlm"),
        "questions answered by a probe, or with vlm=FOLDER by BLIP-2 or a model like LLaVA with the tower in "
        "it: VQAv2, OK-VQA, GQA, visft toy",
    ),
    "caption": Kind(
        "captions",
        ("split", "groups", "name", "vlm", "head"),
        "captions by vlm=FOLDER, as for vqa, or by the captioning head of head=RUN: COCO, Karpathy's JSON, "
        "NoCaps by domain",
    ),
    "agreement": Kind(
        "agreement",
        ("groups", "name"),
        "share of images whose class BASE's own classifier does not change: any images",
    ),
}


def kinds_help() -> str:
    """The kinds of data with their keys, for --help."""
    indent = 20
    paragraphs = []
    for name, kind in KINDS.items():
        text = f"{kind.about} ({', '.join(kind.keys)})"
        begin = f"    {name}".ljust(indent)
        paragraphs.append(textwrap.fill(text, 110, initial_indent=begin, subsequent_indent=" " * indent))
    return "\n".join(paragraphs)


def parse_benchmark(text: str, protocol: Protocol, bands: Bands | None = None) -> Benchmark:
    """Read one --on of a command line; opens its data set, so far as to know what there is.

    Args:
        bands: that the models read; None: three colours of 8 bits.

    Raises:
        ValueError: an unknown kind or key, or whatever is wrong with the data set.
    """
    if text == DIGITS:
        text = f"classification={text}"
    name, _, rest = text.partition("=")
    if name not in KINDS or not rest:
        raise ValueError(f"--on {text}: give KIND=SOURCE[,key=value] with a kind of {', '.join(KINDS)}")
    kind = KINDS[name]
    source, *pairs = re.split(r",(?=\w+=)", rest)  # a pattern of groups may hold commas
    options = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in kind.keys or not value:
            raise ValueError(
                f"--on {text}: {key!r} is not a setting of {name}; allowed: {', '.join(kind.keys)}"
            )
        options[key] = value
    if bands is not None and name not in OF_BANDS:
        raise ValueError(
            f"--on {text}: the models read {in_words(bands)}, and {name} is for photographs in three "
            f"colours; allowed: {', '.join(OF_BANDS)}"
        )
    label = f"{name}/{options.pop('name', Path(source).name)}"
    benchmark: Benchmark = kind.module.benchmark(Request(protocol, label, source, bands, **options))
    return benchmark


def parse_benchmarks(
    texts: Sequence[str],
    primary: str | None,
    protocol: Protocol,
    only: Sequence[str] = (),
    bands: Bands | None = None,
) -> tuple[list[Benchmark], str]:
    """(all benchmarks of a command line, full name of the number that decides: by default the first of the
    first segmentation).

    Args:
        only: names of numbers, full or without their data set; none: all.
        bands: that the models read.

    Raises:
        ValueError: as `parse_benchmark`; also if two have the same name, or none has the primary or a only
            number.
    """
    benchmarks = [parse_benchmark(text, protocol, bands) for text in texts]
    labels = [benchmark.label for benchmark in benchmarks]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"two of --on are called {label}: give one of them another name, as in ...,name=NAME"
            )
    if only:
        benchmarks = _with_numbers(benchmarks, only)
    names = [name for benchmark in benchmarks for name in benchmark.full_names]
    if primary is None:
        of_segmentation = [name for name in names if name.startswith(f"{SEGMENTATION}/")]
        if not of_segmentation:
            shown = ", ".join(map(shlex.quote, names))
            raise ValueError(
                f"no --on {SEGMENTATION}=SOURCE: give one, or one of these as --primary: {shown}"
            )
        primary = of_segmentation[0]
    if primary not in names:
        raise ValueError(f"--primary {primary}: no such number{nearest(primary, names)}")
    return benchmarks, primary


def _with_numbers(benchmarks: Sequence[Benchmark], only: Sequence[str]) -> list[Benchmark]:
    """The benchmarks with the only numbers alone, without those that have none of them."""
    short = {number.name for benchmark in benchmarks for number in benchmark.numbers}
    full = {name for benchmark in benchmarks for name in benchmark.full_names}
    for name in only:
        if name not in short | full:
            raise ValueError(
                f"--numbers {name}: no such number{nearest(name, sorted(short | full))}; "
                f"there are {', '.join(sorted(short))}"
            )
    result = []
    for benchmark in benchmarks:
        asked = [
            number
            for number in benchmark.numbers
            if number.name in only or benchmark.full_name(number) in only
        ]
        left_out = [number for number in benchmark.numbers if number not in asked]
        if asked:
            result.append(replace(benchmark, numbers=asked, left_out=left_out))
    return result
