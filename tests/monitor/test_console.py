"""The start-up plan and the progress line, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from visft_ds.monitor.console import Progress, Section, gauge, print_plan

LOSSES = {"captioning": 2.34567, "detection": 12.3456, "segmentation": 23.4567}


def values(seconds: float = 0.5) -> dict[str, float]:
    speeds = {"images_per_second": 32 / seconds, "data_wait_seconds": 0.05}
    return {"lr/lora": 1e-3, "grad_norm": 3.25, "memory/peak_gib": 1.5, **speeds}


def test_a_plan_is_aligned_text_and_no_line_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    long, path = "word " * 60, "/a-folder" * 15
    rows = [("lora", "29,360,128", "1e-05"), ("a longer name", "1", long), ("y", "z", path)]
    print_plan("stage 2", [Section("parameters", rows, ("group", "values", "lr"))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "== stage 2",
        "-- parameters",
        "   group          values      lr",
        "   lora           29,360,128  1e-05",
    ]
    assert [line for line in lines if len(line) > 100] == [f"   y              z           {path}"], (
        "to be copied"
    )


def test_progress_prints_first_last_and_every_nth_step() -> None:
    stream = io.StringIO()
    with Progress(10, start=2, log_every=4, stream=stream) as progress:
        for step in range(3, 11):
            progress.update(step, {"detection": 2.0}, values(), 32)
        progress.message("saved [step 10]")
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines[:-1]] == ["3/10", "4/10", "8/10", "10/10"]
    assert (
        lines[0]
        == "step 3/10  eta 00:03  detection 2  64 img/s  lr 1.00e-03  grad_norm 3.25  data 10%  mem 1.50 GiB"
    )
    assert lines[-1] == "saved [step 10]"


def test_a_task_that_was_not_drawn_keeps_its_loss() -> None:
    stream = io.StringIO()
    with Progress(3, log_every=1, stream=stream) as progress:
        for step, losses in enumerate([{"a": 4.0}, {"b": 1.0}, {"a": 2.0}], 1):
            progress.update(step, losses, values(), 32)
    shown = [dict(re.findall(r"\b([ab]) ([\d.]+)", text)) for text in stream.getvalue().splitlines()]
    assert shown == [{"a": "4"}, {"a": "4", "b": "1"}, {"a": "2", "b": "1"}]


def test_on_a_terminal_the_newest_step_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with Progress(100_000, start=12_000, log_every=4, stream=terminal) as progress:
        for step in range(12_001, 12_011):
            progress.update(step, LOSSES, values(), 32)
        progress.message("saved [step 7]")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+|\x1b\[[0-9;?]*[A-Za-z]", terminal.getvalue())]
    live = [line for line in lines if line.startswith("step 12010/100000  eta ")]
    assert live and max(map(len, live)) < 80, "it does not wrap"
    assert "saved [step 7]" in lines


def test_a_gauge_in_a_log_tells_how_much_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with gauge("reading", 1000, "MB") as bar:
        bar.update(500)
    assert capsys.readouterr().err == ""  # done within five seconds
    with gauge("hashing", 10, "files") as bar:
        bar.delay = bar.mininterval = 0
        bar.update(2)
    printed = capsys.readouterr().err.rstrip("\r")
    assert re.fullmatch(r"hashing: 2/10 files, eta \S+\n", printed), "no blanks that wipe it out"
    monkeypatch.setenv("RANK", "1")
    assert gauge("hashing", 10, "files").disable, "the main process tells for all"


def test_output_that_nobody_reads_is_told_and_other_processes_print_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    gone: list[bool] = []
    with Progress(2, stream=Closed(), gone=lambda: gone.append(True)) as progress:
        progress.message("x")
    assert gone == [True]
    with Progress(1, enabled=False, stream=Closed()) as progress:
        progress.update(1, LOSSES, values(), 32)
        progress.message("x")
