"""Styles: colours, textures and backgrounds of one family of images."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from visft_ds.toy.shapes import NAMES

#: How often a category comes in a colour of its own, else in any. "even": colour says nothing about shape.
OWN_COLOUR = {"usual": 0.85, "even": 0.0}
_NUMBER = re.compile(r"[0-9]{1,9}")  #: name of a drawn style
#: Surfaces and grounds of drawn styles: those that style a, which demo and experiments train on, lacks.
_DRAWN_TEXTURES = ("checked", "wavy", "speckled", "ringed", "hatched", "zigzag", "mottled")
_DRAWN_GROUNDS = ("tiled", "marbled", "spotted", "quilted", "misty", "scratched")
#: Least distance in RGB of a drawn colour to the grounds; half of it to other colours of its kind.
_DISTANCE = 90.0


@dataclass(frozen=True)
class Style:
    """Colours (RGB 0..255), surface textures and background kinds of one family of images."""

    colours: Mapping[str, tuple[int, ...]]
    textures: Sequence[str]
    grounds: Sequence[str]
    ground_colours: Mapping[str, tuple[int, ...]]
    own_colour: float = OWN_COLOUR["usual"]  #: share of the shapes in the colour of their category
    period: float = 1.0  #: of the patterns, relative to their usual one
    contrast: float = 1.0  #: of the patterns, relative to their usual one
    grain: float = 0.0  #: standard deviation of the noise on every value of the finished image
    categories: Sequence[str] = NAMES  #: those that scenes show


def _rgb(colours: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Colours given as RRGGBB."""
    return {name: tuple(bytes.fromhex(value)) for name, value in colours.items()}


STYLES = {
    "a": Style(
        colours=_rgb(
            {
                "red": "d42622",
                "green": "269434",
                "blue": "2448ce",
                "yellow": "f2ce26",
                "purple": "862ca8",
                "orange": "f47e16",
                "black": "18181a",
                "white": "f8f8f8",
                "brown": "78461e",
                "pink": "fa82be",
                "cyan": "1ec8dc",
                "lime": "96e132",
            }
        ),
        textures=("plain", "striped", "dotted", "shaded"),
        grounds=("cloudy", "grainy", "lined"),
        ground_colours=_rgb({"gray": "969698", "beige": "cdbea0", "pale blue": "a8c0d0"}),
    ),
    "b": Style(
        colours=_rgb(
            {
                "rose": "ff6e96",
                "teal": "1ea096",
                "olive": "969628",
                "ivory": "faf6dc",
                "gold": "e0b24c",
                "lavender": "baa6fa",
                "mint": "96f0be",
                "coral": "ff785a",
                "silver": "bec3c8",
                "azure": "5aaaff",
                "magenta": "e128c8",
                "crimson": "be143c",
            }
        ),
        textures=("plain", "checked", "wavy", "speckled"),
        grounds=("tiled", "marbled", "spotted"),
        ground_colours=_rgb({"brown": "5c3e2c", "dark green": "204636", "navy": "1c2454"}),
    ),
}


def style_of(name: str, colours: str, without: Collection[str] = ()) -> Style:
    """A style of STYLES, or the one that a number draws, with a kind of colours, without some categories.

    Raises ValueError for an unknown style or category, or if no category is left.
    """
    unknown = set(without).difference(NAMES)
    categories = [category for category in NAMES if category not in without]
    if unknown or not categories:
        allowed = f"some, not all, of {', '.join(NAMES)} are allowed"
        raise ValueError(f"without {', '.join(without)}: {allowed}")
    if name in STYLES:
        style = STYLES[name]
    elif _NUMBER.fullmatch(name):
        style = _drawn_style(int(name))
    else:
        raise ValueError(f"style {name!r}: allowed are {', '.join(STYLES)}, or a number")
    return replace(style, own_colour=OWN_COLOUR[colours], categories=categories)


def _drawn_style(number: int) -> Style:
    """A style drawn by a number from 0, for experiments in which styles are the sample."""
    rng = np.random.default_rng([number, 1])
    ground_colours = _drawn_colours(rng, 3, "shade", ())
    return Style(
        colours=_drawn_colours(rng, len(NAMES), "tint", ground_colours.values()),
        textures=tuple(rng.choice(_DRAWN_TEXTURES, 4, replace=False).tolist()),
        grounds=tuple(rng.choice(_DRAWN_GROUNDS, 3, replace=False).tolist()),
        ground_colours=ground_colours,
        period=rng.uniform(0.6, 1.6),
        contrast=rng.uniform(0.6, 1.2),
        grain=rng.uniform(0, 16),
    )


def _drawn_colours(
    rng: np.random.Generator, count: int, name: str, grounds: Collection[tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Random colours called `name`1, `name`2 and so on, which differ from the grounds and from each other."""
    colours = dict[str, tuple[int, ...]]()
    while len(colours) < count:
        colour = rng.integers(0, 256, 3)
        to_grounds = [np.linalg.norm(colour - other) for other in grounds]
        to_colours = [np.linalg.norm(colour - other) for other in colours.values()]
        if min(to_grounds, default=np.inf) >= _DISTANCE and min(to_colours, default=np.inf) >= _DISTANCE / 2:
            colours[f"{name}{len(colours) + 1}"] = tuple(colour.tolist())
    return colours
