"""`fit` and `evaluate` in one process and in two: the run of the command line, and nothing left behind."""

from __future__ import annotations

import atexit
import doctest
import gc
import inspect
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

import visft_ds
from tests import finished
from tests.ranks import REPOSITORY, finish, python, run_ranks, start_ranks
from tests.tiny import TINY, Here, steps_recorded
from visft_ds import FitResult, evaluate, fit
from visft_ds.data.loader import StepLoader
from visft_ds.interop.heads import open_head
from visft_ds.monitor.metrics import read_metrics
from visft_ds.resilience.stop import Stop
from visft_ds.run.evaluation import Measured

#: Of torch and DeepSpeed, at their first use in a process.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
SHARDS = finished.shards()
STEPS = 3
SETTINGS: dict[str, Any] = {
    **TINY,
    "scheduler.params.total_num_steps": STEPS,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.save_every": 2,
}
#: Early stopping; heads of so few steps find nothing: of equal numbers the first is the best.
EARLY: dict[str, Any] = {
    "visft.mode": "sampled",
    "visft.tasks": "detection",
    "optimizer.params.lr": 1e-6,
    "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.total_num_steps": 8,
    "visft.run.save_every": 1,
    "visft.run.eval_every": 1,
    "visft.run.eval_limit": 2,
    "visft.run.visualizations": 0,
    "visft.run.keep_best": "box/AP50",
    "visft.run.patience": 2,
}
#: A script of one's own: both stages, under the ranks of a launcher as well. `seen` is what its callback was
#: told.
SCRIPT = f"""
import json, sys
from pathlib import Path
from visft_ds import fit
out, engines, fails = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:] == ["fails"]
settings = json.loads({json.dumps(json.dumps(SETTINGS))})

def follow(step, metrics):
    print("told", step, flush=True)
    if fails and step == 2:
        raise LookupError("mine")

heads = None
for number, engine in enumerate(engines):
    more = {{"visft.heads.path": heads.export, "visft.lora.rank": 2}} if heads else {{}}
    run = fit(stage=2 if heads else 1, model="debug", engine=engine, data={str(SHARDS)!r}, out=out / str(number),
              settings={{**settings, **more}}, callbacks=[follow])
    heads = heads or run
print("ended", run.step, run.finished)
"""


class Told:
    """Remembers what it was told; may do something at a step, whose answer it gives."""

    def __init__(self, at: int = 0, does: Any = None) -> None:
        self.steps: list[int] = []
        self.evaluations: list[tuple[int, set[str]]] = []
        self._at, self._does = at, does

    def __call__(self, step: int, metrics: Mapping[str, float]) -> object:
        if "val/box/AP" in metrics:
            self.evaluations.append((step, set(metrics)))
            return None
        assert metrics["loss/loss"] > 0
        self.steps.append(step)
        return self._does() if step == self._at else "no answer"


def stage1(out: Path, told: Told | None = None, **more: Any) -> FitResult:
    callbacks = [told] if told else []
    return fit(stage=1, model="debug", data=SHARDS, out=out, settings=SETTINGS | more, callbacks=callbacks)


def models_alive() -> int:
    gc.collect()
    return sum(type(thing).__name__ == "MultiTaskModel" for thing in gc.get_objects())


@pytest.fixture(scope="module", autouse=True)
def _as_it_was() -> Any:
    """`fit` keeps the process group for the next call; other tests of this process do not see it.

    It is not left before the end: DeepSpeed keeps it in globals, and a test of another file may train.

    It collects garbage twice a call, and need not look through what DeepSpeed has imported by then.
    """
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - for every engine

    import visft_ds.train  # noqa: F401
    from visft_ds import distributed

    gc.freeze()
    yield
    group = distributed_c10d._get_default_group()
    distributed_c10d._update_default_pg(None)
    distributed.kept_open = False
    atexit.register(torch.distributed.destroy_process_group, group)


