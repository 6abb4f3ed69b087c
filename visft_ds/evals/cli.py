"""Flags of visft evaluate. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from visft_ds import program
from visft_ds.config.cli import BACKBONE_HELP, DOWNLOAD_HELP
from visft_ds.flags import Parser, check_extra

USAGE = """Box AP, mask AP and caption metrics of a run, or of any backbone + heads (+ adapter), with pictures.

    visft evaluate --run runs/stage2 --num_gpus 8
    visft evaluate --run runs/stage2 --backbone merged.safetensors --out evaluation/merged
    visft evaluate --backbone base.safetensors --heads runs/stage1/export --data SHARDS --out evaluation/base
    visft evaluate benchmarks --help        # zero-shot, probes, retrieval, ...: several models in one table
    visft evaluate layers --help            # every block of a model on the same probes
    visft evaluate dose --help              # an adapter at the scale at which it moves features as far as another

Writes metrics.json, <task>_results.json (COCO results format) and pictures/ into a new or empty folder. With several
processes each image is evaluated once. Exit status: 0 fine, 2 wrong usage or unusable input.
"""
REPORT = """A page about one run, or about several side by side: one HTML file that needs no network.

    visft report runs/stage2                                     writes runs/stage2/report.html
    visft report runs/stage1 runs/stage2 --out report.html       the others are compared with the first

It shows results (of visft evaluate, otherwise of the evaluations during training), pictures of visft evaluate, losses
by task, learning rates, speed and memory, settings and environment. A run may still be training. Exit status: 0 fine,
2 wrong usage or unusable input.
"""
BENCHMARKS = """Out-of-domain benchmarks of any number of models, in one table with bootstrap intervals.

    visft evaluate benchmarks --model base=base.pt --model visft=base.pt+RUN/export/adapter \\
        --benchmark zero_shot=imagenet-a --benchmark digits --benchmark retrieval=coco --out OUT
    visft evaluate benchmarks --model base=base.pt --model seeds=RUN1,RUN2,RUN3 --benchmark dense=coco \\
        --benchmark retention=coco --primary "dense/coco objects knn" --out OUT

The other models are compared with the first; runs of one recipe with different seeds are one arm. Scores are kept in
OUT/cache by models and data: another benchmark or model costs only itself.

kinds of benchmarks (and their keys):
    zero_shot  classes by text similarity: folders of classes, ImageNet's family, ObjectNet (split, name)
    probe      kNN, linear probe and few-shot on frozen features: folders of classes, digits (split, train, name)
    retrieval  captions and images: COCO, Karpathy's JSON (split, name)
    objects    names of boxed objects: a COCO tree (split, train, name)
    dense      segmentation and objects by patches: COCO, shards, ADE20k, images/ labels/ (split, train, name)
    retention  predictions of the first model's own classifier that are unchanged: any images (name)
    ocr        words read by a small head: train/ and test/ with gt.txt or labels.txt (name)
"""
LAYERS = """Every block of a model on the same probes, and the best one to read.

    visft evaluate layers --model timm:tf_efficientnet_lite0:FILE --benchmark dense=coco --out OUT

The best block of a number is chosen on one half of the test images and judged on the other, against the end of the
model. `--model M#BLOCK` of visft evaluate benchmarks reads there, `visft.model.layers=[BLOCK]` trains there.
"""
DOSE = """An adapter at the scale at which it moves features as far as another one: arms are compared at equal dose.

    visft evaluate dose --model RUN --like REFERENCE --benchmark dense=coco --out ADAPTER
    visft evaluate dose --like REFERENCE --noise 0 --benchmark dense=coco --out ADAPTER

