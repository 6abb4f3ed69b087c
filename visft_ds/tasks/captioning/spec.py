"""Captioning as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import Geometry, Size, Square
from visft_ds.tasks import Numbers, Results, Shapes, Truth
from visft_ds.tasks.captioning.config import CaptioningHeadConfig, CaptioningTask
from visft_ds.tasks.captioning.data import CaptionTargets, caption_targets
from visft_ds.tasks.captioning.head import CaptioningCriterion, CaptioningHead
from visft_ds.tasks.captioning.metrics import caption_metrics
from visft_ds.tasks.captioning.tokenizer import TOKENIZER
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import Picture, side_by_side, with_text
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Task, Words


class Captioning(Task):
    """An LSTM with attention."""

    name = "captioning"
    config = CaptioningTask
    head = CaptioningHead
    losses = CaptioningCriterion
    facts: ClassVar[Mapping[str, Any]] = {"caption_tokenizer": TOKENIZER}

    def build_head(
        self, shapes: Shapes, head: CaptioningHeadConfig, vocabulary_size: int | None
    ) -> nn.Module:
        assert vocabulary_size is not None
        return CaptioningHead(shapes[-1][0], head, vocabulary_size)

    def geometry(self, options: Options) -> Geometry:
        return Square(options["size"])

    def targets(
        self,
        train: bool,
        options: Options,
        words: Words,
        classes: Classes,
    ) -> ImageTargets:
        random = train and options["caption_choice"] == "random"  # evaluation draws nothing
        assert words is not None
        return partial(caption_targets, words, random, options["max_words"])

    def pack(self, samples: Sequence[Sample], frame: Size) -> CaptionTargets:
        targets = [sample.targets[self.name] for sample in samples]
        lengths = [len(of_image["tokens"]) for of_image in targets]
        # At least one step for the head: without any, its parameters would take no part in the loss.
        tokens = torch.zeros((len(samples), max(2, *lengths)), dtype=torch.int64)
        references = []
        for row, of_image, length in zip(tokens, targets, lengths, strict=True):
            row[:length] = torch.from_numpy(of_image["tokens"])
            references.append(tuple(of_image["references"].tolist()))
        return CaptionTargets(tokens, torch.tensor(lengths), tuple(references))

    def blank(
        self,
        images: int,
        size: Size,
        content: Content,
        options: Options,
    ) -> CaptionTargets:
        tokens = torch.zeros(images, content.caption_ids, dtype=torch.int64)
        return CaptionTargets(tokens, torch.full((images,), content.caption_ids), ((),) * images)

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        assert words is not None
        rows = zip(batch.image_ids.tolist(), batch.real.tolist(), output.tokens.tolist(), strict=True)
        return [{"image_id": image, "caption": words.decode(ids)} for image, real, ids in rows if real]

    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        return caption_metrics(truth, results)

    def picture(self, example: Example) -> Picture:
        image = example.pixels()
        references = example.raw.captions
        captions = [result["caption"] or "(no words)" for result in example.results]
        return side_by_side(
            (with_text(image, references[:5]), f"ground truth: {len(references)} captions"),
            (with_text(image, captions), "predicted caption"),
        )


SPEC = Captioning()