@pytest.fixture(autouse=True)
def _measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are measured in this process: another one takes seconds to start."""
    monkeypatch.setattr("visft_ds.run.evaluation.ProcessPoolExecutor", Here)


def test_both_stages_and_their_evaluation_in_one_process(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    environment, told, alive = dict(os.environ), Told(), models_alive()
    heads = stage1(tmp_path / "heads", told, **{"visft.run.eval_every": STEPS})
    assert heads.finished and heads.step == STEPS and (heads.export / "detection.safetensors").is_file()
    assert told.steps == [1, 2, 3] and [step for step, _ in told.evaluations] == [STEPS]
    recorded = list(read_metrics(heads.out / "metrics.jsonl"))
    losses = [record["loss/loss"] for record in recorded if "loss/loss" in record]
    assert heads.metrics["loss/loss"] == losses[-1] and "val/box/AP" in heads.metrics
    assert models_alive() == alive, "the next run would not find its memory"

    more = {"visft.heads.path": heads.export, "visft.lora.rank": 2}
    tuned = fit(stage=2, model="debug", data=SHARDS, out=tmp_path / "tuned", settings=SETTINGS | more)
    assert tuned.finished and (tuned.export / "adapter" / "adapter_config.json").is_file()
    assert models_alive() == alive
    assert os.environ == environment
    assert [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    ] == handlers

    found = evaluate(tuned.out, tasks=["detection"], limit=2, split="val")
    assert found.metrics.keys() >= {"box/AP", "box/AP50"} and list(found.results) == ["detection"]
    assert found.out is None and not list(tuned.out.glob("evaluation*"))
    written = evaluate(
        tuned.out, tasks=["detection"], limit=2, split="val", out=tmp_path / "numbers", visualizations=0
    )
    assert written.metrics == found.metrics and (tmp_path / "numbers" / "metrics.json").is_file()


def full(*_: object) -> None:
    raise OSError("no room")


def test_ctrl_c_stops_after_the_step_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background
    told = Told(at=1, does=lambda: signal.raise_signal(signal.SIGINT))
    stopped = stage1(tmp_path, told)
    assert (stopped.finished, stopped.step) == (False, 2)
    assert (tmp_path / "checkpoints/step_00000002/state.json").is_file()
    assert signal.getsignal(signal.SIGINT) is handler
    began = json.loads((tmp_path / "run.json").read_text())["started"]
    monkeypatch.setattr("time.strftime", lambda form: "later")
    told = Told()
    assert stage1(tmp_path, told).finished and told.steps == [3]
    assert json.loads((tmp_path / "run.json").read_text())["started"] == began

    names = ("run.json", "export/export.json", "export/detection.safetensors")
    before = {name: (tmp_path / name).stat() for name in names}
    with monkeypatch.context() as failing:
        failing.setattr("visft_ds.train.print_start", full)
        with pytest.raises(OSError, match="no room"):
            stage1(tmp_path)
    again = stage1(tmp_path)
    assert again.finished and again.step == STEPS and again.metrics["loss/loss"] > 0, "known without a step"
    assert {name: (tmp_path / name).stat() for name in names} == before, "nothing was left to do"


def test_a_callback_ends_the_run_which_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The batches that were read ahead end with it: nobody else would end their workers, for which a process
    waits at its end.
    """
    opened: list[Generator[Any, None, None]] = []
    steps = StepLoader.steps

    def follow(*given: Any) -> Generator[Any, None, None]:
        opened.append(steps(*given))
        return opened[-1]

    monkeypatch.setattr(StepLoader, "steps", follow)
    told = Told(at=1, does=lambda: np.float32(0.5) < 1)
    ended = stage1(tmp_path, told)
    assert [inspect.getgeneratorstate(batches) for batches in opened] == [inspect.GEN_CLOSED]
    assert (ended.finished, ended.step, ended.stopped) == (True, 2, Stop.NOT) and told.steps == [1, 2]
    assert (ended.export / "export.json").is_file()
    assert "a callback ends the run after step 2" in capfd.readouterr().out
    longer = stage1(tmp_path)
    assert (longer.finished, longer.step) == (True, STEPS)
    assert json.loads((tmp_path / "run.json").read_text())["command"][:2] == ["visft", "train"]


