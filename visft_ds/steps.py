"""Commands that make one another's inputs: each runs once, and a list that was stopped continues where it
was.

A step needs those whose results, or the folder around them, its words name. It has finished when it ended
well with the same command, begun after all that it needs had ended. ROOT/steps has of each NAME.command,
NAME.log and, at its end, NAME.done.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from visft_ds.redaction import redacted
from visft_ds.resilience.processes import same_code, without_num_gpus


@dataclass(frozen=True)
class Step:
    """Command of `visft`; `out` is what it makes."""

    name: str
    command: tuple[str, ...]
    out: Path
    needs: tuple[str, ...]
    resumes: bool  #: continues from what it left behind; otherwise that is removed before it starts again


class Steps:
    """Steps of one folder, in an order in which they can run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: dict[str, Step] = {}

    def add(self, name: str, *words: object, out: str | None = None, resumes: bool = False) -> Path:
        """Add `visft WORDS --out PATH` unless it is there; returns the path: ROOT/NAME, or `out` in ROOT."""
        path = self.root / (out or name)
        command = tuple(map(str, (*words, "--out", path)))
        made = [step for step in self.steps.values() if any(_names(word, step.out) for word in command)]
        needs = tuple(step.name for step in made)
        step = self.steps.setdefault(name, Step(name, command, path, needs, resumes))
        assert step.command == command, f"two steps are called {name}"
        return path

    def run(self, jobs: int = 1) -> dict[str, str]:
        """Run what has not finished; returns name -> reason, of what failed.

        Raises ValueError for a folder in use or with other content, KeyboardInterrupt when all have ended.
        """
        from visft_ds.run.folder import locked  # takes a second, which --help would, too

        for sign in (signal.SIGTERM, signal.SIGHUP):  # otherwise steps would outlive this process
            if signal.getsignal(sign) == signal.SIG_DFL:
                signal.signal(sign, signal.default_int_handler)
        failed = dict[str, str]()
        running = dict[str, subprocess.Popen[bytes]]()
        with locked(self.root, patience=1.0), contextlib.ExitStack() as at_the_end:
            at_the_end.callback(_stop, running)
            waiting = [step for step in self.steps.values() if not self._finished(step)]
            while waiting or running:
                self._start_ready(waiting, running, failed, jobs)
                time.sleep(0.1)
                for name, process in list(running.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del running[name]
                    if status == 0:
                        self._path(name, "done").touch()
                        seconds = time.time() - self._path(name, "command").stat().st_mtime
                        print(f"  {name}: {seconds:.0f} s", flush=True)
                    else:
                        failed[name] = f"exit status {status}"
                        lines = [f"  | {line}" for line in self.log(name).splitlines() if line.strip()]
                        end = f"the end of {self._path(name, 'log')}:"
                        print(f"FAILED: {name}: {failed[name]}; {end}", *lines[-12:], sep="\n")
        return failed

    def _start_ready(
        self,
        waiting: list[Step],
        running: dict[str, subprocess.Popen[bytes]],
        failed: dict[str, str],
        jobs: int,
    ) -> None:
        """Start steps, at most `jobs` at a time, whose needs have ended; none that needs what failed."""
        pending = {step.name for step in waiting} | running.keys()
        for step in list(waiting):
            if len(running) == jobs:
                return
            if pending.intersection(step.needs):
                continue
            waiting.remove(step)
            lost = next((need for need in step.needs if need in failed), None)
            if lost is None:
                running[step.name] = self._start(step, jobs)
            else:
                failed[step.name] = f"needs {lost}, which failed"

    def show(self) -> None:
        """Print the commands, in order."""
        for step in self.steps.values():
            print("#", step.name, "(finished)" if self._finished(step) else "")
            print("visft", shlex.join(map(redacted, step.command)))

    def log(self, name: str) -> str:
        """Text that a step printed."""
        return self._path(name, "log").read_text(encoding="utf-8", errors="replace")

    def _finished(self, step: Step) -> bool:
        return self._path(step.name, "done").is_file() and self._fresh(step)

    def _fresh(self, step: Step) -> bool:
        """Return True if the step last ran with this command, and all that it needs had finished before."""
        command = self._path(step.name, "command")
        if not command.is_file() or command.read_text(encoding="utf-8") != shlex.join(step.command):
            return False
        began = command.stat().st_mtime_ns
        return all(
            self._finished(self.steps[need]) and self._path(need, "done").stat().st_mtime_ns <= began
            for need in step.needs
        )

    def _start(self, step: Step, jobs: int) -> subprocess.Popen[bytes]:
        self._path(step.name, "done").unlink(missing_ok=True)
        if step.out.exists() and not (step.resumes and self._fresh(step)):
            if not self._path(step.name, "log").is_file():
                raise ValueError(f"{step.out} was not made by this command: choose another --out")
            if step.out.is_dir():
                shutil.rmtree(step.out)
            else:
                step.out.unlink()
        self._path(step.name, "log").parent.mkdir(exist_ok=True)
        self._path(step.name, "command").write_text(shlex.join(step.command), encoding="utf-8")
        print(f"{step.name}\n  $ visft {shlex.join(map(redacted, step.command))}", flush=True)
        _, ranks = without_num_gpus(step.command)
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // (jobs * (ranks or 1)))  # cores are divided among all
        environment = {"OMP_NUM_THREADS": str(threads), **same_code()}  # unless the user has set it
        words = [sys.executable, "-m", "visft_ds", *step.command]
        with self._path(step.name, "log").open("wb") as log:
            # In a session of its own: `_stop` tells when to end.
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self.root / "steps" / f"{name}.{suffix}"


def _names(word: str, made: Path) -> bool:
    """Return True if a word of a command names what a step makes, something in it, or just the folder around
    it.
    """
    inside = re.escape(str(made))
    around = re.escape(str(made.parent))
    return re.search(rf"(?<![\w./-])({inside}(?![\w.-])|{around}(?![\w./-]))", word) is not None


def _stop(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Ask commands to save and end (one of several ranks waits for them), then end what is left of them."""
    for process in running.values():
        for sign, seconds in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(seconds)
