"""Trained model from a run, an export or merged weights: images in, typed predictions or features out.

Letters: B images, H W pixels, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from visft_ds import distributed
from visft_ds.data.decode import as_rgb, levels
from visft_ds.data.samples import RawSample
from visft_ds.data.transforms import Op
from visft_ds.files import MAX_PIXELS, release
from visft_ds.flags import check_options, speaking_python
from visft_ds.model import normalise_pixels
from visft_ds.ops import DTYPES, at_least_float32
from visft_ds.predict.images import MOST_IN_TILES, ImageInMemory, ImageInput, OpenedImage, opened
from visft_ds.predict.loading import LoadedModel, ModelSource, source_of
from visft_ds.predict.results import Prediction
from visft_ds.prepare.model import choose_precision
from visft_ds.randomness import generator
from visft_ds.settings.bands import in_words
from visft_ds.settings.task_schema import Stream
from visft_ds.settings.tiles import SIDES, Tiles, usual_overlap
from visft_ds.tasks import TASKS, Results, config_class
from visft_ds.tasks.tiles import LEAST_SURE, merged
from visft_ds.tasks.transform import pipeline_of

_TILES_ON_CPU = 4  # at a time: more are no faster there, and take their memory


@speaking_python()
def load(
    source: str | Path,
    *,
    tasks: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    backbone: str | Path | None = None,
    download: bool = False,
    heads: str | Path | None = None,
    adapter: str | Path | None = None,
    vocabulary: str | Path | None = None,
    image_size: int | None = None,
) -> Model:
    """Load a trained model for predictions.

    Args:
        source: folder of a finished run, or RUN/checkpoints/step_N; its export folder, which may have moved;
            a folder of `visft export`; or merged weights (a file, or the folder that merging wrote) together
            with `heads`.
        tasks: names, in a list or with commas; default: all that have a head.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if there is one.
        precision: "fp32", "bf16", "fp16" or "auto"; default: the run's.
        backbone, heads, adapter: file or name, folder of heads and adapter folder that replace the source's;
            adapter "none" leaves it out.
        download: download a missing backbone from the Hugging Face hub.
        vocabulary: word map of a published captioning head.
        image_size: side in pixels of the squares that images are resized to; default: as in the run, or as in
            the paper without a run.

    Raises:
        ValueError: no model there, a run that has not written what it trained yet, or parts that do not fit.

    Example:
        >>> model = visft_ds.load("runs/stage2", tasks="detection,captioning", device="cpu")
        >>> model.tasks
        ('detection', 'captioning')
    """
    check_options(image_size=image_size)
    from visft_ds.predict.exported import ExportedModel, exported_files  # which builds on this module

    path = Path(source)
    if exported_files(path):
        others = (tasks, backbone, heads, adapter, vocabulary, image_size)
        if any(other is not None for other in others) or device not in (None, "cpu"):
            raise ValueError(f"{source} is an export, whole and for CPUs here: leave out all but its folder")
        return ExportedModel(path)
    parts = source_of(
        path,
        tasks=tasks,
        backbone=backbone,
        download=download,
        heads=heads,
        adapter=adapter,
        vocabulary=vocabulary,
        precision=precision,
        side=image_size,
    )
    return Model(path, *_build(parts, device))


@speaking_python()
def load_backbone(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    backbone: str | Path | None = None,
    download: bool = False,
    adapter: str | Path | None = None,
) -> ImageFeatures:
    """Load the backbone alone, with the adapter in it, without heads; arguments and errors as those of
    `load`.

    Example:
        >>> backbone = visft_ds.load_backbone("runs/stage2", device="cpu")
        >>> backbone(torch.zeros(1, 3, 56, 56)).shape
        torch.Size([1, 16, 4, 4])
    """
    parts = source_of(
        Path(source),
        backbone=backbone,
        download=download,
        adapter=adapter,
        precision=precision,
        alone=True,
    )
    loaded, _ = _build(parts, device)
    return ImageFeatures(loaded)


class ImageFeatures(nn.Module):
    """Backbone with its adapter: images (B, 3, H, W) to features (B, D, h, w), h and w in whole patches.

    Images are RGB, uint8 from 0 to 255 or float from 0 to 1, and normalised here; features are float32. It is
    in evaluation mode, and no parameter requires a gradient until you set it.

    Example:
        >>> backbone = visft_ds.load_backbone("runs/stage2", device="cpu")
        >>> images = torch.rand(2, 3, 56, 40)
        >>> backbone(images).shape, backbone.patch_size
        (torch.Size([2, 16, 4, 3]), 14)
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.backbone = loaded.module.backbone  #: takes normalised pixels
        self.width = self.backbone.width  #: D
        self.patch_size = self.backbone.patch_size  #: pixels per step of the grid
        self.precision = loaded.precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of whole images, the last map; sides that are no whole cells are extended with the mean
        colour.

        Args:
            images: (B, 3, H, W) RGB, uint8 from 0 to 255 or float from 0 to 1, H and W at least one patch;
                of a model of bands (B, n, H, W) float, shares of its range. They are normalised here.

        Returns:
            (B, D, h, w) float32.
        """
        channels = len(self.backbone.pixel_mean)
        if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: give (B, {channels}, H, W), H and W at least "
                f"{self.patch_size}"
            )
        if self.backbone.bands is not None and not images.is_floating_point():
            raise ValueError(
                f"images of {images.dtype}, and the model reads {in_words(self.backbone.bands)}: give these "
                "as floats, 0 and 1 being the ends of the range"
            )
        if images.is_floating_point():
            _check_range(images)
            images = images * 255
        elif images.dtype != torch.uint8:
            raise ValueError(f"images of {images.dtype}: give uint8 from 0 to 255, or float from 0 to 1")
        sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
        pixels = normalise_pixels(self.backbone, images, sizes)
        with torch.autocast(pixels.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return at_least_float32(self.backbone(pixels)[-1])


def _check_range(images: Tensor) -> None:
    """Raise ValueError for floats outside of [0, 1], on a CPU: those of a GPU would have to be waited for."""
    if images.device.type != "cpu":
        return
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"float images from {low:g} to {high:g}: give 0 to 1, or uint8 from 0 to 255")


class Model:
    """A trained model: `predict` images, or take features from its `backbone`.

    Example:
        >>> model = visft_ds.load("runs/stage2", device="cpu")
        >>> model.tasks, model.precision, model.categories[52]
        (('detection', 'segmentation', 'captioning'), 'fp32', 'star')
    """

    def __init__(self, source: Path, loaded: LoadedModel, streams: Mapping[str, Stream]) -> None:
        self._loaded = loaded
        self._streams = streams
        self.source = source  #: what it was loaded from
        self.tasks = tuple(loaded.heads)  #: names
        self.categories: dict[int, str] = {}  #: names by id
        #: ids of the categories of stuff, of a panoptic head
        self.stuff: frozenset[int] = frozenset()
        for info in loaded.heads.values():
            self.categories |= info.names()
            self.stuff |= frozenset(info.options.get("stuff", ()))
        #: The detection head gives a mask with each box.
        self.has_instances = "detection" in loaded.heads and loaded.heads["detection"].settings().masks
        self.facts = loaded.facts  #: files of its parts, by name
        self.bands = loaded.module.backbone.bands  #: that pictures must have; None: three colours of 8 bits
        self.precision = loaded.precision  #: fp32, bf16 or fp16
        self.device = loaded.device
        micro_batches = [stream.micro_batch for stream in streams.values()]
        self.batch_size = min(micro_batches, default=1)  #: images in a batch by default
        self.backbone = ImageFeatures(loaded)  #: the backbone alone
        #: Stream -> geometry of all its images in place of its own, as an export has it.
        self.geometry: dict[str, Sequence[Op]] = {}

    def head(self, task: str) -> nn.Module:
        """The head of a task."""
        return self._loaded.module.heads[task]

    def __repr__(self) -> str:
        categories = f"{len(self.categories)} categories"
        about = [", ".join(self.tasks), categories, f"{self.precision} on {self.device}"]
        return f"Model({self.source}: {'; '.join(about)})"

    # mypy: an open file is an iterator, too, of its lines; it is one image.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        images: ImageInMemory,
        *,
        threshold: float = ...,
        batch_size: int | None = ...,
        tile: int | str | None = ...,
    ) -> Prediction: ...
    @overload
    def predict(  # one image of a file, a list of a folder or pattern
        self,
        images: str | Path,
        *,
        threshold: float = ...,
        batch_size: int | None = ...,
        tile: int | str | None = ...,
    ) -> Any: ...
    @overload
    def predict(
        self,
        images: Sequence[ImageInput] | Iterator[ImageInput],
        *,
        threshold: float = ...,
        batch_size: int | None = ...,
        tile: int | str | None = ...,
    ) -> list[Prediction]: ...
    @speaking_python()
    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        threshold: float = 0.5,
        batch_size: int | None = None,
        tile: int | str | None = None,
    ) -> Any:
        """Predict boxes, masks and captions, in pixels of the original image.

        EXIF orientation is applied, and images are resized as in the evaluation of the run. A prediction does
        not depend on other images, except for rounding.

        Args:
            images: a file, its bytes, or it opened for reading (such as `io.BytesIO`); a Pillow image of any
                mode; RGB from 0 to 255 as uint8 in an array (H, W, 3) or a tensor (3, H, W), or grey in an
                array (H, W). Of a model of bands, a file, its bytes or an array with all bands of the type
                that `bands` says. Or several: a list of these, a folder, a pattern such as "photos/*.jpg".
                URLs are refused.
            threshold: least score of boxes and masks that are returned.
            batch_size: largest number of images, or of tiles, in a batch; default: the run's, of tiles on a
                CPU at most 4.
            tile: side in pixels of the squares that larger images are cut into; "none": take them whole;
                default: as in the run. Boxes and masks that tiles have in common are joined.

        Returns:
            One `Prediction` for one image; a list of them for a list, folder or pattern, with the pixels of
            every image: give thousands in parts, or to `visft predict`.

        Raises:
            ValueError: a file that is not an image, or anything else that is none; its message says what is
                allowed. Tiles for a caption or label map, which needs the whole image.

        Example:
            >>> model = visft_ds.load("runs/stage2", device="cpu")
            >>> prediction = model.predict("dog.jpg", threshold=0.3)
            >>> len(model.predict(["dog.jpg", numpy.zeros((60, 80, 3), "uint8")]))
            2
        """
        check_options(threshold, batch_size=batch_size)
        tiles = self.tiles_of(tile)
        every, single = opened(images, MOST_IN_TILES if tiles else MAX_PIXELS, self.bands)
        step = batch_size or self.usual_batch(tiles)
        predictions: list[Prediction] = []
        if tiles is not None:
            predictions += [self.predict_tiles(image, tiles, threshold, step) for image in every]
        else:
            for start in range(0, len(every), step):
                predictions += self.predict_opened(every[start : start + step], threshold)
        return predictions[0] if single else predictions

    def tiles_of(self, tile: int | str | None) -> Tiles | None:
        """Squares that images are cut into, as a user says (see `predict`) or as in the run; None: no cuts.

        Raises ValueError for what is neither a side nor "none", and for tasks that need whole images.
        """
        of_streams = {stream.tiles for stream in self._streams.values()}
        of_run = self.tiles_of_training()
        if tile is None and len(of_streams) > 1:
            raise ValueError("some tasks of the run were trained on tiles, some not: give some of --tasks")
        if tile is None:
            return of_run
        if tile == "none":
            return None
        side = int(tile) if isinstance(tile, str) and tile.isdecimal() else tile
        least, most = SIDES
        if not isinstance(side, Integral) or not least <= side <= most:
            raise ValueError(f"--tile {tile} is not allowed: give {least} to {most} pixels, or none")
        of_whole = [task for task in self.tasks if config_class(task).labels != "annotations"]
        if of_whole:
            others = [task for task in self.tasks if task not in of_whole]
            raise ValueError(
                f"--tile {tile} cuts images into parts, and {', '.join(of_whole)} needs whole ones: give "
                f"--tasks {','.join(others) or 'of a model that has others'}, or --tile none"
            )
        side = int(side)
        overlap = usual_overlap(side)
        if of_run is not None:
            overlap = min(max(of_run.overlap, overlap), side // 2)
        return Tiles(side, overlap)

    def tiles_of_training(self) -> Tiles | None:
        """Tiles of training, of some task; None: whole images, or it is not known."""
        of_streams = (stream.tiles for stream in self._streams.values())
        return next((tiles for tiles in of_streams if tiles is not None), None)

    def usual_batch(self, tiles: Tiles | None) -> int:
        """Number of images, or of tiles, in a batch by default."""
        if tiles is not None and self.device.type == "cpu":
            return min(self.batch_size, _TILES_ON_CPU)
        return self.batch_size

    def warning_about(self, tiles: Tiles) -> str | None:
        """Warning of tiles that show objects larger or smaller than training did; None: as large."""
        trained = self.tiles_of_training()
        if not self._streams or (trained is not None and trained.side == tiles.side):
            return None
        size = "whole images" if trained is None else f"tiles of {trained.side} px"
        return (
            f"the run was trained on {size}: in tiles of {tiles.side} px objects have another size, and may "
            f"be missed or found twice; train with --tile {tiles.side}"
        )

    def predict_tiles(
        self, image: OpenedImage, tiles: Tiles, threshold: float, batch_size: int
    ) -> Prediction:
        """Prediction for a decoded image by its tiles, `batch_size` of them at a time."""
        height, width = image.pixels.shape[:2]
        windows = tiles.windows(height, width)
        by_task: dict[str, Results] = {task: [] for task in self.tasks}
        for start in range(0, len(windows), batch_size):
            parts = []
            for top, left, tile_height, tile_width in windows[start : start + batch_size]:
                pixels = np.array(image.pixels[top : top + tile_height, left : left + tile_width])
                parts.append(OpenedImage(pixels, None))
            # Less sure ones may be parts of objects that are sure enough.
            for number, prediction in enumerate(self.predict_opened(parts, threshold * LEAST_SURE), start):
                for task, results in prediction.results.items():
                    by_task[task] += [{**result, "image_id": number} for result in results]
            release(image.pixels)
        whole: dict[str, Results] = {}
        for task, results in by_task.items():
            objects = merged(results, windows, (height, width))
            whole[task] = [result for result in objects if result["score"] >= threshold]
        shown = as_rgb(self.seen(image.pixels))
        return Prediction(shown, image.path, self.categories, whole, self.has_instances)

    def seen(self, pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """RGB as it is, or the levels of bands."""
        return pixels if self.bands is None else levels(pixels, self.bands)

    def predict_opened(self, images: Sequence[OpenedImage], threshold: float) -> list[Prediction]:
        """Predictions for decoded images as a whole, few enough for one batch; there may be none."""
        if not images:
            return []
        samples = []
        for index, image in enumerate(images):
            pixels = self.seen(image.pixels)
            size = pixels.shape[:2]
            samples.append(
                RawSample(index, image_id=index, size=size, image=pixels, annotations=(), captions=())
            )
        by_image: list[dict[str, Results]] = [{task: [] for task in self.tasks} for _ in images]
        for task, results in self._results(samples, threshold).items():
            # Scores of a head that has diverged are no numbers.
            scored = [result for result in results if _confidence(result) >= 0]
            for result in sorted(scored, key=_confidence, reverse=True):
                by_image[result["image_id"]][task].append(result)
        predictions = []
        for image, sample, of_image in zip(images, samples, by_image, strict=True):
            assert sample.image is not None
            shown = as_rgb(sample.image)
            predictions.append(Prediction(shown, image.path, self.categories, of_image, self.has_instances))
        return predictions

    def _results(self, samples: Sequence[RawSample], threshold: float) -> dict[str, Results]:
        """Task -> predictions in COCO's results format, of all samples."""
        results: dict[str, Results] = {task: [] for task in self.tasks}
        words = self._loaded.vocabulary
        for stream in self._streams.values():
            pipeline = pipeline_of(stream, words, train=False)
            ops = self.geometry.get(stream.name)
            batch = pipeline.collate([pipeline.transform(sample, generator(0), ops) for sample in samples])
            outputs = TASKS[stream.tasks[0]].outputs(self._loaded.predict, batch, stream.image)
            for task in stream.tasks:
                classes = stream.classes.get(task)
                results[task] += TASKS[task].results(outputs[task], batch, words, classes, threshold)
        return results


def _confidence(result: Mapping[str, Any]) -> float:
    """Score of a box or a mask; a caption has none, and is certain."""
    return float(result.get("score", 1))


def _build(parts: ModelSource, device: str | torch.device | None) -> tuple[LoadedModel, dict[str, Stream]]:
    target = distributed.local_device()
    if device is not None:
        kind, number = f"{device}:0".split(":")[:2]
        gpus = torch.cuda.device_count()
        if kind not in ("cpu", "cuda") or not number.isdecimal() or (kind == "cuda" and int(number) >= gpus):
            raise ValueError(
                f"device {device} is not allowed: give cpu, or cuda:N of the {gpus} GPUs of this machine"
            )
        target = torch.device(device)
    precision, _ = choose_precision(parts.precision, target)
    return parts.build(precision, target)
