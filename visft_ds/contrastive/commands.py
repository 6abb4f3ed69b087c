"""The sub-commands of tools/contrast.py: their flags, and what they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visft_ds.contrastive.fitting import Recipe
from visft_ds.contrastive.pairs import PairOrder, read_pairs
from visft_ds.contrastive.pretrain import DEFAULT_RECIPE, Pretraining, build, check_memory, pretrain
from visft_ds.contrastive.recall import table
from visft_ds.evals.benchmarks.retrieval import CaptionSet
from visft_ds.interop.clip_models import TextShape
from visft_ds.interop.writing import refuse_existing
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Section, print_plan

_EXTRA = ("open_clip", "timm")  # as they are imported


def add_pretrain_parser(commands: Any) -> None:
    """`pretrain`."""
    parser = commands.add_parser("pretrain", help="a small CLIP from random weights, as base weights of toy runs")
    _add_data(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=sorted(PRESETS), default="debug", help="vision tower (default %(default)s)")
    model.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="of the tower: width=128, ..."
    )
    shape = TextShape()
    model.add_argument("--text-width", type=int, default=shape.width, help="default %(default)s")
    model.add_argument("--text-layers", type=int, default=shape.layers, help="default %(default)s")
    model.add_argument("--context-length", type=int, default=shape.context_length, help="tokens, default %(default)s")
    model.add_argument("--embedding", type=int, default=shape.embedding, help="of both sides, default %(default)s")
    _add_recipe(parser, DEFAULT_RECIPE)
    parser.set_defaults(run=run_pretrain)


def run_pretrain(given: argparse.Namespace) -> None:
    """Pretrain. Raises ValueError for whatever the user can cause."""
    _check_common(given)
    text = TextShape(given.text_width, given.text_layers, given.context_length, given.embedding)
    how = Pretraining(given.model, dict(given.set), text, _recipe(given))
    clip = build(how)
    backbone = clip.images.backbone
    train, validation = _sets(given)
    order = PairOrder(train.owners, how.recipe.batch_size, how.recipe.seed)
    memory = check_memory(train.images, backbone.image_size)
    values = {name: sum(p.numel() for p in module.parameters()) for name, module in clip.named_children()}
    print_plan(
        "visft_ds contrastive pretraining",
        [
            Section(
                "model",
                [
                    (
                        "vision",
                        f"{given.model}: width {backbone.width}, depth {backbone.depth}, patches of "
                        f"{backbone.patch_size}, {backbone.image_size} pixels, {values['images']:,} values",
                    ),
                    (
                        "text",
                        f"width {text.width}, {text.layers} layers, {text.context_length} tokens, "
                        f"{values['texts']:,} values",
                    ),
                ],
            ),
            _data_section(given, train, validation, order, f"{memory / 2**20:.0f} MiB of pixels in memory"),
        ],
    )
    if given.dry_run:
        return
    done = pretrain(train, given.out, how, validation=validation, log_every=given.log_every)
    _finish(given, done.before, done.after, done.seconds, done.weights)


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR|URL", help="shards, COCO tree, Karpathy's or Flickr30k")
    data.add_argument("--split", default="train", help="to learn from (default %(default)s)")
    data.add_argument("--val-data", metavar="DIR|URL", help="to measure recall on (default: --data)")
    data.add_argument("--val-split", default="val", help="of it, or none (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument("--log-every", type=int, default=20, metavar="N", help="steps (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it


def _add_recipe(parser: argparse.ArgumentParser, default: Recipe) -> None:
    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=int, default=default.steps, metavar="N", help="default %(default)s")
    how.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N", help="default %(default)s")
    how.add_argument("--lr", type=float, default=default.lr, help="highest learning rate (default %(default)s)")
    how.add_argument("--weight-decay", type=float, default=default.weight_decay, help="default %(default)s")
    how.add_argument("--warmup", type=float, default=default.warmup, help="share of the steps (default %(default)s)")
    how.add_argument("--max-norm", type=float, default=default.max_norm, help="of the gradient (default %(default)s)")
    how.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")


def _recipe(given: argparse.Namespace) -> Recipe:
    return Recipe(given.steps, given.batch_size, given.lr, given.weight_decay, given.warmup, given.max_norm, given.seed)


def _check_common(given: argparse.Namespace) -> None:
    if lacking := [name for name in _EXTRA if find_spec(name) is None]:
        raise ValueError(f"not installed: {', '.join(lacking)}. This needs the extra eval: pip install '.[eval]'")
    if given.log_every < 1:
        raise ValueError(f"--log-every {given.log_every} is not allowed: give at least 1")
    refuse_existing(given.out)


def _sets(given: argparse.Namespace) -> tuple[CaptionSet, CaptionSet | None]:
    """What is learnt from, and what is measured on."""
    validation = None
    if given.val_split != "none":
        validation = read_pairs(given.val_data or given.data, given.val_split)
    elif given.val_data:
        raise ValueError("--val-data and --val-split none contradict each other: give one of them")
    return read_pairs(given.data, given.split), validation


def _data_section(
    given: argparse.Namespace, train: CaptionSet, validation: CaptionSet | None, order: PairOrder, kept: str
) -> Section:
    measured = "nothing" if validation is None else f"{len(validation.images)} images"
    return Section(
        "data",
        [
            ("learnt from", f"{len(train.images)} images, {len(train.captions)} captions of {given.split}; {kept}"),
            ("measured on", measured),
            ("steps", f"{given.steps} of {order.batch_size} pairs, {given.steps / order.steps_in_epoch:.1f} epochs"),
        ],
    )


def _finish(
    given: argparse.Namespace, before: Mapping[str, float], after: Mapping[str, float], seconds: float, weights: Path
) -> None:
    columns, *rows = table({"before": before, "after": after})
    sections = [Section("recall", rows, columns)] if rows else []
    rest = [("seconds", f"{seconds:.1f}"), ("weights", str(weights))]
    print_plan("visft_ds contrastive training: done", [*sections, Section("run", rest)])


def _setting(text: str) -> tuple[str, int | float | bool]:
    """`width=128`, `post_norm=true`: a name and a JSON number or truth value."""
    name, _, value = text.partition("=")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, int | float):
        raise argparse.ArgumentTypeError(f"{text!r}: write name=number or name=true|false, such as width=128")
    return name, parsed


COMMANDS: Sequence[Any] = (add_pretrain_parser,)
