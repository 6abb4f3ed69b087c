"""Record of a run, run.json: its form, the settings in it, and in which of them another run differs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pydantic import Field

from visft_ds.config.resolve import ResolvedConfig, resolve
from visft_ds.config.tree import Tree, flatten
from visft_ds.files import read_bytes, reading
from visft_ds.run_files import EXPORT_RECORD_FILE, RECORD_FILE
from visft_ds.settings.fields import Count, Positive, StrictModel

RUN_SCHEMA = 5  #: version of the record
_MOST_BYTES = 1 << 26  #: of a run.json that is read


class Parent(StrictModel):
    """Origin of a run: a checkpoint of another one, or an adapter."""

    path: str
    step: Count | None
    sha256: str  #: of what was read


class RunFile(StrictModel):
    """Content of run.json; its number is that of its schema."""

    number: Count = Field(alias="schema")
    config: dict[str, Any]
    world_size: Positive = 1
    started: str = ""
    command: list[str] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str = ""  #: of the checkout, with "-dirty" where files differ from it; empty where it is none
    identity: dict[str, str] = Field(default_factory=dict)  #: fingerprints of what it was made with
    parent: Parent | None = None


def recorded_config(out: Path) -> ResolvedConfig:
    """The resolved configuration of the run in `out`. Raises ValueError as `read_run`."""
    return resolve(whole=(read_run(out).config, str(out / RECORD_FILE)))


def read_run(out: Path) -> RunFile:
    """The record of the run, or of the export, in `out`. Raises ValueError: none there, or one of another
    schema.
    """
    record = out / (EXPORT_RECORD_FILE if (out / EXPORT_RECORD_FILE).is_file() else RECORD_FILE)
    if not record.is_file():
        raise ValueError(f"there is no run in {out}: {record} does not exist")
    with reading(record, "the record of a run"):
        data = read_bytes(record, _MOST_BYTES)
        if (schema := json.loads(data)["schema"]) != RUN_SCHEMA:
            raise ValueError(f"schema {schema}; this release reads {RUN_SCHEMA}")
        return RunFile.model_validate_json(data)


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
