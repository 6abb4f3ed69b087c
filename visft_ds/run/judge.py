"""Average precision in a process of its own, while training goes on: `python -m visft_ds.run.judge PARENT`.

It reads results on stdin, writes metrics to stdout, and ends when the process PARENT has ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import orjson

from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.runner import as_metrics, measure
from visft_ds.resilience.processes import same_code
from visft_ds.tasks import Results


@dataclass(frozen=True)
class Verdict:
    """Metrics of a step, and why some are missing."""

    step: int
    metrics: Mapping[str, float]
    problems: tuple[str, ...] = ()


class Judge:
    """Compares results with a split, one evaluation after the other, without making the caller wait. Never raises."""

    def __init__(self, manifest: Manifest, limit: int | None) -> None:
        cache = None if manifest.remote is None else manifest.remote.cache
        copies = None if cache is None else [str(cache.folder), cache.max_bytes]
        root = manifest.root.resolve() if isinstance(manifest.root, Path) else manifest.root
        self._data = {"shards": str(root), "split": manifest.split, "limit": limit, "cache": copies}
        self._thread = ThreadPoolExecutor(1, "judge")
        self._waiting: deque[Future[Verdict]] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self, step: int, collected: Mapping[str, Results]) -> None:
        """Hand in the results of a step, {task: results}; they are measured as soon as earlier ones are."""
        order = orjson.dumps({**self._data, "results": collected})
        self._waiting.append(self._thread.submit(self._judge, step, order))

    def verdicts(self, *, seconds: float | None = 0.0) -> list[Verdict]:
        """Outcomes that were not returned before: those that are there within some seconds; None: all."""
        wait(self._waiting, seconds)
        done = []
        while self._waiting and self._waiting[0].done():
            done.append(self._waiting.popleft().result())
        return done

    def close(self) -> int:
        """End what is being measured. Returns how many evaluations are lost."""
        self._closed, lost, process = True, len(self._waiting), self._process
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._waiting.clear()
        if process is not None:
            process.kill()
        return lost

    def _judge(self, step: int, order: bytes) -> Verdict:
        command = [sys.executable, "-m", "visft_ds.run.judge", str(os.getpid())]
        environment = {**same_code(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipe = subprocess.PIPE
        try:
            # In a session of its own: an interrupt of the training must not reach it.
            with subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
            ) as self._process:
                if self._closed:
                    self._process.kill()
                told, said = self._process.communicate(order)
            code, self._process = self._process.returncode, None
            found = orjson.loads(told) if code == 0 else {}
        except (OSError, ValueError) as error:
            return Verdict(step, {}, (str(error),))
        if code:
            why = said.decode(errors="replace").strip().splitlines()[-1:] if code > 0 else [f"killed by signal {-code}"]
            return Verdict(step, {}, tuple(why) or (f"exit status {code}",))
        return Verdict(step, found["metrics"], tuple(found["problems"]))


def judged(order: bytes) -> bytes:
    """Metrics of what `Judge.start` handed in; a task that cannot be judged takes nothing from the others."""
    given = orjson.loads(order)
    cache = None if given["cache"] is None else Cache(Path(given["cache"][0]), given["cache"][1])
    with ShardReader(Manifest.load(given["shards"], given["split"], cache)) as reader:
        outcome, problems = measure(given["results"], reader, limit=given["limit"])
    return orjson.dumps({"metrics": as_metrics(outcome), "problems": list(problems)})


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of the answer
    with os.fdopen(answer, "wb") as file:
        file.write(judged(sys.stdin.buffer.read()))
