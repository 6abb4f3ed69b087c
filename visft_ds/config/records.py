"""Records on disk: JSON as its schema, or one ValueError with the file, the field, the value seen and the value wanted.

A schema is a `StrictModel`, a dataclass with `__pydantic_config__ = STRICT`, or a list or dict of such.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from visft_ds.files import read_bytes

#: Levels of lists and objects in each other, far more than any record has: what walks them may call itself for each.
DEEPEST = 64
_SHOWN = 3  # wrong fields in a message

T = TypeVar("T")
#: 0, 1, 2, ...; 1, 2, 3, ...; also below 0; all of 64 bits.
Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Natural = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]
Number = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
#: Neither infinite nor NaN.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]

#: Pydantic's words -> those of somebody who writes JSON.
_WORDS = (
    ("Input should be", "must be"),
    (" a valid integer", " a whole number"),
    (" a valid string", " a text"),
    (" a valid boolean", " true or false"),
    (" a valid ", " a "),
    ("Tuple should", "the list should"),
    (" a tuple", " a list"),
    (" a array", " a list"),
    (" after validation", ""),
)


def plain(message: str) -> str:
    """A message of pydantic in words of JSON."""
    for old, new in _WORDS:
        message = message.replace(old, new)
    return message


def parse_json(data: bytes | str, where: str, hint: str = "") -> Any:
    """The value of a JSON text.

    Raises ValueError, with `where` and `hint`, for anything else, NaN among it, and for one that is nested too deep.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}).{hint}") from error
    check_depth(value, where, hint)
    return value


def check_depth(value: Any, where: str, hint: str = "") -> None:
    """Raise ValueError where lists and objects are nested too deep for what walks them by calling itself."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for values in inside for one in values if isinstance(one, dict | list)]
        if not level:
            return
    raise ValueError(f"{where} is nested deeper than {DEEPEST} levels.{hint}")


def as_record(data: bytes | str, kind: type[T], where: str, hint: str = "") -> T:
    """A JSON text as a record of some kind.

    Raises ValueError that begins with `where`, names the first wrong fields, and ends with `hint`.
    """
    parse_json(data, where, hint)
    try:
        found: T = _adapter(cast(Any, kind)).validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        told = [_told(problem["loc"], problem["type"], problem["msg"], problem["input"]) for problem in problems]
        more = f" ({len(told) - _SHOWN} more)" if len(told) > _SHOWN else ""
        raise ValueError(f"{where}: {'; '.join(told[:_SHOWN])}{more}.{hint}") from error
    return found


def read_record(path: Path, kind: type[T], hint: str = "") -> T:
    """A JSON file as a record of some kind. Raises ValueError as `as_record`, also where it cannot be read."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.{hint}") from error
    return as_record(data, kind, str(path), hint)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _told(location: Sequence[int | str], kind: str, message: str, value: Any) -> str:
    name = reprlib.repr(".".join(map(str, location)))[1:-1] or "it"
    if kind in ("missing", "missing_argument"):
        return f"{name} is missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{name} is not known"
    return f"{name} is {reprlib.repr(value)}, {plain(message)}"
