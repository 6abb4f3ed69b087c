"""The text tower of a CLIP on new captions, against image features of a frozen vision tower that are made once.

What ViSFT changes in a vision tower, its text tower has never seen: this is how the two come together again. Nothing of
the images changes while texts are learnt (no augmentation), so that every image is encoded once, before the first step.

LoRA (https://arxiv.org/abs/2106.09685) is on q and v of the attention, inside PyTorch's own module: open_clip's text
towers use `nn.MultiheadAttention`, which hands its fused weight to one function and calls no linear layer, so that an
adapter around a layer would do nothing. The weight itself is made of the frozen one and the update.

Letters: n images, B pairs of a step over all processes, E width of the embedding, W width of the tower, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from visft_ds.experiments.contrastive.captions import Tokens
from visft_ds.experiments.contrastive.fitting import ContrastiveRecipe, Curve, clip_loss, fit
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.experiments.contrastive.text_sides import TextSide
from visft_ds.models.eva_vit import generator_for
from visft_ds.parallel import distributed

#: What trains: the whole text tower, LoRA on q and v of its attention, or its last map; the temperature with each.
Trained = Literal["all", "lora", "projection"]
DEFAULT_RECIPE = ContrastiveRecipe(steps=500, batch_size=256, lr=1e-5)
_WEIGHT = "in_proj_weight"


@dataclass(frozen=True)
class TextTuning:
    """Settings of a text tower's training. Raises ValueError for a number that is out of range."""

    train: Trained = "all"
    recipe: ContrastiveRecipe = DEFAULT_RECIPE
    rank: int = 16  #: of LoRA
    alpha: float = 16.0
    micro_batch: int | None = None  #: texts of a process whose activations are kept at once; None: all
    bf16: bool = False  #: matrix products of the text tower under autocast; values and moments stay in float32

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"LoRA rank {self.rank} and alpha {self.alpha:g} must be positive")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"a micro batch of {self.micro_batch} texts is not allowed: give at least 1")


@dataclass(frozen=True)
class Tuned:
    """Result of a training."""

    curve: Curve
    trained: tuple[str, ...]  #: names of `TextSide.parameters` that have changed
    count: int  #: of the values that trained, the temperature among them


def check_ranks(how: TextTuning) -> int:
    """Texts of a step for each process. Raises ValueError where they cannot be divided equally."""
    ranks = distributed.world_size()
    if how.recipe.batch_size % ranks:
        raise ValueError(
            f"{ranks} processes cannot share a batch of {how.recipe.batch_size}: give a multiple of {ranks}"
        )
    return how.recipe.batch_size // ranks


def tune_text(
    side: TextSide,
    images: Tensor,
    tokens: Tokens,
    order: PairOrder,
    how: TextTuning,
    *,
    log_every: int = 20,
) -> Tuned:
    """Train the text side in place; collective. LoRA is merged at the end.

    Every process encodes its share of a step's texts and takes part in the loss over all of them. So the gradient is
    that of one process with the whole batch, whatever the number of processes and the size of the micro batch: the loss
    is differentiated with respect to all texts' embeddings, and each embedding then on its own, as in
    https://arxiv.org/abs/2101.06983.

    Args:
        images: (n, E) of length 1, the same on every rank.
        tokens: of all captions.

    Raises:
        ValueError: as `check_ranks` and `fit`; a tower without what is to train.
    """
    share = check_ranks(how)
    module, scale = side.tower.module, side.logit_scale
    changed, parameters = _choose(side, how)
    scale.requires_grad_()
    trained = {**parameters, "logit_scale": scale}
    device = next(iter(trained.values())).device
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)

    def encode(rows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=how.bf16):
            return F.normalize(module(tokens.rows(rows).to(device)).float(), dim=-1)

    def compute(step: int) -> float:
        places, captions = (torch.from_numpy(found) for found in order.step(step))
        parts = captions[mine].split(how.micro_batch or share)
        with torch.set_grad_enabled(len(parts) == 1):
            embedded = [encode(part) for part in parts]
        texts = distributed.gather_rows(torch.cat(embedded)).requires_grad_()
        loss = clip_loss(images[places].to(device), texts, scale)
        loss.backward()
        assert texts.grad is not None
        for part, found, gradient in zip(
            parts, embedded, texts.grad[mine].split(how.micro_batch or share), strict=True
        ):
            (found if len(parts) == 1 else encode(part)).backward(gradient)
        # The temperature's gradient is that of the whole loss on every rank already.
        distributed.sum_in_place([value.grad for value in parameters.values() if value.grad is not None])
        return loss.item()

    curve = fit(compute, trained, scale, how.recipe, log_every=log_every)
    merge_updates(module)
    module.requires_grad_(False)
    return Tuned(curve, tuple(changed), sum(value.numel() for value in trained.values()))


def _choose(side: TextSide, how: TextTuning) -> tuple[list[str], dict[str, nn.Parameter]]:
    """(names of what will have changed, name -> what trains, made trainable)."""
    module = side.tower.module.requires_grad_(False).eval()
    if how.train == "lora":
        changed = inject_updates(module, side.parameters, how.rank, how.alpha, how.recipe.seed)
        return changed, update_parameters(module)
    parameters = dict(side.parameters) if how.train == "all" else side.projection()
    for value in parameters.values():
        value.requires_grad_()
    return list(parameters), parameters


# -------------------------------------------------------------------------------------------------------- LoRA


class QVUpdate(nn.Module):
    """(3W, W) -> the same with low-rank updates of the rows of q and v; nothing at the start, since B is zero."""

    def __init__(self, width: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.lora_A = nn.Parameter(torch.empty(2 * rank, width).uniform_(-1, 1, generator=generator) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(2 * width, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that attention computes with."""
        q, k, v = weight.chunk(3)
        (a_q, a_v), (b_q, b_v) = self.lora_A.split(self.rank), self.lora_B.chunk(2)
        return torch.cat([q + self.scale * (b_q @ a_q), k, v + self.scale * (b_v @ a_v)])


def inject_updates(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int, alpha: float, seed: int
) -> list[str]:
    """Put updates onto every fused attention weight among `parameters`; returns their names there.

    Args:
        module: whatever holds the parameters; what else it holds stays as it is.
        rank, alpha: the update is scaled by alpha / rank.

    Raises:
        ValueError: a tower without such attention.
    """
    names = {id(value): name for name, value in parameters.items()}
    owners = {layer: names.get(id(weight)) for layer in module.modules() if (weight := _fused(layer)) is not None}
    chosen = {layer: name for layer, name in owners.items() if name is not None}
    if not chosen:
        raise ValueError(
            "the text tower has no attention with a fused weight (in_proj_weight) to put LoRA on: train all of it, or "
            "the projection"
        )
    for layer, name in chosen.items():
        weight = parameters[name]
        update = QVUpdate(weight.shape[1], rank, alpha / rank, generator_for(seed, name)).to(weight.device)
        parametrize.register_parametrization(layer, _WEIGHT, update)
    return list(chosen.values())


def update_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> what trains."""
    return {name: value for name, value in module.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def merge_updates(module: nn.Module) -> None:
    """Make the updates part of the weights, in place, and take them out."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, _WEIGHT):
            parametrize.remove_parametrizations(layer, _WEIGHT, leave_parametrized=True)


def _fused(layer: nn.Module) -> Tensor | None:
    weight = layer._parameters.get(_WEIGHT)
    return weight if weight is not None and weight.shape[0] == 3 * weight.shape[1] else None
