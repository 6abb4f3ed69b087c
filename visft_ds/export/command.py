"""`visft export`: a run's model as files, compared with our own predictions before the folder is kept."""

from __future__ import annotations

import json
import logging
import os
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision.transforms.v2.functional as tvf
from torch import Tensor, nn

from visft_ds import __version__
from visft_ds.config.record import recorded_config
from visft_ds.data.decode import stored_pixels
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.data.transforms import Op, Size
from visft_ds.evaluation import measure
from visft_ds.export.graph import Features, Frame, Maps, merged_adapters, modules_of
from visft_ds.export.page import NO_BOXES, write_page
from visft_ds.export.readme import readme
from visft_ds.export.verify import FEATURES, Difference
from visft_ds.files import reading, write_text
from visft_ds.model import normalise_pixels
from visft_ds.predict.exported import FACTS_FILE, FORMAT, KEY, SUFFIXES, ExportedModel, open_exported
from visft_ds.predict.images import OpenedImage, find_images, open_file
from visft_ds.predict.loading import source_of
from visft_ds.predict.model import Model
from visft_ds.predict.results import Prediction
from visft_ds.randomness import generator
from visft_ds.run_files import check_new, folder_of_run, run_of
from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.task_schema import Stream
from visft_ds.settings.tiles import Tiles
from visft_ds.tasks import TASKS, Results, config_class
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.transform import geometry_of

Images = Mapping[int, OpenedImage]  #: by id
Predictions = Mapping[int, Prediction]  #: by id
#: protobuf holds 2 GiB at most; above this the weights lie beside the graph, in FILE.data.
_LARGEST_GRAPH = 1_900_000_000
_NO_TASKS = "none"  #: value of --tasks that leaves the backbone alone
_LARGEST_LOSS = 0.01  #: of a metric, by fewer bits
_CALIBRATION = 64  #: pictures


def export(flags: Namespace) -> None:
    """Write what the flags of `visft_ds.export.cli` ask for.

    Raises ValueError for files or flags that do not fit each other, and for an export that predicts
    otherwise than the model.
    """
    _check(flags)
    has_fewer_bits = flags.half or flags.int8
    model = _load(flags)
    tiles = model.tiles_of(None)
    if flags.web:
        _check_page(flags.run, model, tiles)
    pictures = _Pictures(flags, model.bands)
    model.geometry = pictures.geometry(model._streams)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=flags.out.parent, prefix=f".{flags.out.name}.tmp-") as temporary:
        folder = Path(temporary) / "out"
        folder.mkdir()
        print(f"model    {flags.run}: {', '.join(model.tasks) or 'the backbone alone'}")
        if has_fewer_bits:
            flags.verify = None
        images = pictures.some(flags.verify)
        with merged_adapters(model._loaded.module.backbone):
            facts = _write_files(model, flags, folder)
        if flags.int8:
            _quantise(folder, list(_seen(pictures.some(_CALIBRATION), tiles).values()))
        if model.tasks:
            exported = ExportedModel(folder)
            lines: list[str] = []
            # Of tiles whole pictures are measured, and tiles compared: rounding may join other boxes.
            if not has_fewer_bits:
                ours, theirs, lines = _verified(model, exported, _seen(images, tiles))
            if flags.verify is None:
                if has_fewer_bits or tiles is not None:
                    ours = _predicted(model, images, tiles)
                    theirs = _predicted(exported, images, tiles)
                lines += _measured(flags, model, ours, theirs, pictures)
        else:
            path = folder / f"features{SUFFIXES[flags.format]}"
            lines = _verified_maps(model, list(images.values()), path)
        if flags.web:
            write_page(folder, facts)
        write_text(folder / "README.md", readme(flags.out.name, flags.format, facts, lines))
        os.replace(folder, flags.out)
    print(f"out      {flags.out} ({flags.format}); README.md: how to run it")


