"""One run in a folder at a time, and none in a folder that cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_second_run_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "kept\n"
        with pytest.raises(ValueError, match="in use by another run"), locked(out, patience=0.3):
            raise AssertionError("two runs in one folder")
    finally:
        holder.kill()
        holder.communicate()
    with locked(out, patience=0):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/visft-run")):  # nobody may write there, not even root
        with pytest.raises(ValueError, match="cannot be written"), locked(out):
            raise AssertionError
