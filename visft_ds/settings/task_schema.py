"""Settings that every task has (image, head, loss, share of the steps), and those that all of them share.

The settings of each task stand in its folder, `visft_ds/tasks/<task>/config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel

from visft_ds.settings.fields import (
    Above,
    Ascending,
    Count,
    Fraction,
    Positive,
    Problems,
    Sides,
    StrictModel,
    Text,
)
from visft_ds.settings.tiles import Tiles

Findings = Mapping[str, Sequence[Any]]  #: what was odd: kind -> (how often, examples)
WITHOUT_MASK = "object without a mask"  #: a kind of finding
#: An image's caption to learn from: one drawn anew each time, or always the first.
CaptionChoice = Literal["random", "first"]
SHARED = "shared"  #: name of the one stream of mode "shared"


class VocabularyConfig(StrictModel):
    """Vocabulary of a head that works with words."""

    min_count: Positive = 6  #: least number of times that a word occurs in the training captions
    #: word map (JSON, word -> id) of a published head; null: words of the training captions
    file: Text | None = None


class DecodingConfig(StrictModel):
    """Decoding of words in evaluation."""

    beam_size: Positive = 1  #: beams of the search; 1: greedy
    max_length: Positive = 50  #: most words of a caption


@dataclass(frozen=True)
class Stream:
    """Kind of optimiser step: its tasks, batch size and share of the steps."""

    name: str  #: of the task, or "shared"
    tasks: tuple[str, ...]  #: in the order of the table of tasks
    share: float  #: of the steps, relative to the other streams
    batch_size: int  #: images per optimiser step over all processes
    micro_batch: int  #: largest number of images that a process sends through the model together
    image: dict[str, Any]  #: options of geometry and targets
    #: Task -> raw ids of the classes of its head, where they are not those of the published heads.
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Place of its settings."""
        return "visft.shared" if self.name == SHARED else f"visft.tasks.{self.name}"

    @property
    def tiles(self) -> Tiles | None:
        """Squares that images are cut into; None: taken whole."""
        tile = self.image.get("tile")
        return None if tile is None else Tiles(*tile)

    def largest_side(self) -> int:
        """Side in pixels of a square that all training images fit in."""
        return int(self.image.get("fixed_size") or self.image.get("size") or self.image["max_size_train"])

    def alike(self, *, train: bool = True) -> bool:
        """True if all images have one size: squares; or, in training alone where there is `min_size_test`,
        crops.
        """
        if self.image.get("fixed_size") is not None:
            return not self.image.get("keep_shape")
        return "size" in self.image and (train or "min_size_test" not in self.image)


class StreamConfig(StrictModel):
    """Batch and images of a kind of optimiser step."""

    batch_size: Positive  #: images per optimiser step over all processes
    micro_batch: Positive  #: largest number of images that a process sends through the model together
    image: BaseModel

    def stream(self, name: str, tasks: Mapping[str, TaskConfig], share: float) -> Stream:
        """The stream of these settings, which teaches these tasks."""
        image = self.image.model_dump()
        for task in tasks.values():
            image |= task.target_options()
        # Evaluations, too, have no more images in memory than an optimiser step.
        micro_batch = min(self.micro_batch, self.batch_size)
        return Stream(name, tuple(tasks), share, self.batch_size, micro_batch, image)


class TaskConfig(StreamConfig):
    """Settings of a task, `visft.tasks.<task>`; a subclass gives image, head and loss types and defaults of
    their own.

    The fields of `image` are read by the task's geometry and targets, those of `head` and `loss` are the
    keyword arguments of its head and criterion.
    """

    #: Names "part/metric" of the numbers of an evaluation; `shown` are those of a short line, `main` the one
    #: that the task is known by. `of_best_step` tells good steps of a run apart; "": `main` does.
    metrics: ClassVar[tuple[str, ...]] = ()
    shown: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[str] = ""
    of_best_step: ClassVar[str] = ""
    hub_task: ClassVar[str] = "other"  #: its name on the Hugging Face hub, for the results in a model card
    labels: ClassVar[str] = "annotations"  #: what a data set must have to teach it, see `Manifest.labels`
    learns_from: ClassVar[str] = "any"  #: which samples it can learn from, see `Manifest.selection`
    has_classes: ClassVar[bool] = True  #: its head has a class for each category of the data
    published: ClassVar[str | None] = None  #: its word in the names of the published files of heads
    #: `type` of a head -> its options, of a task that has several; the first is that of a head without one
    heads: ClassVar[Mapping[str, type[StrictModel]]] = {}

    #: optimiser steps of this task; the run takes the sum over its tasks, in mode "shared" the largest. Where
    #: scheduler.params.total_num_steps sets the length, these are proportions; null: only with such a length
    steps: Positive | None = None
    head: StrictModel
    loss: BaseModel

    def measured(self) -> tuple[str, ...]:
        """`metrics` as these settings have them."""
        return self.metrics

    def target_options(self) -> dict[str, Any]:
        """Options of targets that depend on the head; they join those of images."""
        return {}

    @classmethod
    def misleads(cls, counts: Mapping[str, int], findings: Findings) -> str | None:
        """Name what labels lack that would therefore teach something wrong; None: nothing."""
        return None


