"""`visft.tasks.semantic`: images, head and loss of semantic segmentation; all of it has defaults.

They are those of DINOv3's linear probe on ADE20k (https://github.com/facebookresearch/dinov3,
eval/segmentation).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from visft_ds.settings.fields import (
    Above,
    Ascending,
    Count,
    Fraction,
    Positive,
    Probability,
    Rate,
    StrictModel,
)
from visft_ds.tasks.masks.config import MaskTask, PlainHeadConfig, SegmentationLoss, of_kind


class SemanticImage(StrictModel):
    """Geometry (large-scale jitter) and targets of semantic segmentation; sizes in pixels."""

    size: Positive = 512  #: side of the square that a training image is cropped to
    scale: Annotated[tuple[Above, Above], Ascending] = (0.5, 2.0)
    flip: Fraction = 0.5  #: probability of a horizontal flip
    pad_value: Annotated[Count, Field(le=255)] = 0
    min_size_test: Positive = 512
    max_size_test: Positive = 2048
    fixed_size: Positive | None = (
        None  #: side of a square for training and evaluation instead of the sizes above
    )
    mask_stride: Positive = 4  #: pixels per cell of the labels
    #: side of the overlapping squares along the longer side that evaluation uses; null: whole images
    window: Positive | None = 512

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A window that leaves something out."""
        if self.window is not None and self.window < self.min_size_test:
            yield "window", f"must be at least min_size_test = {self.min_size_test}, or null"


class SemanticHeadConfig(StrictModel):
    """Options of the linear head."""

    type: Literal["linear"] = "linear"
    num_classes: Positive = 150  #: default: the number of categories
    dropout: Probability = 0.1  #: probability, for whole channels


class SemanticPlainConfig(PlainHeadConfig):
    """Options of the plain mask head, whose masks are summed by class."""

    num_classes: Positive = 150  #: default: the number of categories
    num_queries: Positive = 100


class SemanticLoss(StrictModel):
    """Weight of the linear head's cross-entropy."""

    ce: Rate = 1.0


#: `type` of a head -> its loss.
LOSSES: dict[str, type[SemanticLoss | SegmentationLoss]] = {"linear": SemanticLoss, "plain": SegmentationLoss}


class SemanticTask(MaskTask):
    """`visft.tasks.semantic`."""

    metrics = ("semantic/mIoU", "semantic/accuracy")
    shown = metrics
    main = "semantic/mIoU"
    hub_task = "image-segmentation"
    labels = "maps"
    learns_from = "annotations"
    heads: ClassVar = {"linear": SemanticHeadConfig, "plain": SemanticPlainConfig}

    updates: Positive | None = 40_000
    batch_size: Positive = 16
    micro_batch: Positive = 16
    image: SemanticImage = SemanticImage()
    head: SemanticHeadConfig | SemanticPlainConfig = SemanticHeadConfig()
    #: loss of the head; a plain head has that of `visft.tasks.segmentation`
    loss: SemanticLoss | SegmentationLoss = Field(SemanticLoss(), validate_default=True)

    @field_validator("loss", mode="wrap")
    @classmethod
    def _of_head(cls, given: Any, _: object, info: ValidationInfo) -> StrictModel:
        """The loss of the head's type."""
        named = getattr(info.data.get("head"), "type", "linear")
        return of_kind(
            LOSSES[named], {} if isinstance(given, SemanticLoss) else given, f"the loss of a {named} head"
        )


CONFIG = SemanticTask
