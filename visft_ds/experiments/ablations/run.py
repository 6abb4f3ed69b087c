"""Running steps: finished ones are kept, a failing one takes only those with it that need its result.

Each runs in a process of its own. Where there is no GPU that process is a fork of one that has imported everything
already, which saves most of what a short training costs to start.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess

from visft_ds.experiments.ablations.child import run_command
from visft_ds.experiments.ablations.steps import Step
from visft_ds.interop.writing import write_text
from visft_ds.monitor.console import clock
from visft_ds.redaction import redacted_words

#: Imported once, before the steps are forked.
_PRELOADED = [
    *("visft_ds.train", "visft_ds.launch", "visft_ds.evals.benchmarks.command", "visft_ds.evals.runner"),
    *("open_clip", "sklearn.linear_model"),  # those of them that are installed
]
#: Seconds a step is given to save its state, and then to end at all.
_PATIENCE = ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0))
_TAIL = 12  #: lines of a log that show why a step failed


@dataclass(frozen=True)
class Failure:
    """Why there is no result of a step."""

    reason: str  #: one line
    end: Sequence[str] = ()  #: of its log


@dataclass
class Runner:
    """Runs steps in the order of their list.

    Attributes:
        jobs: steps at a time.
        forks: start Python scripts as forks of a process with everything imported; else anew.
        say: takes lines for people.
        weigh: a step's share of the time, in a unit of its own.
    """

    jobs: int
    forks: bool
    say: Callable[[str], None]
    weigh: Callable[[Step], float]

    def run(self, steps: Mapping[str, Step]) -> dict[str, Failure]:
        """Run all that is not finished; returns what failed or could not start, by stem.

        Raises:
            KeyboardInterrupt: after the running steps were asked to save and ended.
        """
        failures: dict[str, Failure] = {}
        waiting = [step for step in steps.values() if not step.marker.is_file()]
        kept, total, begun, began = len(steps) - len(waiting), len(steps), 0, time.monotonic()
        weight, done = sum(map(self.weigh, waiting)), 0.0
        if kept:
            self.say(f"{kept} of {total} steps have finished before")
        running: dict[int, _Running] = {}
        try:
            while waiting or running:
                for step in list(waiting):
                    lost = [stem for stem in step.needs if stem in failures]
                    if lost:
                        waiting.remove(step)
                        weight -= self.weigh(step)
                        failures[step.stem] = Failure(f"needs {steps[lost[0]].title}, which failed")
                    elif len(running) < self.jobs and all(steps[stem].marker.is_file() for stem in step.needs):
                        waiting.remove(step)
                        begun += 1
                        left = f"  left {clock((time.monotonic() - began) / done * (weight - done))}" if done else ""
                        self.say(f"[{kept + begun}/{total}] {step.title}{left}")
                        child = _start(step, self.forks)
                        running[child.process.sentinel] = child
                for sentinel in wait(list(running)) if running else ():
                    assert isinstance(sentinel, int)
                    child = running.pop(sentinel)
                    failure, done = child.finish(), done + self.weigh(child.step)
                    if failure is not None:
                        failures[failure[0].stem] = failure[1]
                        self.say(f"  FAILED: {failure[0].title}; the end of {failure[0].log}:")
                        for line in failure[1].end:
                            self.say(f"  | {line}")
        except KeyboardInterrupt:
            for child in running.values():
                child.stop()
            raise
        return failures


@dataclass(frozen=True)
class _Running:
    step: Step
    process: ForkServerProcess
    began: float

    def finish(self) -> tuple[Step, Failure] | None:
        """Mark the step as finished; or what it died of."""
        self.process.join()
        step, code = self.step, self.process.exitcode
        if code:
            lines = step.log.read_text(encoding="utf-8", errors="replace").splitlines() if step.log.is_file() else []
            end = [line for line in lines if line.strip()][-_TAIL:]
            reason = next((line.strip() for line in end if "error:" in line), end[-1].strip() if end else "no output")
            return step, Failure(f"exit status {code}: {reason[:300]}", end)
        if step.proof is not None and not step.proof.exists():
            return step, Failure(f"ended before it had made {step.proof}; the same command goes on with it")
        record = {
            "command": redacted_words(step.command),
            "seconds": round(time.monotonic() - self.began, 1),
            "title": step.title,
        }
        write_text(step.marker, json.dumps(record, indent=1) + "\n", overwrite=True)
        return None

    def stop(self) -> None:
        """Ask its processes to save and end, then make them."""
        assert self.process.pid is not None
        for sign, patience in _PATIENCE:
            with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
                os.killpg(self.process.pid, sign)
            self.process.join(patience)
            if self.process.exitcode is not None:
                return


def _start(step: Step, forks: bool) -> _Running:
    if not step.resumes and step.out.exists():
        shutil.rmtree(step.out) if step.out.is_dir() else step.out.unlink()
    step.log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED if forks else [])
    process = context.Process(target=run_command, args=(step.command, step.log, forks))
    process.start()
    return _Running(step, process, time.monotonic())
