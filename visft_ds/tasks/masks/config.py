"""Options that segmentation and semantic segmentation share: the plain head, the loss of masks, and sections
of several kinds.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from visft_ds.settings.fields import Above, Ascending, Fraction, Positive, Rate, StrictModel, nearest
from visft_ds.settings.task_schema import TaskConfig

#: How classes are numbered: "contiguous" from 0; "published" 1..80, as the published heads were trained,
#: where the last category (toothbrush) coincides with "no object" and class 0 is never used.
ClassIds = Literal["contiguous", "published"]


class JitterImage(StrictModel):
    """Geometry of mask tasks: large-scale jitter."""

    #: side of the square that a training image is cropped to, pixels (ViSFT: 1024)
    size: Positive = 1024
    #: smallest and largest scale of a training image, 1 being that which fits the square (LSJ: 0.1, 2)
    scale: Annotated[tuple[Above, Above], Ascending] = (0.1, 2.0)
    #: probability of a horizontal flip (ViSFT, EoMT, DINOv3: 0.5)
    flip: Fraction = 0.5
    #: short side of an image in evaluation, pixels (detectron2: 800)
    min_size_test: Positive = 800
    #: largest long side in evaluation, pixels; it takes precedence over the short side (detectron2: 1333)
    max_size_test: Positive = 1333
    #: side of a square for training and evaluation, pixels, instead of the sizes above; null: none
    fixed_size: Positive | None = None


class MaskDecoderConfig(StrictModel):
    """Options of the plain head, PMT's decoder, which reads all maps of the backbone
    (`visft.model.out_indices`).
    """

    #: the head: mask2former (segmentation), linear (semantic) or plain
    type: Literal["plain"] = "plain"
    #: classes; default for ids that are not COCO's: the number of categories
    num_classes: Positive = 80
    #: object queries, masks that are predicted for an image (EoMT on COCO: 200)
    num_queries: Positive = 200
    #: transformer blocks (PMT: 6)
    blocks: Positive = 6
    #: channels of the head, a multiple of 4 x num_heads; null: as many as the last map has (PMT)
    hidden_dim: Positive | None = None
    #: attention heads; null: one for every 64 channels (PMT)
    num_heads: Positive | None = None
    #: channels inside the MLPs; null: hidden_dim
    ffn_dim: Positive | None = None
    class_ids: ClassVar[ClassIds] = "contiguous"

    @property
    def most_objects(self) -> int:
        """Most objects that it finds in an image, one for each query at most."""
        return self.num_queries

    @property
    def decoder_layers(self) -> int:
        """Prediction sets before the last."""
        return self.blocks


class PlainHeadConfig(MaskDecoderConfig):
    """Options of the plain head whose masks may overlap."""

    #: most masks of an image, which AP and AR count as well (COCO: 100); default where an image of the data
    #: has more objects: half as many again
    max_detections: Positive = 100

    @property
    def most_objects(self) -> int:
        """Most objects that it finds in an image, one for each query at most."""
        return min(self.num_queries, self.max_detections)


class MaskLoss(StrictModel):
    """Weights of the losses of masks, which are those of the costs in the matching as well, and the points at
    which masks are compared.
    """

    #: weight of the class cross-entropy (Mask2Former: 2)
    ce: Rate = 2.0
    #: weight of the mask cross-entropy (Mask2Former: 5)
    bce: Rate = 5.0
    #: weight of the dice loss (Mask2Former: 5)
    dice: Rate = 5.0
    #: class weight of "no object" in the cross-entropy (DETR: 0.1)
    eos_coef: Above = 0.1
    #: points of an object at which its masks are compared (Mask2Former: 112 x 112)
    train_num_points: Positive = 12544
    #: random candidates for each point, of which the most uncertain are taken; at least 1 (PointRend: 3)
    oversample_ratio: Annotated[float, Field(ge=1)] = 3.0
    #: share of the points that are taken where the prediction is least certain (PointRend: 0.75)
    importance_sample_ratio: Fraction = 0.75


class MaskTaskConfig(TaskConfig):
    """Settings of a task that has heads of several types."""

    @field_validator("head", mode="wrap")
    @classmethod
    def _of_type(cls, value: Any, _: object) -> StrictModel:
        """The options of the type that they name; those of another type are refused."""
        if isinstance(value, StrictModel):
            return value
        head_type = next(iter(cls.heads))
        if isinstance(value, dict):
            head_type = str(value.get("type", head_type))
        if head_type not in cls.heads:
            raise refusal([("type", f"must be {' or '.join(cls.heads)}")])
        return options_of_kind(cls.heads[head_type], value, f"a {head_type} head")


def options_of_kind(kind: type[StrictModel], value: Any, title: str) -> StrictModel:
    """A section of which there are several kinds; a key of another one is refused as no option of `title`."""
    if isinstance(value, dict):
        known = kind.model_fields
        problems = [
            (key, f"is not an option of {title}{nearest(key, known)}") for key in value if key not in known
        ]
        if problems:
            raise refusal(problems)
    return kind.model_validate(value)


def refusal(problems: list[tuple[str, str]]) -> PydanticCustomError:
    """The error for pairs (key in a section, problem)."""
    return PydanticCustomError("contradictions", "{found}", {"found": problems})
