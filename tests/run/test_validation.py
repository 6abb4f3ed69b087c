"""Evaluation during training: every number once, pictures, and a judge that may be slow or fail without any harm."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.coco_tree import write_tree
from tests.ranks import REPOSITORY, finish, start_ranks
from tests.tiny import TINY
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.records import read_evaluation
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import METRICS_FILE, MetricsWriter
from visft_ds.prepare.model import prepare_model
from visft_ds.prepare.streams import vocabulary_of
from visft_ds.resilience.stop import Stop, StopFlag
from visft_ds.run.judge import Judge, Verdict, judged
from visft_ds.run.log import RunLog
from visft_ds.run.validation import Validation
from visft_ds.shards.build import Options, build
from visft_ds.tasks import TASKS, shown_metrics
from visft_ds.tasks.vocabulary import Vocabulary

SETTINGS = {
    **TINY,
    "visft.tasks.captioning.decoding.max_length": 5,
    "scheduler.params.warmup_num_steps": 2,
    "visft.run.save_every": 4,
    "visft.run.eval_every": 2,
    "visft.run.pictures": 1,
    "visft.run.log_every": 1,
}
PROMPT = 600  # seconds within which things happen on a busy machine


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures to learn from, six others to be judged by."""
    folder = tmp_path_factory.mktemp("coco")
    for split, count in (("train", 12), ("val", 6)):
        tree = write_tree(folder / split, count)
        build(Options(tree.images, tree.instances, tree.captions, folder / "shards", split))
    return folder / "shards"


def _settings(total: int = 4) -> list[str]:
    values = {**SETTINGS, "scheduler.params.total_num_steps": total}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _command(shards: Path, out: Path, *extra: str, total: int = 4) -> list[str]:
    paths = ["--data", str(shards), "--out", str(out)]
    settings = [f"--set={setting}" for setting in [*_settings(total), *extra]]
    return ["launchers/train.py", "--stage", "1", "--model", "debug", *paths, *settings]


