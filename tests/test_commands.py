"""The command `visft`: its table, what it refuses, and what the package says of itself in one place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import create_model
from pydantic_core import core_schema

import visft_ds
from visft_ds.cli import COMMANDS, main
from visft_ds.parallel import engine
from visft_ds.resilience.processes import start_ranks
from visft_ds.resilience.stop import interrupt

ROOT = Path(__file__).resolve().parents[1]


def test_help_and_version_name_everything_and_what_is_no_command_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(lines[: len(COMMANDS)]) == sorted(COMMANDS)
    assert "\n\nprepare data:\n  shards " in text and "\n\ntrain:\n  train " in text
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"visft {visft_ds.__version__}\n"

    assert main(["shrads"]) == 2 and "did you mean shards?" in capsys.readouterr().err


def test_ranks_of_a_machine_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch is imported; what the user has set stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    visft_ds._settle_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("LOCAL_SIZE", "4")
    visft_ds._settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    visft_ds._settle_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("4", "ACTIVE")


def test_a_command_runs_in_any_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """As a script or a server may call it; Python lets the main thread alone handle signals."""
    thread = threading.Thread(target=main, args=(["--version"],))
    thread.start()
    thread.join()
    assert capsys.readouterr().out == f"visft {visft_ds.__version__}\n"


def test_the_launchers_word_reaches_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """`deepspeed --module visft_ds evaluate` puts --local_rank before the name of the command."""
    given: list[list[str]] = []
    monkeypatch.setattr("visft_ds.evals.cli.main", lambda words: given.append(words) or 0)
    assert main(["--local_rank=1", "evaluate", "--run", "r"]) == 0
    assert given == [["--local_rank=1", "--run", "r"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_a_ctrl_c_with_130_and_a_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One handler above all of them; none may catch it first, and none may need a launcher to have it."""

    def interrupted(*given: object) -> NoReturn:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("argparse.ArgumentParser.parse_known_args", interrupted)
    try:
        assert main([name]) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second one ends it at once"
    finally:
        signal.signal(signal.SIGINT, handler)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "" and len(printed) == 2 and printed[1].startswith(f"{name}: interrupted")
    assert ("the same command continues" in printed[1]) == (
        name in ("demo", "shards", "train", "judge", "predict", "ablate")
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["shards", "build", "coco"], "the same command continues"),
        (["shards", "coco"], "the same command continues"),
        (["shards", "index", "a.tar", "--out", "x"], "the same command begins anew"),
    ],
)
def test_a_ctrl_c_says_whether_anything_is_left(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> NoReturn:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("visft_ds.shards.cli.main", interrupted)
    try:
        assert main(words) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == f"\nshards: interrupted; {told}\n"


def test_a_ctrl_c_that_came_while_a_rank_began_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`start_ranks` holds it back until then; a rank that never lets it through cannot be interrupted."""
    monkeypatch.setattr(
        "argparse.ArgumentParser.parse_known_args", lambda *given: pytest.fail("not interrupted")
    )
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        signal.raise_signal(signal.SIGINT)
        assert main(["report", "run"]) == 130
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that still waits
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    assert "report: interrupted" in capsys.readouterr().err


def test_a_ctrl_c_waits_for_imports_and_for_classes_of_pydantic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that comes in between they make errors that no handler knows."""

    class Interrupted(str):
        @classmethod
        def __get_pydantic_core_schema__(cls, source: object, handler: object) -> Any:
            signal.raise_signal(signal.SIGINT)
            return core_schema.str_schema()

    steps: list[str] = []

    def build() -> None:
        steps.append(create_model("Tracking", name=(Interrupted, ...)).__name__)
        time.sleep(60)  # the signal comes again when nothing is in its way

    def load() -> None:
        steps.append(import_module("interrupted").ENDED)
        time.sleep(60)

    (tmp_path / "interrupted.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\nENDED = 'import'\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        for work in (load, build):
            with pytest.raises(KeyboardInterrupt):
                work()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert steps == ["import", "Tracking"]


@pytest.mark.parametrize(("rank", "status"), [({}, 130), ({"RANK": "1", "WORLD_SIZE": "2"}, -signal.SIGINT)])
def test_an_interrupted_rank_ends_by_the_signal(rank: dict[str, str], status: int) -> None:
    """The number is that of a rank which stopped after a step and saved: those beside it are not to be ended,
    while those of this one may wait for it inside torch for half an hour.
    """
    program = (
        "import signal, visft_ds.cli\n"
        "visft_ds.cli._run = lambda words: signal.raise_signal(signal.SIGINT)\n"
        "visft_ds.cli.run()"
    )
    ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, **rank}, check=False)
    assert ended.returncode == status


