import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
USAGE = """The whole way in small: images -> shards -> stage 1 -> stage 2 -> evaluation -> merged weights -> report.

    python tools/demo.py --out demo                      a generated toy set, a few minutes on two cores
    python tools/demo.py --out demo_coco --coco FOLDER   an ordinary COCO tree: train2017/ val2017/ annotations/

Every command is printed before it runs and can be run by hand; whole outputs are in OUT/logs. An interrupted demo goes
on where it stopped. Exit status: 0 fine, 1 a step failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visft_ds.config import resolve
from visft_ds.data.manifest import Manifest
from visft_ds.evals.pictures import save_png
from visft_ds.evals.report import Report, compare_results, comparison, read_evaluation, write_report
from visft_ds.interop.files import open_weights
from visft_ds.interop.layouts import find_layout, tower_in
from visft_ds.interop.timm import create_model_call
from visft_ds.monitor.console import Section, print_plan

ROOT = Path(__file__).resolve().parents[1]
MARKER, FORMAT = "demo.json", "visft_ds demo"
STEPS = 10
TAIL = 15  # lines of a log that are shown when a step fails
#: Lines of children that stay in the log: the launcher's chatter, and by kind of step what is no result.
NOISE = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\] ")
HIDDEN_OF_SHARDS = re.compile(r" {3,}")
HIDDEN_OF_TRAINING = re.compile(r"-- |   ")
HIDDEN_OF_EVALUATION = re.compile(r"== |-- |   (?!box/AP |box/AP50|images/s)")
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
        print(f"\n[{self.number}/{STEPS}] {name}", flush=True)
        if name in self.finished and not self.redo:
            print(f"  finished before, in {self.finished[name]:.0f} s")
            return
        self.redo = True
        self.finished.pop(name, None)
        self.save()
        if makes is not None and makes.exists():
            _remove(makes)
        if processes > 1:
            command_line = [
                *command[:1],
                "--num_gpus",
                str(processes),
                "--master_port",
                str(_free_port()),
                *command[1:],
            ]
        else:
            command_line = list(command)
        print(f"  $ {_shown(command_line)}", flush=True)
        log = self.out / "logs" / f"{self.number:02}-{name.replace(' ', '-')}.log"
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": str(max(1, self.cores // processes))}
        began = time.perf_counter()
        code = _stream(command_line, environment, log, hide)
        seconds = time.perf_counter() - began
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [f"  | {line}" for line in said if not NOISE.match(line)][-TAIL:]
            raise StepFailed(f"{name} ended with exit status {code}; the end of {_short(log)}:\n" + "\n".join(lines))
        print(f"  {seconds:.0f} s")
        self.finished[name] = round(seconds, 1)
        self.save()

    def save(self) -> None:
        """Write the marker file: this folder is a demo's, and what is finished in it."""
        text = json.dumps({"format": FORMAT, "arguments": self.arguments, "finished": self.finished}, indent=1)
        temporary = self.out / f"{MARKER}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.out / MARKER)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    given = _parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        demo = _open(given)
        _steps(demo, given)
        _finish(demo, given, time.perf_counter() - began)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except StepFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="train on this COCO tree instead of generated images")
    parser.add_argument("--processes", type=int, metavar="N", help="of each training (default: 2, or 1 with one GPU)")
    parser.add_argument("--force", action="store_true", help="remove what an earlier demo left in --out first")
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="images to generate (default %(default)s)")
    parser.add_argument("--val", type=int, default=200, metavar="N", help="held-out ones (default %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to both trainings; repeatable"
    )
    return parser


def _open(given: argparse.Namespace) -> Demo:
    """Check the arguments and the folder.

    Raises:
        ValueError: a folder that no demo made, or a tree that is not COCO's.
    """
    import torch  # the only one who knows whether its GPUs can be used

    gpus = torch.cuda.device_count()  # 0 without any
    if given.processes is None:
        given.processes = min(2, gpus) or 2
    if given.processes < 1 or (gpus and given.processes > gpus):
        raise ValueError(f"--processes {given.processes} is not allowed: give 1 to {gpus or os.cpu_count()}")
    if given.coco is not None:
        _check_tree(given.coco)
    for stage in (1, 2):
        resolve(stage=stage, model="debug", settings=given.set)  # a mistake in --set is told now, not in minutes
    out = given.out
    arguments = {name: getattr(given, name) for name in ("processes", "train", "val", "set")}
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
        record = json.loads((out / MARKER).read_text(encoding="utf-8"))
        known = record["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{out} exists and was not made by this demo (it has no {MARKER}); choose another --out")
    other = [name for name, value in arguments.items() if record["arguments"].get(name) != value]
    if check and other:
        there = ", ".join(f"{name} = {record['arguments'].get(name)}" for name in other)
        raise ValueError(
            f"{out} holds a demo with other arguments (there: {there}); choose another --out, or --force to remove it"
        )
    return dict(record["finished"])


