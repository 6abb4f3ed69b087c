"""Flags of visft ablate. What costs seconds to import is imported when the flags are right."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from visft_ds import program
from visft_ds.demo import PRETRAINED
from visft_ds.experiments.ablations.questions import EXPERIMENT, GAIN, QUESTIONS
from visft_ds.experiments.ablations.scales import SECOND, TOY_MODEL
from visft_ds.flags import Parser
from visft_ds.redaction import redacted

USAGE = """Questions about the recipe, each answered by one command: runs its arms with several seeds, prints what
stage 2 changed in and out of domain with intervals over seeds, and draws it.

    visft ablate heads                        toy scale: images, base weights and all, minutes on two cores
    visft ablate all --out ablations          every question
    visft ablate heads --dry-run              the commands, in order
    visft ablate tasks --model eva_e --processes 8 --data data/coco --benchmark zero_shot=imagenet-a \\
        --benchmark digits                    the same question at full scale

What arms and questions share is done once, and what has finished is kept: the same command goes on after an interrupt,
and more seeds or another question in the same --out cost only themselves. An arm that fails is reported and the others
go on. Exit status: 0 fine, 1 something failed, 2 wrong usage, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = _parser().parse_args(arguments)
    for sign in (signal.SIGTERM, signal.SIGHUP):  # else steps would outlive a comparison that is ended
        if signal.getsignal(sign) != signal.SIG_IGN:  # nohup
            signal.signal(sign, _interrupt)
    try:
        from visft_ds.experiments.ablations.command import ask

        return ask(given)
    except (ValueError, OSError) as error:
        print(f"ablate: {redacted(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nablate: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, QUESTIONS))
    known = {**QUESTIONS, GAIN: EXPERIMENT}
    asked = "\n".join(f"    {name:{width}}  {question.asks}" for name, question in known.items())
    parser = Parser(
        prog=program("ablate"),
        description=f"{USAGE}\nquestions:\n{asked}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("questions", nargs="+", metavar="QUESTION", help=f"one or more, or all (but {GAIN})")
    add("--arms", metavar="A,B", help="only these arms of one question, and its first")
    add("--seeds", type=int, default=3, metavar="N", help="of every arm, from 0 (default %(default)s)")
    add("--out", type=Path, default=Path("ablations"), metavar="DIR", help="default %(default)s")
    add("--jobs", type=int, default=1, metavar="N", help="commands at a time (default %(default)s)")
    add("--dry-run", action="store_true", help="print the commands and stop")
    scale = parser.add_argument_group("scale: the same for all questions of a folder")
    add = scale.add_argument
    add("--model", metavar="NAME", help=f"file of ds_configs/models (default {TOY_MODEL}; of gain {PRETRAINED})")
    add("--base", metavar="timm:NAME=FILE", help="a model of timm with weights, in place of those of --model")
    add("--data", metavar="SHARDS", help="default: toy images that are made on the way")
    add("--second-data", default=SECOND, metavar="SHARDS", help="of the question data (default %(default)s)")
    add("--processes", type=int, default=1, metavar="N", help="of each training (default %(default)s)")
    add("--heads", metavar="DIR", help="stage-1 heads for all seeds instead of training them")
    add("--benchmark", action="append", default=[], metavar="KIND=SOURCE", help="as of visft evaluate benchmarks")
    add("--text", metavar="FILE", help="text tower of the base weights, where they have none")
    add("--vary-base", action="store_true", help="toy base weights for each seed, instead of the same for all")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to every training; repeatable")
    return parser
