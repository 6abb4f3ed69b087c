"""A request to stop, whoever gets it: all ranks finish the step, save the same one and leave nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks import REPOSITORY, below, deepspeed, start_command, wait_for
from tests.tiny import command
from visft_ds.resilience.signals import StopFlag

#: Long enough for any machine to be interrupted in the middle, and nothing is saved before.
LONG = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 100_000}
WITH_PROCESSES = {"visft.data.num_workers": 1}
TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL
#: (who, signal) -> exit code of the `deepspeed` command. Its own code decides where it, or its child, is the target;
#: in every case the ranks save and end.
CASES = {
    ("rank", TERM): 0,
    ("rank", INT): 0,
    ("rank", USR1): 85,
    ("launcher", TERM): 1,
    ("launcher", INT): 1,
    ("launcher", USR1): 0,
    ("launcher", KILL): 0,
    ("deepspeed", TERM): -TERM,
    ("deepspeed", INT): -INT,
    ("deepspeed", USR1): -USR1,
    ("deepspeed", KILL): -KILL,
    ("everybody", TERM): -TERM,
}


@pytest.mark.slow
@pytest.mark.parametrize(("who", "number"), CASES, ids=lambda value: getattr(value, "name", value))
def test_all_ranks_save_the_same_step_and_nobody_is_left(
    who: str, number: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start_command(deepspeed(["launchers/train.py", *command(shards, out, extra={**LONG, **WITH_PROCESSES})]))
    try:
        wait_for(process, "step 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = below(process.pid, "launchers/train.py")
        ranks = [rank for rank in ranks if "deepspeed.launcher.launch" not in rank.cmdline()]
        assert len(ranks) == 2
        if who == "everybody":
            os.killpg(process.pid, number)
        else:
            target = {"rank": ranks[1].pid, "launcher": ranks[0].ppid(), "deepspeed": process.pid}[who]
            os.kill(target, number)
        output = process.communicate(timeout=600)[0]
        _, alive = psutil.wait_procs(family, timeout=600)
        assert alive == []
    finally:
        for left in [*family, process]:
            if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                left.kill()
    assert process.returncode == CASES[who, number], output
    assert "stopped after step" in output
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert f"saved step {int(checkpoint.name[5:])} in" in output
    if (who, number) != ("deepspeed", INT):  # whose own KeyboardInterrupt prints one
        assert "Traceback" not in output


def test_only_sigusr1_asks_for_another_turn_in_the_queue() -> None:
    before = [signal.getsignal(number) for number in (TERM, INT, USR1)]
    try:
        for number, requeue in ((TERM, False), (INT, False), (USR1, True)):
            stop = StopFlag(launched=False)
            stop.listen()
            assert not stop
            signal.raise_signal(number)
            assert stop and stop.reason == f"signal {number.name}" and stop.requeue == requeue
        stop = StopFlag(launched=False)
        stop.listen()
        signal.raise_signal(INT)
        signal.raise_signal(TERM)  # with which the launcher answers a Ctrl-C
        assert stop.reason == "signal SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(INT)
    finally:
        for number, handler in zip((TERM, INT, USR1), before, strict=True):
            signal.signal(number, handler)


def test_a_launcher_that_ended_before_the_first_step_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is who was there when the process started, not who is there when training begins."""
    stop = StopFlag(launched=True)
    assert not stop
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop and stop.reason == "the launcher is gone"


#: A rank that says whether it is an orphan before and after a line comes in.
RANK = """
from visft_ds.resilience.signals import StopFlag
stop = StopFlag(launched=True)
print(bool(stop))
input()
print(bool(stop))
"""
#: A launcher of one rank.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"


