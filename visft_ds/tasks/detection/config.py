"""`visft.tasks.detection`: images, head and loss of detection. Defaults are those of the published code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from visft_ds.settings.fields import (
    Above,
    Ascending,
    Depth,
    Fraction,
    Positive,
    Probability,
    Rate,
    Sides,
    StrictModel,
)
from visft_ds.settings.task_schema import TaskConfig, Zoom, idle_zoom


class DetectionImage(StrictModel):
    """Geometry of detection; sizes in pixels."""

    min_size_train: Sides = (480, 512, 544, 576, 608, 640, 672)
    max_size_train: Positive = 672
    crop_min_size: Sides = (400, 500, 600)
    crop_size: Annotated[tuple[Positive, Positive], Ascending] = (384, 600)
    flip: Fraction = 0.5  #: probability of a horizontal flip
    min_size_test: Positive = 800
    max_size_test: Positive = 672
    fixed_size: Positive | None = (
        None  #: side of a square for training and evaluation instead of the sizes above
    )
    zoom: Zoom = None  #: with fixed_size: smallest and largest side of a random crop, in parts of the image's

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A zoom that nothing would read."""
        yield from idle_zoom(self.zoom, self.fixed_size)


class DetectionHeadConfig(StrictModel):
    """Options of the detection head."""

    #: detr: the published asymmetric DETR; dense: a box from every cell of the feature map, for few
    #: photographs
    type: Literal["detr", "dense"] = "detr"
    num_classes: Positive = 91  #: default for ids that are not COCO's: the number of categories
    width: Positive = 64  #: of the dense head; the keys below are the DETR's
    num_queries: Positive = 100
    encoder_dim: Positive = 128
    decoder_dim: Positive = 256
    encoder_layers: Depth = 6
    decoder_layers: Depth = 6
    num_heads: Positive = 8
    ffn_dim: Positive = 1024
    dropout: Probability = 0.1

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.width % 32:
            yield "width", f"{self.width} is not a multiple of 32 (norm groups)"
        for name, width in (("encoder_dim", self.encoder_dim), ("decoder_dim", self.decoder_dim)):
            if width % self.num_heads:
                yield name, f"{width} is not a multiple of num_heads = {self.num_heads}"
        if self.encoder_dim % 4:
            yield (
                "encoder_dim",
                f"{self.encoder_dim} is not a multiple of 4 (sine and cosine of two coordinates)",
            )


class DetectionLoss(StrictModel):
    """Weights of the detection losses, and in the DETR's matching; the dense head has ce (focal) and giou
    alone.
    """

    ce: Rate = 1.0
    l1: Rate = 5.0
    giou: Rate = 2.0
    eos_coef: Above = 0.1  #: class weight of "no object" in the cross-entropy


class DetectionTask(TaskConfig):
    """`visft.tasks.detection`."""

    metrics = tuple(f"box/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"))
    shown = ("box/AP", "box/AP50")
    main = "box/AP50"
    hub_task = "object-detection"
    published = "detection"

    image: DetectionImage = DetectionImage()
    head: DetectionHeadConfig = DetectionHeadConfig()
    loss: DetectionLoss = DetectionLoss()


CONFIG = DetectionTask
