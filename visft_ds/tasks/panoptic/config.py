"""`visft.tasks.panoptic`: images, head and loss of panoptic segmentation; all of it has defaults.

They are EoMT's on COCO (https://github.com/tue-mps/eomt, configs/dinov2/coco/panoptic).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from visft_ds.settings.fields import Count, Fraction, Positive
from visft_ds.tasks.masks.config import JitterImage, MaskDecoderConfig, MaskLoss, MaskTaskConfig


class PanopticImage(JitterImage):
    """Geometry of panoptic segmentation: large-scale jitter."""

    #: side of the square that a training image is cropped to, pixels (EoMT: 640)
    size: Positive = 640
    #: short side of an image in evaluation, pixels (EoMT: 640)
    min_size_test: Positive = 640
    #: largest long side in evaluation, pixels; it takes precedence over the short side (EoMT: 640)
    max_size_test: Positive = 640


class PanopticHeadConfig(MaskDecoderConfig):
    """Options of the plain mask head, whose masks become segments."""

    #: classes; default: the number of panoptic categories
    num_classes: Positive = 133
    #: ids of the stuff categories, whose masks of an image become one segment; default: those of the data
    stuff: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    #: class probability above which a mask is taken (EoMT, Mask2Former: 0.8)
    score: Fraction = 0.8
    #: share of a mask that no better one covers, above which it becomes a segment (EoMT, Mask2Former: 0.8)
    overlap: Fraction = 0.8


class PanopticTask(MaskTaskConfig):
    """`visft.tasks.panoptic`."""

    metrics = (
        *("panoptic/PQ", "panoptic/SQ", "panoptic/RQ"),
        *("panoptic/PQ_things", "panoptic/SQ_things", "panoptic/RQ_things"),
        *("panoptic/PQ_stuff", "panoptic/SQ_stuff", "panoptic/RQ_stuff"),
    )
    shown = ("panoptic/PQ", "panoptic/PQ_things", "panoptic/PQ_stuff")
    main = "panoptic/PQ"
    hub_task = "image-segmentation"
    labels = "panoptic"
    heads: ClassVar = {"plain": PanopticHeadConfig}

    steps: Positive | None = 88_692
    batch_size: Positive = 16
    micro_batch: Positive = 16
    image: PanopticImage = PanopticImage()
    head: PanopticHeadConfig = PanopticHeadConfig()
    loss: MaskLoss = MaskLoss()


CONFIG = PanopticTask
