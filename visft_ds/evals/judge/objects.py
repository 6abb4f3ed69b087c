"""Names of boxed objects: is what a box shows told by text, and by logistic regression?

Of an object the model sees a square around its box, the longer side times MARGIN (what lies outside of the
image is grey), and answers by text (the category whose sentence is nearest, if it has a text side) and by
logistic regression. A model with a text side also answers by the whole image with the box drawn into it, as
in figure 2 of the ViSFT paper. The paper's protocol is not known to us; this one is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image, ImageDraw

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Names, Number, Score, Scores
from visft_ds.evals.judge.dense_sets import DenseSet, read_objects
from visft_ds.evals.judge.images import changed, chosen
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.logistic import logistic_regression
from visft_ds.evals.judge.ranking import PLAIN, hits, rank_by_text, sentences
from visft_ds.evals.judge.rows import rows_of_objects

MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)
_RED = (255, 0, 0)  # which CLIP minds (https://arxiv.org/abs/2304.06712)
_LINE = 1 / 100  # width of a drawn box, share of the image's longer side

TEXT_TOP1 = Number(
    "text top1", how="The category whose sentence is most similar to the crop of a box is the right one."
)
MARKED_TOP1 = Number(
    "marked top1",
    how="The category whose sentence is most similar to the whole image, with the box drawn in red, is the "
    "right one.",
)
PROBE = Number("probe", how="Logistic regression names the crop of a box.")
NUMBERS = (TEXT_TOP1, MARKED_TOP1, PROBE)
_MARKED = "marked"  # set of images


def benchmark(request: Request) -> Benchmark:
    """Accuracy of naming the object in a box."""
    train, test = map(_large, read_objects(request))
    categories = [name for name in test.classes if name]

    def scores(features: Features, names: Names) -> Scores:
        of_test = features["test"]
        taught = rows_of_objects(features["train"]["pooled"], train.things).in_groups(train.images.groups)
        judged = rows_of_objects(of_test["pooled"], test.things).in_groups(test.images.groups)
        if "texts" in features and "clip" in of_test:
            named_classes = judged.labels.numpy() - test.classes.count("")
            for number, view in ((TEXT_TOP1, of_test), (MARKED_TOP1, features[_MARKED])):
                ranks = rank_by_text(view["clip"], features["texts"]["clip"], len(PLAIN), named_classes)
                yield Score(number.name, hits(ranks, 1), judged.owners.numpy())
        yield logistic_regression(PROBE.name, taught, judged)

    return Benchmark(
        request.label,
        sets={
            "train": _seen(train, crop, f"crop {MARGIN}"),
            "test": _seen(test, crop, f"crop {MARGIN}"),
            _MARKED: _seen(test, marked, f"marked {_LINE}"),
        },
        kinds=("clip", "pooled"),
        numbers=NUMBERS,
        settings={"benchmark": "objects 5", "names": categories},
        scores=scores,
        texts=sentences(categories, PLAIN),
        text_sets=(_MARKED,),
    )


_Box = Sequence[float]  # (x, y, width, height), pixels


def _large(data: DenseSet) -> DenseSet:
    """The same without objects whose box is less than SMALLEST pixels wide or high."""
    things = [thing for thing in data.things if coco_mask.toBbox(thing.code)[2:].min() >= SMALLEST]
    if not things:
        raise ValueError(f"no object has a box of at least {SMALLEST:g} pixels ({data.images.names[0]}, ...)")
    return replace(data, things=tuple(things))


def _seen(data: DenseSet, view: Callable[[Image.Image, _Box], Image.Image], how: str) -> ImageSet:
    """A view of the image of each object and its box; `how` states what the view depends on."""
    images = chosen(data.images, [thing.owner for thing in data.things])
    # Scores are in groups by their rows' owners, as objects of an image are no independent evidence.
    images = replace(images, stretched=False, groups=None)
    boxes = [coco_mask.toBbox(thing.code).tolist() for thing in data.things]
    return changed(images, lambda number, image: view(image, boxes[number]), f"{how} {tuple(boxes)}")


def crop(image: Image.Image, box: _Box) -> Image.Image:
    """The square of MARGIN times the longer side around a box (x, y, width, height)."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left = round(x + width / 2 - side / 2)
    top = round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas


def marked(image: Image.Image, box: _Box) -> Image.Image:
    """The image in the middle of a square, with a line around a box (x, y, width, height)."""
    side = max(image.size)
    x, y, width, height = box
    left = (side - image.width) // 2
    top = (side - image.height) // 2
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (left, top))
    # Outside of the box, so that it hides nothing of a small object, but inside of the square.
    line = max(1, round(_LINE * side))
    low = np.round([left + x, top + y]) - line
    high = np.round([left + x + width, top + y + height]) + line
    ImageDraw.Draw(canvas).rectangle((*low.clip(min=0), *high.clip(max=side) - 1), outline=_RED, width=line)
    return canvas
