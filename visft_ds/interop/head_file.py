"""A task head in a file: its description, the module built from that or from the shapes of its tensors, its values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural, Number, as_record
from visft_ds.config.validate import check
from visft_ds.interop.backbones import copy_tensors, read_tensor
from visft_ds.interop.files import WeightFile, examples
from visft_ds.tasks import TASKS, get_task
from visft_ds.tasks.spec import Task


class NamedCategory(StrictModel):
    """Category that a head was trained on; further fields are those of COCO."""

    model_config = ConfigDict(extra="allow")

    id: Number
    coco_id: Number = 0  #: where it is absent, `id` is
    name: str


class TrainerNotes(StrictModel):
    """Notes of a trainer about a head; further fields are for people."""

    model_config = ConfigDict(extra="allow")

    base_weights: str | None = None
    format: str | None = None
    base: str | None = None
    mode: str | None = None
    layers: list[int] = Field(default_factory=list)
    vocabulary: dict[str, Any] = Field(default_factory=dict)


class HeadEntry(StrictModel):
    """Entry of the header of a file about its head; see `HeadInfo`."""

    task: str
    in_channels: Natural
    options: dict[str, Any] = Field(default_factory=dict)
    categories: list[NamedCategory] = Field(default_factory=list)
    extra: TrainerNotes = TrainerNotes()


@dataclass(frozen=True)
class HeadInfo:
    """Description of a saved head: `build_head(in_channels, **options)` of the task gives the same shapes.

    `categories` is the category table of the data it was trained on, as COCO writes it ({"id", "name", ...}).
    `extra` is whatever the trainer wants to remember (step, data fingerprint, base weights).
    """

    task: str
    in_channels: int
    options: Mapping[str, Any] = field(default_factory=dict)
    categories: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def built_with(self) -> str:
        """`in_channels=1792, num_classes=91, ...` for messages."""
        return ", ".join(f"{name}={value}" for name, value in {"in_channels": self.in_channels, **self.options}.items())


def read_sizes(task: str, shapes: Mapping[str, Sequence[int]], num_heads: int | None) -> tuple[int, dict[str, int]]:
    """Input channels and options of a head, from the shapes of its parameters (our names).

    Number of attention heads, dropout, the caption head's grid and the labelling of classes leave no trace in a shape.
    With `num_heads` (None where it is unknown) the sampling points of the segmentation head follow from the rows that
    hold both.

    Raises:
        ValueError: lists the parameters that sizes follow from and that are missing or have another number of axes.
    """
    of_task = TASKS[task].sizes
    sizes = {"in_channels": of_task.in_channels, **of_task.options}
    points = of_task.points if num_heads is not None else None
    # Without a first layer, a file that lacks all of a stack would pass as a head with no layers there.
    needed = dict.fromkeys((f"{prefix}0.norm1.weight" for prefix in of_task.layers.values()), 0)
    for name, axis, _ in (*sizes.values(), *([(points, 0, 0)] if points else [])):
        needed[name] = max(axis, needed.get(name, 0))
    unclear = [
        f"{name} {tuple(shapes[name])}" if name in shapes else name
        for name, axis in needed.items()
        if len(shapes.get(name, ())) <= axis
    ]
    if unclear:
        raise ValueError(
            f"these parameters tell how the {task} head is built, and are missing or have too few axes: "
            f"{examples(unclear, 12)}"
        )
    options = {option: shapes[name][axis] + summand for option, (name, axis, summand) in sizes.items()}
    in_channels = options.pop("in_channels")
    options |= {option: _count_layers(shapes, prefix) for option, prefix in of_task.layers.items()}
    if points is not None:
        assert num_heads is not None
        options["num_points"] = shapes[points][0] // num_heads
    return in_channels, options


def _count_layers(names: Iterable[str], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    if found and max(found) >= len(found):
        raise ValueError(f"of the layers {prefix}0 to {prefix}{max(found)} there are only {len(found)}")
    return len(found)


def check_options(info: HeadInfo) -> None:
    """Raise ValueError where an option is of another type than that of the task's configuration."""
    spec = TASKS.get(info.task)
    fields = _head_config(spec).model_fields if spec is not None else {}
    kinds: dict[str, Any] = {"vocabulary_size": int, **{name: field.annotation for name, field in fields.items()}}
    for name, value in info.options.items():
        if name in kinds:
            as_record(json.dumps(value), kinds[name], f"option {name} of the {info.task} head")


def _head_config(spec: Task) -> type[BaseModel]:
    config: BaseModel = spec.config.model_fields["head"].get_default(call_default_factory=True)
    return type(config)


