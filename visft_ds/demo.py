"""The whole way in small: images -> shards -> stage 1 -> stage 2 -> evaluation -> merged weights -> report.

Boxes, masks and captions: stage 1 trains the heads of all three, stage 2 the backbone under them.

    visft demo --out demo                      EfficientNet-Lite0 with ImageNet weights, on drawings; judged on others
    visft demo --out demo_debug --model debug  a random tower of EVA-ViT's kind: the way alone, nothing to refine
    visft demo --out demo_coco --coco FOLDER   the same on an ordinary COCO tree: train2017/ val2017/ annotations/

Every command is printed before it runs and can be run by hand; whole outputs are in OUT/logs. An interrupted demo goes
on where it stopped. Exit status: 0 fine, 1 a step failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from visft_ds import program
from visft_ds.config import resolve
from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Finite, read_record
from visft_ds.config.task_schema import SHARED
from visft_ds.flags import EVAL, Parser, check_extra, check_least
from visft_ds.redaction import redacted
from visft_ds.resilience.processes import same_code

if TYPE_CHECKING:
    from visft_ds.data.shards import Manifest

MARKER, FORMAT = "demo.json", "visft_ds demo"
#: Models (files of ds_configs/models) -> images to generate; the first begins with ImageNet weights.
PRETRAINED, RANDOM = "lite0", "debug"
TRAIN = {PRETRAINED: 1000, RANDOM: 6000}
#: Images of another style that probes learn from, and that are judged, for each one that is trained on.
PROBED = 0.4, 0.25
#: The number that decides whether the demo shows something, named before anything is run.
BENCHMARK = "style-b"
PRIMARY = f"dense/{BENCHMARK} objects knn"
#: A COCO tree with fewer photographs to train on is also evaluated on these: nothing can be learnt about others.
FEW, STEPS_FOR_FEW = 1000, 800
#: Held-out images that are judged and drawn for TensorBoard at the end of each training.
VALIDATION_IMAGES = 16
_EVEN = ("--size", "224", "--colours", "even")  # colours that tell shapes would be all that is asked for
TAIL = 15  # lines of a log that are shown when a step fails
#: Lines of children that stay in the log: the launcher's chatter, and by kind of step what is no result.
NOISE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING|ERROR)\] ")
HIDDEN_OF_SHARDS = re.compile(r" {3,}")
HIDDEN_OF_TRAINING = re.compile(r"-- |   ")
HIDDEN_OF_EVALUATION = re.compile(r"== |-- |   (?!(box|mask)/AP |(box|mask)/AP50 |caption/(CIDEr|BLEU-4) |images/s)")
HIDDEN_OF_BENCHMARKS = re.compile(r"== |-- |   (?!dense/)")
PROGRESS = re.compile(r"step (\d+)/(\d+) ")
SECONDS_BETWEEN_LINES = 5.0  # of a training's progress


class StepFailed(Exception):
    """A child ended with an error."""


@dataclass
class Demo:
    """The folder, what is finished in it, and how steps are run."""

    out: Path
    cores: int
    environment: Mapping[str, str]
    arguments: Mapping[str, Any]  #: what decides about the results
    finished: dict[str, float] = field(default_factory=dict)  #: step -> its seconds
    steps: int = 10  #: of the whole demo
    number: int = 0
    redo: bool = False  #: a step ran, so all that follow it must too

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        makes: Path | None = None,
        processes: int = 1,
        hide: re.Pattern[str] | None = None,
    ) -> None:
        """Run one command, unless this folder holds its result already.

        Args:
            makes: what the command refuses to overwrite; removed first if an interrupted run left it.
            processes: how many the command starts; the cores are divided among them.
            hide: pattern of lines that are not shown.

        Raises:
            StepFailed: non-zero exit.
        """
        self.number += 1
        print(f"\n[{self.number}/{self.steps}] {name}", flush=True)
        if name in self.finished and not self.redo:
            print(f"  finished before, in {self.finished[name]:.0f} s")
            return
        self.redo = True
        self.finished.pop(name, None)
        self.save()
        if makes is not None and makes.exists():
            _remove(makes)
        command_line = list(command)
        if processes > 1:
            command_line[1:1] = ["--num_gpus", str(processes), "--master_port", str(_free_port())]
        print(f"  $ {_shown(command_line)}", flush=True)
        log = self.out / "logs" / f"{self.number:02}-{name.replace(' ', '-')}.log"
        environment = {**same_code(), **self.environment, "OMP_NUM_THREADS": str(max(1, self.cores // processes))}
        began = time.perf_counter()
        code = _stream(command_line, environment, log, hide)
        seconds = time.perf_counter() - began
        if code:
            logged = log.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [f"  | {line}" for line in logged if not NOISE.match(line)][-TAIL:]
            from visft_ds.evals.demo import short_path

            raise StepFailed(
                f"{name} ended with exit status {code}; the end of {short_path(log)}:\n" + "\n".join(lines)
            )
        print(f"  {seconds:.0f} s")
        self.finished[name] = round(seconds, 1)
        self.save()

    def save(self) -> None:
        """Write the marker file: this folder is a demo's, and what is finished in it."""
        text = json.dumps({"format": FORMAT, "arguments": self.arguments, "finished": self.finished}, indent=1)
        temporary = self.out / f"{MARKER}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.out / MARKER)


