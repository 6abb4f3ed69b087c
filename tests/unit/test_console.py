"""The start-up plan and the progress line, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from visft_ds.monitor.console import Progress, Section, StepLine, clock, print_plan

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


def line(step: int, **changes: float) -> StepLine:
    loss = changes.get("loss", 2.0)
    return StepLine(step, {"detection": loss}, 1e-3, 3.25, 32, changes.get("seconds", 0.5), 0.05, 3 * 2**29)


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


def test_plan_on_a_terminal_keeps_square_brackets(terminal: Terminal) -> None:
    print_plan("stage 2", SECTIONS, stream=terminal)
    assert "\x1b[" in terminal.getvalue()
    text = without_escapes(terminal.getvalue())
    assert "eva_e [bf16]" in text and re.search(r"lora +29,360,128 +1e-05", text)  # rich reads [x] as markup


def test_plain_progress_prints_first_last_and_every_nth_step() -> None:
    stream = io.StringIO()
    with Progress(10, start=2, log_every=4, stream=stream) as progress:
        for step in range(3, 11):
            progress.update(line(step))
        progress.message("saved [step 10]")
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines[:-1]] == ["3/10", "4/10", "8/10", "10/10"]
    assert lines[0] == (
        "step 3/10  detection 2  lr 1.00e-03  norm 3.25  64 img/s  wait 10%  peak 1.50 GiB  left 0:00:04"
    )
    assert lines[-1] == "saved [step 10]"


def test_losses_are_smoothed_by_task() -> None:
    """A task that was not drawn keeps its value; the first steps are a plain mean, so that no start value lingers."""
    stream = io.StringIO()
    with Progress(4, log_every=1, stream=stream) as progress:
        for step, losses in enumerate([{"a": 4.0}, {"b": 1.0}, {"a": 2.0}, {"a": 0.0}], 1):
            progress.update(StepLine(step, losses, 1e-3, 1.0, 8, 1.0, 0.0))
    shown = [re.findall(r"\b([ab]) ([\d.]+)", text) for text in stream.getvalue().splitlines()]
    assert [dict(pairs) for pairs in shown] == [
        {"a": "4"},
        {"a": "4", "b": "1"},
        {"a": "3", "b": "1"},
        {"a": "2", "b": "1"},
    ]
    assert "peak" not in stream.getvalue()


def test_progress_on_a_narrow_terminal_shows_everything(terminal: Terminal) -> None:
    with Progress(100, log_every=1000, stream=terminal) as progress:
        progress.update(line(7))
        progress.message("saved [step 7]")
    text = without_escapes(terminal.getvalue())
    for part in ("7/100", "detection 2", "64 img/s", "peak 1.50 GiB", "left 0:00:46", "saved [step 7]"):
        assert part in text


def test_other_processes_print_nothing() -> None:
    stream = io.StringIO()
    print_plan("x", SECTIONS, enabled=False, stream=stream)
    with Progress(1, enabled=False, stream=stream) as progress:
        progress.update(line(1))
        progress.message("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (3723.2, "1:02:03"), (2 * 86400 + 5, "2d 0:00:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
