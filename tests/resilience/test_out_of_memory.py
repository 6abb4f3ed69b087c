"""Running out of memory for real: in the rehearsal, under a limit of the process, and on one rank alone."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, deepspeed, finish, start_command, start_ranks
from tests.tiny import command

pytestmark = pytest.mark.slow

MIB = 2**20
#: Large images for a deep narrow model: nearly all its memory is activations, 310 MiB of the 330 that are planned.
LARGE = {
    "visft.model.overrides": {"width": 64, "depth": 12, "num_heads": 2, "image_size": 56},
    "visft.tasks": "detection",
    "visft.tasks.detection.batch_size": 8,
    "visft.tasks.detection.micro_batch": 8,
    "scheduler.params.total_num_steps": 2,
    "scheduler.params.warmup_num_steps": 1,
    "zero_optimization.reduce_bucket_size": 1_000_000,
}
#: Whatever is not small is returned to the system at once, so that the limit counts what lives and no holes between.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def under_limit(arguments: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """Run launchers/train.py with so many bytes of data at most."""
    return subprocess.run(
        [sys.executable, "launchers/train.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **ALLOCATOR},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )


def taken_by_imports() -> int:
    """Bytes of data of a process that has everything imported."""
    code = (
        "import resource, visft_ds.train; from visft_ds.resilience.host_memory import memory_in_use; "
        "print(memory_in_use()[resource.RLIMIT_DATA])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True
    )
    return int(done.stdout)


def test_following_the_first_setting_makes_it_fit(shards: Path, tmp_path: Path) -> None:
    heads = {**LARGE, "visft.tasks.detection.image.fixed_size": 56, "visft.run.rehearsal": False}
    limit = taken_by_imports() + 330 * MIB
    done = under_limit(command(shards, tmp_path / "heads", extra=heads), limit)
    assert done.returncode == 0, done.stderr
    extra = {
        **LARGE,
        "visft.tasks.detection.image.fixed_size": 448,
        "visft.heads.path": str(tmp_path / "heads" / "export"),
        "visft.run.rehearsal": True,
    }
    done = under_limit(command(shards, tmp_path / "large", stage=2, extra=extra), limit)
    assert done.returncode == 2, done.stdout + done.stderr
    first, *lines = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: out of memory in the rehearsal of detection: 8 images of 448 x 448, \d+ objects", first
    )
    assert "can't allocate memory" in lines[0] and "Traceback" not in done.stderr
    assert any(re.search(r"activations +\d+\.\d MiB", line) for line in lines)
    settings = [match[1] for line in lines if (match := re.match(r"    (--.*?)   \(\d", line))]
    assert 1 <= len(settings) <= 3
    assert not (tmp_path / "large" / "metrics.jsonl").exists() or not (tmp_path / "large" / "checkpoints").exists()

    again = [*command(shards, tmp_path / "fits", stage=2, extra=extra), *shlex.split(settings[0])]
    done = under_limit(again, limit)
    assert done.returncode == 0, settings[0] + done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "fits" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2]


#: launchers/train.py, of which rank 1 has no memory from its n-th step on; the rehearsal is the first one.
NO_ROOM = """
import sys
import torch
from visft_ds.launch import main
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine
sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # the launcher puts it first
original, left = ZeroEngine.train_step, [int(sys.argv[1])]
def train_step(engine, step, *rest):
    left[0] -= 1
    if left[0] == 0 and distributed.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return original(engine, step, *rest)
ZeroEngine.train_step = train_step
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("at", "where"), [(1, "the rehearsal of shared"), (4, r"step 3 \(shared\)")])
def test_one_rank_without_room_is_named_by_the_other(at: int, where: str, shards: Path, tmp_path: Path) -> None:
    arguments = command(shards, tmp_path / "run", extra={"visft.run.rehearsal": True})
    codes, outputs = finish(start_ranks(["-c", NO_ROOM, str(at), *arguments]), timeout=600)
    assert codes == [2, 2], outputs  # who follows ends with the code of who ended first
    assert re.search(rf"^\[rank 1\] error: out of memory in {where}: 1 image of 56 x 56", outputs[1], re.M)
    assert ("did not foresee this" in outputs[1]) == (at > 1)
    assert "  CUDA out of memory. Tried to allocate 2.00 GiB.\n" in outputs[1]
    assert re.search(
        rf"^\[rank 0\] stopped: another rank ended first: rank 1 .*: OutOfMemory: out of memory in {where}",
        outputs[0],
        re.M,
    )
    assert not any("Traceback" in output for output in outputs)


def test_the_launcher_ends_with_the_code_of_the_rank_without_room(shards: Path, tmp_path: Path) -> None:
    """Its code decides whether a supervisor starts the run again: with 3 it would, and run into the same."""
    script = tmp_path / "no_room.py"
    script.write_text(NO_ROOM)
    arguments = command(shards, tmp_path / "run", extra={"visft.run.rehearsal": True})
    process = start_command(deepspeed([str(script), "1", *arguments]))
    (code,), (output,) = finish([process], timeout=600)
    assert "[rank 0] stopped: another rank ended first" in output, output
    assert code == 2, output
