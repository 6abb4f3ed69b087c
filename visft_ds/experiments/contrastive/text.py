"""The text tower of a CLIP on new captions, against image features of a frozen vision tower that are made once.

What ViSFT changes in a vision tower, its text tower has never seen: this is how the two come together again. Nothing of
the images changes while texts are learnt (no augmentation), so that every image is encoded once, before the first step.

Letters: n images, B pairs of a step over all processes, E width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.experiments.contrastive import text_lora
from visft_ds.experiments.contrastive.fitting import ContrastiveRecipe, Curve, fit
from visft_ds.experiments.contrastive.loss import clip_loss
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.experiments.contrastive.text_sides import TextSide
from visft_ds.experiments.contrastive.tokens import Tokens
from visft_ds.parallel import distributed

#: What trains: the whole text tower, LoRA on q and v of its attention, or its last map; the temperature with each.
Trained = Literal["all", "lora", "projection"]
DEFAULT_RECIPE = ContrastiveRecipe(steps=500, batch_size=256, lr=1e-5)


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
        text_lora.check(self.rank, self.alpha)
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
    quiet: bool = False,
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

    curve = fit(compute, trained, scale, how.recipe, log_every=log_every, quiet=quiet)
    text_lora.merge(module)
    module.requires_grad_(False)
    return Tuned(curve, tuple(changed), sum(value.numel() for value in trained.values()))


def _choose(side: TextSide, how: TextTuning) -> tuple[list[str], dict[str, nn.Parameter]]:
    """(names of what will have changed, name -> what trains, made trainable)."""
    module = side.tower.module.requires_grad_(False).eval()
    if how.train == "lora":
        changed = text_lora.inject(module, side.parameters, how.rank, how.alpha, how.recipe.seed)
        return changed, text_lora.updates(module)
    parameters = dict(side.parameters) if how.train == "all" else side.projection()
    for value in parameters.values():
        value.requires_grad_()
    return list(parameters), parameters