def test_fit_refuses_in_words_of_its_own(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"stage": 3}, "stage=3 is not allowed: give one of 1, 2"),
        ({"steps": 0}, r"= 0 \(steps\): must be greater"),
        ({"steps": "four"}, "steps=.four. is not"),
        ({"steps": 2.5}, r"steps=.2\.5. is not allowed: give a whole number"),
        ({"steps": 2, "epochs": 1}, "epochs and steps do not go together"),
        ({"batch_size": True}, "batch_size=.True. is"),
        ({"lr": "fast"}, "lr=.fast. is not allowed: give a number"),
        ({"lr": -1}, r"= -1.0 \(lr\): must be greater than 0"),
        ({"lr": True}, "lr=.True. is"),
        ({"tasks": "detection,pose"}, "no settings of a task 'pose'"),
        ({"tasks": [1]}, "visft.tasks = 1 .*must be an object"),
        ({"model": "debugg"}, "model=.debugg.: no .json file.*did you mean debug"),
        ({"engine": "zero9"}, "engine=.zero9.: no .json"),
        ({"heads": 5}, r"= .5. \(heads\): must be null in stage 1"),
        ({"start": tmp_path / "absent"}, "start=.*absent.: no such run"),
        ({"reset_heads": True}, "reset_heads=True needs start=RUN"),
        ({"resume": "yes"}, "resume=.yes. is not allowed: give one of .auto"),
        ({"callbacks": print}, "callbacks=.*: give a list of functions"),
        ({"callbacks": [7]}, r"callbacks=.7.: give a list"),
        ({"settings": "visft.seed=1"}, "settings is of type str: give a dict"),
        ({"settings": {"visft.seed": object()}}, r"settings\['visft.seed'\] is of type object"),
        ({"settings": {"visft.sed": 1}}, r"visft.sed \(settings\): unknown key; did you mean visft.seed"),
        ({"data": tmp_path}, "holds none.*give data=.*-shards.*visft shards"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"(?s){message}") as error:
            fit(**{"data": SHARDS, "stage": 1, "model": "debug", "out": tmp_path / "out", **wrong})
        assert not re.search("(?<!shards )--[a-z]", str(error.value).split("make them with")[0])
    with pytest.raises(ValueError, match="missing stage=1"):
        fit()
    with pytest.raises(ValueError, match="give run, or backbone, heads and data"):
        evaluate()
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_callback_is_raised_and_the_process_can_train_again(tmp_path: Path) -> None:
    def fails() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as error:
        stage1(tmp_path, Told(at=2, does=fails))
    assert error.traceback[-1].name == "fails"
    del error
    ended: list[FitResult] = []
    thread = threading.Thread(target=lambda: ended.append(stage1(tmp_path)))  # which hears no signals
    thread.start()
    thread.join()
    assert ended and ended[0].finished


