"""The loss of CLIP (https://arxiv.org/abs/2103.00020, section 2.3 and figure 3), InfoNCE in both directions.

Letters: B pairs, E width of the embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

#: What the logarithm of the temperature's inverse starts from, and the most it may reach (section 2.4 and 2.5): beyond
#: a factor of 100 training was unstable.
INITIAL_LOG_SCALE = math.log(1 / 0.07)
LARGEST_LOG_SCALE = math.log(100)


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
