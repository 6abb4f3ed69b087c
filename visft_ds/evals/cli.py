"""Flags of visft evaluate. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from visft_ds import program
from visft_ds.config.cli import BACKBONE_HELP, DOWNLOAD_HELP
from visft_ds.config.schema import PRESETS
from visft_ds.flags import Parser
from visft_ds.redaction import redacted

USAGE = """Box AP, mask AP and caption metrics of a run, or of any backbone + heads (+ adapter), with pictures.

    visft evaluate --run runs/stage2-debug
    visft evaluate --run runs/stage2-debug --backbone merged.safetensors --out evaluation/merged
    visft evaluate --backbone base.safetensors --heads runs/stage1-eva_e/export --adapter none \\
        --coco COCO --out evaluation/base
    deepspeed --num_gpus 8 --module visft_ds evaluate --run runs/stage2-eva_e
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
#: Word behind visft evaluate -> module of what it does.
_COMMANDS = {"benchmarks": "command", "dose": "dose_command", "layers": "layers_command"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    place = 1 if words and words[0].startswith("--local_rank=") else 0  # the deepspeed launcher puts it in front
    if (module := _COMMANDS.get("".join(words[place : place + 1]))) is not None:
        run = import_module(f"visft_ds.evals.benchmarks.{module}").run
        return int(run(words[:place] + words[place + 1 :]))
    given = vars(_parser().parse_args(words))
    del given["local_rank"]
    from visft_ds.resilience.errors import tell
    from visft_ds.run.folder import recorded_config, refuse_filled

    try:
        given["recorded"] = recorded_config(given["run"]).visft if given["run"] is not None else None
        if given["out"] is None and given["recorded"] is not None:
            given["out"] = given["run"] / f"evaluation-{given['split'] or given['recorded'].data.val}"
        if given["out"] is not None:
            refuse_filled(given["out"])
        from visft_ds.evals.evaluate import Request, answer

        problems = answer(Request(**given, command=True)).problems
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    for problem in problems:
        print(f"evaluate: {redacted(problem)}", file=sys.stderr, flush=True)
    return 2 if problems else 0


def report(arguments: Sequence[str]) -> int:
    """Run `visft report`; returns the exit status."""
    parser = Parser(prog=program("report"), description=REPORT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of visft train")
    parser.add_argument("--benchmarks", type=Path, metavar="DIR", help="what visft evaluate benchmarks wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="name it .html (default, of one run: RUN/report.html)")
    given = parser.parse_args(arguments)
    from visft_ds.evals.report import report_runs
    from visft_ds.resilience.errors import tell

    try:
        print(f"wrote {report_runs(given.runs, given.benchmarks, given.out)}")
    except (ValueError, OSError) as error:
        return tell(error, "report")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("evaluate"), description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model: a run, and files that replace the run's")
    model.add_argument("--run", type=Path, metavar="RUN", help="folder of a finished run, or RUN/checkpoints/step_N")
    model.add_argument("--backbone", metavar="NAME|FILE", help=BACKBONE_HELP)
    model.add_argument("--download", action="store_true", help=DOWNLOAD_HELP)
    model.add_argument(
        "--heads", type=Path, metavar="DIR", help="folder of heads: RUN/export, or ViSFT's published files"
    )
    model.add_argument("--adapter", metavar="DIR", help="adapter folder (RUN/export/adapter), or none")
    model.add_argument(
        "--allow-other-base", action="store_true", help="go on although the heads learnt from another base"
    )
    model.add_argument("--model", choices=sorted(PRESETS), help="preset, where the backbone file does not tell")
    model.add_argument("--tasks", metavar="A,B", help="default: every task that has a head")
    model.add_argument("--vocabulary", type=Path, metavar="FILE", help="word map of a published captioning head")
    model.add_argument("--beam-size", type=int, metavar="N", help="of captions (default: the run's, or 1: greedy)")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: the run's, or auto")
    data = parser.add_argument_group("data: by default the run's")
    data.add_argument("--data", metavar="DIR|URL", help="shards made by visft shards")
    data.add_argument("--coco", type=Path, metavar="DIR", help="a COCO tree, packed on the fly, or shards")
    data.add_argument("--split", metavar="NAME", help="default: the run's validation split, or val")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="resize to squares (default: as the run)")
    data.add_argument("--batch-size", type=int, metavar="N", help="of one process (default: the run's, or 8)")
    data.add_argument("--threads", type=int, default=2, metavar="N", help="that decode (default %(default)s)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="DIR", help="new or empty folder (default RUN/evaluation-SPLIT)")
    out.add_argument("--images", type=int, default=8, metavar="N", help="pictures to draw (default %(default)s)")
    out.add_argument("--threshold", type=float, default=0.5, help="least score in pictures (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    return parser
