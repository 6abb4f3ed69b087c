"""Record of a run, run.json: its form, and the settings in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from visft_ds.config.resolve import ResolvedConfig, resolve
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