def _hold_judge(of: subprocess.Popen[str]) -> int:
    """Wait until a process has started a judge and stop that in its tracks; returns its id."""
    until = time.monotonic() + PROMPT
    while time.monotonic() < until:
        assert of.poll() is None, of.stdout and of.stdout.read()
        for children in Path(f"/proc/{of.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                if b"visft_ds.run.judge" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGSTOP)
                    return int(child)
        time.sleep(0.02)
    raise AssertionError("no judge was started")


def _read_to(process: subprocess.Popen[str], text: str) -> list[str]:
    """What a process prints, up to a line that contains `text`."""
    assert process.stdout is not None
    seen = []
    watchdog = threading.Timer(2 * PROMPT, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            seen.append(line)
            if text in line:
                return seen
    finally:
        watchdog.cancel()
    raise AssertionError(f"{text!r} never came:\n" + "".join(seen))


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]


def _judged(out: Path) -> dict[int, dict[str, float]]:
    """Step -> its numbers; each step may have them only once."""
    found = [r for r in _records(out) if any(name.startswith("val/") for name in r)]
    assert max(Counter(record["step"] for record in found).values(), default=1) == 1
    return {r["step"]: {name: value for name, value in r.items() if name.startswith("val/")} for r in found}


@dataclass(frozen=True)
class Held:
    """A run of four steps on two ranks, whose first judge did nothing until everything else was done."""

    out: Path
    judged_before: int  #: evaluations that had numbers then
    alone: bool  #: whether the second rank ended while the main process waited for the judge
    printed: str


@pytest.fixture(scope="module")
def held(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Held:
    out = tmp_path_factory.mktemp("runs") / "held"
    processes = start_ranks(_command(shards, out))
    judge = None
    try:
        judge = _hold_judge(processes[0])
        printed = _read_to(processes[0], "saved step 4")
        processes[1].wait(PROMPT)
        alone = processes[0].poll() is None
        before = len(_judged(out))
    finally:
        if judge is None:
            finish(processes, 0.1)
        else:
            os.kill(judge, signal.SIGCONT)
    codes, outputs = finish(processes, PROMPT)
    assert codes == [0, 0], outputs
    return Held(out, before, alone, "".join(printed) + outputs[0])


def test_nobody_waits_for_the_judge(held: Held) -> None:
    """Steps, the next evaluation, saving and the end of the other rank all come before the first number."""
    assert held.judged_before == 0 and held.alone
    lines = held.printed.splitlines()
    last, first = (next(n for n, line in enumerate(lines) if text in line) for text in ("step 4/4", "step 2 v"))
    assert last < first


def test_numbers_of_every_evaluation_are_recorded(held: Held) -> None:
    judged = _judged(held.out)
    assert list(judged) == [2, 4]
    for numbers in judged.values():
        assert {name.split("/")[1] for name in numbers} == {"box", "mask", "caption"} and len(numbers) > 15
    lines = [line for line in held.printed.splitlines() if re.match(r"step \d+ validation: ", line)]
    assert [line.split()[1] for line in lines] == ["2", "4"]
    for line, numbers in zip(lines, judged.values(), strict=True):
        told = [f"{name} {numbers[f'val/{name}']:.3f}" for name in shown_metrics()]
        assert line.split("validation: ")[1] == "  ".join(told)


def test_tensorboard_has_pictures_and_numbers(held: Held) -> None:
    events = EventAccumulator(str(held.out / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    assert sorted(tag.split("/")[0] for tag in tags["images"]) == sorted(TASKS)
    for tag in tags["images"]:
        pictures = events.Images(tag)
        assert [picture.step for picture in pictures] == [0, 2, 4]
        assert all(picture.width > 448 for picture in pictures)  # two panels
    assert [event.step for event in events.Scalars("val/mask/AP50")] == [2, 4]
    # Numbers that come late hide nothing.
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4]
    assert all(event.value > 0 for event in events.Scalars("memory/peak_gib"))
    for task in TASKS:  # which share their steps
        assert [event.step for event in events.Scalars(f"images_per_second/{task}")] == [1, 2, 3, 4]
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("captioning/captions/text_summary")
    ]
    assert [step for step, _ in texts] == [2, 4] and all(re.match(r"\d+: ", text) for _, text in texts)
    assert '"seed": ' in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()


def test_the_last_numbers_are_those_of_the_evaluation_tool(held: Held, tmp_path: Path) -> None:
    """What training exported, evaluated by the command: the same model, the same images, the same numbers."""
    status = evaluate(["--run", str(held.out), "--out", str(tmp_path / "out"), "--images", "0"])
    assert status == 0
    found = read_evaluation("", tmp_path / "out")
    wanted = {name.removeprefix("val/"): value for name, value in _judged(held.out)[4].items()}
    # float32 rounding of other batch sizes; the numbers have no categories
    assert {name: found.metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert any(value > 0 for name, value in wanted.items() if name.startswith("caption/"))


@dataclass(frozen=True)
class Parts:
    """What a `Validation` is made of."""

    config: ResolvedConfig
    manifest: Manifest
    vocabulary: Vocabulary

    def validation(self, out: Path) -> Validation:
        streams = self.config.visft.streams()
        return Validation(self.config.visft, streams, self.manifest, self.vocabulary, out)


@pytest.fixture(scope="module")
def parts(shards: Path) -> Parts:
    config = resolve(stage=1, model="debug", settings=_settings())
    vocabulary = vocabulary_of(config.visft, Manifest.load(shards, "train"))
    assert vocabulary is not None
    return Parts(config, Manifest.load(shards, "val"), vocabulary)


def judge_here(judge: Judge, step: int, order: bytes) -> Verdict:
    """In place of `Judge._judge`, since another process takes seconds to start."""
    found = json.loads(judged(order))
    return Verdict(step, found["metrics"], tuple(found["problems"]))


def test_numbers_of_a_part_of_the_images_say_so(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(stage=1, model="debug", settings=[*_settings(), "visft.run.eval_limit=2"]).visft
    validation, printed = (
        Validation(config, config.streams(), parts.manifest, parts.vocabulary, tmp_path),
        io.StringIO(),
    )
    verdict = Verdict(2, dict.fromkeys(shown_metrics(), 0.5))
    monkeypatch.setattr(validation._judge, "verdicts", lambda *, seconds: [verdict])
    with MetricsWriter(tmp_path) as writer:
        validation.poll(RunLog(writer, Progress(4, stream=printed)))
    assert "step 2 validation on 2 of 6 images: " in printed.getvalue()


def test_predictions_that_are_not_finite(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning, the other tasks' numbers, and the run goes on."""
    monkeypatch.setattr(Judge, "_judge", judge_here)
    prepared = prepare_model(parts.config.visft, parts.config.optimizer.params, vocabulary=parts.vocabulary)
    module = prepared.module.eval()
    with torch.no_grad():
        for parameter in module.heads["detection"].parameters():
            parameter.fill_(float("nan"))
    validation, printed = parts.validation(tmp_path), io.StringIO()
    with MetricsWriter(tmp_path) as writer, torch.no_grad():
        log, stop = RunLog(writer, Progress(4, stream=printed)), StopFlag(launched=False)
        assert validation.evaluate(lambda batch: module(batch), 2, log, stop)
        validation.poll(log, seconds=None)
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step 2 failed: detection" in warning
    assert {name.split("/")[1] for name in _judged(tmp_path)[2]} == {"mask", "caption"}
    assert "mask/AP" in printed.getvalue() and "box/AP" not in printed.getvalue()


def test_a_request_to_stop_ends_an_evaluation_between_two_batches(parts: Parts, tmp_path: Path) -> None:
    """It leaves no results: the run that goes on from this step evaluates it as a whole."""
    validation, stop, seen = parts.validation(tmp_path), StopFlag(launched=False), []
    prepared = prepare_model(parts.config.visft, parts.config.optimizer.params, vocabulary=parts.vocabulary)
    module = prepared.module.eval()

    def predict(batch: Batch) -> dict[str, Any]:
        seen.append(batch)
        stop.reason = Stop.SIGTERM
        return dict(module(batch))

    with MetricsWriter(tmp_path) as writer, torch.no_grad():
        finished = validation.evaluate(predict, 2, RunLog(writer, Progress(4, stream=io.StringIO())), stop)
        assert validation._judge.verdicts(seconds=None) == []
    assert (finished, len(seen)) == (False, 1)


def test_a_judge_that_cannot_work_is_a_warning(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = parts.validation(tmp_path)
    for step, program in ((2, "exit 0"), (4, "echo Traceback >&2; echo MemoryError: no room >&2; exit 1")):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        validation._judge.start(step, {"captioning": []})
        with MetricsWriter(tmp_path) as writer:
            validation.poll(RunLog(writer, Progress(6, stream=io.StringIO())), seconds=None)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: the evaluation of step 2 failed: ")
    assert second == "warning: the evaluation of step 4 failed: MemoryError: no room"


def test_an_interrupted_run_owes_an_evaluation_without_numbers(parts: Parts, tmp_path: Path) -> None:
    records = [{"kind": "step", "step": step, name: 1.0} for step, name in ((2, "loss/loss"), (2, "val/box/AP"))]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    validation = parts.validation(tmp_path)
    assert [validation.is_missing(step, 9) for step in (2, 3, 4)] == [False, False, True]


def test_what_is_being_measured_ends_with_the_run(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    judge = Judge(parts.manifest, None)
    judge.start(2, {"captioning": []})
    judge.start(4, {"captioning": []})
    assert judge.verdicts(seconds=0.5) == [] and judge.close() == 2
    judge._thread.shutdown(wait=True)  # it does not wait for ten minutes


@pytest.mark.slow
def test_a_judge_ends_with_its_training_process(parts: Parts) -> None:
    """However that ends."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-m', 'visft_ds.run.judge', sys.argv[1]]"
    code = f"import os, sys; sys.argv[1:] = [str(os.getpid())]; {code}, stdin=subprocess.PIPE); time.sleep(600)"
    training = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        until = time.monotonic() + PROMPT
        found: list[psutil.Process] = []
        while not found and time.monotonic() < until:
            found = psutil.Process(training.pid).children()
            time.sleep(0.05)
        (judge,) = found
    finally:
        training.kill()
        training.wait()
    assert psutil.wait_procs([judge], timeout=PROMPT)[1] == []
