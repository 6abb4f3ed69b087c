"""What both heads with queries have in common: padding, gradients, and losses however the batch is
divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.options import criterion_of, head_of
from tests.parallel.engine_case import build, global_batch, loss_denominators, part
from tests.tasks.cases import CLASSES, boxes_of, denominators, map_of, masks_of
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.detection.loss import match
from visft_ds.tasks.masks.loss import images_with_objects, match_masks
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.points import draw_points

CHANNELS, LAYERS, QUERIES = 12, 2, 7
SHARED = {"num_queries": QUERIES, "decoder_layers": LAYERS}
SIZES: dict[str, dict[str, Any]] = {
    "detection": {"encoder_dim": 16, "decoder_dim": 32, "ffn_dim": 24, "dropout": 0.0},
    "segmentation": {"hidden_dim": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
}
#: Objects of the images: none (crowds alone give none either), fewer and more than there are queries.
COUNTS = [0, 3, 12, 1, 0, 0, 5, 7]


@dataclass(frozen=True)
class Kind:
    """One of the two tasks; the published heads of segmentation count classes from 1, and the last is no
    object's.
    """

    task: str
    class_ids: str = "contiguous"

    @property
    def classes(self) -> int:
        return CLASSES if self.class_ids == "contiguous" else 80

    def head(self) -> Any:
        common = {**SHARED, "num_classes": CLASSES, "encoder_layers": 2, "num_heads": 4}
        return head_of(self.task, CHANNELS, **common, **SIZES[self.task])

    def criterion(self) -> Any:
        own = {"num_classes": self.classes, "train_num_points": 64, "class_ids": self.class_ids}
        return criterion_of(self.task, **SHARED, **(own if self.task == "segmentation" else {}))

    def targets(self, counts: Sequence[int]) -> Any:
        if self.task == "detection":
            return boxes_of(counts)
        return masks_of(counts, self.classes, first=70 if self.class_ids == "published" else 0)

    def output(self, images: int) -> Any:
        sets = LAYERS + (self.task == "segmentation")
        logits = torch.randn(sets, images, QUERIES, self.classes + 1, dtype=torch.float64, requires_grad=True)
        if self.task == "detection":
            return DetectionOutput(logits, torch.rand(sets, images, QUERIES, 4, dtype=torch.float64))
        masks = torch.randn(sets, images, QUERIES, 5, 6, dtype=torch.float64)
        return MaskOutput(logits, masks, torch.ones(images, 2), self.class_ids)  # type: ignore[arg-type]

    def part(self, output: Any, targets: Any, first: int, last: int) -> tuple[Any, Any]:
        """Predictions and targets of images first..last-1."""
        shape = "boxes" if self.task == "detection" else "masks"
        cut = {name: getattr(output, name)[:, first:last] for name in ("logits", shape)}
        start, stop = int(targets.counts[:first].sum()), int(targets.counts[:last].sum())
        actual = {}
        for name, value in vars(targets).items():
            packed = name in ("boxes", "masks", "labels")
            actual[name] = value[start:stop] if packed else value[first:last]
        if self.task == "segmentation":
            cut["extents"] = output.extents[first:last]
        return replace(output, **cut), type(targets)(**actual)

    def classes_of_queries(self, output: Any, targets: Any) -> Tensor:
        """(L, B, Q) the class of each query's object, matched image by image."""
        expected = torch.full(output.logits.shape[:3], self.classes)
        for image, count in enumerate(targets.counts.tolist()):
            if count:
                own, alone = self.part(output, targets, image, image + 1)
                labels = alone.labels + (self.class_ids == "published")
                if self.task == "detection":
                    pairs = match(own.logits, own.boxes, alone, (1, 5, 2))
                else:
                    points = self.criterion().points
                    drawn = draw_points(alone.keys.tolist(), len(expected), points, torch.device("cpu"))[0]
                    there = images_with_objects(alone, own.extents)
                    pairs = match_masks(own.logits, own.masks, alone, there, labels, drawn, (2, 5, 5))
                expected[pairs.layers, image, pairs.queries] = labels[pairs.objects]
        return expected


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(*request.param.split())


both = pytest.mark.parametrize("kind", ["detection", "segmentation"], indirect=True)


@both
def test_padding_changes_nothing(kind: Kind) -> None:
    """A small image padded beside a large one gives what it gives alone, whatever the padding contains."""
    head = kind.head().eval()
    with torch.no_grad():  # sampling offsets and norms start out too simple to be a test
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    small, valid = torch.randn(1, CHANNELS, 3, 4), torch.zeros(2, 5, 6, dtype=torch.bool)
    batch = torch.randn(2, CHANNELS, 5, 6) * 10
    batch[1, :, :3, :4] = small[0]
    valid[0], valid[1, :3, :4] = True, True
    alone, padded = head([map_of(small, torch.ones(1, 3, 4, dtype=torch.bool))]), head([map_of(batch, valid)])
    # float32 through five layers; sums run over another number of entries
    torch.testing.assert_close(padded.logits[:, 1], alone.logits[:, 0], rtol=1e-4, atol=1e-4)
    if kind.task == "detection":
        torch.testing.assert_close(padded.boxes[:, 1], alone.boxes[:, 0], rtol=0, atol=1e-5)
    else:
        inside = padded.masks[:, 1, :, :3, :4]
        torch.testing.assert_close(inside, alone.masks[:, 0], rtol=1e-4, atol=1e-4)
        assert padded.masks[:, 1].count_nonzero() == inside.count_nonzero()


