"""The class loss of set predictions averages images as the published code does with one image on each GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.options import criterion_of
from tests.parallel.engine_case import build, global_batch, loss_denominators, part
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.matching import match
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.head import SegmentationOutput
from visft_ds.tasks.segmentation.mask_matching import match_masks
from visft_ds.tasks.segmentation.mask_points import draw_points

LAYERS, QUERIES, CLASSES = 2, 7, 6
#: Objects of the images: none (crowds alone give none either), fewer and more than there are queries.
COUNTS = [0, 3, 12, 1, 0, 7]
SHARED = {"num_queries": QUERIES, "decoder_layers": LAYERS}
TASKS = ("detection", "segmentation")


@dataclass(frozen=True)
class Case:
    """Predictions for images, their targets, and the class of each query's object."""

    task: str
    criterion: Any
    output: Any
    targets: Any
    logits: Tensor  #: (L, B, Q, C + 1), leaf
    wanted: Tensor  #: (L, B, Q)

    def losses(self) -> dict[str, Tensor]:
        """Losses with the denominators that a training loop makes of the counts."""
        batch = Batch(*[torch.arange(len(COUNTS))] * 7, targets={self.task: self.targets})
        counts = {name: torch.tensor(value).double() for name, value in self.criterion.count(batch).items()}
        found: dict[str, Tensor] = self.criterion(self.output, self.targets, counts)
        return found


def detection() -> Case:
    logits = torch.randn(LAYERS, len(COUNTS), QUERIES, CLASSES + 1, dtype=torch.float64, requires_grad=True)
    boxes = torch.rand(LAYERS, len(COUNTS), QUERIES, 4, dtype=torch.float64) * 0.5 + 0.2
    total = sum(COUNTS)
    targets = DetectionTargets(torch.rand(total, 4) * 0.5 + 0.2, torch.randint(CLASSES, (total,)), torch.tensor(COUNTS))
    wanted = torch.full((LAYERS, len(COUNTS), QUERIES), CLASSES)
    each = zip(targets.boxes.split(COUNTS), targets.labels.split(COUNTS), strict=True)
    for image, (own_boxes, own_labels) in enumerate(each):
        own = DetectionTargets(own_boxes, own_labels, torch.tensor([len(own_labels)]))
        here = slice(image, image + 1)
        pairs = match(logits[:, here], boxes[:, here], own, (1, 5, 2))
        wanted[pairs.layers, image, pairs.queries] = own_labels[pairs.objects]
    first, last = (DetectionOutput(*pair) for pair in zip(logits, boxes, strict=True))
    criterion = criterion_of("detection", **SHARED)
    return Case("detection", criterion, replace(last, aux=(first,)), targets, logits, wanted)


def segmentation(labelling: str = "contiguous") -> Case:
    sets, total, first = LAYERS + 1, sum(COUNTS), int(labelling == "published")
    classes = 80 if first else CLASSES
    logits = torch.randn(sets, len(COUNTS), QUERIES, classes + 1, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(sets, len(COUNTS), QUERIES, 5, 6, dtype=torch.float64)
    keys, ones = torch.arange(len(COUNTS)) + 100, torch.ones(len(COUNTS), 2)
    blobs = torch.randint(0, 256, (total, 8, 8), dtype=torch.uint8)
    labels = torch.randint(70 if first else 0, classes, (total,))
    targets = SegmentationTargets(blobs, labels, ones, ones, torch.tensor(COUNTS), keys)
    options = {**SHARED, "num_classes": classes, "num_points": 64, "labelling": labelling}
    criterion = criterion_of("segmentation", **options)
    wanted = torch.full((sets, len(COUNTS), QUERIES), classes)
    for image, (own_masks, labels) in enumerate(
        zip(targets.masks.split(COUNTS), targets.labels.split(COUNTS), strict=True)
    ):
        if not len(labels):
            continue
        count, here = torch.tensor([len(labels)]), slice(image, image + 1)
        own = SegmentationTargets(own_masks, labels, ones[here], ones[here], count, keys[here])
        drawn = draw_points(keys[here].tolist(), sets, criterion.points, torch.device("cpu")).matching
        pairs = match_masks(logits[:, here], masks[:, here], own, labels + first, drawn, (2, 5, 5))
        wanted[pairs.layers, image, pairs.queries] = (labels + first)[pairs.objects]
    each: list[Any] = [SegmentationOutput(*pair) for pair in zip(logits, masks, strict=True)]
    each = [replace(one, labelling=labelling) for one in each]
    return Case("segmentation", criterion, replace(each[-1], aux=tuple(each[:-1])), targets, logits, wanted)


def published() -> Case:
    """Segmentation as the published heads count classes, where the last one weighs as little as "no object"."""
    return segmentation("published")


@pytest.mark.parametrize("make", [detection, segmentation, published])
def test_each_image_weighs_as_on_a_gpu_of_its_own(make: Any) -> None:
    """Against torch's weighted mean, image by image: what each GPU of the published code computes, and their mean."""
    case = make()
    losses = case.losses()
    weight = torch.ones(case.logits.shape[-1], dtype=torch.float64)
    weight[-1] = 0.1
    names = [*(f"ce_{layer}" for layer in range(len(case.logits) - 1)), "ce"]
    per_gpu = [
        [F.cross_entropy(case.logits[layer, image], case.wanted[layer, image], weight) for image in range(len(COUNTS))]
        for layer in range(len(case.logits))
    ]
    expected = [torch.stack(terms).mean() for terms in per_gpu]
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=0)
    ours, theirs = (
        torch.autograd.grad(torch.stack(terms).sum(), case.logits)[0]
        for terms in ([losses[name] for name in names], expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)
    pooled = F.cross_entropy(case.logits[-1].flatten(0, 1), case.wanted[-1].flatten(), weight)
    assert abs((pooled / losses["ce"]).item() - 1) > 1e-3


@pytest.mark.parametrize("step", [0, 1, 3], ids=["detection", "segmentation", "all"])
def test_a_step_is_the_published_one_on_as_many_gpus_as_images(step: int) -> None:
    """Losses and gradients of the whole model: each image alone with its own class weights, all objects in common."""
    (module, _), whole = build(2), global_batch(step)
    images = len(whole.images)
    ours = _gradients(module, [(whole, loss_denominators(module, whole, 1))])
    gpus = []
    for image in range(images):
        common = loss_denominators(module, whole, images)
        for task in set(TASKS) & set(whole.tasks):
            common = {**common, task: {**common[task], "images": torch.tensor(1.0)}}
        gpus.append((part(step, image, image + 1), common))
    theirs = _gradients(build(2)[0], gpus)
    # fp32 sums in another order
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    for name, value in theirs.items():
        if name != "loss":
            assert (ours[name] - value).norm() <= 2e-6 * value.norm() + 1e-9, name


def _gradients(module: MultiTaskModel, parts: list[tuple[Batch, Any]]) -> dict[str, Any]:
    """Mean loss of the parts, and its gradients by name."""
    module.zero_grad(set_to_none=True)
    total = 0.0
    for batch, denominators in parts:
        loss = module.train()(batch, denominators)["loss"] / len(parts)
        loss.backward()
        total += loss.item()
    return {"loss": total, **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}
