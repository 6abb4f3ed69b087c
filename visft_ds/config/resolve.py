"""Resolved configuration: stage, engine and model file of ds_configs/, then flags and --set; later ones win.

`merge` lays the layers over each other (a `Tree`), `validated` checks all of it at once (a `Recipe`), a
`Draft` takes what data and hardware decide, and `Draft.config` fills in the rest (a `ResolvedConfig`).
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from visft_ds import CHECKOUT
from visft_ds.config.schema import (
    INSTEAD,
    OURS,
    OptimizerConfig,
    Recipe,
    SchedulerConfig,
    VisftConfig,
    complete,
)
from visft_ds.config.tree import Tree, flatten, load_json, parse_assignment, shorten
from visft_ds.files import reading
from visft_ds.redaction import SECRET
from visft_ds.settings.fields import Problems, nearest
from visft_ds.tasks import BUILT_IN, entries

AnyPath = str | os.PathLike[str]  #: a path as users give it
#: ds_configs/: beside the package in a checkout, inside of it where it was installed from a wheel.
CONFIG_ROOT = (CHECKOUT or Path(str(resources.files("visft_ds")))) / "ds_configs"
DEFAULT_MODEL = "eva_e"
DEFAULT_ENGINE = "zero1"
#: What may differ between a run and its resumption, as globs over dotted keys: where files lie, what is
#: logged and saved, and how the work is divided. Weights, heads and data are compared by their content, in
#: the checkpoint. DeepSpeed's own keys are left out as well: a checkpoint does not depend on the ZeRO stage.
#: `visft.init_from` is of no account once a run has saved something; of `visft.data.shuffle` the order of
#: samples counts.
NOT_IDENTITY = (
    "visft.run.*",
    "visft.init_from*",
    "visft.heads.path",
    "visft.features.cache",
    "visft.data.root",
    "visft.data.sets.*.root",
    "visft.data.shuffle",
    "visft.data.num_workers",
    "visft.data.prefetch_steps",
    "visft.data.cache*",
    "visft.model.name",
    "visft.model.weights",
    "visft.model.activation_checkpointing",
    "visft.model.kernels",
    "visft.model.tf32",
    "visft.shared.micro_batch",
    "visft.tasks.*.micro_batch",
    "visft.tasks.*.decoding.*",
    "visft.tasks.*.vocabulary.file",
)
#: How the problem of a key begins that no schema has.
_UNKNOWN = "unknown key"
#: Dotted key -> (value, the flag that sets it).
Flags = dict[str, tuple[Any, str]]


class Decision(NamedTuple):
    """Value of a key that neither a file nor a flag stated."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration. Nothing in it is null that a trainer would have to decide."""

    visft: VisftConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    gradient_clipping: float
    #: DeepSpeed's own keys as given; no batch, precision, optimizer or scheduler keys
    deepspeed: Mapping[str, Any]
    #: dotted key -> file, flag or reason that set it; keys left at their default are absent
    sources: Mapping[str, str]
    total_steps: int  #: length of the run in optimiser steps
    pipeline_stages: int  #: processes that hold one model together; 1 without a pipeline
    decisions: tuple[Decision, ...] = ()  #: what data, hardware and the length of the run decided

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, defaults included; as --deepspeed_config they resolve to the same."""
        plain = copy.deepcopy(dict(self.deepspeed))
        plain["gradient_clipping"] = self.gradient_clipping
        plain["optimizer"] = self.optimizer.model_dump(mode="json")
        plain["scheduler"] = self.scheduler.model_dump(mode="json")
        plain["visft"] = self.visft.model_dump(mode="json")
        tasks = plain["visft"]["tasks"].items()
        plain["visft"]["tasks"] = {name: task for name, task in tasks if task is not None}  # null is absent
        return plain

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that must be equal to resume a run (all but `NOT_IDENTITY`)."""
        return identity_of(self.to_dict())


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`ResolvedConfig.identity` of a configuration as `to_dict` gives it, or an earlier release gave it."""
    return {
        key: value
        for key, value in flatten({key: values[key] for key in OURS})
        if not any(fnmatch.fnmatch(key, glob) for glob in NOT_IDENTITY)
    }


def available(folder: str) -> list[str]:
    """Names that --engine ("engines") or --model ("models") accept."""
    return sorted(path.stem for path in (CONFIG_ROOT / folder).glob("*.json"))


def resolve(
    *,
    stage: int | None = None,
    engine: str | None = None,
    model: str = DEFAULT_MODEL,
    whole: tuple[Mapping[str, Any], str] | None = None,
    flags: Flags | None = None,
    settings: Sequence[str] = (),
    batch_size: int | None = None,
) -> ResolvedConfig:
    """Merge, validate, fill in: the configuration of a run that needs nothing of its data. Arguments and
    errors are those of `merge`; ValueError also for everything that is wrong with the values, one line each.
    """
    tree = merge(
        stage=stage,
        engine=engine,
        model=model,
        whole=whole,
        flags=flags,
        settings=settings,
        batch_size=batch_size,
    )
    return Draft(tree).config()


def merge(
    *,
    stage: int | None,
    engine: str | None,
    model: str,
    whole: tuple[Mapping[str, Any], str] | None,
    flags: Flags | None,
    settings: Sequence[str],
    batch_size: int | None,
) -> Tree:
    """Lay the layers of a configuration over each other; whether they make sense is not asked yet.

    Args:
        stage: 1 or 2; may be None with `whole`, which states it.
        engine: name of a file in ds_configs/engines, or path of one; None: zero1, or that of `whole`.
        model: name of a file in ds_configs/models, or path of one.
        whole: a complete configuration, such as `to_dict()` gives, and its origin, in place of the three
            layers.
        flags: what is laid over the layers.
        settings: "dotted.key=value" texts, applied last and in order.
        batch_size: of every stream for which `settings` give none.

    Raises:
        ValueError: no such file or task; a key through a value without keys.
        OSError: a file of the user's own that cannot be read.
    """
    tree = Tree()
    engine_file = _file_of("engine", engine or DEFAULT_ENGINE)
    files = [CONFIG_ROOT / f"stage{stage}.json", engine_file]
    if whole is None:
        files.append(_file_of("model", model))
    else:
        values, origin = whole
        files = [engine_file] if engine else []
        tree.lay({key: value for key, value in values.items() if not engine or key in OURS}, origin)
        stated = tree.value("visft.stage")
        if stage is not None and stage != stated:
            raise ValueError(f"--stage {stage}: {origin} is of stage {stated} and stays in it")
    for path in files:
        # A shipped one is ds_configs/..., wherever it is installed.
        is_shipped = path.is_relative_to(CONFIG_ROOT)
        source = str(path.relative_to(CONFIG_ROOT.parent) if is_shipped else path)
        values = load_json(path, source)
        with reading(source, 'a model file, with "override": {"stage1": {"optimizer.params.lr": 0.001}}'):
            overrides = values.pop("override", {}).get(f"stage{stage}", {}).items()
        tree.lay(values, source)
        for key, value in overrides:
            tree.assign(key, value, f"{source} (override)")
    for key, (value, flag) in (flags or {}).items():
        tree.assign(key, value, flag)

    task_names = list[str | list[Any]]()  # last: a setting of another task does not turn it on again
    for key, value in map(parse_assignment, settings):
        if key == "visft.tasks" and isinstance(value, str | list):
            task_names.append(value)
        elif key == "visft.param_groups" and isinstance(value, str):
            tree.assign(key, [{"name": "trained", "params": value}], "--set")
        else:
            tree.assign(key, value, "--set")
    for names in task_names:
        _turn_others_off(tree, names)
    if batch_size is not None:
        _set_batches(tree, batch_size)
    return tree


def _file_of(kind: str, name: str) -> Path:
    """The file of --model or --engine (`kind`): the user's own, or one of ds_configs/."""
    if name.endswith(".json"):
        return Path(name)
    folder = f"{kind}s"
    known = available(folder)
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"--{kind} {name}: no .json file, and not in ds_configs/{folder}{hint}")
    return CONFIG_ROOT / folder / f"{name}.json"


