"""Models of a comparison as encoders: loaded, or mixed from the weights of two."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.judge.encoders import CLIP, BackboneEncoder, Encoder, open_clip_encoder, square_preprocess
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.text import projection_of, text_tower_in
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import (
    MODEL,
    as_far_as,
    bases_of,
    load_backbone,
    model_in,
    open_model,
    other_base,
    whole,
)
from visft_ds.interop.weights import Weights
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import KINDS, dense_update, lora_layers
from visft_ds.ops import DTYPES
from visft_ds.predict.loading import adapter_for
from visft_ds.settings.bands import Bands
from visft_ds.settings.fields import Precision


def load_encoder(spec: ModelSpec, precision: Precision) -> Encoder:
    """Build a model on the CPU; the matrices of a backbone are stored in the precision they compute in.

    Raises:
        ValueError: whatever is wrong with one of its files, a block that it does not have, or an origin of
            another architecture.
    """
    if spec.mixed:
        return Mixture(spec, precision).at(spec.scale)
    if spec.open_clip:
        return open_clip_encoder(spec.open_clip, spec.name)
    return _load_backbone(spec, precision)


def bands_read(spec: ModelSpec) -> Bands | None:
    """The bands that a model reads, by what its files say of it; None: three colours of 8 bits."""
    if spec.open_clip:
        return None
    _, _, stored = _opened(spec)
    return Bands.of((spec.model or stored).get("bands"))


def _opened(spec: ModelSpec) -> tuple[Weights, Adapter | None, Mapping[str, Any]]:
    """The weights of a backbone, its adapter, and its description by these or by its run."""
    path = Path(spec.name)
    file = open_model(path)
    adapter = adapter_for(path, spec.adapter) if spec.adapter else None
    if MODEL in file.metadata:
        return file, adapter, model_in(file)
    if adapter is not None and adapter.model is not None:
        return file, adapter, adapter.model
    return file, adapter, spec.model or model_in(file)


def _load_backbone(spec: ModelSpec, precision: Precision) -> Encoder:
    path = Path(spec.name)
    file, adapter, stored = _opened(spec)
    model = dict(spec.model or stored)
    if "image_size" in stored:  # which the name of a model of timm does not tell
        model.setdefault("image_size", stored["image_size"])
    read = model.get("layers", ())
    if adapter is not None and adapter.model is not None:
        model["layers"] = adapter.model.get("layers", ())
    elif spec.block is not None and spec.block > max(read, default=0):
        model["layers"] = ()  # merged weights go on behind the block that training read
    elif spec.whole and read:
        model = as_far_as(file, model)
    backbone: Any = load_backbone(path, whole(model, file), DTYPES[precision])
    if adapter is not None:
        problem = other_base(f"the adapter of {spec.label}", adapter.base, bases_of(backbone, path))
        if problem:
            print(f"warning: {problem}", file=sys.stderr)
        # Beside the weights and not in them: a sum rounded to 16 bit loses most of a small adapter.
        adapter.scaled(spec.scale).install(backbone)
    if spec.block is not None:
        backbone.read_after((spec.block,))

    normalisation = (backbone.pixel_mean, backbone.pixel_std)
    projection = None
    if isinstance(backbone, EvaViT):
        if backbone.bands is None:
            normalisation = CLIP
        if not backbone.layers_read:
            projection = projection_of(path, backbone.width)
    module = BackboneEncoder(backbone, projection).requires_grad_(False).eval()
    return Encoder(
        module,
        module.kinds,
        square_preprocess(backbone.image_size, *normalisation),
        normalisation,
        backbone.image_size,
        text_tower_in(path) if "clip" in module.kinds else None,
    )


class Mixture:
    """W0 + A (W1 - W0) for any A: W0 of a model's origin, W1 its own, adapter merged; or noise in place of
    W1 - W0.

    Noise is Gaussian in every parameter that changed, of the norm of its change.
    """

    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        assert spec.origin is not None
        self._encoder = load_encoder(replace(spec, scale=1.0, noise=None), precision)
        new = weights_of(self._encoder)
        old = weights_of(load_encoder(spec.origin, precision))
        if not alike(new, old):
            raise ValueError(f"{spec.label} is of another architecture than {spec.origin.label}")
        tensors = dict(_tensors(self._encoder))
        self.changes: dict[str, Tensor] = {}
        for name, value in new.items():
            if not value.is_floating_point() or torch.equal(value, old[name].to(value)):
                continue
            change = value.float() - old[name].float()
            if spec.noise is None:
                self.changes[name] = change
            elif isinstance(tensors[name], nn.Parameter):  # not statistics of a batch normalisation
                self.changes[name] = _noise(name, change, spec.noise)
        self._old = {name: old[name] for name in self.changes}

    @torch.no_grad()
    def at(self, scale: float) -> Encoder:
        """The encoder of that A; one before it changes, too."""
        for layer in lora_layers(self._encoder.module).values():
            layer.lora_B.zero_()
        tensors = dict(_tensors(self._encoder))
        for name, change in self.changes.items():
            tensors[name].copy_(self._old[name].float() + scale * change)
        return self._encoder


def weights_of(encoder: Encoder) -> dict[str, Tensor]:
    """All tensors of a model by the names that its library gives them, an adapter merged."""
    tensors = dict(_tensors(encoder))
    own = [name for name in tensors if name.rpartition(".")[2] not in KINDS]  # not parts of an adapter
    weights = {name: tensors[name].detach() for name in own}
    for name, layer in lora_layers(encoder.module).items():
        weight = layer.weight.detach().float()
        update = dense_update(len(weight), layer.lora_A, layer.lora_B, layer.slices, layer.scale)
        weights[f"{_without_module(name)}.weight"] = weight + update.view_as(weight)
    return weights


def alike(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    """Return True for weights of one architecture; the new one may end earlier."""
    return all(name in old and value.shape == old[name].shape for name, value in new.items())


def _tensors(encoder: Encoder) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of both sides of a model."""
    for name, tensor in encoder.module.state_dict(keep_vars=True).items():
        yield _without_module(name), tensor
    if encoder.text is not None:
        for name, tensor in encoder.text.module.state_dict(keep_vars=True).items():
            yield f"text {name}", tensor


def _without_module(name: str) -> str:
    """Name of a tensor without that of the encoder's own part."""
    return name.partition(".")[2]


def _noise(name: str, change: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(change.shape, generator=generator)
    return drawn * (change.norm() / drawn.norm())
