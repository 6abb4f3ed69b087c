"""Share of a classifier's own answers that is kept when its backbone is trained.

The classifier is that of BASE, a whole model of timm; every other model lends it its own tensors, by name. What lies
behind a tower that ends early stays as it was. Images are prepared as timm does it for BASE.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.images import SUFFIXES, from_files, image_files
from visft_ds.evals.judge.models import ModelSpec, alike, load_encoder, weights_of
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, Score
from visft_ds.files import reading
from visft_ds.interop.layouts import model_in, open_model
from visft_ds.models.timm_backbone import build_model, classifier_names
from visft_ds.pretrained import TIMM

KIND = "answers"  #: (images,), the number of the class that a classifier says
NUMBER = "answers"
MOST = 5000  #: images of a folder; a larger one gives every k-th


def kept(label: str, images: ImageSet) -> Benchmark:
    """Share of the first model's top-1 answers that a model gives, too. Scores are the answers themselves."""

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        yield Score(NUMBER, features["test"][KIND].double().numpy())

    return Benchmark(label, {"test": images}, (KIND,), (NUMBER,), {"benchmark": "kept 2"}, scores, answers=True)


def read_images(source: str) -> ImageSet:
    """The images of a folder; where it has none, of val2017 in it (a COCO tree), or else of all folders in it.

    Raises:
        ValueError: no such folder, or none with images.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; give one with images")
    val = root / "val2017"
    folders = [val] if val.is_dir() else sorted(path for path in root.iterdir() if path.is_dir())
    found = image_files(root) or [path for folder in folders for path in image_files(folder)]
    if not found:
        raise ValueError(f"{source}: no images ({', '.join(SUFFIXES)}) in it or one folder below")
    return from_files(found[:: -(-len(found) // MOST)], root)


class _Answers(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        return {KIND: self.model(images).argmax(dim=1)}


def load_classifier(spec: ModelSpec, base: ModelSpec) -> Encoder:
    """BASE's classifier behind the backbone of a model; on the CPU, in fp32.

    Raises:
        ValueError: BASE brings no classifier, or the model is of another architecture.
    """
    import timm

    name, side, weights = _source(base)
    configured = timm.get_pretrained_cfg(name)
    classifiers = classifier_names(configured.classifier if configured else None)
    values = _tensors(name, weights)
    classes = next((len(values[key]) for one in classifiers if (key := f"{one}.weight") in values), None)
    if classes is None:
        raise ValueError(f"{_ASKS} {base.label} brings none: {weights} has no classifier of timm's {name}")
    _, _, options = build_model(name, side, "meta", 0)
    model = timm.create_model(name, num_classes=classes, **options)
    with reading(weights or name, f"weights of timm's {name}"):
        model.load_state_dict(values)
    own = weights_of(load_encoder(spec, "fp32"))
    if not alike(own, model.state_dict()):
        raise ValueError(f"{_ASKS} {spec.label} cannot feed it: it is no {name} of timm")
    model.load_state_dict({**model.state_dict(), **own})  # a tower may be cut, and has no classifier
    config = timm.data.resolve_model_data_config(model)
    if "img_size" in options:
        config["input_size"] = (3, options["img_size"], options["img_size"])
    return Encoder(
        _Answers(model).requires_grad_(False).eval(),
        (KIND,),
        timm.data.create_transform(**config, is_training=False),
        (config["mean"], config["std"]),
        int(config["input_size"][-1]),
        None,
    )


_ASKS = "kept= counts which answers of BASE's own classifier stay. But"


def _source(spec: ModelSpec) -> tuple[str, int | None, str | None]:
    """(name in timm, image size where it is not the model's own, file or None for timm's own weights) of a model."""
    if spec.library == "timm":
        return spec.name, None, spec.weights
    found: Mapping[str, Any] = {"preset": ""}
    if spec.library == "visft_ds":
        found = spec.model or model_in(open_model(spec.name))
    if not found["preset"].startswith(TIMM):
        raise ValueError(f"{_ASKS} {spec.label} is no model of timm")
    return found["preset"].removeprefix(TIMM), found.get("image_size"), spec.name


def _tensors(name: str, weights: str | None) -> dict[str, Tensor]:
    """All tensors of a model of timm: those in a file, or timm's own."""
    import timm

    if weights is None:
        own: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
        return own
    return {key: one.read() for key, one in open_model(weights).items()}
