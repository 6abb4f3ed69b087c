"""Settings in which a run differs from one that is to continue, for people."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from visft_ds.config.resolve import ResolvedConfig, resolve
from visft_ds.config.tree import Tree, flatten


def differences(there: Mapping[str, Any], config: ResolvedConfig) -> list[str]:
    """Settings in which a run differs from one that is to continue, a line each: those of both first.

    A key that the release of that run did not have yet is compared with its default.

    Args:
        there: `identity` of the run that is to continue.
    """
    here = config.identity()
    lines = [
        f"{key}: {json.dumps(there[key])} -> {json.dumps(here[key])}"
        for key in sorted(there.keys() & here.keys())
        if there[key] != here[key]
    ]
    new = here.keys() - there.keys()
    defaults = _defaults(config, new) if new else {}
    one_sided = dict[str, str]()  # by the part that is absent, such as a whole task
    for key in sorted(new):
        if key not in defaults:
            absent = _absent_part(key, there)
            value = json.dumps(here[key]) if absent == key else "(set)"
            one_sided[absent] = f"{absent}: (absent) -> {value}"
        elif defaults[key] != here[key]:
            default = json.dumps(defaults[key])
            one_sided[key] = f"{key}: {default} (its default) -> {json.dumps(here[key])}"
    for key in sorted(there.keys() - here.keys()):
        if there[key] is not None:
            absent = _absent_part(key, here)
            value = json.dumps(there[key]) if absent == key else "(set)"
            one_sided[absent] = f"{absent}: {value} -> (absent)"
    return [*lines, *one_sided.values()]


def _absent_part(key: str, other: Mapping[str, Any]) -> str:
    """The shortest beginning of a dotted key with nothing below it in `other`, such as a task that is off."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        beginning = ".".join(parts[:count])
        if not any(f"{name}.".startswith(f"{beginning}.") for name in other):
            return beginning
    return key


def _defaults(config: ResolvedConfig, keys: Collection[str]) -> dict[str, Any]:
    """Identity of the configuration where nobody states these keys; empty if one of them must be stated."""
    rest = Tree()
    for key, value in flatten(config.to_dict()):
        if key not in keys:
            rest.assign(key, value, "the configuration")
    try:
        return resolve(whole=(rest.values, "the configuration")).identity()
    except ValueError:
        return {}