def _check_tree(coco: Path) -> None:
    wanted = [coco / f"{split}2017" for split in ("train", "val")]
    wanted += [coco / f"annotations/instances_{split}2017.json" for split in ("train", "val")]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing:
        raise ValueError(
            f"--coco {coco} is no COCO tree, not found: {', '.join(missing)}; needed: train2017/, val2017/ and "
            f"annotations/instances_{{train,val}}2017.json (captions_*.json too, where there are any)"
        )


def _steps(demo: Demo, given: argparse.Namespace) -> None:
    """Every step, in order. A name of a step is also the name of its log."""
    out = demo.out
    coco, shards = given.coco or out / "coco", out / "shards"
    if given.coco:
        demo.number += 1
        print(f"\n[{demo.number}/{STEPS}] images: {coco}, nothing to generate")
    else:
        sizes = ["--train", str(given.train), "--val", str(given.val)]
        demo.run("toy images", [*_tool("make_toy_coco"), "--out", str(coco), *sizes], makes=coco)
    for split in ("train", "val"):
        command = [*_tool("make_shards"), "build", *_tree(coco, split), "--out", str(shards)]
        demo.run(f"{split} shards", command, hide=HIDDEN_OF_SHARDS)
    for stage in (1, 2):
        run = out / f"stage{stage}"
        training = [*_launcher(given.processes), str(ROOT / "launchers/train.py"), "--stage", str(stage)]
        training += ["--model", "debug", "--data", str(shards), "--out", str(run), *_settings(stage, shards, given)]
        training += ["--set", f"visft.heads.path={out / 'stage1/export'}"] if stage == 2 else []
        demo.run(f"stage {stage}", training, processes=given.processes, hide=HIDDEN_OF_TRAINING)
        evaluation = out / f"evaluation/stage{stage}"
        command = [*_tool("evaluate"), "--run", str(run), "--out", str(evaluation)]
        demo.run(f"evaluation after stage {stage}", command, makes=evaluation, hide=HIDDEN_OF_EVALUATION)
    merged, evaluation = out / "merged/backbone.safetensors", out / "evaluation/merged"
    parts = ["--base", str(out / "stage1/export/backbone.safetensors"), "--adapter", str(out / "stage2/export/adapter")]
    command = [*_tool("merge_lora"), *parts, "--out", str(merged), "--format", "timm", "--verify"]
    demo.run("merged weights", command, makes=merged)
    command = [*_tool("evaluate"), "--run", str(out / "stage2"), "--backbone", str(merged), "--out", str(evaluation)]
    demo.run("evaluation of the merged weights", command, makes=evaluation, hide=HIDDEN_OF_EVALUATION)


def _tool(name: str) -> list[str]:
    return [sys.executable, str(ROOT / f"tools/{name}.py")]


def _launcher(processes: int) -> list[str]:
    """`deepspeed` of this environment, which need not be activated; one process needs no launcher."""
    if processes == 1:
        return [sys.executable]
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ValueError("the deepspeed command is not installed: pip install -e .")
    return [found]


def _tree(coco: Path, split: str) -> list[str]:
    annotations = coco / "annotations"
    arguments = ["--images", str(coco / f"{split}2017"), "--split", split]
    arguments += ["--instances", str(annotations / f"instances_{split}2017.json")]
    captions = annotations / f"captions_{split}2017.json"
    return [*arguments, *(["--captions", str(captions)] if captions.is_file() else [])]


