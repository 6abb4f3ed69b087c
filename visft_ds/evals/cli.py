"""Flags of visft evaluate. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from visft_ds import importing
from visft_ds.config.flags import DOWNLOAD_HELP
from visft_ds.evals.judge.kinds import kinds_help
from visft_ds.flags import Parser, add_num_gpus, check_least, command_parser
from visft_ds.predict.cli import add_parts
from visft_ds.run_files import check_exists

USAGE = """Measure box AP, mask AP and caption metrics of a run, or of any backbone + heads (+ adapter).

    visft evaluate runs/stage2 --num_gpus 8
    visft evaluate runs/stage2 --backbone merged.safetensors --out evaluation/merged
    visft evaluate --backbone base.safetensors --heads runs/stage1/export --data SHARDS --out evaluation/base

Writes metrics.json, <task>_results.json (COCO results format) and visualizations/ into a new or empty folder.
With several processes each image is evaluated once. Exit status: 0 fine, 2 wrong usage or unusable input.
"""
REPORT = """Write a page about one run, or about several side by side: one HTML file that needs no network.

    visft report runs/stage2                                     writes runs/stage2/report.html
    visft report runs/stage1 runs/stage2 --out report.html       the others are compared with the first

It shows results (of visft evaluate, otherwise of evaluations during training), visualizations of visft
evaluate, losses by task, learning rates, speed and memory, settings and environment. A run may still be
training. Exit status: 0 fine, 2 wrong usage or unusable input.
"""
LABELS = """Rank labels that a trained run denies, and objects without one, on a page to decide on.

    visft labels runs/stage1                                     its training and validation data
    visft labels runs/stage1 --data OTHER-SHARDS --split train
    visft shards MYFOLDER --corrections corrections-train.json --replace

Writes SPLIT.html (picture, given and proposed label; keys keep, take, delete and skip; it needs no network)
and proposals-SPLIT.json, the corrections if every proposal were taken. The button of the page downloads
corrections-SPLIT.json, which visft shards applies. A score ranks labels; boxes have a cautious probability of
error, too, where there are 100 and the model has learnt enough. Boxes, regions of label maps and captions are
looked at, as far as the run has heads for them. Pictures of the validation
split that are nearly one of the training split are named.

Exit status: 0 fine, 2 wrong usage or unusable input.
"""
JUDGE = f"""Compare further-trained models with their base, on data that neither was trained on.

    visft judge base.pt RUN --on segmentation=ade20k --out OUT
    visft judge base.pt RUN1,RUN2,RUN3 --control P1,P2,P3 --on segmentation=ade20k --on zero_shot=imagenet/val

Runs joined by commas are seeds of one recipe. Features are read after the best block of each model, chosen on
held-out training images. A gain must exceed the best block of the whole of BASE and its last one, noise of
equal feature shift, and every control (such as a run on permuted labels), scaled to that shift. Writes
judge.html, judge.json and cached scores/: another model costs only its own evaluation.

models: [LABEL=]FILE[+ADAPTER], [LABEL=]RUN, [LABEL=]timm:NAME[:FILE][+ADAPTER],
    [LABEL=]open_clip:NAME:WEIGHTS; an adapter is RUN/export/adapter, or a folder of PEFT;
    after a model, #BLOCK names the block to read, and @A scales what training changed by A

kinds of --on (and their keys):
{kinds_help()}
split is judged (default: val, validation or test), train teaches; groups= names what images come from
together, such as patients or videos: FILE.csv:COLUMN, or a regular expression for the images' names; void= is
the number that means no class in label maps with classes.txt, as --void of visft shards