class WordsConfig(TaskConfig):
    """Settings of a task that learns from captions, and works with a vocabulary."""

    labels = "captions"
    learns_from = "captions"
    has_classes = False
    vocabulary: VocabularyConfig = VocabularyConfig()
    decoding: DecodingConfig = DecodingConfig()


class TasksConfig(StrictModel):
    """`visft.tasks`: the tasks that train together, by name. A task set to null, or absent, takes no part."""

    def enabled(self) -> dict[str, TaskConfig]:
        """Task name -> its settings, in the order of the table of tasks."""
        # A task that was registered since these settings were read is a field of the class alone.
        pairs = ((name, getattr(self, name, None)) for name in type(self).model_fields)
        return {name: task for name, task in pairs if task is not None}

    def with_words(self) -> tuple[str, WordsConfig] | None:
        """Name and settings of the task that works with words; None without one."""
        for name, task in self.enabled().items():
            if isinstance(task, WordsConfig):
                return name, task
        return None


class ImageSizes(StrictModel):
    """Sizes of whole images in pixels, by detectron2's names, and mirroring."""

    #: short sides in training, in pixels; one is drawn for an image (DETR: 480 to 800)
    min_size_train: Sides = (480, 512, 544, 576, 608, 640, 672)
    #: largest long side in training, in pixels (DETR: 1333; ViSFT caps it for a plain ViT)
    max_size_train: Positive = 672
    flip: Fraction = 0.5  #: probability of a horizontal flip (DETR: 0.5)
    min_size_test: Positive = 800  #: short side in evaluation, in pixels (DETR: 800)
    #: largest long side in evaluation, in pixels; it takes precedence over the short side (DETR: 1333)
    max_size_test: Positive = 672
    #: side of a square for training and evaluation, in pixels, instead of the sizes above; null: none
    fixed_size: Positive | None = None
    #: aspect ratio kept: fixed_size is the long side, not that of a square
    keep_shape: bool = False
    #: side and overlap, in pixels, of the square tiles that larger images are cut into; the other sizes are
    #: then those of a tile; null: whole images
    tile: tuple[Positive, Count] | None = None
    #: smallest and largest side of a random crop, as a share of the image's; above 1 it reaches beyond the
    #: image, which is padded; needs fixed_size; null: no crop
    zoom: Annotated[tuple[Above, Above], Ascending] | None = None
    #: copy-paste, the most objects of another image of the shard that are pasted into a training image by
    #: their masks; their number is drawn from 0 to this; 0: none
    paste: Count = 0

    def contradictions(self) -> Problems:
        """Options of images of one size, where images have crops or sizes of their own."""
        if self.zoom is not None and self.fixed_size is None:
            yield "zoom", "is for squares: set fixed_size, their side in pixels, or leave zoom null"
        if self.keep_shape and self.fixed_size is None:
            yield "keep_shape", "is for one size: set fixed_size, the long side in pixels"
        if self.tile is not None and 2 * self.tile[1] > self.tile[0]:
            yield "tile", "is [side, overlap] in pixels, the overlap at most half the side"


class SharedImage(ImageSizes):
    """Geometry that all tasks share, and what their targets need."""

    #: caption to train on: a new "random" one each time, or the "first"
    caption_choice: CaptionChoice = "random"
    max_words: Positive = 50  #: most words of a caption; longer ones are left out


class SharedConfig(StreamConfig):
    """`visft.shared`: batch and images of a step in which all tasks share the images (`visft.mode`
    "shared").
    """

    image: SharedImage = SharedImage()