def _check(flags: Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    check_new(flags.out)
    if flags.half and flags.int8:
        raise ValueError("--half and --int8 exclude each other")
    if flags.int8 and flags.format != "onnx":
        raise ValueError("--int8 is of --format onnx, by the quantiser of onnxruntime")
    if flags.web and (flags.format != "onnx" or flags.tasks == _NO_TASKS):
        raise ValueError(NO_BOXES)
    if flags.tasks == _NO_TASKS and (flags.half or flags.int8):
        bits = "--half" if flags.half else "--int8"
        raise ValueError(
            f"{bits} needs a task, whose metrics tell what is lost: leave out --tasks {_NO_TASKS}"
        )


def _check_page(run: Path, model: Model, tiles: Tiles | None) -> None:
    """Raise ValueError for a model that `--web` has no page of."""
    if model.bands is not None:
        raise ValueError(f"--web shows photographs, and {run} reads {in_words(model.bands)}")
    if not {"detection", "segmentation"}.intersection(model.tasks):
        raise ValueError(NO_BOXES)
    if tiles is not None:
        raise ValueError(f"--web shows whole photographs, and {run} sees tiles of {tiles.side} pixels")


def _load(flags: Namespace) -> Model:
    """The model of a run in fp32 on the CPU; its captions are the most probable word after each other."""
    parts = source_of(
        flags.run,
        tasks=flags.tasks,
        backbone=flags.backbone,
        download=flags.download,
        heads=flags.heads,
        adapter=flags.adapter,
        vocabulary=flags.vocabulary,
        beam_size=1,
        alone=flags.tasks == _NO_TASKS,
    )
    return Model(flags.run, *parts.build("fp32", torch.device("cpu")))


class _Pictures:
    """Pictures of the flags, or else of the run's validation split."""

    def __init__(self, flags: Namespace, bands: Bands | None = None) -> None:
        self.bands = bands  #: that the model reads
        self.shape: Size | None = flags.picture_size
        self.is_noise_enough = flags.tasks == _NO_TASKS  #: nothing is found in them
        self.files = list(find_images(flags.images).values()) if flags.images else []
        self.manifest: Manifest | None = None
        self.problem = f"{flags.run} is no run"
        run = run_of(flags.run)
        if run is not None:
            data = recorded_config(folder_of_run(run)).visft.data
            try:
                self.manifest = Manifest.load(os.fspath(data.root), data.val)
            except (ValueError, OSError) as error:
                self.problem = str(error)

    def some(self, count: int | None) -> Images:
        """The first pictures, or all, by their ids. Raises ValueError if there are none."""
        if self.files:
            return {number: self._open(path) for number, path in enumerate(self.files[:count])}
        if self.manifest is None and self.is_noise_enough:
            return {0: OpenedImage(_example(self.bands)["images"][0].numpy(), None)}
        if self.manifest is None:
            raise ValueError(f"no pictures to compare predictions on: give --images ({self.problem})")
        images = {}
        with ShardReader(self.manifest) as reader:
            for index, entry in enumerate(self.manifest.index[:count]):
                data, _ = reader.read(index, "images")
                with reading(reader.describe(index), "a picture"):
                    pixels = stored_pixels(data or b"", self.bands)
                images[int(entry["image_id"])] = OpenedImage(pixels, None)
        return images

    def _open(self, path: Path) -> OpenedImage:
        return open_file(path, bands=self.bands)

    def geometry(self, streams: Mapping[str, Stream]) -> dict[str, Sequence[Op]]:
        """Stream -> what an evaluation does to a picture, where most have the same shape."""
        shape = self.shape or (480, 640)
        if self.shape is None and self.manifest is not None:
            sizes = Counter(self.manifest.index[["height", "width"]].tolist())
            shape = sizes.most_common(1)[0][0]
        elif self.shape is None and self.files:
            shape = self._open(self.files[0]).pixels.shape[:2]
        drawn: dict[str, Sequence[Op]] = {}
        for name, stream in streams.items():
            seen = shape if stream.tiles is None else stream.tiles.windows(*shape)[0][2:]
            drawn[name] = geometry_of(stream).draw(seen, False, generator(0))
        return drawn

    def metrics(self, predictions: Predictions, model: Model) -> dict[str, float]:
        """Metrics of predictions of the whole split; none of pictures without labels."""
        if self.manifest is None or self.files:
            return {}
        collected: dict[str, Results] = {task: [] for task in model.tasks}
        for image_id, prediction in predictions.items():
            for task, results in prediction.to_coco(image_id).items():
                collected[task] += results
        heads = {task: info.settings() for task, info in model._loaded.heads.items()}
        with ShardReader(self.manifest) as reader:
            numbers, _ = measure(collected, reader, heads)
        return numbers


@torch.no_grad()
def _write_files(model: Model, flags: Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Write a file of each module; returns their facts by name."""
    loaded = model._loaded
    backbone = loaded.module.backbone
    licence = getattr(backbone, "pretrained_cfg", {}).get("license") or "that of the base weights"
    common: dict[str, Any] = {
        "format": FORMAT,
        "visft_ds": __version__,
        "license": licence,
        "mean": list(backbone.pixel_mean),
        "std": list(backbone.pixel_std),
    }
    if model.bands is None:
        common["colours"] = "RGB"
    else:
        common["bands"] = model.bands.model_dump(mode="json")
    facts = {}
    suffix = SUFFIXES[flags.format]
    if not model.tasks:
        size = (backbone.image_size, backbone.image_size)
        features = Features(Maps(backbone, Frame(size, size)))
        facts["features"] = {**common, "task": None, "image_size": list(size)}
        _write(features, _example(model.bands), folder / f"features{suffix}", facts["features"])
    for stream in model._streams.values():
        frame = Frame.of(model.geometry[stream.name], backbone.patch_size)
        maps = Maps(backbone, frame, half=flags.half)
        for task in stream.tasks:
            _check_windows(task, stream)
            of_task = {**common, "task": task, "image_size": list(frame.size)}
            of_task |= _classes(model, task, stream)
            if stream.tiles is not None:
                of_task["tiles"] = list(stream.tiles)
            if task == "detection" and model.has_instances:
                of_task["box_masks"] = True
            ids = [category["id"] for category in of_task.get("categories", ())]
            example = _example(model.bands)
            for name, module in modules_of(task, maps, loaded.module.heads[task], ids).items():
                facts[name] = of_task
                _write(module.eval(), example, folder / f"{name}{suffix}", of_task)
                if name.endswith("_encoder"):  # what it gives is read by the step of captions
                    example = {"words": torch.zeros(2, dtype=torch.int64), **module(**example)}
    return facts


def _quantise(folder: Path, pictures: Sequence[OpenedImage]) -> None:
    """Let the files compute in 8 bits, calibrated on some of the pictures."""
    from visft_ds.export.eight_bits import quantise

    some = [picture.pixels for picture in pictures[:: -(-len(pictures) // _CALIBRATION)]]
    for path in sorted(folder.glob("*.onnx")):
        if not path.stem.endswith("_step"):
            with _quiet():
                quantise(path, some)
            print(f"8 bits   {path.name}, {path.stat().st_size / 1e6:.1f} MB")


def _seen(images: Images, tiles: Tiles | None) -> Images:
    """Pictures as a model sees them at once, by number: whole, or their tiles."""
    if tiles is None:
        return images
    parts = [
        OpenedImage(image.pixels[top : top + height, left : left + width].copy(), None)
        for image in images.values()
        for top, left, height, width in tiles.windows(*image.pixels.shape[:2])
    ]
    return dict(enumerate(parts))


def _predicted(model: Model, images: Images, tiles: Tiles | None) -> Predictions:
    """Predictions for whole pictures."""
    if tiles is None:
        return {number: model.predict_opened([image], 0.0)[0] for number, image in images.items()}
    return {number: model.predict_tiles(image, tiles, 0.0, 1) for number, image in images.items()}


def _check_windows(task: str, stream: Stream) -> None:
    window = stream.image.get("window")
    if task == "semantic" and window and stream.image["fixed_size"] is None:
        raise ValueError(
            f"semantic segmentation looks through windows of {window} pixels here, which no export has: "
            "train with --set visft.tasks.semantic.image.window=null, or leave it out with --tasks"
        )


def _classes(model: Model, task: str, stream: Stream) -> dict[str, Any]:
    """Facts about the labels of a task: the category of each, or the word of each id."""
    info = model._loaded.heads[task]
    if task == "depth":
        return {"relative": info.settings().relative}
    if TASKS[task].uses_vocabulary:
        vocabulary = model._loaded.vocabulary
        assert vocabulary is not None
        length = model._loaded.module.decoding[task]["max_length"]
        return {"words": list(vocabulary.ids), "max_length": length}
    number = info.options["num_classes"]
    usual = getattr(TASKS[task], "categories", range(number))[:number]
    ids = stream.classes.get(task, usual)
    categories = [{"id": id_, "name": category_name(id_, model.categories)} for id_ in ids]
    if task == "panoptic":
        for category in categories:
            category["isthing"] = int(category["id"] not in model.stuff)
    return {"categories": categories, "max_detections": info.options.get("max_detections")}


def _example(bands: Bands | None) -> dict[str, Tensor]:
    """Arguments of a module of pictures; their sizes are those of nothing else."""
    random = torch.Generator().manual_seed(0)
    if bands is None:
        return {"images": torch.randint(0, 256, (2, 61, 83, 3), generator=random).to(torch.uint8)}
    low, high = bands.range
    noise = low + (high - low) * torch.rand(2, 61, 83, len(bands.numbers), generator=random)
    return {"images": noise.to(getattr(torch, bands.kind))}


def _write(module: nn.Module, example: Mapping[str, Tensor], path: Path, facts: Mapping[str, Any]) -> None:
    """Write a module with its facts."""
    module.requires_grad_(False)
    dims = [torch.export.Dim(name) for name in ("batch", "height", "width")]
    shapes = {key: dict(enumerate(dims if key == "images" else dims[:1])) for key in example}
    with _quiet():
        try:
            program = torch.export.export(module, (), dict(example), dynamic_shapes=shapes, strict=False)
            if path.suffix == SUFFIXES["torch"]:
                torch.export.save(program, path, extra_files={FACTS_FILE: json.dumps(facts)})
            else:
                outputs: Any = program.call_spec.out_spec
                graph: Any = torch.onnx.export(
                    program, dynamo=True, output_names=outputs.context, verbose=False
                )
                graph.model.metadata_props[KEY] = json.dumps(facts)
                size = sum(value.nbytes for value in module.state_dict().values())
                graph.save(path, external_data=size > _LARGEST_GRAPH)
        except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as error:
            first = str(error.__cause__ or error).split("\n")[0]
            raise ValueError(f"torch {torch.__version__} cannot export {path.stem}: {first}") from error
    print(f"written  {path.name}, {path.stat().st_size / 1e6:.1f} MB")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch, onnxscript and onnxruntime's quantiser say about their own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def _maps_of(model: Model, image: OpenedImage) -> Sequence[Tensor]:
    """Our maps (1, D, h, w) of a picture at the size of an export of the backbone alone."""
    backbone = model._loaded.module.backbone
    size = [backbone.image_size, backbone.image_size]
    pixels = torch.from_numpy(model.seen(image.pixels)).permute(2, 0, 1)[None]
    scaled = tvf.resize(pixels, size, antialias=True)
    maps: Sequence[Tensor] = backbone(normalise_pixels(backbone, scaled, torch.tensor([size])))
    return maps


def _verified_maps(model: Model, images: Sequence[OpenedImage], path: Path) -> list[str]:
    """A line, printed, about how far the maps of an exported backbone are from ours.

    Raises ValueError where that is more than FEATURES.
    """
    file = open_exported(path)
    differences = []
    for image in images:
        their_maps = file.run({"images": image.pixels[None]}).values()
        for our_map, their_map in zip(_maps_of(model, image), their_maps, strict=True):
            differences.append(float((torch.from_numpy(their_map) - our_map).norm() / our_map.norm()))
    largest = max(differences)
    line = f"features: relative difference {largest:.1e} on {len(images)} pictures"
    problem = f"features differ by {largest:.2g} of ours (limit {FEATURES:g})"
    return _print_lines([line], [problem] if largest > FEATURES else [])


def _verified(
    model: Model, exported: ExportedModel, images: Images
) -> tuple[Predictions, Predictions, list[str]]:
    """Our predictions, those of the export, and lines about how they differ, which are printed.

    Raises ValueError where they differ by more than rounding.
    """
    ours = {}
    theirs = {}
    differences = {task: Difference(task) for task in model.tasks}
    for number, image in images.items():
        (their,) = exported.predict_opened([image], 0.0)
        attended = exported.outputs.get("segmentation", {}).get("attended")
        if attended is None:
            (our,) = model.predict_opened([image], 0.0)
        else:
            our = differences["segmentation"].follow(model, image, attended)
        for difference in differences.values():
            difference.add(replace(our), replace(their))  # copies: masks they decode go with them
        ours[number] = our
        theirs[number] = their
    seen = "pictures" if model.tiles_of_training() is None else "tiles"
    lines = []
    problems = []
    for task, difference in differences.items():
        lines.append(f"{task}: {difference.describe()} on {len(ours)} {seen}")
        problems += difference.problems()
    return ours, theirs, _print_lines(lines, problems)


def _measured(
    flags: Namespace,
    model: Model,
    ours: Predictions,
    theirs: Predictions,
    pictures: _Pictures,
) -> list[str]:
    """Lines about the metrics of both, which are printed. Raises ValueError where fewer bits have lost more
    than a point.
    """
    lines = []
    problems = []
    before = pictures.metrics(ours, model)
    after = pictures.metrics(theirs, model)
    configs = [config_class(task) for task in model.tasks]
    if model.has_instances:
        configs.append(config_class("segmentation"))
    decisive = {name for config in configs for name in (config.main, config.of_best_step)}
    for name, value in before.items():
        if name in decisive:
            lines.append(f"{name} {value:.4f}, of the export {after[name]:.4f}")
            if value - after[name] > _LARGEST_LOSS and not flags.allow_loss:
                problems.append(f"{name} falls from {value:.4f} to {after[name]:.4f}")
    if not before and (flags.half or flags.int8) and not flags.allow_loss:
        problems.append("without labelled pictures nobody knows what fewer bits cost: --allow-loss")
    return _print_lines(lines, problems)


def _print_lines(lines: list[str], problems: Sequence[str]) -> list[str]:
    """The lines, printed. Raises ValueError with the problems."""
    for line in lines:
        print(f"verify   {line}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}; nothing is kept")
    return lines
