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

#: (key in a section, problem) of each value that is refused
Problems = Iterator[tuple[str, str]]


class StrictModel(BaseModel):
    """Part of a configuration or record: unknown keys are errors, "1e-5" is no number, true no integer,
    nothing changes, and values that are right alone may be refused together."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def contradictions(self) -> Problems:
        """Values of this section that are right alone, and not together."""
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
        before: of keys of a configuration what stands before them.
        keys: dotted keys; where none of the names is near, the first that ends in `name` is meant.
    """
    names = list(known)
    for near in difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {before}{near}?"
    for key in keys:
        if f".{key}".endswith(f".{name}"):
            return f"; did you mean {key}?"
    return f"; known: {', '.join(names)}"


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
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Sides = Annotated[tuple[Positive, ...], Field(min_length=1)]  #: pixels
Precision = Literal["fp32", "bf16", "fp16"]
