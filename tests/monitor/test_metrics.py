"""metrics.jsonl and TensorBoard files: complete, resumable, and never the end of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from visft_ds.monitor import metrics
from visft_ds.monitor.metrics import MetricsWriter, read_metrics, truncate_metrics
from visft_ds.run_files import METRICS_FILE


def records(folder: Path) -> list[dict[str, Any]]:
    return list(read_metrics(folder / "metrics.jsonl"))


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def test_records_are_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss/detection": 2.5, "lr/lora": 1e-5})
        writer.event(1, "saved", loss=math.nan)
        first, second = records(tmp_path)
    assert (first["kind"], first["step"], first["loss/detection"], first["lr/lora"]) == ("step", 1, 2.5, 1e-5)
    assert (second["kind"], second["event"], second["loss"]) == ("event", "saved", "nan"), (
        "JSON has no such number"
    )
    assert first["time"] <= second["time"]


def test_resuming_leaves_each_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.step(step, {"loss": float(step)})
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.step(3, {"loss": 30.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    # TensorBoard keeps both files and hides what the second run replaced.
    assert [(point.step, point.value) for point in tensorboard(tmp_path).Scalars("losses")] == [
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    with MetricsWriter(tmp_path) as writer:
        writer.step(1, {"loss": 7.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 7.0)]


def test_tensorboard_shows_groups_settings_and_configuration(tmp_path: Path) -> None:
    """Names in metrics.jsonl stay; the HParams tab has settings, and metrics that are among the curves."""
    values = {"loss/loss": 2.0, "lr/heads": 1e-4, "grad_norm": 1.0, "images_per_second/detection": 9.0}
    with MetricsWriter(tmp_path) as writer:
        writer.describe(
            '{\n  "visft": 1\n}', {"seed": 3, "visft.mode": "shared"}, ["val/box/AP", "loss/loss"]
        )
        writer.step(1, {**values, "memory/peak_gib": 0.5})
        writer.evaluation(1, {"box/AP": 0.25})
    events = tensorboard(tmp_path)
    tags = events.Tags()
    groups = {"losses/loss", "optimizer/lr/heads", "optimizer/grad_norm", "speed/images_per_second/detection"}
    assert set(tags["scalars"]) == {*groups, "memory/peak_gib", "metrics/box/AP"}
    assert records(tmp_path)[0]["grad_norm"] == 1 and records(tmp_path)[1]["val/box/AP"] == 0.25
    (text,) = events.Tensors("configuration/text_summary")
    assert text.tensor_proto.string_val[0].decode() == '    {\n      "visft": 1\n    }\n'
    found = {}
    for tag in events.summary_metadata.values():
        content = HParamsPluginData.FromString(tag.plugin_data.content)
        if tag.plugin_data.plugin_name == "hparams":
            found[content.WhichOneof("data")] = content
    settings = found["session_start_info"].session_start_info.hparams
    assert {name: settings[name].WhichOneof("kind") for name in settings} == {
        "seed": "number_value",
        "visft.mode": "string_value",
    }
    metric_tags = [info.name.tag for info in found["experiment"].experiment.metric_infos]
    assert metric_tags == ["metrics/box/AP", "losses/loss"] and "session_end_info" in found


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


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.step(1, {"loss": 1.0})
        writer.event(1, "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block", [16, 64, 1 << 20])
def test_a_resume_reads_back_from_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
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
