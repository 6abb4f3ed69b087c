"""Zero-shot classification: the class whose sentences are nearest to the image.

As in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: a class is the mean of its sentences, each of length 1.
"""

from __future__ import annotations

from collections.abc import Iterator

from visft_ds.evals.benchmarks.classes import ClassSet
from visft_ds.evals.benchmarks.protocol import Benchmark, Features, Score, hits, rank_by_text, sentences


def zero_shot(label: str, data: ClassSet) -> Benchmark:
    """Top-1 and, with more than five classes, top-5 accuracy."""
    numbers = ("top1", "top5") if len(data.classes) > 5 else ("top1",)

    def scores(features: Features) -> Iterator[Score]:
        images, texts = features["test"]["clip"], features["texts"]["clip"]
        ranks = rank_by_text(images, texts, len(data.templates), data.labels)
        for name in numbers:
            yield Score(name, hits(ranks, int(name.removeprefix("top"))))

    return Benchmark(
        label,
        {"test": data.images},
        ("clip",),
        numbers,
        {"benchmark": "zero-shot 1", "labels": data.labels.tolist(), "templates": len(data.templates)},
        scores,
        texts=sentences(data.classes, data.templates),
        needs_text=True,
    )