@pytest.mark.parametrize("name", ["deepspeed.launcher.launch", "torchrun"])
def test_only_deepspeeds_launcher_has_a_parent_to_be_missed(name: str) -> None:
    """`nohup torchrun ... &` goes on when its shell ends; the `deepspeed` command is that of the run."""
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LAUNCHER!r}, {RANK!r}, {name!r}])"
    shell = subprocess.Popen(
        [sys.executable, "-c", f"{start}; import time; time.sleep(600)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert shell.stdin is not None and shell.stdout is not None
    assert shell.stdout.readline() == "False\n"
    shell.kill()
    shell.wait()
    shell.stdin.write("\n")
    shell.stdin.close()
    assert shell.stdout.readline() == f"{name.startswith('deepspeed')}\n"
    shell.stdout.close()


#: A rank in its start, which takes long.
STARTING = """
import time
from visft_ds.resilience.signals import StopFlag
StopFlag(launched=True).guard_start()
print("starting", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("late", [False, True], ids=["while it starts", "before it has looked"])
def test_a_rank_that_starts_ends_with_the_command_above_it(late: bool) -> None:
    """There is nothing to save before the first step, which a large model reaches after minutes."""
    launcher = f"import time; time.sleep({2 * late}); {LAUNCHER}"
    words = f"'-c', {launcher!r}, {STARTING!r}, 'deepspeed.launcher.launch'"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, {words}])"
    command = subprocess.Popen(
        [sys.executable, "-c", f"{start}; import time; time.sleep(600)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "CROSS_RANK": "0"},  # as DeepSpeed's launcher sets it
    )
    assert command.stdout is not None
    if late:
        time.sleep(1)
    else:
        assert command.stdout.readline() == "starting\n"
    family = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.wait()
    said = command.stdout.read()  # to its end: nobody holds the pipe any more
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert said.endswith("stopped before the first step: the launcher is gone\n")
    command.stdout.close()


def test_ctrl_c_ends_a_rank_that_starts_at_once() -> None:
    command = [sys.executable, "-c", STARTING]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
    assert rank.stdout is not None and rank.stdout.readline() == "starting\n"
    rank.send_signal(INT)
    assert rank.communicate(timeout=15)[0] == "stopped before the first step: signal SIGINT\n"
    assert rank.returncode == 130


#: A rank in a call that no handler of Python's interrupts: it waits for the other one.
MEETING = """
from datetime import timedelta
from visft_ds.resilience.signals import StopFlag
stop = StopFlag(launched=True)
stop.guard_start()
stop.requeue_code = 77
from torch.distributed import TCPStore
print("starting", flush=True)
TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=600))
"""


def test_sigusr1_ends_a_rank_that_starts_with_the_code_that_queues_the_job_again() -> None:
    command = [sys.executable, "-c", MEETING]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
    wait_for(rank, "starting")
    rank.send_signal(USR1)
    assert rank.communicate(timeout=600)[0] == "stopped before the first step: signal SIGUSR1\n"
    assert rank.returncode == 77


#: A rank that gets its signal before it knows its configuration, whose requeue_code is 0.
EARLY = """
import os, signal
from visft_ds.resilience.signals import StopFlag
stop = StopFlag(launched=True)
stop.guard_start()
os.kill(os.getpid(), signal.SIGUSR1)
stop.listen()
print(stop.reason, stop.requeue)
"""


def test_sigusr1_during_the_start_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "signal SIGUSR1 True\n"), done.stderr


#: A rank that prints on after a line has come in, and then says into a file what it thinks of it.
PRINTING = """
import sys
from pathlib import Path
from visft_ds.resilience.signals import StopFlag
stop = StopFlag(launched=True)
stop.guard_start()
stop.listen()
print("é", flush=True)
input()
print("lost", flush=True)
print("lost", file=sys.stderr)
Path(sys.argv[1]).write_text(f"{bool(stop)} {stop.reason}")
"""


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_rank_whose_output_nobody_reads_is_asked_to_stop(options: list[str], tmp_path: Path) -> None:
    """It would end with an error at the next line of its progress, without saving."""
    rank = subprocess.Popen(
        [sys.executable, *options, "-c", PRINTING, str(tmp_path / "said")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
    assert rank.stdin is not None and rank.stdout is not None and rank.stdout.readline() == "é\n"
    rank.stdout.close()
    rank.stdin.write("\n")
    rank.stdin.close()
    assert rank.wait(timeout=600) == 0
    assert (tmp_path / "said").read_text() == "True nobody reads the output any more"
