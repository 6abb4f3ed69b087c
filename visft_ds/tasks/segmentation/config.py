"""`visft.tasks.segmentation`: images, head and loss of segmentation. Defaults are those of the published
code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from visft_ds.settings.fields import (
    Above,
    Ascending,
    Count,
    Depth,
    Fraction,
    Positive,
    Probability,
    StrictModel,
)
from visft_ds.settings.task_schema import Findings
from visft_ds.tasks.masks.config import Labelling, MaskTask, PlainHeadConfig, SegmentationLoss


class SegmentationImage(StrictModel):
    """Geometry (large-scale jitter) and targets of segmentation; sizes in pixels."""

    size: Positive = 1024  #: side of the square that a training image is cropped to
    scale: Annotated[tuple[Above, Above], Ascending] = (0.1, 2.0)
    flip: Fraction = 0.5  #: probability of a horizontal flip
    pad_value: Annotated[Count, Field(le=255)] = 128
    min_size_test: Positive = 800
    max_size_test: Positive = 1333
    eval_multiple: Positive = 32
    fixed_size: Positive | None = (
        None  #: side of a square for training and evaluation instead of the sizes above
    )
    mask_stride: Positive = 4  #: pixels per cell of a target mask


class SegmentationHeadConfig(StrictModel):
    """Options of the segmentation head that was published (single-scale Mask2Former)."""

    type: Literal["mask2former"] = "mask2former"
    num_classes: Positive = 80  #: default for ids that are not COCO's: the number of categories
    num_queries: Positive = 100
    hidden_dim: Positive = 256
    encoder_layers: Depth = 6
    decoder_layers: Depth = 9
    num_heads: Positive = 8
    num_points: Positive = 4
    encoder_ffn_dim: Positive = 512
    decoder_ffn_dim: Positive = 1024
    dropout: Probability = 0.0
    labelling: Labelling = "contiguous"  #: classes are numbered from 0; published: from 1

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A width that attention heads or norm groups do not divide, and fewer classes than COCO has."""
        if self.labelling == "published" and self.num_classes < 80:
            yield "num_classes", "must be at least 80: published labels are COCO's 80"
        if self.hidden_dim % self.num_heads or self.hidden_dim % 32:
            yield (
                "hidden_dim",
                f"{self.hidden_dim} is not a multiple of num_heads = {self.num_heads} and of 32 (groups)",
            )


class SegmentationTask(MaskTask):
    """`visft.tasks.segmentation`."""

    metrics = tuple(f"mask/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"))
    shown = ("mask/AP", "mask/AP50")
    main = "mask/AP50"
    hub_task = "image-segmentation"
    published = "segment"
    heads: ClassVar = {"mask2former": SegmentationHeadConfig, "plain": PlainHeadConfig}

    image: SegmentationImage = SegmentationImage()
    head: SegmentationHeadConfig | PlainHeadConfig = SegmentationHeadConfig()
    loss: SegmentationLoss = SegmentationLoss()

    @classmethod
    def misleads(cls, counts: Mapping[str, int], findings: Findings) -> str | None:
        """Objects without masks are background here: a set of boxes alone would teach that nothing is
        there.
        """
        without, objects = findings.get("instance without mask", (0,))[0], counts.get("annotations", 0)
        return f"mask for {without} of its {objects} objects" if 2 * without > objects else None


CONFIG = SegmentationTask
