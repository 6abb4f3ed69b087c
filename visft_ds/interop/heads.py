"""Task heads in files: our own format, one safetensors file a task with everything that is needed to build the head
again, and the published one of ViSFT (`published_heads`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from torch import Tensor, nn

from visft_ds.config.preflight import head_files, heads_inside
from visft_ds.data.shards import Category
from visft_ds.interop.files import LAYERS, WeightFile, examples, open_weights
from visft_ds.interop.head_file import HeadEntry, HeadFile, HeadInfo, check_options
from visft_ds.interop.published_heads import (
    KINDS,
    PREFIX,
    PublishedFile,
    find_published,
    published_task,
    sort_names,
)
from visft_ds.interop.writing import save_tensors
from visft_ds.tasks import TASKS, get_task
from visft_ds.tasks.classes import are_of_coco, check_unnamed, classes_of
from visft_ds.tasks.segmentation.config import Labelling

_KEY = "visft_head"


def head_file(folder: str | Path, task: str) -> Path:
    """Path of a task's head in a folder of heads."""
    return Path(folder) / f"{task}.safetensors"


def find_head(folder: str | Path, task: str) -> Path:
    """The file of a task's head in a folder: ours, else the published one. `folder` may also be the file itself.

    Raises ValueError for an unknown task; where there is no such file, naming those that were looked for; for published
    files of both backbones beside each other; and for a file whose published name is that of another task, since its
    other heads are untrained.
    """
    get_task(task)
    folder = Path(folder)
    if folder.is_file():
        other = published_task(folder)
        if other not in (None, task):
            raise ValueError(
                f"{folder} is the published file of the {other} head, in which other heads are untrained: give "
                f"{f'the file eva_*_{KINDS[task]}_heads.ckpt, or ' if task in KINDS else ''}the folder with all of them"
            )
        return folder
    found = head_files(folder, task)
    if not found:
        inside = next((one for one in heads_inside(folder) if head_files(one, task)), None)
        if inside is not None:
            raise ValueError(f"no {task} head in {folder} itself: it is in {inside}, give that")
        published = [f"eva_{size}_{KINDS[task]}_heads.ckpt" for size in "eg" if task in KINDS]
        names = ", ".join((head_file(folder, task).name, *published))
        raise ValueError(
            f"no {task} head in {folder}: looked for {names}. Stage 1 of a training writes the first into RUN/export"
            + "; the others are ViSFT's published files" * bool(published)
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds published {task} heads of two backbones ({', '.join(path.name for path in found)}): move "
            f"the files of each backbone into a folder of their own and give that"
        )
    return found[0]


