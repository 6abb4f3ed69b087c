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
from visft_ds.ops import at_least_float32, to_device
from visft_ds.randomness import generator
from visft_ds.tasks.channels import Channels
from visft_ds.tasks.masks.config import PlainHeadConfig
from visft_ds.tasks.masks.output import SegmentationOutput

_ROPE_BASE, _EPS, _POWER = 100.0, 1e-5, 0.9
_STRIDE = 16  #: maps are brought to the one nearest to this
_STREAM = 64  #: of a sample's random key, for the first block; points of the loss are drawn from lower ones


def masked_share(block: int, blocks: int, progress: float) -> float:
    """Share of the queries that see only cells of their own mask in a block, at `progress` in [0, 1] of a
    training.
    """
    start = 1 / 6 + block / (2 * (blocks - 1)) if block else 0.0
    length = 1 / 6 if block else 0.034
    return float((1 - min(max((progress - start) / length, 0.0), 1.0)) ** _POWER)


class PlainHead(nn.Module):
    """Maps of a tower -> Q masks with classes: one set of them, in training also one before each block.

    In training a query sees, in each block, the cells where the mask that it predicts in front of it is at
    least one half, or all cells; which of both is drawn for each image and query (`masked_share`).
    Predictions are computed again in the backward pass: they are most of what would be kept.
    """

    #: Fields of a batch with which it is called in training.
    reads = ("random_keys", "progress")

    def __init__(self, shapes: Sequence[tuple[int, int]], options: PlainHeadConfig) -> None:
        super().__init__()
        width = options.hidden_dim or shapes[-1][0]
        num_heads = options.num_heads or max(1, width // 64)
        if width % (4 * num_heads):
            raise ValueError(
                f"a plain head: hidden_dim {width} is not a multiple of 4 * num_heads = {num_heads}"
            )
        self.num_queries, self.num_heads = options.num_queries, num_heads
        strides = [stride for _, stride in shapes]
        self.nearest = min(range(len(shapes)), key=lambda place: abs(math.log2(strides[place] / _STRIDE)))
        self.laterals = nn.ModuleList(Lateral(one, width) for one, _ in shapes)
        self.queries = nn.Embedding(options.num_queries, width)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, options.ffn_dim or width) for _ in range(options.blocks)
        )
        self.norm = nn.LayerNorm(width, _EPS)
        doublings = max(1, int(math.log2(strides[self.nearest])) - 2)
        self.upscale = nn.ModuleList(Upscale(width) for _ in range(doublings))
        self.mask1, self.mask2, self.mask3 = (nn.Linear(width, width) for _ in range(3))
        self.classes = nn.Linear(width, options.num_classes + 1)

    def forward(
        self, maps: Sequence[Map], random_keys: Tensor | None = None, progress: float = 0.0
    ) -> SegmentationOutput:
        """Masks and classes.

        Args:
            random_keys: (B,) of the samples, on the host; needed in training.
            progress: share of the training that is done.
        """
        valid = maps[self.nearest].valid
        x = self._tokens(maps)
        inside = valid.flatten(1)
        cos, sin = rotations(valid, x.shape[-1] // self.num_heads)
        shown = known = None
        if maps[self.nearest].has_empty_cells():
            shown = valid[:, None].to(x.dtype)
            others = inside.new_ones(len(x), x.shape[1] - inside.shape[1])
            known = torch.cat((others, inside), dim=1)[:, None, None]  # (B, 1, 1, N)
        sets = []
        for place, block in enumerate(self.blocks):
            seen = None
            if self.training:
                assert random_keys is not None
                sets.append(self._predicted(x, valid.shape[1:], shown))
                share = masked_share(place, len(self.blocks), progress)
                if share > 0:
                    seen = self._seen(sets[-1][1], valid, random_keys, place, share)
                    seen = F.pad(seen, (x.shape[1] - seen.shape[2], 0), value=True)[:, None]  # (B, 1, Q, N)
                    seen = seen if known is None else seen & known
            x = block(x, cos, sin, seen, known)
        sets.append(self._predicted(x, valid.shape[1:], shown))
        logits, masks = (at_least_float32(torch.stack(part)) for part in zip(*sets, strict=True))
        return SegmentationOutput(logits, masks)

    def _tokens(self, maps: Sequence[Map]) -> Tensor:
        """(B, N, E): the queries, and the sum of all maps."""
        grid, total = maps[self.nearest].features.shape[2:], None
        for lateral, one in zip(self.laterals, maps, strict=True):
            features = one.features
            if features.shape[2:] != grid:
                features = one.resized(grid, antialias=True)
            tokens = features.flatten(2).transpose(1, 2)
            added = lateral(tokens if one.prefix is None else torch.cat((one.prefix, tokens), dim=1))
            total = added if total is None else total + added
        assert total is not None
        first = self.queries(torch.arange(self.num_queries, device=total.device)).to(total.dtype)
        return torch.cat((first.expand(len(total), -1, -1), total), dim=1)

    def _seen(self, masks: Tensor, valid: Tensor, random_keys: Tensor, block: int, share: float) -> Tensor:
        """(B, Q, S) bool, cells that each query sees in a block: those of its mask, or all."""
        within = F.interpolate(masks.detach(), valid.shape[1:], mode="bilinear").flatten(2) > 0
        stream = _STREAM + block
        drawn = np.stack([generator(key, stream).random(self.num_queries) for key in random_keys.tolist()])
        free = to_device(torch.from_numpy(drawn >= share), within.device)
        return within | free[..., None]

    def _predicted(self, x: Tensor, grid: Sequence[int], shown: Tensor | None) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, fine grid), 0 at padded cells."""
        predict = self._predict
        if torch.is_grad_enabled():
            predict = partial(checkpoint, predict, use_reentrant=False, preserve_rng_state=False)
        found: tuple[Tensor, Tensor] = predict(x, grid, shown)
        return found

    def _predict(self, x: Tensor, grid: Sequence[int], shown: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        queries, cells = x[:, : self.num_queries], x[:, -math.prod(grid) :]
        fine = cells.transpose(1, 2).unflatten(2, grid)
        for step in self.upscale:
            shown = None if shown is None else shown.repeat_interleave(2, 2).repeat_interleave(2, 3)
            fine = step(fine, shown)
        codes = self.mask3(F.gelu(self.mask2(F.gelu(self.mask1(queries)))))
        masks = torch.einsum("bqe,behw->bqhw", codes, fine.to(codes.dtype))
        return self.classes(queries), masks if shown is None else masks * shown


class Lateral(nn.Module):
    """A map's way into the head: its channels' means and spreads away, then itself plus a small MLP of it."""

    def __init__(self, width: int, into: int) -> None:
        super().__init__()
        self.channels = Channels(width)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.straight = nn.Identity() if width == into else nn.Linear(width, into)
        self.fc1, self.fc2 = nn.Linear(width, into // 2), nn.Linear(into // 2, into)
        self.gain = nn.Parameter(torch.ones(into))

    def forward(self, x: Tensor) -> Tensor:
        """(B, P + S, D) -> (B, P + S, E)."""
        x = self.channels(x) * self.weight + self.bias
        return self.gain * (self.straight(x) + self.fc2(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Pre-norm attention among all tokens and an MLP; no bias on k, and a gain on each branch."""

    def __init__(self, width: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, width, bias=False),
            nn.Linear(width, width),
        )
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)
        self.gain1, self.gain2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None, known: Tensor | None
    ) -> Tensor:
        """(B, N, E) -> (B, N, E).

        `seen` (B, 1, Q, N) bool: what the queries attend to; None: as all others, to `known` (B, 1, 1, N), or
        to all.
        """
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        rows = (
            0 if seen is None else seen.shape[2]
        )  # the few rows with masks of their own leave the rest a fast kernel
        parts = [F.scaled_dot_product_attention(q[:, :, :rows], k, v, seen)] if rows else []
        parts.append(F.scaled_dot_product_attention(q[:, :, rows:], k, v, known))
        x = x + self.gain1 * self.proj(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
        return x + self.gain2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


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
        x = self.near(x if shown is None else x * shown)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rotations(valid: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, S, width) of the cells of valid (B, h, w): axes run from -1 to 1 over an image's
    part.
    """
    places = []
    for axis in (1, 2):
        inside = valid.any(dim=3 - axis).sum(dim=1)  # (B,) rows or columns that show image
        cell = torch.arange(valid.shape[axis], device=valid.device) + 0.5
        places.append(2 * cell[None] / inside[:, None] - 1)
    rows, columns = places
    place = torch.stack(
        (rows[:, :, None].expand(valid.shape), columns[:, None, :].expand(valid.shape)), dim=-1
    )
    rates = _ROPE_BASE ** -(torch.arange(width // 4, device=valid.device) * (4 / width))
    angles = (2 * math.pi * place.flatten(1, 2)[..., None] * rates).flatten(2).tile(2)[:, None]
    return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, N, d) with its last S tokens rotated; those before are no cells."""
    first, cells = x.split((x.shape[2] - cos.shape[2], cos.shape[2]), dim=2)
    left, right = cells.chunk(2, dim=-1)
    turned = cells * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((first, turned.to(x.dtype)), dim=2)
