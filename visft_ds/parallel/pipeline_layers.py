"""A prepared model as the list of layers that a pipeline divides: the same modules, no second definition.

Two tensors travel between layers: the tokens (B, N, D) float32, and an int64 checksum of the samples they belong to,
which no layer changes. Targets never travel: the last layer gets its batch from this rank's loader.
Letters: B images, H W pixels, N tokens of an image, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visft_ds.data.samples import Batch
from visft_ds.model import LossDenominators, MultiTaskModel, valid_region
from visft_ds.models import require_eva_vit
from visft_ds.tasks.matching import at_least_float32

Travelling = tuple[Tensor, Tensor]  #: tokens float32 first (receive buffers know one dtype each), checksum (1,)


class EmbeddingLayer(nn.Module):
    """Pixels to tokens."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        backbone = require_eva_vit(model.backbone)
        self._model = (model,)  # a tuple, so that the whole model is not part of this layer
        self.patch_embed = backbone.patch_embed
        self.pos_embed, self.cls_token = backbone.pos_embed, backbone.cls_token

    def forward(self, fed: tuple[Tensor, Tensor, Tensor]) -> Travelling:
        """(images (B, 3, H, W) uint8, sizes (B, 2), checksum) -> what travels."""
        images, sizes, checksum = fed
        model = self._model[0]
        tokens = require_eva_vit(model.backbone).embed(model.pixels(images, sizes))
        return tokens.contiguous(), checksum  # a transposed view cannot be sent


class BlockLayer(nn.Module):
    """Transformer block, recomputed in the backward pass where the model's settings select it."""

    def __init__(self, model: MultiTaskModel, index: int) -> None:
        super().__init__()
        self._model = (model,)
        self.block = require_eva_vit(model.backbone).blocks[index]

    def forward(self, travelling: Travelling) -> Travelling:
        """Tokens to tokens of the same shape."""
        tokens, checksum = travelling
        return require_eva_vit(self._model[0].backbone).run_block(self.block, tokens), checksum


class HeadsLayer(nn.Module):
    """The last norm, the heads and the losses; a layer, since DeepSpeed's hooks see the parameters of layers only.

    Attributes:
        batch: labels of the micro-batch whose tokens come next; set before each forward. Its pixels are not used.
        loss_denominators: of the step; None: predict.
        received: the checksum that came with the tokens.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self._model = (model,)
        self.norm = require_eva_vit(model.backbone).norm
        self.heads = model.heads
        self.batch: Batch | None = None
        self.loss_denominators: LossDenominators | None = None
        self.received: Tensor | None = None

    def forward(self, travelling: Travelling) -> dict[str, Any]:
        """Losses or predictions, as `MultiTaskModel.forward` returns them.

        Raises:
            RuntimeError: the number of tokens is not that of images of the batch's size.
        """
        tokens, self.received = travelling
        model, batch = self._model[0], self.batch
        assert batch is not None, "no batch was handed to the heads"
        backbone = require_eva_vit(model.backbone)
        size = padded_size(batch, backbone.patch_size)
        grid = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
        expected = (len(batch.sizes), grid[0] * grid[1] + (backbone.cls_token is not None))
        if tokens.shape[:2] != expected:
            raise RuntimeError(
                f"the last pipeline stage received tokens {tuple(tokens.shape[:2])} and labels of images {size[0]} x "
                f"{size[1]}, which have {expected}: the stages do not follow the same plan"
            )
        batch, tokens = batch.to(tokens.device), self.norm(tokens)
        features, valid = backbone.feature_map(tokens, grid), valid_region(batch.sizes, size, grid)
        return model.outputs(at_least_float32(features), valid, batch, self.loss_denominators)


def padded_size(batch: Batch, patch_size: int) -> tuple[int, int]:
    """(H, W) of what the backbone was fed for these samples, known without pixels: what collating pads to."""
    height, width = (batch.sizes if batch.frames is None else batch.frames).amax(dim=0).tolist()
    return max(height, patch_size), max(width, patch_size)


def pipeline_layers(model: MultiTaskModel) -> list[tuple[str, nn.Module]]:
    """The layers by name, in order: "embedding", "blocks.0", ..., "heads". Parameters are the model's own."""
    blocks = [(f"blocks.{index}", BlockLayer(model, index)) for index in range(require_eva_vit(model.backbone).depth)]
    return [("embedding", EmbeddingLayer(model)), *blocks, ("heads", HeadsLayer(model))]


def owners(module: MultiTaskModel, bounds: Sequence[int]) -> dict[str, int]:
    """Parameter -> the stage that holds it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for index, (_, layer) in enumerate(pipeline_layers(module)):
        stage = sum(index >= start for start in bounds[1:-1])
        found.update({names[id(parameter)]: stage for parameter in layer.parameters()})
    assert found.keys() == set(names.values()), set(names.values()) - found.keys()
    return found


def release(model: MultiTaskModel, layer: nn.Module) -> None:
    """Free what a layer of another stage holds, if anything; names and shapes stay in the model, on the meta device."""
    layer.to("meta")
    if isinstance(layer, EmbeddingLayer):  # parameters of the backbone itself, which the line above does not reach
        backbone = require_eva_vit(model.backbone)
        backbone.pos_embed, backbone.cls_token = layer.pos_embed, layer.cls_token
