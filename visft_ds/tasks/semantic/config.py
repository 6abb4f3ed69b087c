"""`visft.tasks.semantic`: images, head and loss of semantic segmentation; all of it has defaults.

They are those of DINOv3's linear probe on ADE20k (https://github.com/facebookresearch/dinov3, eval/segmentation).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from visft_ds.config.fields import Above, Ascending, Count, Fraction, Positive, Probability, Rate, StrictModel
from visft_ds.tasks.segmentation.config import MaskTask, PlainHeadConfig, SegmentationLoss, of_kind


class SemanticImage(StrictModel):
    """Geometry (large-scale jitter) and targets of semantic segmentation; sizes in pixels."""

    size: Positive = 512  #: square that a training image is cut to
    scale: Annotated[tuple[Above, Above], Ascending] = (0.5, 2.0)
    flip: Fraction = 0.5  #: probability
    pad_value: Annotated[Count, Field(le=255)] = 0
    eval_short: Positive = 512
    eval_max_long: Positive = 2048
    fixed_size: Positive | None = None  #: square size for training and evaluation instead of all of the above
    mask_stride: Positive = 4  #: pixels to a cell of the labels
    #: evaluation looks at squares of so many pixels along the longer side, which overlap; null: at whole images
    window: Positive | None = 512

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A window that leaves something out."""
        if self.window is not None and self.window < self.eval_short:
            yield "window", f"must be at least eval_short = {self.eval_short}, or null"


class SemanticHeadConfig(StrictModel):
    """Options of the linear head."""

    type: Literal["linear"] = "linear"
    num_classes: Positive = 150  #: as many as there are categories
    dropout: Probability = 0.1  #: of whole channels


class SemanticPlainConfig(PlainHeadConfig):
    """Options of the plain mask head, whose masks are summed by class."""

    num_classes: Positive = 150  #: as many as there are categories
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
    #: that of the head; a plain one has the loss of `visft.tasks.segmentation`
    loss: SemanticLoss | SegmentationLoss = Field(SemanticLoss(), validate_default=True)

    @field_validator("loss", mode="wrap")
    @classmethod
    def _of_head(cls, given: Any, _: object, info: ValidationInfo) -> StrictModel:
        """The loss of the head's type."""
        named = getattr(info.data.get("head"), "type", "linear")
        return of_kind(LOSSES[named], {} if isinstance(given, SemanticLoss) else given, f"the loss of a {named} head")


CONFIG = SemanticTask
