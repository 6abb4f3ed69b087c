"""What both heads with queries have in common: padding, gradients, 16 bits, and losses however the batch is divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.options import criterion_of, head_of
from visft_ds.data.samples import Batch
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.head import SegmentationOutput

CHANNELS, LAYERS, QUERIES, CLASSES = 12, 2, 7, 6
SHARED = {"num_queries": QUERIES, "decoder_layers": LAYERS}
SIZES: dict[str, dict[str, Any]] = {
    "detection": {"encoder_dim": 16, "decoder_dim": 32, "ffn_dim": 24, "dropout": 0.0},
    "segmentation": {"hidden_dim": 32, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
}


@dataclass(frozen=True)
class Kind:
    """One of the two tasks."""

    task: str

    def head(self) -> Any:
        common = {**SHARED, "num_classes": CLASSES, "encoder_layers": 2, "num_heads": 4}
        return head_of(self.task, CHANNELS, **common, **SIZES[self.task])

    def criterion(self) -> Any:
        own = {"num_classes": CLASSES, "num_points": 64} if self.task == "segmentation" else {}
        return criterion_of(self.task, **SHARED, **own)

    def targets(self, counts: Sequence[int]) -> Any:
        total, ones = sum(counts), torch.ones(len(counts), 2)
        labels, number = torch.randint(CLASSES, (total,)), torch.tensor(counts)
        if self.task == "detection":
            return DetectionTargets(torch.rand(total, 4) * 0.5 + 0.2, labels, number)
        blobs = F.interpolate(torch.randn(total + 1, 1, 3, 4), size=(12, 16), mode="bicubic")[:total, 0]
        masks = (blobs.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)
        return SegmentationTargets(masks, labels, ones, ones, number, torch.arange(len(counts)) + 100)

    def output(self, images: int, queries: int = QUERIES) -> Any:
        sets = LAYERS + (self.task == "segmentation")
        logits = torch.randn(sets, images, queries, CLASSES + 1, dtype=torch.float64)
        if self.task == "detection":
            shapes = torch.rand(sets, images, queries, 4, dtype=torch.float64)
            each: list[Any] = [DetectionOutput(*pair) for pair in zip(logits, shapes, strict=True)]
        else:
            shapes = torch.randn(sets, images, queries, 5, 6, dtype=torch.float64)
            each = [SegmentationOutput(*pair) for pair in zip(logits, shapes, strict=True)]
        return replace(each[-1], aux=tuple(each[:-1]))

    def part(self, output: Any, targets: Any, first: int, last: int) -> tuple[Any, Any]:
        """Predictions and targets of images first..last-1."""

        def rows(one: Any) -> Any:
            shape = "boxes" if self.task == "detection" else "masks"
            cut = {name: getattr(one, name)[first:last] for name in ("logits", shape)}
            return replace(one, **cut, aux=tuple(map(rows, one.aux)))

        start, stop = int(targets.counts[:first].sum()), int(targets.counts[:last].sum())
        found = {}
        for name, value in vars(targets).items():
            packed = name in ("boxes", "masks", "labels")
            found[name] = value[start:stop] if packed else value[first:last]
        return rows(output), type(targets)(**found)

    def denominators(self, *targets: Any, parts: int = 1) -> dict[str, Tensor]:
        """As the training loop makes them: global sum, at least 1, divided by ranks times micro-batches."""
        counts = [self.criterion().count(self.batch(one)) for one in targets]
        names = counts[0]
        return {name: torch.tensor(max(sum(c[name] for c in counts), 1.0) / parts).double() for name in names}

    def batch(self, targets: Any) -> Batch:
        return Batch(*[torch.arange(len(targets.counts))] * 7, targets={self.task: targets})


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param)


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
    alone, padded = head(small, torch.ones(1, 3, 4, dtype=torch.bool)), head(batch, valid)
    # float32 through five layers; sums run over another number of entries
    for one, other in zip((*padded.aux, padded), (*alone.aux, alone), strict=True):
        torch.testing.assert_close(one.logits[1], other.logits[0], rtol=1e-4, atol=1e-4)
        if kind.task == "detection":
            torch.testing.assert_close(one.boxes[1], other.boxes[0], rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(one.masks[1, :, :3, :4], other.masks[0], rtol=1e-4, atol=1e-4)
            assert one.masks[1].count_nonzero() == one.masks[1, :, :3, :4].count_nonzero()


@both
def test_every_parameter_gets_a_gradient_without_any_object(kind: Kind) -> None:
    """Engines that reduce gradients by bucket need one for each parameter in each step."""
    head, criterion, targets = kind.head(), kind.criterion(), kind.targets([0, 0])
    output = head(torch.randn(2, CHANNELS, 3, 5), torch.ones(2, 3, 5, dtype=torch.bool))
    losses = criterion(output, targets, kind.denominators(targets))
    assert {losses[name].item() for name in losses if not name.startswith(("ce", "card"))} == {0}
    sum(weight * losses[name] for name, weight in criterion.weights.items()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@both
def test_predictions_are_float32_under_autocast(kind: Kind) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = kind.head()(torch.randn(1, CHANNELS, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool))
    assert {value.dtype for value in vars(output).values() if isinstance(value, Tensor)} == {torch.float32}


@both
@pytest.mark.parametrize("parts", [2, 4])
def test_mean_over_micro_batches_is_the_global_loss(kind: Kind, parts: int) -> None:
    """The reason for given denominators and keyed points: images with 0, few and too many objects, spread unevenly."""
    counts = [0, 3, 12, 1, 0, 0, 5, 7]
    criterion, targets, output = kind.criterion(), kind.targets(counts), kind.output(8)
    whole = criterion(output, targets, kind.denominators(targets))
    size = len(counts) // parts
    pieces = [kind.part(output, targets, start, start + size) for start in range(0, 8, size)]
    denominators = kind.denominators(*(own for _, own in pieces), parts=parts)
    torch.manual_seed(123)  # nothing may be drawn from here
    split = [criterion(part, own, denominators) for part, own in pieces]
    for name, value in whole.items():
        mean = torch.stack([losses[name].double() for losses in split]).mean()
        # float64 sums in another order; the cardinality is a float32 mean
        torch.testing.assert_close(mean, value.double(), rtol=1e-6 if "card" in name else 1e-12, atol=0)


@both
def test_more_objects_than_queries(kind: Kind) -> None:
    targets = kind.targets([300, 1])
    losses = kind.criterion()(kind.output(2), targets, kind.denominators(targets))
    assert all(torch.isfinite(value) for value in losses.values())
    assert losses["class_error"].item() >= 100 * 293 / 301  # an object without a query is not found


@both
def test_a_prediction_that_is_not_finite_names_its_image(kind: Kind) -> None:
    targets, output = kind.targets([1, 2]), kind.output(2)
    output.aux[0].logits[1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"\[77\]"):
        kind.criterion()(output, targets, kind.denominators(targets), torch.tensor([5, 77]))