@both
def test_every_parameter_gets_a_gradient_without_any_object(kind: Kind) -> None:
    """Engines that reduce gradients by bucket need one for each parameter in each step."""
    head, criterion, targets = kind.head(), kind.criterion(), kind.targets([0, 0])
    output = head([map_of(torch.randn(2, CHANNELS, 3, 5), torch.ones(2, 3, 5, dtype=torch.bool))])
    losses = criterion(output, targets, denominators(kind.task, criterion, targets))
    assert {losses[name].item() for name in losses if not name.startswith(("ce", "card"))} == {0}
    sum(weight * losses[name] for name, weight in criterion.weights.items()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@both
@pytest.mark.parametrize("parts", [2, 4])
def test_mean_over_micro_batches_is_the_global_loss(kind: Kind, parts: int) -> None:
    """The reason for given denominators and keyed points: images with 0, few and too many objects, spread
    unevenly.
    """
    criterion, targets, output = kind.criterion(), kind.targets(COUNTS), kind.output(8)
    whole = criterion(output, targets, denominators(kind.task, criterion, targets))
    size = len(COUNTS) // parts
    pieces = [kind.part(output, targets, start, start + size) for start in range(0, 8, size)]
    divisors = denominators(kind.task, criterion, *(own for _, own in pieces), parts=parts)
    torch.manual_seed(123)  # nothing may be drawn from here
    split = [criterion(one, own, divisors) for one, own in pieces]
    for name, value in whole.items():
        mean = torch.stack([losses[name].double() for losses in split]).mean()
        # float64 sums in another order; the cardinality is a float32 mean
        torch.testing.assert_close(mean, value.double(), rtol=1e-6 if "card" in name else 1e-12, atol=0)


@both
def test_more_objects_than_queries(kind: Kind) -> None:
    criterion, targets = kind.criterion(), kind.targets([300, 1])
    losses = criterion(kind.output(2), targets, denominators(kind.task, criterion, targets))
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["class_error"].item() >= 100 * 293 / 301  # an object without a query is not found


@both
def test_a_prediction_that_is_not_finite_names_its_image(kind: Kind) -> None:
    criterion, targets, output = kind.criterion(), kind.targets([1, 2]), kind.output(2)
    output.logits.data[0, 1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"\[77\]"):
        criterion(output, targets, denominators(kind.task, criterion, targets), torch.tensor([5, 77]))


# ---- the class loss averages images, as the published code does with one image on each GPU ----


@pytest.mark.parametrize("kind", ["detection", "segmentation", "segmentation published"], indirect=True)
def test_each_image_weighs_as_on_a_gpu_of_its_own(kind: Kind) -> None:
    """Against torch's weighted mean, image by image: what each GPU of the published code computes, and their
    mean.
    """
    criterion, targets, output = kind.criterion(), kind.targets(COUNTS), kind.output(8)
    losses = criterion(output, targets, denominators(kind.task, criterion, targets))
    wanted = kind.classes_of_queries(output, targets)
    weight = torch.ones(kind.classes + 1, dtype=torch.float64)
    weight[-1] = 0.1
    names = [*(f"ce_{layer}" for layer in range(len(wanted) - 1)), "ce"]
    expected = [
        torch.stack(
            [F.cross_entropy(output.logits[layer, image], wanted[layer, image], weight) for image in range(8)]
        )
        for layer in range(len(wanted))
    ]
    ours, theirs = torch.stack([losses[name] for name in names]), torch.stack(expected).mean(dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(values.sum(), output.logits)[0] for values in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)
    pooled = F.cross_entropy(output.logits[-1].flatten(0, 1), wanted[-1].flatten(), weight)
    assert abs((pooled / losses["ce"]).item() - 1) > 1e-3


@pytest.mark.parametrize("step", [0, 1, 3], ids=["detection", "segmentation", "all"])
def test_a_step_is_the_published_one_on_as_many_gpus_as_images(step: int) -> None:
    """Losses and gradients of the whole model: each image alone with its own class weights, all objects in
    common.
    """
    (module, _), whole = build(2), global_batch(step)
    images = len(whole.images)
    ours = _gradients(module, [(whole, loss_denominators(module, whole, 1))])
    gpus = []
    for image in range(images):
        common = loss_denominators(module, whole, images)
        for task in {"detection", "segmentation"} & set(whole.targets):
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
    for batch, divisors in parts:
        loss = module.train()(batch, divisors)["loss"] / len(parts)
        loss.backward()
        total += loss.item()
    return {"loss": total, **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}
