"""Ranks of right answers: by similarity of images and texts, and of whatever else is compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import FloatArray, IntArray

PLAIN: tuple[str, ...] = ("a photo of a {}.",)  #: sentences about a class, unless a data set brings others
_ROWS = 4096  # images that are compared with all classes at once


def rank_of(similarity: Tensor, right: Tensor) -> Tensor:
    """Place of the right column (rows,) in each row of (rows, columns), 0 the best, (rows,) int64.

    Whatever is as similar as the right one counts as before it: a model that says the same to all images is
    last, not first.
    """
    similarity_of_right = similarity.gather(1, right[:, None])
    return (similarity >= similarity_of_right).sum(dim=1) - 1


def hits(ranks: Tensor, k: int) -> FloatArray:
    """1.0 where the right answer is among the first k."""
    return (ranks < k).double().numpy()


def sentences(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, as `class_embeddings` expects them."""
    return [template.replace("{}", name) for name in classes for template in templates]


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """(classes, E) of length 1: the mean over a class's sentences, which come one after the other."""
    by_class = texts.reshape(-1, templates, texts.shape[1])
    return F.normalize(by_class.mean(dim=1), dim=-1)


def rank_by_text(images: Tensor, texts: Tensor, templates: int, labels: IntArray) -> Tensor:
    """Place of the right class of each image (n, E) by the similarity to the sentences of all classes."""
    classes = class_embeddings(texts, templates)
    ranks = []
    for rows, right in zip(images.split(_ROWS), torch.from_numpy(labels).split(_ROWS), strict=True):
        ranks.append(rank_of(rows @ classes.T, right))
    return torch.cat(ranks)
