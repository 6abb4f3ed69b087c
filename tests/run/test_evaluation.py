"""Evaluation during training: every number once, pictures, and a process beside that may be slow or
killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
from collections import Counter, deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.coco_tree import write_shards
from tests.ranks import finish, start_ranks, wait_for
from tests.tiny import SETTINGS, THREE, Here, command, records
from visft_ds.config import ResolvedConfig, changed, resolve
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.records import read_evaluation
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.prepare.data import RunData, vocabulary_of
from visft_ds.prepare.datasets import TrainingSet
from visft_ds.prepare.model import prepare_model
from visft_ds.resilience import watchdog
from visft_ds.resilience.stop import Stop, StopFlag
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.run.evaluation import Validation
from visft_ds.run.log import RunLog
from visft_ds.tasks import shown_metrics
from visft_ds.tasks.vocabulary import Vocabulary

EXTRA: dict[str, object] = {
    "visft.tasks.captioning.decoding.max_length": 5,
    "scheduler.params.total_num_steps": 4,
    "visft.run.eval_every": 2,
    "visft.run.visualizations": 1,
}
PROMPT = 600  # seconds within which things happen on a busy machine


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures to learn from, six others to be judged by."""
    return write_shards(tmp_path_factory.mktemp("coco"), train=12, val=6)


def _measuring(training: int) -> psutil.Process:
    """The process that measures for a training process, once there is one."""
    until = time.monotonic() + PROMPT
    while time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child that ends meanwhile
            for server in psutil.Process(training).children():
                if "forkserver" in " ".join(server.cmdline()) and (found := server.children()):
                    return found[0]
        time.sleep(0.02)
    raise AssertionError("nothing was measured")


def _judged(out: Path) -> dict[int, dict[str, float]]:
    """Step -> its numbers; each step may have them only once."""
    found = [r for r in records(out) if any(name.startswith("val/") for name in r)]
    assert max(Counter(record["step"] for record in found).values(), default=1) == 1
    return {r["step"]: {name: value for name, value in r.items() if name.startswith("val/")} for r in found}


@dataclass(frozen=True)
class Held:
    """A run of four steps on two ranks, whose first numbers came after everything else was done."""

    out: Path
    judged_before: int  #: evaluations that had numbers then
    alone: bool  #: whether the second rank ended while the main process waited for numbers
    printed: str


