"""Task heads in files: ours (safetensors, with all that builds the head again) and the published ones of
ViSFT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from visft_ds.data.shards import Category, categories_for
from visft_ds.files import reading
from visft_ds.interop.layouts import fitted
from visft_ds.interop.weights import AnyPath, Weights, examples, open_weights, save_tensors
from visft_ds.ops import shapes_alone
from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.fields import Count, Positive, StrictModel
from visft_ds.tasks import TASKS, config_class, get_task
from visft_ds.tasks.classes import COCO_NAMES, check_unnamed, classes_of
from visft_ds.tasks.head_files import head_files
from visft_ds.tasks.vocabulary import Vocabulary

_KEY = "visft_head"


@dataclass(frozen=True)
class HeadInfo:
    """Description of a head: `build_head` of its task gives it, of its shapes and settings.

    `categories` are those of the data it was trained on, as COCO writes them; `extra` is what the trainer
    remembers: step, mode, base_weights (a fingerprint), layers (blocks of the backbone), vocabulary.
    """

    task: str
    shapes: Sequence[tuple[int, int]]  #: (width, pixels to a cell) of each map that it reads
    options: Mapping[str, Any] = field(default_factory=dict)
    categories: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def names(self) -> dict[int, str]:
        """The categories it was trained on, id -> name; COCO's of a published one, none where nobody recorded
        them.
        """
        if self.extra.get("format") == "visft" and not TASKS[self.task].uses_vocabulary:
            return dict(COCO_NAMES)
        return {int(entry.get("coco_id", entry["id"])): entry["name"] for entry in self.categories}

    def settings(self) -> Any:
        """The settings of the head, an object of its task's schema."""
        return get_task(self.task).settings("head", self.options)

    def vocabulary(self) -> Vocabulary | None:
        """The words that it brings along."""
        return Vocabulary.from_dict(self.extra["vocabulary"]) if "vocabulary" in self.extra else None


Heads = Mapping[str, HeadInfo]  #: by task


class StoredExtra(StrictModel):
    """Entries of `HeadInfo.extra` that others ask for; a trainer may remember more."""

    model_config = ConfigDict(extra="allow")

    base_weights: str | None = None
    layers: tuple[Count, ...] = ()
    bands: Bands | None = None


class StoredHead(StrictModel):
    """`HeadInfo` in the header of a file."""

    version: Literal[1]
    task: str
    shapes: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)]
    options: dict[str, Any] = Field(default_factory=dict)
    categories: tuple[dict[str, Any], ...] = ()
    extra: StoredExtra = StoredExtra()


@dataclass(frozen=True)
class HeadFile:
    """Head in an open file; `tensors` have our names."""

    info: HeadInfo
    tensors: Weights

    def check(self, head: nn.Module) -> HeadFile:
        """The file itself. Raises ValueError if names or shapes differ from the head (on any device, meta
        too).
        """
        task = self.info.task
        kind = self.info.options.get("type")
        remedy = ""
        if kind is not None:
            remedy = f"; its head is of type {kind}: give the settings of the run that trained it, such as "
            remedy += f"--set visft.tasks.{task}.head.type={kind}"
        fitted(self.tensors, head.state_dict(), behind=(), what=f"the {task} head", remedy=remedy)
        return self

    def build(self) -> nn.Module:
        """The head, fp32, on the CPU, in evaluation mode. Raises ValueError as `check`."""
        info = self.info
        task = get_task(info.task)
        with reading(self.tensors.path, f"a {info.task} head"), shapes_alone():
            head = task.build_head(info.shapes, info.settings(), info.options.get("vocabulary_size"))
        self.check(head)
        values = {name: self.tensors.tensor(name, torch.float32) for name in self.tensors}
        head.load_state_dict(values, assign=True)
        return head.eval()


def head_file(folder: AnyPath, task: str) -> Path:
    """Path of a task's head in a folder of heads."""
    return Path(folder) / f"{task}.safetensors"


def save_head(path: Path, info: HeadInfo, tensors: Mapping[str, Tensor]) -> Path:
    """Write a head and its description; returns the path."""
    save_tensors(path, tensors, {_KEY: _description_of(info)})
    return path


def head_metadata(heads: Heads) -> dict[str, str]:
    """Header of a checkpoint that holds heads among other tensors, by which they are read like head files."""
    return {f"{_KEY}.{task}": _description_of(info) for task, info in heads.items()}


def _description_of(info: HeadInfo) -> str:
    return json.dumps({"version": 1, **asdict(info)})


