"""`visft.tasks.depth`: images, head and loss of depth; all of it has defaults.

They are those of the linear probe on NYU Depth v2 that DINOv2 and DINOv3 publish
(https://github.com/facebookresearch/dinov3, eval/depth).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from visft_ds.settings.fields import Above, Positive, Problems, Rate, Sides, StrictModel
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
    #: largest long side in evaluation, in pixels; it takes precedence over the short side
    max_size_test: Positive = 640

    def contradictions(self) -> Problems:
        """Tiles and pasted objects, besides those of all images."""
        yield from super().contradictions()
        if self.tile is not None:
            yield "tile", "must be null: depth is predicted for whole images"
        if self.paste:
            yield "paste", "must be 0: pasted objects have no depth"


class DepthRange(StrictModel):
    """Depths that a head predicts."""

    #: smallest depth, in metres (DINOv3: 0.001)
    nearest: Above = 0.001
    #: largest depth, in metres (DINOv3 on NYU: 10; on KITTI 80); deeper pixels do not count in metrics
    #: default for data that is deeper: its depths, see `Manifest.farthest`
    farthest: Above = 10.0
    #: it learnt from relative maps alone, and its depths have no unit; default: as the data says
    relative: bool = False

    def contradictions(self) -> Problems:
        """A range without depths."""
        if self.nearest >= self.farthest:
            yield "nearest", f"must be below farthest = {self.farthest:g}"


class DepthHeadConfig(DepthRange):
    """Options of the linear head."""

    #: the head: linear, or dpt, whose options are others
    type: Literal["linear"] = "linear"
    #: bins, evenly spaced depths, of which each cell predicts a weighted mean (DINOv3: 256)
    bins: Positive = 256


class DptHeadConfig(DepthRange):
    """Options of the DPT head, which reads all maps of the backbone (`visft.model.out_indices`): four are
    usual.
    """

    #: the head: linear or dpt
    type: Literal["dpt"] = "dpt"
    #: channels of the fusion blocks; the maps are projected to one, two, four and four times as many
    #: (DPT-Large: 256)
    hidden_dim: Annotated[int, Field(ge=2)] = 256


class DepthLoss(StrictModel):
    """Weights of the losses."""

    #: weight of SILog, of maps in metres (DINOv2: 1)
    silog: Rate = 1.0
    #: weight of the gradient matching loss, at four scales (DINOv2, MiDaS: 0.5)
    gradient: Rate = 0.5
    #: weight of the scale- and shift-invariant loss, of relative maps (MiDaS: 1)
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
    heads: ClassVar = {"linear": DepthHeadConfig, "dpt": DptHeadConfig}

    steps: Positive | None = 38_400
    batch_size: Positive = 16
    micro_batch: Positive = 16
    image: DepthImage = DepthImage()
    head: DepthHeadConfig | DptHeadConfig = DepthHeadConfig()
    loss: DepthLoss = DepthLoss()


CONFIG = DepthTask