class DemoFile(StrictModel):
    """Content of the marker file."""

    format: Literal["visft_ds demo"]
    arguments: dict[str, Any]
    finished: dict[str, Finite]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    given = _parser().parse_args(arguments)
    began = time.perf_counter()
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # else children would outlive a demo that is ended
        if signal.getsignal(sign) != signal.SIG_IGN:  # nohup
            signal.signal(sign, _interrupt)
    try:
        demo = _open(given)
        _steps(demo, given)
        print(f"\n[{demo.steps}/{demo.steps}] report", flush=True)
        from visft_ds.evals.demo import show_demo

        seconds = time.perf_counter() - began
        show_demo(demo.out, demo.finished, photographs=given.coco, seconds=seconds)
    except (ValueError, OSError) as error:
        print(f"demo: {redacted(error)}", file=sys.stderr)
        return 2
    except StepFailed as error:
        print(f"demo: {redacted(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("demo"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="train on this COCO tree instead of generated images")
    parser.add_argument("--processes", type=int, metavar="N", help="of each training (default: 2, or 1 with one GPU)")
    parser.add_argument("--force", action="store_true", help="remove what an earlier demo left in --out first")
    parser.add_argument("--model", choices=TRAIN, help=f"default {PRETRAINED}; with --coco {RANDOM}")
    counts = ", ".join(f"{count} of {model}" for model, count in TRAIN.items())
    parser.add_argument("--train", type=int, metavar="N", help=f"images to generate (default {counts})")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="held-out ones (default %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to both trainings; repeatable"
    )
    return parser


def _open(given: argparse.Namespace) -> Demo:
    """Check the arguments and the folder.

    Raises:
        ValueError: a folder that no demo made, a tree that is not COCO's, no images.
    """
    check_least(given, train=1, val=1)
    import torch  # the only one who knows whether its GPUs can be used

    gpus = torch.cuda.device_count()  # 0 without any
    if given.processes is None:
        given.processes = min(2, gpus) or 2
    if given.processes < 1 or (gpus and given.processes > gpus):
        raise ValueError(f"--processes {given.processes} is not allowed: give 1 to {gpus or os.cpu_count()}")
    if given.coco is not None:
        _check_tree(given.coco)
    given.model = given.model or (PRETRAINED if given.coco is None else RANDOM)
    if given.coco is not None and given.model != RANDOM:
        raise ValueError(f"--model {given.model} is judged on drawings of another style: leave --coco out")
    if given.train is None:
        given.train = TRAIN[given.model]
    if given.model == PRETRAINED:
        from visft_ds.interop.efficientnet import installed

        check_extra("the demo", "demo", EVAL)  # what is not there is told now, too
        installed()
    for stage in (1, 2):
        resolve(stage=stage, model=given.model, settings=given.set)  # a mistake in --set is told now, not in minutes
    out = given.out
    arguments = {name: getattr(given, name) for name in ("model", "processes", "train", "val", "set")}
    arguments["coco"] = str(given.coco.resolve()) if given.coco else None
    finished: dict[str, float] = {}
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        finished = _earlier(out, arguments, check=not given.force)
        if given.force:
            for path in out.iterdir():
                _remove(path)
            finished = {}
    (out / "logs").mkdir(parents=True, exist_ok=True)
    # Without a GPU DeepSpeed guesses and warns at every start.
    environment = {} if gpus else {"DS_ACCELERATOR": "cpu"}
    demo = Demo(out, os.cpu_count() or 1, environment, arguments, finished)
    demo.save()
    print(f"visft_ds demo in {out}: {gpus or 'no'} GPU(s), {demo.cores} cores, {given.processes} processes a training")
    return demo


def _earlier(out: Path, arguments: Mapping[str, Any], *, check: bool) -> dict[str, float]:
    """The finished steps of an earlier demo in `out`.

    Raises:
        ValueError: the folder was not made by a demo, or (with `check`) by one with other arguments.
    """
    try:
        record = read_record(out / MARKER, DemoFile)
    except ValueError as error:
        raise ValueError(
            f"{out} exists and was not made by this demo (it has no {MARKER}); choose another --out"
        ) from error
    other = [name for name, value in arguments.items() if record.arguments.get(name) != value]
    if check and other:
        there = ", ".join(f"{name} = {record.arguments.get(name)}" for name in other)
        raise ValueError(
            f"{out} holds a demo with other arguments (there: {there}); choose another --out, or --force to remove it"
        )
    return record.finished


