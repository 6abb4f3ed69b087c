"""Published protocols: the same features and labels through our code and through the sources' formulas,
written down here in our own words; constants stand here as numbers.

The sources: facebookresearch/dinov3 (dinov3/eval/segmentation, dinov3/eval/depth), facebookresearch/dinov2
(dinov2/eval/knn.py, linear.py, dinov2/data/transforms.py), vpariza/open-hummingbird-eval
(hbird/hbird_eval.py, hbird/utils).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional as pixels_of

from visft_ds.evals.judge import (
    classification,
    dense_probes,
    depth,
    in_context,
    linear_classification,
    linear_segmentation,
)
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.dense_probes import LiveFeatures
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.heads import Heads
from visft_ds.evals.judge.knn import knn
from visft_ds.evals.judge.miou import mean_iou
from visft_ds.evals.judge.protocol import PUBLISHED
from visft_ds.evals.judge.rows import Rows
from visft_ds.evals.judge.segmentation import IN_CONTEXT, LINEAR, segmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH, VOID = 8, 255
CPU = Settings(torch.device("cpu"), "fp32", Path("nowhere"), 2, 0)


class _Patches(nn.Module):
    """Features of a patch: what its pixels are on average, and the products of these."""

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        means = F.avg_pool2d(images, PATCH)
        patches = torch.cat([means, means.roll(1, dims=1) * means], dim=1)
        found = {"patches": patches, "pooled": patches.amax(dim=(2, 3))}
        return {kind: found[kind] for kind in kinds}


def _encoder(side: int) -> Encoder:
    return Encoder(
        _Patches(), ("pooled", "patches"), square_preprocess(side, MEAN, STD), (MEAN, STD), side, None
    )


def _dense(rng: np.random.Generator, count: int, size: tuple[int, int], classes: int) -> DenseSet:
    """Noisy pictures of boxes whose colour tells the class, a part of them without one."""
    labels = []
    for _ in range(count):
        cells = rng.integers(0, classes, (3, 4))
        label = np.repeat(np.repeat(cells, -(-size[0] // 3), 0), -(-size[1] // 4), 1)[
            : size[0], : size[1]
        ].astype(np.uint8)
        label[: size[0] // 6] = VOID
        labels.append(label)
    colours = rng.integers(0, 255, (256, 3))
    noise = rng.integers(-60, 60, (count, *size, 3))
    pictures = [
        np.clip(colours[label] + of, 0, 255).astype(np.uint8) for label, of in zip(labels, noise, strict=True)
    ]
    images = ImageSet(
        [str(n) for n in range(count)], lambda n: Image.fromarray(pictures[n]), "x", stretched=True
    )
    return DenseSet(images, lambda n: labels[n], tuple(map(str, range(classes))))


def _normalised(image: Image.Image) -> Tensor:
    return (
        torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]
    ) / torch.tensor(STD)[:, None, None]


def test_constants_are_those_of_the_sources() -> None:
    """Written out: a smaller number of steps or another temperature would be another protocol."""
    recipe, metric = PUBLISHED.segmentation, PUBLISHED.depth
    assert (recipe.steps, recipe.warm_up, recipe.rate, recipe.decay) == (40_000, 1500, 1e-3, 1e-3)
    assert (recipe.betas, recipe.dropout, recipe.clip, recipe.stride) == ((0.9, 0.999), 0.1, math.inf, 1)
    assert (metric.steps, metric.warm_up, metric.rate, metric.decay) == (38_400, 12_800, 3e-4, 1e-4)
    assert (metric.betas[1], metric.dropout, metric.clip, metric.stride) == (0.99, 0.0, 35.0, 1)
    assert (in_context.NEIGHBOURS, in_context.TEMPERATURE, in_context.PASSES) == (30, 0.02, 2)
    assert PUBLISHED.memory == 10_240_000 and PUBLISHED.images == {"train": 10**9, "test": 10**9}
    assert (depth.BINS, depth.NEAREST, depth.FARTHEST) == (256, 0.001, 10.0)
    linear = linear_classification
    assert (linear.STEPS, linear.BATCH, linear.MOMENTUM) == (12_500, 1024, 0.9)
    assert linear.RATES == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    assert dense_probes.BATCH == 16 and PUBLISHED.published and PUBLISHED.resampled


def test_rates_of_both_heads_at_steps_written_out() -> None:
    """Segmentation is one step late; both cosines begin at step 0, so that no rate reaches the highest."""
    rate = [
        linear_segmentation.schedule(PUBLISHED.segmentation, step)
        for step in (0, 1, 751, 1501, 20_000, 40_000)
    ]
    expected = [1e-9, 1e-9, 4.906254906e-4, 9.965290e-4, 5e-4, 0]
    assert [found for found, _ in rate] == pytest.approx(expected, rel=1e-6, abs=1e-15)
    assert {beta for _, beta in rate} == {0.9}
    found = [depth.schedule(PUBLISHED.depth, step) for step in (0, 6400, 12_799, 12_800, 25_600, 38_399)]
    peak = 3e-4
    expected = [
        peak / 1000,
        peak / 1000 + peak * (1 + math.cos(math.pi / 6)) / 2 / 2,
        peak / 1000 + peak * (1 + math.cos(math.pi * 12_799 / 38_400)) / 2 * 12_799 / 12_800,
        1.2e-8 + (peak - 1.2e-8) * (1 + math.cos(math.pi * 12_801 / 38_400)) / 2,
        1.2e-8 + (peak - 1.2e-8) * (1 + math.cos(math.pi * 25_601 / 38_400)) / 2,
        1.2e-8,
    ]
    assert [rate for rate, _ in found] == pytest.approx(expected, rel=1e-9)
    assert [beta for _, beta in found] == pytest.approx([0, 0, 0, 0.85, 0.9, 0.95], abs=1e-6)


def _drawn(seed: int, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def test_in_context_is_hummingbirds() -> None:
    """Void teaches class 0, labels have the size of the input, answers are matched with classes, absent ones
    are 0.
    """
    rng = np.random.default_rng(0)
    side, classes, cells = 32, 5, 4
    train, test = _dense(rng, 6, (40, 56), 4), _dense(rng, 4, (40, 56), 4)
    train, test = (DenseSet(of.images, of.label, ("a", "b", "c", "d", "nowhere")) for of in (train, test))
    encoder = _encoder(side)
    protocol = replace(PUBLISHED, memory=10_240_000)
    benchmark = segmentation("segmentation/x", train, test, protocol)
    assert benchmark.published is not None
    (score,) = benchmark.published(encoder, CPU, [IN_CONTEXT.name])

    view = _encoder(side)
    keys, values = [], []
    for number, place in enumerate([*range(6), *range(6)]):  # two passes, in order
        label = torch.from_numpy(train.label(place).astype(np.int64))
        label[label == VOID] = 0
        pixels, label = _drawn(number, lambda: in_context.crop(train.images.read(place), label, view))  # noqa: B023
        features = encoder.module(pixels[None], ("patches",))["patches"][0].flatten(1).T.numpy()
        keys.append(features / np.linalg.norm(features, axis=1, keepdims=True))
        parts = label.numpy().reshape(cells, PATCH, cells, PATCH).transpose(0, 2, 1, 3).reshape(cells**2, -1)
        values.append(np.stack([(parts == c).mean(axis=1) for c in range(classes)], axis=1))
    keys, values = np.concatenate(keys), np.concatenate(values)  # type: ignore[assignment]
    counts = np.zeros((classes, classes))
    for place in range(4):
        square = test.images.read(place).resize((side, side), Image.Resampling.BILINEAR)
        features = encoder.module(_normalised(square)[None], ("patches",))["patches"][0].flatten(1).T.numpy()
        similarity = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ keys.T  # type: ignore[attr-defined]
        nearest = np.argsort(-similarity, axis=1)[:, :30]
        powers = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.02)
        votes = np.einsum("nk,nkc->nc", powers / powers.sum(axis=1, keepdims=True), values[nearest])  # type: ignore[index, call-overload]
        maps = torch.from_numpy(votes.T.reshape(1, classes, cells, cells))
        answers = F.interpolate(maps, (side, side), mode="bilinear")[0].argmax(dim=0).numpy()
        own = torch.from_numpy(test.label(place))[None]
        truth = pixels_of.resize(own, [side, side], pixels_of.InterpolationMode.NEAREST)[0].numpy()
        known = truth != VOID
        np.add.at(counts, (answers[known], truth[known]), 1)
    union = counts.sum(axis=0)[None] + counts.sum(axis=1)[:, None] - counts
    ratios = counts / np.maximum(union, 1e-8)
    best = max(sum(ratios[a, c] for a, c in enumerate(order)) for order in permutations(range(classes)))
    assert score.value == pytest.approx(best / classes, abs=1e-6) and 0.1 < score.value < 0.9
    assert score.retrained is not None and 0 < score.retrained.std() < 0.1


def test_answers_are_renamed_to_the_classes_that_they_meet_most() -> None:
    """Two classes that are told apart but called by each other's name are right after the matching."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    swapped = F.one_hot(1 - truth, 3).permute(2, 0, 1)[None].float()
    plain = mean_iou("x", iter([swapped]), lambda _: truth, 3)
    matched = mean_iou("x", iter([swapped]), lambda _: truth, 3, matched=True)
    assert plain.value == 0 and matched.value == pytest.approx(2 / 3)  # the third class is nowhere
    assert matched.maps is not None and matched.maps[0, 0, 0] == 0 and matched.maps[0, 0, -1] == 1


