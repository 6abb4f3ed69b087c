"""Options that segmentation and semantic segmentation share: the plain head, the loss of masks, sections of several
kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from visft_ds.settings.fields import (
    Above,
    Fraction,
    Positive,
    Rate,
    StrictModel,
    nearest,
)
from visft_ds.settings.task_schema import TaskConfig

#: How classes are numbered: "contiguous" from 0; "published" 1..80, as the published heads were trained,
#: where the last category (toothbrush) coincides with "no object" and class 0 is never used.
Labelling = Literal["contiguous", "published"]


class PlainHeadConfig(StrictModel):
    """Options of the plain head, which reads all maps of the backbone (`visft.model.layers`)."""

    type: Literal["plain"] = "plain"
    num_classes: Positive = 80  #: default for ids that are not COCO's: the number of categories
    num_queries: Positive = 200
    blocks: Positive = 6
    hidden_dim: Positive | None = None  #: null: the width of the last map
    num_heads: Positive | None = None  #: null: each 64 wide
    ffn_dim: Positive | None = None  #: null: hidden_dim
    labelling: ClassVar[Labelling] = "contiguous"

    @property
    def decoder_layers(self) -> int:
        """Prediction sets before the last."""
        return self.blocks


class SegmentationLoss(StrictModel):
    """Keyword arguments of the segmentation criterion; the matcher's costs are the same ce, bce and dice."""

    ce: Rate = 2.0
    bce: Rate = 5.0
    dice: Rate = 5.0
    eos_coef: Above = 0.1  #: class weight of "no object" in the cross-entropy
    num_points: Positive = 12544
    oversample: Annotated[float, Field(ge=1)] = 3.0
    importance: Fraction = 0.75


class MaskTask(TaskConfig):
    """Settings of a task that has heads of several types."""

    #: `type` of a head -> its options; the first is that of a head without one.
    heads: ClassVar[Mapping[str, type[StrictModel]]]

    @field_validator("head", mode="wrap")
    @classmethod
    def _of_type(cls, given: Any, _: object) -> StrictModel:
        """The options of the type that they name; those of another one are refused."""
        if isinstance(given, StrictModel):
            return given
        first = next(iter(cls.heads))
        named = str(given.get("type", first)) if isinstance(given, dict) else first
        if named not in cls.heads:
            raise refusal([("type", f"must be {' or '.join(cls.heads)}")])
        return of_kind(cls.heads[named], given, f"a {named} head")


def of_kind(kind: type[StrictModel], given: Any, what: str) -> StrictModel:
    """A section of which there are several kinds; keys of another one are refused as no options of `what`."""
    known = kind.model_fields
    other = [name for name in given if name not in known] if isinstance(given, dict) else []
    if other:
        raise refusal([(name, f"is not an option of {what}{nearest(name, known)}") for name in other])
    return kind.model_validate(given)


def refusal(found: list[tuple[str, str]]) -> PydanticCustomError:
    """The error for pairs (key in a section, problem)."""
    return PydanticCustomError("contradictions", "{found}", {"found": found})
