"""metrics.jsonl and TensorBoard files: complete, resumable, and never the end of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visft_ds.monitor import metrics
from visft_ds.monitor.metrics import METRICS_FILE, MetricsWriter, read_metrics, truncate_metrics


def records(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_records_are_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss/detection": 2.5, "lr/lora": 1e-5})
        writer.event(1, "saved", path="step_1")
        first, second = records(tmp_path)
    assert (first["kind"], first["step"], first["loss/detection"], first["lr/lora"]) == ("step", 1, 2.5, 1e-5)
    assert (second["kind"], second["event"], second["path"]) == ("event", "saved", "step_1")
    assert first["time"] <= second["time"]


def test_a_diverged_loss_stays_valid_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss": math.nan, "norm": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["loss"], record["norm"]) == ("nan", "inf")


def test_resuming_leaves_each_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.step(step, {"loss": float(step)})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.step(3, {"loss": 30.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    # TensorBoard keeps both files and hides what the second run replaced.
    assert [(point.step, point.value) for point in tensorboard(tmp_path).Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss": 7.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 7.0)]


def test_pictures_reach_tensorboard(tmp_path: Path) -> None:
    picture = np.zeros((5, 7, 3), dtype=np.uint8)
    with MetricsWriter(tmp_path) as writer:
        writer.image(3, "detection/0", picture)
    (image,) = tensorboard(tmp_path).Images("detection/0")
    assert (image.step, image.height, image.width) == (3, 5, 7)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_a_line_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": "step", "st')
    with MetricsWriter(tmp_path, resume_step=5) as writer:
        writer.step(6, {"loss": 1.0})
    assert [record["step"] for record in records(tmp_path)] == [1, 6]


def test_a_failing_writer_warns_once_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = True
    really_open = Path.open

    def open_or_fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if full and path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss": 1.0})
        writer.step(2, {"loss": 1.0})
        full = False
        writer.step(3, {"loss": 1.0})
    assert [record["step"] for record in records(tmp_path)] == [3]
    warning = capsys.readouterr().err
    assert warning.count("warning: metrics.jsonl is not being written") == 1 and "No space left" in warning


def test_tensorboard_may_fail_without_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsWriter(tmp_path) as writer:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("gone")

        for name in ("add_scalar", "add_image"):
            monkeypatch.setattr(writer._events, name, fail)
        writer.step(1, {"loss": 1.0})
        writer.image(1, "x", np.zeros((2, 2, 3), dtype=np.uint8))
    assert [record["step"] for record in records(tmp_path)] == [1]
    assert capsys.readouterr().err.count("warning: TensorBoard") == 1


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.step(1, {"loss": 1.0})
        writer.event(1, "saved")
        writer.image(1, "x", np.zeros((2, 2, 3), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [16, 64, 1 << 20])
def test_a_resume_reads_back_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Numbers of an evaluation and of a save come later than those of the steps after it."""
    monkeypatch.setattr(metrics, "_BLOCK", block)
    path = tmp_path / METRICS_FILE
    lines = [{"kind": "step", "step": step, "loss": float(step)} for step in range(1, 9)]
    lines.insert(6, {"kind": "step", "step": 4, "val/AP": 0.5})
    lines.insert(7, {"kind": "save", "step": 4, "seconds": 1.0})
    for step in range(9):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
        kept = truncate_metrics(path, step)
        assert list(read_metrics(path)) == [line for line in lines if int(str(line["step"])) <= step]
        assert path.read_bytes()[-1:] in (b"\n", b"")
        trained = [record for record in kept if "loss" in record]
        assert (trained[-1]["loss"] if trained else 0.0) == step
    assert [record["step"] for record in read_metrics(path, "val/")] == [4]