def test_num_gpus_starts_as_many_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []
    monkeypatch.setattr("visft_ds.cli.start_ranks", lambda words, count: started.append((words, count)) or 0)
    for given in (["--num_gpus", "8"], ["--num-gpus=8"]):
        assert main(["evaluate", "--run", "r", *given]) == 0
    assert started == [(["evaluate", "--run", "r"], 8)] * 2
    for command in ("train", "evaluate"):
        assert main([command, "--num_gpus", "all"]) == 2 and "--num_gpus all" in capsys.readouterr().err
    for command in ("train", "evaluate", "judge", "profile", "demo", "ablate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--num_gpus N, --num-gpus N" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("RANK", "x"), ("RANK", "1"), ("RANK", "\u0661"), ("WORLD_SIZE", ""), ("MASTER_PORT", "-1")),
        *(("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "2.0")),
    ],
)
def test_what_no_launcher_has_set_is_told(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, text)
    for command in ("train", "evaluate", "predict"):
        assert main([command]) == 2 and f"{name}={text}" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its status is the command's, and nothing is said of those that waited for it."""
    rank = tmp_path / "rank"
    rank.write_text("#!/bin/sh\n[ $RANK = 1 ] && exit 2\nexec sleep 60\n")
    rank.chmod(0o755)
    monkeypatch.setattr("visft_ds.resilience.processes.sys.executable", str(rank))
    monkeypatch.setattr("visft_ds.resilience.processes._GRACE", 0.2)
    assert start_ranks(["judge"], 3) == 2 and capfd.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_nobody_reads_ends_quietly(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command, env = (
        [sys.executable, "-m", "visft_ds", "--help"],
        {**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


ENDING = """
import atexit
from visft_ds import cli

class Large:
    def __del__(self):
        print("taken apart")

def main():
    atexit.register(print, "done at the end")
    {end}

large = Large()
cli.main = main
cli.run()
"""


def test_a_command_does_what_is_to_be_done_at_its_end_and_takes_nothing_apart() -> None:
    def ended(end: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", ENDING.format(end=end)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    assert ended("return 3") == (3, "done at the end\n", "")
    code, printed, error = ended("raise KeyError('unforeseen')")
    assert code == 1 and "taken apart" in printed and "KeyError: 'unforeseen'" in error


def test_the_range_of_deepspeed_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {visft_ds.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    [needed] = [
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "deepspeed"
    ]
    assert needed.specifier == SpecifierSet(visft_ds.DEEPSPEED) and needed.specifier.contains(
        deepspeed.__version__
    )
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(ValueError, match="works with"):
        engine.start_process_group()


def test_a_run_is_named_by_one_flag_in_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where a run may be an argument, too, one of the two is needed, and both count."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(name).mkdir()
    for command in ("predict", "evaluate", "merge", "export", "report", "judge", "labels"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "  --run " in capsys.readouterr().out
    for words in (["report"], ["judge", "base", "--on", "x=y"]):
        with pytest.raises(SystemExit):
            main(words)
        assert ": missing " in capsys.readouterr().err
    judged: list[str] = []
    monkeypatch.setattr("visft_ds.evals.judge.command.run_judge", lambda flags: judged.extend(flags.tuned))
    assert main(["judge", "base", "a", "--run", "b,c", "--run", "d", "--on", "x=y"]) == 0
    assert judged == ["a", "b,c", "d"]
    assert main(["judge", "base", "--on", "x=y", "e"]) == 0 and judged[-1] == "e"  # behind a flag
    evaluated: list[object] = []
    monkeypatch.setattr("visft_ds.evals.evaluate.evaluate", lambda **flags: evaluated.append(flags["run"]))
    assert main(["evaluate", "a"]) == main(["evaluate", "--run", "a"]) == 0
    assert evaluated == [Path("a"), Path("a")]
    with pytest.raises(SystemExit):
        main(["evaluate", "a", "--run", "b"])
    assert "two runs: a and --run b" in capsys.readouterr().err
    merged: list[Path] = []
    monkeypatch.setattr(
        "visft_ds.merge.command.merge_files", lambda flags: merged.extend(flags.adapters) or 0
    )
    assert main(["merge", "a", "--run", "b", "--adapter", "c", "--out", "d"]) == 0
    assert merged == [Path("a"), Path("b"), Path("c")]
