"""Sentences about a run: on its data before the first step, and on the numbers at its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from shlex import quote

import numpy as np

from visft_ds.config.schema import VisftConfig
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest, manifest_path, splits_in
from visft_ds.data.transforms import Pad, final_size
from visft_ds.prepare.data import RunData
from visft_ds.randomness import generator
from visft_ds.run_files import EXPORT
from visft_ds.settings.task_schema import Stream, TaskConfig
from visft_ds.tasks.transform import geometry_of

#: Training images of a class below which little is to be expected of it.
FEW_IMAGES = 10
#: Photographs that a DETR memorises.
FEW_FOR_DETR = 100
#: Part of the objects that a finding about sizes is about, at least.
_SHARE_OF_SMALL = 10
#: Largest side in pixels that is advised; memory and time grow with its square.
_LARGEST_SIDE = 1344
_SIDE_STEP = 32
#: Images whose sizes stand for those of a split.
_SIZES_LOOKED_AT = 200
_LEARNT = 0.5  #: a metric on training images from which on the task is learnt
_NOTHING = 0.05  #: one below which nothing is
#: A metric rises if the last evaluation is above all before by so much, or by this part of itself.
_RISE = 0.01
_RISE_PART = 0.05
_FLAT_AFTER = 3  #: evaluations


Texts = Iterator[tuple[str, str]]  #: (fact, advice) of findings


@dataclass(frozen=True)
class Finding:
    """Property of the data that stands in the way of a task; `task` None: of all."""

    task: str | None
    fact: str  #: which is repeated at the end of a run
    advice: str  #: goes on behind the fact


def findings_of(config: VisftConfig, data: RunData, cells: Sequence[int]) -> list[Finding]:
    """Oddities of the data that are known before the first step.

    Args:
        cells: side in pixels of what a feature stands for, of each map that is read.
    """
    findings = list[Finding]()
    for texts in _without_validation(config, data):
        findings.append(Finding(None, *texts))
    for stream in data.streams.values():
        for task in stream.tasks:
            settings = config.tasks.enabled()[task]
            if not settings.has_classes:
                continue
            cell = cells[-1]
            if getattr(settings.head, "type", "") == "dense":  # which has no queries and reads the finest map
                cell = cells[getattr(settings.head, "box_map", 0)]
            manifests = [training.manifest for training in data.sets.values() if task in training.tasks]
            for texts in chain(
                _few_for_detr(config, settings, manifests),
                _beyond_limit(task, settings, manifests),
                _rare_classes(manifests),
                _small_objects(stream, manifests, cell),
            ):
                findings.append(Finding(task, *texts))
    return findings


def lines_of(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """(whom it concerns, text) of each finding, once for tasks that share it."""
    tasks = dict[str, list[str]]()
    for finding in findings:
        tasks.setdefault(finding.fact + finding.advice, []).append(finding.task or "all")
    for text, names in tasks.items():
        yield ", ".join(names), text


def _without_validation(config: VisftConfig, data: RunData) -> Texts:
    root = config.data.root
    split = config.data.val
    if data.validation is not None or is_url(root) or manifest_path(Path(root), split).is_file():
        return
    others = ", ".join(splits_in(Path(root)))
    yield (
        f"no validation split {root}/{split} (there: {others}; visft.data.val names it)",
        ", so nothing will show whether the run memorises: "
        "`visft shards FOLDER --val 0.2` splits a fifth of the images off; of tars that were indexed, "
        "index others with --split val",
    )


def _few_for_detr(config: VisftConfig, settings: TaskConfig, manifests: Sequence[Manifest]) -> Texts:
    images = sum(map(len, manifests))
    if config.stage == 1 and getattr(settings.head, "type", "") == "detr" and images <= FEW_FOR_DETR:
        yield (
            f"a DETR memorises {images} photographs and finds nothing on others",
            ": give --set visft.tasks.detection.head.type=dense",
        )


def _beyond_limit(task: str, settings: TaskConfig, manifests: Sequence[Manifest]) -> Texts:
    """Objects that a head has no room for; those beyond its queries are not learnt either."""
    most = getattr(settings.head, "most_objects", None)
    if most is None:
        return
    objects = np.concatenate([manifest.index["num_annotations"] for manifest in manifests])
    beyond = (objects - most).clip(min=0)
    if not beyond.any():
        return
    fuller = f"{np.count_nonzero(beyond)} of {len(objects)} images have more than {most}"
    has_queries = getattr(settings.head, "num_queries", None) == most
    limit = "num_queries" if has_queries else "max_detections"
    key = f"visft.tasks.{task}.head.{limit}"
    yield f"{beyond.sum()} of {objects.sum()} objects are ignored", f", as {fuller} ({key})"


def _rare_classes(manifests: Sequence[Manifest]) -> Texts:
    images = Counter[str]()
    for manifest in manifests:
        images.update(manifest.having_category)
    rare = sum(count < FEW_IMAGES for count in images.values())
    if rare:
        median = np.median(list(images.values()))
        half = f"{median:g} or fewer" if median else "none"
        yield (
            f"{rare} of {len(images)} classes are in fewer than {FEW_IMAGES} training images each",
            f" (half of all classes in {half}): expect little of those; add images of them, or merge classes",
        )


def _small_objects(stream: Stream, manifests: Sequence[Manifest], cell: int) -> Texts:
    """Of objects below half a cell hardly one is found, of those of a cell and more nearly all
    (docs/own-data.md).
    """
    manifest = next((manifest for manifest in manifests if manifest.object_sides), None)
    if manifest is None:
        return
    seen = _seen_side(manifest, stream)
    for limit, in_cells, chance in ((cell / 2, "half a cell", "hardly ever"), (cell, "a cell", "often not")):
        # Percentages of the objects that are smaller than this.
        shares = [int(share) for share, side in manifest.object_sides.items() if side * seen < limit]
        share = max(shares, default=0)
        if share >= _SHARE_OF_SMALL:
            yield (
                f"{share} % of the objects are below {limit:.0f} px where the network sees them",
                f", {in_cells} of its grid of features; such objects are {chance} found: "
                + _remedy(manifest, stream, seen, cell),
            )
            return


def _remedy(manifest: Manifest, stream: Stream, seen: float, cell: int) -> str:
    """Advice on the size of images at which nine of ten objects have a cell."""
    needed = cell / manifest.object_sides["10"]
    fixed = stream.image.get("fixed_size")
    if fixed and stream.image.get("keep_shape"):  # which is the long side
        needed *= fixed / seen
    side = math.ceil(needed / _SIDE_STEP) * _SIDE_STEP
    if side > _LARGEST_SIDE:
        return f"nine of ten would have a cell at {side} px only: cut the images into tiles (--tile 640)"
    if fixed:
        return f"give larger images (--set {stream.key}.image.fixed_size={side})"
    return f"give larger images ({side} px where {seen:.0f} are seen now; {stream.key}.image)"


def _seen_side(manifest: Manifest, stream: Stream) -> float:
    """Side of a square with as many pixels as the network sees of an image of the median size, in
    evaluation.
    """
    index = manifest.index[:_SIZES_LOOKED_AT]
    geometry = geometry_of(stream)
    sides = list[float]()
    for size in zip(index["height"].tolist(), index["width"].tolist(), strict=True):
        shown = size
        if stream.tiles is not None:
            window = stream.tiles.windows(*size)[0]
            shown = window.height, window.width
        ops = geometry.draw(shown, False, generator(0))
        inside = [op for op in ops if not (isinstance(op, Pad) and op.outside)]
        pixels = math.prod(final_size(shown, inside)) * math.prod(size) / math.prod(shown)
        sides.append(math.sqrt(pixels))
    return float(np.median(sides))


def verdicts(
    training: Mapping[str, float],
    evaluations: Sequence[Mapping[str, float]],
    tasks: Mapping[str, TaskConfig],
    findings: Sequence[Finding],
) -> list[str]:
    """Lines that compare metrics on training images with those of validation, and say what the difference
    means.

    Args:
        training: by name, such as "box/AP50".
        evaluations: of the run in order, with "val/" before the names.
        tasks: settings by name.
        findings: see `findings_of`.
    """
    lines = []
    for name, value in training.items():
        scores = [metrics[f"val/{name}"] for metrics in evaluations if f"val/{name}" in metrics]
        of_task = [task for task, settings in tasks.items() if name in settings.measured()]
        reasons = [finding.fact for finding in findings if finding.task in of_task]
        beside = f"{scores[-1]:.2f}" if scores else "not known"
        meaning = _meaning(value, scores, reasons)
        lines.append(f"{name} is {value:.2f} on training images and {beside} on validation" + meaning)
    return lines


def _meaning(value: float, scores: Sequence[float], reasons: Sequence[str]) -> str:
    """End of a line of `verdicts`, "" where all is well."""
    because = f"; in the way: {', '.join(reasons)}" if reasons else ""
    if value >= _LEARNT:
        if not scores or scores[-1] >= value - 0.2:
            return ""
        if scores[-1] >= value / 2:
            return f": partly memorised, more images help{because}"
        views = "more images, or more views of them (visft.features.views, image.zoom)"
        return f": memorised; use {views}{because}"
    if value < _NOTHING:
        return f": nothing is learnt yet, train for more steps (--steps) or with another --lr{because}"
    shown = ", ".join(f"{score:.3f}" for score in scores[-_FLAT_AFTER:])
    if len(scores) < 2:
        return (
            f": little is learnt, and fewer than two evaluations cannot tell whether more steps help{because}"
        )
    if scores[-1] > max(scores[:-1]) + max(_RISE, _RISE_PART * scores[-1]):
        return (
            f": not learnt yet, and validation still rises ({shown}): train for more steps (--steps){because}"
        )
    if len(scores) < _FLAT_AFTER:
        return f": little is learnt, and validation does not rise ({shown}){because}"
    advice = because or "; larger images, another --backbone or --lr may"
    return f": validation no longer rises ({shown}), so that more steps alone will not help{advice}"


def _pictures_of(folder: Path) -> Path:
    """The folder of photographs, of validation if it has one of its own, in a data set: maps of depth and of
    classes are images, too. The data set itself where no such folder is in it.
    """
    of_validation = ("images/val*", "leftImg8bit/val", "val*/images", "val*")
    for pattern in (*of_validation, "images", "JPEGImages", "train*"):
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                return path
    return folder


def next_commands(config: VisftConfig) -> list[str]:
    """Lines with the commands that a finished run is used with, each behind a colon."""
    assert config.run.out is not None  # filled in
    run = quote(config.run.out)
    images = Path(config.data.root.removesuffix("-shards"))  # as `visft shards` names what it builds
    if not images.is_dir() or str(images) == config.data.root:
        images = Path("IMAGES")
    lines = [
        f"see what it finds in images: visft predict {run} {quote(str(_pictures_of(images)))}",
        f"write a page about this run: visft report {run}",
    ]
    if config.stage == 1:
        heads = quote(f"{config.run.out}/{EXPORT}")
        command = f"visft train --stage 2 --data {quote(config.data.root)} --heads {heads}"
        lines.append(f"train the backbone through these heads: {command}")
    else:
        command = f"visft export {run} --format timm --out {quote(f'{config.run.out}-timm')}"
        lines.append(f"write the trained backbone for timm: {command}")
    return lines