def save_head_files(
    heads: nn.ModuleDict | Mapping[str, nn.Module | Mapping[str, Tensor]],
    folder: str | Path,
    metadata: Mapping[str, HeadInfo],
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write `<folder>/<task>.safetensors` for each head (or its state dict); returns the paths, in the same order.

    Raises ValueError where a file exists (checked for all before the first is written, unless `overwrite`), and where
    `metadata` does not describe exactly these heads.
    """
    tasks = list(heads.keys())
    if sorted(tasks) != sorted(metadata):
        raise ValueError(f"heads {sorted(tasks)} and their descriptions {sorted(metadata)} must name the same tasks")
    paths = [head_file(folder, task) for task in tasks]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{examples(existing)} exist and are not overwritten: choose another folder")
    for task, path in zip(tasks, paths, strict=True):
        info = metadata[task]
        if info.task != task:
            raise ValueError(f"the head {task!r} is described as {info.task!r}")
        head = heads[task]
        state = head.state_dict() if isinstance(head, nn.Module) else head
        save_tensors(path, state, {_KEY: json.dumps(asdict(info))}, overwrite=overwrite)
    return paths


def load_heads(path: str | Path, task: str, *, labelling: Labelling | None = None) -> nn.Module:
    """Build the head of a task from a file alone: ours, a published one of ViSFT, or a checkpoint of its training.

    Widths, numbers of layers, queries, classes and words are those of the tensors. A published file is taken to have 8
    attention heads. In the file of one task, ViSFT left the heads of others as they were before training: take each
    head from its own file. `labelling` (segmentation only, see `visft_ds.tasks.segmentation.config`) replaces what our
    file says; published files say nothing and are read as "published", which is how they were trained.

    The head is fp32, on the CPU, in evaluation mode.

    Raises:
        ValueError: an unknown task or labelling, a file that is damaged or has no head of this task (it names those it
            has), and, all listed: names that nothing accounts for, missing tensors, wrong shapes, values that are not
            finite, second names of segmentation tensors that hold something else.
    """
    get_task(task)
    if labelling is not None and (
        "labelling" not in TASKS[task].sizes.attributes or labelling not in get_args(Labelling)
    ):
        raise ValueError(
            f"labelling {labelling!r} with task {task!r}: only segmentation has one, {' or '.join(get_args(Labelling))}"
        )
    found = _open(path, task, assume=True)
    if labelling is not None:
        info = replace(found.info, options={**found.info.options, "labelling": labelling})
        found = replace(found, info=info)
    return found.build()


def read_head_info(path: str | Path, task: str) -> HeadInfo:
    """Read the description of a task's head in a file: enough to build it again.

    Raises ValueError for an unknown task, and for a file that is no head, or has none of this task.
    """
    get_task(task)
    return _open(path, task, assume=True).info


def open_head(head: nn.Module, path: str | Path, task: str) -> HeadFile:
    """Open a saved head, ours or a published one, that fits `head`: same task, same names, same shapes.

    Its tensors can be read one by one, or all be loaded into a head; `head` itself may be on the meta device. For a
    published file, `info` is what follows from its tensors: options lack attention heads and sampling points,
    labelling is "published", categories are unknown and empty, extra {"format": "visft"}.

    Raises ValueError that lists every difference and every value that is not finite (see `load_heads`).
    """
    found = _open(path, task, assume=False)
    found.check(head)
    return found


def _open(path: str | Path, task: str, *, assume: bool) -> HeadFile:
    """The head of a task in a file of any kind, nothing but names and shapes read; `assume`: see `find_published`."""
    file, of_checkpoint = open_weights(path), f"{_KEY}.{task}"
    if of_checkpoint in file.metadata:
        prefix = f"heads.{task}."
        names = {name.removeprefix(prefix): name for name in file if name.startswith(prefix)}
        return HeadFile(file, _own_info(file, of_checkpoint), names)
    if _KEY not in file.metadata:
        return find_published(_sorted(file), task, assume=assume)
    info = _own_info(file, _KEY)
    if info.task != task:
        raise ValueError(f"{path} holds a {info.task} head; a {task} head is wanted")
    return HeadFile(file, info, {name: name for name in file})


def described(heads: Mapping[str, HeadInfo]) -> dict[str, str]:
    """Header of a checkpoint that holds heads among other tensors, by which they are read like head files."""
    return {f"{_KEY}.{task}": json.dumps(asdict(info)) for task, info in heads.items()}


def _own_info(file: WeightFile, key: str) -> HeadInfo:
    try:
        file.told(key, HeadEntry)
        info = HeadInfo(**json.loads(file.metadata[key]))
        check_options(info)
    except ValueError as error:
        raise ValueError(
            f"{file.path}: its description of the head cannot be read ({error}): damaged, or of another release"
        ) from error
    return info


def _sorted(file: WeightFile) -> PublishedFile:
    if not any(name.startswith(PREFIX) for name in file):
        raise ValueError(
            f"{file.path}: no head written by visft_ds (its metadata has no {_KEY!r}) and none of ViSFT (no name "
            f"begins with {PREFIX}); it has {examples(file.infos)}"
        )
    return sort_names(file)


def of_other_base(heads: Mapping[str, HeadInfo], known: Collection[str]) -> list[str]:
    """A line for each head that learnt from the features of other base weights; heads that do not say are let pass.

    Args:
        known: names of the base weights, as `BaseWeights.names`.
    """
    trained_on = {task: info.extra.get("base_weights") for task, info in heads.items()}
    return [
        f"the {task} head was trained on the features of other base weights ({name})"
        for task, name in trained_on.items()
        if name is not None and name not in known
    ]


def read_elsewhere(info: HeadInfo, layers: Sequence[int]) -> str | None:
    """Why a head cannot read what these blocks of a backbone give (none: the last); None if it can."""
    wanted = info.extra.get(LAYERS, [])
    if wanted == list(layers):
        return None
    theirs, ours = (f"block {max(read)}" if read else "the last block" for read in (wanted, layers))
    return f"the {info.task} head learnt to read {theirs}, and the backbone is read after {ours}"


def check_categories(heads: Mapping[str, HeadInfo], categories: Sequence[Category], where: str, remedy: str) -> None:
    """Refuse a head for categories it was not trained on; ones that the data lacks do no harm.

    A published file says nothing of categories: its head knows COCO's 80 ids.

    Raises:
        ValueError: naming the categories of the data set (called `where`) that a head does not know by this id, and the
            `remedy`.
    """
    for task, info in heads.items():
        known, published = categories_of(info), info.extra.get("format") == "visft" and not TASKS[task].uses_vocabulary
        unknown = [c for c in categories if known.get(c.coco_id) != c.name]
        if published:
            unknown = [c for c in categories if not are_of_coco({c.coco_id: c.name})]
        if unknown and (known or published):
            named = [f"{id_} {name!r}" for id_, name in known.items()]
            trained = "COCO's 80" if published else examples(named)
            raise ValueError(
                f"the {task} head was trained on other categories than {where} has: it does not know "
                f"{examples([f'{c.coco_id} {c.name!r}' for c in unknown])}; it knows {trained}. {remedy}"
            )


def classes_of_heads(heads: Mapping[str, HeadInfo]) -> dict[str, tuple[int, ...]]:
    """Task -> raw ids of the classes of its head, where they are not those of the published heads.

    Raises:
        ValueError: a head whose classes stand for categories that its file does not name.
    """
    infos = {task: info for task, info in heads.items() if not TASKS[task].uses_vocabulary}
    found = {task: _classes(info) for task, info in infos.items()}
    return {task: classes for task, classes in found.items() if classes is not None}


def check_classes(
    heads: Mapping[str, HeadInfo], classes: Mapping[str, tuple[int, ...]], categories: Sequence[Category], where: str
) -> None:
    """Refuse heads whose classes stand for other categories than those of a run, both as `classes_of_heads` gives them.

    Raises:
        ValueError: naming the categories that the data set (called `where`) lacks.
    """
    ids = {category.coco_id for category in categories}
    for task, theirs in classes_of_heads(heads).items():
        if theirs == classes.get(task):
            continue
        lacking = [f"{id_} {name!r}" for id_, name in categories_of(heads[task]).items() if id_ not in ids]
        number = heads[task].options["num_classes"]
        remedy = f"give visft.tasks.{task}.head.num_classes={number}"
        if lacking:
            remedy = (
                f"{where} lacks {examples(lacking)}: list them among the categories of its instances file, with or "
                "without objects"
            )
        raise ValueError(f"the {task} head has {number} classes, one for each category it was trained on; {remedy}")


def categories_of(info: HeadInfo) -> dict[int, str]:
    """The categories a head was trained on, id -> name; empty where its file does not record them."""
    return {int(entry.get("coco_id", entry["id"])): entry["name"] for entry in info.categories}


def _classes(info: HeadInfo) -> tuple[int, ...] | None:
    names = categories_of(info)
    if not names:
        check_unnamed(info.task, info.options)
        return None
    try:
        return classes_of(info.task, info.options, names)
    except ValueError as error:
        raise ValueError(f"the {info.task} head's file contradicts itself: {error}") from error