def _turn_others_off(tree: Tree, names: str | list[Any]) -> None:
    """`--tasks detection,captioning`, or a list behind `--set visft.tasks=`: turn every other task off."""
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    source = f"--tasks {','.join(map(str, names))}"
    # Of maps no recipe speaks, and all their settings have defaults.
    tasks = {"semantic": {}, "depth": {}, "panoptic": {}, **(tree.value("visft.tasks") or {})}
    known = [task for task, values in tasks.items() if values is not None]
    for name in map(str, names):
        if name not in known and name in entries() and name not in BUILT_IN:
            raise ValueError(
                f"{source}: no settings of your task {name!r}: add --set "
                f'\'visft.tasks.{name}={{"steps": 1000, "batch_size": 8, "micro_batch": 8}}\''
            )
        if name not in known:
            raise ValueError(f"{source}: no settings of a task {name!r}{nearest(name.lower(), known)}")
    for name in entries():
        if name not in names:
            tree.assign(f"visft.tasks.{name}", None, source)
        elif not tasks[name]:
            tree.assign(f"visft.tasks.{name}", {}, source)


def _set_batches(tree: Tree, size: int) -> None:
    """`--batch-size`: the batch of every task that trains, and the one that they share."""
    tasks = tree.value("visft.tasks")
    streams = [f"visft.tasks.{name}" for name in tasks if tasks[name] is not None]
    if tree.value("visft.shared") is not None:
        streams.append("visft.shared")
    for stream in streams:
        if tree.sources.get(f"{stream}.batch_size") != "--set":
            tree.assign(f"{stream}.batch_size", size, "--batch-size")


