"""The arithmetic of a training step from shapes alone: matrix products, convolutions and attention.

Two operations for each multiplication with its addition; norms, activations and losses are not counted, as usual (they
are below one percent here). A product (rows, inner) x (inner, outer) costs 2 * rows * inner * outer forward, the same
again for the gradient of its input, and once more for that of its weight; only what the parameters that train make
necessary is counted. Attention costs two products forward. Backward a fused kernel computes five (it makes the scores
again), one that kept the scores four.

Letters: M rows (images x tokens), S and Q tokens or queries, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import TARGETS

FUSED_ATTENTION, KEPT_SCORES = 5, 4


@dataclass(frozen=True)
class Flops:
    """Operations of a part of a step."""

    forward: int = 0
    backward: int = 0
    recompute: int = 0  #: forward again within the backward pass (activation checkpointing)

    @property
    def all(self) -> int:
        """Everything the device computes."""
        return self.forward + self.backward + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)


def product(rows: int, inner: int, outer: int, *, to_input: bool, to_weight: bool) -> Flops:
    """A linear layer, or a convolution seen as one; with the gradients that are needed."""
    once = 2 * rows * inner * outer
    return Flops(once, once * (to_input + to_weight))


def attention(
    images: int, queries: int, keys: int, width: int, *, needed: tuple[bool, bool, bool], products: int
) -> Flops:
    """Scores and mixture of all heads together; `needed`: query, key and value need a gradient."""
    once = 2 * images * queries * keys * width
    by_query, by_key, by_value = needed
    if products == KEPT_SCORES:  # separate products, of which only those that are asked for are computed
        products = by_query + by_key + by_value + (by_query or by_key)
    return Flops(2 * once, products * once if any(needed) else 0)


class Adapters(Protocol):
    """Rank and targets of low-rank adapters, e.g. `visft.lora`."""

    @property
    def rank(self) -> int: ...

    @property
    def targets(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class TowerShape:
    """Shape and settings that the operations of a backbone depend on."""

    width: int
    depth: int
    hidden: int
    patch_size: int
    post_norm: bool
    rank: int = 0  #: of the adapters; 0: none
    targets: tuple[str, ...] = ()  #: names of models.lora.TARGETS
    recompute: str = "none"  #: or one of models.eva_vit.RECOMPUTE
    plain_attention_below: int = 0  #: tokens of an image, see `visft_ds.ops.attention.plain_below`
    linear_keeps_late: bool = False  #: DeepSpeed's linear layer (ZeRO-3) notes what it keeps after its product
    trainable: frozenset[str] = frozenset()  #: qualified names within the backbone; empty: only a forward


def tower_from(
    backbone: EvaViT,
    lora: Adapters | None,
    trained: Iterable[str],
    *,
    plain_attention_below: int = 0,
    linear_keeps_late: bool = False,
) -> TowerShape:
    """The arithmetic's view of a backbone.

    Args:
        lora: of the adapters in it, if any.
        trained: names of its parameters that train.
        plain_attention_below, linear_keeps_late: as in `TowerShape`.
    """
    return TowerShape(
        width=backbone.width,
        depth=backbone.depth,
        hidden=int(backbone.blocks[0].mlp.fc1.out_features),  # type: ignore[union-attr, arg-type]
        patch_size=backbone.patch_size,
        post_norm=backbone.post_norm,
        rank=lora.rank if lora else 0,
        targets=tuple(lora.targets) if lora else (),
        recompute=backbone.recompute,
        plain_attention_below=plain_attention_below,
        linear_keeps_late=linear_keeps_late,
        trainable=frozenset(trained),
    )


def tower_flops(tower: TowerShape, images: int, tokens: int, patches: int) -> Flops:
    """Operations of the backbone for `images` images of `patches` patches (`tokens`: with a class token, if any)."""
    inner = 3 * tower.patch_size**2
    trains = "patch_embed.proj.weight" in tower.trainable
    total = product(images * patches, inner, tower.width, to_input=False, to_weight=trains)
    for block in block_flops(tower, images, tokens):
        total += block
    return total


def packed_flops(tower: TowerShape, tokens: Sequence[int], patches: int) -> Flops:
    """Operations of the backbone for packed images of these numbers of tokens, out of `patches` that are embedded."""
    embedding = tower_flops(tower, 1, 0, patches)
    return sum((tower_flops(tower, 1, count, 0) for count in tokens), embedding)


def block_flops(tower: TowerShape, images: int, tokens: int) -> list[Flops]:
    """Operations of each block for `images` images of `tokens` tokens."""
    flows = _any(tower, ("cls_token", "pos_embed", "patch_embed."))  # whether the residual stream needs a gradient
    blocks = []
    for index in range(tower.depth):
        block, flows = _block(tower, index, images, tokens, flows)
        blocks.append(block)
    return blocks


def _block(tower: TowerShape, index: int, images: int, tokens: int, flows: bool) -> tuple[Flops, bool]:
    """Operations of a block, and whether its output needs a gradient, given whether its input does."""
    rows, width, start = images * tokens, tower.width, f"blocks.{index}."
    products = KEPT_SCORES if tokens < tower.plain_attention_below else FUSED_ATTENTION
    total, inside, costs = Flops(), False, dict[str, Flops]()
    for branch, layers in (("1", ("attn.qkv", "attention", "attn.proj")), ("2", ("mlp.fc1", "mlp.fc2"))):
        inside = flows or (not tower.post_norm and _any(tower, (f"{start}norm{branch}.",)))
        for layer in layers:
            if layer == "attention":
                inside = inside or _any(tower, (f"{start}attn.q_bias", f"{start}attn.v_bias"))
                cost = attention(images, tokens, tokens, width, needed=(inside,) * 3, products=products)
            else:
                cost = _linear(tower, start, layer, rows, inside)
                inside = inside or _any(tower, (f"{start}{layer}.",))
            costs[layer] = cost
            total += cost
        flows = flows or inside or _any(tower, (f"{start}norm{branch}.",))
    if tower.trainable and tower.recompute != "none":
        again = _again(tower, start, costs)
        total += Flops(recompute=again if (inside if tower.recompute == "mlp" else flows) else 0)
    return total, flows


def _again(tower: TowerShape, start: str, costs: Mapping[str, Flops]) -> int:
    """Operations of the second forward of a block, or of what of it is recomputed."""
    chosen = {layer: cost.forward for layer, cost in costs.items()}
    if tower.recompute == "mlp":
        chosen = {layer: cost for layer, cost in chosen.items() if layer not in ("attn.qkv", "attention")}
    # Recomputing ends with the last tensor that has to be kept. A plain last layer in front of an addition keeps
    # nothing of its result, so it is not recomputed; in front of a norm, or with adapters, it is. The norm behind
    # an MLP that is recomputed alone has kept what it needs.
    normed = tower.post_norm and tower.recompute != "mlp"
    if not (normed or tower.linear_keeps_late or _any(tower, (f"{start}mlp.fc2.",))):
        chosen["mlp.fc2"] = 0
    return sum(chosen.values())


def _linear(tower: TowerShape, start: str, layer: str, rows: int, flows: bool) -> Flops:
    """A linear layer of a block with its adapters; `flows`: its input needs a gradient."""
    width, hidden = tower.width, tower.hidden
    sizes = {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.fc1": (width, hidden)}
    inner, outer = sizes.get(layer, (hidden, width))
    total = product(rows, inner, outer, to_input=flows, to_weight=f"{start}{layer}.weight" in tower.trainable)
    slices = [outer // parts for path, _, parts in (TARGETS[target] for target in tower.targets) if path == layer]
    if not slices or not tower.rank:
        return total
    trains_a, trains_b = (f"{start}{layer}.lora_{name}" in tower.trainable for name in "AB")
    down = product(rows, inner, len(slices) * tower.rank, to_input=flows, to_weight=trains_a)
    up = product(rows, tower.rank, sum(slices), to_input=flows or trains_a, to_weight=trains_b)
    return total + down + up


def _any(tower: TowerShape, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(prefix) for name in tower.trainable for prefix in prefixes)
