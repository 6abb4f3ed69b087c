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

_SHOWN = 3  # wrong fields in a message

T = TypeVar("T")
#: 0, 1, 2, ...; 1, 2, 3, ...; also below 0; all of 64 bits.
Whole = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Natural = Annotated[int, Field(strict=True, ge=1, lt=1 << 63)]
Number = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
#: Neither infinite nor NaN.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def parse_json(data: bytes | str, where: str, hint: str = "") -> Any:
    """The value of a JSON text.

    Raises ValueError, with `where` and `hint`, for anything else, NaN among it.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}).{hint}") from error
    return value


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
    return f"{name} is {reprlib.repr(value)}, {message}"
