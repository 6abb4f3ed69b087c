"""The run folder: its lock, its record; a start that trained nothing is in nobody's way, anything else is."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest

from tests.checkpoint.faulty_disk import state
from visft_ds.checkpoint.format import SETTINGS, Checkpoint, check_identity, open_checkpoint, save_checkpoint
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.config.record import RUN_SCHEMA, Parent, recorded_config
from visft_ds.parallel.engine import Engine
from visft_ds.run.folder import locked, look_into, open_run_folder
from visft_ds.run.record import write_run
from visft_ds.run.state import RunState
from visft_ds.run_files import BACKBONE_FILE, LOCK_FILE

RECORDS = ("run.json", "metrics.jsonl", f"export/{BACKBONE_FILE}")


def _config(*settings: str) -> ResolvedConfig:
    return resolve(stage=1, model="debug", settings=settings)


#: Keeps a folder until it is killed; its child must not keep it any longer.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from visft_ds.run.folder import locked
with locked(Path(sys.argv[1])):
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print("kept", flush=True)
    time.sleep(600)
"""

FIRST, OTHER = _config(), _config("optimizer.params.lr=1e-6")


def _run(out: Path) -> Path:
    """What a run leaves that diverges before its first checkpoint; notes of the user beside it."""
    write_run(out, FIRST.to_dict(), 1, ["train.py"])
    for name in (*RECORDS[1:], LOCK_FILE, "notes.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    return out


def test_a_start_that_recorded_no_step_is_in_nobodys_way(tmp_path: Path) -> None:
    """Such as one that ran out of memory: the corrected command works in the same folder."""
    out = _run(tmp_path / "run")
    for config, resume in ((FIRST, "auto"), (OTHER, "auto"), (OTHER, "no")):
        with (
            pytest.raises(ValueError, match=r"holds a run|optimizer.params.lr")
            if config is OTHER
            else nullcontext()
        ):
            open_run_folder(out, config, resume)  # it recorded steps
    (out / "metrics.jsonl").write_text("")
    (out / "checkpoints" / "step_00000004.tmp").mkdir(parents=True)  # cut off while it was written
    for config, resume in ((FIRST, "auto"), (OTHER, "auto"), (OTHER, "no")):
        open_run_folder(out, config, resume)
    (out / "run.json").write_text("{")
    open_run_folder(out, FIRST, "auto")
    with pytest.raises(ValueError, match="--resume must"):
        open_run_folder(out, FIRST, "must")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / "run.json").unlink()
    with pytest.raises(ValueError, match=r"notes\.txt"):
        open_run_folder(out, FIRST, "auto")
    (out / "notes.txt").unlink()
    open_run_folder(out, FIRST, "auto")  # a start that failed before its record


def test_a_run_without_its_checkpoints_is_not_trained_over(tmp_path: Path) -> None:
    """Its export would be replaced, and its metrics cut off."""
    out = _run(tmp_path / "run")
    engine = cast(Engine, None)  # which is asked for nothing before a checkpoint is found

    def state_of_run() -> RunState:
        return RunState(_config(f"visft.run.out={out}"), engine, {}, cast(Any, None), look_into(out))

    assert state_of_run().resume() == 0  # the random base alone is nothing that was trained
    (out / "export/export.json").write_text("")
    with pytest.raises(ValueError, match="has an export and no checkpoint"):
        state_of_run().resume()


def test_a_checkpoint_of_an_earlier_release_is_continued_at_the_defaults_of_new_keys(tmp_path: Path) -> None:
    """It has the settings themselves, not a digest of them; other ones are named."""
    new = "visft.tasks.detection.loss.eos_coef"
    settings = {key: value for key, value in FIRST.identity().items() if not key.startswith(new)}
    path = save_checkpoint(tmp_path / "checkpoints", 4, state(4), {"data set": "x", SETTINGS: settings})
    checkpoint = open_checkpoint(path)
    check_identity(checkpoint, {"data set": "x"}, FIRST)
    with pytest.raises(ValueError, match=r"optimizer\.params\.lr: 0\.001 -> 1e-06") as error:
        check_identity(checkpoint, {"data set": "y"}, OTHER)
    assert "data set: x -> y" in str(error.value) and new not in str(error.value)
    with pytest.raises(ValueError, match=r"visft\.heads\.train_mode: false -> true"):
        check_identity(checkpoint, {"data set": "x"}, _config("visft.heads.train_mode=true"))
    record = dict(checkpoint.record)
    del record["identity"][SETTINGS]
    with pytest.raises(ValueError, match="state of a checkpoint of this release"):
        check_identity(Checkpoint(path, 4, record), {"data set": "x"}, FIRST)


@pytest.mark.parametrize("saved", ["checkpoints/step_00000004.old/state.json", "export/export.json"])
def test_whatever_is_saved_keeps_other_settings_out(saved: str, tmp_path: Path) -> None:
    out = _run(tmp_path / "run")
    (out / saved).parent.mkdir(parents=True, exist_ok=True)
    (out / saved).write_text("")
    with pytest.raises(ValueError, match=r"holds a run with other settings(?s:.*)optimizer.params.lr"):
        open_run_folder(out, OTHER, "auto")
    with pytest.raises(ValueError, match="--resume no"):
        open_run_folder(out, OTHER, "no")
    open_run_folder(out, FIRST, "auto")


def test_a_record_is_that_of_the_newest_start_and_says_its_schema(tmp_path: Path) -> None:
    """An earlier start that saved nothing may have had a parent, and this one none."""
    write_run(tmp_path, {}, 1, [], parent=Parent(path="/there", step=2, sha256="0" * 64))
    path = write_run(tmp_path, {"visft": {"seed": 1}}, world_size=8, command=["train.py"])
    record = json.loads(path.read_text())
    assert (record["config"], record["world_size"], record["parent"]) == ({"visft": {"seed": 1}}, 8, None)
    assert {"python", "torch", "deepspeed", "visft_ds"} <= record["versions"].keys()
    assert list(tmp_path.iterdir()) == [path] and record["schema"] == RUN_SCHEMA
    path.write_text(json.dumps({**record, "schema": RUN_SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"schema {RUN_SCHEMA + 1}; this release reads {RUN_SCHEMA}"):
        recorded_config(tmp_path)


def test_a_second_run_is_refused_and_the_lock_dies_with_its_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "kept\n"
        with pytest.raises(ValueError, match="in use by another run"), locked(out, patience=0.3):
            raise AssertionError("two runs in one folder")
        assert f"waiting for {out}/run.lock: another run uses" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
    with locked(out, patience=0):
        pass
    assert not capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/visft-run")):  # nobody may write there, not even root
        with pytest.raises(ValueError, match="cannot be written"), locked(out):
            raise AssertionError
