"""Measuring in a process of its own: training goes on while average precision is computed.

As a command: `python -m visft_ds.run.async_eval FOLDER SHARDS PARENT` measures what
`AsyncEvaluation.start` wrote into FOLDER, while the process PARENT lives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Finite, Whole, read_record
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.runner import as_metrics, measure
from visft_ds.interop.weights import write_text
from visft_ds.tasks import Results

_ORDER, _METRICS, _LOG = "evaluation.json", "metrics.json", "judge.log"
_TRIES = 3  #: of a process that is killed
_CODE = Path(__file__).resolve().parents[2]  #: where this package is imported from


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a step."""

    step: int
    metrics: Mapping[str, float]
    problems: Sequence[str] = ()  #: why numbers are missing


class Measured(StrictModel):
    """Content of metrics.json of a step."""

    step: Whole
    metrics: dict[str, Finite]
    problems: list[str]


class AsyncEvaluation:
    """Compares results with a split, one evaluation after the other, without ever making the caller wait for one.

    Each has a folder `folder`/step_<step> with <task>_results.json (COCO results format), metrics.json and judge.log.
    Those of the newest measured evaluation stay, earlier ones are removed. An evaluation whose process fails, is killed
    again and again, or that cannot be written, gives a verdict with a problem: it never raises.
    """

    def __init__(self, folder: Path, manifest: Manifest, limit: int | None) -> None:
        self.folder = folder.resolve()
        self._shards = manifest.root.resolve() if isinstance(manifest.root, Path) else manifest.root
        cache = None if manifest.remote is None else manifest.remote.cache
        copies = None if cache is None else [str(cache.folder), cache.max_bytes]
        self._data = {"split": manifest.split, "limit": limit, "cache": copies}
        self._waiting: deque[int] = deque()
        self._working: tuple[int, subprocess.Popen[bytes]] | None = None
        self._failed: list[EvalResult] = []
        self._killed: Counter[int] = Counter()

    def start(self, step: int, collected: Mapping[str, Results]) -> None:
        """Hand in the results of a step, {task: results}; they are measured as soon as earlier ones are."""
        place = self._place(step)
        try:
            shutil.rmtree(place, ignore_errors=True)  # of an interrupted run
            place.mkdir(parents=True, exist_ok=True)
            for task, results in collected.items():
                (place / f"{task}_results.json").write_bytes(orjson.dumps(results))
            # Last and in one move: without it there is nothing to measure.
            order = orjson.dumps({"step": step, "tasks": list(collected), **self._data})
            write_text(place / _ORDER, order.decode())
        except OSError as error:
            self._failed.append(EvalResult(step, {}, (f"results cannot be written: {error}",)))
            return
        self._waiting.append(step)
        self._next()

    def again(self, before: int, recorded: set[int]) -> None:
        """Take up what an interrupted run left unmeasured of steps below `before`; later steps will be done anew."""
        for step, place in self._places():
            if step > before:
                shutil.rmtree(place, ignore_errors=True)
            elif step < before and step not in recorded and (place / _ORDER).is_file():
                self._waiting.append(step)
        self._next()

    def verdicts(self, *, wait: bool = False) -> list[EvalResult]:
        """Outcomes that were not returned before; with `wait` those of all steps handed in."""
        done: list[EvalResult] = []
        while self._working is not None:
            step, process = self._working
            if not wait and process.poll() is None:
                break
            code = process.wait()
            self._working = None
            if code < 0:
                self._killed[step] += 1
            if code < 0 and self._killed[step] < _TRIES:
                # Launchers that end a rank kill its children first, while it still saves: no verdict on the results.
                self._waiting.append(step)
            else:
                done.append(self._outcome(step, code))
            self._next()
        done, self._failed = done + self._failed, []
        return done

    @property
    def busy(self) -> bool:
        """Return True while an evaluation is running, as far as `verdicts` knows."""
        return self._working is not None

    def abandon(self) -> None:
        """End what is being measured; `again` takes it up in the next run."""
        self._waiting.clear()
        if self._working is not None:
            self._working[1].kill()
            self._working[1].wait()
            self._working = None

    def _place(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _places(self) -> list[tuple[int, Path]]:
        """Steps that have a folder, in order."""
        found = [(re.fullmatch(r"step_(\d{8,})", path.name), path) for path in self.folder.glob("step_*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def _next(self) -> None:
        while self._working is None and self._waiting:
            step = self._waiting.popleft()
            place = self._place(step)
            try:
                with (place / _LOG).open("wb") as log:  # a file, because nobody empties a pipe meanwhile
                    self._working = step, _spawn(place, self._shards, log)
            except OSError as error:
                self._failed.append(EvalResult(step, {}, (f"no process for it: {error}",)))

    def _outcome(self, step: int, code: int) -> EvalResult:
        place = self._place(step)
        try:
            if code:
                said = (place / _LOG).read_text(errors="replace").strip().splitlines()
                why = f"killed {_TRIES} times, by signal {-code}" if code < 0 else f"exit status {code}"
                return EvalResult(step, {}, (said[-1] if said and code > 0 else why,))
            found = read_record(place / _METRICS, Measured)
        except (OSError, ValueError) as error:
            return EvalResult(step, {}, (f"its outcome cannot be read: {error}",))
        for earlier, folder in self._places():
            if earlier < step and earlier not in self._waiting:
                shutil.rmtree(folder, ignore_errors=True)
        return EvalResult(step, found.metrics, tuple(found.problems))


def _spawn(place: Path, shards: Path | str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "visft_ds.run.async_eval", str(place), str(shards), str(os.getpid())],
        cwd=_CODE,  # `-m` looks there first: the training may have been started in another copy of the code
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        # A session of its own: an interrupt of the training must not reach it, the run waits for it at its end.
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def _read_results(path: Path) -> Results:
    try:
        results: Results = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return results


def main(folder: Path, shards: Path | str) -> int:
    """Measure what lies in `folder`; returns the exit status.

    A task that cannot be judged is named in metrics.json and takes nothing from the others.
    """
    order = orjson.loads((folder / _ORDER).read_bytes())
    collected: dict[str, Results] = {}
    unread = []
    for task in order["tasks"]:
        try:
            collected[task] = _read_results(folder / f"{task}_results.json")
        except (ValueError, OSError) as error:
            unread.append(f"{task}: {error}")
    cache = None if order["cache"] is None else Cache(Path(order["cache"][0]), order["cache"][1])
    with ShardReader(Manifest.load(shards, order["split"], cache)) as reader:
        outcome, problems = measure(collected, reader, limit=order["limit"])
    whole = {"step": order["step"], "metrics": as_metrics(outcome), "problems": [*unread, *problems]}
    write_text(folder / _METRICS, orjson.dumps(whole).decode())
    return 0


def _end_with(parent: int) -> None:
    """End this process when the training has ended, however that was: the next start of the run measures the same step
    and writes into the same folder."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
