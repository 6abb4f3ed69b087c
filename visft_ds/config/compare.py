"""Settings in which a run differs from one that is to continue, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from visft_ds.config.resolve import ResolvedConfig, resolve
from visft_ds.config.tree import Tree, flatten


def differences(there: Mapping[str, Any], config: ResolvedConfig) -> list[str]:
    """Settings in which a run differs from one that is to continue, a line each.

    A key that the release of that run did not have yet is compared with its default; null is as good as none.

    Args:
        there: `identity` of the run that is to continue.
    """
    here = config.identity()
    new = here.keys() - there.keys()
    if new:
        there = {**_defaults(config, new), **there}
    lines = dict[str, str]()  # by key, or by the part that is absent on one side, such as a whole task
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            part = _part(key, there, here)
            lines[part] = f"{part}: {_shown(there, part)} -> {_shown(here, part)}"
    return list(lines.values())


def _part(key: str, *sides: Mapping[str, Any]) -> str:
    """The shortest beginning of a dotted key with nothing below it on one of the sides, or the key."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        beginning = ".".join(parts[:count])
        for side in sides:
            if not any(name.startswith(f"{beginning}.") for name in side):
                return beginning
    return key


def _shown(side: Mapping[str, Any], key: str) -> str:
    if key in side:
        return json.dumps(side[key])
    return "(set)" if any(name.startswith(f"{key}.") for name in side) else "(absent)"


def _defaults(config: ResolvedConfig, keys: Set[str]) -> dict[str, Any]:
    """The defaults of these keys, which nobody states then; none if one of them must be stated."""
    rest = Tree()
    for key, value in flatten(config.to_dict()):
        if key not in keys:
            rest.assign(key, value, "the configuration")
    try:
        identity = resolve(whole=(rest.values, "the configuration")).identity()
    except ValueError:
        return {}
    return {key: identity[key] for key in keys & identity.keys()}
