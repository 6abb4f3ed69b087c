"""Names of boxed objects: is what a box shows told by text, and by logistic regression?

Of an object the model sees a square around its box, the longer side times MARGIN (what lies outside of the
image is grey), and answers by text (the category whose sentence is nearest, if it has a text side) and by
logistic regression. The protocol of the ViSFT paper is not known to us; this one is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Number, Score
from visft_ds.evals.judge.dense_sets import DenseSet, Thing
from visft_ds.evals.judge.images import changed, chosen
from visft_ds.evals.judge.logistic import logistic_regression
from visft_ds.evals.judge.ranking import PLAIN, hits, rank_by_text, sentences
from visft_ds.evals.judge.rows import rows_of_objects

MARGIN = 1.2
SMALLEST = 16.0  #: sides of a box below which nobody could recognise it, pixels
_GREY = (128, 128, 128)

TEXT_TOP1 = Number(
    "text top1", how="The category whose sentence is most similar to the crop of a box is the right one."
)
PROBE = Number("probe", how="Logistic regression names the crop of a box.")
NUMBERS = (TEXT_TOP1, PROBE)


def grounding(label: str, train: DenseSet, test: DenseSet) -> Benchmark:
    """Accuracy of naming the object in a box."""
    train_crops, train_objects = _crops(train)
    test_crops, test_objects = _crops(test)
    categories = [name for name in test.classes if name]

    def scores(features: Features, names: Collection[str]) -> Iterator[Score]:
        of_test = features["test"]
        taught = rows_of_objects(features["train"]["pooled"], train_objects).in_groups(train.images.groups)
        judged = rows_of_objects(of_test["pooled"], test_objects).in_groups(test.images.groups)
        if "texts" in features and "clip" in of_test:
            named_classes = judged.labels.numpy() - test.classes.count("")
            ranks = rank_by_text(of_test["clip"], features["texts"]["clip"], len(PLAIN), named_classes)
            yield Score(TEXT_TOP1.name, hits(ranks, 1), judged.owners.numpy())
        yield logistic_regression(PROBE.name, taught, judged)

    return Benchmark(
        label,
        sets={"train": train_crops, "test": test_crops},
        kinds=("clip", "pooled"),
        numbers=NUMBERS,
        settings={"benchmark": "objects 4", "names": categories},
        scores=scores,
        texts=sentences(categories, PLAIN),
    )


def _crops(data: DenseSet) -> tuple[ImageSet, Sequence[Thing]]:
    """(boxes as images, what is in them), of those that are at least SMALLEST pixels wide and high."""
    objects = []
    boxes = []
    for thing in data.things:
        box = coco_mask.toBbox(thing.code).tolist()
        if min(box[2:]) >= SMALLEST:
            objects.append(thing)
            boxes.append(box)
    if not objects:
        raise ValueError(f"no object has a box of at least {SMALLEST:g} pixels ({data.images.names[0]}, ...)")
    # Scores are in groups by their rows' owners, as objects of an image are no independent evidence.
    images = chosen(data.images, [thing.owner for thing in objects])
    images = replace(images, stretched=False, groups=None)
    crops = changed(images, lambda number, image: crop(image, boxes[number]), f"crop {MARGIN} {tuple(boxes)}")
    return crops, objects


def crop(image: Image.Image, box: Sequence[float]) -> Image.Image:
    """The square of MARGIN times the longer side around a box (x, y, width, height)."""
    x, y, width, height = box
    side = max(1, round(MARGIN * max(width, height)))
    left = round(x + width / 2 - side / 2)
    top = round(y + height / 2 - side / 2)
    canvas = Image.new("RGB", (side, side), _GREY)
    canvas.paste(image, (-left, -top))
    return canvas
