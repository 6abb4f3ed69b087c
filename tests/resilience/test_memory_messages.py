"""What is said where memory runs out, and what is taken for that."""

from __future__ import annotations

import errno
import gc
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from visft_ds import launch, train
from visft_ds.config import resolve
from visft_ds.data.samples import Batch
from visft_ds.planner.memory import MemoryPlan, PlannedRun, run_of
from visft_ds.planner.search import Suggestion
from visft_ds.resilience import out_of_memory
from visft_ds.resilience.out_of_memory import MemoryWatch, OutOfMemory, is_out_of_memory, largest_shape
from visft_ds.resilience.stop import StopFlag
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.detection.data import DetectionTargets

CPU, GIB = torch.device("cpu"), 2**30
PLAN = MemoryPlan(2 * GIB, GIB, GIB, 0, 0, 6 * GIB)
LESS = MemoryPlan(2 * GIB, GIB, GIB, 0, 0, 2 * GIB)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A planner that answers at once; the bytes that settings were asked to fit into."""
    rooms: list[int] = []

    def fitting(run: PlannedRun, room: int) -> list[Suggestion]:
        rooms.append(room)
        return [Suggestion(("--set visft.model.recompute=block", "--set a.b=c"), LESS)][: room // (6 * GIB)]

    monkeypatch.setattr(out_of_memory, "plan_largest", lambda run, stream: PLAN)
    monkeypatch.setattr(out_of_memory, "fitting_settings", fitting)
    return rooms


def watch(device: torch.device = CPU) -> MemoryWatch:
    return MemoryWatch(run_of(resolve(stage=2, model="debug"), 1, "fp32", 12, device))


def message(watch: MemoryWatch, error: BaseException) -> str:
    with pytest.raises(OutOfMemory) as raised, watch.watched("step 7 (detection)", "detection", lambda: "2 images"):
        raise error
    return str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_counts_as_out_of_memory(error: BaseException, asked: list[int]) -> None:
    assert is_out_of_memory(error)
    said = message(watch(), error)
    first, second, *_ = said.splitlines()
    assert first == "out of memory in step 7 (detection): 2 images"
    assert second.strip() == (str(error).splitlines() or ["MemoryError"])[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer"),
        OSError(errno.ENOSPC, "No space left"),
        ValueError("can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass(error: Exception, asked: list[int]) -> None:
    with pytest.raises(type(error)) as raised, watch().watched("step 7", "detection", lambda: "2 images"):
        raise error
    assert raised.value is error and not asked


def test_the_message_has_parts_and_flags_to_paste(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "host_memory_available", lambda: 64 * GIB)
    watched = watch()
    said = message(watched, MemoryError())
    assert "activations" in said and "6,144.0 MiB" in said
    assert "    --set visft.model.recompute=block --set a.b=c   (6.00 GiB)" in said
    # 10 GiB are planned and did not fit, however much seems to be free
    assert asked == [int(0.7 * 10 * GIB)]
    assert "did not foresee" not in said
    watched.rehearsed = True
    assert "The rehearsal before the first step did not foresee this." in message(watched, MemoryError())


def test_room_is_what_limits_and_other_programs_leave(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "host_memory_available", lambda: 8 * GIB)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    held = PLAN.weights + PLAN.optimizer
    said = message(watch(), MemoryError())
    assert asked == [int(0.7 * (2 * GIB + held))] and "no setting is known that would fit into 3.50 GiB" in said
    bounds = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: 3 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (bounds[limit], resource.RLIM_INFINITY))
    monkeypatch.setattr(
        out_of_memory, "memory_in_use", lambda: {resource.RLIMIT_AS: 9 * GIB, resource.RLIMIT_DATA: 2 * GIB}
    )
    message(watch(), MemoryError())
    assert asked[1] == int(0.7 * (GIB + held))


def test_a_gpu_says_what_it_has_counted(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"memory_allocated": 5, "max_memory_allocated": 7, "memory_reserved": 8}
    for name, size in counted.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * GIB, 16 * GIB))
    properties = type("Properties", (), {"total_memory": 16 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    said = message(watch(torch.device("cuda", 0)), torch.OutOfMemoryError("CUDA out of memory.\nTraceback"))
    assert ("measured: allocated 5.00 GiB, at the peak 7.00 GiB, reserved 8.00 GiB, on the device 16.00 GiB") in said
    assert "Traceback" not in said
    assert asked == [int(0.9 * 9 * GIB)]  # another program has 7 of the 16


def test_what_the_step_held_is_free_when_settings_are_looked_for(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner needs memory of its own, and what is free is what settings have to fit into."""
    alive: list[Any] = []
    seen: list[bool] = []

    def step() -> None:
        kept = torch.zeros(10)
        alive.append(weakref.ref(kept))
        raise MemoryError

    monkeypatch.setattr(out_of_memory, "host_memory_available", lambda: seen.append(alive[0]() is None) or GIB)
    with pytest.raises(OutOfMemory), watch().watched("step 7", "detection", lambda: "2 images"):
        step()
    gc.collect()
    assert seen == [True]


def test_shapes_of_a_batch() -> None:
    sizes, one = torch.tensor([[30, 40], [50, 20]]), torch.zeros(2, dtype=torch.int64)
    boxes = DetectionTargets(torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.tensor([2, 3]))
    words = CaptionTargets(torch.zeros(2, 9, dtype=torch.int64), torch.tensor([9, 2]), ((), ()))
    pixels = torch.zeros(2, 3, 56, 40, dtype=torch.uint8)
    batch = Batch(pixels, sizes, sizes, one, one, one, one.bool(), {"detection": boxes, "captioning": words})
    assert largest_shape([batch]) == "2 images of 56 x 40, 5 objects, 9 ids to a caption"
    labels = Batch(pixels[:1, :, :0, :0], sizes[:1], sizes[:1], *[one[:1]] * 3, one[:1].bool(), {})
    assert largest_shape([labels, labels]) == "1 image of 30 x 40"
    assert largest_shape([]) == "nothing that this rank reads"


def test_the_command_says_it_once_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[int]
) -> None:
    """A supervisor does not restart after 2. Ranks other than the first of a machine speak too: only they know."""

    def no_room(*_: Any, **__: Any) -> int:
        with watch().watched("the rehearsal of detection", "detection", lambda: "2 images"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0

    monkeypatch.setattr(train, "train", no_room)
    monkeypatch.setattr(launch, "missing_inputs", lambda config: [])
    monkeypatch.setattr(StopFlag, "guard_start", lambda self: None)  # it takes over signals and streams of a process
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["--stage", "2", "--model", "debug", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "[rank 1] error: out of memory in the rehearsal of detection: 2 images\n  CUDA out of memory."
    )
    assert "Traceback" not in said
