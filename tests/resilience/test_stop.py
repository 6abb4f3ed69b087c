"""A request to stop, whoever gets it: all ranks finish the step, save the same one and leave nobody
behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPOSITORY, deepspeed, family_of, start_command, start_ranks, wait_for
from tests.tiny import command
from visft_ds.launch import main
from visft_ds.resilience.stop import StopFlag

#: Long enough for any machine to be interrupted in the middle, and nothing is saved before.
LONG = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 100_000}
TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
#: (who, signal) -> exit status of the command.
CASES = {
    ("visft", INT): 130,
    ("visft", TERM): 143,
    ("visft", USR1): 85,
    ("visft", KILL): -KILL,
    ("visft: a rank", TERM): 143,
    ("visft: a rank", KILL): 3,
    ("deepspeed", KILL): -KILL,
    ("deepspeed: its child", KILL): 0,  # DeepSpeed's own code; its ranks have ended with 3
}


def ranks_below(pid: int) -> list[psutil.Process]:
    found = [
        process for process in psutil.Process(pid).children(recursive=True) if "RANK" in process.environ()
    ]
    return [process for process in found if process.ppid() not in {other.pid for other in found}]


@pytest.mark.slow
@pytest.mark.parametrize(("who", "number"), CASES, ids=lambda value: getattr(value, "name", value))
def test_all_ranks_save_the_same_step_and_nobody_is_left(
    who: str, number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(shards, out, extra={**LONG, "visft.data.num_workers": 1})
    ours = [sys.executable, "-m", "visft_ds", "train", "--num_gpus", "2", *words]
    process = start_command(ours if who.startswith("visft") else deepspeed(["launchers/train.py", *words]))
    with family_of(process) as family:
        wait_for(process, "step 2/")
        family += psutil.Process(process.pid).children(recursive=True)
        ranks = ranks_below(process.pid)
        assert len(ranks) == 2
        target = {"visft: a rank": ranks[1].pid, "deepspeed: its child": ranks[0].ppid()}.get(
            who, process.pid
        )
        os.kill(target, number)
        output = process.communicate(timeout=600)[0]
    assert process.returncode == CASES[who, number], output
    if (who, number) != (
        "visft: a rank",
        KILL,
    ):  # after which the others cannot save, and its workers complain
        assert "Traceback" not in output
        (checkpoint,) = (out / "checkpoints").iterdir()
        assert f"saved step {int(checkpoint.name[5:])} in" in output and "stopped after step" in output


def test_each_signal_has_its_status_and_a_second_ctrl_c_does_not_wait() -> None:
    for number, status in ((TERM, 143), (INT, 130), (USR1, 77)):
        stop = StopFlag(launched=False)
        stop.listen()
        assert not stop and stop.reason.status(77) == 0
        signal.raise_signal(number)
        assert stop and stop.why() == f"signal {number.name}" and stop.reason.status(77) == status
        if number == INT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(INT)
        stop.restore()


#: A rank that says whether it stops, before and after a line comes in.
RANK = """
from visft_ds.resilience.stop import StopFlag
stop = StopFlag(launched=True)
stop.listen()
print(bool(stop))
input()
print(bool(stop))
"""
#: A launcher of one rank.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "torchrun"])
def test_only_deepspeeds_launcher_has_a_parent_to_be_missed(name: str) -> None:
    """`nohup torchrun ... &` goes on when its shell ends; the `deepspeed` command is that of the run."""
    start = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LAUNCHER!r}, {RANK!r}, {name!r}])"
    )
    words = [sys.executable, "-c", f"{start}; import time; time.sleep(600)"]
    shell = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert shell.stdin is not None and shell.stdout is not None
    assert shell.stdout.readline() == "False\n"
    shell.kill()
    shell.wait()
    shell.stdin.write("\n")
    shell.stdin.close()
    assert shell.stdout.readline() == f"{name.startswith('deepspeed')}\n"
    shell.stdout.close()


def test_a_run_whose_output_nobody_reads_saves_and_ends(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["launchers/train.py", *command(shards, out, extra={**LONG, "visft.run.log_every": 1})]
    (run,) = start_ranks(words, world=1)
    wait_for(run, "step 2/")
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(timeout=600) == 128 + signal.SIGPIPE
    assert len(list((out / "checkpoints").iterdir())) == 1


def test_an_environment_that_no_launcher_sets_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["--stage", "1", "--model", "debug", "--dry-run"]) == 2
    assert "WORLD_SIZE=two" in capsys.readouterr().err
