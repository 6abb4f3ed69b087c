"""Description of a task: all that training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn

from visft_ds.data.dataset import caption_dataset, coco_dataset
from visft_ds.data.samples import Batch, RawSample, Sample, Targets
from visft_ds.data.shards import ShardReader
from visft_ds.data.transforms import Geometry, Op, Size
from visft_ds.settings.task_schema import TaskConfig, WordsConfig
from visft_ds.tasks import Results
from visft_ds.tasks.pictures import SIDE, Picture, draw_objects, palette, scaled, side_by_side, with_text
from visft_ds.tasks.vocabulary import Vocabulary

Options = Mapping[str, Any]  #: settings of images, of a head or of a loss
Words = Vocabulary | None  #: None for all but a task whose settings are a `WordsConfig`
Classes = Sequence[int] | None  #: the raw ids of a head's classes; None: those of the published head
Shapes = Sequence[tuple[int, int]]  #: (width, pixels to a cell) of each map of a backbone
LossDenominators = Mapping[str, Mapping[str, Tensor]]  #: task -> name of a count -> 0-d tensor
Predict = Callable[[Batch], Mapping[str, Any]]  #: batch -> {task: output of its head}, e.g. `Engine.predict`
#: (raw sample, geometric operations, the sample's random numbers) -> targets of one image, arrays by name.
ImageTargets = Callable[[RawSample, Sequence[Op], np.random.Generator], Mapping[str, npt.NDArray[Any]]]


class Criterion(Protocol):
    """Losses of one task. Holds no parameters; build it anywhere."""

    weights: dict[str, float]  #: factor of each loss; an entry that is not in here is for the log only

    def count(self, batch: Batch) -> dict[str, float]:
        """Numbers, from the labels alone, whose sum over ranks and micro-batches normalises the losses."""
        ...

    def __call__(
        self,
        output: Any,
        targets: Any,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses by name: sums over the micro-batch divided by `loss_denominators` (the keys of
        `count`).

        These are sums of `count` over the global batch divided by ranks times micro-batches. So the mean of a
        loss over ranks and micro-batches is the loss of the global batch in one process. `image_ids` (B,) are
        for errors only.
        """
        ...


def counts_of(criteria: Mapping[str, Criterion], batches: Iterable[Batch]) -> dict[str, float]:
    """Count by "<task>/<name>", in the labels alone, what losses are divided by once it is summed over
    ranks.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for task in batch.targets:
            for name, value in criteria[task].count(batch).items():
                sums[f"{task}/{name}"] = sums.get(f"{task}/{name}", 0.0) + value
    return sums


def loss_denominators_of(counts: Mapping[str, float], parts: int, device: torch.device) -> LossDenominators:
    """Divisors of the losses such that their mean over ranks and micro-batches is the loss of the global
    batch.

    Args:
        counts: summed over ranks.
        parts: data-parallel ranks times micro-batches, over which the engine averages.
    """
    result: dict[str, dict[str, Tensor]] = {}
    for name, total in counts.items():
        task, _, count = name.partition("/")
        total = max(total, 1.0)  # a step may have no object at all
        result.setdefault(task, {})[count] = torch.full((), total / parts, device=device)
    return result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in the output of a module, or in targets."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from (tensor for entry in fields(value) for tensor in tensors_of(getattr(value, entry.name)))
    elif isinstance(value, Mapping | tuple | list):
        items = value.values() if isinstance(value, Mapping) else value
        yield from (tensor for item in items for tensor in tensors_of(item))


@dataclass(frozen=True)
class Example:
    """Image and a head's predictions for it."""

    raw: RawSample
    results: Results  #: of this image, in COCO's results format
    names: Mapping[int, str]  #: category names by raw id
    threshold: float  #: least score that is drawn

    def objects(self) -> list[Mapping[str, Any]]:
        """True objects; crowd regions are not drawn."""
        return [annotation for annotation in self.raw.annotations if not annotation.get("iscrowd", 0)]

    def draw(
        self, true: Sequence[Mapping[str, Any]], **shapes: Callable[[Mapping[str, Any]], Any]
    ) -> Picture:
        """True and predicted objects beside each other; `shapes` is boxes= or masks=, the shape of an object.

        Predictions are those of categories the data set has, with enough score, the best first.
        """
        kept = [r for r in self.results if r["category_id"] in self.names and r["score"] >= self.threshold]
        found = sorted(kept, key=lambda result: -float(result["score"]))
        colours, panels = palette(list(self.names.values())), []
        for title, objects in (("ground truth", true), ("predicted", found)):
            names = [self.names[one["category_id"]] for one in objects]
            scores = [f" {one['score']:.2f}" if "score" in one else "" for one in objects]
            tags = [name + score for name, score in zip(names, scores, strict=True)]
            drawn: dict[str, Any] = {kind: [shape(one) for one in objects] for kind, shape in shapes.items()}
            panels.append(
                (draw_objects(self.pixels(), names, tags, colours, **drawn), f"{title}: {len(names)}")
            )
        return side_by_side(*panels)

    def pixels(self) -> Picture:
        """The image in the size of the original, in whose pixels labels and predictions are."""
        image, (height, width) = self.raw.image, self.raw.size
        assert image is not None
        return np.asarray(Image.fromarray(image).resize((width, height)))


