"""Categories of the data and classes of the heads: which category each class stands for.

Categories are COCO's if ids and names are. Heads for ids among COCO's have the classes of the published ones,
which data of some of these ids share: in detection a class is a raw id (91 of them, with holes), in
segmentation a place among the 80. Heads for other ids have as many classes as there are categories, in the
order of their ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,"
    "laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
#: COCO's 80 categories by their raw ids 1 to 90 (https://cocodataset.org), which have ten holes.
COCO_NAMES: Mapping[int, str] = {number: name for number, name in enumerate(_NAMES.split(","), 1) if name}
COCO_CATEGORY_IDS = tuple(COCO_NAMES)
#: Number of a place without a class, in label maps of one's own and among labels of classes; those are below
#: it.
VOID = 255


def category_name(id_: int, names: Mapping[int, str]) -> str:
    """The name of a category; heads for COCO's ids may have classes that their training data had no name
    for.
    """
    return names.get(id_, f"category {id_}")


def classes_of(task: str, options: Mapping[str, Any], names: Mapping[int, str]) -> tuple[int, ...] | None:
    """The raw id of each class of a head with these options, for data of these categories (id -> name); None:
    as in the published heads. Any task but segmentation may have raw ids as classes.

    Raises:
        ValueError: no such head has classes for these categories.
    """
    if "num_classes" not in options:
        return None
    num_classes = options["num_classes"]
    is_published = options.get("class_ids") == "published"
    are_ids_of_coco = names.keys() <= COCO_NAMES.keys()
    if is_published and not are_ids_of_coco:
        raise ValueError(
            f"visft.tasks.{task}.head.class_ids = published is for COCO's category ids, "
            "and the data has others"
        )
    if task == "segmentation":
        as_published = are_ids_of_coco
        least = len(COCO_NAMES)
    else:
        as_published = min(names, default=0) >= 0
        least = max(names, default=0) + 1
    if as_published and num_classes >= least:
        return None
    if num_classes == len(names) and not is_published:
        return tuple(sorted(names))
    allowed = f"{len(names)}, at least {least}" if as_published else f"{len(names)}"
    raise ValueError(
        f"visft.tasks.{task}.head.num_classes is {num_classes}, and the data has {len(names)} categories: "
        f"give {allowed}, or leave it out"
    )


def check_unnamed(task: str, options: Mapping[str, Any]) -> None:
    """Refuse a head whose categories are not known and whose classes are too few to be those of the published
    heads.
    """
    if task != "segmentation" or options.get("class_ids") == "published":
        return
    num_classes = options.get("num_classes", 0)
    if num_classes < len(COCO_NAMES):
        raise ValueError(
            f"the file of a segmentation head of {num_classes} classes does not say which categories they are"
        )
