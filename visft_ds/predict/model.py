"""A trained model out of a run, an export or merged weights: pictures in, typed predictions or features out.

Letters: B images, H W pixels, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.config.task_schema import Stream
from visft_ds.data.plan import generator
from visft_ds.data.samples import RawSample, Sample
from visft_ds.evals.model import EvaluationModel, ModelFiles, ModelSource, source_of
from visft_ds.model import normalise_pixels
from visft_ds.ops import DTYPES
from visft_ds.parallel import distributed
from visft_ds.predict.images import ImageInput, OpenedImage, opened
from visft_ds.predict.results import Boxes, Masks, Prediction
from visft_ds.prepare.model import choose_precision
from visft_ds.prepare.streams import pipeline_of
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.matching import at_least_float32


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
        source: folder of a finished run, or RUN/checkpoints/step_N; its export folder, wherever that lies now; or
            merged weights (a file, or the folder that merging wrote) together with `heads`.
        tasks: names, in a list or with commas; default: all that have a head.
        device: "cpu", "cuda", "cuda:1"; default: a GPU where there is one.
        precision: "fp32", "bf16", "fp16" or "auto"; default: the run's.
        backbone, heads, adapter: file or name, folder of heads and adapter folder that replace the source's; adapter
            "none" leaves it out.
        download: fetch a named backbone that is not here from the Hugging Face hub.
        vocabulary: word map of a published captioning head.
        image_size: side in pixels of the squares that images are resized to; default: as in the run, or as in the
            paper where there is no run.

    Raises:
        ValueError: no model there, a run that has not written what it trained yet, or parts that do not fit.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image size {image_size} is not allowed: give at least 1 pixel")
    source = Path(source)
    parts = source_of(
        source,
        tasks=tasks,
        backbone=backbone,
        download=download,
        heads=heads,
        adapter=adapter,
        vocabulary=vocabulary,
        precision=precision,
        side=image_size,
    )
    loaded, streams = _build(parts, device)
    return Model(source, loaded, streams, parts.files)


def load_backbone(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    backbone: str | Path | None = None,
    download: bool = False,
    adapter: str | Path | None = None,
) -> ImageFeatures:
    """Load the backbone alone, with the adapter in it; heads are neither needed nor read. Arguments as `load`.

    Raises ValueError as `load`.
    """
    parts = source_of(
        Path(source), backbone=backbone, download=download, adapter=adapter, precision=precision, alone=True
    )
    return ImageFeatures(_build(parts, device)[0])


class ImageFeatures(nn.Module):
    """Backbone with its adapter in it, in evaluation mode; nothing in it requires a gradient until you say so."""

    def __init__(self, loaded: EvaluationModel) -> None:
        super().__init__()
        self.backbone = loaded.module.backbone  #: takes normalised pixels
        self.width = self.backbone.width  #: D
        self.patch_size = self.backbone.patch_size  #: pixels of the image to a step of the grid
        self.precision = loaded.precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of whole images; pixels right and below of the last whole patch are not seen.

        Args:
            images: (B, 3, H, W) RGB, uint8 from 0 to 255 or float from 0 to 1, H and W at least one patch. They are
                normalised in here.

        Returns:
            (B, D, h, w) float32.

        Raises:
            ValueError: another shape, dtype or range, as of images that are normalised already.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: give (B, 3, H, W), H and W at least {self.patch_size}"
            )
        if images.is_floating_point():
            if images.device.type == "cpu":  # of a GPU the numbers would have to be waited for
                low, high = images.aminmax()
                if not (low >= 0 and high <= 1):  # NaN is neither
                    raise ValueError(f"float images from {low:g} to {high:g}: give 0 to 1, or uint8 from 0 to 255")
            images = images * 255
        elif images.dtype != torch.uint8:
            raise ValueError(f"images of {images.dtype}: give uint8 from 0 to 255, or float from 0 to 1")
        sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
        pixels = normalise_pixels(self.backbone, images, sizes)
        with torch.autocast(pixels.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return at_least_float32(self.backbone(pixels))


class Model:
    """A trained model: `predict` pictures, or take features from its `backbone`."""

    def __init__(self, source: Path, loaded: EvaluationModel, streams: Mapping[str, Stream], files: ModelFiles) -> None:
        self._loaded, self._streams = loaded, streams
        self.source = source
        self.files = files  #: that were loaded
        self.tasks = tuple(loaded.heads)
        #: Names of the categories by id.
        self.categories: dict[int, str] = {}
        for info in loaded.heads.values():
            self.categories |= info.names()
        self.facts = loaded.facts  #: what was loaded, by name
        self.precision = loaded.precision
        self.device = loaded.device
        self.batch_size = min(stream.micro_batch for stream in streams.values())  #: by default
        self.backbone = ImageFeatures(loaded)

    def __repr__(self) -> str:
        return (
            f"Model({self.source}: {', '.join(self.tasks)}; {len(self.categories)} categories; "
            f"{self.precision} on {self.device})"
        )

    def predict(
        self, images: ImageInput | Iterable[ImageInput], *, threshold: float = 0.5, batch_size: int | None = None
    ) -> Any:
        """Predict boxes, masks and captions, in pixels of the original image.

        Photographs are turned upright by their EXIF orientation. Images are resized as in the evaluation of the run.
        Those of one size after that pass through the model together, others apart: unlike in an evaluation with
        batches of several sizes, a prediction does not depend on the images beside it, but for rounding.

        Args:
            images: a file, a Pillow image of any mode, an array (H, W, 3) or (H, W) or a tensor (3, H, W),
                both uint8; or several: a list of these, a folder, a pattern such as "photos/*.jpg".
            threshold: least score of boxes and masks.
            batch_size: most images that pass through the model at once; default: the run's.

        Returns:
            One `Prediction` for one image; a list of them for a list, folder or pattern. It holds the pixels of every
            image: give thousands in parts, or to `visft predict`.

        Raises:
            ValueError: what is no picture, by its name or place; a threshold or batch size out of range.
        """
        check_options(threshold, batch_size)
        every, single = opened(images)
        predictions = self.predict_opened(every, threshold=threshold, batch_size=batch_size)
        return predictions[0] if single else predictions

    def predict_opened(
        self, images: Sequence[OpenedImage], *, threshold: float, batch_size: int | None
    ) -> list[Prediction]:
        """`predict` of decoded images, in their order."""
        step = batch_size or self.batch_size
        found: list[Prediction] = []
        for start in range(0, len(images), step):
            found += self._together(images[start : start + step], threshold)
        return found

    def _together(self, images: Sequence[OpenedImage], threshold: float) -> list[Prediction]:
        sizes = [(one.pixels.shape[0], one.pixels.shape[1]) for one in images]
        raws = [
            RawSample(index=place, image_id=place, size=size, image=one.pixels, annotations=(), captions=())
            for place, (one, size) in enumerate(zip(images, sizes, strict=True))
        ]
        by_task: dict[str, Results] = {task: [] for task in self.tasks}
        for stream in self._streams.values():
            pipeline = pipeline_of(stream, self._loaded.vocabulary, train=False)
            groups: dict[torch.Size, list[Sample]] = {}
            for raw in raws:
                sample = pipeline.transform(raw, generator(0))
                assert sample.image is not None
                groups.setdefault(sample.image.shape, []).append(sample)
            for samples in groups.values():
                batch = pipeline.collate(samples)
                outputs = self._loaded.predict(batch)
                for task in stream.tasks:
                    results = TASKS[task].results(
                        outputs[task], batch, self._loaded.vocabulary, stream.classes.get(task), threshold
                    )
                    by_task[task] += results
        found = []
        for place, (one, size) in enumerate(zip(images, sizes, strict=True)):
            own = {task: [r for r in results if r["image_id"] == place] for task, results in by_task.items()}
            boxes, masks, captions = (own.pop(task, None) for task in ("detection", "segmentation", "captioning"))
            found.append(
                Prediction(
                    one.pixels,
                    one.path,
                    self.categories,
                    None if boxes is None else Boxes.of(_surest_first(boxes), self.categories),
                    None if masks is None else Masks.of(_surest_first(masks), self.categories, size),
                    None if captions is None else captions[0]["caption"],
                    own,
                )
            )
        return found


def _surest_first(results: Results) -> Results:
    """Without scores that are no numbers, of a head whose training has diverged."""
    return sorted((one for one in results if one["score"] >= 0), key=lambda one: -float(one["score"]))


def check_options(threshold: float, batch_size: int | None) -> None:
    """Raise ValueError for a threshold or batch size out of range."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} is not allowed: give a score from 0 to 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size {batch_size} is not allowed: give at least 1")


def _build(parts: ModelSource, device: str | torch.device | None) -> tuple[EvaluationModel, dict[str, Stream]]:
    place = distributed.local_device() if device is None else _device(device)
    return parts.build(choose_precision(parts.precision, place)[0], place)


def _device(wanted: str | torch.device) -> torch.device:
    if str(wanted).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {str(wanted)!r} is not allowed: give cpu, cuda or cuda:N")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {wanted} asked for; this machine has {torch.cuda.device_count()} GPUs")
    return device
