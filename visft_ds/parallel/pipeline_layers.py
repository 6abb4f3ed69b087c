"""A prepared model as the list of layers that a pipeline divides: the same modules, no second definition.

Two tensors travel between layers: the tokens (B, N, D) float32, or packed (1, T, D), and int64 facts that no
layer
changes: a checksum of the samples they belong to, and the grids of images that differ in size. Targets never
travel: the last layer gets its batch from this rank's loader.
Letters: B images, H W pixels, N tokens of an image, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.model import MultiTaskModel, normalise_pixels
from visft_ds.models.eva_vit import EvaViT, Grids
from visft_ds.ops import at_least_float32
from visft_ds.tasks.criterion import LossDenominators

#: Tokens float32 first (receive buffers know one dtype each), then the facts of `facts_of`.
Travelling = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """Part of a model; its parameters are the model's own."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        assert isinstance(model.backbone, EvaViT), "the configuration allows no other"
        # A tuple, so that the whole model is not part of this layer; the parts of other stages are on the
        # meta device.
        self._whole = (model, model.backbone)


class EmbeddingLayer(Layer):
    """Pixels to tokens."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__(model)
        _, backbone = self._whole
        self.patch_embed = backbone.patch_embed
        self.pos_embed = backbone.pos_embed
        self.cls_token = backbone.cls_token

    def forward(self, fed: tuple[Tensor, Tensor, Tensor]) -> Travelling:
        """(images (B, 3, H, W) uint8, sizes (B, 2), facts) -> what travels."""
        images, sizes, facts = fed
        _, backbone = self._whole
        tokens = backbone.embed(normalise_pixels(backbone, images, sizes), grids_of(facts))
        return tokens.contiguous(), facts  # a transposed view cannot be sent


class BlockLayer(Layer):
    """Transformer block, recomputed in the backward pass where the model's settings select it."""

    def __init__(self, model: MultiTaskModel, index: int) -> None:
        super().__init__(model)
        self.block = self._whole[1].blocks[index]

    def forward(self, travelling: Travelling) -> Travelling:
        """Tokens to tokens of the same shape."""
        tokens, facts = travelling
        _, backbone = self._whole
        packing = backbone.packing(grids_of(facts), tokens.device)
        (tokens,) = backbone.run_blocks([self.block], tokens, packing)
        return tokens, facts


class HeadsLayer(Layer):
    """The last norm, the heads and the losses; a layer, since DeepSpeed's hooks see the parameters of layers
    only.

    Attributes:
        batch: labels of the micro-batch whose tokens come next; set before each forward. Its pixels are not
        used.
        loss_denominators: of the step; None: predict.
        on_output: is given (output, checksum that came with the tokens, batch) of each micro-batch.
    """

    batch: Batch
    loss_denominators: LossDenominators | None
    on_output: Callable[[dict[str, Any], Tensor, Batch], None]

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__(model)
        self.norm = self._whole[1].norm
        self.heads = model.heads

    def forward(self, travelling: Travelling) -> dict[str, Any]:
        """Losses or predictions, as `MultiTaskModel.forward` returns them."""
        tokens, facts = travelling
        model, backbone = self._whole
        batch = self.batch.to(tokens.device)
        size = model.padded_size(batch)
        features, _ = backbone.map_of(self.norm(tokens), size, grids_of(facts))
        maps = [Map.of(at_least_float32(features), batch.sizes, size)]
        output = model.outputs(maps, batch, self.loss_denominators)
        self.on_output(output, facts[:1], self.batch)
        return output


def facts_of(model: MultiTaskModel, batch: Batch, checksum: Tensor) -> Tensor:
    """(1 + 2 B,) int64, what travels beside packed tokens: a checksum (1,), height and width of each image in
    patches.

    The checksum alone for images that are alike, which are a batch.
    """
    sides = []
    for height, width in model.frames(batch) or ():
        sides += [height // model.backbone.patch_size, width // model.backbone.patch_size]
    return torch.cat((checksum, torch.tensor(sides, dtype=checksum.dtype)))


def grids_of(facts: Tensor) -> Grids | None:
    """Grids of the images of packed tokens; None for a batch. The host waits for the device, once in each
    stage.
    """
    if len(facts) == 1:
        return None
    known = vars(facts)  # of the tensor, which all layers of a stage hand on
    if "grids" not in known:
        known["grids"] = [(height, width) for height, width in facts[1:].view(-1, 2).tolist()]
    grids: Grids = known["grids"]
    return grids


def pipeline_layers(model: MultiTaskModel) -> list[nn.Module]:
    """The layers in order: the embedding, each block, the heads."""
    assert isinstance(model.backbone, EvaViT)
    depth = model.backbone.depth
    return [EmbeddingLayer(model), *(BlockLayer(model, index) for index in range(depth)), HeadsLayer(model)]


def owners(module: MultiTaskModel, bounds: Sequence[int]) -> dict[str, int]:
    """Parameter -> the stage that holds it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    stages = {}
    for index, layer in enumerate(pipeline_layers(module)):
        stage = sum(index >= start for start in bounds[1:-1])
        stages.update({names[id(parameter)]: stage for parameter in layer.parameters()})
    assert stages.keys() == set(names.values()), set(names.values()) - stages.keys()
    return stages


def release(layer: nn.Module) -> None:
    """Free what a layer of another stage holds, if anything; names and shapes stay in the model, on the meta
    device.
    """
    layer.to("meta")
    # Parameters of the backbone itself, which the line above does not reach.
    if isinstance(layer, EmbeddingLayer):
        _, backbone = layer._whole
        backbone.pos_embed = layer.pos_embed
        backbone.cls_token = layer.cls_token
