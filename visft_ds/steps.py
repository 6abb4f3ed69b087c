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

    def add(self, name: str, *words: str, out: str | None = None, resumes: bool = False) -> Path:
        """Add `visft WORDS --out PLACE` unless it is there; returns the place: ROOT/NAME, or `out` in
        ROOT.
        """
        place = self.root / (out or name)
        command = (*words, "--out", str(place))
        needs = tuple(
            step.name for step in self.steps.values() if any(_names(word, step.out) for word in command)
        )
        step = self.steps.setdefault(name, Step(name, command, place, needs, resumes))
        assert step.command == command, f"two steps are called {name}"
        return place

    def run(self, jobs: int = 1) -> dict[str, str]:
        """Run what has not finished; returns name -> reason, of what failed.

        Raises ValueError for a folder in use or with other content, KeyboardInterrupt when all have ended.
        """
        from visft_ds.run.folder import locked  # takes a second, which --help would, too

        for sign in (signal.SIGTERM, signal.SIGHUP):  # otherwise steps would outlive this process
            if signal.getsignal(sign) == signal.SIG_DFL:
                signal.signal(sign, signal.default_int_handler)
        failed, running = dict[str, str](), dict[str, subprocess.Popen[bytes]]()
        with locked(self.root, patience=1.0), contextlib.ExitStack() as at_the_end:
            at_the_end.callback(_stop, running)
            waiting = [step for step in self.steps.values() if not self._finished(step)]
            while waiting or running:
                pending = {step.name for step in waiting} | running.keys()
                for step in [step for step in waiting if not pending.intersection(step.needs)][
                    : jobs - len(running)
                ]:
                    waiting.remove(step)
                    if lost := [need for need in step.needs if need in failed]:
                        failed[step.name] = f"needs {lost[0]}, which failed"
                    else:
                        running[step.name] = self._start(step, jobs)
                time.sleep(0.1)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if status := running.pop(name).returncode:
                        failed[name] = f"exit status {status}"
                        end = [f"  | {line}" for line in self.log(name).splitlines() if line.strip()][-12:]
                        print(
                            f"FAILED: {name}: {failed[name]}; the end of {self._path(name, 'log')}:",
                            *end,
                            sep="\n",
                        )
                    else:
                        self._path(name, "done").touch()
                        seconds = time.time() - self._path(name, "command").stat().st_mtime
                        print(f"  {name}: {seconds:.0f} s", flush=True)
        return failed

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
        begun = self._path(step.name, "command")
        if not begun.is_file() or begun.read_text(encoding="utf-8") != shlex.join(step.command):
            return False
        ends = [self._path(need, "done") for need in step.needs if self._finished(self.steps[need])]
        return len(ends) == len(step.needs) and all(
            e.stat().st_mtime_ns <= begun.stat().st_mtime_ns for e in ends
        )

    def _start(self, step: Step, jobs: int) -> subprocess.Popen[bytes]:
        self._path(step.name, "done").unlink(missing_ok=True)
        if step.out.exists() and not (step.resumes and self._fresh(step)):
            if not self._path(step.name, "log").is_file():
                raise ValueError(f"{step.out} was not made by this command: choose another --out")
            shutil.rmtree(step.out) if step.out.is_dir() else step.out.unlink()
        self._path(step.name, "log").parent.mkdir(exist_ok=True)
        self._path(step.name, "command").write_text(shlex.join(step.command), encoding="utf-8")
        print(f"{step.name}\n  $ visft {shlex.join(map(redacted, step.command))}", flush=True)
        _, ranks = without_num_gpus(step.command)
        threads = max(1, (os.cpu_count() or 1) // (jobs * (ranks or 1)))  # cores are divided among all
        environment = {**same_code(), "OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, "-m", "visft_ds", *step.command]
        with self._path(step.name, "log").open(
            "wb"
        ) as log:  # a session of its own: `_stop` tells when to end
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self.root / "steps" / f"{name}.{suffix}"


def _names(word: str, made: Path) -> bool:
    """Return True if a word of a command names what a step makes, something in it, or just the folder around
    it.
    """
    inside, around = (re.escape(str(place)) for place in (made, made.parent))
    return re.search(rf"(?<![\w./-])({inside}(?![\w.-])|{around}(?![\w./-]))", word) is not None


def _stop(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Ask commands to save and end (one of several ranks waits for them), then end what is left of them."""
    for process in running.values():
        for sign, seconds in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(seconds)
