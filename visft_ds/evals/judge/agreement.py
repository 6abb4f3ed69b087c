"""Prediction agreement: the share of images to which a classifier gives the same class after its backbone was
trained.

The classifier is that of BASE, a whole model of timm; every other model lends it its own tensors, by name.
What lies behind a tower that ends early stays as it was. Images are prepared as timm does it for BASE.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Names, Number, Score, Scores
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import ByKind
from visft_ds.evals.judge.images import SUFFIXES, every, from_files, image_files
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.models import load_encoder, weights_of
from visft_ds.files import reading
from visft_ds.interop.layouts import built, model_in, open_model
from visft_ds.pretrained import TIMM

KIND = "classes"  #: (images,), the number of the class that a classifier predicts
NUMBERS = (
    Number(
        "predictions",
        how="The share of images whose most likely class, by the base's own classifier, is that of the base.",
        agreement=True,
    ),
)
_ASKS = "agreement= counts which predictions of BASE's own classifier stay, and"
MOST = 5000  #: images of a folder; a larger one gives every k-th


def benchmark(request: Request) -> Benchmark:
    """Share of the first model's top-1 predictions that a model makes, too. Scores are the predictions
    themselves.
    """
    images = request.grouped(read_images(request.source))

    def scores(features: Features, names: Names) -> Scores:
        yield Score(NUMBERS[0].name, features["test"][KIND].double().numpy())

    return Benchmark(request.label, {"test": images}, (KIND,), NUMBERS, {"benchmark": "agreement 1"}, scores)


def read_images(source: str) -> ImageSet:
    """The images of a folder; where it has none, those of all folders in it.

    Raises:
        ValueError: no such folder, or none with images.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; give one with images")
    files = image_files(root)
    if not files:
        files = [path for folder in sorted(root.glob("*/")) for path in image_files(folder)]
    if not files:
        raise ValueError(f"{source}: no images ({', '.join(SUFFIXES)}) in it or one folder below")
    return from_files([files[number] for number in every(len(files), MOST)], root)


class _Predictions(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, kinds: Collection[str]) -> ByKind:
        return {KIND: self.model(images).argmax(dim=1)}


def check_classifier(base: ModelSpec) -> tuple[Any, int]:
    """(BASE's backbone without memory, number of classes that its file has a classifier of).

    Raises:
        ValueError: BASE brings no classifier.
    """
    model = {} if base.open_clip else dict(base.model or model_in(open_model(base.name)))
    if not model.get("preset", "").startswith(TIMM):
        raise ValueError(f"{_ASKS} {base.label} is not a model of timm")
    model.pop("layers", None)  # a classifier reads the end of the network
    file = open_model(base.name)
    backbone: Any = built(model, "meta")
    for layer in backbone.classifier_names:
        if f"{layer}.weight" in file:
            return backbone, file[f"{layer}.weight"].shape[0]
    raise ValueError(f"{_ASKS} {base.name} has no classifier of timm's {backbone.name}")


def load_classifier(spec: ModelSpec, base: ModelSpec) -> Encoder:
    """BASE's classifier behind the backbone of a model; on the CPU, in fp32.

    Raises:
        ValueError: BASE brings no classifier.
    """
    import timm

    backbone, classes = check_classifier(base)
    model = timm.create_model(backbone.name, num_classes=classes, **backbone.options)
    with reading(base.name, f"weights of timm's {backbone.name}"):
        model.load_state_dict({name: stored.read() for name, stored in open_model(base.name).items()})
    own = weights_of(load_encoder(spec, "fp32"))
    model.load_state_dict({**model.state_dict(), **own})  # a tower may be cut, and has no classifier
    side = backbone.image_size
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, side, side)}
    return Encoder(
        _Predictions(model).requires_grad_(False).eval(),
        (KIND,),
        timm.data.create_transform(**config, is_training=False),
        (config["mean"], config["std"]),
        side,
        None,
    )
