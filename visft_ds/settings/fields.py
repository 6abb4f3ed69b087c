"""Types of the fields of a configuration, shared by its schemas."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError


class StrictModel(BaseModel):
    """Part of a configuration or record: unknown keys are errors, "1e-5" is no number, true no integer,
    nothing changes, and values that are right alone may be refused together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Pairs (key in this section, problem)."""
        yield from ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        problems = list(self.contradictions())
        if problems:
            text = "; ".join(f"{key}: {problem}" for key, problem in problems)
            raise PydanticCustomError("contradictions", "{text}", {"text": text, "found": problems})
        return self


def nearest(name: str, known: Iterable[str], *, before: str = "", keys: Iterable[str] = ()) -> str:
    """The nearest of some names, or all of them, as a clause of a message.

    Args:
        before: of keys of a configuration what stands before them; then up to three are named.
        keys: dotted keys; where none of the names is near, those that end in `name` are meant.
    """
    names = list(known)
    likeness = {other: _likeness(name, other) for other in names}
    best = max(likeness.values(), default=0.0)
    likely = [other for other in names if likeness[other] > max(0.6, best - 0.15)]
    likely.sort(key=likeness.__getitem__, reverse=True)
    most = 1
    if before:
        most = 3
    near = [before + other for other in likely[:most]]
    if not near:
        for key in dict.fromkeys(keys):
            if f".{key}".endswith(f".{name}"):
                near.append(key)
        near = near[:3]
    if not near:
        return f"; known: {', '.join(names)}"
    return f"; did you mean {' or '.join(near)}?"


def _likeness(name: str, other: str) -> float:
    """From 0 to 1: of a name to another one, or to the likest of its words."""
    words = [other, *other.split("_")]
    return max(difflib.SequenceMatcher(None, name, word).ratio() for word in words)


def _whole(value: Any) -> Any:
    """JSON's 3e7 is a float; as a count it is meant as 30000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("must be [smallest, largest]")
    return ends


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]  #: 0, 1, 2, ...
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]  #: 1, 2, 3, ...
Depth = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1000)]  #: blocks or layers
Rate = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]  #: of dropout
Above = Annotated[float, Field(gt=0)]
Ascending = AfterValidator(_ascending)  #: of a pair
Text = Annotated[str, StringConstraints(min_length=1)]
Sides = Annotated[tuple[Positive, ...], Field(min_length=1)]  #: pixels
Precision = Literal["fp32", "bf16", "fp16"]
