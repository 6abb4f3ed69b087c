"""A prepared model as the list of layers that a pipeline divides: the same modules, no second definition.

Between layers travel two tensors: the tokens (B, N, D) float32, and an untouched checksum (1,) int64 of the samples
they belong to. Labels never travel: the last layer is handed its batch.
Letters: B images, H W pixels, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visft_ds.data.samples import Batch
from visft_ds.models.backbone import own_tower
from visft_ds.multitask import MultiTaskModel, Normaliser, valid_region

Travelling = tuple[Tensor, Tensor]  #: tokens (B, N, D) float32 first (receive buffers know one dtype each), checksum


class EmbeddingLayer(nn.Module):
    """Pixels to tokens."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        backbone = own_tower(model.backbone)
        self._model = (model,)  # a tuple, so that the whole model is not part of this layer
        self.patch_embed = backbone.patch_embed
        self.pos_embed, self.cls_token = backbone.pos_embed, backbone.cls_token

    def forward(self, fed: tuple[Tensor, Tensor, Tensor]) -> Travelling:
        """(images (B, 3, H, W) uint8, sizes (B, 2), checksum) -> what travels."""
        images, sizes, checksum = fed
        model = self._model[0]
        tokens = own_tower(model.backbone).embed(model.pixels(images, sizes))
        return tokens.contiguous(), checksum  # a transposed view cannot be sent


class BlockLayer(nn.Module):
    """One transformer block, recomputed in the backward pass where the model says so."""

    def __init__(self, model: MultiTaskModel, index: int) -> None:
        super().__init__()
        self._model = (model,)
        self._index = index
        self.block = own_tower(model.backbone).blocks[index]

    def forward(self, travelling: Travelling) -> Travelling:
        """Tokens to tokens of the same shape."""
        tokens, checksum = travelling
        return own_tower(self._model[0].backbone).run_block(self._index, self.block, tokens), checksum


class HeadsLayer(nn.Module):
    """The last norm, the heads and the losses of the batch it was handed; inside a forward, where DeepSpeed sees them.

    Attributes:
        batch: labels of the micro-batch whose tokens come next; its pixels are not looked at.
        normaliser: of the step; None: predict.
        received: the checksum that came with the tokens.
    """

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self._model = (model,)
        self.norm = own_tower(model.backbone).norm
        self.heads = model.heads
        self.batch: Batch | None = None
        self.normaliser: Normaliser | None = None
        self.received: Tensor | None = None

    def forward(self, travelling: Travelling) -> dict[str, Any]:
        """What `MultiTaskModel.forward` returns.

        Raises:
            RuntimeError: as many tokens as images of another size have.
        """
        tokens, self.received = travelling
        model, batch = self._model[0], self.batch
        assert batch is not None, "no batch was handed to the heads"
        size = padded_size(batch, model.backbone.patch_size)
        grid = (size[0] // model.backbone.patch_size, size[1] // model.backbone.patch_size)
        expected = grid[0] * grid[1] + (model.backbone.cls_token is not None)
        if tokens.shape[:2] != (len(batch.sizes), expected):
            raise RuntimeError(
                f"the last pipeline stage received tokens {tuple(tokens.shape[:2])} and labels of images {size[0]} x "
                f"{size[1]}, which have {(len(batch.sizes), expected)}: the stages do not follow the same plan"
            )
        batch = batch.to(tokens.device)
        features = own_tower(model.backbone).feature_map(self.norm(tokens), grid).float()
        return model.outputs(features, valid_region(batch.sizes, size, grid), batch, self.normaliser)


def padded_size(batch: Batch, patch_size: int) -> tuple[int, int]:
    """(H, W) of what the backbone was fed for these samples, known without pixels: what collating pads to."""
    height, width = batch.sizes.amax(dim=0).tolist()
    return max(height, patch_size), max(width, patch_size)


def pipeline_layers(model: MultiTaskModel) -> list[tuple[str, nn.Module]]:
    """The layers by name, in order: "embedding", "blocks.0", ..., "heads". Parameters are the model's own."""
    blocks = [(f"blocks.{index}", BlockLayer(model, index)) for index in range(own_tower(model.backbone).depth)]
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
        backbone = own_tower(model.backbone)
        backbone.pos_embed, backbone.cls_token = layer.pos_embed, layer.cls_token