def build_empty(info: HeadInfo) -> nn.Module:
    """The head that `info` describes, on the meta device. Raises ValueError for options that are not possible."""
    spec, options = get_task(info.task), dict(info.options)
    words = options.pop("vocabulary_size", None) if spec.uses_vocabulary else None
    unknown = sorted(options.keys() - spec.options("head", {}).keys())
    if unknown:
        raise ValueError(f"the {info.task} head has no option {', '.join(unknown)}: it was written by another version")
    options = spec.options("head", options)
    _, problems = check(_head_config(spec), options)
    if problems:
        told = "; ".join(f"{name} = {options[name]}: {problem}" for name, problem in problems)
        raise ValueError(f"no {info.task} head has these options: {told}")
    with torch.device("meta"):
        return spec.build_head(info.in_channels, options, words)


@dataclass(frozen=True)
class HeadFile:
    """Head in an open file."""

    file: WeightFile
    info: HeadInfo
    sources: Mapping[str, str]  #: our name -> name in the file
    unexpected: tuple[str, ...] = ()  #: names in the file that nothing accounts for
    repeats: Mapping[str, str] = field(default_factory=dict)  #: second name in the file -> the name it must equal

    def build(self) -> nn.Module:
        """The head of the file, fp32, on the CPU, in evaluation mode. Raises ValueError as `load_into` does."""
        options, shapes = self.info.options, {name: self.file.shape(source) for name, source in self.sources.items()}
        try:
            # The description may leave to the tensors what depends on the data: the number of words.
            sizes: dict[str, int] = {}
            if options.get("type") != "dense":  # whose file tells everything
                _, sizes = read_sizes(self.info.task, shapes, options.get("num_heads"))
            most = {option: sizes[option] for option in TASKS[self.info.task].sizes.layers if sizes}
            values = sum(info.numel for info in self.file.infos.values())
            for name, value in {"in_channels": self.info.in_channels, **options}.items():
                if isinstance(value, int) and value > most.get(name, values):
                    raise ValueError(f"{name}={value} is more than its tensors have, {most.get(name, values)}")
            head = build_empty(replace(self.info, options={**sizes, **options}))
        except ValueError as error:
            raise ValueError(f"{self.file.path}: {error}") from error
        self._check_names(head)
        self.load_into(head.to_empty(device="cpu"))
        return head.eval()

    def load_into(self, head: nn.Module) -> None:
        """Copy the tensors into a head, cast to its dtype. Nothing is copied unless everything fits.

        Raises ValueError that lists all parameters that are missing, unexpected or of another shape; else all that are
        not finite; else all second names that hold something else.
        """
        self.check(head)
        copy_tensors(self.file, self.sources, {name: head.state_dict()[name] for name in self.sources})

    def check(self, head: nn.Module) -> None:
        """Refuse a file that does not fit a head, which may be on the meta device; raises ValueError as `load_into`."""
        self._check_names(head)
        self._check_values()

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor by our name into memory of its own, cast to `dtype`; see `read_tensor`."""
        return read_tensor(self.file, self.sources[name], dtype)

    def _check_names(self, head: nn.Module) -> None:
        targets = {name: tuple(value.shape) for name, value in head.state_dict().items()}
        file, task = self.file, self.info.task
        lists = {
            "Missing": [name for name in targets if name not in self.sources],
            "Unexpected": [*(n for name, n in self.sources.items() if name not in targets), *self.unexpected],
            "Other shape": [
                f"{self.sources[name]} {file.shape(self.sources[name])} in the file, {shape} in the model"
                for name, shape in targets.items()
                if name in self.sources and file.shape(self.sources[name]) != shape
            ],
        }
        if any(lists.values()):
            raise ValueError(
                f"{file.path} does not fit the {task} head of the model; the file's head was built with "
                f"{self.info.built_with()}." + "".join(_line(title, names) for title, names in lists.items())
            )

    def _check_values(self) -> None:
        file = self.file
        broken = [name for name in self.sources.values() if not torch.isfinite(file.get(name)).all()]
        if broken:
            raise ValueError(
                f"{file.path}: NaN or infinity in the {self.info.task} head." + _line("Not finite", broken)
            )
        differing = [
            again
            for again, name in self.repeats.items()
            if file.shape(again) != file.shape(name) or not torch.equal(file.get(again), file.get(name))
        ]
        if differing:
            raise ValueError(
                f"{file.path}: these tensors are there under two names each and differ; which of them were trained "
                f"cannot be told." + _line("Different", differing)
            )


def _line(title: str, names: list[str]) -> str:
    return f"\n{title} ({len(names)}): {examples(names, 12)}." if names else ""
