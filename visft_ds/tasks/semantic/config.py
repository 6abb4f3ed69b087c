"""`visft.tasks.semantic`: images, head and loss of semantic segmentation; all of it has defaults.

They are those of DINOv3's linear probe on ADE20k (https://github.com/facebookresearch/dinov3,
eval/segmentation).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from visft_ds.settings.fields import Above, Ascending, Positive, Probability, Problems, Rate, StrictModel
from visft_ds.tasks.masks.config import (
    JitterImage,
    MaskLoss,
    MaskTaskConfig,
    PlainHeadConfig,
    options_of_kind,
)


class SemanticImage(JitterImage):
    """Geometry of semantic segmentation: large-scale jitter."""

    #: side of the square that a training image is cropped to, pixels (DINOv3: 512)
    size: Positive = 512
    #: smallest and largest scale of a training image, 1 being that which fits the square (DINOv3: 0.5, 2)
    scale: Annotated[tuple[Above, Above], Ascending] = (0.5, 2.0)
    #: short side of an image in evaluation, pixels (DINOv3: 512)
    min_size_test: Positive = 512
    #: largest long side in evaluation, pixels; it takes precedence over the short side (DINOv3: 2048)
    max_size_test: Positive = 2048
    #: side of the sliding windows of evaluation, pixels, at least min_size_test; null: whole images (EoMT:
    #: the short side)
    window: Positive | None = 512

    def contradictions(self) -> Problems:
        """A window that leaves something out."""
        if self.window is not None and self.window < self.min_size_test:
            yield "window", f"must be at least min_size_test = {self.min_size_test}, or null"


class SemanticHeadConfig(StrictModel):
    """Options of the linear head."""

    #: kind of head; linear: a class for each cell, plain: queries and cells in transformer blocks (PMT)
    type: Literal["linear"] = "linear"
    #: classes; default: the number of categories
    num_classes: Positive = 150
    #: probability of dropout, for whole channels (DINOv3: 0.1)
    dropout: Probability = 0.1


class SemanticPlainConfig(PlainHeadConfig):
    """Options of the plain mask head, whose masks are summed by class."""

    #: classes; default: the number of categories
    num_classes: Positive = 150
    #: object queries, masks that are predicted for an image (EoMT on ADE20k: 100)
    num_queries: Positive = 100


class SemanticLoss(StrictModel):
    """Weight of the linear head's cross-entropy."""

    #: weight of the cross-entropy, the only loss
    ce: Rate = 1.0


#: `type` of a head -> its loss.
LOSSES: dict[str, type[SemanticLoss | MaskLoss]] = {"linear": SemanticLoss, "plain": MaskLoss}


class SemanticTask(MaskTaskConfig):
    """`visft.tasks.semantic`."""

    metrics = ("semantic/mIoU", "semantic/accuracy")
    shown = metrics
    main = "semantic/mIoU"
    hub_task = "image-segmentation"
    labels = "maps"
    learns_from = "annotations"
    heads: ClassVar = {"linear": SemanticHeadConfig, "plain": SemanticPlainConfig}

    steps: Positive | None = 40_000
    batch_size: Positive = 16
    micro_batch: Positive = 16
    image: SemanticImage = SemanticImage()
    head: SemanticHeadConfig | SemanticPlainConfig = SemanticHeadConfig()
    #: loss of the head; a plain head has that of `visft.tasks.segmentation`
    loss: SemanticLoss | MaskLoss = Field(SemanticLoss(), validate_default=True)

    @field_validator("loss", mode="wrap")
    @classmethod
    def _of_head(cls, value: Any, _: object, info: ValidationInfo) -> StrictModel:
        """The loss of the head's type."""
        head_type = getattr(info.data.get("head"), "type", "linear")
        if isinstance(value, SemanticLoss):  # the default, which a plain head has its own of
            value = {}
        return options_of_kind(LOSSES[head_type], value, f"the loss of a {head_type} head")


CONFIG = SemanticTask
