"""Toy images of one shape each in folders of classes, as `visft evaluate benchmarks` reads them.

Classes are shapes, or colours of shapes. The images have the styles of the toy sets, so that a model which learnt
from style a is judged at home (a) or out of its domain (b): shapes have the same names in both, colours have not.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from visft_ds.toy.annotations import check_drawing, jpeg, with_article
from visft_ds.toy.scenes import NAMES, STYLES, draw_single, style_of

KINDS = ("shape", "colour")
#: Sentences for a class, in the words of the toy captions; a colour is combined with every shape in turn.
TEMPLATES = {
    "shape": ("One shape: {}.", "{} and no other shape.", "The largest shape is {}."),
    "colour": tuple(f"The largest shape is a large {{}} {name}." for name in NAMES),
}
_SPLITS = ("train", "test")
_STREAM = 77  # of random numbers, apart from those of the toy sets


def class_names(kind: str, style: str) -> list[str]:
    """Names of the classes, in the order of their folders. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there are no toy classes of {kind!r}: choose one of {', '.join(KINDS)}")
    return sorted(NAMES) if kind == "shape" else sorted(STYLES[style].colours)


def write_toy_classes(
    out: Path,
    kind: str,
    *,
    train: int,
    test: int,
    height: int,
    width: int,
    style: str = "a",
    colours: str = "usual",
    seed: int = 0,
) -> dict[str, int | float]:
    """Write `{train,test}/CLASS/*.jpg`, `classnames.txt` and `templates.txt`.

    Classes have equally many images, to one. In a set of shapes they have their usual colours 85 % of the time, as in
    the toy sets, unless `colours` is "even"; in one of colours any shape has any colour. Image i of a split is a
    function of (seed, style, colours, kind, split, size, i).

    Args:
        kind: one of KINDS.
        train: images to train probes with; 0: no such folder.
        test: images.

    Returns:
        Counts (`images`, `classes`) and the `seconds` it took.

    Raises:
        ValueError: a folder that holds anything, sides under 28 pixels, an unknown style, colours or kind, a negative
            seed, or a class without an image.
    """
    check_drawing(out, style, colours, height, width)
    classes = class_names(kind, style)
    if test < len(classes) or (train and train < len(classes)) or seed < 0:
        raise ValueError(
            f"train={train}, test={test}, seed={seed}: {len(classes)} classes need as many test images at least, and "
            f"as many training images or none; the seed must not be negative"
        )
    began = time.monotonic()
    folders = [name.replace(" ", "_") for name in classes]
    for split, count in zip(_SPLITS, (train, test), strict=True):
        for index in range(count):
            key = (seed, sorted(STYLES).index(style), KINDS.index(kind), _STREAM, _SPLITS.index(split), index)
            rng = np.random.default_rng(key)
            name = classes[index % len(classes)]
            category = NAMES.index(name) if kind == "shape" else int(rng.integers(len(NAMES)))
            colour = name if kind == "colour" else None
            scene = draw_single(rng, style_of(style, colours), height, width, category=category, colour=colour)
            path = out / split / folders[index % len(classes)] / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(scene))
    names = [with_article(name) for name in classes] if kind == "shape" else classes
    (out / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (out / "templates.txt").write_text("".join(f"{text}\n" for text in TEMPLATES[kind]), encoding="utf-8")
    return {"images": train + test, "classes": len(classes), "seconds": time.monotonic() - began}