@pytest.fixture(scope="module")
def held(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Held:
    out = tmp_path_factory.mktemp("runs") / "held"
    processes = start_ranks(["launchers/train.py", *command(shards, out, extra=EXTRA)])
    measuring = _measuring(processes[0].pid)
    measuring.suspend()
    try:
        printed = wait_for(processes[0], "saved step 4")
        processes[1].wait(PROMPT)
        alone = processes[0].poll() is None
        before = len(_judged(out))
    finally:
        measuring.resume()
        codes, outputs = finish(processes, PROMPT)
    assert codes == [0, 0], outputs
    return Held(out, before, alone, "".join(printed) + outputs[0])


def test_nobody_waits_for_the_numbers(held: Held) -> None:
    """Steps, the next evaluation, saving and the end of the other rank all come before the first number."""
    assert held.judged_before == 0 and held.alone
    lines = held.printed.splitlines()
    last, first = (
        next(n for n, line in enumerate(lines) if text in line) for text in ("step 4/4", "step 2 v")
    )
    assert last < first


def test_numbers_of_every_evaluation_are_recorded(held: Held) -> None:
    judged = _judged(held.out)
    assert list(judged) == [2, 4]
    for numbers in judged.values():
        assert {name.split("/")[1] for name in numbers} == {"box", "mask", "caption"} and len(numbers) > 15
    lines = [line for line in held.printed.splitlines() if re.match(r"step \d+ validation: ", line)]
    assert [line.split()[1] for line in lines] == ["2", "4"]
    for line, numbers in zip(lines, judged.values(), strict=True):
        told = [
            f"{name} {numbers[f'val/{name}']:.3f}" for name in shown_metrics() if f"val/{name}" in numbers
        ]
        assert line.split("validation: ")[1] == "  ".join(told)


def test_tensorboard_has_pictures_and_numbers(held: Held) -> None:
    events = EventAccumulator(str(held.out / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    assert sorted(tag.split("/")[1] for tag in tags["images"]) == sorted(THREE)
    for tag in tags["images"]:
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [0, 2, 4]
        assert all(picture.width > 448 for picture in pictures)  # two panels
    assert [event.step for event in events.Scalars("metrics/mask/AP50")] == [2, 4]
    # Numbers that come late hide nothing.
    assert [event.step for event in events.Scalars("losses/loss")] == [1, 2, 3, 4]
    assert all(event.value > 0 for event in events.Scalars("memory/peak_gib"))
    for task in THREE:  # which share their steps
        assert [event.step for event in events.Scalars(f"speed/images_per_second/{task}")] == [1, 2, 3, 4]


def test_the_last_numbers_are_those_of_the_evaluation_tool(held: Held, tmp_path: Path) -> None:
    """What training exported, evaluated by the command: the same model, the same images, the same numbers."""
    status = evaluate(["--run", str(held.out), "--out", str(tmp_path / "out"), "--visualizations", "0"])
    assert status == 0
    actual = read_evaluation("", tmp_path / "out")
    expected = {name.removeprefix("val/"): value for name, value in _judged(held.out)[4].items()}
    # float32 rounding of other batch sizes; the numbers have no categories
    assert {name: actual.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert any(value > 0 for name, value in expected.items() if name.startswith("caption/"))


@dataclass(frozen=True)
class Parts:
    """What a `Validation` is made of."""

    config: ResolvedConfig
    manifest: Manifest
    vocabulary: Vocabulary

    def validation(
        self,
        writer: MetricsWriter,
        predict: Any = None,
        *settings: str,
        printed: io.StringIO | None = None,
        stop: StopFlag | None = None,
        dog: Watchdog | None = None,
    ) -> Validation:
        config = changed(self.config, settings).visft
        data = SimpleNamespace(streams=config.streams(), validation=self.manifest, vocabulary=self.vocabulary)
        log = RunLog(writer, Progress(6, stream=printed or io.StringIO()))
        if stop is None:
            stop = StopFlag(launched=False)
        return Validation(config, cast(RunData, data), predict, log, stop, dog or Watchdog(0, 0.0))


@pytest.fixture(scope="module")
def parts(shards: Path) -> Parts:
    settings = [f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, **EXTRA}.items()]
    config = resolve(stage=1, model="debug", settings=settings)
    vocabulary = vocabulary_of(
        config.visft, {"train": TrainingSet(Manifest.load(shards, "train"), ("captioning",))}
    )
    assert vocabulary is not None
    return Parts(config, Manifest.load(shards, "val"), vocabulary)


class Deadly:
    """Ends the process that unpickles it, as a lack of memory does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_predictions_that_are_not_finite(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, the other tasks' numbers, and the run continues."""
    prepared = prepare_model(parts.config, vocabulary=parts.vocabulary)
    module = prepared.module.eval()
    with torch.no_grad():
        for parameter in module.heads["detection"].parameters():
            parameter.fill_(float("nan"))
    monkeypatch.setattr("visft_ds.run.evaluation.ProcessPoolExecutor", Here)
    printed = io.StringIO()
    with MetricsWriter(tmp_path) as writer, torch.no_grad():
        validation = parts.validation(writer, module, "visft.run.eval_limit=2", printed=printed)
        assert validation.evaluate(2)
        validation.poll(seconds=None)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step 2 failed: detection" in warning
    assert {name.split("/")[1] for name in _judged(tmp_path)[2]} == {"mask", "caption"}
    assert "step 2 validation on 2 of 6 images: " in printed.getvalue()
    assert "mask/AP" in printed.getvalue() and "box/AP" not in printed.getvalue()


def test_a_request_to_stop_ends_an_evaluation_between_two_batches(parts: Parts, tmp_path: Path) -> None:
    """It leaves no results: a run that is resumed at this step evaluates it as a whole."""
    stop, seen = StopFlag(launched=False), []
    prepared = prepare_model(parts.config, vocabulary=parts.vocabulary)
    module = prepared.module.eval()

    def predict(batch: Batch) -> dict[str, Any]:
        seen.append(batch)
        stop.reason = Stop.SIGTERM
        return dict(module(batch))

    with MetricsWriter(tmp_path) as writer, torch.no_grad():
        validation = parts.validation(writer, predict, stop=stop)
        assert not validation.evaluate(2)
    assert len(seen) == 1 and not validation._waiting


def test_a_request_to_stop_ends_the_wait_for_numbers(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, numbers = StopFlag(launched=False), {"box/AP": 0.5}
    monkeypatch.setattr("visft_ds.run.evaluation.ProcessPoolExecutor", Here)
    released = threading.Event()
    monkeypatch.setattr(
        "visft_ds.run.evaluation.measure", lambda *_, **__: released.wait(PROMPT) and (numbers, [])
    )
    with MetricsWriter(tmp_path) as writer:
        validation, reason = parts.validation(writer, stop=stop), stop.reason
        validation.measure(2, {})
        threading.Timer(0.3, lambda: setattr(stop, "reason", Stop.SIGTERM)).start()
        assert not validation.wait_for_all() and not (tmp_path / "metrics.jsonl").exists()
        stop.reason = reason
        released.set()
        assert validation.wait_for_all()
    assert _judged(tmp_path) == {2: {"val/box/AP": 0.5}}


def test_an_evaluation_that_hangs_is_noticed(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch has the time of a step: an evaluation may take hours, a rank that waits for another one may
    not.
    """
    dog, ended, begun = Watchdog(0, 0.0), threading.Event(), list[float]()
    monkeypatch.setattr(watchdog, "_LOOK", 0.01)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())

    def predict(batch: Batch) -> dict[str, Any]:
        begun.append(dog._since)
        if len(begun) == 2:
            dog.timeout = 0.05
            assert ended.wait(60)
            raise InterruptedError
        return {}

    monkeypatch.setattr(
        "visft_ds.run.evaluation.collect", lambda predict, *_, **__: [predict(batch) for batch in "ab"]
    )
    with MetricsWriter(tmp_path) as writer, pytest.raises(InterruptedError), dog.watching():
        parts.validation(writer, predict, dog=dog).evaluate(2)
    assert begun[0] < begun[1] and "evaluating after step 2" in capsys.readouterr().err


def test_a_killed_process_is_started_anew_once(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it measures (step 2), while it has nothing to do (4), and again and again (6), which costs its
    numbers.
    """

    def kill() -> None:
        assert validation._pool is not None and validation._pool._processes is not None
        (process,) = validation._pool._processes.values()
        process.kill()
        process.join()

    printed = io.StringIO()
    results = [{"image_id": int(one), "caption": "a cat"} for one in parts.manifest.index["image_id"]]
    with (
        MetricsWriter(tmp_path) as writer,
        closing(parts.validation(writer, printed=printed)) as validation,
    ):
        validation.measure(2, {"captioning": results})
        kill()
        validation.poll(seconds=None)
        kill()
        validation.measure(4, {"captioning": results})
        validation.poll(seconds=None)
        assert not capsys.readouterr().err
        # Its results end whoever measures them.
        validation.measure(6, {"captioning": [{"image_id": Deadly()}]})
        validation.poll(seconds=None)
        validation.measure(8, {"captioning": []})
    (warning,) = capsys.readouterr().err.splitlines()
    assert "the evaluation of step 6 failed" in warning and "killed twice" in warning
    assert [line.split()[1] for line in printed.getvalue().splitlines() if "validation" in line] == ["2", "4"]
    assert validation._waiting == deque()
