"""The soak from beginning to end: data, an undisturbed run, the same run disturbed, and what both left."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.coco_tree import write_tree
from tests.ranks import run_ranks
from tests.soak.compare import differences
from tests.soak.injury import Injury, small_disk
from tests.soak.schedule import Fault, schedule
from tests.soak.trial import SoakFailed, Trial
from tests.tiny import TINY, words_of

SAVE_EVERY, EVAL_EVERY = 10, 100
#: Steps at the end without a fault, so that the same checkpoints are left: as many as are kept, and some.
CALM = 4 * SAVE_EVERY
SETTINGS = {
    **TINY,
    "visft.lora.rank": 8,
    "visft.run.save_every": SAVE_EVERY,
    "visft.run.log_every": 1,
    "visft.run.keep_best": "box/AP50",
    "visft.run.step_timeout": 60.0,
    "visft.run.eval_every": EVAL_EVERY,
    "visft.run.visualizations": 0,  # of which the small disk would be full after 1,500 steps
    "visft.data.val": "val",  # with shards of its own, which are never damaged: a failed evaluation is not made again
    "scheduler.params.warmup_num_steps": 5,
}


@dataclass(frozen=True)
class Survived:
    """One fault and what came of it."""

    kind: str
    step: int  #: last step that was seen before it came
    at: float  #: seconds since the disturbed run began
    by: str  #: who restarted it: "hand" or "itself"
    lost: int  #: steps that are made again
    seconds: float  #: until the next step was made
    note: str


@dataclass
class Report:
    """What was found."""

    total_steps: int
    reference_seconds: float = 0.0
    seconds: float = 0.0
    faults: list[Survived] = field(default_factory=list)
    restarts: int = 0
    starts: int = 0
    differences: list[str] = field(default_factory=list)


def soak(out: Path, *, seed: int, gap: int, steps: int) -> Report:
    """Run everything below `out`, faults `gap` steps apart in the mean; the report says what is different."""
    report = Report(steps)
    shards = _make_shards(out)
    _train_heads(shards, out / "heads")
    run = partial(_command, shards, out / "heads" / "export")
    faults = schedule(seed, gap=gap, last=steps - CALM)
    _tell(f"{steps} steps, {len(faults)} faults")
    report.reference_seconds = _undisturbed(out / "reference", run, steps)
    _tell(f"undisturbed: {report.reference_seconds:.0f} s")
    began_disturbed = time.monotonic()
    with small_disk(out / "disk") as disk:
        folder = (disk or out) / "run"
        with Trial(run(folder, steps), folder, out / "disturbed.log") as trial:
            try:
                _disturb(trial, faults, shards, disk, report.faults)
                report.differences = differences(out / "reference", folder, steps)
            except SoakFailed as error:
                report.differences = [str(error)]
        report.restarts, report.starts = trial.restarts, trial.starts
        if disk:
            shutil.copytree(folder, out / "run")
    report.seconds = time.monotonic() - began_disturbed
    return report


def _disturb(
    trial: Trial, faults: Sequence[Fault], shards: Path, disk: Path | None, done: list[Survived]
) -> None:
    """One fault after the other, then the end of the run."""
    trial.start()
    began = time.monotonic()
    for fault in faults:
        trial.wait_for_step(fault.step)
        survived = _survive(trial, Injury(trial, fault, shards, disk), time.monotonic() - began)
        done.append(survived)
        _tell(
            f"{survived.at:.0f} s, step {survived.step}: {survived.kind}: lost {survived.lost}; {survived.note}"
        )
    trial.wait_for(lambda: trial.ended, "the end of the run", seconds=1800)
    if code := trial.wait_for_end():
        raise SoakFailed(f"the run ended with {code}. The last lines:\n{trial.tail()}")


def _survive(trial: Trial, injury: Injury, at: float) -> Survived:
    kind = injury.fault.kind
    before, step, starts, known = len(trial.lines), trial.step, trial.starts, len(trial.lost)
    injured = time.monotonic()
    restarts = trial.restarts
    injury.do()
    if kind.code is None:
        restarts += injury.restarts
        trial.wait_for(lambda: trial.restarts >= restarts or trial.ended, f"a restart after {kind.name}")
    else:
        code = trial.wait_for_end()
        if code != kind.code:
            raise SoakFailed(
                f"{kind.name}: ended with {code}, expected {kind.code}. The last lines:\n{trial.tail()}"
            )
        injury.mend()
        trial.start()
    trial.wait_for_step(1)
    said = "\n".join(trial.lines[before:])
    for pattern in (kind.says, *map(re.escape, injury.says)):
        if not re.search(pattern, said):
            raise SoakFailed(f"{kind.name}: {pattern!r} was never said:\n{said}")
    lost = sum(trial.lost[known:])
    if kind.lossless and lost:
        raise SoakFailed(f"{kind.name}: {lost} steps were lost:\n{said}")
    by = "hand" if trial.starts > starts else "itself"
    return Survived(kind.name, step, at, by, lost, time.monotonic() - injured, injury.note)


def _make_shards(out: Path) -> Path:
    tree = write_tree(out / "coco", 24)
    for split in ("train", "val"):
        tree.pack(out / "shards", split, max_size=40_960)
    return out / "shards"


def _train_heads(shards: Path, out: Path) -> None:
    """Two steps of stage 1, by one process without any launcher."""
    settings = {**TINY, "scheduler.params.total_num_steps": 2, "scheduler.params.warmup_num_steps": 1}
    run_ranks(["launchers/train.py", *_arguments(1, shards, out, settings)], world=1)


def _arguments(stage: int, shards: Path, out: Path, settings: dict[str, object]) -> list[str]:
    given = ["--stage", str(stage), "--model", "debug", "--data", str(shards), "--out", str(out)]
    return [*given, *words_of(settings)]


def _command(shards: Path, heads: Path, out: Path, steps: int) -> list[str]:
    """Stage 2 on two processes of this machine, started again as often as they are lost."""
    settings = {**SETTINGS, "visft.heads.path": str(heads), "scheduler.params.total_num_steps": steps}
    restarting = [sys.executable, "-m", "tests.soak.restart"]
    return [*restarting, "train", *_arguments(2, shards, out, settings)]


def _undisturbed(out: Path, run: partial[list[str]], steps: int) -> float:
    """Seconds that the run takes if it is left alone."""
    began = time.monotonic()
    with Trial(run(out, steps), out, out.with_suffix(".log")) as trial:
        trial.start()
        trial.wait_for(lambda: trial.ended, "the end of the undisturbed run", seconds=3600)
        if code := trial.wait_for_end():
            raise SoakFailed(f"the undisturbed run ended with {code}. The last lines:\n{trial.tail()}")
    return time.monotonic() - began


def _tell(text: str) -> None:
    print(f"[soak] {text}", file=sys.stderr, flush=True)
