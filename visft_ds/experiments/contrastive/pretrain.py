"""`visft contrast pretrain`: a small CLIP from random weights, so that a toy backbone knows something before ViSFT.

CLIP as in https://arxiv.org/abs/2103.00020, sections 2.3 to 2.5, less what needs 400 million pairs: no augmentation,
one process, images kept in memory as bytes. One of an image's captions is drawn anew each time the image comes.

Letters: n images, B pairs, E width of the embedding, S side of an image in pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visft_ds.config import tower_setting
from visft_ds.evals.benchmarks.encoders import NORMALISATIONS, eva_crop
from visft_ds.evals.benchmarks.protocol import ImageSet
from visft_ds.evals.benchmarks.retrieval import CaptionSet
from visft_ds.experiments.contrastive.captions import Tokens, encode_captions, recall, tokens_of
from visft_ds.experiments.contrastive.clip_models import Clip, TextShape, build_clip, save_clip, text_tower_of
from visft_ds.experiments.contrastive.fitting import INITIAL_LOG_SCALE, ContrastiveRecipe, Curve, clip_loss, fit
from visft_ds.experiments.contrastive.flags import (
    add_data,
    add_recipe,
    check_common,
    data_section,
    finished,
    read_sets,
    recipe_of,
)
from visft_ds.experiments.contrastive.output import Result, staged, write_result
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.interop.open_clip import FILE
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed
from visft_ds.resilience.host_memory import host_memory_available

#: Of the debug preset on the toy set, see docs/evaluation.md.
DEFAULT_RECIPE = ContrastiveRecipe(steps=400, batch_size=128, lr=1e-3)
_ROWS = 256  # images encoded at once where nothing is learnt
_READERS = 4  # threads that decode


@dataclass(frozen=True)
class Pretraining:
    """Models to be built, and their recipe."""

    preset: str
    overrides: Mapping[str, Any]  #: fields of the preset that are replaced
    text: TextShape
    recipe: ContrastiveRecipe


def check_alone() -> None:
    """Raise ValueError where a launcher has started several processes."""
    if distributed.world_size() > 1:
        raise ValueError(
            f"pretraining runs in one process, and the launcher started {distributed.world_size()}: start it without "
            f"deepspeed or torchrun"
        )


def build(how: Pretraining) -> Clip:
    """The random model that training starts from. Raises ValueError for sizes that do not work out."""
    return build_clip(how.preset, how.text, log_scale=INITIAL_LOG_SCALE, seed=how.recipe.seed, **dict(how.overrides))


def check_memory(images: ImageSet, side: int) -> int:
    """Bytes of all images in memory. Raises ValueError where that is more than half of what is free."""
    needed, free = len(images) * 3 * side**2, host_memory_available()
    if 2 * needed > free:
        raise ValueError(
            f"{len(images)} images of {side} pixels take {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free: give fewer or smaller images (pretraining is for toy sets)"
        )
    return needed


def read_pixels(images: ImageSet, side: int) -> Tensor:
    """(n, 3, S, S) uint8, the middle square of every image."""
    crop = eva_crop(side)
    with ThreadPoolExecutor(_READERS) as pool:
        return torch.stack(list(pool.map(lambda place: crop(images.read(place)), range(len(images)))))


def normalised(pixels: Tensor, device: torch.device) -> Tensor:
    """(B, 3, S, S) uint8 -> float32 as EVA-CLIP normalises it."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in NORMALISATIONS["clip"])
    return (pixels.to(device).float() / 255 - mean) / std


def _fit(
    clip: Clip, pixels: Tensor, tokens: Tokens, order: PairOrder, recipe: ContrastiveRecipe, log_every: int
) -> Curve:
    device = clip.logit_scale.device

    def compute(step: int) -> float:
        images, captions = (torch.from_numpy(places) for places in order.step(step))
        embedded, texts = clip(normalised(pixels[images], device), tokens.rows(captions).to(device))
        loss = clip_loss(embedded, texts, clip.logit_scale)
        loss.backward()
        return loss.item()

    parameters = dict(clip.named_parameters())
    return fit(compute, parameters, clip.logit_scale, recipe, log_every=log_every)


@torch.no_grad()
def _measure(clip: Clip, judge: tuple[Tensor, CaptionSet] | None) -> dict[str, float]:
    if judge is None:
        return {}
    pixels, captions = judge
    device = clip.logit_scale.device
    images = [clip.images(normalised(part, device), ("clip",))["clip"].cpu() for part in pixels.split(_ROWS)]
    return recall(torch.cat(images), encode_captions(text_tower_of(clip), captions.captions), captions.owners)


def _facts(how: Pretraining, clip: Clip, train: CaptionSet, tokens: Tokens) -> dict[str, str]:
    backbone = clip.images.backbone
    return {
        "vision tower": f"{how.preset}, width {backbone.width}, depth {backbone.depth}, patches of "
        f"{backbone.patch_size}, {backbone.image_size} pixels, random weights of seed {how.recipe.seed}",
        "text tower": f"width {how.text.width}, {how.text.layers} layers, {how.text.context_length} tokens",
        "data": f"{len(train.images)} images, {len(train.captions)} captions, fingerprint "
        f"{train.images.fingerprint[:12]}",
        "captions as long as the tower reads, or longer": str(tokens.cut),
        "temperature": f"1 / {float(clip.logit_scale.detach().exp()):.1f}",
    }


# ----------------------------------------------------------------------------------------------------- command


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
    """Train both towers on captions and write a folder with one file of weights, configurations and a model card.

    The same arguments give the same bits on one kind of device with one number of threads.

    Raises:
        ValueError: sizes that do not work out, more images than memory, fewer than a batch, a loss that is not finite,
            several processes, or `--out` exists.
    """
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
    began = time.perf_counter()
    tokens = tokens_of(text_tower_of(clip), train.captions)
    with staged(given.out) as folder:
        clip.to(distributed.local_device()).train()
        pixels = read_pixels(train.images, backbone.image_size)
        judge = None if validation is None else (read_pixels(validation.images, backbone.image_size), validation)
        before = _measure(clip, judge)
        curve = _fit(clip, pixels, tokens, order, how.recipe, given.log_every)
        recalls = {"before": before, "after": _measure(clip, judge)}
        configs = save_clip(clip.cpu().eval(), folder, named=given.out)
        seconds = time.perf_counter() - began
        result = Result("pretrain", how.recipe, curve, recalls, seconds)
        write_result(folder, given.out.name, result, _facts(how, clip, train, tokens), configs)
    finished(recalls, seconds, given.out / FILE)


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
