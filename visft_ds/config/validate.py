"""Values against a schema: every error at once, an unknown key with the nearest one beside it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)


def check(model: type[M], values: Mapping[str, Any]) -> tuple[M | None, list[tuple[str, str]]]:
    """An instance of a schema, or None and (dotted key, problem) of each value that it refuses."""
    try:
        # JSON mode: lists stand for tuples, everything else is as strict as the schema says.
        return model.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        return None, [pair for item in error.errors(include_url=False) for pair in _explain(model, item)]


def _explain(model: type[BaseModel], error: Any) -> Iterator[tuple[str, str]]:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "contradictions":
        for inner, problem in error["ctx"]["found"]:
            yield ".".join([*location, inner]), problem
    elif error["type"] == "extra_forbidden":
        yield key, f"unknown key{nearest(location[-1], _keys_at(model, location[:-1]))}"
    elif error["type"] == "missing":
        yield key, f"missing; state it in a file or with --set {key}=VALUE"
    else:
        yield key, error["msg"].removeprefix("Value error, ")


def _keys_at(model: type[BaseModel], location: Iterable[str]) -> list[str]:
    """Keys of the section at a place; numbers are positions in lists."""
    for part in location:
        if not part.isdigit():
            model = next(models_in(model.model_fields[part].annotation))
    return list(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas inside an annotation such as `tuple[ParamGroup, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def nearest(name: str, known: Iterable[str]) -> str:
    """The nearest of some names, or all of them, as a clause of a message."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