Exit status: 0 judged, whatever the verdict; 2 wrong usage or unusable input.
"""


def main(arguments: Sequence[str]) -> int:
    """Run `visft evaluate`; returns the exit status."""
    parser = command_parser("evaluate", USAGE)
    model = parser.add_argument_group("model: a run, and files that replace the run's")
    _add_run(model)
    add_parts(model)
    model.add_argument(
        "--beam-size", type=int, metavar="N", help="beams of captions (default: the run's, or 1: greedy)"
    )
    add = parser.add_argument_group("data: by default the run's, and results").add_argument
    add("--data", metavar="DIR|URL", help="shards made by visft shards")
    add("--split", metavar="NAME", help="split (default: the run's validation split, or val)")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add(
        "--batch-size", type=int, metavar="N", help="images per batch of a process (default: the run's, or 8)"
    )
    add_num_gpus(parser)
    add("--out", type=Path, metavar="DIR", help="new or empty folder (default RUN/evaluation-SPLIT)")
    add(
        "--visualizations",
        type=int,
        default=8,
        metavar="N",
        help="images to draw, 0 for none (default %(default)s)",
    )
    options = _parsed(parser, arguments)
    options.run = _run(parser, options)

    def work() -> None:
        check_least(options, limit=1, batch_size=1, beam_size=1, visualizations=0)
        if options.run is None and None in (options.backbone, options.heads, options.data, options.out):
            raise ValueError("give a RUN, or --backbone, --heads, --data and --out")
        for model in (options.run, options.heads):
            if model is not None:
                check_exists(model)
        with importing():
            from visft_ds.evals.evaluate import evaluate

        evaluate(**vars(options), command=True)

    return _done("evaluate", work)


def judge(arguments: Sequence[str]) -> int:
    """Run `visft judge`; returns the exit status."""
    parser = command_parser("judge", JUDGE)
    add = parser.add_argument
    add("base", metavar="BASE", help="model that the others are compared with")
    add("tuned", nargs="*", metavar="TUNED", help="a model trained further, or seeds joined by commas")
    add("--run", action="append", default=[], metavar="TUNED", help="the same as a flag; repeatable")
    add("--on", action="append", required=True, metavar="KIND=SOURCE", help="data to judge on; repeatable")
    add(
        "--control",
        action="append",
        default=[],
        metavar="MODEL",
        help="as TUNED, for equal feature shift; repeatable",
    )
    add(
        "--primary",
        metavar="NUMBER",
        help="metric that decides (default: the first of the first segmentation)",
    )
    add(
        "--numbers",
        metavar="A,B",
        help="only these, such as 'in-context mIoU' (default: all that the data give)",
    )
    add("--quick", action="store_true", help="compute features once, at the model's size: minutes, not hours")
    add(
        "--layers",
        choices=("all", "last"),
        default="all",
        help="read the best of all or the last (%(default)s)",
    )
    add("--dry-run", action="store_true", help="print models, data and time, and stop")
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add(
        "--out",
        type=Path,
        default=Path("judge"),
        metavar="DIR",
        help="new, or of an earlier start (%(default)s)",
    )
    add("--cache", type=Path, metavar="DIR", help="scores, shared by several --out (default OUT/scores)")
    add("--device", choices=("auto", "cpu"), default="auto", help="default %(default)s")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default %(default)s")
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch of a process (%(default)s)")
    add_num_gpus(parser)
    options = _parsed(parser, arguments)
    options.tuned += options.run
    if not options.tuned:
        parser.error("missing TUNED")
    with importing():
        from visft_ds.evals.judge.command import run_judge

    return _done("judge", lambda: run_judge(options))


def report(arguments: Sequence[str]) -> int:
    """Run `visft report`; returns the exit status."""
    parser = command_parser("report", REPORT)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run of visft train")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], metavar="RUN", help="the same as a flag; repeatable"
    )
    parser.add_argument("--judge", type=Path, metavar="DIR", help="folder that visft judge wrote")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="a .html file (default for one run: RUN/report.html)"
    )
    options = _parsed(parser, arguments)
    runs = options.runs + options.run
    if not runs:
        parser.error("missing RUN")

    def work() -> None:
        for run in runs:
            check_exists(run)
        from visft_ds.evals.report import report_runs

        print(f"wrote {report_runs(runs, options.judge, options.out)}")

    return _done("report", work)


def labels(arguments: Sequence[str]) -> int:
    """Run `visft labels`; returns the exit status."""
    parser = command_parser("labels", LABELS)
    _add_run(parser)
    add = parser.add_argument
    add("--data", metavar="DIR|URL", help="shards made by visft shards (default: the run's)")
    add("--split", metavar="NAME", help="only this split (default: the run's training and validation split)")
    add("--limit", type=int, metavar="N", help="look at the first N images only")
    add(
        "--most",
        type=int,
        default=200,
        metavar="N",
        help="doubts of each task on a page (default %(default)s)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the pages (default RUN/labels)")
    options = _parsed(parser, arguments)
    options.run = _run(parser, options)
    if options.run is None:
        parser.error("give one run: visft labels RUN")

    def work() -> None:
        check_least(options, limit=1, most=1)
        check_exists(options.run)
        from visft_ds.evals.labels.command import check_labels

        check_labels(**vars(options))

    return _done("labels", work)


def _add_run(group: argparse._ActionsContainer) -> None:
    """Add the run, the first word or a flag."""
    about = "folder of a finished run, or RUN/checkpoints/step_N"
    group.add_argument("first", nargs="?", type=Path, metavar="RUN", help=about)
    group.add_argument("--run", type=Path, metavar="RUN", help="the same as a flag")


def _run(parser: Parser, options: argparse.Namespace) -> Path | None:
    """The run that was given, whichever way."""
    first: Path | None = vars(options).pop("first")
    if first is not None and options.run is not None:
        parser.error(f"two runs: {first} and --run {options.run}; give one of them")
    return first or options.run


def _parsed(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The flags, without the one that deepspeed's launcher adds."""
    return parser.parse_args([word for word in words if not word.startswith("--local_rank=")])


def _done(name: str, work: Callable[[], object]) -> int:
    """Do the work of a command; returns its exit status."""
    from visft_ds.errors import tell

    try:
        work()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        return tell(error, name)
    return 0
