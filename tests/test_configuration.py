"""docs/configuration.md: every key of a configuration, as the schema and its comments have it.

After a change of the schema, `python -m tests.test_configuration --write` writes the page.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, StringConstraints
from pydantic.fields import FieldInfo

from visft_ds.config.deepspeed_keys import REFUSED, REFUSED_ZERO, DeepSpeedKeys
from visft_ds.config.schema import Recipe, complete
from visft_ds.config.validate import known_keys

PAGE = Path(__file__).parents[1] / "docs/configuration.md"
HEAD = """# Configuration keys

Every key that a file of settings or `--set KEY=VALUE` may have; [ds_configs](../ds_configs/README.md) says how files
and flags come together, `visft train ... --dry-run` what they come to. `N` is a position in a list, from 0. A key
marked *stated* has no default: the shipped files state it.

This page is written from the schema. In a checkout (`make install` once, then `. .venv/bin/activate` in each shell)
`python -m tests.test_configuration --write` does so.

## Our keys
"""
DEEPSPEED = """
## DeepSpeed's own keys

Types and names are checked; `null` stands for DeepSpeed's own default. What they do is said in
[DeepSpeed's documentation](https://www.deepspeed.ai/docs/config-json/).
"""
REFUSALS = """
## Keys of DeepSpeed that are refused

| key | instead |
|---|---|
"""
WORDS = {bool: "true, false", int: "whole number", float: "number", str: "text", Any: "any", dict: "object"}
BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


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
        same = inner[-1] is Ellipsis
        return f"list of: {kind_of(inner[0])}" if same else f"list of {len(inner)}: {kind_of(inner[0])}"
    if inspect.isclass(origin or annotation) and issubclass(origin or annotation, BaseModel):
        return "object, below"
    limits = tuple(one for limit in limits for one in (limit.metadata if isinstance(limit, FieldInfo) else (limit,)))
    bounds = [
        f"{sign} {getattr(one, name):g}" for one in limits for form, name, sign in BOUNDS if isinstance(one, form)
    ]
    patterns = [f"`{one.pattern}`" for one in limits if isinstance(one, StringConstraints) and one.pattern]
    return " ".join(filter(None, (WORDS[origin or annotation], ", ".join(bounds), *patterns)))


def comments_of(model: type[BaseModel]) -> dict[str, str]:
    """Field -> its comment (`#:`), beside it or above, as it stands in the source of the class or of a base."""
    found, above = {}, ""
    for kind in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        for line in inspect.getsource(kind).splitlines():
            said = line.partition("#: ")[2]
            field = re.match(r"    (\w+): ", line)
            if field and not line.startswith("    #"):
                found[field[1]] = said or above or found.get(field[1], "")
            above = f"{above} {said}".strip() if line.startswith("    #: ") else ""
    return found


def nested(annotation: Any) -> Iterator[tuple[type[BaseModel], bool]]:
    """Models within an annotation, and whether each is an item of a list."""
    inner = get_args(annotation)
    if not inner and inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation, False
    for part in inner:
        yield from ((model, item or get_origin(annotation) is tuple) for model, item in nested(part))


def default_of(info: FieldInfo) -> str:
    if info.is_required():
        return "*stated*"
    return "" if isinstance(info.default, BaseModel) else f"`{json.dumps(info.default)}`"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table for a model, then those of the models in it."""
    comments = comments_of(model)
    if prefix:
        yield f"\n## {prefix.rstrip('.')}\n\n{inspect.cleandoc(model.__doc__ or '')}\n"
    yield "\n| key | value | default | |\n|---|---|---|---|\n"
    for name, info in model.model_fields.items():
        kind = kind_of(info.annotation, tuple(info.metadata))
        yield f"| `{prefix}{name}` | {kind} | {default_of(info)} | {comments.get(name, '')} |\n"
    for name, info in model.model_fields.items():
        for inner, item in nested(info.annotation):
            yield from sections(inner, f"{prefix}{name}.{'N.' if item else ''}")


def page() -> str:
    """The page, from the schema."""
    complete()
    refused = REFUSED | {f"zero_optimization.{key}": said for key, said in REFUSED_ZERO.items()}
    rows = "".join(f"| `{key}` | {said} |\n" for key, said in refused.items()).replace("<task>", "TASK")
    return HEAD + "".join((*sections(Recipe), DEEPSPEED, *sections(DeepSpeedKeys), REFUSALS, rows))


def test_the_page_is_that_of_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.test_configuration --write"


def test_every_key_and_comment_is_on_the_page() -> None:
    """The keys that a message suggests come from another walk over the schema."""
    rows = dict(re.findall(r"^\| `(\S+?)` \|.*\| (.*) \|$", page(), re.M))
    assert {key.replace("*", "N") for key in known_keys()} <= set(rows)
    assert rows["visft.model.until"].startswith("block that it ends after"), "a comment beside the field"
    assert rows["visft.tasks.detection.updates"].startswith("Optimiser steps of this task"), "above it, in a base class"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    print(page(), end="")
