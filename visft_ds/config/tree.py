"""Nested values of a configuration: dotted keys, JSON files and KEY=VALUE, and the source of each value."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visft_ds.files import read_bytes, reading
from visft_ds.redaction import redacted_values

_LONGEST = 60  #: letters of a value in a message


@dataclass
class Tree:
    """Nested values, and the file or flag behind each leaf."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def lay(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        """Lay values over those that there are, object by object; a list is replaced as a whole."""
        for key, value in values.items():
            if isinstance(value, dict) and value:
                self.lay(value, source, f"{prefix}{key}.")
            else:
                self.assign(f"{prefix}{key}", value, source)

    def assign(self, key: str, value: Any, source: str) -> None:
        """Set a dotted key; a number is a position in a list, that behind the last one adds an item.

        Whether the key exists is checked by the schema. Raises ValueError for a key through a value without
        keys.
        """
        parent, _, last = key.rpartition(".")
        if self.value(parent) is None:  # a default, or a task that was off
            self.assign(parent, [] if last == "0" else {}, source)
        node = self.value(parent)
        if isinstance(node, dict):
            node[last] = copy.deepcopy(value)
        elif isinstance(node, list) and last.isdigit() and int(last) <= len(node):
            node[int(last) : int(last) + 1] = [copy.deepcopy(value)]
        else:
            raise ValueError(f"{source} {key}: {parent} is {shorten(node)}, which has no {last}")
        self.sources |= {inner: source for inner, _ in flatten(value, f"{key}.")}

    def source(self, key: str) -> str | None:
        """Source of a key, of the first value below it, or of what it is in; None: not set."""
        for other, source in self.sources.items():
            if f"{other}.".startswith(f"{key}."):
                return source
        return self.source(key.rpartition(".")[0]) if key else None

    def is_stated(self, key: str) -> bool:
        """Return True if a flag of the user sets this key, a key below it, or what it is in."""
        for other, source in self.sources.items():
            related = f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.")
            # What a backbone brings along gives way to what is decided about it.
            if related and source.startswith("--") and not source.startswith("--backbone "):
                return True
        return False

    def value(self, key: str) -> Any:
        """The value of a dotted key; None if there is none."""
        node: Any = self.values
        for name in filter(None, key.split(".")):
            if isinstance(node, dict):
                node = node.get(name)
            elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            else:
                return None
        return node


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is nested in objects and lists."""
    if isinstance(value, list):
        value = {str(number): nested for number, nested in enumerate(value)}
    if not isinstance(value, dict):
        yield prefix[:-1], value
        return
    for key, nested in value.items():
        yield from flatten(nested, f"{prefix}{key}.")


def load_json(path: Path, name: str | None = None) -> dict[str, Any]:
    """The object in a configuration file. Raises ValueError, also for a key that occurs twice; OSError for no
    file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"a key occurs twice in one object: {', '.join(key for key, _ in pairs)}")
        return values

    with reading(name or path, "a configuration (a JSON object)"):
        value = json.loads(read_bytes(path), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(shorten(value))
    return value


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is JSON, or a text if it is none. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: must be KEY=VALUE, such as optimizer.params.lr=1e-5")
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


def shorten(value: Any) -> str:
    """JSON of a value, cut to fit into a message."""
    text = json.dumps(redacted_values(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."
