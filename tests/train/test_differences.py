"""Ranks that do not fit together, and a port that is taken: one clear line before the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, finish, free_port
from tests.tiny import command


@pytest.mark.slow
def test_settings_that_differ_are_named_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    port, processes = str(free_port()), []
    for rank in range(2):
        arguments = command(shards, tmp_path / "run", extra={"visft.seed": rank, "visft.run.log_every": 1 + rank})
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "launchers/train.py", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, **group, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    codes, outputs = finish(processes, timeout=600)
    assert codes == [2, 2], outputs
    assert "the ranks do not agree on" in outputs[0]
    assert "visft.seed: rank 0 has 0, rank 1 has 1" in outputs[0]
    assert "visft.run.log_every: rank 0 has 1, rank 1 has 2" in outputs[0]
    assert "Traceback" not in "".join(outputs)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_two_runs_in_one_folder(shards: Path, tmp_path: Path) -> None:
    """The second one waits for a while, then is refused; the first one trains undisturbed."""
    out = tmp_path / "run"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    arguments = [sys.executable, "launchers/train.py"]
    long = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 100_000}
    first = subprocess.Popen(
        [*arguments, *command(shards, out, extra=long)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout is not None
        assert any("img/s" in line for line in first.stdout)
        record = (out / "run.json").read_text()
        second = subprocess.run(
            [*arguments, *command(shards, out, extra=long)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert second.returncode == 2, second.stderr
        assert "is in use by another run" in second.stderr
        assert first.poll() is None
        assert (out / "run.json").read_text() == record
    finally:
        first.kill()
        first.communicate()
