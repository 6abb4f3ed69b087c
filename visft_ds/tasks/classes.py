"""Categories of the data and classes of the heads: which category each class stands for.

Heads for COCO's ids have the classes of the published ones, which data of some of its categories share: in detection a
class is a raw id (91 of them, with holes), in segmentation a place among COCO's 80 categories. Heads for categories of
other ids have as many classes as there are categories, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visft_ds.tasks.segmentation.data import COCO_CATEGORY_IDS

_COCO = frozenset(COCO_CATEGORY_IDS)
_EXAMPLES = 3


def are_of_coco(ids: Mapping[int, str]) -> bool:
    """Return True if heads for these categories (id -> name) have the classes of the published heads by default."""
    return _COCO.issuperset(ids)


def classes_of(task: str, options: Mapping[str, Any], names: Mapping[int, str]) -> tuple[int, ...] | None:
    """The raw id of each class of a head; None: as in the published heads.

    Args:
        task: one that learns from annotated objects; any but segmentation may have raw ids as classes.
        options: of the head.
        names: id -> name of all categories of its training data.

    Raises:
        ValueError: no such head has classes for these categories.
    """
    if "num_classes" not in options:
        return None
    number, published = options["num_classes"], options.get("labelling") == "published"
    if task == "segmentation" and published and not are_of_coco(names):
        raise ValueError(
            f"visft.tasks.segmentation.head.labelling = published is the numbering of COCO's 80 categories only, and "
            f"the data has {_few(names, _COCO)}: leave it at contiguous and train heads of your own in stage 1"
        )
    if task != "segmentation" and all(0 <= id_ < number for id_ in names):
        return None
    if task == "segmentation" and are_of_coco(names) and number >= len(COCO_CATEGORY_IDS):
        return None
    if number == len(names) and not published:
        return tuple(sorted(names))
    further = ""
    if task != "segmentation":
        further = f", or at least {max(names) + 1}, so that classes are raw ids"
    elif are_of_coco(names):
        further = f", or {len(COCO_CATEGORY_IDS)}, those of COCO"
    allowed = f"{len(COCO_CATEGORY_IDS)}" if published else f"{len(names)}{further}"
    raise ValueError(
        f"visft.tasks.{task}.head.num_classes is {number}, and the data has {len(names)} categories ({_few(names)}): "
        f"leave num_classes out, then it comes from the data, or give {allowed}"
    )


def ids_of_classes(task: str, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The raw id of each class of a head that has those of the published heads; -1 for one that stands for none."""
    number = options["num_classes"]
    if task != "segmentation":
        return tuple(range(number))
    shift = (-1,) if options["labelling"] == "published" else ()
    return (*shift, *COCO_CATEGORY_IDS, *[-1] * number)[:number]


def check_unnamed(task: str, options: Mapping[str, Any]) -> None:
    """Refuse a head whose categories are not known and whose classes are not those of the published heads either.

    Raises:
        ValueError: it has too few of them.
    """
    enough = options.get("labelling") == "published" or options.get("num_classes", 0) >= len(COCO_CATEGORY_IDS)
    if task == "segmentation" and not enough:
        raise ValueError(
            f"the segmentation head has {options.get('num_classes')} classes, and its file does not name their "
            "categories: give the file that a training exported"
        )


def _few(names: Mapping[int, str], but: frozenset[int] = frozenset()) -> str:
    """The first categories, without those of some ids, and how many more there are."""
    shown = [f"{id_} {names[id_]!r}" for id_ in sorted(names) if id_ not in but]
    return ", ".join(shown[:_EXAMPLES]) + f" and {len(shown) - _EXAMPLES} more" * (len(shown) > _EXAMPLES)
