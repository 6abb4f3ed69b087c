"""The start-up plan and the progress line, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from visft_ds.monitor.console import Progress, Section, gauge, print_plan

SECTIONS = [
    Section("model", [("backbone", "eva_e [bf16]"), ("weights", "random, seed 0")]),
    Section("parameters", [("lora", "29,360,128", "1e-05"), ("a longer name", "1", "2")], ("group", "values", "lr")),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def values(images: int = 32, seconds: float = 0.5, wait: float = 0.05) -> dict[str, float]:
    speeds = {"images_per_second": images / seconds, "data_wait_seconds": wait}
    return {"lr/lora": 1e-3, "gradient_norm": 3.25, "memory/peak_gib": 1.5, **speeds}


def test_plain_plan_is_aligned_text() -> None:
    stream = io.StringIO()
    print_plan("stage 2", SECTIONS, stream=stream)
    assert stream.getvalue().splitlines() == [
        "== stage 2",
        "-- model",
        "   backbone  eva_e [bf16]",
        "   weights   random, seed 0",
        "-- parameters",
        "   group          values      lr",
        "   lora           29,360,128  1e-05",
        "   a longer name  1           2",
    ]


def test_plain_progress_prints_first_last_and_every_nth_step() -> None:
    stream = io.StringIO()
    with Progress(10, start=2, log_every=4, stream=stream) as progress:
        for step in range(3, 11):
            progress.update(step, {"detection": 2.0}, values(), 32)
        progress.message("saved [step 10]")
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines[:-1]] == ["3/10", "4/10", "8/10", "10/10"]
    assert lines[0] == (
        "step 3/10  detection 2  lr 1.00e-03  grad_norm 3.25  64 img/s  data 10%  mem 1.50 GiB  eta 00:03"
    )
    assert lines[-1] == "saved [step 10]"


def test_losses_are_smoothed_by_task() -> None:
    """A task that was not drawn keeps its value; the first steps are a plain mean, so that no start value lingers."""
    stream = io.StringIO()
    with Progress(4, log_every=1, stream=stream) as progress:
        for step, losses in enumerate([{"a": 4.0}, {"b": 1.0}, {"a": 2.0}, {"a": 0.0}], 1):
            progress.update(step, losses, values(), 32)
    shown = [re.findall(r"\b([ab]) ([\d.]+)", text) for text in stream.getvalue().splitlines()]
    assert [dict(pairs) for pairs in shown] == [
        {"a": "4"},
        {"a": "4", "b": "1"},
        {"a": "3", "b": "1"},
        {"a": "2", "b": "1"},
    ]


LOSSES = {"captioning": 2.34567, "detection": 12.3456, "segmentation": 23.4567}


def test_on_a_terminal_the_newest_step_is_the_last_line(terminal: Terminal) -> None:
    """Nothing wraps: a bar that did would leave a copy of itself at each refresh."""
    with Progress(100_000, start=12_000, log_every=4, stream=terminal) as progress:
        for step in range(12_001, 12_011):
            progress.update(step, LOSSES, values(), 32)
        progress.message("saved [step 7]")
    lines = [text.rstrip() for text in re.split(r"[\r\n]+", without_escapes(terminal.getvalue()))]
    assert any("12010/100000  cap 2.35  det 12.3  seg 23.5" in text for text in lines)
    assert "saved [step 7]" in lines and max(map(len, lines)) <= 80


def test_no_line_is_longer_than_a_hundred_columns() -> None:
    stream = io.StringIO()
    long, path = "word " * 60, "/a-folder" * 15
    print_plan("stage 2", [Section(long, [("name", "x", long), ("y", "z", path)])], stream=stream)
    with Progress(100_000, log_every=1, stream=stream) as progress:
        progress.update(99_999, LOSSES, values(seconds=3e5), 32)
    assert [text for text in stream.getvalue().splitlines() if len(text) > 100 and "/a-folder" not in text] == []
    assert stream.getvalue().count(path) == 1  # whole, to be copied
    assert "eta 83:20:00" in stream.getvalue()


def test_a_gauge_in_a_log_tells_how_much_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with gauge("reading", 1000, "MB") as bar:
        bar.update(500)
    with gauge("reading", 10, enabled=False) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""  # done within five seconds
    with gauge("hashing", 10, "files") as bar:
        bar.delay = bar.mininterval = 0
        bar.update(2)
    assert "hashing: 2/10 files, left" in capsys.readouterr().err
    assert list(gauge("maps", 3, "images", [1, 2, 3])) == [1, 2, 3]


def test_output_that_nobody_reads_is_told_once() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    gone: list[bool] = []
    with Progress(2, stream=Closed(), gone=lambda: gone.append(True)) as progress:
        progress.update(1, {"detection": 2.0}, values(), 32)
    assert gone == [True]
    with pytest.raises(BrokenPipeError), Progress(2, stream=Closed()) as progress:
        progress.update(1, {"detection": 2.0}, values(), 32)


def test_other_processes_print_nothing() -> None:
    stream = io.StringIO()
    print_plan("x", SECTIONS, enabled=False, stream=stream)
    with Progress(1, enabled=False, stream=stream) as progress:
        progress.update(1, {"detection": 2.0}, values(), 32)
        progress.message("x")
    assert stream.getvalue() == ""
