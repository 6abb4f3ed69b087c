"""A folder in which a run saved nothing does not keep the corrected command out; anything saved does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.monitor.metrics import RUN_SCHEMA, RunRecord
from visft_ds.parallel.engine import Engine
from visft_ds.run.folder import BACKBONE_FILE, LOCK_FILE, open_run_folder, recorded_config, set_aside
from visft_ds.run.state import RunState

RECORDS = ("run.json", "metrics.jsonl", f"export/{BACKBONE_FILE}")


def _config(*settings: str) -> ResolvedConfig:
    return resolve(stage=1, model="debug", settings=settings)


FIRST, OTHER = _config(), _config("optimizer.params.lr=1e-6")


def _run(out: Path) -> Path:
    """What a run leaves that diverges before its first checkpoint; notes of the user beside it."""
    RunRecord(FIRST.to_dict(), 1, ["train.py"]).write(out)
    for name in (*RECORDS[1:], LOCK_FILE, "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    return out


def test_a_run_that_saved_nothing_is_set_aside_with_all_that_it_wrote(tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / "checkpoints" / "step_00000004.tmp").mkdir(parents=True)  # cut off while it was written
    before = (out / "run.json").read_text()
    assert open_run_folder(out, OTHER, "auto") and open_run_folder(out, FIRST, "no")
    assert not open_run_folder(out, FIRST, "auto")  # the same run, from its start
    with pytest.raises(ValueError, match=r"--resume must: the run in .* has saved nothing"):
        open_run_folder(out, FIRST, "must")
    aside = set_aside(out)
    assert aside == out / "earlier-1" and (aside / "run.json").read_text() == before
    assert all((aside / name).read_text() == name for name in RECORDS[1:])
    assert sorted(path.name for path in out.iterdir()) == ["earlier-1", "notes.txt", LOCK_FILE]
    RunRecord(OTHER.to_dict(), 1, ["train.py"]).write(out)
    assert open_run_folder(out, FIRST, "auto") and set_aside(out) == out / "earlier-2"
    assert json.loads((aside / "run.json").read_text()) == json.loads(before)


def test_a_start_that_failed_before_its_record_is_nothing_in_the_way(tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / "notes.txt").unlink()
    set_aside(out)
    (out / "run.tmp").write_text("{")  # killed while it wrote its record
    assert not open_run_folder(out, OTHER, "auto")


def test_what_belongs_to_trackers_and_traces_is_set_aside_with_the_run(tmp_path: Path) -> None:
    """The next run would go on with its record there, and the folder without a record would be none of a run."""
    out = _run(tmp_path / "run")
    (out / "notes.txt").unlink()
    (out / "wandb").mkdir()
    names = ("tracker-wandb", "wandb/latest-run", "trace-2-3-rank0.json.gz")
    for name in names:
        (out / name).write_text(name)
    aside = set_aside(out)
    assert [(aside / name).read_text() for name in names] == list(names)
    assert not open_run_folder(out, OTHER, "auto")


@pytest.mark.parametrize("how", ["auto", "must"])
def test_a_run_without_its_checkpoints_is_not_trained_over(how: str, tmp_path: Path) -> None:
    """Its export would be replaced, and its metrics cut off."""
    out, engine = _run(tmp_path / "run"), cast(Engine, None)  # which is asked for nothing before a checkpoint is found
    state = RunState(_config(f"visft.run.out={out}"), engine, {}, cast(Any, None))
    if how == "auto":
        assert state.resume(how) == 0  # the random base alone is nothing that was trained
    (out / "export/detection.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"has an export and no checkpoint to go on from: choose another --out, or"):
        state.resume(how)


def test_a_record_of_another_release_is_in_the_way_of_nothing_where_nothing_is_saved(tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / "run.json").write_text("{")
    assert open_run_folder(out, FIRST, "auto")


@pytest.mark.parametrize(
    "saved",
    [
        "checkpoints/step_00000004/state.json",
        "checkpoints/step_00000004.old/state.json",
        "export/detection.safetensors",
        "export/adapter/adapter_model.safetensors",
    ],
)
def test_whatever_is_saved_keeps_other_settings_out(saved: str, tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / saved).parent.mkdir(parents=True, exist_ok=True)
    (out / saved).write_text("")
    with pytest.raises(ValueError, match=r"holds a run with other settings(?s:.*)optimizer.params.lr"):
        open_run_folder(out, OTHER, "auto")
    with pytest.raises(ValueError, match="--resume no"):
        open_run_folder(out, OTHER, "no")
    assert not open_run_folder(out, FIRST, "auto")


def test_a_record_says_its_schema(tmp_path: Path) -> None:
    path = RunRecord(FIRST.to_dict(), 1, ["train.py"]).write(tmp_path)
    record = json.loads(path.read_text())
    assert record.pop("schema") == RUN_SCHEMA
    path.write_text(json.dumps({**record, "schema": RUN_SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"schema {RUN_SCHEMA + 1}; this release reads {RUN_SCHEMA}"):
        recorded_config(tmp_path)
