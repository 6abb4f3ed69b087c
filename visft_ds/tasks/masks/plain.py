"""Plain mask head: queries and cells pass together through transformer blocks; each query gives a class and a
mask.

The decoder of PMT (https://github.com/tue-mps/pmt), whose published weights fit, but for what keeps a loss
independent of the division of a batch: means and spreads of channels are fixed instead of a batch's,
positions run over each image's own part, padded cells are neither seen nor counted, and random numbers come
from the samples' keys.
Letters: B images, K maps, D width of a map, E width of the head, h w grid, S = h*w cells, P tokens in front
of them, Q queries, N = Q + P + S, C classes, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visft_ds.data.samples import Map
from visft_ds.ops import to_device
from visft_ds.randomness import generator
from visft_ds.tasks import Shapes
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.masks.config import MaskDecoderConfig
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.transformer import by_head

_ROPE_BASE = 100.0
_EPS = 1e-5  # of the norms
_POWER = 0.9  # of the annealing
_STRIDE = 16  # pixels; maps are brought to the one whose cells are nearest to this
_STREAM = 64  # of a sample's random key, for the first block; points of the loss are drawn from lower ones


def masked_share(block: int, blocks: int, progress: float) -> float:
    """Share of the queries that see only cells of their own mask in a block, at `progress` in [0, 1] of a
    training.

    It falls from 1 to 0, block after block: as PMT's recipes anneal it.
    """
    start = 0.0
    length = 0.034
    if block > 0:
        start = 1 / 6 + block / (2 * (blocks - 1))
        length = 1 / 6
    done = min(max((progress - start) / length, 0.0), 1.0)
    return float((1 - done) ** _POWER)


class PlainHead(nn.Module):
    """Maps of a tower -> Q masks with classes: one set of them, in training also one before each block.

    In training a query sees, in each block, the cells where the mask that it predicts in front of it is at
    least one half, or all cells; which of both is drawn for each image and query (`masked_share`).
    Predictions are computed again in the backward pass: they are most of what would be kept.
    """

    #: Fields of a batch with which it is called in training.
    reads = ("random_keys", "progress")

    def __init__(self, shapes: Shapes, options: MaskDecoderConfig) -> None:
        """A head for maps of these (width, pixels to a cell).

        Raises:
            ValueError: the width is not a multiple of 4 times the number of attention heads.
        """
        super().__init__()
        width = options.hidden_dim or shapes[-1][0]
        num_heads = options.num_heads or max(1, width // 64)
        if width % (4 * num_heads):
            raise ValueError(
                f"a plain head: hidden_dim {width} is not a multiple of 4 * num_heads = {num_heads}"
            )
        self.num_queries = options.num_queries
        self.max_detections = options.most_objects
        self.num_heads = num_heads
        strides = [stride for _, stride in shapes]
        distances = [abs(math.log2(stride / _STRIDE)) for stride in strides]
        self.nearest = distances.index(min(distances))
        self.laterals = nn.ModuleList(Lateral(map_width, width) for map_width, _ in shapes)
        self.queries = nn.Embedding(options.num_queries, width)
        ffn_dim = options.ffn_dim or width
        self.blocks = nn.ModuleList(Block(width, num_heads, ffn_dim) for _ in range(options.blocks))
        self.norm = nn.LayerNorm(width, _EPS)
        # Masks have cells of 4 pixels, or half as large ones as the map.
        doublings = int(math.log2(strides[self.nearest])) - 2
        self.upscale = nn.ModuleList(Upscale(width) for _ in range(max(1, doublings)))
        self.mask1 = nn.Linear(width, width)
        self.mask2 = nn.Linear(width, width)
        self.mask3 = nn.Linear(width, width)
        self.classes = nn.Linear(width, options.num_classes + 1)

    def forward(
        self, maps: Sequence[Map], random_keys: Tensor | None = None, progress: float = 0.0
    ) -> MaskOutput:
        """Masks and classes.

        Args:
            random_keys: (B,) of the samples, on the host; needed in training.
            progress: share of the training that is done.
        """
        nearest = maps[self.nearest]
        valid = nearest.valid
        grid = valid.shape[1:]
        x = self._tokens(maps)
        cos, sin = rotations(valid, x.shape[-1] // self.num_heads)
        known = shown = None
        if nearest.has_empty_cells():
            known = _among_tokens(valid.flatten(1), x)[:, None, None]  # (B, 1, 1, N)
            shown = valid[:, None].to(x.dtype)
        sets = []
        for number, block in enumerate(self.blocks):
            seen = None
            if self.training:
                assert random_keys is not None
                sets.append(self._predict(x, grid, shown))
                share = masked_share(number, len(self.blocks), progress)
                if share > 0:
                    _, masks = sets[-1]
                    seen = self._seen_cells(masks, valid, random_keys, number, share)
                    seen = _among_tokens(seen, x)[:, None]  # (B, 1, Q, N)
                    if known is not None:
                        seen = seen & known
            x = block(x, cos, sin, seen, known)
        sets.append(self._predict(x, grid, shown))
        return MaskOutput.of_sets(sets, maps[-1].shares(), self.max_detections)

    def _tokens(self, maps: Sequence[Map]) -> Tensor:
        """(B, N, E): the queries, and the sum of all maps."""
        grid = maps[self.nearest].features.shape[2:]
        tokens_of_maps = []
        for lateral, level in zip(self.laterals, maps, strict=True):
            cells = level.features
            if cells.shape[2:] != grid:
                cells = level.resized(grid, antialias=True)
            tokens = cells.flatten(2).mT
            if level.prefix is not None:
                tokens = torch.cat((level.prefix, tokens), dim=1)
            tokens_of_maps.append(lateral(tokens))
        total = sum(tokens_of_maps[1:], start=tokens_of_maps[0])
        numbers = torch.arange(self.num_queries, device=total.device)
        queries = self.queries(numbers).to(total.dtype)
        queries = queries.expand(total.shape[0], -1, -1)
        return torch.cat((queries, total), dim=1)

    def _seen_cells(
        self,
        masks: Tensor,
        valid: Tensor,
        random_keys: Tensor,
        block: int,
        share: float,
    ) -> Tensor:
        """(B, Q, S) bool, cells that each query sees in a block: those of its mask, or all."""
        masks = F.interpolate(masks.detach(), valid.shape[1:], mode="bilinear")
        covered = masks.flatten(2) > 0
        keys = random_keys.tolist()
        draws = [generator(key, _STREAM + block).random(self.num_queries) for key in keys]
        free = to_device(torch.from_numpy(np.stack(draws) >= share), covered.device)
        return covered | free[..., None]

    def _predict(self, x: Tensor, grid: Sequence[int], shown: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, fine grid), 0 at padded cells."""
        predict = self._prediction
        if torch.is_grad_enabled():
            predict = partial(checkpoint, predict, use_reentrant=False, preserve_rng_state=False)
        prediction: tuple[Tensor, Tensor] = predict(x, grid, shown)
        return prediction

    def _prediction(self, x: Tensor, grid: Sequence[int], shown: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        queries = x[:, : self.num_queries]
        cells = x[:, -math.prod(grid) :]
        fine = cells.mT.unflatten(2, grid)
        for upscale in self.upscale:
            if shown is not None:
                shown = shown.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            fine = upscale(fine, shown)
        hidden = F.gelu(self.mask1(queries))
        hidden = F.gelu(self.mask2(hidden))
        embeddings = self.mask3(hidden)
        masks = torch.einsum("bqe,behw->bqhw", embeddings, fine.to(embeddings.dtype))
        if shown is not None:
            masks = masks * shown
        return self.classes(queries), masks


def _among_tokens(cells: Tensor, x: Tensor) -> Tensor:
    """(..., N) bool of (..., S): the tokens (B, N, E) in front of the cells count as True."""
    others = x.shape[1] - cells.shape[-1]
    return F.pad(cells, (others, 0), value=True)


class Lateral(nn.Module):
    """A map's way into the head: its channels' means and spreads away, then itself plus a small MLP of it."""

    def __init__(self, width: int, into: int) -> None:
        super().__init__()
        self.channels = Channels(width)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.straight = nn.Identity() if width == into else nn.Linear(width, into)
        self.fc1 = nn.Linear(width, into // 2)
        self.fc2 = nn.Linear(into // 2, into)
        self.gain = nn.Parameter(torch.ones(into))

    def forward(self, x: Tensor) -> Tensor:
        """(B, P + S, D) -> (B, P + S, E)."""
        x = self.channels(x) * self.weight + self.bias
        hidden = F.gelu(self.fc1(x))
        return self.gain * (self.straight(x) + self.fc2(hidden))


class Block(nn.Module):
    """Pre-norm attention among all tokens and an MLP; no bias on k, and a gain on each branch."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, _EPS)
        self.norm2 = nn.LayerNorm(width, _EPS)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, width)
        self.gain1 = nn.Parameter(torch.ones(width))
        self.gain2 = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor | None,
        known: Tensor | None,
    ) -> Tensor:
        """(B, N, E) -> (B, N, E).

        `seen` (B, 1, Q, N) bool: what the queries attend to; None: as all others, to `known` (B, 1, 1, N), or
        to all.
        """
        normed = self.norm1(x)
        q = rotated(by_head(self.q(normed), self.num_heads), cos, sin)
        k = rotated(by_head(self.k(normed), self.num_heads), cos, sin)
        v = by_head(self.v(normed), self.num_heads)
        if seen is None:
            mixed = F.scaled_dot_product_attention(q, k, v, known)
        else:
            # The few rows with masks of their own leave the rest a fast kernel.
            queries, others = q.tensor_split([seen.shape[2]], dim=2)
            masked = F.scaled_dot_product_attention(queries, k, v, seen)
            mixed = F.scaled_dot_product_attention(others, k, v, known)
            mixed = torch.cat((masked, mixed), dim=2)
        mixed = mixed.transpose(1, 2).flatten(2)
        x = x + self.gain1 * self.proj(mixed)
        hidden = F.gelu(self.fc1(self.norm2(x)))
        return x + self.gain2 * self.fc2(hidden)


class Upscale(nn.Module):
    """Twice as many rows and columns: a transposed convolution, a depthwise one, and a norm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, x: Tensor, shown: Tensor | None) -> Tensor:
        """(B, E, h, w) -> (B, E, 2h, 2w); `shown` (B, 1, 2h, 2w), 1 inside the images and 0 outside, None:
        all is.
        """
        x = F.gelu(self.up(x))
        if shown is not None:
            x = x * shown
        x = self.near(x).permute(0, 2, 3, 1)
        return self.norm(x).permute(0, 3, 1, 2)


def rotations(valid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, S, width) of the cells of valid (B, h, w): axes run from -1 to 1 over an image's
    part.
    """
    rows = _coordinates(valid.any(dim=2))[:, :, None]
    columns = _coordinates(valid.any(dim=1))[:, None, :]
    coordinates = torch.stack((rows.expand(valid.shape), columns.expand(valid.shape)), dim=-1)
    coordinates = coordinates.flatten(1, 2)  # (B, S, 2)
    exponents = torch.arange(width // 4, device=valid.device) * (4 / width)
    rates = _ROPE_BASE**-exponents
    angles = 2 * math.pi * coordinates[..., None] * rates  # (B, S, 2, width / 4)
    angles = angles.flatten(2).tile(2)[:, None]
    return angles.cos(), angles.sin()


def _coordinates(inside: Tensor) -> Tensor:
    """Centres of the cells (B, n) along an axis, -1 to 1 over those that show image: `inside` (B, n) bool."""
    centres = torch.arange(inside.shape[1], device=inside.device) + 0.5
    return 2 * centres / inside.sum(dim=1, keepdim=True) - 1


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, N, d) with its last S tokens rotated; those before are no cells."""
    num_cells = cos.shape[2]
    others = x[:, :, :-num_cells]
    cells = x[:, :, -num_cells:]
    left, right = cells.chunk(2, dim=-1)
    quarter_turned = torch.cat((-right, left), dim=-1)
    turned = cells * cos + quarter_turned * sin
    return torch.cat((others, turned.to(x.dtype)), dim=2)
