"""Arithmetic of the detection head as a closed formula; see `visft_ds.costs.flops` for what is counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visft_ds.costs.flops import FUSED_ATTENTION, KEPT_SCORES, Flops, attention, product


def detection_flops(
    options: Mapping[str, Any], in_channels: int, images: int, patches: int, *, trains: bool, flows: bool
) -> Flops:
    """Operations of the detection head: `trains`, all its weights do; `flows`, the features need a gradient."""
    if not trains and not flows:  # nothing behind the head wants a gradient
        flops = detection_flops(options, in_channels, images, patches, trains=True, flows=True)
        return Flops(flops.forward)
    encoder, decoder, queries = options["encoder_dim"], options["decoder_dim"], options["num_queries"]
    layers, dropout = options["decoder_layers"], options["dropout"]
    # With dropout torch's CPU attention is the plain one, which keeps its scores; a GPU's is fused all the same.
    common = {"ffn": options["ffn_dim"], "trains": trains, "products": KEPT_SCORES if dropout else FUSED_ATTENTION}
    entries, asked = patches + 1, images * queries  # a task token goes in front of the patches
    total = product(images * patches, in_channels, encoder, to_input=flows, to_weight=trains)
    total += product(images * patches, encoder, decoder, to_input=True, to_weight=trains)  # memory
    total += product(images * patches, encoder, decoder, to_input=False, to_weight=trains)  # positions
    for _ in range(options["encoder_layers"]):
        total += _attend(images, entries, entries, encoder, (True, True, True), **common)
        total += _feed_forward(images * entries, encoder, **common)
    for index in range(layers):
        # The first layer's state is zero: its own attention has a gradient through the learnt queries only.
        later = index > 0
        total += _attend(images, queries, queries, decoder, (later or trains, later or trains, later), **common)
        total += _attend(images, queries, patches, decoder, (later or trains, True, True), **common)
        total += _feed_forward(asked, decoder, **common)
    total += product(layers * asked, decoder, options["num_classes"] + 1, to_input=True, to_weight=trains)
    for outer in (decoder, decoder, 4):
        total += product(layers * asked, decoder, outer, to_input=True, to_weight=trains)
    return total


def dense_flops(
    options: Mapping[str, Any], in_channels: int, images: int, patches: int, *, trains: bool, flows: bool
) -> Flops:
    """Operations of the dense head: a 1x1 convolution, two 3x3 and two small ones; arguments as `detection_flops`."""
    width, cells = options["width"], images * patches
    total = product(cells, in_channels, width, to_input=flows, to_weight=trains)
    for outer in (width, width, options["num_classes"], 4):
        total += product(cells, 9 * width, outer, to_input=flows or trains, to_weight=trains)
    return total


def _attend(
    images: int,
    queries: int,
    keys: int,
    width: int,
    to_inputs: tuple[bool, bool, bool],
    *,
    ffn: int,
    trains: bool,
    products: int,
) -> Flops:
    """Three input projections, attention, output projection; `to_inputs`: query, key, value need a gradient."""
    total = Flops()
    for count, to_input in zip((queries, keys, keys), to_inputs, strict=True):
        total += product(images * count, width, width, to_input=to_input, to_weight=trains)
    first, second, third = to_inputs
    needed = (first or trains, second or trains, third or trains)
    total += attention(images, queries, keys, width, needed=needed, products=products)
    return total + product(images * queries, width, width, to_input=any(needed), to_weight=trains)


def _feed_forward(rows: int, width: int, *, ffn: int, trains: bool, products: int) -> Flops:
    inner = product(rows, width, ffn, to_input=True, to_weight=trains)
    return inner + product(rows, ffn, width, to_input=True, to_weight=trains)
