"""Trained model from a run, an export or merged weights: pictures in, typed predictions or features out.

Letters: B images, H W pixels, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds import distributed
from visft_ds.data.samples import RawSample
from visft_ds.evals.model import EvaluationModel, ModelSource, source_of
from visft_ds.model import normalise_pixels
from visft_ds.ops import DTYPES, at_least_float32
from visft_ds.predict.images import ImageInput, OpenedImage, opened
from visft_ds.predict.results import Prediction
from visft_ds.prepare.model import choose_precision
from visft_ds.randomness import generator
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.transform import pipeline_of


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
        or
            merged weights (a file, or the folder that merging wrote) together with `heads`.
        tasks: names, in a list or with commas; default: all that have a head.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if there is one.
        precision: "fp32", "bf16", "fp16" or "auto"; default: the run's.
        backbone, heads, adapter: file or name, folder of heads and adapter folder that replace the source's;
        adapter
            "none" leaves it out.
        download: download a missing backbone from the Hugging Face hub.
        vocabulary: word map of a published captioning head.
        image_size: side in pixels of the squares that images are resized to; default: as in the run, or as in
        the
            paper without a run.

    Raises:
        ValueError: no model there, a run that has not written what it trained yet, or parts that do not fit.
    """
    check_options(image_size=image_size)
    parts = source_of(
        Path(source),
        tasks=tasks,
        backbone=backbone,
        download=download,
        heads=heads,
        adapter=adapter,
        vocabulary=vocabulary,
        precision=precision,
        side=image_size,
    )
    return Model(Path(source), *_build(parts, device))


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
    """
    parts = source_of(
        Path(source), backbone=backbone, download=download, adapter=adapter, precision=precision, alone=True
    )
    return ImageFeatures(_build(parts, device)[0])


class ImageFeatures(nn.Module):
    """Backbone with its adapter, in evaluation mode; no parameter requires a gradient until you set it."""

    def __init__(self, loaded: EvaluationModel) -> None:
        super().__init__()
        self.backbone = loaded.module.backbone  #: takes normalised pixels
        self.width = self.backbone.width  #: D
        self.patch_size = self.backbone.patch_size  #: pixels per step of the grid
        self.precision = loaded.precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of whole images, the last map; sides that are no whole cells are extended with the mean
        colour.

        Args:
            images: (B, 3, H, W) RGB, uint8 from 0 to 255 or float from 0 to 1, H and W at least one patch.
            They are
                normalised here.

        Returns:
            (B, D, h, w) float32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: give (B, 3, H, W), H and W at least {self.patch_size}"
            )
        if images.is_floating_point():
            if images.device.type == "cpu":  # of a GPU the numbers would have to be waited for
                low, high = images.aminmax()
                if not (low >= 0 and high <= 1):  # NaN is neither
                    raise ValueError(
                        f"float images from {low:g} to {high:g}: give 0 to 1, or uint8 from 0 to 255"
                    )
            images = images * 255
        elif images.dtype != torch.uint8:
            raise ValueError(f"images of {images.dtype}: give uint8 from 0 to 255, or float from 0 to 1")
        sizes = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
        pixels = normalise_pixels(self.backbone, images, sizes)
        with torch.autocast(pixels.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return at_least_float32(self.backbone(pixels)[-1])


class Model:
    """A trained model: `predict` pictures, or take features from its `backbone`."""

    def __init__(self, source: Path, loaded: EvaluationModel, streams: Mapping[str, Stream]) -> None:
        self._loaded, self._streams = loaded, streams
        self.source = source
        self.tasks = tuple(loaded.heads)
        #: Names of the categories by id.
        self.categories = {id_: name for info in loaded.heads.values() for id_, name in info.names().items()}
        self.facts, self.precision, self.device = loaded.facts, loaded.precision, loaded.device
        self.batch_size = min(stream.micro_batch for stream in streams.values())  #: by default
        self.backbone = ImageFeatures(loaded)

    def __repr__(self) -> str:
        about = (
            f"{', '.join(self.tasks)}; {len(self.categories)} categories; {self.precision} on {self.device}"
        )
        return f"Model({self.source}: {about})"

    def predict(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        threshold: float = 0.5,
        batch_size: int | None = None,
    ) -> Any:
        """Predict boxes, masks and captions, in pixels of the original image.

        Photographs are turned upright by their EXIF orientation, and resized as in the evaluation of the run.
        A prediction does not depend on other images, except for rounding.

        Args:
            images: a file, a Pillow image of any mode, an array (H, W, 3) or (H, W) or a tensor (3, H, W),
                both uint8; or several: a list of these, a folder, a pattern such as "photos/*.jpg".
            threshold: least score of boxes and masks that are returned.
            batch_size: largest number of images in a batch; default: the run's.

        Returns:
            One `Prediction` for one image; a list of them for a list, folder or pattern, with the pixels of
            every
            image: give thousands in parts, or to `visft predict`. Raises ValueError for a file that is not an
            image.
        """
        check_options(threshold, batch_size=batch_size)
        every, single = opened(images)
        step = batch_size or self.batch_size
        batches = (every[start : start + step] for start in range(0, len(every), step))
        predictions = [found for batch in batches for found in self.predict_opened(batch, threshold)]
        return predictions[0] if single else predictions

    def predict_opened(self, images: Sequence[OpenedImage], threshold: float) -> list[Prediction]:
        """Predictions for decoded images, few enough for one batch; there may be none."""
        if not images:
            return []
        raws = [
            RawSample(
                place,
                image_id=place,
                size=one.pixels.shape[:2],
                image=one.pixels,
                annotations=(),
                captions=(),
            )
            for place, one in enumerate(images)
        ]
        by_task, words = dict[str, Results]({task: [] for task in self.tasks}), self._loaded.vocabulary
        for stream in self._streams.values():
            pipeline = pipeline_of(stream, words, train=False)
            batch = pipeline.collate([pipeline.transform(raw, generator(0)) for raw in raws])
            outputs = TASKS[stream.tasks[0]].outputs(self._loaded.predict, batch, stream.image)
            for task in stream.tasks:
                classes = stream.classes.get(task)
                by_task[task] += TASKS[task].results(outputs[task], batch, words, classes, threshold)
        surest = {  # without scores that are no numbers, of a head whose training has diverged
            task: sorted(
                (r for r in results if r.get("score", 1) >= 0), key=lambda r: -float(r.get("score", 1))
            )
            for task, results in by_task.items()
        }
        found = []
        for place, one in enumerate(images):
            own = {task: [r for r in results if r["image_id"] == place] for task, results in surest.items()}
            found.append(Prediction(one.pixels, one.path, self.categories, own))
        return found


def check_options(threshold: float = 0.5, **numbers: int | None) -> None:
    """Raise ValueError for a threshold outside of [0, 1], or numbers outside of [1, 8192]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} is not allowed: give a score from 0 to 1")
    for name, number in numbers.items():
        if number is not None and not 1 <= number <= 8192:
            raise ValueError(f"{name.replace('_', ' ')} {number} is not allowed: give 1 to 8192")


def _build(
    parts: ModelSource, device: str | torch.device | None
) -> tuple[EvaluationModel, dict[str, Stream]]:
    place = distributed.local_device()
    if device is not None:
        kind, number = f"{device}:0".split(":")[:2]
        here = torch.cuda.device_count()
        if kind not in ("cpu", "cuda") or not number.isdecimal() or (kind == "cuda" and int(number) >= here):
            raise ValueError(
                f"device {device} is not allowed: give cpu, or cuda:N of the {here} GPUs of this machine"
            )
        place = torch.device(device)
    return parts.build(choose_precision(parts.precision, place)[0], place)