def _check_tree(coco: Path) -> None:
    wanted = [coco / f"{split}2017" for split in ("train", "val")]
    wanted += [coco / f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing:
        raise ValueError(
            f"--coco {coco} is no COCO tree, not found: {', '.join(missing)}; needed: train2017/, val2017/ and "
            f"annotations/instances_{{train,val}}2017.json (captions_*.json too, else captioning is left out)"
        )


def _steps(demo: Demo, given: argparse.Namespace) -> None:
    """Every step, in order. A name of a step is also the name of its log."""
    from visft_ds.data.shards import Manifest

    out = demo.out
    coco, shards = given.coco or out / "coco", out / "shards"
    few = given.coco is not None and _are_few(given.coco)
    pretrained = given.model == PRETRAINED
    demo.steps += 2 if few or pretrained else 0
    if given.coco:
        demo.number += 1
        print(f"\n[{demo.number}/{demo.steps}] images: {coco}, nothing to generate")
    else:
        sizes = ["--train", str(given.train), "--val", str(given.val)]
        drawn = [*_visft("toy"), *(_EVEN if pretrained else []), "--out"]
        demo.run("toy images", [*drawn, str(coco), *sizes], makes=coco)
    if pretrained:
        learnt, judged = (str(max(1, round(share * given.train))) for share in PROBED)
        command = [*drawn, str(out / "other"), "--style", "b", "--train", learnt, "--val", judged]
        demo.run("toy images of another style", command, makes=out / "other")
        weights = out / "weights.safetensors"
        from visft_ds.interop.efficientnet import installed

        command = [*_visft("merge"), "--base", str(installed()), "--format", "timm", "--out", str(weights)]
        demo.run("pretrained weights", command, makes=weights)
    for split in ("train", "val"):
        command = [*_visft("shards"), "build", *_tree(coco, split), "--out", str(shards)]
        demo.run(f"{split} shards", command, hide=HIDDEN_OF_SHARDS)
    for stage in (1, 2):
        run = out / f"stage{stage}"
        training = [*_training(given.processes), "--stage", str(stage)]
        training += ["--model", given.model, "--data", str(shards), "--out", str(run)]
        training += ["--set", f"visft.model.weights={out / 'weights.safetensors'}"] if pretrained else []
        training += ["--set", f"visft.features.cache={out / 'features'}"] if pretrained and stage == 1 else []
        training += _settings(stage, Manifest.load(shards, "train"), STEPS_FOR_FEW if few else None, given)
        training += ["--set", f"visft.heads.path={out / 'stage1/export'}"] if stage == 2 else []
        demo.run(f"stage {stage}", training, processes=given.processes, hide=HIDDEN_OF_TRAINING)
        evaluation = out / f"evaluation/stage{stage}"
        command = [*_visft("evaluate"), "--run", str(run), "--out", str(evaluation)]
        demo.run(f"evaluation after stage {stage}", command, makes=evaluation, hide=HIDDEN_OF_EVALUATION)
        if few:
            evaluation = out / f"evaluation/stage{stage}-train"
            command = [*_visft("evaluate"), "--run", str(run), "--split", "train", "--out", str(evaluation)]
            name = f"training images after stage {stage}"
            demo.run(name, command, makes=evaluation, hide=HIDDEN_OF_EVALUATION)
    if pretrained:
        models = [
            part
            for label, stage in (("before", 1), ("after", 2))
            for part in ("--model", f"{label}={out}/stage{stage}")
        ]
        command = [*_visft("evaluate"), "benchmarks", *models, "--benchmark", f"dense={out / 'other'},name={BENCHMARK}"]
        command += ["--benchmark", f"retention={out / 'other/val2017'}"]
        command += ["--primary", PRIMARY, "--images", "8", "--out", str(out / "out_of_domain")]
        demo.run("out of domain", command, hide=HIDDEN_OF_BENCHMARKS)
    merged, evaluation = out / "merged/backbone.safetensors", out / "evaluation/merged"
    base = out / ("weights.safetensors" if pretrained else "stage1/export/backbone.safetensors")
    parts = ["--base", str(base), "--adapter", str(out / "stage2/export/adapter")]
    command = [*_visft("merge"), *parts, "--out", str(merged), "--format", "timm", "--verify"]
    demo.run("merged weights", command, makes=merged)
    if pretrained:  # what they compute was compared in writing them
        return
    command = [*_visft("evaluate"), "--run", str(out / "stage2"), "--backbone", str(merged), "--out", str(evaluation)]
    demo.run("evaluation of the merged weights", command, makes=evaluation, hide=HIDDEN_OF_EVALUATION)


def _visft(command: str) -> list[str]:
    """`visft COMMAND` of this environment, which need not be activated."""
    return [sys.executable, "-m", "visft_ds", command]


def _training(processes: int) -> list[str]:
    """`visft train`, under the `deepspeed` of this environment where there are several processes."""
    if processes == 1:
        return _visft("train")
    installed = Path(sys.executable).with_name("deepspeed")
    found = str(installed) if installed.exists() else shutil.which("deepspeed")
    if found is None:
        raise ValueError("the deepspeed command is not installed: pip install deepspeed brings it")
    return [found, "--module", "visft_ds.launch"]


def _tree(coco: Path, split: str) -> list[str]:
    annotations = coco / "annotations"
    arguments = ["--images", str(coco / f"{split}2017"), "--split", split]
    arguments += ["--instances", str(annotations / f"instances_{split}2017.json")]
    captions = annotations / f"captions_{split}2017.json"
    return [*arguments, *(["--captions", str(captions)] if _has_captions(coco) else [])]


def _has_captions(coco: Path) -> bool:
    """Return True if both splits have captions: what is learnt must be judged too."""
    return all((coco / f"annotations/captions_{split}2017.json").is_file() for split in ("train", "val"))


def _are_few(coco: Path) -> bool:
    """Return True if there are fewer than FEW images to train on; looks at no more than FEW names."""
    with os.scandir(coco / "train2017") as entries:
        return sum(1 for _ in itertools.islice(entries, FEW)) < FEW


def _settings(stage: int, train: Manifest, most_steps: int | None, given: argparse.Namespace) -> list[str]:
    """--set arguments of a training: the user's, and what the data needs.

    A set without captions leaves that task out. Few images need smaller batches and no endless repetition. One
    evaluation at the end of the run, and with it pictures before and after it in TensorBoard, where the user set none.
    """
    from visft_ds.tasks import TASKS

    settings = list(given.set)
    if not len(train.having("captions")):
        settings.append("visft.tasks.captioning=null")
    config = resolve(stage=stage, model=given.model, settings=settings)
    for stream in config.visft.streams().values():
        # Where captions are the only thing to learn from, only images that have some count.
        selections = {TASKS[task].config.learns_from for task in stream.tasks}
        count = len(train if "any" in selections else train.having(selections.pop()))
        if stream.batch_size > count:
            key = "visft.shared" if stream.name == SHARED else f"visft.tasks.{stream.name}"
            settings.append(f"{key}.batch_size={max(1, count // given.processes) * given.processes}")
    steps = config.total_steps
    if most_steps is not None and steps > most_steps:
        steps = most_steps
        settings.append(f"scheduler.params.total_num_steps={steps}")
    for key, value in {"eval_every": steps, "eval_limit": VALIDATION_IMAGES}.items():
        if not any(setting.startswith(f"visft.run.{key}=") for setting in settings):
            settings.append(f"visft.run.{key}={value}")
    return [part for setting in settings for part in ("--set", setting)]


def _free_port() -> int:
    """A port that nobody listens on right now; the launcher's default may belong to another training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _stream(command: Sequence[str], environment: Mapping[str, str], log: Path, hide: re.Pattern[str] | None) -> int:
    """Run a command, everything into the log, what a person wants to see onto the screen; returns its exit status.

    The child gets a process group of its own: an interrupt reaches launcher and ranks together, which then save the
    step they are at.
    """
    shown_at = 0.0
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(environment),
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                step = PROGRESS.match(line)
                if not line.strip() or NOISE.match(line) or (hide and hide.match(line)):
                    continue
                now = time.perf_counter()
                if step and step[1] not in ("1", step[2]) and now - shown_at < SECONDS_BETWEEN_LINES:
                    continue
                shown_at = now if step else shown_at
                print(f"  {line.rstrip()}", flush=True)
        except KeyboardInterrupt:
            file.write(_stop(process))
            raise
    return process.returncode


def _stop(process: subprocess.Popen[str]) -> str:
    """End the group of a child, politely, so that ranks can save, then for certain; returns what they still said."""
    for sign, patience in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):  # raised when nobody of the group is left
            os.killpg(process.pid, sign)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    assert process.stdout is not None
    return process.stdout.read()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _shown(command: Sequence[str]) -> str:
    """The command as a person would type it here."""
    from visft_ds.evals.demo import short_path

    return shlex.join(short_path(part) if part.startswith("/") else part for part in command)
