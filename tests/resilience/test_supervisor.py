"""When a lost run is started again, and when it is given up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from visft_ds.resilience import supervisor
from visft_ds.resilience.heartbeat import FOLDER, Beat
from visft_ds.resilience.supervisor import GAVE_UP, Attempt, Command, main, supervise
from visft_ds.run.folder import newest_step


class Script:
    """Attempts that end as written; notes what it was asked to wait."""

    def __init__(self, *attempts: Attempt, asked_after: int | None = None) -> None:
        self._left: Iterator[Attempt] = iter(attempts)
        self._asked_after = asked_after
        self.started, self.waited = 0, []

    def run(self) -> Attempt:
        self.started += 1
        return next(self._left)

    def sleep(self, seconds: float) -> int | None:
        self.waited.append(seconds)
        return 0 if len(self.waited) == self._asked_after else None

    def supervise(self, max_restarts: int = 5, saved: int = 0) -> int:
        return supervise(self.run, saved={saved}, max_restarts=max_restarts, backoff=10.0, sleep=self.sleep)


def lost(step: int, code: int = 3) -> Attempt:
    return Attempt(code, 60.0, {step}, finished=False)


DONE = Attempt(0, 60.0, {1000}, finished=True)


def test_a_lost_run_is_started_again_until_it_is_done() -> None:
    script = Script(lost(100), lost(200, -9), DONE)
    assert script.supervise() == 0
    assert (script.started, script.waited) == (3, [10.0, 10.0])


def test_the_wait_grows_while_nothing_new_is_saved() -> None:
    script = Script(lost(100), lost(100), lost(300), DONE)
    assert script.supervise(saved=100) == 0
    assert script.waited == [20.0, 40.0, 10.0]


def test_a_checkpoint_below_a_damaged_one_is_progress() -> None:
    found = ({60, 100}, {70, 100})  # 100 is damaged, and passed over by each attempt
    script = Script(*(Attempt(3, 60.0, steps, finished=False) for steps in found), DONE)
    assert script.supervise(saved=100) == 0
    assert script.waited == [10.0, 10.0]


def test_no_progress_is_given_up_with_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(*[lost(500, -11)] * 9)
    assert script.supervise(max_restarts=8) == GAVE_UP
    assert script.started == 4  # one that saved step 500, three that saved nothing after it
    said = capsys.readouterr().err
    assert "3 attempts in a row ended before they saved anything after step 500" in said
    assert "attempt 4: signal SIGSEGV after 60 s, newest saved step 500" in said


def test_the_number_of_restarts_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(*[lost(step) for step in range(100, 900, 100)])
    assert script.supervise(max_restarts=2) == GAVE_UP
    assert script.started == 3
    assert "2 restarts were allowed" in capsys.readouterr().err


@pytest.mark.parametrize("code", [2, 4, 130])
def test_what_a_restart_would_only_repeat_is_not_repeated(code: int) -> None:
    script = Script(lost(100, code))
    assert (script.supervise(), script.started) == (code, 1)


def test_a_stop_that_was_asked_for_ends_it() -> None:
    assert Script(Attempt(85, 60.0, {100}, finished=True)).supervise() == 85
    script = Script(lost(100), asked_after=1)  # a signal while waiting
    assert (script.supervise(), script.started) == (0, 1)


SIGNALLED = "stopped: signal SIGTERM"


def beat(rank: int, start: str, ended: str) -> Beat:
    return Beat(start, rank, "host", 1, "1", ended=ended)


def write(folder: Path, beats: list[Beat]) -> None:
    folder.mkdir(parents=True)
    for one in beats:
        (folder / f"rank_{one.rank:05d}.json").write_text(json.dumps(asdict(one)))


def supervised(folder: Path) -> Command:
    """A training that leaves the heartbeats of FOLDER/left in the run FOLDER/run, and ends with 0."""
    script, places = folder / "train.py", (str(folder / "left"), str(folder / "run" / FOLDER))
    script.write_text(f"import shutil\nshutil.copytree(*{places}, dirs_exist_ok=True)\n")
    return Command([sys.executable, str(script), "--stage", "1", "--model", "debug", "--out", str(folder / "run")])


@pytest.mark.parametrize(
    ("before", "left", "finished"),
    [
        ([], [beat(0, "b", "done")], True),
        ([], [beat(0, "b", "stopped: asked by another rank"), beat(1, "b", SIGNALLED)], True),
        ([beat(5, "a", SIGNALLED)], [beat(0, "b", "stopped: the launcher is gone")], False),
        ([beat(0, "a", SIGNALLED)], [], False),
    ],
    ids=["ended before its last step", "signal", "signal to a rank of an earlier start", "no heartbeat of this start"],
)
def test_the_ranks_of_this_start_say_whether_it_ended_well(
    before: list[Beat], left: list[Beat], finished: bool, tmp_path: Path
) -> None:
    """A launcher ends with 0 where it was killed, too."""
    write(tmp_path / "run" / FOLDER, before)
    write(tmp_path / "left", left)
    attempt = supervised(tmp_path).run()
    assert (attempt.code, attempt.finished) == (0, finished)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 0)])
def test_a_signal_before_a_restart_ends_as_one_to_a_run(number: int, code: int, tmp_path: Path) -> None:
    command = supervised(tmp_path)
    command._pass_on(number, None)
    assert supervise(lambda: lost(100), saved={0}, max_restarts=5, backoff=60.0, sleep=command.sleep) == code


def test_a_process_that_has_ended_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended, command = psutil.Process(child.pid), supervised(tmp_path)
    child.kill()
    child.communicate()
    command._process = child
    monkeypatch.setattr(supervisor, "_ranks", lambda session: [ended])
    command._pass_on(signal.SIGTERM, None)
    seen = iter([[ended], [ended], []])
    monkeypatch.setattr(supervisor, "_session", lambda session: next(seen))
    monkeypatch.setattr(supervisor, "_GRACE", -1.0)
    command._wait_for_the_rest(child.pid)
    assert capsys.readouterr().err.count("ending 1 processes") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "give a training after --"),
        (["deepspeed", "other.py"], "give a training after --"),
        (["deepspeed", "launchers/train.py", "--stage", "3"], "--stage 3"),
        (["python", "launchers/train.py", "--stage", "1", "--model", "debug", "--resume", "no"], "leave it out"),
        (["visft", "train", "--stage", "1", "--model", "debug", "--dry-run"], "give it to visft train itself"),
        (
            ["deepspeed", "--bind_cores_to_rank", "launchers/train.py", "--stage", "1", "--model", "debug"],
            "needs numactl, which is not installed",
        ),
        (["nowhere", "launchers/train.py", "--stage", "1", "--model", "debug"], "nowhere: no such command"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_it_starts(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main(["--", *command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said
    assert len(said.splitlines()) == 1


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step_00000100", "step_00000020", "step_00000300.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 100