class Draft:
    """Configuration to which data and hardware add what nobody has stated.

    Raises ValueError, when it is made and at each decision: everything that is wrong with it, one line each.
    """

    def __init__(self, tree: Tree, decisions: Sequence[Decision] = ()) -> None:
        self.tree = tree
        self.recipe = _validated(tree)
        self._decisions = list(decisions)

    @property
    def visft(self) -> VisftConfig:
        """The settings as they are by now."""
        return self.recipe.visft

    @classmethod
    def of(cls, config: ResolvedConfig) -> Draft:
        """A draft of what was resolved before."""
        return cls(Tree(config.to_dict(), dict(config.sources)), config.decisions)

    def decide(self, values: Mapping[str, Any], why: str, *, over_user: bool = False) -> None:
        """Set dotted keys, if no flag of the user sets them (or `over_user`)."""
        for key, value in values.items():
            if over_user or not self.tree.is_stated(key):
                self.tree.assign(key, value, why)
                self._decisions.append(Decision(key, value, why))
        self.recipe = _validated(self.tree)

    def config(self) -> ResolvedConfig:
        """The configuration with everything that follows from other keys."""
        recipe = self.recipe
        decisions = self._decisions
        params = recipe.scheduler.params
        total = params.total_num_steps or recipe.visft.steps()
        assert total is not None  # checked by validation
        lengths = {"total_num_steps": total}
        warmup = params.warmup_num_steps
        if warmup > total:
            lengths["warmup_num_steps"] = total // 10
            why = f"a tenth of the run: {warmup} steps would be longer than it"
            decisions = [*decisions, Decision("scheduler.params.warmup_num_steps", total // 10, why)]
        params = params.model_copy(update=lengths)
        return ResolvedConfig(
            visft=recipe.visft.filled(),
            optimizer=recipe.optimizer,
            scheduler=recipe.scheduler.model_copy(update={"params": params}),
            gradient_clipping=recipe.gradient_clipping,
            deepspeed={key: value for key, value in self.tree.values.items() if key not in OURS},
            sources=self.tree.sources,
            total_steps=total,
            pipeline_stages=recipe.pipeline.stages if recipe.pipeline else 1,
            decisions=tuple(decisions),
        )


def changed(
    config: ResolvedConfig, settings: Sequence[str] = (), engine: str | None = None
) -> ResolvedConfig:
    """The same configuration with other values ("dotted.key=value"), or under another engine of
    ds_configs/engines.

    Raises ValueError as `resolve`.
    """
    return resolve(whole=(config.to_dict(), "the configuration"), engine=engine, settings=settings)


def _validated(tree: Tree) -> Recipe:
    """The values of a tree, checked. Raises ValueError: all that is wrong with them, one line each."""
    complete()
    try:
        # JSON mode: lists stand for tuples, everything else is as strict as the schema says.
        return Recipe.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        lines = [_line(tree, key, problem) for key, problem in problems(error, Recipe)]
        title = f"the configuration has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
        raise ValueError("\n  ".join([title, *lines])) from error


def problems(error: ValidationError, schema: type[BaseModel]) -> Problems:
    """(dotted key, problem) of all that a schema refuses."""
    for refusal in error.errors(include_url=False):
        location = [str(part) for part in refusal["loc"]]
        key = ".".join(location)
        if refusal["type"] == "contradictions":
            for inner, problem in refusal["ctx"]["found"]:
                yield ".".join([*location, inner]), problem
        elif key in INSTEAD:
            yield key, f"follows from other keys; state {INSTEAD[key]}"
        elif refusal["type"] == "extra_forbidden":
            section = schema
            for name in location[:-1]:
                if not name.isdigit():
                    section = next(models_in(section.model_fields[name].annotation))
            before = key.removesuffix(location[-1])
            near = nearest(location[-1], section.model_fields, before=before, keys=_keys(schema))
            yield key, f"{_UNKNOWN}{near}"
        elif refusal["type"] == "missing":
            yield key, f"missing; state it in a file or with --set {key}=VALUE"
        else:
            text = refusal["msg"].removeprefix("Value error, ")
            yield key, text.replace("Input should be", "must be", 1)


def _line(tree: Tree, key: str, problem: str) -> str:
    """`key = value (source): problem`."""
    source = tree.source(key)
    if source is None or problem.startswith("missing;"):
        return f"{key}: {problem}"
    if problem.startswith(_UNKNOWN):  # whose value may be a secret, whatever it is called
        return f"{key} ({source}): {problem}"
    value = "***" if SECRET.fullmatch(key.rpartition(".")[2]) else tree.value(key)
    return f"{key} = {shorten(value)} ({source}): {problem}"


def _keys(schema: type[BaseModel], before: str = "") -> Iterator[str]:
    """Dotted keys of a schema, sections and values; of items of lists without their numbers."""
    for name, info in schema.model_fields.items():
        yield f"{before}{name}"
        for kind in models_in(info.annotation):
            yield from _keys(kind, f"{before}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas inside an annotation such as `tuple[ParamGroup, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
