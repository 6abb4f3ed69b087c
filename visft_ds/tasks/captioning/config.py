"""`visft.tasks.captioning`: images, head and loss of captioning. Defaults are those of the published code."""

from __future__ import annotations

from visft_ds.settings.fields import Positive, Probability, Rate, StrictModel
from visft_ds.settings.task_schema import CaptionChoice, WordsConfig


class CaptioningImage(StrictModel):
    """Geometry and targets of captioning; sizes in pixels."""

    size: Positive = 256  #: side of the square
    caption_choice: CaptionChoice = (
        "random"  #: caption to train on: a new "random" one each time, or the "first"
    )
    max_words: Positive = 50


class CaptioningHeadConfig(StrictModel):
    """Keyword arguments of the captioning head; its vocabulary comes with the data."""

    attention_dim: Positive = 384
    embed_dim: Positive = 384
    decoder_dim: Positive = 384
    #: Side of the square of cells that features are pooled to (Show, Attend and Tell, arXiv 1502.03044)
    encoded_image_size: Positive = 14
    dropout: Probability = 0.5


class CaptioningLoss(StrictModel):
    """Keyword arguments of the captioning criterion."""

    ce: Rate = 1.0
    attention: Rate = 1.0  #: the doubly stochastic penalty


class CaptioningTask(WordsConfig):
    """`visft.tasks.captioning`."""

    metrics = ("caption/CIDEr", *(f"caption/BLEU-{order}" for order in (1, 2, 3, 4)), "caption/ROUGE-L")
    shown = ("caption/CIDEr", "caption/BLEU-4")
    main = "caption/CIDEr"
    hub_task = "image-to-text"
    published = "caption"

    image: CaptioningImage = CaptioningImage()
    head: CaptioningHeadConfig = CaptioningHeadConfig()
    loss: CaptioningLoss = CaptioningLoss()


CONFIG = CaptioningTask