def test_colours_of_hummingbird_change_each_by_a_coin_of_its_own() -> None:
    """Once brightness alone, once hue alone; never all or nothing."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8))
    found: set[tuple[str, ...]] = set()
    for seed in range(60):
        asked: list[str] = []
        with pytest.MonkeyPatch.context() as patch:

            class _Told(transforms.ColorJitter):
                def __init__(self, **words: float) -> None:
                    asked.extend(words)  # noqa: B023
                    assert list(words.values()) == [0.1]
                    super().__init__(**words)

            patch.setattr(in_context.transforms, "ColorJitter", _Told)
            pixels, _ = _drawn(
                seed,
                lambda: in_context.crop(image, torch.zeros(40, 40, dtype=torch.int64), _encoder(16)),
            )
        assert pixels.shape == (3, 16, 16)
        found.add(tuple(asked))
    assert len(found) > 10 and () in found and ("hue",) in found


def test_windows_are_means_of_logits_at_the_labels_size(tmp_path: Path) -> None:
    """Starts, overlaps and sizes by the source's formulas; a class that is nowhere is left out of the
    mean.
    """
    rng = np.random.default_rng(1)
    side, stride = 48, 32
    test = _dense(rng, 3, (33, 70), 4)
    test = DenseSet(test.images, test.label, ("a", "b", "c", "d", "nowhere"))
    encoder, head = _encoder(side), Heads(1, 6, 5)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0)))
        head.bias[0, 4] = -100
    head.eval()
    source = LiveFeatures(PUBLISHED, test, test, encoder, CPU)

    def truth_of(number: int) -> Tensor:
        label = torch.from_numpy(test.label(number).astype(np.int64))
        return label.masked_fill(label == VOID, -1)

    score = mean_iou(LINEAR.name, source.in_windows(head.requires_grad_(False)), truth_of, 5)
    both, union = np.zeros(5), np.zeros(5)
    for position in range(3):
        image = test.images.read(position)
        width = int(side * image.width / image.height + 0.5)
        pixels = _normalised(image.resize((width, side), Image.Resampling.BILINEAR))
        total, times = torch.zeros(5, side, width), torch.zeros(side, width)
        for index in range(max(width - side + stride - 1, 0) // stride + 1):
            end = min(index * stride + side, width)
            part = pixels[None, :, :, end - side : end]
            logits = head(encoder.module(part, ("patches",))["patches"])[:, 0]
            total[:, :, end - side : end] += F.interpolate(logits, (side, side), mode="bilinear")[0]
            times[:, end - side : end] += 1
        label = test.label(position)
        answers = (
            F.interpolate((total / times)[None], label.shape, mode="bilinear")[0]
            .softmax(dim=0)
            .argmax(dim=0)
            .numpy()
        )
        for number in range(5):
            here, said = label == number, (answers == number) & (label != VOID)
            both[number] += (here & said).sum()
            union[number] += (here | said).sum()
    assert union[4] == 0
    assert score.value == pytest.approx((both[:4] / union[:4]).mean(), abs=1e-9)
    several = source.in_windows(lambda maps: head(maps).softmax(dim=2))
    assert not np.array_equal(
        mean_iou(LINEAR.name, several, truth_of, 5).values, score.values
    )  # logits, not shares


def test_colours_of_linear_segmentation_with_the_same_draws() -> None:
    """Brightness +-32, contrast and saturation 0.5 to 1.5, hue +-0.5, each by a coin; channels keep their
    order.
    """
    picture = np.random.default_rng(0).integers(0, 255, (12, 10, 3)).astype(np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    untouched = 0
    for seed in range(40):
        found = _drawn(seed, lambda: linear_segmentation.distorted(pixels))
        torch.manual_seed(seed)

        def coin() -> bool:
            return bool(torch.rand(()) < 0.5)

        def between(low: float, high: float) -> float:
            return low + (high - low) * torch.rand(()).item()

        def contrast(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.clip(values.astype(np.float32) * np.float32(between(0.5, 1.5)), 0, 255).astype(np.uint8)

        values = picture
        if coin():
            values = np.clip(values.astype(np.float32) + np.float32(between(-32, 32)), 0, 255).astype(
                np.uint8
            )
        first = coin()
        if first and coin():
            values = contrast(values)
        tensor = torch.from_numpy(values).permute(2, 0, 1)
        if coin():
            tensor = pixels_of.adjust_saturation(tensor, between(0.5, 1.5))
        if coin():
            tensor = pixels_of.adjust_hue(tensor, between(-0.5, 0.5))
        if not first and coin():
            tensor = torch.from_numpy(contrast(tensor.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        assert (found.int() - tensor.int()).abs().max() <= 1, seed  # v1 and v2 of torchvision round apart
        untouched += torch.equal(found, pixels)
    assert 0 < untouched < 10


def test_crops_of_linear_segmentation() -> None:
    """Small images are filled up on the right and below, with 0 after the normalisation and no class; one
    class has at most three quarters, where ten more draws find such a place.
    """
    view = _encoder(32)
    label = torch.zeros(20, 20, dtype=torch.int64)
    label[:, 10:] = 1
    image = Image.fromarray(np.full((20, 20, 3), 200, np.uint8))
    sizes = set()
    for seed in range(12):
        pixels, numbers = _drawn(seed, lambda: linear_segmentation.crop(image, label, view))
        assert pixels.shape == (3, 32, 32) and numbers.shape == (32, 32)
        outside = numbers == -1
        assert (pixels[:, outside] == 0).all() and (pixels[:, ~outside] != 0).all()
        inner = int((~outside).any(dim=1).sum())
        assert not outside[:inner, :inner].any() and outside[inner:].all() and outside[:, inner:].all()
        sizes.add(inner)
    assert min(sizes) < 24 and max(sizes) == 32 and min(sizes) >= 16

    wide = torch.zeros(32, 400, dtype=torch.int64)
    wide[:, 330:] = 1  # most squares have one class only
    large = Image.fromarray(np.zeros((32, 400, 3), np.uint8))
    shares = []
    for seed in range(60):
        _, numbers = _drawn(seed, lambda: linear_segmentation.crop(large, wide, view))
        counts = numbers[numbers >= 0].unique(return_counts=True)[1]
        shares.append(float(counts.max() / counts.sum()))
    assert np.mean(np.array(shares) < 0.75) > 0.2  # 0.04 as it falls


def test_depth_crops_keep_images_and_depths_together() -> None:
    """Rotated, mirrored and cut alike, without the border of NYU's images; colours by gamma, brightness,
    channels.
    """
    rng = np.random.default_rng(0)
    ramp = (np.arange(480)[:, None] * 0.2 + np.arange(640)[None] * 0.2).astype(np.float32)
    image = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2).round().astype(np.uint8))
    view, seen = replace(_encoder(32), normalisation=((0.0,) * 3, (1.0,) * 3)), set()
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(depth, "coloured", lambda pixels: pixels)
            pixels, truth = _drawn(seed, lambda: depth.crop(image, torch.from_numpy(ramp) + 1, view))
        assert pixels.shape == (3, 416, 544) and truth.shape == (416, 544)
        known = truth > 0
        near = (pixels[0] * 255 - truth + 1).abs()[known] < 1
        assert (
            near.float().mean() > 0.99 and known.float().mean() > 0.98
        )  # but at the edge of what was turned in
        assert truth[known].min() >= 1 + 0.2 * (45 + 43) - 1e-3
        seen.add((bool(known.all()), bool(truth[200, 100] < truth[200, 400])))
    assert {turned for turned, _ in seen} == {mirrored for _, mirrored in seen} == {False, True}
    pixels = torch.from_numpy(rng.random((3, 5, 4)))
    for seed in range(20):
        found = _drawn(seed, lambda: depth.coloured(pixels))
        torch.manual_seed(seed)
        if torch.rand(()) >= 0.5:
            assert found is pixels or torch.equal(found, pixels)
            continue
        gamma = torch.empty(()).uniform_(0.9, 1.1).item()
        brightness = torch.empty(()).uniform_(0.75, 1.25).item()
        colours = torch.empty(3, 1, 1).uniform_(0.9, 1.1).numpy()
        expected = np.clip((pixels.numpy() * 255) ** gamma * brightness * colours, 0, 255) / 255
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_depth_is_the_mean_of_an_image_and_its_mirror_image_turned_back() -> None:
    """Images of another size than whole patches are filled up with 0 on all sides, and measured at their own
    size.
    """
    rng = np.random.default_rng(0)
    metres = [rng.uniform(0.5, 12, (20, 37)).astype(np.float32) for _ in range(3)]
    pictures = [rng.integers(0, 255, (20, 37, 3)).astype(np.uint8) for _ in metres]
    images = ImageSet(list("abc"), lambda n: Image.fromarray(pictures[n]), "x", stretched=True)
    data = DenseSet(images, lambda n: metres[n])
    test = depth.judged(data)
    encoder, head = _encoder(32), Heads(1, 6, 256)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, 256, 6, generator=torch.Generator().manual_seed(0)))
    head.eval().requires_grad_(False)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(dense_probes, "_UNITS", (PATCH, 1))
    source = LiveFeatures(PUBLISHED, depth.taught(data), test, encoder, CPU)
    rmse, delta = depth._measured(source.flipped(lambda maps: depth.metres(head(maps))), test)
    monkey.undo()
    bins = torch.linspace(0.001, 10, 256)[:, None, None]
    errors, within = [], []
    for index, truth in enumerate(metres):
        both = []
        for turned in (False, True):
            image = pictures[index][:, ::-1] if turned else pictures[index]
            pixels = F.pad(_normalised(Image.fromarray(np.ascontiguousarray(image))), (1, 2, 2, 2))
            weights = head(encoder.module(pixels[None], ("patches",))["patches"])[0, 0].relu() + 0.1
            seen = (weights / weights.sum(dim=0) * bins).sum(dim=0)
            both.append(seen.flip(-1) if turned else seen)
        mean = (both[0] + both[1]) / 2
        said = F.interpolate(mean[None, None], truth.shape, mode="bilinear")[0, 0].clamp(0.001, 10).numpy()
        counts = (truth < 10) & (truth > 0.001)
        errors.append(math.sqrt(((said - truth)[counts] ** 2).mean()))
        within.append((np.maximum(said / truth, truth / said)[counts] < 1.25).mean())
    assert rmse.value == pytest.approx(np.mean(errors), rel=1e-5)
    assert delta.value == pytest.approx(np.mean(within), abs=1e-6)


def test_knn_is_dinov2s() -> None:
    """Softmax over the 200 nearest at 0.07, of which the first 20 vote; images are cut from 256 pixels to
    224.
    """
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 6, 400), rng.integers(0, 6, 90)
    centres = rng.normal(size=(6, 8))
    known, asked = (
        torch.from_numpy(centres[own] + 1.5 * rng.normal(size=(len(own), 8))) for own in (labels, truth)
    )
    similarity = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    nearest, places = similarity.topk(200, dim=1)
    shares = (nearest / 0.07).softmax(dim=1)[:, :20, None]
    votes = (F.one_hot(torch.from_numpy(labels)[places[:, :20]], 6) * shares).sum(dim=1)
    right = (votes.argmax(dim=1).numpy() == truth).astype(float)
    rows = [
        Rows(of, torch.from_numpy(own), torch.arange(len(own)))
        for of, own in ((known, labels), (asked, truth))
    ]
    assert knn("kNN", *rows).values.tolist() == right.tolist() and 0.3 < right.mean() < 1

    image = Image.fromarray(rng.integers(0, 255, (300, 410, 3)).astype(np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(256, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(image)
    viewed = classification.published_view(_encoder(518))
    assert viewed.side == 224
    torch.testing.assert_close(viewed.preprocess(image), expected, atol=1e-5, rtol=1e-5)


def test_linear_classifiers_are_trained_by_torchs_sgd_and_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rate a classifier of its own, times batch / 256, with momentum 0.9 and no decay."""
    generator = torch.Generator().manual_seed(0)
    rates = (0.01, 0.1)
    monkeypatch.setattr(linear_classification, "STEPS", 12)
    ours = linear_classification.Classifiers(torch.tensor(rates) * 1024 / 256, 5, 3)
    assert ours.weight[0].std().item() == pytest.approx(0.01, rel=0.5) and (ours.bias == 0).all()
    theirs = []
    for number, rate in enumerate(rates):
        layer = nn.Linear(5, 3)
        with torch.no_grad():
            layer.weight.copy_(ours.weight[number])
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 1024 / 256, momentum=0.9, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0)
        theirs.append((layer, optimizer, scheduler))
    counts = torch.ones(2, 16)
    for _ in range(12):
        inputs, labels = torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)
        ours.learn(torch.cat([inputs, inputs], dim=1), labels, counts)  # they read the first channels
        for layer, optimizer, scheduler in theirs:
            optimizer.zero_grad()
            F.cross_entropy(layer(inputs), labels).backward()
            optimizer.step()
            scheduler.step()
    for number, (layer, _, _) in enumerate(theirs):
        torch.testing.assert_close(ours.weight[number], layer.weight)
        torch.testing.assert_close(ours.bias[number, 0], layer.bias)


def test_published_classification_from_images_to_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops teach, held-out training images choose the rate, the middle squares are judged; the same with
    workers.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    pictures = [
        np.clip(rng.integers(0, 120, (30, 30, 3)) + 100 * label, 0, 255).astype(np.uint8) for label in labels
    ]
    images = ImageSet(list(map(str, range(40))), lambda n: Image.fromarray(pictures[n]), "x")
    data = ClassSet(images, labels.astype(np.int64), ("dark", "light"))
    for name, value in (("STEPS", 6), ("BATCH", 8), ("RATES", (1e-4, 0.1))):
        monkeypatch.setattr(linear_classification, name, value)
    benchmark = classification.classification("classification/x", data, data, PUBLISHED)
    assert benchmark.published is not None
    first, second = (
        {score.name: score for score in benchmark.published(_encoder(32), settings, benchmark.names)}
        for settings in (CPU, Settings(torch.device("cpu"), "fp32", Path("nowhere"), 7, 2))
    )
    for name in benchmark.names:
        assert first[name].value > 0.9 and np.array_equal(first[name].values, second[name].values)
        assert first[name].retrained is not None and len(first[name].retrained) >= 5
