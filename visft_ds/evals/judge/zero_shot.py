"""Zero-shot classification, as in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: an image has the
class whose text is most similar. A class is the mean of its sentences, each of length 1.
"""

from __future__ import annotations

from visft_ds.evals.judge.benchmark import Benchmark, Features, Names, Number, Score, Scores
from visft_ds.evals.judge.classes import read_classes
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.ranking import hits, rank_by_text, sentences

TOP1 = Number("top1", how="The class whose sentences are most similar to the image is the right one.")
TOP5 = Number("top5", how="The right class is among the five whose sentences are most similar to the image.")
NUMBERS = (TOP1, TOP5)


def benchmark(request: Request) -> Benchmark:
    """Top-1 and, with more than five classes, top-5 accuracy."""
    (data,) = request.with_groups(read_classes(request.source, request.split))
    numbers = NUMBERS if len(data.classes) > 5 else (TOP1,)

    def scores(features: Features, names: Names) -> Scores:
        images = features["test"]["clip"]
        texts = features["texts"]["clip"]
        ranks = rank_by_text(images, texts, len(data.templates), data.labels)
        yield Score(TOP1.name, hits(ranks, 1))
        if TOP5 in numbers:
            yield Score(TOP5.name, hits(ranks, 5))

    return Benchmark(
        request.label,
        sets={"test": data.images},
        kinds=("clip",),
        numbers=numbers,
        settings={
            "benchmark": "zero-shot 1",
            "labels": data.labels.tolist(),
            "templates": len(data.templates),
        },
        scores=scores,
        texts=sentences(data.classes, data.templates),
    )
