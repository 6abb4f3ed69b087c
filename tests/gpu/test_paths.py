"""Paths that only a GPU takes, beside those of `test_gpu`: flags, copies, memory, random numbers, commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.test_gpu import BOUND, CPU, DEVICE, STEP, folder, measure, train
from visft_ds import load_backbone
from visft_ds.errors import RankError
from visft_ds.ops import to_device, use_numerics
from visft_ds.parallel import state
from visft_ds.profiling.measure import Stopwatch
from visft_ds.resilience.memory import memory_before, memory_explained, peak_memory
from visft_ds.run.machine import memory_of
from visft_ds.tasks.masks.points import draw_points

__all__ = ["folder"]  # a fixture
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("tf32", [False, True])
def test_numerics(tf32: bool) -> None:
    """A product in float32 is rounded to TF32 where that was asked for, and only there."""
    use_numerics(DEVICE, tf32=tf32)
    torch.manual_seed(0)
    a, b = torch.randn(2, 512, 512, device=DEVICE)
    error = measure([a @ b], [a.double() @ b.double()])
    use_numerics(DEVICE)
    has_tf32 = not CPU and torch.cuda.get_device_capability(DEVICE) >= (8, 0)
    if tf32 and has_tf32:
        assert BOUND["fp32"] < error < BOUND["fp16"]
    else:
        assert error < BOUND["fp32"]


def test_copies() -> None:
    """Values that go through pinned memory without a wait arrive whole."""
    values = torch.arange(1 << 20)
    assert torch.equal(to_device(values, DEVICE).cpu(), values)
    drawn = draw_points([3, 4], 2, (5, 7), DEVICE)
    expected = draw_points([3, 4], 2, (5, 7), torch.device("cpu"))
    for points, exact in zip(drawn, expected, strict=True):
        assert points.device.type == DEVICE.type and torch.equal(points.cpu(), exact)


def test_memory_that_is_not_there() -> None:
    before = memory_before(DEVICE)
    held = torch.ones(1 << 24, device=DEVICE)
    assert peak_memory(DEVICE) - before >= held.nbytes and memory_of(DEVICE) > 0
    with pytest.raises(RankError, match="out of memory"), memory_explained("a step", "detection", [], DEVICE):
        torch.empty(1 << 50, device=DEVICE)


def test_random_numbers_of_a_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws afterwards what it would have drawn without."""
    monkeypatch.setattr(state, "prepare_moments", lambda engine: None)
    monkeypatch.setattr(state, "_COUNTED", ())

    def draw() -> torch.Tensor:
        return F.dropout(torch.ones(256, device=DEVICE))

    torch.manual_seed(0)
    expected = draw()
    torch.manual_seed(0)
    with state.unchanged(SimpleNamespace(device=DEVICE, deepspeed=None)):  # type: ignore[arg-type]
        draw()
    assert torch.equal(draw(), expected)


def test_stopwatch() -> None:
    """Events of a GPU count its time, not the host's."""
    watch = Stopwatch(DEVICE)
    x = torch.randn(1024, 1024, device=DEVICE)
    watch.marked(lambda: x @ x, "product")()
    assert 0 < watch.seconds()["product"] < 60


def test_profile(tmp_path: Path) -> None:
    """The command, with a trace of the device."""
    command = [sys.executable, "-m", "visft_ds", "profile", "--model", "debug", "--stage", "2", "--synthetic"]
    command += ["--tasks", "detection", "--steps", "1", "--trace", str(tmp_path / "traces")]
    environment = {**os.environ, "DS_ACCELERATOR": DEVICE.type}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["detection-rank0.json.gz"]


def test_prediction(folder: Path) -> None:
    """Features of a trained model, loaded onto the device."""
    run = train(folder, DEVICE.type)
    pixels = torch.rand(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, exact = (load_backbone(run, device=device)(pixels.to(device)) for device in (DEVICE, "cpu"))
    assert found.device.type == DEVICE.type
    assert measure([found], [exact]) < STEP["fp32"][0]