class _Shown(doctest.OutputChecker):
    """What an example shows has to be right; what `fit` prints it need not show."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def test_the_example_of_each_public_name_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/stage2").symlink_to(finished.runs() / "stage2")
    (tmp_path / "shards").symlink_to(SHARDS)
    Image.linear_gradient("L").resize((56, 56)).convert("RGB").save(tmp_path / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(_Shown(), optionflags=doctest.FAIL_FAST)
    names = {"visft_ds": visft_ds, "torch": torch, "numpy": np}
    objects = [getattr(visft_ds, name) for name in visft_ds._PUBLIC]
    for documented in [*objects, visft_ds.Model.predict]:
        (example,) = finder.find(documented, documented.__qualname__, globs=names)
        assert example.examples, f"{example.name} has no example"
        assert not runner.run(example, clear_globs=False).failed
        names = example.globs  # a result is an argument of another


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    script = text.partition("## Train and evaluate\n")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "train.py").write_text(script, encoding="utf-8")
    (tmp_path / "shards").symlink_to(SHARDS)
    printed = python("train.py", folder=tmp_path)
    assert printed.count("\n4: ") == 4, printed


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["zero1,zero1,zero3", "pipeline,zero1"])
def test_one_script_trains_again_and_again_on_two_ranks(engines: str, tmp_path: Path) -> None:
    outputs = run_ranks(["-c", SCRIPT, str(tmp_path), engines])
    assert [output.count("told 3") for output in outputs] == [len(engines.split(",")), 0]
    assert all(f"ended {STEPS} True" in output for output in outputs)


@pytest.mark.slow
def test_an_error_of_the_main_process_ends_the_others(tmp_path: Path) -> None:
    codes, outputs = finish(start_ranks(["-c", SCRIPT, str(tmp_path), "zero1", "fails"]), timeout=600)
    assert codes == [1, 1], outputs
    assert outputs[0].rstrip().endswith("LookupError: mine") and "another rank ended first" in outputs[1]


def test_a_signal_before_the_last_evaluation_leaves_that_to_the_next_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The steps are done; launchers kill 30 s after a signal, so that nothing is exported or predicted any
    more.
    """
    told = Told(STEPS, lambda: signal.raise_signal(signal.SIGUSR1))
    more = {"visft.run.eval_every": STEPS, "visft.data.val": "train"}
    ended = stage1(tmp_path / "run", told, **more)
    assert not ended.finished and ended.step == STEPS and ended.stopped is Stop.SIGUSR1
    assert not (ended.export / "export.json").exists()
    out = capfd.readouterr().out
    assert f"stopped after step {STEPS} (signal SIGUSR1); the same command continues" in out
    assert told.evaluations == []
    for evaluated in ([STEPS], []):
        again = Told()
        ended = stage1(tmp_path / "run", again, **more)
        assert ended.finished and not ended.stopped and [step for step, _ in again.evaluations] == evaluated
        assert (ended.export / "export.json").is_file()
        assert capfd.readouterr().out.count("on training images") == 2 * len(evaluated)


@pytest.mark.slow
def test_a_signal_while_numbers_are_measured_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export waits for the numbers that choose it; the next call measures again and exports the same."""

    def slow(*_: object, **__: object) -> Measured:
        os.kill(os.getpid(), signal.SIGTERM)
        assert released.wait(600)
        return {}, []

    released = threading.Event()
    more = {"visft.run.eval_every": STEPS, "visft.run.save_every": STEPS, "visft.run.keep_best": "box/AP50"}
    monkeypatch.setattr("visft_ds.run.evaluation._PATIENCE", 0.1)
    with monkeypatch.context() as held:
        held.setattr("visft_ds.run.evaluation.measure", slow)
        ended = stage1(tmp_path, **more)
    released.set()
    assert (
        not ended.finished and ended.stopped is Stop.SIGTERM and not (ended.export / "export.json").exists()
    )
    told = Told()
    ended = stage1(tmp_path, told, **more)
    assert ended.finished and not ended.stopped and [step for step, _ in told.evaluations] == [STEPS]


def test_it_stops_early_and_exports_at_the_same_step_after_an_interruption(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`visft.run.patience`; what is exported is the best checkpoint; the last start finds nothing left to
    do.
    """
    told = "early stopping after step 3: 2 evaluations without a better box/AP50 than that of step 1 (visft.run.patience)"
    for number in range(3):
        if number == 1:  # it was killed before it saved the last one
            shutil.rmtree(tmp_path / "checkpoints/step_00000003")
            (tmp_path / "export/detection.safetensors").unlink()
        ended = stage1(tmp_path, **EARLY)
        printed = capfd.readouterr().out
        assert (ended.finished, ended.step) == (True, 3) and told in printed
        assert number == 2 or "exporting step 1, the best by box/AP50" in printed
        assert {*steps_recorded(tmp_path)} == {1, 2, 3} and (
            tmp_path / "export/detection.safetensors"
        ).is_file()
    exported = load_file(tmp_path / "export/detection.safetensors")
    best, last = (load_file(tmp_path / f"checkpoints/step_0000000{n}/parameters.safetensors") for n in (1, 3))
    assert all(torch.equal(best[f"heads.detection.{name}"], value) for name, value in exported.items())
    assert any(not torch.equal(last[f"heads.detection.{name}"], value) for name, value in exported.items())
    assert open_head(tmp_path / "export/detection.safetensors", "detection").info.extra["step"] == 1
