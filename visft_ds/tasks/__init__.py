"""The tasks a backbone learns from: one `TaskSpec` each, in the literal table `TASKS`. The loop names no task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from visft_ds.data.collate import collate_detection
from visft_ds.data.dataset import Transform
from visft_ds.data.samples import Batch, Sample
from visft_ds.data.transforms import DetectionTransform
from visft_ds.tasks.captioning import head as captioning
from visft_ds.tasks.captioning.data import CaptionTransform, collate_captioning
from visft_ds.tasks.captioning.vocabulary import Vocabulary
from visft_ds.tasks.detection import head as detection
from visft_ds.tasks.segmentation import loss as segmentation
from visft_ds.tasks.segmentation.data import SegmentationTransform, collate_segmentation

Results = list[dict[str, Any]]  #: COCO results format


class Criterion(Protocol):
    """Losses of one task. Holds no parameters; build it anywhere."""

    weights: dict[str, float]  #: factor of each loss; an entry that is not in here is for the log only

    def count(self, batch: Batch) -> dict[str, float]:
        """Numbers, from the labels alone, whose sum over ranks and micro-batches normalises the losses."""
        ...

    def __call__(
        self, output: Any, targets: Any, loss_denominators: Mapping[str, Tensor], image_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses by name: sums over the micro-batch divided by `loss_denominators` (the keys of `count`)."""
        ...


@dataclass(frozen=True)
class TaskSpec:
    """Description of a task for the training loop and the evaluation.

    A task with `uses_vocabulary` takes a `Vocabulary` where it makes samples and results, and its size for its head;
    the methods pass it on to those tasks only. `classes` are the raw ids of the head's classes, see `classes_of`.
    """

    name: str
    head: type[nn.Module]  #: (in_channels, **head options); called with (features, valid)
    build_criterion: Callable[..., Criterion]  #: (**loss options)
    shared_options: tuple[str, ...]  #: head options that the criterion must be given too
    transform: Callable[..., Transform]  #: (train, **image options)
    collate: Callable[[Sequence[Sample]], Batch]
    postprocess: Callable[..., Results]  #: (output, batch), real images only
    learns_from: str = "any"  #: which samples it can learn from, see `Manifest.selection`
    labels: str = "annotations"  #: what a data set must have to teach it, see `Manifest.labels`
    uses_vocabulary: bool = False

    def build_head(self, in_channels: int, options: Mapping[str, Any], vocabulary_size: int | None) -> nn.Module:
        """A new head for features of that width."""
        own = {"vocabulary_size": _needed(self, vocabulary_size)} if self.uses_vocabulary else {}
        return self.head(in_channels=in_channels, **options, **own)

    def criterion(self, head_options: Mapping[str, Any], loss_options: Mapping[str, Any]) -> Criterion:
        """The criterion that fits a head: options they share are stated once, with the head."""
        shared = {name: head_options[name] for name in self.shared_options if name in head_options}
        doubled = sorted(shared.keys() & loss_options.keys())
        if doubled:
            raise ValueError(
                f"task {self.name!r}: {doubled} stand with the head already: remove them from the loss options"
            )
        return self.build_criterion(**shared, **loss_options)

    def build_transform(
        self,
        train: bool,
        options: Mapping[str, Any],
        vocabulary: Vocabulary | None,
        classes: Sequence[int] | None = None,
    ) -> Transform:
        """From a raw sample to one with this task's targets."""
        own = self._of_data(vocabulary, classes)
        return self.transform(train=train, **options, **own)

    def results(
        self,
        output: Any,
        batch: Batch,
        vocabulary: Vocabulary | None,
        classes: Sequence[int] | None = None,
        threshold: float = 0.0,
    ) -> Results:
        """Predictions for the real images of a batch, in COCO's results format; objects with at least `threshold`."""
        objects = {} if self.uses_vocabulary else {"threshold": threshold}
        return self.postprocess(output, batch, **objects, **self._of_data(vocabulary, classes))

    def _of_data(self, vocabulary: Vocabulary | None, classes: Sequence[int] | None) -> dict[str, Any]:
        own: dict[str, Any] = {"vocabulary": _needed(self, vocabulary)} if self.uses_vocabulary else {}
        return own if classes is None else {**own, "classes": classes}


Given = TypeVar("Given")


def _needed(spec: TaskSpec, value: Given | None) -> Given:
    assert value is not None, f"{spec.name} works with a vocabulary"
    return value


TASKS: dict[str, TaskSpec] = {
    "detection": TaskSpec(
        name="detection",
        head=detection.DetectionHead,
        build_criterion=detection.DetectionCriterion,
        shared_options=("num_queries", "decoder_layers"),
        transform=DetectionTransform,
        collate=collate_detection,
        postprocess=detection.postprocess,
    ),
    "segmentation": TaskSpec(
        name="segmentation",
        head=segmentation.SegmentationHead,
        build_criterion=segmentation.SegmentationCriterion,
        shared_options=("num_classes", "num_queries", "decoder_layers", "labelling"),
        transform=SegmentationTransform,
        collate=collate_segmentation,
        postprocess=segmentation.postprocess,
    ),
    "captioning": TaskSpec(
        name="captioning",
        head=captioning.CaptioningHead,
        build_criterion=captioning.CaptioningCriterion,
        shared_options=(),
        transform=CaptionTransform,
        collate=collate_captioning,
        postprocess=captioning.postprocess,
        learns_from="captions",
        labels="captions",
        uses_vocabulary=True,
    ),
}


def get_task(name: str) -> TaskSpec:
    """The task of that name; raises ValueError with the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]
