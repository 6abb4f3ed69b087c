"""A prepared model as the list of layers that a pipeline divides: the same modules, no second definition.

Two tensors travel between layers: the tokens (B, N, D) float32, and an int64 checksum of the samples they belong to,
which no layer changes. Targets never travel: the last layer gets its batch from this rank's loader.
Letters: B images, H W pixels, N tokens of an image, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map, valid_region
from visft_ds.model import MultiTaskModel, normalise_pixels
from visft_ds.models.eva_vit import EvaViT
from visft_ds.tasks.matching import at_least_float32
from visft_ds.tasks.spec import LossDenominators

Travelling = tuple[Tensor, Tensor]  #: tokens float32 first (receive buffers know one dtype each), checksum (1,)


class Layer(nn.Module):
    """Part of a model; its parameters are the model's own."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        assert isinstance(model.backbone, EvaViT), "the configuration allows no other"
        # A tuple, so that the whole model is not part of this layer; the parts of other stages are on the meta device.
        self._whole = (model, model.backbone)


class EmbeddingLayer(Layer):
    """Pixels to tokens."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__(model)
        _, backbone = self._whole
        self.patch_embed, self.pos_embed, self.cls_token = backbone.patch_embed, backbone.pos_embed, backbone.cls_token

    def forward(self, fed: tuple[Tensor, Tensor, Tensor]) -> Travelling:
        """(images (B, 3, H, W) uint8, sizes (B, 2), checksum) -> what travels."""
        images, sizes, checksum = fed
        _, backbone = self._whole
        tokens = backbone.embed(normalise_pixels(backbone, images, sizes))
        return tokens.contiguous(), checksum  # a transposed view cannot be sent


class BlockLayer(Layer):
    """Transformer block, recomputed in the backward pass where the model's settings select it."""

    def __init__(self, model: MultiTaskModel, index: int) -> None:
        super().__init__(model)
        self.block = self._whole[1].blocks[index]

    def forward(self, travelling: Travelling) -> Travelling:
        """Tokens to tokens of the same shape."""
        tokens, checksum = travelling
        (tokens,) = self._whole[1].run_blocks([self.block], tokens)
        return tokens, checksum


class HeadsLayer(Layer):
    """The last norm, the heads and the losses; a layer, since DeepSpeed's hooks see the parameters of layers only.

    Attributes:
        batch: labels of the micro-batch whose tokens come next; set before each forward. Its pixels are not used.
        loss_denominators: of the step; None: predict.
        on_output: is given (output, checksum that came with the tokens, batch) of each micro-batch.
    """

    batch: Batch
    loss_denominators: LossDenominators | None
    on_output: Callable[[dict[str, Any], Tensor, Batch], None]

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__(model)
        self.norm, self.heads = self._whole[1].norm, model.heads

    def forward(self, travelling: Travelling) -> dict[str, Any]:
        """Losses or predictions, as `MultiTaskModel.forward` returns them."""
        tokens, checksum = travelling
        model, backbone = self._whole
        batch = self.batch.to(tokens.device)
        height, width = padded_size(batch, backbone.patch_size)
        features = backbone.feature_map(self.norm(tokens), (height, width))
        valid = valid_region(batch.sizes, (height, width), features.shape[-2:])
        output = model.outputs([Map(at_least_float32(features), valid)], batch, self.loss_denominators)
        self.on_output(output, checksum, self.batch)
        return output


def padded_size(batch: Batch, patch_size: int) -> tuple[int, int]:
    """(H, W) of what the backbone was fed for these samples, known without pixels: what collating pads to."""
    height, width = (batch.sizes if batch.frames is None else batch.frames).amax(dim=0).tolist()
    return max(height, patch_size), max(width, patch_size)


def pipeline_layers(model: MultiTaskModel) -> list[nn.Module]:
    """The layers in order: the embedding, each block, the heads."""
    assert isinstance(model.backbone, EvaViT)
    depth = model.backbone.depth
    return [EmbeddingLayer(model), *(BlockLayer(model, index) for index in range(depth)), HeadsLayer(model)]


def owners(module: MultiTaskModel, bounds: Sequence[int]) -> dict[str, int]:
    """Parameter -> the stage that holds it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for index, layer in enumerate(pipeline_layers(module)):
        stage = sum(index >= start for start in bounds[1:-1])
        found.update({names[id(parameter)]: stage for parameter in layer.parameters()})
    assert found.keys() == set(names.values()), set(names.values()) - found.keys()
    return found


def release(layer: nn.Module) -> None:
    """Free what a layer of another stage holds, if anything; names and shapes stay in the model, on the meta device."""
    layer.to("meta")
    if isinstance(layer, EmbeddingLayer):  # parameters of the backbone itself, which the line above does not reach
        _, backbone = layer._whole
        backbone.pos_embed, backbone.cls_token = layer.pos_embed, layer.cls_token
