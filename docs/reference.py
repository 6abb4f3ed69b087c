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
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

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
    return (
        f"autoclass:: {module}.{name}\n   :members:\n   :inherited-members: object, Module"
        if kind
        else f"autofunction:: {module}.{name}"
    )


def number_rows() -> Iterator[str]:
    """A row for each number of each kind of data."""
    for kind, entry in KINDS.items():
        for number in entry.numbers:
            cells = [f"`{kind}`", number.name, number.how, number.published, number.quick, number.source]
            yield f"| {' | '.join([*cells, number.differs])} |\n"


def sections(model: type[BaseModel], prefix: str = "", title: str = "") -> Iterator[str]:
    """A table for a model, then those of the models in it."""
    if prefix:
        yield f"\n## {title}\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
    yield "\n| key | value | default | meaning |\n|---|---|---|---|\n"
    comments = comments_of(model)
    for name, info in model.model_fields.items():
        key = Key(f"{prefix}{name}", info, comments.get(name, ""))
        yield f"| `{key.name}` | {key.values} | {key.default} | {key.description} |\n"
    for name, info in model.model_fields.items():
        models = [*nested(info.annotation)]
        for inner, is_item in models:
            below = f"{prefix}{name}.N" if is_item else f"{prefix}{name}"
            kind = inner.model_fields.get("type")
            title = f"{below} of type {kind.default}" if kind is not None and len(models) > 1 else below
            yield from sections(inner, f"{below}.", title)


class Key(NamedTuple):
    """A key of the configuration, as its row shows it."""

    name: str
    info: FieldInfo
    description: str

    @property
    def values(self) -> str:
        """Values that it takes, with their range."""
        return kind_of(self.info.annotation, tuple(self.info.metadata))

    @property
    def default(self) -> str:
        """Its default as JSON; nothing for an object, whose keys have their own."""
        if self.info.is_required():
            return "*required*"
        return "" if isinstance(self.info.default, BaseModel) else f"`{json.dumps(self.info.default)}`"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every key that holds a value, no object."""
    comments = comments_of(model)
    for name, info in model.model_fields.items():
        models = [*nested(info.annotation)]
        for inner, is_item in models:
            yield from leaves(inner, f"{prefix}{name}.N." if is_item else f"{prefix}{name}.")
        if not models:
            yield Key(f"{prefix}{name}", info, comments.get(name, ""))


def kind_of(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """A type in words, with its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inner[0], (*annotation.__metadata__, *limits))
    if origin in (Union, UnionType):
        kinds = ["null" if kind is NoneType else kind_of(kind, limits) for kind in inner]
        return " or ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if origin is tuple:
        return f"list of: {kind_of(inner[0])}"
    if inspect.isclass(origin or annotation) and issubclass(origin or annotation, BaseModel):
        return "object, below"
    bounds = []
    for limit in limits:
        for constraint in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
            bounds += [
                f"{sign} {getattr(constraint, name):g}"
                for form, name, sign in BOUNDS
                if isinstance(constraint, form)
            ]
    return f"{WORDS[origin or annotation]} {', '.join(bounds)}".rstrip()


def nested(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Models within an annotation, and whether each is an item of a list."""
    inner = get_args(annotation)
    if not inner and inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation, False
    for argument in inner:
        for model, is_item in nested(argument):
            yield model, is_item or get_origin(annotation) is tuple


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """Field -> its comment (`#:`), beside it or above, as it stands in the source of the class or of a
    base.
    """
    comments = dict[str, str]()
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        above = ""
        for line in inspect.getsource(kind).splitlines():
            comment = line.partition("#: ")[2]
            field = re.match(r"    (\w+): ", line)
            if field:
                comments[field[1]] = comment or above or comments.get(field[1], "")
            above = f"{above} {comment}".strip() if line.startswith("    #: ") else ""
    return comments
