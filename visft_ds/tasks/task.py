"""Description of a task: all that training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel
from torch import nn

from visft_ds.data.dataset import caption_dataset, coco_dataset
from visft_ds.data.samples import Arrays, Batch, RawSample, Sample, Targets
from visft_ds.data.shards import ShardReader
from visft_ds.data.transforms import Geometry, Op, Size
from visft_ds.settings.task_schema import TaskConfig, WordsConfig
from visft_ds.tasks import Names, Numbers, Results, Shapes, Truth
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import SIDE, Picture, scaled, side_by_side, with_text
from visft_ds.tasks.vocabulary import Vocabulary

Section = Literal["image", "head", "loss"]  #: of a task's settings
Options = Mapping[str, Any]  #: of a section
Words = Vocabulary | None  #: None for all but a task whose settings are a `WordsConfig`
Classes = Sequence[int] | None  #: the raw ids of a head's classes; None: those of the published head
Predict = Callable[[Batch], Mapping[str, Any]]  #: batch -> {task: output of its head}, e.g. `Engine.predict`
#: (raw sample, geometric operations, the sample's random numbers) -> targets of one image, arrays by name.
ImageTargets = Callable[[RawSample, Sequence[Op], np.random.Generator], Arrays]


@dataclass(frozen=True)
class Content:
    """Contents of a micro-batch besides pixels. The defaults are more than all but a few of COCO's images
    have.
    """

    objects: int = 30  #: in every image; COCO's mean is 7.3
    caption_ids: int = 30  #: of the longest caption, <start> and <end> included; COCO's mean is 12.5


class Task(ABC):
    """A task for the training loop, the evaluation and the planner; a module has one instance of a subclass.

    A subclass sets the four class attributes and writes the six abstract methods; `describe` or `picture`
    shows its predictions to people. All other methods have a default that fits most tasks.
    Letters: B images, N objects of all images concatenated.
    """

    name: ClassVar[str]  #: key in `visft.tasks`, in the targets of a batch and in the names of losses
    config: ClassVar[type[TaskConfig]]  #: options of image, head and loss with defaults, and names of metrics
    #: Called with the width of the last map and the settings of the head. Its `forward` gets the maps of the
    #: backbone, and in training what `Targets.head_inputs` names; it returns a dataclass of tensors.
    head: ClassVar[type[nn.Module]]
    losses: ClassVar[Callable[..., Criterion]]  #: called with the settings of the head and those of the loss
    facts: ClassVar[Mapping[str, Any]] = {}  #: what its numbers depend on, for the record of an evaluation

    @abstractmethod
    def geometry(self, options: Options) -> Geometry:
        """Flips, crops and sizes of images that train this task alone; `options` are `config.image`'s."""

    @abstractmethod
    def targets(
        self,
        train: bool,
        options: Options,
        words: Words,
        classes: Classes,
    ) -> ImageTargets:
        """Function that makes the targets of one image; worker processes call it, so it has to pickle.

        Args:
            train: False in evaluation, where nothing may be drawn from the random numbers.
            options: of the task's images, or of those that all tasks share.
            words: the vocabulary; None for a task without words.
            classes: raw category id of each class of the head; None: labels keep their raw ids.
        """

    @abstractmethod
    def pack(self, samples: Sequence[Sample], frame: Size) -> Targets:
        """Targets of a batch: those of `samples`, concatenated over objects or padded.

        Args:
            samples: B of them; `sample.targets[self.name]` is what the function of `targets` returned.
            frame: (height, width) in pixels that the images of the batch are padded to.
        """

    @abstractmethod
    def blank(
        self,
        images: int,
        size: Size,
        content: Content,
        options: Options,
    ) -> Targets:
        """Targets without content, as large as stated, from which the planner learns memory and time.

        Args:
            images: B.
            size: (height, width) of each image in pixels.
            content: number of objects in each image, and of ids in each caption.
            options: of the images.
        """

    @abstractmethod
    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        """Predictions for the images of a batch that are `batch.real`, in COCO's results format.

        Args:
            output: of the head, without captions or other labels.
            batch: its `original_sizes` (B, 2) are the pixels that boxes and masks are in.
            words: the vocabulary; None for a task without words.
            classes: raw category id of each class of the head; None: classes are raw ids.
            threshold: least score in [0, 1] of an object that is kept.
        """

    @abstractmethod
    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        """Metrics by name ("part/metric"), at least those that `config.metrics` lists.

        Args:
            truth: of `truth`.
            results: of `results`, of all images.
            head: settings of the head, an object of its schema.
            of_record: the numbers that are published: with those of each category, and by the reference
                implementation where a faster one measures during training.

        Raises:
            ValueError: the truth has nothing to compare with, or a prediction is not finite.
        """

    def outputs(self, predict: Predict, batch: Batch, options: Options) -> Mapping[str, Any]:
        """Outputs of heads by task; the first task of a stream is asked, with the options of its images."""
        return predict(batch)

    def truth(self, reader: ShardReader, indices: Sequence[int]) -> dict[str, Any]:
        """Ground truth of positions in a split, as COCO writes it."""
        dataset_of = caption_dataset if self.config.labels == "captions" else coco_dataset
        return dataset_of(reader, indices)

    def describe(self, results: Results, names: Names) -> str:
        """A line for a reader about the results of an image; `names` are those of the categories by id."""
        return str(results)

    def picture(self, example: Example) -> Picture:
        """Drawing (H, W, 3) uint8 of the predictions for an image, beside the truth or the image itself."""
        image = example.pixels()
        line = self.describe(example.results, example.names)
        return side_by_side(
            (np.asarray(scaled(image, SIDE)), "image"), (with_text(image, [line]), "predicted")
        )

    @property
    def uses_vocabulary(self) -> bool:
        """Return True if it works with words."""
        return issubclass(self.config, WordsConfig)

    def schema(self, section: Section, options: Options) -> type[BaseModel]:
        """The schema of a section that has these options."""
        if section == "head" and options.get("type") in self.config.heads:
            return self.config.heads[options["type"]]
        return type(self.config.model_fields[section].get_default(call_default_factory=True))

    def options(self, section: Section, options: Options) -> dict[str, Any]:
        """These options of a section, and the schema's defaults of the others."""
        return {**self.schema(section, options)().model_dump(), **options}

    def settings(self, section: Section, options: Options) -> Any:
        """The same as an object of the schema, which knows nothing of the number of words."""
        known = {name: value for name, value in options.items() if name != "vocabulary_size"}
        return self.schema(section, options)(**known)

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        """A new head for maps of these shapes.

        Args:
            shapes: (width, pixels to a cell) of each map of the backbone.
            head: settings of the head, an object of its schema.
            vocabulary_size: number of word ids; None for a task without words.
        """
        return self.head(shapes[-1][0], head)

    def criterion(self, head_options: Options, loss_options: Options) -> Criterion:
        """The criterion that fits a head with these options."""
        return self.losses(self.settings("head", head_options), self.settings("loss", loss_options))
