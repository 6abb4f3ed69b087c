"""Captioning as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from visft_ds.config.task_schema import CaptionChoice
from visft_ds.data.dataset import caption_dataset
from visft_ds.data.transforms import Square
from visft_ds.tasks.captioning.config import CaptioningTask
from visft_ds.tasks.captioning.data import (
    CaptionTargets,
    caption_targets,
    pack_captions,
)
from visft_ds.tasks.captioning.head import CaptioningCriterion, CaptioningHead, postprocess
from visft_ds.tasks.captioning.metrics import TOKENIZER, results_metrics
from visft_ds.tasks.captioning.pictures import draw_caption
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.spec import Content, Evaluator, Example, HeadSizes, ImageTargets, TaskSpec
from visft_ds.tasks.vocabulary import Vocabulary


def _targets(train: bool, options: Mapping[str, Any], vocabulary: Vocabulary) -> ImageTargets:
    choice: CaptionChoice = options["caption_choice"]
    if choice == "random" and not train:
        choice = "first"  # evaluation draws nothing
    return partial(caption_targets, vocabulary, choice, options["max_words"])


def _blank(
    images: int, size: tuple[int, int], content: Content, options: Mapping[str, Any], device: torch.device
) -> CaptionTargets:
    tokens = torch.zeros(images, content.caption_ids, dtype=torch.int64)
    return CaptionTargets(tokens, torch.full((images,), content.caption_ids), ((),) * images)


def _draw(example: Example) -> Picture:
    caption = example.results[0]["caption"] if example.results else ""
    words = caption.split()
    maps = example.output.attention[example.place, : len(words)].float().cpu().numpy()
    grid = math.isqrt(maps.shape[1])
    return draw_caption(example.pixels(), example.raw.captions, caption, words, maps.reshape(len(words), grid, grid))


SPEC = TaskSpec(
    name="captioning",
    config=CaptioningTask,
    head=CaptioningHead,
    build_criterion=CaptioningCriterion,
    geometry=lambda options: Square(options["size"]),
    targets=_targets,
    pack=lambda samples, frame: pack_captions(samples),
    postprocess=postprocess,
    evaluator=Evaluator(
        truth=caption_dataset,
        measure=lambda truth, results, _: results_metrics(truth, results),
        facts={"caption_tokenizer": TOKENIZER},
    ),
    draw=_draw,
    sizes=HeadSizes(
        in_channels=("encoder_att.weight", 1, 0),
        options={
            "vocabulary_size": ("embedding.weight", 0, 0),
            "attention_dim": ("encoder_att.weight", 0, 0),
            "embed_dim": ("embedding.weight", 1, 0),
            "decoder_dim": ("init_h.weight", 0, 0),
        },
        attributes=("grid",),
    ),
    blank=_blank,
)
