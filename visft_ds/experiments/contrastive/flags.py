"""Shared parts of both sub-commands of visft contrast: flags, the reading of data, and the final output."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from visft_ds.evals.benchmarks.retrieval import CaptionSet
from visft_ds.experiments.contrastive.fitting import ContrastiveRecipe
from visft_ds.experiments.contrastive.pairs import PairOrder, read_pairs
from visft_ds.flags import check_extra, check_least
from visft_ds.interop.writing import refuse_existing
from visft_ds.monitor.console import Section, print_plan


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags for data and output."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR|URL", help="shards, COCO tree, Karpathy's or Flickr30k")
    data.add_argument("--split", default="train", help="to learn from (default %(default)s)")
    data.add_argument("--val-data", metavar="DIR|URL", help="to measure recall on (default: --data)")
    data.add_argument("--val-split", default="val", help="of it, or none (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("--log-every", type=int, default=20, metavar="N", help="steps (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it


def add_recipe(parser: argparse.ArgumentParser, default: ContrastiveRecipe) -> None:
    """Add the flags of a `ContrastiveRecipe`."""
    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=int, default=default.steps, metavar="N", help="default %(default)s")
    how.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N", help="default %(default)s")
    how.add_argument("--lr", type=float, default=default.lr, help="highest learning rate (default %(default)s)")
    how.add_argument("--weight-decay", type=float, default=default.weight_decay, help="default %(default)s")
    how.add_argument("--warmup", type=float, default=default.warmup, help="share of the steps (default %(default)s)")
    how.add_argument("--max-norm", type=float, default=default.max_norm, help="of the gradient (default %(default)s)")
    how.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")


def recipe_of(given: argparse.Namespace) -> ContrastiveRecipe:
    """Build the recipe from the flags of `add_recipe`. Raises ValueError for a number out of range."""
    return ContrastiveRecipe(
        given.steps, given.batch_size, given.lr, given.weight_decay, given.warmup, given.max_norm, given.seed
    )


def check_common(given: argparse.Namespace) -> None:
    """Raise ValueError for packages that are missing, an `--out` that exists, nonsense in common flags."""
    check_extra("contrastive training", "eval", ["open_clip"])
    check_least(given, log_every=1)
    refuse_existing(given.out)


def read_sets(given: argparse.Namespace) -> tuple[CaptionSet, CaptionSet | None]:
    """Read the training set and the validation set. Raises ValueError where one of them cannot be read."""
    validation = None
    if given.val_split != "none":
        validation = read_pairs(given.val_data or given.data, given.val_split)
    elif given.val_data:
        raise ValueError("--val-data and --val-split none contradict each other: give one of them")
    return read_pairs(given.data, given.split), validation


def data_section(
    given: argparse.Namespace, train: CaptionSet, validation: CaptionSet | None, order: PairOrder, kept: str
) -> Section:
    """The part of the plan about pairs; `kept` says what becomes of the images."""
    measured = "nothing" if validation is None else f"{len(validation.images)} images"
    return Section(
        "data",
        [
            ("learnt from", f"{len(train.images)} images, {len(train.captions)} captions of {given.split}; {kept}"),
            ("measured on", measured),
            ("steps", f"{given.steps} of {order.batch_size} pairs, {given.steps / order.steps_in_epoch:.1f} epochs"),
        ],
    )


def finished(recalls: Mapping[str, Mapping[str, float]], seconds: float, weights: Path) -> None:
    """Print what came of it."""
    rows = [
        (name, *(f"{100 * numbers[name]:.1f} %" for numbers in recalls.values()))
        for name in next(iter(recalls.values()), {})
    ]
    sections = [Section("recall on images that were not learnt from", rows, ("", *recalls))] if rows else []
    rest = [("seconds", f"{seconds:.1f}"), ("weights", str(weights))]
    print_plan("visft_ds contrastive training: done", [*sections, Section("run", rest)])
