"""The tasks of a configuration: images, head, loss, share of the steps. Defaults are those of the published code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from visft_ds.config.fields import STRICT, Above, Count, Fraction, Positive, Probability, Rate, Sides, Text

_PRECISION = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
#: Metrics of each task in an evaluation during training.
METRICS: Mapping[str, tuple[str, ...]] = {
    "detection": tuple(f"box/{name}" for name in _PRECISION),
    "segmentation": tuple(f"mask/{name}" for name in _PRECISION),
    "captioning": (
        *("caption/CIDEr-D", "caption/CIDEr", "caption/BLEU-1", "caption/BLEU-2", "caption/BLEU-3", "caption/BLEU-4"),
        "caption/ROUGE-L",
    ),
}
CaptionChoice = Literal["random", "first", "consensus"]  #: selection of an image's caption to learn from


class _Share(BaseModel):
    """Share of a task in a run: its optimiser steps and batch sizes."""

    model_config = STRICT
    #: Optimiser steps of this task, relative to the other tasks where the run's length is stated; else a run is their
    #: sum, in mode "shared" the most of them.
    updates: Positive | None = None
    batch_size: Positive  #: images of one optimiser step over all processes
    micro_batch: Positive  #: most images one process sends through the model at once

    @property
    def share(self) -> float:
        """Share of the steps, relative to the other tasks; 0 where `updates` is null."""
        return float(self.updates or 0)


class DetectionImage(BaseModel):
    """Keyword arguments of the detection transform; sizes in pixels."""

    model_config = STRICT
    short_sides: Sides = (480, 512, 544, 576, 608, 640, 672)
    max_long: Positive = 672
    crop_short_sides: Sides = (400, 500, 600)
    crop_range: tuple[Positive, Positive] = (384, 600)
    flip: Fraction = 0.5  #: probability
    eval_short: Positive = 800
    eval_max_long: Positive = 672
    fixed_size: Positive | None = None  #: square size for training and evaluation instead of all of the above


class DetectionHeadConfig(BaseModel):
    """Keyword arguments of the detection head (asymmetric DETR)."""

    model_config = STRICT
    num_classes: Positive = 91  #: as many as there are categories where their ids are not COCO's
    num_queries: Positive = 100
    encoder_dim: Positive = 128
    decoder_dim: Positive = 256
    encoder_layers: Positive = 6
    decoder_layers: Positive = 6
    num_heads: Positive = 8
    ffn_dim: Positive = 1024
    dropout: Probability = 0.1


class DetectionLoss(BaseModel):
    """Keyword arguments of the detection criterion; the matcher's costs are the same ce, l1 and giou."""

    model_config = STRICT
    ce: Rate = 1.0
    l1: Rate = 5.0
    giou: Rate = 2.0
    no_object: Above = 0.1  #: class weight of "no object" in the cross-entropy


class DetectionTask(_Share):
    """`visft.tasks.detection`."""

    image: DetectionImage = DetectionImage()
    head: DetectionHeadConfig = DetectionHeadConfig()
    loss: DetectionLoss = DetectionLoss()


class SegmentationImage(BaseModel):
    """Keyword arguments of the segmentation transform (large-scale jitter); sizes in pixels."""

    model_config = STRICT
    size: Positive = 1024  #: square that a training image is cut to
    scale: tuple[Above, Above] = (0.1, 2.0)
    flip: Fraction = 0.5  #: probability
    pad_value: Count = 128
    eval_short: Positive = 800
    eval_max_long: Positive = 1333
    eval_multiple: Positive = 32
    fixed_size: Positive | None = None  #: square size for training and evaluation instead of all of the above
    mask_stride: Positive = 4  #: pixels to a cell of a target mask
    content_only: bool = False  #: in training, drop the patches that show no image but only its extension


class SegmentationHeadConfig(BaseModel):
    """Keyword arguments of the segmentation head (single-scale Mask2Former)."""

    model_config = STRICT
    num_classes: Positive = 80  #: as many as there are categories where their ids are not COCO's
    num_queries: Positive = 100
    hidden_dim: Positive = 256
    encoder_layers: Positive = 6
    decoder_layers: Positive = 9
    num_heads: Positive = 8
    num_points: Positive = 4
    encoder_ffn_dim: Positive = 512
    decoder_ffn_dim: Positive = 1024
    dropout: Probability = 0.0
    labelling: Literal["contiguous", "published"] = "contiguous"  #: from 0, or 1..80 as in the published heads


class SegmentationLoss(BaseModel):
    """Keyword arguments of the segmentation criterion; the matcher's costs are the same ce, bce and dice."""

    model_config = STRICT
    ce: Rate = 2.0
    bce: Rate = 5.0
    dice: Rate = 5.0
    no_object: Above = 0.1  #: class weight of "no object" in the cross-entropy
    num_points: Positive = 12544
    oversample: Annotated[float, Field(ge=1)] = 3.0
    importance: Fraction = 0.75


