"""Classification of images by frozen features, as facebookresearch/dinov2 measures it on ImageNet: kNN
(`knn`) and a linear classifier (`linear_classification`); and by few images a class (`few_shots`). Images are
resized to 256 pixels and cut to 224.

Differs from dinov2/eval/knn.py in: pixels are normalised as the model was trained; where a model has no class
token the mean patch stands for it; equal votes count as wrong.

With --quick, at most 10,000 images teach and 5,000 judge, as the model takes them, and the linear classifier
is logistic regression (`logistic`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from visft_ds.evals.judge import linear_classification
from visft_ds.evals.judge.benchmark import (
    Benchmark,
    Features,
    LayerChoice,
    Names,
    Number,
    Scores,
    units,
)
from visft_ds.evals.judge.classes import ClassSet, read_train_and_test
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings, brought_near, encode_images
from visft_ds.evals.judge.few_shots import NUMBERS as FEW_SHOTS
from visft_ds.evals.judge.few_shots import SHOTS, few_shots, units_of_classes
from visft_ds.evals.judge.images import every
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.knn import knn
from visft_ds.evals.judge.linear_classification import KINDS, image_rows, linear_accuracy
from visft_ds.evals.judge.logistic import logistic_regression
from visft_ds.evals.judge.protocol import CLASSIFIED_SIZES, NORMALISED, QUICK, Protocol
from visft_ds.evals.judge.rows import Rows, held_out

RESIZED = 256  #: pixels of the shorter side of a published view
SIDE = 224  #: of its middle square, which is seen

KNN = Number(
    "kNN",
    how="The 20 class tokens nearest by cosine, weighted by softmax(similarity / 0.07).",
    published="The middle 224 pixels of images of 256.",
    quick=CLASSIFIED_SIZES,
    source="https://github.com/facebookresearch/dinov2, eval/knn.py",
    differs=f"{NORMALISED}; equal votes count as wrong; without a class token, the mean patch",
    chooses_layer=True,
    side=SIDE,
)
LINEAR = Number(
    "linear",
    how="A linear classifier of class token and mean patch.",
    published="Those of the class token, and of it beside the mean patch, each by SGD at 13 rates, learn for "
    "12,500 steps of 1,024 crops of 224 pixels.",
    quick=f"Logistic regression, its strength chosen on a fifth of the training images. {CLASSIFIED_SIZES}",
    source="https://github.com/facebookresearch/dinov2, eval/linear.py",
    differs=f"{NORMALISED}; tokens of one block (there also of the last four); a fiftieth of the training "
    "images chooses the classifier and teaches none (there the test images choose)",
    chooses_layer=True,
    trained=True,
    side=SIDE,
    crops=linear_classification.STEPS * linear_classification.BATCH,
)
NUMBERS = (KNN, LINEAR, *FEW_SHOTS)
_QUICK_PROBES = {KNN.name: knn, LINEAR.name: logistic_regression}
_QUICK_PROBES |= {number.name: few_shots for number in FEW_SHOTS}


def benchmark(request: Request) -> Benchmark:
    """Classification of the images that a command line names."""
    parts = read_train_and_test(request.source, request.train, request.split)
    train, test = request.with_groups(*parts)
    return classification(request.label, train, test, request.protocol)


def classification(label: str, train: ClassSet, test: ClassSet, protocol: Protocol) -> Benchmark:
    """kNN and linear accuracy, and that of as few images a class as the data allow."""
    train = _at_most(train, protocol.classified["train"])
    test = _at_most(test, protocol.classified["test"])
    choosing = _at_most(train, QUICK.classified["train"])
    least = int(units_of_classes(train.labels, units(len(train.labels), train.images.groups)).min())
    count = sum(2 * shots <= least for shots in SHOTS)  # draws take at most half of a class
    what = "images" if train.images.groups is None else "groups of images"
    notes = []
    if count < len(FEW_SHOTS):
        left_out = ", ".join(number.name for number in FEW_SHOTS[count:])
        notes.append(
            f"{label}: the smallest class has {least} training {what}, and draws need twice as many as they "
            f"take: no {left_out}."
        )

    def scores(features: Features, names: Names) -> Scores:
        for number in names:
            taught = _taught(number, features["train"], train)
            judged = _rows(number, features["test"], test)
            yield _QUICK_PROBES[number](number, taught, judged)

    def on_held_out(features: Mapping[str, Tensor], number: str) -> float:
        rows = _taught(number, features, choosing)
        chooses = held_out(rows.labels, rows.owners)
        if not chooses.any():
            raise ValueError(
                f"{label} has fewer than five training {what} in each class, and a fifth of them chooses "
                "the layer: give --layers last"
            )
        return _QUICK_PROBES[number](number, rows.subset(~chooses), rows.subset(chooses), draws=0).value

    def published(encoder: Encoder, settings: Settings, names: Names) -> Scores:
        viewed = published_view(encoder)
        of_test = encode_images(viewed, test.images, KINDS, settings, f"{label} test")
        by_class_tokens = [name for name in names if name != LINEAR.name]
        if by_class_tokens:
            of_train = encode_images(viewed, train.images, ("pooled",), settings, f"{label} train")
            features = {"train": brought_near(of_train, settings), "test": brought_near(of_test, settings)}
            yield from scores(features, by_class_tokens)
        if LINEAR.name in names:
            judged = _rows(LINEAR.name, of_test, test)
            yield linear_accuracy(LINEAR.name, viewed, train, judged, settings)

    return Benchmark(
        label,
        sets={"train": train.images, "test": test.images},
        kinds=KINDS,
        numbers=(KNN, LINEAR, *FEW_SHOTS[:count]),
        settings={
            "benchmark": "classification 3",
            "protocol": protocol.name,
            "labels": [train.labels.tolist(), test.labels.tolist()],
            "names": list(test.classes),
        },
        scores=scores,
        notes=notes,
        layer_choice=LayerChoice(choosing.images, on_held_out),
        published=published if protocol.published else None,
    )


def published_view(encoder: Encoder) -> Encoder:
    """The encoder of the published size: the middle square of SIDE pixels, of images of RESIZED."""
    squared = square_preprocess(SIDE, *encoder.normalisation, resized=RESIZED)
    return replace(encoder, side=SIDE, preprocess=squared)


def _at_most(data: ClassSet, count: int) -> ClassSet:
    """The images, or of more than `count` every k-th."""
    return data.subset(every(len(data.labels), count))


def _rows(number: str, features: Mapping[str, Tensor], data: ClassSet) -> Rows:
    """Class tokens, for the linear classifier with the mean patches beside them."""
    if number != LINEAR.name:
        features = {"pooled": features["pooled"]}
    return image_rows(features, data)


def _taught(number: str, features: Mapping[str, Tensor], train: ClassSet) -> Rows:
    """The same of training images, which are drawn in their groups."""
    return _rows(number, features, train).in_groups(train.images.groups)
