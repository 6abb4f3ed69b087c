"""Zero-shot classification: the class whose sentences are nearest to the image.

As in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: a class is the mean of its sentences, each of length 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visft_ds.evals.benchmarks.classes import ClassSet
from visft_ds.evals.benchmarks.protocol import Features, ImageSet, Score, class_embeddings, hits, rank_of, sentences

_ROWS = 4096  # images compared with all classes at once


@dataclass(frozen=True)
class ZeroShot:
    """Top-1 and, with more than five classes, top-5 accuracy."""

    label: str
    data: ClassSet
    needs_text: bool = True
    kinds: Sequence[str] = ("clip",)

    @property
    def sets(self) -> Mapping[str, ImageSet]:
        return {"test": self.data.images}

    @property
    def texts(self) -> Sequence[str]:
        return sentences(self.data.classes, self.data.templates)

    @property
    def numbers(self) -> Sequence[str]:
        return ("top1", "top5") if len(self.data.classes) > 5 else ("top1",)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"benchmark": "zero-shot 1", "labels": self.data.labels.tolist(), "templates": len(self.data.templates)}

    def scores(self, features: Features) -> Iterator[Score]:
        classes = class_embeddings(features["texts"]["clip"], len(self.data.templates))
        embeddings, labels = features["test"]["clip"], torch.from_numpy(self.data.labels)
        parts = zip(embeddings.split(_ROWS), labels.split(_ROWS), strict=True)
        ranks = torch.cat([rank_of(part @ classes.T, right) for part, right in parts])
        for name in self.numbers:
            yield Score(name, hits(ranks, int(name.removeprefix("top"))))
