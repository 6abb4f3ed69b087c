"""When a lost run is started again, and when it is given up."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.ranks import deepspeed, start_command, wait_for
from tests.resilience.test_stop import ranks_below
from tests.tiny import command
from visft_ds.resilience import supervisor
from visft_ds.resilience.supervisor import GAVE_UP, Supervisor, main


def training(folder: Path, *attempts: str) -> Supervisor:
    """A command named train.py whose attempts run these lines of Python, one after the other."""
    out, script = folder / "run", folder / "train.py"
    out.mkdir()
    (folder / "attempts").write_text("\n".join(attempts))
    script.write_text(
        "import sys, pathlib\n"
        f"here, out = pathlib.Path({str(folder)!r}), pathlib.Path({str(out)!r})\n"
        "first, *left = (here / 'attempts').read_text().splitlines()\n"
        "(here / 'attempts').write_text(chr(10).join(left or [first]))\n"
        "(here / 'count').open('a').write('x')\n"
        "exec(first)\n"
    )
    return Supervisor([sys.executable, str(script), "--stage", "1", "--model", "debug", "--out", str(out)])


def save(step: int, code: int) -> str:
    return f"(out / 'checkpoints/step_{step:08d}').mkdir(parents=True, exist_ok=True); sys.exit({code})"


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)


DONE = "(out / 'ended').write_text('done'); sys.exit(0)"
CASES = {
    "lost, then done": ([save(1, 3), save(2, 1), DONE], 0, 3),
    "the launcher lied": (["sys.exit(0)", DONE], 0, 2),
    "a mistake": ([save(1, 2)], 2, 1),
    "diverged": ([save(1, 4)], 4, 1),
    "stopped": ([save(1, 143)], 143, 1),
    "queued again": ([save(1, 85)], 85, 1),
    "no progress": ([save(1, 3)], GAVE_UP, 4),
    "too often": ([save(step, 3) for step in range(1, 9)], GAVE_UP, 6),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_started_again(name: str, tmp_path: Path) -> None:
    attempts, status, count = CASES[name]
    assert training(tmp_path, *attempts).run(max_restarts=5, backoff=0.0) == status
    assert len((tmp_path / "count").read_text()) == count


def test_a_signal_while_it_waits_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervised = training(tmp_path, save(1, 3))
    monkeypatch.setattr(supervisor, "_tell", lambda text: supervised._pass_on(signal.SIGTERM, None))
    assert supervised.run(max_restarts=5, backoff=600.0) == 143


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ([], "training"),
        (["deepspeed", "other.py"], "training"),
        (["visft", "train", "--stage", "1", "--model", "debug", "--resume", "no"], "--resume"),
        (["visft", "train", "--stage", "1", "--model", "debug", "--dry-run"], "--dry-run"),
        (["nowhere", "launchers/train.py", "--stage", "1", "--model", "debug"], "nowhere"),
    ],
)
def test_a_command_that_cannot_work_is_refused(
    command: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--", *command]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["visft", "deepspeed"])
def test_a_killed_rank_costs_a_restart_and_a_signal_ends_it(launcher: str, shards: Path, tmp_path: Path) -> None:
    words = command(
        shards, tmp_path / "run", extra={"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 2}
    )
    ours = [str(Path(sys.executable).parent / "visft"), "train", "--num_gpus", "2", *words]
    train = ours if launcher == "visft" else deepspeed(["launchers/train.py", *words])
    process = start_command([sys.executable, "launchers/supervise.py", "--backoff", "0.5", "--", *train])
    try:
        wait_for(process, "step 3/")
        ranks_below(process.pid)[-1].kill()
        wait_for(process, "restart 1 of 3")
        wait_for(process, "img/s")
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=600)[0]
        assert psutil.wait_procs(family, timeout=60)[1] == []
    finally:
        for left in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            left.kill()
        process.kill()
    assert process.returncode == 143, output
    assert "stopped after step" in output and "restart 2" not in output


@pytest.mark.slow
def test_a_killed_supervisor_leaves_nobody_behind(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", extra={"scheduler.params.total_num_steps": 100_000})
    train = deepspeed(["launchers/train.py", *words])
    process = start_command([sys.executable, "launchers/supervise.py", "--", *train])
    family: list[psutil.Process] = []
    try:
        wait_for(process, "step 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        output = process.communicate(timeout=600)[0]
        assert psutil.wait_procs(family, timeout=60)[1] == []
    finally:
        for left in (one for one in family if one.is_running()):
            left.kill()
    assert "stopped after step" in output and "Traceback" not in output
