"""Decisions that the data makes about a run, once and before any tensor library is imported.

`settle` reads the command line and the training splits, then goes through the decisions in order: tasks
without labels take no part, epochs become steps, few photographs get their recipe and a size that shows their
objects, heads get the classes of the data, and batches become no larger than the data. Each is a `Decision`
(key, value, why) that gives way to the user's flags; the report at the start lists them. What hardware
decides is added by `run/machine.py`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visft_ds.config.backbones import lora_targets, on_this_machine
from visft_ds.config.flags import SMALL_DATA, FirstStage, Merged, build_parser, merge_arguments
from visft_ds.config.resolve import CONFIG_ROOT, Draft, ResolvedConfig
from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.config.tree import Tree
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest, manifest_path
from visft_ds.prepare.datasets import (
    TrainingSets,
    check_bands,
    load_splits,
    open_training_sets,
    samples_of,
)
from visft_ds.pretrained import TIMM, lite0_of_pip
from visft_ds.run_files import EXPORT
from visft_ds.settings.bands import in_words
from visft_ds.settings.task_schema import SHARED, Stream
from visft_ds.settings.tiles import SIDES, Tiles, usual_overlap
from visft_ds.tasks import BUILT_IN, config_class, entries
from visft_ds.tasks.classes import COCO_NAMES

#: File in ds_configs/models, the demo's recipe, whose weights pip may have brought.
DEMO = "efficientnet_lite0"
#: Steps that 20 to 200 photographs need alike; more photographs are passed through so often instead.
STEPS = 550
PASSES = 30
VIEWS = 12
EVALUATIONS = 3
#: Side in pixels of the recipe's squares, and of their cells: most objects of a cell or more are found.
SIDE = 320
CELL = 16
#: Of pictures with smaller objects: cells of the finer map, the longest side, views and batch.
FINE_CELL = 8
LONGEST = 640
FINE_VIEWS = 6
#: Passes through them, of which a step sees few: with PASSES boxes had not been learnt (docs/evidence.md).
FINE_PASSES = 70
FINE_BATCH = 4
#: Side in pixels at which the network sees most objects of pictures that are cut into tiles of SIDE, and
#: batch: a tile has few objects.
IN_TILES = 12
TILE_BATCH = 16
#: Block of lite0 whose map has cells of FINE_CELL.
LITE0_FINE = 2
#: Settings besides those of its tasks that a stage 2 takes from the stage 1 of its heads.
_OF_FIRST_STAGE = (
    "visft.model.name",
    "visft.model.preset",
    "visft.model.out_indices",
    "visft.model.bands",
    "visft.model.new_bands",
    "visft.model.weights",
    "visft.model.weights_seed",
    "visft.model.overrides",
    "visft.data.train",
    "visft.data.val",
    "visft.data.sets",
    "visft.shared.image.fixed_size",
    "visft.shared.image.keep_shape",
    "visft.shared.image.tile",
)
#: Of the images of a task.
_SIZES = {"fixed_size", "keep_shape", "tile", "size", "min_size_test", "max_size_test", "window"}
#: Tasks of whole scenes, every pixel of which is labelled.
_OF_SCENES = {"semantic", "depth", "panoptic"}
#: Of photographs with their labels: blocks of lite0 of strides 8, 16 and 32, smallest and largest long side,
#: views (as it is, and mirrored) and batch.
SCENE_BLOCKS = [2, 4, 6]
SCENE_SIDES = (320, LONGEST)
SCENE_VIEWS = 2
SCENE_BATCH = 8
#: A smaller panoptic head than COCO's: width and blocks, queries for each segment of the fullest photograph,
#: least and most queries, points at which masks are compared, and the probability of a class above which its
#: mask is taken: after few steps among many classes hardly one reaches EoMT's 0.8.
SEGMENT_WIDTH = 128
SEGMENT_BLOCKS = 3
QUERIES_PER_SEGMENT = 3
SEGMENT_QUERIES = (24, 200)
SEGMENT_POINTS = 1024
SEGMENT_SCORE = 0.2
#: Photographs whose features are kept: those of all views are 1 MB each.
MOST_KEPT = 2000
#: Objects of another photograph that are pasted into one, at most.
PASTED = 4
#: Sides of a zoom's window: a caption may name what a small one cuts off.
ZOOM_WITH_CAPTIONS = (0.8, 1.2)


class Settled(NamedTuple):
    """A command line, settled with its data."""

    options: argparse.Namespace
    config: ResolvedConfig
    sets: TrainingSets | None  #: training sets by name; None: some are not on this machine


def settle(words: Sequence[str] | None = None, processes: int = 1) -> Settled:
    """Settle the configuration that a command line of visft train (None: the process's own) names.

    Args:
        processes: of the run.

    Raises:
        ValueError: an unknown flag (with the nearest one) or value, an invalid configuration (all errors at
            once), a split that is damaged, lacks what a task needs, or does not fit the others.
        OSError: a file of the user's own that cannot be read, or a server that fails.
    """
    options = build_parser().parse_args(words)
    merged = merge_arguments(options)
    draft = Draft(merged.tree)
    fine_block = _decide_by_backbone(draft, merged)
    if merged.first is not None:
        _decide_by_first_stage(draft, merged.first)
    manifests = _open_splits(draft.visft.data, remote=not options.dry_run)
    if options.tasks is None and not any(text.startswith("visft.tasks=") for text in options.set):
        _decide_tasks(draft, manifests, options.batch_size)
    if options.tile is not None:
        _decide_tiles(draft, options.tile, manifests)
    is_small = merged.model == SMALL_DATA and bool(manifests)
    if is_small:
        if merged.first is None and draft.visft.tasks.enabled().keys() <= _OF_SCENES:
            _decide_for_scenes(draft, merged, manifests)
        if draft.visft.stage == 1:
            _decide_by_objects(draft, manifests, fine_block)
            _decide_masks(draft, fine_block)
            _decide_paste(draft, manifests)
    if options.epochs is not None:
        _decide_length(draft, options.epochs, manifests)
    if is_small:
        _decide_for_few(draft, manifests)
    sets = None
    if manifests:
        sets = open_training_sets(draft.visft, manifests)
        _decide_sizes(draft, sets, processes)
    config = draft.config()
    if options.download and not options.dry_run and config.visft.model.weights is not None:
        on_this_machine(config.visft.model.weights, download=True)
    return Settled(options, config, sets)


def settle_data(config: ResolvedConfig, processes: int = 1) -> tuple[ResolvedConfig, TrainingSets]:
    """The configuration with the classes and batches that its data decides, and its training sets.

    For tools that have a configuration and no command line. Raises ValueError as `settle`.
    """
    sets = open_training_sets(config.visft, load_splits(config.visft.data))
    draft = Draft.of(config)
    _decide_sizes(draft, sets, processes)
    return draft.config(), sets


def _open_splits(data: DataConfig, *, remote: bool) -> list[Manifest]:
    """All training splits; none where one of them is not on this machine, or `remote` ones are not asked."""
    for entry in data.training_sets():
        path = manifest_path(Path(entry.root), entry.split)
        is_there = remote if is_url(entry.root) else path.is_file()
        if not is_there:
            return []
    return load_splits(data)


def _decide_by_backbone(draft: Draft, merged: Merged) -> int | None:
    """Weights that pip brought, where none were named or are here, and the map that is read of another
    backbone.

    Returns the number of the block whose map is finer than that, None if there is none.
    """
    model = draft.visft.model
    of_lite0 = merged.model in (SMALL_DATA, DEMO) and not merged.backbone
    if of_lite0 and not Path(model.weights or "").exists():
        weights = lite0_of_pip()
        if weights is not None:
            draft.decide({"visft.model.weights": str(weights)}, "pip's efficientnet_lite0")
    if "visft.model.preset" not in merged.backbone:
        return LITE0_FINE
    preset = model.preset
    if merged.model != SMALL_DATA or not preset.startswith(TIMM):
        return None
    from visft_ds.models.timm_backbone import fine_maps  # imports torch and timm, which costs seconds

    blocks, side = fine_maps(preset.removeprefix(TIMM))
    values = {
        "visft.shared.image.fixed_size": side,
        "visft.tasks.detection.image.fixed_size": side,
        "visft.tasks.segmentation.image.fixed_size": side,
        "visft.tasks.captioning.image.size": side,
        "visft.model.out_indices": [blocks[CELL]] if blocks else [],
    }
    draft.decide(values, f"the map of {preset}")
    if draft.visft.stage == 2:
        draft.decide({"visft.lora.targets": lora_targets(preset)}, f"the layers of {preset}")
    return blocks.get(FINE_CELL)


def _decide_for_scenes(draft: Draft, merged: Merged, manifests: Sequence[Manifest]) -> None:
    """Several maps, fine and coarse, and whole photographs in their own shape and about their own size."""
    long_sides = [np.maximum(manifest.index["height"], manifest.index["width"]) for manifest in manifests]
    picture = float(np.median(np.concatenate(long_sides)))
    least, most = SCENE_SIDES
    side = round(min(max(picture, least), most))
    values: dict[str, Any] = {}
    for stream in draft.visft.streams().values():
        values[f"{stream.key}.batch_size"] = SCENE_BATCH
        image = f"{stream.key}.image"
        if "size" in stream.image:  # crops of a task's own
            for name in ("size", "min_size_test", "max_size_test"):
                values[f"{image}.{name}"] = side
            if "window" in stream.image:
                values[f"{image}.window"] = None
        else:
            values[f"{image}.fixed_size"] = side
            values[f"{image}.keep_shape"] = True
            values[f"{image}.zoom"] = None
    preset = draft.visft.model.preset
    if "visft.model.preset" not in merged.backbone:
        values["visft.model.out_indices"] = SCENE_BLOCKS
    elif preset.startswith(TIMM):
        from visft_ds.models.timm_backbone import scene_maps  # imports torch and timm, which costs seconds

        values["visft.model.out_indices"] = scene_maps(preset.removeprefix(TIMM))
    draft.decide(values, f"the recipe for label, depth and panoptic maps, of pictures of {picture:.0f} px")
    if "panoptic" in draft.visft.tasks.enabled():
        _decide_segments(draft, manifests)


def _decide_segments(draft: Draft, manifests: Sequence[Manifest]) -> None:
    """A panoptic head for few photographs: COCO's costs ten times as much and learns more slowly."""
    most = max(manifest.counts.get("segments_at_most", 0) for manifest in manifests)
    fewest, limit = SEGMENT_QUERIES
    values = {
        "head.hidden_dim": SEGMENT_WIDTH,
        "head.blocks": SEGMENT_BLOCKS,
        "head.num_queries": min(max(QUERIES_PER_SEGMENT * most, fewest), limit),
        "head.score": SEGMENT_SCORE,
        "loss.train_num_points": SEGMENT_POINTS,
    }
    of_task = {f"visft.tasks.panoptic.{name}": value for name, value in values.items()}
    draft.decide(of_task, f"the recipe for panoptic maps of up to {most} segments")


def _decide_by_first_stage(draft: Draft, first: FirstStage) -> None:
    """Heads of a stage 2, and what they were trained with: backbone, splits, tasks, sizes of images."""
    recorded = Tree(first.record.config)
    keys = list(_OF_FIRST_STAGE)
    was_off = []
    for task in entries():
        key = f"visft.tasks.{task}"
        settings = recorded.value(key)
        if settings is None:
            if not _is_mentioned(draft, key):
                was_off.append(key)
            continue
        if task not in BUILT_IN:  # no recipe of stage 2 speaks of it
            keys += [f"{key}.{name}" for name in ("steps", "batch_size", "micro_batch")]
        keys += [f"{key}.head.{option}" for option in settings["head"]]
        keys += [f"{key}.image.{size}" for size in settings["image"] if size in _SIZES]
        if "vocabulary" in settings:
            keys.append(f"{key}.vocabulary.file")
    now = Tree(draft.config().to_dict())
    differing = [key for key in keys if recorded.value(key) != now.value(key)]
    values = {key: recorded.value(key) for key in ("visft.model.name", *differing)}
    if draft.visft.heads.start != "random":
        values["visft.heads.path"] = f"{first.run}/{EXPORT}"
    why = f"stage 1 of these heads, {first.run}"
    draft.decide(values, why)
    draft.decide({key: None for key in was_off if now.value(key) is not None}, why, over_user=True)


def _is_mentioned(draft: Draft, task: str) -> bool:
    """Return True if a flag speaks of this task (its key), or `--tasks` of all that is on.

    `--batch-size` speaks of no task.
    """
    for key, source in draft.tree.sources.items():
        of_task = key.startswith(f"{task}.") and source.startswith("--") and source != "--batch-size"
        if of_task or source.startswith("--tasks "):
            return True
    return False


def _decide_tasks(draft: Draft, manifests: Sequence[Manifest], batch_size: int | None) -> None:
    """Turn tasks of the shipped recipe off that the shards do not teach, and those of label, depth and
    panoptic maps on.

    A task that the user mentions is wanted, and what it lacks is an error. Where nothing would be left,
    nothing is decided, nor where several sets may teach different tasks.
    """
    if len(manifests) != 1:
        return
    (manifest,) = manifests
    visft = draft.visft
    tasks = visft.tasks.enabled()
    lacking = dict[str, str]()
    for name, task in tasks.items():
        key = f"visft.tasks.{name}"
        sources = {source for other, source in draft.tree.sources.items() if other.startswith(f"{key}.")}
        is_shipped = f"{CONFIG_ROOT.name}/stage{visft.stage}.json" in sources
        if not is_shipped or _is_mentioned(draft, key):
            continue
        if task.labels in ("captions", "depth", "panoptic"):
            lacks = "" if manifest.counts.get(task.labels) else task.labels
        elif manifest.counts.get("trainable"):
            lacks = task.misleads(manifest.counts, manifest.findings) or ""
        else:
            lacks = "objects"
        if lacks:
            lacking[key] = lacks
    settings = {} if batch_size is None else {"batch_size": batch_size}
    maps = {"semantic": "label maps", "depth": "depth maps", "panoptic": "panoptic maps"}
    added = [name for name in maps if config_class(name).labels in manifest.labels and name not in tasks]
    for name in added:
        draft.decide({f"visft.tasks.{name}": settings}, f"the data, which has {maps[name]}")
    if added or len(lacking) < len(tasks):
        for key, lacks in lacking.items():
            draft.decide({key: None}, f"the data, which has no {lacks}", over_user=True)


def _decide_tiles(draft: Draft, side: str, manifests: Sequence[Manifest]) -> None:
    """`--tile`: the side of tiles, or none."""
    least, most = SIDES
    if side != "none" and not (side.isdecimal() and least <= int(side) <= most):
        raise ValueError(f"--tile {side} is not allowed: give {least} to {most} pixels, or none")
    tile = None
    if side != "none":
        sizes = _object_sizes(manifests)
        tile = [int(side), usual_overlap(int(side), sizes.largest if sizes else 0.0)]
    values = dict[str, Any]()
    for name, stream in draft.visft.streams().items():
        if "tile" in stream.image:
            values[f"{stream.key}.image.tile"] = tile
        elif tile is not None:
            raise ValueError(f"--tile {side}: {name} takes whole images only: leave it out of --tasks")
    draft.decide(values, "--tile", over_user=True)


def _samples(stream: Stream, manifests: Sequence[Manifest]) -> int:
    """Number of training images, or of their tiles."""
    tiles = stream.tiles
    if tiles is None:
        return sum(len(manifest) for manifest in manifests)
    return sum(len(tiles.samples(manifest.index, np.arange(len(manifest)))) for manifest in manifests)


def _decide_length(draft: Draft, epochs: int, manifests: Sequence[Manifest]) -> None:
    """`--epochs`: so many passes of each task through the training images, or their tiles."""
    if not manifests:
        raise ValueError("--epochs needs shards in a folder of this machine: give --steps")
    values: dict[str, int | None] = {"scheduler.params.total_num_steps": None}
    for stream in draft.visft.streams().values():
        images = _samples(stream, manifests)
        steps = math.ceil(epochs * images / min(stream.batch_size, images))
        for name in stream.tasks:
            values[f"visft.tasks.{name}.steps"] = steps
    draft.decide(values, "--epochs")


class _ObjectSizes(NamedTuple):
    """Typical sizes in a split, in pixels."""

    picture: float  #: longer side of a picture
    small: float  #: side of an object that nine of ten exceed
    largest: float  #: side of an object that one of twenty exceeds


def _object_sizes(manifests: Sequence[Manifest]) -> _ObjectSizes | None:
    """Sizes in the split with the smallest objects; None: no split has boxes."""
    with_sides = [manifest for manifest in manifests if manifest.object_sides]
    if not with_sides:
        return None
    manifest = min(with_sides, key=lambda other: other.object_sides["10"])
    heights = manifest.index["height"].astype(float)
    widths = manifest.index["width"].astype(float)
    scale = float(np.median(np.sqrt(heights * widths)))
    return _ObjectSizes(
        picture=float(np.median(np.maximum(heights, widths))),
        small=manifest.object_sides["10"] * scale,
        largest=manifest.object_sides["95"] * scale,
    )


def _has_dense_head(visft: VisftConfig) -> bool:
    """Return True if boxes are learnt by the head that predicts one from every cell."""
    detection = visft.tasks.enabled().get("detection")
    return detection is not None and getattr(detection.head, "type", "") == "dense"


def _stream_of_detection(visft: VisftConfig) -> Stream:
    """Steps in which boxes are learnt."""
    streams = visft.streams()
    return streams.get(SHARED) or streams["detection"]


def _decide_by_objects(draft: Draft, manifests: Sequence[Manifest], fine_block: int | None) -> None:
    """A larger picture and a finer grid for a dense head, where SIDE and CELL would hide a tenth of the
    objects, and tiles where LONGEST and FINE_CELL would.

    A cell for each object is what they need (docs/own-data.md).
    """
    visft = draft.visft
    sizes = _object_sizes(manifests)
    if fine_block is None or not _has_dense_head(visft) or sizes is None:
        return
    if draft.tree.is_stated("visft.model.out_indices"):
        return
    stream = _stream_of_detection(visft)
    side_key = f"{stream.key}.image.fixed_size"
    tile_key = f"{stream.key}.image.tile"
    side = stream.largest_side()
    has_side = draft.tree.is_stated(side_key)

    tiles = stream.tiles
    takes_tiles = all(task.labels == "annotations" for task in visft.tasks.enabled().values())
    would_show_all = min(FINE_CELL * sizes.picture / sizes.small, sizes.picture)
    is_free = not has_side and not draft.tree.is_stated(tile_key)
    if takes_tiles and is_free and would_show_all > LONGEST:
        tile = max(SIDE, math.ceil(SIDE / IN_TILES * sizes.small / 32) * 32)
        tiles = Tiles(tile, usual_overlap(tile, sizes.largest))
    shown = sizes.picture if tiles is None else min(tiles.side, sizes.picture)
    cells = shown / sizes.small  # as many along what the network sees at once give such an object one
    if CELL * cells <= side:
        return
    needed = math.ceil(FINE_CELL * cells / 32) * 32
    if not has_side:
        own = math.ceil(shown / 32) * 32
        side = max(SIDE, min(needed, own, LONGEST))
    limit = f" ({needed} would show nearly all)" if side < needed else ""
    cut = "" if tiles is None else f"tiles of {tiles.side}, "
    values = {
        "visft.model.out_indices": [fine_block, *visft.model.out_indices],
        side_key: side,
        f"{stream.key}.image.keep_shape": True,
        f"{stream.key}.batch_size": FINE_BATCH if tiles is None else TILE_BATCH,
    }
    if tiles is not None:
        values[tile_key] = list(tiles)
    objects = f"objects of {sizes.small:.0f} px in pictures of {sizes.picture:.0f}"
    draft.decide(values, f"{objects}: {cut}side {side}{limit}, grid of {FINE_CELL}")


def _decide_masks(draft: Draft, fine_block: int | None) -> None:
    """Masks of the dense head's boxes in place of a head of their own, where boxes and masks are learnt.

    They also read the finer map; boxes of large objects do not. Who sets an option of the other head has
    both.
    """
    visft = draft.visft
    key = "visft.tasks.detection.head"
    if not _has_dense_head(visft) or "segmentation" not in visft.tasks.enabled():
        return
    if draft.tree.is_stated(f"{key}.masks") or draft.tree.is_stated("visft.tasks.segmentation.head"):
        return
    if any(data_set.tasks for data_set in visft.data.sets):
        return
    why = "one mask for each box, of data with both"
    draft.decide({f"{key}.masks": True, "visft.tasks.segmentation": None}, why, over_user=True)
    is_stated = draft.tree.is_stated("visft.model.out_indices")
    if fine_block is not None and len(visft.model.out_indices) == 1 and not is_stated:
        values = {"visft.model.out_indices": [fine_block, *visft.model.out_indices], f"{key}.box_map": 1}
        draft.decide(values, f"masks, which also read the map of stride {FINE_CELL}")


def _decide_paste(draft: Draft, manifests: Sequence[Manifest]) -> None:
    """Objects of other photographs in each one, where masks of boxes are learnt of whole photographs.

    Captions, label and depth maps say nothing of what is pasted, and ellipses that stand for masks would
    carry their surroundings along.
    """
    visft = draft.visft
    tasks = visft.tasks.enabled()
    detection = tasks.get("detection")
    if detection is None or not getattr(detection.head, "masks", False):
        return
    stream = _stream_of_detection(visft)
    key = f"{stream.key}.image.paste"
    others = [name for name in stream.tasks if tasks[name].labels != "annotations"]
    if others:
        draft.decide({key: 0}, f"{', '.join(others)}, whose labels know nothing of pasted objects")
    elif any(manifest.options.get("masks_from_boxes") for manifest in manifests):
        draft.decide({key: 0}, "masks that are ellipses drawn into boxes")
    elif stream.tiles is None:
        draft.decide({key: PASTED}, "objects with masks, pasted into other photographs")


def _decide_for_few(draft: Draft, manifests: Sequence[Manifest]) -> None:
    """Length, zoom, kept features and evaluations in between, by number and labels of the photographs."""
    images = sum(len(manifest) for manifest in manifests)
    visft = draft.visft.filled()
    tasks = visft.tasks.enabled()
    has_scenes = tasks.keys() <= _OF_SCENES
    values: dict[str, Any] = {}
    steps = draft.recipe.scheduler.params.total_num_steps or visft.steps() or STEPS
    if visft.stage == 1:
        stream = next(iter(visft.streams().values()))
        is_fine = stream.tiles is None and bool(stream.image.get("keep_shape"))
        if not draft.tree.is_stated("scheduler.params.total_num_steps"):
            passes = FINE_PASSES if is_fine and not has_scenes else PASSES
            steps = max(STEPS, math.ceil(passes * images / stream.batch_size))
            values["scheduler.params.total_num_steps"] = steps
        views = FINE_VIEWS if is_fine else VIEWS
        if has_scenes:
            views = SCENE_VIEWS
        elif stream.tiles is not None:  # which are views of their picture themselves
            views = max(1, VIEWS * images // _samples(stream, manifests))
        values["visft.features.views"] = views
        values["visft.features.cache"] = f"{visft.run.out}/features" if images <= MOST_KEPT else None
        if "captioning" in tasks:
            values["visft.shared.image.zoom"] = ZOOM_WITH_CAPTIONS
    every = math.ceil(steps / EVALUATIONS)
    values["visft.run.save_every"] = every
    values["visft.run.eval_every"] = 0
    is_off = draft.tree.is_stated("visft.run.eval_every") and visft.run.eval_every == 0
    if manifest_path(Path(visft.data.root), visft.data.val).is_file() and not is_off:
        values["visft.run.eval_every"] = every
        first = config_class(next(iter(tasks)))
        values["visft.run.keep_best"] = first.of_best_step or first.main
    draft.decide(values, f"the recipe for {images} photographs")


def _decide_sizes(draft: Draft, sets: TrainingSets, processes: int) -> None:
    """Bands of the backbone, classes of the heads, and batches that the images fill."""
    _decide_bands(draft, sets)
    _decide_depths(draft, sets)
    _decide_classes(draft, next(iter(sets.values())).manifest)
    _decide_detections(draft, sets)
    visft = draft.visft
    dp = max(1, processes // (draft.recipe.pipeline.stages if draft.recipe.pipeline else 1))
    streams = visft.streams()
    for name, stream in streams.items():
        images = min(len(plan.samples) for plan in samples_of(visft, stream, sets).values())
        # All tasks are accumulated equally often, so a size that the others' does not divide would force
        # large micro-batches on them.
        unit = math.gcd(*(other.batch_size for key, other in streams.items() if key != name))
        if not 0 < unit <= images:
            unit = dp
        smaller = images // unit * unit
        if images < stream.batch_size and smaller:
            why = f"the data has {images} images, fewer than a batch of {stream.batch_size}"
            draft.decide({f"{stream.key}.batch_size": smaller}, why, over_user=True)


def _decide_bands(draft: Draft, sets: TrainingSets) -> None:
    """The bands that the pictures of the first set have; those of other sets have to be alike."""
    bands = next(iter(sets.values())).manifest.bands
    model = draft.visft.model
    if bands is not None and model.bands is None:
        why = f"the data, which has {in_words(bands)}"
        decided = {**bands.model_dump(mode="json"), "new": model.new_bands}
        draft.decide({"visft.model.bands": decided}, why)
    if bands is None and model.new_bands != "mean":
        raise ValueError(
            "visft.model.new_bands=zero is for pictures of more than three bands, not for colours"
        )
    for training_set in sets.values():
        check_bands(training_set.manifest, draft.visft.model.bands)


def _decide_depths(draft: Draft, sets: TrainingSets) -> None:
    """Depths as far as those of the data, where these lie beyond what a head predicts by default; none in
    metres after relative maps alone.
    """
    task = draft.visft.tasks.enabled().get("depth")
    if task is None:
        return
    manifests = [taught.manifest for taught in sets.values() if "depth" in taught.manifest.labels]
    if all(manifest.has_relative_depth for manifest in manifests):
        why = "the data, whose depth maps are relative: predictions have no unit"
        draft.decide({"visft.tasks.depth.head.relative": True}, why)
    farthest = max((manifest.farthest or 0.0 for manifest in manifests), default=0.0)
    if farthest > type(task.head).model_fields["farthest"].default:
        why = f"the data, whose depths reach {farthest:.1f} m"
        draft.decide({"visft.tasks.depth.head.farthest": float(math.ceil(farthest))}, why)


def _decide_detections(draft: Draft, sets: TrainingSets) -> None:
    """Room for all objects of the fullest image, where it has more than heads predict, and for mistakes."""
    for name, task in draft.visft.tasks.enabled().items():
        taught = [of_set.manifest for of_set in sets.values() if name in of_set.tasks]
        most = max((int(manifest.index["num_annotations"].max(initial=0)) for manifest in taught), default=0)
        if most > getattr(task.head, "max_detections", most):
            room = math.ceil(1.5 * most / 100) * 100
            key = f"visft.tasks.{name}.head.max_detections"
            draft.decide({key: room}, f"the data, which has up to {most} objects in an image")


def _decide_classes(draft: Draft, first: Manifest) -> None:
    """As many classes as ROOT/TRAIN (`first`) has categories, for maps and ids that are not COCO's."""
    if first.panoptic and "panoptic" in draft.visft.tasks.enabled():
        key = "visft.tasks.panoptic.head"
        stuff = [category.coco_id for category in first.panoptic if not category.thing]
        of_head = {f"{key}.num_classes": len(first.panoptic), f"{key}.stuff": stuff}
        of_head = {name: value for name, value in of_head.items() if name not in draft.tree.sources}
        draft.decide(of_head, f"the data, which has {len(first.panoptic)} panoptic categories")
    are_own = any(category.coco_id not in COCO_NAMES for category in first.categories)
    if "maps" not in first.labels and not are_own:
        return
    values = dict[str, int]()
    for name, task in draft.visft.tasks.enabled().items():
        key = f"visft.tasks.{name}.head.num_classes"
        has_published = getattr(task.head, "class_ids", "") == "published"  # which has COCO's ids only
        is_panoptic = task.labels == "panoptic"
        if task.has_classes and not is_panoptic and not has_published and key not in draft.tree.sources:
            values[key] = len(first.categories)
    draft.decide(values, f"the data, which has {len(first.categories)} categories")
