"""Decoders that PMT published for DINOv3 (https://github.com/tue-mps/pmt, model_zoo): plain heads under other
names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.tasks.masks.config import PlainHeadConfig

#: Our names -> theirs behind "network.", the first whose beginning fits; {n} is a map, block or step.
#: `spread` is the root of their variance, with `tasks.channels.EPS` added.
PMT_NAMES = {
    "queries.": "decoder.q.",
    "laterals.{n}.channels.mean": "bn.{n}.running_mean",
    "laterals.{n}.channels.spread": "bn.{n}.running_var",
    "laterals.{n}.fc1.": "decoder.lateral_projections.{n}.0.",
    "laterals.{n}.fc2.": "decoder.lateral_projections.{n}.2.",
    "laterals.{n}.gain": "decoder.scalers.{n}",
    "laterals.": "bn.",
    "blocks.{n}.norm1.": "decoder.blocks.{n}.norm1.",
    "blocks.{n}.norm2.": "decoder.blocks.{n}.norm2.",
    "blocks.{n}.q.": "decoder.blocks.{n}.attention.q_proj.",
    "blocks.{n}.k.": "decoder.blocks.{n}.attention.k_proj.",
    "blocks.{n}.v.": "decoder.blocks.{n}.attention.v_proj.",
    "blocks.{n}.proj.": "decoder.blocks.{n}.attention.o_proj.",
    "blocks.{n}.fc1.": "decoder.blocks.{n}.mlp.up_proj.",
    "blocks.{n}.fc2.": "decoder.blocks.{n}.mlp.down_proj.",
    "blocks.{n}.gain1": "decoder.blocks.{n}.layer_scale1.lambda1",
    "blocks.{n}.gain2": "decoder.blocks.{n}.layer_scale2.lambda1",
    "norm.": "decoder.decoder_norm.",
    "upscale.{n}.up.": "decoder.upscale.{n}.conv1.",
    "upscale.{n}.near.": "decoder.upscale.{n}.conv2.",
    "upscale.": "decoder.upscale.",
    "mask1.": "decoder.mask_head.0.",
    "mask2.": "decoder.mask_head.2.",
    "mask3.": "decoder.mask_head.4.",
    "classes.": "decoder.class_head.",
}
#: Blocks that the decoder of a tower of 12 blocks reads, and of 24.
_LAYERS = (2, 5, 8, 11)
_LAYERS_OF_24 = (5, 11, 17, 23)
_WIDTH_OF_24 = 1024  # channels of the tower of 24 blocks


def options_of_pmt(
    sizes: Mapping[str, Sequence[int]],
) -> tuple[list[tuple[int, int]], dict[str, Any], tuple[int, ...]] | None:
    """(shapes of maps, options, blocks that it reads) of a decoder with tensors of these sizes; None: it is
    none.
    """
    if "network.decoder.q.weight" not in sizes:
        return None

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in sizes)

    queries, width = sizes["network.decoder.q.weight"]
    options = PlainHeadConfig(
        num_classes=sizes["network.decoder.class_head.weight"][0] - 1,
        num_queries=queries,
        blocks=count(r"network\.decoder\.blocks\.\d+\.norm1\.weight"),
        ffn_dim=sizes["network.decoder.blocks.0.mlp.up_proj.weight"][0],
    )
    shapes = [(width, 16)] * count(r"network\.bn\.\d+\.weight")
    layers = _LAYERS_OF_24 if width == _WIDTH_OF_24 else _LAYERS
    return shapes, options.model_dump(), layers