The dose is |f - f0| / |f0 - mean of f0| on the first test images of the benchmark. With --noise the adapter is
Gaussian noise in place of what REFERENCE learnt, as large in every tensor: a control.
"""
_MODEL = "[LABEL=]FILE[+ADAPTER][@SCALE], [LABEL=]RUN, [LABEL=]open_clip:NAME:WEIGHTS, [LABEL=]timm:NAME[:FILE]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    words = [word for word in words if not word.startswith("--local_rank=")]  # of the deepspeed launcher
    if words and words[0] in _COMMANDS:
        return _out_of_domain(words[0], words[1:])
    given = _parser().parse_args(words)
    from visft_ds.resilience.errors import tell

    try:
        from visft_ds.evals.evaluate import evaluate

        evaluate(**vars(given), command=True)
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    return 0


#: Word behind visft evaluate -> its help, module and function.
_COMMANDS = {
    "benchmarks": (BENCHMARKS, "visft_ds.evals.judge.command", "run_benchmarks"),
    "layers": (LAYERS, "visft_ds.evals.judge.command", "run_layers"),
    "dose": (DOSE, "visft_ds.evals.judge.dose", "run_dose"),
}


def _out_of_domain(command: str, words: Sequence[str]) -> int:
    usage, module, function = _COMMANDS[command]
    parser = Parser(
        prog=f"{program('evaluate')} {command}", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    if command == "dose":
        add("--model", metavar="MODEL", help="RUN or FILE+ADAPTER, whose adapter is scaled")
        add("--noise", type=int, metavar="SEED", help="scale noise instead")
        add("--like", required=True, metavar="MODEL", help="RUN or FILE+ADAPTER, whose dose is wanted")
        add("--benchmark", required=True, metavar="KIND=SOURCE", help="whose test images features are compared on")
    else:
        several = {"action": "append", "help": f"{_MODEL}; LABEL=MODEL,MODEL,... for seeds of one recipe"}
        one = {"help": f"one of {_MODEL}"}
        add("--model", required=True, metavar="MODEL", **(several if command == "benchmarks" else one))
        add("--benchmark", action="append", required=True, metavar="KIND=SOURCE", help="or digits; repeatable")
        decides = 'the number that decides, such as "dense/coco objects knn", named before it is seen; others by Holm'
        chooses = "the number that names the best block (default: the first)"
        add("--primary", metavar="NUMBER", help=decides if command == "benchmarks" else chooses)
    add("--out", type=Path, required=True, metavar="DIR", help="new, empty, or of an earlier start")
    add("--cache", type=Path, metavar="DIR", help="of scores, shared by several --out (default OUT/cache)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default %(default)s")
    add("--batch-size", type=int, default=64, metavar="N", help="of one process (default %(default)s)")
    add("--threads", type=int, default=4, metavar="N", help="that decode (default %(default)s)")
    given = parser.parse_args(words)
    from visft_ds.resilience.errors import tell

    try:
        getattr(import_module(module), function)(given)
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    return 0


def report(arguments: Sequence[str]) -> int:
    """Run `visft report`; returns the exit status."""
    parser = Parser(prog=program("report"), description=REPORT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of visft train")
    parser.add_argument("--benchmarks", type=Path, metavar="DIR", help="what visft evaluate benchmarks wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="name it .html (default, of one run: RUN/report.html)")
    given = parser.parse_args(arguments)
    from visft_ds.resilience.errors import tell

    try:
        check_extra("visft report", "report", ["matplotlib"])
        from visft_ds.evals.report import report_runs

        print(f"wrote {report_runs(given.runs, given.benchmarks, given.out)}")
    except (ValueError, OSError) as error:
        return tell(error, "report")
    return 0


def add_parts(group: argparse._ActionsContainer) -> None:
    """Add the flags that replace parts of a run: backbone, heads, adapter, tasks, vocabulary."""
    add = group.add_argument
    add("--backbone", metavar="NAME|FILE", help=BACKBONE_HELP)
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add("--heads", type=Path, metavar="DIR", help="folder of heads: RUN/export, or ViSFT's published files")
    add("--adapter", metavar="DIR", help="adapter folder (RUN/export/adapter), or none")
    add("--tasks", metavar="A,B", help="default: every task that has a head")
    add("--vocabulary", type=Path, metavar="FILE", help="word map of a published captioning head")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("evaluate"), description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model: a run, and files that replace the run's")
    add = model.add_argument
    add("--run", type=Path, metavar="RUN", help="folder of a finished run, or RUN/checkpoints/step_N")
    add_parts(model)
    add("--beam-size", type=int, metavar="N", help="of captions (default: the run's, or 1: greedy)")
    add = parser.add_argument_group("data: by default the run's, and results").add_argument
    add("--data", metavar="DIR|URL", help="shards made by visft shards")
    add("--split", metavar="NAME", help="default: the run's validation split, or val")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--batch-size", type=int, metavar="N", help="of one process (default: the run's, or 8)")
    add("--out", type=Path, metavar="DIR", help="new or empty folder (default RUN/evaluation-SPLIT)")
    add("--images", type=int, default=8, metavar="N", help="pictures to draw (default %(default)s)")
    return parser
