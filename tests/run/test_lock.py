"""One run in a folder at a time, and none in a folder that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from visft_ds.run.folder import LOCK_FILE
from visft_ds.run.lock import locked

#: Keeps a folder until it is killed; its child must not keep it any longer.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from visft_ds.run.lock import locked
with locked(Path(sys.argv[1])):
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
    print("kept", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_and_the_lock_dies_with_its_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "kept\n"
        with pytest.raises(ValueError, match=f"is in use by another run, process {holder.pid} on .*another --out"):
            with locked(out, patience=0.3):
                raise AssertionError("two runs in one folder")
        assert f"process {holder.pid}" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
    with locked(out, patience=0):
        assert f"process {os.getpid()} on " in (out / LOCK_FILE).read_text()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/visft-run")):  # nobody may write there, not even root
        with pytest.raises(ValueError, match=r"cannot be written: .*; choose another --out"), locked(out):
            raise AssertionError


def test_a_disk_without_room_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left.*another --out"), locked(tmp_path):
        raise AssertionError


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path):
        pass
    assert "nothing keeps a second run out" in capsys.readouterr().err
