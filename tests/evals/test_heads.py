"""Linear heads against numpy and scikit-learn; windows over an image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.crops import NO_CLASS
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Recipe, enlarged, fit
from visft_ds.evals.judge.linear_segmentation import cross_entropy, schedule, windows


def test_a_head_is_an_affine_map_after_batch_norm() -> None:
    """Of each head its own, in float64, by the statistics of training."""
    generator = torch.Generator().manual_seed(0)
    heads = Heads(2, 5, 3).double()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    maps = torch.randn(4, 5, 2, 3, generator=generator, dtype=torch.float64)
    found = heads(maps).detach().numpy()
    values = maps.numpy()
    mean, spread = values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))
    for number in range(2):
        weight, bias, scale, shift = (
            getattr(heads, name)[number].detach().numpy() for name in ("weight", "bias", "scale", "shift")
        )
        normed = (values - mean[:, None, None]) / np.sqrt(spread[:, None, None] ** 2 + heads.norm.eps)
        normed = normed * scale[:, None, None] + shift[:, None, None]
        expected = np.einsum("cd,bdhw->bchw", weight, normed) + bias[:, None, None]
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-9)


def test_loss_by_hand() -> None:
    """Four pixels, of which the void one counts 0; the second head counts its image three times."""
    outputs = torch.tensor([[[[[1.0]], [[0.0]]], [[[0.0]], [[2.0]]]]])  # (1 image, 2 heads, 2 classes, 1, 1)
    truth = torch.tensor([[[0, 1], [1, NO_CLASS]]])
    first = 2 * math.log(1 + math.exp(1)) + math.log(1 + math.exp(-1))
    weights = torch.tensor([[1.0], [0.0]])
    loss = cross_entropy(outputs, truth, weights, torch.Generator(), 1, 0)
    assert loss.item() == pytest.approx(first / 4)
    both = cross_entropy(outputs[:, :1], truth, torch.tensor([[3.0]]), torch.Generator(), 1, 0)
    assert both.item() == pytest.approx(3 * first / 4)


def test_enlarged_is_a_part_of_bilinear_interpolation() -> None:
    maps = torch.randn(2, 3, 4, 5)
    whole = F.interpolate(maps, (31, 23), mode="bilinear")
    torch.testing.assert_close(enlarged(maps, (31, 23), 4, (1, 3)), whole[..., 1::4, 3::4])


def _problem(classes: int = 3) -> tuple[Tensor, Tensor]:
    """Maps (BATCH, 6, 6, 6) and labels of their size, of which no line tells all apart."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, (BATCH, 6, 6))
    maps = rng.normal(size=(BATCH, 6, 6, 6)) * 3 + 5
    maps[:, :classes] += 2 * (np.arange(classes)[None, :, None, None] == truth[:, None])
    return torch.from_numpy(maps).float(), torch.from_numpy(truth)


def _examples(maps: Tensor, truth: Tensor, recipe: Recipe) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(drawn, maps[drawn], truth[drawn]) for drawn in map(torch.randperm, [BATCH] * recipe.steps)]


def test_a_trained_head_is_logistic_regression() -> None:
    maps, truth = _problem()
    recipe = Recipe(steps=250, warm_up=20, rate=0.05, decay=0.0)
    heads = fit(Heads(1, 6, 3), BATCH, _examples(maps, truth, recipe), cross_entropy, recipe, schedule)
    x, y = maps.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), truth.numpy().ravel()
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    expected = LogisticRegression(C=1e6, max_iter=1000).fit(x, y).predict(x)
    said = heads(maps)[:, 0].argmax(dim=1).numpy().ravel()
    assert (said == expected).mean() >= 0.995


def test_resamples_leave_the_first_head_alone() -> None:
    """And each is what a head of its weights alone would be, clipped for itself."""
    maps, truth = _problem()
    recipe = Recipe(steps=5, warm_up=2, rate=0.05, decay=1e-3, dropout=0.1, clip=0.01)
    examples = _examples(maps, truth, recipe)
    alone, beside = (
        fit(Heads(count, 6, 3), BATCH, examples, cross_entropy, recipe, schedule)
        for count in (1, 1 + RESAMPLES)
    )
    torch.testing.assert_close(beside.weight[0], alone.weight[0])
    assert (beside.weight[1:] - alone.weight[0]).flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("size", [(512, 683), (900, 512), (512, 512)])
def test_windows_give_an_image_back(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size)
    counted: list[int] = []

    def see(part: Tensor) -> Tensor:
        counted.append(len(part))
        return part

    torch.testing.assert_close(windows(see, image, 512), image)
    assert len(counted) == {683: 2, 512: 1}.get(size[1] if size[0] == 512 else 0, 3)