def _settings(stage: int, shards: Path, given: argparse.Namespace) -> list[str]:
    """--set arguments of a training: the user's, and smaller batches where there are fewer images than one holds."""
    count = len(Manifest.load(shards, "train"))
    config = resolve(stage=stage, model="debug", settings=given.set)
    settings = [
        f"visft.tasks.{name}.batch_size={max(1, count // given.processes) * given.processes}"
        for name, task in config.visft.tasks.enabled().items()
        if task.batch_size > count
    ]
    return [part for setting in [*given.set, *settings] for part in ("--set", setting)]


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
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(environment),
            start_new_session=True,
        )
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
            return process.wait()
        except KeyboardInterrupt:
            file.write(_stop(process))
            raise


def _stop(process: "subprocess.Popen[str]") -> str:
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


def _short(path: Path | str) -> str:
    """A path as one would type it here. Links are not followed: python of an environment is a link out of it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _shown(command: Sequence[str]) -> str:
    """The command as a person would type it here."""
    return shlex.join(_short(part) if part.startswith("/") else part for part in command)


def _finish(demo: Demo, given: argparse.Namespace, seconds: float) -> None:
    """Report and closing table."""
    out = demo.out
    after = [read_evaluation(f"after stage {stage}", out / f"evaluation/stage{stage}") for stage in (1, 2)]
    merged = read_evaluation("merged", out / "evaluation/merged")
    weights = out / "merged/backbone.safetensors"
    files = {
        "heads": out / "stage1/export/detection.safetensors",
        "adapter (PEFT)": out / "stage2/export/adapter",
        "merged weights (timm)": weights,
        "results": out / "evaluation/stage2/detection_results.json",
        "pictures": out / "evaluation/stage2/pictures",
        "comparison": out / "comparison.png",
        "report": out / "report.html",
    }
    print(f"\n[{STEPS}/{STEPS}] report", flush=True)
    report = Report(
        title="visft_ds demo",
        introduction=_introduction(given, len(Manifest.load(out / "shards", "train"))),
        runs={"stage 1": out / "stage1", "stage 2": out / "stage2"},
        evaluations=after,
        merged=merged,
        files={name: Path(_short(path)) for name, path in files.items()},
        commands=_next_commands(out, weights),
        seconds=demo.finished,
    )
    write_report(files["report"], report)
    sheet = comparison(report)
    if sheet is not None:
        save_png(sheet, files["comparison"])
    rows = []
    for name in ("box/AP", "box/AP50"):
        first, second = (one.metrics[name] for one in after)
        rows.append((name, f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}", f"{merged.metrics[name]:.3f}"))
    durations = [(name, f"{value:.0f}") for name, value in demo.finished.items()]
    durations.append(("all, now", f"{seconds:.0f}"))
    sections = [
        Section("held-out images", rows, ("", *(one.label for one in after), "difference", "merged")),
        Section("merged weights against the adapter", [("detection", compare_results(after[1], merged).text())]),
        Section("seconds", durations),
        Section("files", [(name, _short(path)) for name, path in files.items()]),
    ]
    print()
    print_plan("visft_ds demo: done", sections)


def _introduction(given: argparse.Namespace, images: int) -> list[str]:
    what = f"{images} photographs of {given.coco}" if given.coco else f"{images} generated images of textured shapes"
    return [
        f"Both stages of ViSFT on {what}: first a detection head on a frozen backbone, then LoRA adapters inside the "
        f"backbone under the frozen head.",
        "The backbone is tiny and starts from random weights, so the numbers show that the whole way works, not how "
        "good ViSFT makes a pretrained backbone."
        + (" So few images teach little about new ones." if given.coco and images < 10_000 else ""),
    ]


def _next_commands(out: Path, weights: Path) -> dict[str, str]:
    file = open_weights(weights)
    load = [
        "import timm",
        "from safetensors.torch import load_file",
        "",
        f"model = {create_model_call(tower_in(file, find_layout(file)))}",
        f'weights = load_file("{_short(weights)}")',
        'weights["pos_embed"] = weights["pos_embed"][:, 1:]  # this backbone has no class token',
        "model.load_state_dict(weights)",
    ]
    train = "\n".join(f"deepspeed --num_gpus 8 launchers/train.py --stage {stage}" for stage in (1, 2))
    return {
        "Losses of both stages in TensorBoard:": f"tensorboard --logdir {_short(out)}",
        "The merged weights in timm:": "\n".join(load),
        "The real thing, EVA-ViT-E on COCO; each command says what it still needs and how to make it:": train,
    }


if __name__ == "__main__":
    sys.exit(main())
