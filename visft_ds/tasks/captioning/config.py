"""`visft.tasks.captioning`: images, head and loss of captioning. Defaults are those of the published code."""

from __future__ import annotations

from visft_ds.settings.fields import Positive, Probability, Rate, StrictModel
from visft_ds.settings.task_schema import CaptionChoice, WordsConfig


class CaptioningImage(StrictModel):
    """Geometry and targets of captioning; sizes in pixels."""

    size: Positive = 256  #: side of the square that every image is scaled to, in pixels (ViSFT: 256)
    #: caption to train on: a new "random" one each time, or the "first"
    caption_choice: CaptionChoice = "random"
    max_words: Positive = 50  #: most words of a caption; longer ones are left out


class CaptioningHeadConfig(StrictModel):
    """Keyword arguments of the captioning head; its vocabulary comes with the data."""

    attention_dim: Positive = 384  #: channels of the attention over cells (ViSFT: 384)
    embed_dim: Positive = 384  #: channels of a word's embedding (ViSFT: 384)
    decoder_dim: Positive = 384  #: channels of the LSTM's state (ViSFT: 384)
    #: side of the square that features are pooled to, in cells (arXiv 1502.03044: 14)
    encoded_image_size: Positive = 14
    dropout: Probability = 0.5  #: probability of dropout before the word layer (arXiv 1502.03044: 0.5)


class CaptioningLoss(StrictModel):
    """Keyword arguments of the captioning criterion."""

    ce: Rate = 1.0  #: weight of the cross-entropy of words
    attention: Rate = 1.0  #: weight of the doubly stochastic penalty (arXiv 1502.03044, eq. 14)


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
