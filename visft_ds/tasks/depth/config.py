"""`visft.tasks.depth`: images, head and loss of depth; all of it has defaults.

They are those of the linear probe on NYU Depth v2 that DINOv2 and DINOv3 publish
(https://github.com/facebookresearch/dinov3, eval/depth).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from visft_ds.settings.fields import Above, Positive, Rate, Sides, StrictModel
from visft_ds.settings.task_schema import ImageSizes
from visft_ds.tasks.masks.config import MaskTaskConfig


class DepthImage(ImageSizes):
    """Geometry of depth: whole images, whose defaults are the sizes of NYU Depth v2."""

    #: short sides in training, in pixels; one is drawn for an image, whose depths are divided by its
    #: enlargement
    min_size_train: Sides = (480,)
    #: largest long side in training, in pixels
    max_size_train: Positive = 640
    #: short side in evaluation, in pixels
    min_size_test: Positive = 480
    #: largest long side in evaluation, in pixels, which then decides
    max_size_test: Positive = 640

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Tiles, besides those of all images."""
        yield from super().contradictions()
        if self.tile is not None:
            yield "tile", "must be null: depth is predicted for whole images"


class DepthHeadConfig(StrictModel):
    """Options of the linear head."""

    #: kind of head; linear: for each cell weights of fixed depths, from all maps that are read (DINOv2)
    type: Literal["linear"] = "linear"
    #: evenly spaced depths, of which each cell has a weighted mean (DINOv3: 256)
    bins: Positive = 256
    #: least depth, in metres (DINOv3: 0.001)
    nearest: Above = 0.001
    #: largest depth, in metres (DINOv3 on NYU: 10; on KITTI 80); deeper pixels do not count in metrics
    farthest: Above = 10.0

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A range without depths."""
        if self.nearest >= self.farthest:
            yield "nearest", f"must be below farthest = {self.farthest:g}"


class DepthLoss(StrictModel):
    """Weights of the losses."""

    #: weight of SILog, of maps in metres (DINOv2: 1)
    silog: Rate = 1.0
    #: weight of the gradients of the error, at four scales (DINOv2, MiDaS: 0.5)
    gradient: Rate = 0.5
    #: weight of the error after scale and offset are taken out, of relative maps (MiDaS: 1)
    relative: Rate = 1.0


class DepthTask(MaskTaskConfig):
    """`visft.tasks.depth`."""

    metrics = (
        "depth/AbsRel",
        "depth/RMSE",
        "depth/SILog",
        "depth/delta1",
        "depth/delta2",
        "depth/delta3",
    )
    shown = ("depth/AbsRel", "depth/delta1")
    main = "depth/delta1"
    hub_task = "depth-estimation"
    labels = "depth"
    has_classes = False
    heads: ClassVar = {"linear": DepthHeadConfig}

    steps: Positive | None = 38_400
    batch_size: Positive = 16
    micro_batch: Positive = 16
    image: DepthImage = DepthImage()
    head: DepthHeadConfig = DepthHeadConfig()
    loss: DepthLoss = DepthLoss()


CONFIG = DepthTask
