"""Retention: how many of a classifier's own answers stay when its backbone was trained.

The classifier is that of the first model, a whole model of timm; every other model lends it its own tensors, merged or
beside an adapter, by name. What lies behind a tower that ends early stays as it was. Images are prepared as timm does
it for the first model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.benchmarks.encoders import Encoder
from visft_ds.evals.benchmarks.images import SUFFIXES, from_files, image_files
from visft_ds.evals.benchmarks.models import ModelSpec
from visft_ds.evals.benchmarks.protocol import Benchmark, Features, ImageSet, Score
from visft_ds.evals.model import adapter_for
from visft_ds.interop.layouts import classifier_names, model_in, open_model
from visft_ds.interop.weights import examples, open_weights
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.models.timm_backbone import build_model
from visft_ds.pretrained import TIMM

KIND = "answers"  #: (images,), the number of the class that a classifier says
KEPT = "answers kept"  #: name of the number
MOST = 5000  #: images of a folder; a larger one gives every k-th


def retention(label: str, images: ImageSet) -> Benchmark:
    """Share of the first model's top-1 answers that a model gives, too. Scores are the answers themselves."""

    def scores(features: Features) -> Iterator[Score]:
        yield Score(KEPT, features["test"][KIND].double().numpy())

    return Benchmark(label, {"test": images}, (KIND,), (KEPT,), {"benchmark": "retention 2"}, scores, answers=True)


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


def load_classifier(spec: ModelSpec, first: ModelSpec) -> Encoder:
    """The first model's classifier behind the backbone of a model; on the CPU, in fp32.

    Raises:
        ValueError: the first model brings no classifier, or the other one is of another architecture.
    """
    import timm

    name, side, weights = _source(first, "brings none")
    if weights is None:
        model = timm.create_model(name, pretrained=True)
        options: Mapping[str, int] = {}
    else:
        file = open_weights(weights)
        values = {key: one.read() for key, one in file.items()}
        config = timm.get_pretrained_cfg(name)
        names = (f"{one}.weight" for one in classifier_names(config.classifier if config else None))
        classes = next((len(values[key]) for key in names if key in values), 0)
        if not classes:
            raise ValueError(f"{_ASKS} {first.label} brings none: {weights} has no classifier of timm's {name}")
        _, _, options = build_model(name, side, device="meta")
        model = timm.create_model(name, num_classes=classes, **options)
        _load(model, values, weights)
    if spec.name != first.name or spec.weights != first.weights:
        _lend(model, spec, name)
    if spec.adapter is not None:
        adapter = adapter_for(Path(spec.name), spec.adapter).scaled(spec.scale)
        inject_lora(model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
        parameters = lora_parameters(model)
        if foreign := adapter.tensors.keys() - parameters.keys():
            raise ValueError(f"{spec.adapter} is no adapter of timm's {name}: {examples(sorted(foreign))}")
        with torch.no_grad():
            for key, value in adapter.tensors.items():
                parameters[key].copy_(value)
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


_ASKS = "retention counts which answers of the first model's own classifier stay. But"


def _source(spec: ModelSpec, lacks: str) -> tuple[str, int | None, str | None]:
    """(name in timm, image size where it is not the model's own, file or None for timm's own weights) of a model."""
    if spec.library == "timm":
        return spec.name, None, spec.weights
    found: Mapping[str, Any] = {"preset": ""}
    if spec.library == "visft_ds":
        found = spec.model or model_in(open_model(spec.name))
    if not found["preset"].startswith(TIMM):
        raise ValueError(f"{_ASKS} {spec.label} {lacks}: it is no model of timm with weights")
    return found["preset"].removeprefix(TIMM), found.get("image_size"), spec.name


def _lend(model: nn.Module, spec: ModelSpec, name: str) -> None:
    """Give the classifier's model the tensors of another file of the same architecture."""
    import timm

    own, _, weights = _source(spec, "cannot be asked")
    if own.partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"{_ASKS} {spec.label} is timm's {own}, which cannot feed the classifier of {name}")
    if weights is None:
        raise ValueError(f"{_ASKS} {spec.label} has timm's own weights: give them as a file")
    file, values = open_weights(weights), model.state_dict()
    config = timm.get_pretrained_cfg(name)
    classifiers = tuple(f"{one}." for one in classifier_names(config.classifier if config else None))
    lent = [key for key in file if not key.startswith(classifiers)]
    if foreign := [key for key in lent if key not in values]:
        raise ValueError(f"{weights} has tensors that {name} of {model.__class__.__name__} lacks: {examples(foreign)}")
    _load(model, values | {key: file[key].read() for key in lent}, weights)


def _load(model: nn.Module, values: Mapping[str, Tensor], path: str) -> None:
    try:
        model.load_state_dict(values)
    except RuntimeError as error:  # its words for names and shapes
        raise ValueError(f"{path}: {error}") from error