@dataclass(frozen=True)
class Content:
    """Contents of a micro-batch besides pixels. The defaults are more than all but a few of COCO's images
    have.
    """

    objects: int = 30  #: in every image; COCO's mean is 7.3
    caption_ids: int = 30  #: of the longest caption, <start> and <end> included; COCO's mean is 12.5


class Task(ABC):
    """A task for the training loop, the evaluation and the planner; a module has one instance of a
    subclass.
    """

    name: ClassVar[str]
    config: ClassVar[type[TaskConfig]]
    head: ClassVar[
        type[nn.Module]
    ]  #: (width of the last map, its settings); called with the maps of the backbone
    losses: ClassVar[Callable[..., Criterion]]  #: (the settings of the head, those of the loss)
    facts: ClassVar[Mapping[str, Any]] = {}  #: what its numbers depend on, for the record of an evaluation

    @abstractmethod
    def geometry(self, options: Options) -> Geometry:
        """Geometry of images for this task alone, from their options."""

    @abstractmethod
    def targets(self, train: bool, options: Options, words: Words, classes: Classes) -> ImageTargets:
        """Function that makes the targets of an image; `options` are those of its images, or of all tasks'
        together.
        """

    @abstractmethod
    def pack(self, samples: Sequence[Sample], frame: Size) -> Targets:
        """Targets of a batch, whose images are padded to `frame`."""

    @abstractmethod
    def blank(self, images: int, size: Size, content: Content, options: Options) -> Targets:
        """Targets without content, as large as stated."""

    def outputs(self, predict: Predict, batch: Batch, options: Options) -> Mapping[str, Any]:
        """Outputs of heads by task; the first task of a stream is asked, with the options of its images."""
        return predict(batch)

    @abstractmethod
    def results(
        self, output: Any, batch: Batch, words: Words, classes: Classes = None, threshold: float = 0.0
    ) -> Results:
        """Predictions for the real images of a batch; objects with at least `threshold`."""

    def truth(self, reader: ShardReader, indices: Sequence[int]) -> dict[str, Any]:
        """Ground truth of positions in a split, as COCO writes it."""
        return (caption_dataset if self.config.labels == "captions" else coco_dataset)(reader, indices)

    @abstractmethod
    def measure(self, truth: Mapping[str, Any], results: Results, per_category: bool) -> dict[str, float]:
        """Named numbers of the results, of each category too where that is wanted."""

    def describe(self, results: Results, names: Mapping[int, str]) -> str:
        """A line for a reader about the results of an image."""
        return str(results)

    def picture(self, example: Example) -> Picture:
        """Predictions for an image beside the truth, or the image itself."""
        image, line = example.pixels(), self.describe(example.results, example.names)
        return side_by_side(
            (np.asarray(scaled(image, SIDE)), "image"), (with_text(image, [line]), "predicted")
        )

    @property
    def uses_vocabulary(self) -> bool:
        """Return True if it works with words."""
        return issubclass(self.config, WordsConfig)

    def schema(self, part: Literal["image", "head", "loss"], given: Options) -> type[BaseModel]:
        """The schema of a part with these options."""
        return type(self.config.model_fields[part].get_default(call_default_factory=True))

    def options(self, part: Literal["image", "head", "loss"], given: Options) -> dict[str, Any]:
        """Options of a part: those given, and the schema's defaults of the others."""
        return {**self.schema(part, given)().model_dump(), **given}

    def settings(self, part: Literal["head", "loss"], given: Options) -> Any:
        """The same as an object of the schema, which knows nothing of the number of words."""
        return self.schema(part, given)(
            **{name: one for name, one in given.items() if name != "vocabulary_size"}
        )

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        """A new head with these settings for maps of these shapes; a task that works with words takes their
        number.
        """
        return self.head(shapes[-1][0], head)

    def criterion(self, head_options: Options, loss_options: Options) -> Criterion:
        """The criterion that fits a head with these options."""
        return self.losses(self.settings("head", head_options), self.settings("loss", loss_options))
