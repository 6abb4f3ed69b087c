"""Zero-shot classification: the class whose sentences are nearest to the image.

As in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: a class is the mean of its sentences, each of length 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from visft_ds.evals.benchmarks.class_sets import ClassSet
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
    def truths(self) -> Mapping[str, Sequence[str]]:
        return {"test": self.data.truths()}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"benchmark": "zero-shot 1", "labels": self.data.labels.tolist(), "templates": len(self.data.templates)}

    def scores(self, features: Features) -> Iterator[Score]:
        assert features.texts is not None
        classes = class_embeddings(features.texts, len(self.data.templates))
        embeddings, labels = features.images["test"]["clip"], torch.from_numpy(self.data.labels)
        ranks, best = [], []
        for start in range(0, len(embeddings), _ROWS):
            similarity = embeddings[start : start + _ROWS] @ classes.T
            ranks.append(rank_of(similarity, labels[start : start + _ROWS]))
            best.append(similarity.argmax(dim=1))
        names = [self.data.classes[place] for place in torch.cat(best).tolist()]
        yield Score("top1", hits(torch.cat(ranks), 1), said=names, shows="test")
        if len(self.data.classes) > 5:
            yield Score("top5", hits(torch.cat(ranks), 5))