class SegmentationTask(_Share):
    """`visft.tasks.segmentation`."""

    image: SegmentationImage = SegmentationImage()
    head: SegmentationHeadConfig = SegmentationHeadConfig()
    loss: SegmentationLoss = SegmentationLoss()


class CaptioningImage(BaseModel):
    """Keyword arguments of the captioning transform; sizes in pixels."""

    model_config = STRICT
    size: Positive = 256  #: side of the square
    caption_choice: CaptionChoice = "random"  #: "random" for each use, or the same: "first", or the "consensus" of all
    max_words: Positive = 50


class CaptioningHeadConfig(BaseModel):
    """Keyword arguments of the captioning head; its vocabulary comes with the data."""

    model_config = STRICT
    attention_dim: Positive = 384
    embed_dim: Positive = 384
    decoder_dim: Positive = 384
    grid: Positive = 14
    dropout: Probability = 0.5


class CaptioningLoss(BaseModel):
    """Keyword arguments of the captioning criterion."""

    model_config = STRICT
    ce: Rate = 1.0
    attention: Rate = 1.0  #: the doubly stochastic penalty


class CaptioningVocabulary(BaseModel):
    """Vocabulary of a captioning head."""

    model_config = STRICT
    min_count: Positive = 6  #: least number of times a word occurs in the training captions
    file: Text | None = None  #: a word map (JSON, word -> id) of a published head instead


class CaptioningDecoding(BaseModel):
    """Decoding of captions in evaluation."""

    model_config = STRICT
    beam_size: Positive = 1  #: 1: greedy
    max_length: Positive = 50  #: words


class CaptioningTask(_Share):
    """`visft.tasks.captioning`."""

    image: CaptioningImage = CaptioningImage()
    head: CaptioningHeadConfig = CaptioningHeadConfig()
    loss: CaptioningLoss = CaptioningLoss()
    vocabulary: CaptioningVocabulary = CaptioningVocabulary()
    decoding: CaptioningDecoding = CaptioningDecoding()


TaskConfig = DetectionTask | SegmentationTask | CaptioningTask


class TasksConfig(BaseModel):
    """`visft.tasks`: the tasks that train together. A task set to null, or absent, takes no part."""

    model_config = STRICT
    detection: DetectionTask | None = None
    segmentation: SegmentationTask | None = None
    captioning: CaptioningTask | None = None

    def enabled(self) -> dict[str, TaskConfig]:
        """Task name -> its settings, in the order of this class."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: task for name, task in pairs if task is not None}


class SharedImage(BaseModel):
    """Keyword arguments of the transform that all tasks share; sizes in pixels."""

    model_config = STRICT
    short_sides: Sides = (480, 512, 544, 576, 608, 640, 672)
    max_long: Positive = 672
    flip: Fraction = 0.5  #: probability
    eval_short: Positive = 800
    eval_max_long: Positive = 672
    fixed_size: Positive | None = None  #: square size for training and evaluation instead of all of the above
    mask_stride: Positive = 4  #: pixels to a cell of a target mask
    caption_choice: CaptionChoice = "random"  #: "random" for each use, or the same: "first", or the "consensus" of all
    max_words: Positive = 50


class SharedConfig(BaseModel):
    """`visft.shared`: batch and images of a step in which all tasks share the images (`visft.mode` "shared")."""

    model_config = STRICT
    batch_size: Positive  #: images of one optimiser step over all processes
    micro_batch: Positive  #: most images one process sends through the model at once
    image: SharedImage = SharedImage()


@dataclass(frozen=True)
class Stream:
    """Kind of optimiser step: its tasks, batch size and share of the steps."""

    name: str  #: of the task, or "shared"
    tasks: tuple[str, ...]
    share: float  #: of the steps, relative to the other streams
    batch_size: int  #: images of one optimiser step over all processes
    micro_batch: int  #: most images one process sends through the model at once
    image: dict[str, Any]  #: keyword arguments of the transform
    #: Task -> raw ids of the classes of its head, where they are not those of the published heads.
    classes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def largest_side(self) -> int:
        """Side in pixels of the largest square among the training images."""
        return int(self.image.get("fixed_size") or self.image.get("size") or self.image["max_long"])

    def typical_side(self, together: int) -> int:
        """Side in pixels of the square with the area of an average training image.

        That of the largest, but where segmentation keeps the content only: then the mean over its scales for images
        of 4 : 3, COCO's most frequent aspect ratio.

        Args:
            together: images padded to the size of the largest of them; 1 where each passes by itself, or packed.
        """
        side = self.largest_side()
        if not self.image.get("content_only"):
            return side
        low, high = self.image["scale"]
        # The largest of several uniform numbers has the quantiles of one, with the root of the probability.
        scales = [low + (high - low) * ((place + 0.5) / 1000) ** (1 / together) for place in range(1000)]
        shares = [min(1.0, scale) * min(1.0, 0.75 * scale) for scale in scales]
        return round(side * math.sqrt(sum(shares) / len(shares)))


SHARED = "shared"  #: name of the one stream of mode "shared"
