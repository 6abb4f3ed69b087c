"""Loss and loop of both kinds of training: AdamW, warm-up and cosine, a bounded temperature, one progress line.

The loss is that of CLIP (https://arxiv.org/abs/2103.00020, section 2.3 and figure 3), InfoNCE in both directions.

Letters: B pairs, E width of the embedding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.monitor.console import Progress, StepLine
from visft_ds.parallel import distributed

#: What the logarithm of the temperature's inverse starts from, and the most it may reach (section 2.4 and 2.5): beyond
#: a factor of 100 training was unstable.
INITIAL_LOG_SCALE = math.log(1 / 0.07)
LARGEST_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class ContrastiveRecipe:
    """Hyperparameters. Betas and epsilon of AdamW are CLIP's for transformers (arXiv 2103.00020, table 18).

    Raises ValueError for a number that is out of range.
    """

    steps: int
    batch_size: int  #: pairs of a step, over all processes
    lr: float
    weight_decay: float = 0.1  #: of matrices; norms, biases, embeddings and the temperature have none
    warmup: float = 0.1  #: share of the steps
    max_norm: float = 1.0  #: of the gradient
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"steps={self.steps} must be at least 1 and seed={self.seed} at least 0")
        if not (self.lr > 0 and self.max_norm > 0 and self.weight_decay >= 0 and 0 <= self.warmup < 1):
            raise ValueError(
                f"lr={self.lr:g} and max_norm={self.max_norm:g} must be above 0, weight_decay={self.weight_decay:g} at "
                f"least 0, warmup={self.warmup:g} from 0 up to (not with) 1"
            )

    def factor(self, step: int) -> float:
        """Factor on the learning rate in a step, counted from 0: linear warmup, then cosine decay."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))


@dataclass(frozen=True)
class Curve:
    """Curves of a training, by step."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]  #: of the gradient of all pairs, before it was clipped


def clip_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """Mean of the two cross-entropies of finding an image's text among all texts, and a text's image.

    Args:
        images: (B, E), each of length 1.
        texts: (B, E), each of length 1; row i belongs to image i, and every other row counts as wrong, equal texts too.
        log_scale: 0-d or (1,), logarithm of what similarities are multiplied by.

    Returns:
        0-d; log(B) where nothing tells the pairs apart.
    """
    logits = log_scale.exp() * images @ texts.T
    targets = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def optimizer_for(parameters: Mapping[str, nn.Parameter], recipe: ContrastiveRecipe) -> torch.optim.AdamW:
    """AdamW over named parameters."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        embedding = "embed" in name or name.endswith("cls_token")
        (plain if parameter.ndim < 2 or embedding else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6)


def fit(
    compute: Callable[[int], float],
    parameters: Mapping[str, nn.Parameter],
    log_scale: nn.Parameter,
    recipe: ContrastiveRecipe,
    *,
    log_every: int = 20,
) -> Curve:
    """Train.

    Args:
        compute: step -> its loss; adds the gradients of all pairs of the step to `.grad`, on every rank alike.
        parameters: all that trains, by name; the optimiser sees nothing else.
        log_scale: kept from 0 to LARGEST_LOG_SCALE, whether it trains or not.

    Raises:
        ValueError: a loss or gradient that is not finite, with its step.
    """
    optimizer = optimizer_for(parameters, recipe)
    losses: list[float] = []
    norms: list[float] = []
    with Progress(recipe.steps, log_every=log_every, enabled=distributed.is_main()) as progress:
        for step in range(recipe.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * recipe.factor(step)
            optimizer.zero_grad(set_to_none=True)
            loss = compute(step)
            norm = float(nn.utils.clip_grad_norm_(parameters.values(), recipe.max_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"step {step + 1}: the loss is {loss}, the norm of the gradient {norm}; the last finite loss was "
                    f"{losses[-1] if losses else 'none'}. Give a lower learning rate than {recipe.lr:g}"
                )
            optimizer.step()
            with torch.no_grad():
                log_scale.clamp_(0.0, LARGEST_LOG_SCALE)
            losses.append(loss)
            norms.append(norm)
            seconds = time.perf_counter() - began
            rate = recipe.lr * recipe.factor(step)
            progress.update(StepLine(step + 1, {"contrastive": loss}, rate, norm, recipe.batch_size, seconds, 0.0))
    return Curve(tuple(losses), tuple(norms))
