"""Layers of JSON become one tree of values that knows where each value came from.

A leaf is whatever is not an object: numbers, texts, null, and lists as a whole. A leaf set by two files is an error;
a model file replaces values of the other layers on purpose through its top-level object "override".
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from visft_ds import CHECKOUT
from visft_ds.config.records import check_depth
from visft_ds.redaction import redacted_values

AnyPath = str | os.PathLike[str]  #: a path as users give it

#: ds_configs/: beside the package in a checkout, inside of it where it was installed from a wheel.
CONFIG_ROOT = (CHECKOUT or Path(str(resources.files("visft_ds")))) / "ds_configs"


@dataclass(frozen=True)
class Replaced:
    """Value that was replaced on purpose."""

    key: str  #: dotted
    old: Any  #: None where no layer had set it
    new: Any
    source: str  #: file or flag


@dataclass
class Tree:
    """Nested values, the file or flag behind each leaf, and what replaced what."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  #: dotted key of a leaf -> file or flag
    replaced: list[Replaced] = field(default_factory=list)

    def source(self, key: str) -> str | None:
        """Source (file or flag) of `key`, of the list it is in, or of the first value below it; None: not set."""
        while key:
            if key in self.sources:
                return self.sources[key]
            below = [source for other, source in self.sources.items() if other.startswith(key + ".")]
            if below:
                return below[0]
            key = key.rpartition(".")[0]
        return None


def display(path: Path) -> str:
    """A path as a person would type it: relative to the current folder where it lies below it; a shipped configuration
    as ds_configs/..., wherever it is installed."""
    absolute, here = path.resolve(), Path.cwd()
    if absolute.is_relative_to(CONFIG_ROOT.resolve()):
        return str(CONFIG_ROOT.name / absolute.relative_to(CONFIG_ROOT.resolve()))
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def load_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ValueError: missing file, syntax error (with line and column), a key given twice, NaN, or not an object.
    """
    name = display(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f'{name}: the key "{key}" stands twice in one object; remove one of them')
            seen[key] = value
        return seen

    def refuse(constant: str) -> Any:
        raise ValueError(f"{name}: {constant} is no JSON number; state a finite one")

    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    check_depth(value, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must hold one JSON object, holds {shorten(value)}")
    return value


def shorten(value: Any, limit: int = 60) -> str:
    """JSON of a value, cut to fit into a message."""
    text = json.dumps(redacted_values(value))
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not an object; an empty object counts as a leaf."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from leaves(value, dotted + ".")
        else:
            yield dotted, value


def merge(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Tree:
    """Join layers (file name, values) leaf by leaf.

    Raises:
        ValueError: every leaf that two files set, all at once.
    """
    tree, errors = Tree(), []
    for name, values in layers:
        errors += _merge_into(tree, tree.values, values, name, "")
    if errors:
        raise ValueError("\n  ".join([f"{len(errors)} values are set by two files:", *errors]))
    return tree


def _merge_into(tree: Tree, target: dict[str, Any], values: Mapping[str, Any], name: str, prefix: str) -> list[str]:
    errors = []
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if key not in target:
            target[key] = copy.deepcopy(value)
            nested = leaves(value, dotted + ".") if isinstance(value, dict) and value else [(dotted, value)]
            tree.sources.update((leaf, name) for leaf, _ in nested)
        elif isinstance(value, dict) and isinstance(target[key], dict):
            errors += _merge_into(tree, target[key], value, name, dotted + ".")
        else:
            first = tree.source(dotted)
            errors.append(
                f"{dotted}: set by {first} and by {name}; remove one, or, to replace it on purpose, "
                f'put it into "override" of the model file, or use --set {dotted}=VALUE'
            )
    return errors


def apply_override(tree: Tree, override: Any, stage: str, name: str) -> None:
    """Replace values on purpose: `override` is a model file's object of stage ("stage1") -> dotted key -> value.

    Raises:
        ValueError: not such an object, or a key that leads through a value that is no object.
    """
    stages = ("stage1", "stage2")
    if not isinstance(override, dict) or any(
        key not in stages or not isinstance(value, dict) for key, value in override.items()
    ):
        raise ValueError(
            f'{name}: "override" is {shorten(override)}; it must be an object like '
            '{"stage1": {"optimizer.params.lr": 0.001}}, of the stages stage1 and stage2'
        )
    for key, value in override.get(stage, {}).items():
        assign(tree, key, value, f"{name} (override)")


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is JSON where it parses as JSON, else a text.

    Raises:
        ValueError: no "=" or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f'--set {text}: must be KEY=VALUE, for example --set optimizer.params.lr=1e-5 (lists: "[1, 2]")'
        )
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value
    except RecursionError as error:
        raise ValueError(f"--set {key.strip()}: not JSON: {error}") from error
    check_depth(parsed, f"--set {key.strip()}")
    return key.strip(), parsed


def assign(tree: Tree, key: str, value: Any, source: str) -> None:
    """Set one leaf; a number in `key` is a position in a list, that behind the last one adds an item.

    Whether the key exists is checked by the schema.

    Raises:
        ValueError: the key leads through a value that is no object or list, or past the end of a list.
    """
    parts = key.split(".")
    node: Any = tree.values
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the top level"
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if last and part == str(len(node)):
                node.append(None)
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"{source} {key}: {where} is a list of {len(node)}; give a position below {len(node)}")
        elif not isinstance(node, dict):
            raise ValueError(f"{source} {key}: {where} is {shorten(node)} and has no keys")
        step: Any = int(part) if isinstance(node, list) else part
        old = node[step] if isinstance(node, list) else node.get(part)
        if not last:
            # An absent or null object (a default, or a task that was off) is opened.
            node[step] = old = {} if old is None else old
            node = old
            continue
        tree.replaced.append(Replaced(key, copy.deepcopy(old), value, source))
        node[step] = copy.deepcopy(value)
    for other in [other for other in tree.sources if other.startswith(key + ".")]:
        del tree.sources[other]
    tree.sources[key] = source