def open_head(source: AnyPath, task: str) -> HeadFile:
    """Open the head of a task in a folder or file: ours, in a checkpoint of ours, or a published one.

    Raises ValueError without one, for published ones of both backbones, and for the published file of another
    head.
    """
    paths = head_files(Path(source), task)
    if len(paths) != 1:
        raise ValueError(
            f"{source} holds {len(paths) or 'no'} {task} heads; stage 1 writes them into RUN/export"
        )
    path = paths[0]
    published = re.fullmatch(r"(eva_[eg])_(\w+)_heads\.ckpt", path.name)
    word = config_class(task).published
    if published and published[2] != word:
        file_name = f"{published[1]}_{word}_heads.ckpt"
        raise ValueError(f"{path} holds the {published[2]} head alone; the {task} head is in {file_name}")
    file = open_weights(path)
    description = file.metadata.get(_KEY) or file.metadata.get(f"{_KEY}.{task}")
    if description is None:
        from visft_ds.interop.published import published_head  # knows the names of all heads, and adapters

        return published_head(task, file)
    with reading(file.path, "a head of visft_ds"):
        StoredHead.model_validate_json(description)
        stored = json.loads(description)
        del stored["version"]
        info = HeadInfo(**stored)
        info.names()
        info.vocabulary()
    if info.task != task:
        raise ValueError(
            f"{file.path} holds a {info.task} head, and a {task} head is needed: give the folder of all "
            "heads, such as RUN/export"
        )
    return HeadFile(info, file if _KEY in file.metadata else file.under(f"heads.{task}."))


def read_elsewhere(info: HeadInfo, layers: Sequence[int], bands: Bands | None) -> str | None:
    """Reason why a head cannot read the maps that these blocks (none: the last) make of these bands; None if
    it can.
    """
    seen = Bands.of(info.extra.get("bands"))
    trained_on = info.extra.get("layers", [])
    if seen != bands:
        here = in_words(bands)
        if here == in_words(seen):
            here += " with other means"
        return f"the {info.task} head was trained on {in_words(seen)}, and the backbone reads {here}"
    if trained_on != list(layers):
        there = f"the {info.task} head was trained on {_blocks(trained_on)}"
        return f"{there}, and the backbone is read after {_blocks(layers)}"
    return None


def _blocks(numbers: Sequence[int]) -> str:
    return f"block {', '.join(map(str, numbers))}" if numbers else "the last block"


def check_categories(heads: Heads, categories: Sequence[Category], where: str, remedy: str) -> None:
    """Refuse a head for categories it was not trained on; ones that the data lacks do no harm.

    Raises ValueError naming categories of the data set (called `where`) that a head does not know, and the
    `remedy`.
    """
    for task, info in heads.items():
        known = info.names()
        names = {entry.coco_id: entry.name for entry in categories_for(config_class(task).labels, categories)}
        unknown = [f"{id_} {name!r}" for id_, name in names.items() if known.get(id_) != name]
        if known and unknown:
            raise ValueError(f"the {task} head does not know {examples(unknown)} of {where}. {remedy}")


def classes_of_heads(heads: Heads) -> dict[str, tuple[int, ...]]:
    """Task -> raw ids of the classes of its head, where they are not those of the published heads.

    Raises ValueError for a head whose classes nobody knows.
    """
    own = {}
    for task, info in heads.items():
        if not config_class(task).has_classes:
            continue
        if not info.categories:
            check_unnamed(task, info.options)
        elif classes := classes_of(task, info.options, info.names()):
            own[task] = classes
    return own


def check_heads(
    heads: Heads,
    classes: Mapping[str, tuple[int, ...]],
    categories: Sequence[Category],
    vocabulary: Vocabulary | None,
) -> None:
    """Refuse heads that know other categories or words than the training data, or have other `classes` than
    the run.

    Raises ValueError naming what differs.
    """
    where = "the training data"
    check_categories(heads, categories, where, "Start new heads with stage 1 on this data")
    of_heads = classes_of_heads(heads) if categories else {}
    for task, theirs in of_heads.items():
        if theirs == classes.get(task):
            continue
        ids = {category.coco_id for category in categories_for(config_class(task).labels, categories)}
        lacking = [f"{id_} {name!r}" for id_, name in heads[task].names().items() if id_ not in ids]
        number = heads[task].options["num_classes"]
        remedy = f"give visft.tasks.{task}.head.num_classes={number}"
        if lacking:
            remedy = f"{where} lacks {examples(lacking)}: list them in its instances file"
        raise ValueError(
            f"the {task} head has {number} classes, one for each category it was trained on; {remedy}"
        )
    check_vocabulary(heads, vocabulary, where)


def check_vocabulary(infos: Heads, vocabulary: Vocabulary | None, where: str) -> None:
    """Raise ValueError for heads that work with other words, or as many, than `vocabulary`, that of
    `where`.
    """
    for task, info in infos.items():
        if not TASKS[task].uses_vocabulary:
            continue
        assert vocabulary is not None, f"{task} works with a vocabulary"
        own = info.vocabulary()
        if own is None:
            vocabulary.check_size(info.options["vocabulary_size"])
        else:
            own.check_same(vocabulary, this=f"the {task} head", that=where)
