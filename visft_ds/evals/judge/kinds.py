"""Kinds of data that models are judged on, and data sets as a command line names them.

`KIND=SOURCE[,key=value...]`, or `digits`. The table KINDS is all that a command knows of a benchmark before
it opens one; what costs seconds to import is imported then.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.fields import nearest

if TYPE_CHECKING:
    from visft_ds.evals.judge.benchmark import Benchmark, ImageSet, Number
    from visft_ds.evals.judge.classes import ClassSet
    from visft_ds.evals.judge.dense_sets import DenseSet
    from visft_ds.evals.judge.protocol import Protocol

SEGMENTATION = "segmentation"
OF_BANDS = (SEGMENTATION, "depth", "classification")  #: what models of bands can be judged on
DIGITS = "digits"  #: scikit-learn's, a data set that needs no file
_Data = TypeVar("_Data", "ClassSet", "DenseSet")


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
    vlm: str | None  #: folder of a vision-language model
    head: str | None  #: run with a captioning head
    bands: Bands | None = None  #: that the models read

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

    make: Callable[[Request], Benchmark]
    module: str  #: of its benchmark, whose NUMBERS are those that it gives
    keys: tuple[str, ...]  #: that may follow its source
    about: str  #: what is measured, and which layouts are read; for --help

    @property
    def numbers(self) -> Sequence[Number]:
        """All numbers that it gives."""
        numbers: Sequence[Number] = import_module(f"visft_ds.evals.judge.{self.module}").NUMBERS
        return numbers


def _segmentation(request: Request) -> Benchmark:
    from visft_ds.evals.judge.dense_sets import read_train_and_test
    from visft_ds.evals.judge.segmentation import segmentation

    most = request.protocol.images
    parts = read_train_and_test(most, request.source, request.train, request.test, request.void)
    train, test = request.with_groups(*parts)
    benchmark = segmentation(request.label, train, test, request.protocol)
    return replace(benchmark, notes=[*train.notes, *test.notes])


def _depth(request: Request) -> Benchmark:
    from visft_ds.evals.judge.dense_sets import read_depth
    from visft_ds.evals.judge.depth import depth

    parts = read_depth(request.protocol.images, request.source, request.train, request.test)
    train, test = request.with_groups(*parts)
    return depth(request.label, train, test, request.protocol)


def _classification(request: Request) -> Benchmark:
    from visft_ds.evals.judge.classes import read_train_and_test
    from visft_ds.evals.judge.classification import classification

    parts = read_train_and_test(request.source, request.train, request.test)
    train, test = request.with_groups(*parts)
    return classification(request.label, train, test, request.protocol)


def _zero_shot(request: Request) -> Benchmark:
    from visft_ds.evals.judge.classes import read_classes
    from visft_ds.evals.judge.zero_shot import zero_shot

    (data,) = request.with_groups(read_classes(request.source, request.test))
    return zero_shot(request.label, data)


def _retrieval(request: Request) -> Benchmark:
    from visft_ds.evals.judge.retrieval import read_captions, retrieval

    images, captions, owners = read_captions(request.source, request.test)
    return retrieval(request.label, request.grouped(images), captions, owners)


def _objects(request: Request) -> Benchmark:
    from visft_ds.evals.judge.dense_sets import read_objects
    from visft_ds.evals.judge.objects import grounding

    parts = read_objects(request.protocol.images, request.source, request.train, request.test)
    return grounding(request.label, *request.with_groups(*parts))


def _ocr(request: Request) -> Benchmark:
    from visft_ds.evals.judge.ocr import ocr, read_words

    folder = Path(request.source)
    return ocr(request.label, read_words(folder / "train"), read_words(folder / "test"))


def _vqa(request: Request) -> Benchmark:
    from visft_ds.evals.judge.questions import read_questions
    from visft_ds.evals.judge.vlm_answers import vlm_answers
    from visft_ds.evals.judge.vqa import vqa

    parts = read_questions(request.source, request.train, request.test)
    train, test = (replace(part, images=request.grouped(part.images)) for part in parts)
    if request.vlm is not None:
        return vlm_answers(request.label, train, test, Path(request.vlm))
    return vqa(request.label, train, test)


def _caption(request: Request) -> Benchmark:
    from visft_ds.evals.judge.captions import captions_of_head, captions_of_vlm, read_captioned

    if (request.vlm is None) == (request.head is None):
        raise ValueError(
            f"--on caption={request.source}: give vlm=FOLDER of a vision-language model, or head=RUN whose "
            "captioning head reads each tower"
        )
    data = read_captioned(request.source, request.test)
    data = replace(data, images=request.grouped(data.images))
    if request.vlm is not None:
        return captions_of_vlm(request.label, data, Path(request.vlm))
    return captions_of_head(request.label, data, Path(str(request.head)))


def _agreement(request: Request) -> Benchmark:
    from visft_ds.evals.judge.agreement import agreement, read_images

    return agreement(request.label, request.grouped(read_images(request.source)))


KINDS: Mapping[str, Kind] = {
    SEGMENTATION: Kind(
        _segmentation,
        "segmentation",
        ("split", "train", "groups", "void", "name"),
        "by patches, and names of objects: shards, ADE20k, VOC, images/ with labels/, COCO, Roboflow, YOLO, "
        "and what else visft shards reads",
    ),
    "depth": Kind(
        _depth,
        "depth",
        ("split", "train", "groups", "name"),
        "metres by a linear head: images/ with depth/, 16-bit PNG of millimetres",
    ),
    "classification": Kind(
        _classification,
        "classification",
        ("split", "train", "groups", "name"),
        f"kNN, linear and few images a class on frozen features: folders of classes, {DIGITS}",
    ),
    "zero_shot": Kind(
        _zero_shot,
        "zero_shot",
        ("split", "groups", "name"),
        "classes by text similarity: folders of classes, ImageNet's family, ObjectNet",
    ),
    "retrieval": Kind(
        _retrieval, "retrieval", ("split", "groups", "name"), "captions and images: COCO, Karpathy's JSON"
    ),
    "objects": Kind(
        _objects,
        "objects",
        ("split", "train", "groups", "name"),
        "names of boxed objects, in crops and in whole images with the box drawn in: data as for "
        "segmentation; boxes are enough",
    ),
    "ocr": Kind(
        _ocr, "ocr", ("name",), "words read by a small head: train/ and test/ with gt.txt or labels.txt"
    ),
    "vqa": Kind(
        _vqa,
        "vqa",
        ("split", "train", "groups", "name", "vlm"),
        "questions answered by a probe, or with vlm=FOLDER by BLIP-2 or a model like LLaVA with the tower in "
        "it: VQAv2, OK-VQA, GQA, visft toy",
    ),
    "caption": Kind(
        _caption,
        "captions",
        ("split", "groups", "name", "vlm", "head"),
        "captions by vlm=FOLDER, as for vqa, or by the captioning head of head=RUN: COCO, Karpathy's JSON, "
        "NoCaps by domain",
    ),
    "agreement": Kind(
        _agreement,
        "agreement",
        ("groups", "name"),
        "share of images whose class BASE's own classifier does not change: any images",
    ),
}


def kinds_help() -> str:
    """The kinds of data with their keys, for --help."""
    width = 110
    indent = 20
    paragraphs = []
    for name, kind in KINDS.items():
        text = f"{kind.about} ({', '.join(kind.keys)})"
        lines = textwrap.wrap(text, width - indent)
        paragraphs.append(f"    {name}".ljust(indent) + ("\n" + " " * indent).join(lines))
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
    void = options.get("void")
    if void is not None and not void.isdecimal():
        raise ValueError(f"--on {text}: void={void} is not a number from 0 to 255")
    return kind.make(
        Request(
            protocol,
            label=f"{name}/{options.get('name') or Path(source).name}",
            source=source,
            train=options.get("train"),
            test=options.get("split"),
            groups=options.get("groups"),
            void=None if void is None else int(void),
            vlm=options.get("vlm"),
            head=options.get("head"),
            bands=bands,
        )
    )


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
        asked: list[Number] = []
        left_out: list[Number] = []
        for number in benchmark.numbers:
            is_wanted = number.name in only or benchmark.full_name(number) in only
            (asked if is_wanted else left_out).append(number)
        if asked:
            result.append(replace(benchmark, numbers=asked, left_out=left_out))
    return result
