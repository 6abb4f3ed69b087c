"""Commands that run once: order, failures, another start, other arguments, interrupts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from visft_ds.steps import Steps, _stop


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of steps are run as they are, in place of `visft WORDS`."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setattr("visft_ds.steps.sys.executable", str(stub))


def _steps(root: Path, text: str = "one", *, status: int = 0) -> Steps:
    """a -> b -> d, and c alone; b ends with `status`."""
    steps = Steps(root)
    first = steps.add("a", "sh", "-c", f"mkdir $1 && echo {text} > $1/x")
    second = steps.add("b", "sh", "-c", f"cat {first}/x > $1; exit {status}")
    steps.add("c", "sh", "-c", "echo alone > $1")
    steps.add("d", "sh", "-c", f"cat {second} > $1")
    return steps


def _ran(root: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (root / "steps").glob("*.done")}


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_has_finished_is_not_run_again(tmp_path: Path, jobs: int) -> None:
    root = tmp_path / "out"
    assert _steps(root).run(jobs) == {} and (root / "d").read_text() == "one\n"
    before = _ran(root)
    assert _steps(root).run(jobs) == {} and _ran(root) == before
    assert (
        _steps(root, "two").run(jobs) == {} and (root / "d").read_text() == "two\n"
    )  # and what came from it
    assert {name for name, time in _ran(root).items() if time != before[name]} == {"a", "b", "d"}


def test_a_failure_takes_only_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    failed = _steps(root, status=3).run()
    assert "3" in failed["b"] and "b" in failed["d"] and failed.keys() == {"b", "d"} and (root / "c").exists()
    assert "FAILED: b" in capsys.readouterr().out
    assert _steps(root).run() == {} and (root / "d").read_text() == "one\n"


def test_a_step_needs_what_lies_in_a_folder_that_it_names(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    run = steps.add("run", "train")
    steps.add("evaluation", "evaluate", str(run), out="run/evaluation")
    steps.add("runs", "evaluate", f"{run}s", "data")
    steps.add("page", "report", str(run))
    assert [step.needs for step in steps.steps.values()] == [(), ("run",), (), ("run", "evaluation")]


def test_only_what_the_same_command_left_is_continued(tmp_path: Path) -> None:
    def start(word: str, resumes: bool) -> str:
        steps = Steps(tmp_path / "out")
        steps.add("a", "sh", "-c", f": {word}; mkdir -p $1; ls $1; touch $1/half; exit 1", resumes=resumes)
        steps.run()
        return steps.log("a")

    assert (
        start("x", True) == ""
        and start("x", True) == "half\n"
        and start("y", True) == ""
        and start("y", False) == ""
    )


def test_folders_of_others_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "out/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="another --out"):
        _steps(tmp_path / "out").run()
    assert (tmp_path / "out/a").is_dir()


def test_an_interrupt_lets_a_command_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it started and left behind ends with it."""
    monkeypatch.undo()
    code = "import signal, subprocess, sys, time\n"
    code += "subprocess.Popen(['sh', '-c', 'trap : TERM; while :; do sleep 1; done'])\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved', flush=True), sys.exit()))\n"
    code += "print('ready', flush=True)\ntime.sleep(600)"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        _stop({"a": process})
        assert process.stdout.read() == b"saved\n"  # and nobody holds the pipe
