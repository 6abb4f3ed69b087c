"""Description of a task: all that training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor, device, nn

from visft_ds.config.task_schema import TaskConfig, WordsConfig
from visft_ds.data.samples import Batch, RawSample, Sample, Targets
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.data.transforms import Geometry, Op
from visft_ds.tasks import Results
from visft_ds.tasks.pictures import Picture, scaled, side_by_side
from visft_ds.tasks.vocabulary import Vocabulary

_SIDE = 448  # of the longer side of a picture, pixels
#: (raw sample, geometric operations, the sample's random numbers) -> targets of one image, arrays by name.
ImageTargets = Callable[[RawSample, Sequence[Op], np.random.Generator], Mapping[str, npt.NDArray[Any]]]


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
class HeadSizes:
    """Options of a head in the shapes of its parameters: (parameter, axis, summand) each."""

    in_channels: tuple[str, int, int]
    options: Mapping[str, tuple[str, int, int]]
    layers: Mapping[str, str] = field(default_factory=dict)  #: option -> beginning of the names of a stack of layers
    attributes: tuple[str, ...] = ()  #: options that leave no trace in a shape and are attributes of the head
    points: str | None = None  #: parameter whose rows are attention heads times `num_points`


@dataclass(frozen=True)
class Evaluator:
    """Functions to gather a task's results and to compute its metrics."""

    truth: Callable[[ShardReader, Sequence[int]], dict[str, Any]]  #: COCO ground truth of positions in a split
    measure: Callable[..., dict[str, float]]  #: (ground truth, results, each category too) -> named numbers
    pack: Callable[[Results], Any] = list  #: compact form that travels between ranks
    unpack: Callable[[Any], Results] = list
    facts: Mapping[str, Any] = field(default_factory=dict)  #: what numbers depend on, for the record of an evaluation


@dataclass(frozen=True)
class Example:
    """Image and a head's predictions for it."""

    raw: RawSample
    results: Results  #: of this image, in COCO's results format
    output: Any  #: of the head, for the batch the image was in
    place: int  #: of the image in that batch
    names: Mapping[int, str]  #: category names by raw id
    threshold: float  #: least score that is drawn

    def objects(self) -> list[Mapping[str, Any]]:
        """True objects; crowd regions are not drawn."""
        return [annotation for annotation in self.raw.annotations if not annotation.get("iscrowd", 0)]

    def known(self) -> Results:
        """Predicted objects of categories the data set has, with enough score."""
        return [r for r in self.results if r["category_id"] in self.names and r["score"] >= self.threshold]

    def pixels(self) -> Picture:
        """The image in the size of the original, in whose pixels labels and predictions are."""
        image, (height, width) = self.raw.image, self.raw.size
        assert image is not None
        if image.shape[:2] == (height, width):
            return image
        return np.asarray(Image.fromarray(image).resize((width, height)))


@dataclass(frozen=True)
class Content:
    """Contents of a micro-batch besides pixels. The defaults are more than all but a few of COCO's images have."""

    objects: int = 30  #: in every image; COCO's mean is 7.3
    caption_ids: int = 30  #: of the longest caption, <start> and <end> included; COCO's mean is 12.5
    size: tuple[int, int] | None = None  #: (height, width) in pixels; None: the largest square of the stream


@dataclass(frozen=True)
class TaskSpec:
    """Description of a task for the training loop, the evaluation and the planner.

    A task whose settings are a `WordsConfig` takes a `Vocabulary` where it makes samples and results, and its size for
    its head; the methods pass it on to those tasks only. `classes` are the raw ids of the head's classes.
    """

    name: str
    config: type[TaskConfig]
    head: type[nn.Module]  #: (in_channels, **head options); called with (features, valid)
    build_criterion: Callable[..., Criterion]  #: (**loss options)
    geometry: Callable[[Mapping[str, Any]], Geometry]  #: (image options) -> that of images for this task alone
    #: (train, image options of the task, or of all that share an image, **vocabulary or classes)
    targets: Callable[..., ImageTargets]
    pack: Callable[[Sequence[Sample], tuple[int, int]], Targets]  #: (samples, size of the padded batch)
    postprocess: Callable[..., Results]  #: (output, batch), real images only
    evaluator: Evaluator
    sizes: HeadSizes
    #: (images, size in pixels, contents, image options, device) -> targets without content, as large as stated; what
    #: criteria read on the host is on the CPU, large tensors on the device
    blank: Callable[[int, tuple[int, int], Content, Mapping[str, Any], device], Targets]
    #: (in_channels, **head options), where they choose among several heads; None: `head`
    choose_head: Callable[..., nn.Module] | None = None
    shared_options: tuple[str, ...] = ()  #: head options that the criterion must be given too
    #: Problem of a split whose labels would teach something wrong, or None.
    data_problem: Callable[[Manifest], str | None] = lambda manifest: None
    #: (results of an image, category names by id) -> a line for a reader
    describe: Callable[[Results, Mapping[int, str]], str] | None = None
    draw: Callable[[Example], Picture] | None = None  #: ground truth beside prediction; None: the image and that line

    @property
    def uses_vocabulary(self) -> bool:
        """Return True if it works with words."""
        return issubclass(self.config, WordsConfig)

    def picture(self, example: Example) -> Picture:
        """A drawing of the predictions for an image."""
        if self.draw is not None:
            return self.draw(example)
        line = self.describe(example.results, example.names) if self.describe is not None else str(example.results)
        return side_by_side((np.asarray(scaled(example.pixels(), _SIDE)), line))

    def options(self, part: Literal["image", "head", "loss"], given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a part: those given, and the schema's defaults of the others."""
        return {**self.config.model_fields[part].get_default(call_default_factory=True).model_dump(), **given}

    def build_head(self, in_channels: int, options: Mapping[str, Any], vocabulary_size: int | None) -> nn.Module:
        """A new head for features of that width; options that are left out are the schema's defaults."""
        assert vocabulary_size is not None or not self.uses_vocabulary, f"{self.name} works with a vocabulary"
        own = {"vocabulary_size": vocabulary_size} if self.uses_vocabulary else {}
        build = self.choose_head or self.head
        return build(in_channels=in_channels, **self.options("head", options), **own)

    def criterion(self, head_options: Mapping[str, Any], loss_options: Mapping[str, Any]) -> Criterion:
        """The criterion that fits a head: options they share are stated once, with the head."""
        head_options = self.options("head", head_options)
        shared = {name: head_options[name] for name in self.shared_options}
        doubled = sorted(shared.keys() & loss_options.keys())
        if doubled:
            raise ValueError(
                f"task {self.name!r}: {doubled} stand with the head already: remove them from the loss options"
            )
        return self.build_criterion(**shared, **self.options("loss", loss_options))

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
        return self.postprocess(output, batch, **objects, **self.of_data(vocabulary, classes))

    def of_data(self, vocabulary: Vocabulary | None, classes: Sequence[int] | None) -> dict[str, Any]:
        """Arguments of `targets` and `postprocess` that come with the data."""
        if vocabulary is None and self.uses_vocabulary:
            raise ValueError(
                f"{self.name} needs a vocabulary: give that of the shards, or leave {self.name} out of tasks"
            )
        own: dict[str, Any] = {"vocabulary": vocabulary} if self.uses_vocabulary else {}
        return own if classes is None else {**own, "classes": classes}
