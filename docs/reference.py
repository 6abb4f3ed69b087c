"""Pages that `make docs` writes from the code: configuration.md (the schema and its comments), numbers.md
(what `visft judge` measures), api.md (autodoc).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import visft_ds
from visft_ds.config.schema import Recipe, complete
from visft_ds.evals.judge.kinds import KINDS

HEAD = """# Configuration keys

Every key that a settings file or `--set KEY=VALUE` accepts. `N` is an index in a list. *Required* keys have
no default; the shipped files set them.
"""
NUMBERS_HEAD = """# Numbers of visft judge

Published protocols, and what `--quick` does in their place.

| `--on` | number | measured | published | `--quick` | source | differs from it in |
|---|---|---|---|---|---|---|
"""
WORDS = {bool: "true, false", int: "integer", float: "number", str: "string", Any: "any", dict: "object"}
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


def write(folder: Path) -> None:
    """Write all pages."""
    complete()
    tables = "".join(sections(Recipe))
    (folder / "configuration.md").write_text(f"{HEAD}{tables}", encoding="utf-8")
    (folder / "numbers.md").write_text(f"{NUMBERS_HEAD}{''.join(number_rows())}", encoding="utf-8")
    parts = "".join(
        f"\n## {name}\n\n```{{eval-rst}}\n.. {_directive(name, module)}\n```\n"
        for name, module in visft_ds._PUBLIC.items()
    )
    (folder / "api.md").write_text(f"# Python reference\n{parts}", encoding="utf-8")


def _directive(name: str, module: str) -> str:
    kind = inspect.isclass(getattr(visft_ds, name))
    return f"autoclass:: {module}.{name}\n   :members:" if kind else f"autofunction:: {module}.{name}"


def number_rows() -> Iterator[str]:
    """A row for each number of each kind of data."""
    for kind, entry in KINDS.items():
        for number in entry.numbers:
            cells = [f"`{kind}`", number.name, number.how, number.published, number.quick, number.source]
            yield f"| {' | '.join([*cells, number.differs])} |\n"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table for a model, then those of the models in it."""
    comments = comments_of(model)
    if prefix:
        yield f"\n## {prefix.rstrip('.')}\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
    yield "\n| key | value | default | |\n|---|---|---|---|\n"
    for name, info in model.model_fields.items():
        own = isinstance(info.default, BaseModel)
        shown = "*required*" if info.is_required() else "" if own else f"`{json.dumps(info.default)}`"
        kind = kind_of(info.annotation, tuple(info.metadata))
        yield f"| `{prefix}{name}` | {kind} | {shown} | {comments.get(name, '')} |\n"
    for name, info in model.model_fields.items():
        for inner, item in nested(info.annotation):
            yield from sections(inner, f"{prefix}{name}.{'N.' if item else ''}")


def kind_of(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """A type in words, with its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inner[0], (*annotation.__metadata__, *limits))
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else kind_of(part, limits) for part in inner)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin is tuple:
        return f"list of: {kind_of(inner[0])}"
    if inspect.isclass(origin or annotation) and issubclass(origin or annotation, BaseModel):
        return "object, below"
    flat = [one for limit in limits for one in (limit.metadata if isinstance(limit, FieldInfo) else (limit,))]
    bounds = [
        f"{sign} {getattr(one, name):g}"
        for one in flat
        for form, name, sign in BOUNDS
        if isinstance(one, form)
    ]
    return " ".join(filter(None, (WORDS[origin or annotation], ", ".join(bounds))))


def nested(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Models within an annotation, and whether each is an item of a list."""
    inner = get_args(annotation)
    if not inner and inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation, False
    for part in inner:
        yield from ((model, item or get_origin(annotation) is tuple) for model, item in nested(part))


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """Field -> its comment (`#:`), beside it or above, as it stands in the source of the class or of a
    base.
    """
    found, above = {}, ""
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        for line in inspect.getsource(kind).splitlines():
            said = line.partition("#: ")[2]
            field = re.match(r"    (\w+): ", line)
            if field and not line.startswith("    #"):
                found[field[1]] = said or above or found.get(field[1], "")
            above = f"{above} {said}".strip() if line.startswith("    #: ") else ""
    return found
