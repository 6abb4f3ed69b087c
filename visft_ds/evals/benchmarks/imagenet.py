"""Names of ImageNet's classes, and the sentences that CLIP puts them into."""

from __future__ import annotations

from functools import cache


@cache
def synsets() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes, in their order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@cache
def class_names() -> tuple[str, ...]:
    """Names of the 1,000 classes as open_clip gives them to text towers."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@cache
def templates() -> tuple[str, ...]:
    """OpenAI's 80 sentences about an image of a class, `{}` for its name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
