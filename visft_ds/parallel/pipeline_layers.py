"""A prepared model as the list of layers that a pipeline divides: the same modules, no second definition.

Two tensors travel between layers: the tokens (B, N, D) float32, and an int64 label that no layer changes: a checksum
of the samples they belong to, followed by the patch grids (h, w) of all images where their tokens are packed in one
row, (1, T, D). Targets never travel: the last layer gets its batch from this rank's loader.
Letters: B images, H W pixels, N tokens of an image, T tokens of all, h w patch grid, D width.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Batch
from visft_ds.model import LossDenominators, MultiTaskModel, valid_region
from visft_ds.models.backbone import require_eva_vit
from visft_ds.models.eva_vit import Grids
from visft_ds.ops.attention import Packing
from visft_ds.tasks.matching import at_least_float32

Travelling = tuple[Tensor, Tensor]  #: tokens float32 first (receive buffers know one dtype each), label (1 [+ 2B],)


class _Packings:
    """Packing of tokens, read from their label; once for all layers of a stage, as the host has to wait for it."""

    def __init__(self) -> None:
        self._read: tuple[Tensor, Grids, Packing] | None = None

    def of(self, model: MultiTaskModel, label: Tensor) -> tuple[Grids, Packing] | tuple[None, None]:
        """Grids and packing; None where every image has a row of its own."""
        if len(label) == 1:
            return None, None
        if self._read is None or self._read[0] is not label:
            grids = [(height, width) for height, width in label[1:].view(-1, 2).tolist()]
            self._read = (label, grids, require_eva_vit(model.backbone).packing(grids, label.device))
        return self._read[1:]


class EmbeddingLayer(nn.Module):
    """Pixels to tokens."""

    def __init__(self, model: MultiTaskModel, packings: _Packings) -> None:
        super().__init__()
        backbone = require_eva_vit(model.backbone)
        self._packings = packings
        self._model = (model,)  # a tuple, so that the whole model is not part of this layer
        self.patch_embed = backbone.patch_embed
        self.pos_embed, self.cls_token = backbone.pos_embed, backbone.cls_token

    def forward(self, fed: tuple[Tensor, Tensor, Tensor]) -> Travelling:
        """(images (B, 3, H, W) uint8, sizes (B, 2), label) -> what travels."""
        images, sizes, label = fed
        model = self._model[0]
        grids, _ = self._packings.of(model, label)
        tokens = require_eva_vit(model.backbone).embed(model.pixels(images, sizes), grids)
        return tokens.contiguous(), label  # a transposed view cannot be sent


class BlockLayer(nn.Module):
    """Transformer block, recomputed in the backward pass where the model's settings select it."""

    def __init__(self, model: MultiTaskModel, index: int, packings: _Packings) -> None:
        super().__init__()
        self._model = (model,)
        self._packings = packings
        self.block = require_eva_vit(model.backbone).blocks[index]

    def forward(self, travelling: Travelling) -> Travelling:
        """Tokens to tokens of the same shape."""
        tokens, label = travelling
        model = self._model[0]
        _, packing = self._packings.of(model, label)
        return require_eva_vit(model.backbone).run_block(self.block, tokens, packing), label


class HeadsLayer(nn.Module):
    """The last norm, the heads and the losses; a layer, since DeepSpeed's hooks see the parameters of layers only.

    Attributes:
        batch: labels of the micro-batch whose tokens come next; set before each forward. Its pixels are not used.
        loss_denominators: of the step; None: predict.
        received: the label that came with the tokens.
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
        size, frames = padded_size(batch, backbone.patch_size), model.frames(batch)
        grid = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
        expected = (len(batch.sizes), grid[0] * grid[1] + (backbone.cls_token is not None))
        if frames is not None:
            expected = (1, sum(backbone.packing(frames.grids, tokens.device).lengths))
        if tokens.shape[:2] != expected:
            raise RuntimeError(
                f"the last pipeline stage received tokens {tuple(tokens.shape[:2])} and labels of images {size[0]} x "
                f"{size[1]}, which have {expected}: the stages do not follow the same plan"
            )
        batch, tokens = batch.to(tokens.device), self.norm(tokens)
        if frames is None:
            features, valid = backbone.feature_map(tokens, grid), valid_region(batch.sizes, size, grid)
        else:
            features, valid = backbone.feature_maps(tokens, frames.grids), frames.valid(batch.sizes)
        return model.outputs(at_least_float32(features), valid, batch, self.loss_denominators)


def padded_size(batch: Batch, patch_size: int) -> tuple[int, int]:
    """(H, W) of what the backbone was fed for these samples, known without pixels: what collating pads to."""
    height, width = (batch.sizes if batch.frames is None else batch.frames).amax(dim=0).tolist()
    return max(height, patch_size), max(width, patch_size)


def sample_checksum(batch: Batch) -> Tensor:
    """(1,) int64: crc32 over indices, image ids and random keys, in their order."""
    value = 0
    for tensor in (batch.indices, batch.image_ids, batch.random_keys):
        value = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), value)
    return torch.tensor([value])


def travelling_label(model: MultiTaskModel, batch: Batch) -> Tensor:
    """Label that travels with the tokens of a batch, from the stage that reads its pixels."""
    checksum, frames = sample_checksum(batch), model.frames(batch)
    return checksum if frames is None else torch.cat([checksum, torch.tensor(frames.grids).flatten()])


def pipeline_layers(model: MultiTaskModel) -> list[tuple[str, nn.Module]]:
    """The layers by name, in order: "embedding", "blocks.0", ..., "heads". Parameters are the model's own."""
    packings, depth = _Packings(), require_eva_vit(model.backbone).depth
    blocks = [(f"blocks.{index}", BlockLayer(model, index, packings)) for index in range(depth)]
    return [("embedding", EmbeddingLayer(model, packings)), *blocks, ("heads", HeadsLayer(model))]


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
