"""The sub-command `pretrain` of visft contrast: a small CLIP from random weights."""

from __future__ import annotations

import argparse
import json

from visft_ds.config import tower_setting
from visft_ds.experiments.contrastive.clip_models import TextShape
from visft_ds.experiments.contrastive.flags import (
    add_data,
    add_recipe,
    check_common,
    data_section,
    finished,
    read_sets,
    recipe_of,
)
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.experiments.contrastive.pretrain import (
    DEFAULT_RECIPE,
    Pretraining,
    build,
    check_alone,
    check_memory,
    pretrain,
)
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Section, print_plan


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pretrain`."""
    add_data(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=sorted(PRESETS), default="debug", help="vision tower (default %(default)s)")
    model.add_argument(
        "--set",
        type=tower_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the tower: width=128, ...",
    )
    shape = TextShape()
    model.add_argument("--text-width", type=int, default=shape.width, help="default %(default)s")
    model.add_argument("--text-layers", type=int, default=shape.layers, help="default %(default)s")
    model.add_argument("--context-length", type=int, default=shape.context_length, help="tokens, default %(default)s")
    model.add_argument("--embedding", type=int, default=shape.embedding, help="of both sides, default %(default)s")
    add_recipe(parser, DEFAULT_RECIPE)
    parser.set_defaults(run=run_pretrain)


def run_pretrain(given: argparse.Namespace) -> None:
    """Pretrain. Raises ValueError for whatever the user can cause."""
    check_common(given)
    check_alone()
    text = TextShape(given.text_width, given.text_layers, given.context_length, given.embedding)
    how = Pretraining(given.model, _overrides(given), text, recipe_of(given))
    clip = build(how)
    backbone = clip.images.backbone
    train, validation = read_sets(given)
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
            data_section(given, train, validation, order, f"{memory / 2**20:.0f} MiB of pixels in memory"),
        ],
    )
    if given.dry_run:
        return
    done = pretrain(train, given.out, how, validation=validation, log_every=given.log_every)
    finished({"before": done.before, "after": done.after}, done.seconds, done.weights)


def _overrides(given: argparse.Namespace) -> dict[str, int | float | bool]:
    for name, value in given.set:
        if name == "post_norm":
            fits, kind = isinstance(value, bool), "true or false"
        elif name == "mlp_ratio":
            fits, kind = not isinstance(value, bool), "a number"
        else:
            fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        if not fits:
            raise ValueError(f"--set {name}={json.dumps(value)} is not allowed: {name} is {kind}")
    return dict(given.set)
