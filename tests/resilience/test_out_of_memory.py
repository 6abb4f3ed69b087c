"""A step that does not fit: what is said, and a rank that alone has no room."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch

from tests.ranks import finish, start_ranks
from tests.tiny import command
from visft_ds.errors import RankError
from visft_ds.resilience.memory import memory_explained

GIB = 2**30
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def message(error: BaseException, device: str = "cpu") -> str:
    explained = memory_explained("step 7 (detection)", "detection", [], torch.device(device))
    with pytest.raises(RankError) as raised, explained:
        raise error
    return str(raised.value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_counts_as_out_of_memory_is_told_with_what_to_try(error: BaseException) -> None:
    first, second, measured, remedy = message(error).splitlines()
    assert first == "out of memory in step 7 (detection): nothing that this rank reads"
    assert second.strip() == (str(error).splitlines() or ["MemoryError"])[0]
    assert "measured" in measured and "visft.tasks.detection.micro_batch" in remedy


def test_a_gpu_says_what_it_has_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"memory_allocated": 5, "max_memory_allocated": 7, "memory_reserved": 8}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * GIB)
    properties = type("Properties", (), {"total_memory": 16 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said = message(torch.OutOfMemoryError("CUDA out of memory."), "cuda:0")
    assert "at the peak 7.00 GiB, allocated 5.00 GiB, reserved 8.00 GiB, on the device 16.00 GiB" in said


#: launchers/train.py, of which rank 1 has no memory from its n-th step on; the rehearsal is the first one.
NO_ROOM = """
import sys
import torch
from visft_ds.launch import main
from visft_ds import distributed
from visft_ds.parallel.engine import Engine
sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # the launcher puts it first
original, left = Engine.train_step, [int(sys.argv[1])]
def train_step(engine, step, *rest):
    left[0] -= 1
    if left[0] == 0 and distributed.rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return original(engine, step, *rest)
Engine.train_step = train_step
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("at", "where"), [(1, "the rehearsal of shared"), (4, r"step 3 \(shared\)")])
def test_one_rank_without_room_is_told_apart(at: int, where: str, shards: Path, tmp_path: Path) -> None:
    arguments = command(shards, tmp_path / "run", extra={"visft.run.memory_check": True})
    codes, outputs = finish(start_ranks(["-c", NO_ROOM, str(at), *arguments]), timeout=600)
    assert codes == [3, 2], outputs
    assert re.search(rf"^\[rank 1\] error: out of memory in {where}: 1 images of 56 x 56", outputs[1], re.M)
    assert "[rank 0] stopped: another rank ended first" in outputs[0]
    assert not any("Traceback" in output for output in outputs)
