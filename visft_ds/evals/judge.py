"""Measuring in a process of its own: training goes on while average precision is computed.

As a command: `python -m visft_ds.evals.judge FOLDER` reads what `Judge.start` wrote there and writes metrics.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.evals.runner import as_metrics, measure
from visft_ds.tasks import Results

_ORDER, _METRICS = "evaluation.json", "metrics.json"


@dataclass(frozen=True)
class Verdict:
    """What was measured of one step."""

    step: int
    metrics: Mapping[str, float]
    problem: str | None = None  #: why there are no numbers


class Judge:
    """Compares results with a split, one evaluation at a time, and keeps the files of the last one in `folder`.

    `folder` then holds <task>_results.json (COCO results format) and metrics.json.
    """

    def __init__(self, folder: Path, manifest: Manifest, limit: int | None) -> None:
        self.folder = folder
        self._data = {"root": str(manifest.root), "split": manifest.split, "limit": limit}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, step: int, collected: Mapping[str, Results]) -> Verdict | None:
        """Begin to measure; waits for an earlier evaluation first and returns its outcome."""
        before = self.verdict(wait=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (_ORDER, _METRICS):
            (self.folder / name).unlink(missing_ok=True)
        for task, results in collected.items():
            (self.folder / f"{task}_results.json").write_bytes(orjson.dumps(results))
        order = {"step": step, "tasks": list(collected), **self._data}
        (self.folder / _ORDER).write_bytes(orjson.dumps(order))  # last: without it there is nothing to measure
        self._spawn()
        return before

    def again(self, recorded: set[int]) -> None:
        """Take up an evaluation that an interrupted run left unmeasured, unless its step is `recorded` already."""
        if (self.folder / _ORDER).is_file() and _read(self.folder / _ORDER)["step"] not in recorded:
            self._spawn()

    def verdict(self, *, wait: bool = False) -> Verdict | None:
        """The outcome of the evaluation under way, once; None while there is none."""
        if self._process is None or (not wait and self._process.poll() is None):
            return None
        _, said = self._process.communicate()
        code, self._process = self._process.returncode, None
        step = int(_read(self.folder / _ORDER)["step"])
        if code:
            lines = said.decode(errors="replace").strip().splitlines() or [f"exit status {code}"]
            return Verdict(step, {}, lines[-1])
        return Verdict(step, _read(self.folder / _METRICS)["metrics"])

    def _spawn(self) -> None:
        # A session of its own: an interrupt of the training must not reach it, the run waits for it at its end.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "visft_ds.evals.judge", str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": _import_path()},
        )


def _import_path() -> str:
    """Where this package is imported from: the training may have been started in another folder."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _read(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = orjson.loads(path.read_bytes())
    return fields


def main(folder: Path) -> int:
    """Measure what lies in `folder`; returns the exit status."""
    order = _read(folder / _ORDER)
    collected = {task: orjson.loads((folder / f"{task}_results.json").read_bytes()) for task in order["tasks"]}
    try:
        with ShardReader(Manifest.load(order["root"], order["split"])) as reader:
            metrics = as_metrics(measure(collected, reader, limit=order["limit"]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    temporary = folder / f"{_METRICS}.tmp"
    temporary.write_bytes(orjson.dumps({"step": order["step"], "metrics": metrics}))
    temporary.replace(folder / _METRICS)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
