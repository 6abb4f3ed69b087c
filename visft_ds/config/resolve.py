"""Resolved configuration: stage, engine and model file of ds_configs/, then flags and --set; later ones
win.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args

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
from visft_ds.files import read_bytes, reading
from visft_ds.redaction import SECRET, redacted_values
from visft_ds.settings.fields import nearest
from visft_ds.tasks import entries

AnyPath = str | os.PathLike[str]  #: a path as users give it
#: ds_configs/: beside the package in a checkout, inside of it where it was installed from a wheel.
CONFIG_ROOT = (CHECKOUT or Path(str(resources.files("visft_ds")))) / "ds_configs"
#: What may differ between a run and its resumption, as globs over dotted keys: where files lie, what is
#: logged and saved, and how the work is divided. Weights, heads and data are compared by their content, in
#: the checkpoint. DeepSpeed's own keys are left out as well: a checkpoint does not depend on the ZeRO stage.
#: `visft.start` is of no account once a run has saved something; of `visft.data.shuffle` the order of samples
#: counts.
NOT_IDENTITY = (
    *("visft.run.*", "visft.start*", "visft.heads.path", "visft.features.cache"),
    *("visft.data.root", "visft.data.sets.*.root", "visft.data.shuffle", "visft.data.num_workers"),
    *("visft.data.prefetch_steps", "visft.data.cache*"),
    *(
        "visft.model.name",
        "visft.model.weights",
        "visft.model.recompute",
        "visft.model.kernels",
        "visft.model.tf32",
    ),
    *(
        "visft.model.compile",
        "visft.shared.micro_batch",
        "visft.tasks.*.micro_batch",
        "visft.tasks.*.decoding.*",
    ),
    "visft.tasks.*.vocabulary.file",
)
#: How the problem of a key begins that no schema has.
_UNKNOWN = "unknown key"
#: Dotted key -> (value, the flag or other reason that sets it).
Flags = dict[str, tuple[Any, str]]


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration. Nothing in it is null that a trainer would have to decide."""

    visft: VisftConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    gradient_clipping: float
    deepspeed: Mapping[
        str, Any
    ]  #: DeepSpeed's own keys as given; no batch, precision, optimizer or scheduler keys
    sources: Mapping[
        str, str
    ]  #: dotted key -> file or flag that set it; keys left at their default are absent
    total_steps: int  #: length of the run in optimiser steps
    pipeline_stages: int  #: processes that hold one model together; 1 without a pipeline
    adapted: tuple[str, ...] = ()  #: what a start changed, and why

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, defaults included; given back with --deepspeed_config it resolves to the
        same.
        """
        plain: dict[str, Any] = {"gradient_clipping": self.gradient_clipping}
        for key in ("optimizer", "scheduler", "visft"):
            plain[key] = getattr(self, key).model_dump(mode="json")
        tasks = plain["visft"]["tasks"].items()
        plain["visft"]["tasks"] = {
            name: task for name, task in tasks if task is not None
        }  # null and absent are one
        return {**copy.deepcopy(dict(self.deepspeed)), **plain}

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that must be equal to resume a run (all but `NOT_IDENTITY`)."""
        return identity_of(self.to_dict())


def identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """`ResolvedConfig.identity` of a configuration as `to_dict` gives it, also as an earlier release gave
    it.
    """
    flat = flatten({key: values[key] for key in OURS})
    return {key: value for key, value in flat if not any(fnmatch.fnmatch(key, glob) for glob in NOT_IDENTITY)}


def differences(there: Mapping[str, Any], config: ResolvedConfig) -> list[str]:
    """Settings in which a run differs from one that is to continue, a line each: those of both first.

    A key that the release of that run did not have yet is compared with its default.

    Args:
        there: `identity` of the run that is to continue.
    """
    here = config.identity()
    in_both = [key for key in sorted(there.keys() & here.keys()) if there[key] != here[key]]
    lines = [f"{key}: {json.dumps(there[key])} -> {json.dumps(here[key])}" for key in in_both]
    new = here.keys() - there.keys()
    defaults = _defaults(config, new)
    named = dict[str, str]()  # in order, each once
    for key in sorted(new):
        if key in defaults:
            if defaults[key] != here[key]:
                named[key] = f"{key}: {json.dumps(defaults[key])} (its default) -> {json.dumps(here[key])}"
            continue
        whole = _whole_part(key, there)
        value = json.dumps(here[key]) if whole == key else "(set)"
        named[whole] = f"{whole}: (absent) -> {value}"
    for key in sorted(there.keys() - here.keys()):
        if there[key] is not None:
            whole = _whole_part(key, here)
            value = json.dumps(there[key]) if whole == key else "(set)"
            named[whole] = f"{whole}: {value} -> (absent)"
    return [*lines, *named.values()]


def _whole_part(key: str, other: Mapping[str, Any]) -> str:
    """The shortest beginning of a dotted key with nothing below it in `other`, such as a task that is off."""
    parts = key.split(".")
    beginnings = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next(
        (one for one in beginnings if not any(f"{name}.".startswith(f"{one}.") for name in other)), key
    )


def _defaults(config: ResolvedConfig, keys: Collection[str]) -> dict[str, Any]:
    """Identity of the configuration without some keys: what they are where nobody states them; empty if one
    must be.
    """
    if not keys:
        return {}
    try:
        return resolve(whole=(_without(config.to_dict(), keys), "the configuration")).identity()
    except ValueError:
        return {}


_GONE = object()


def _without(value: Any, keys: Collection[str], prefix: str = "") -> Any:
    """Nested values without some dotted keys, and without what became empty by that (`_GONE`)."""
    if not isinstance(value, dict | list):
        return _GONE if prefix[:-1] in keys else value
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    left = {key: _without(nested, keys, f"{prefix}{key}.") for key, nested in pairs}
    left = {key: nested for key, nested in left.items() if nested is not _GONE}
    if value and not left:
        return _GONE
    return left if isinstance(value, dict) else list(left.values())


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is nested in objects and lists."""
    pairs = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    )
    if pairs is None:
        yield prefix[:-1], value
    else:
        for key, nested in pairs:
            yield from flatten(nested, f"{prefix}{key}.")


def available(folder: str) -> list[str]:
    """Names that --engine ("engines") or --model ("models") accept."""
    return sorted(path.stem for path in (CONFIG_ROOT / folder).glob("*.json"))


def load_json(path: Path, name: str | None = None) -> dict[str, Any]:
    """The object in a configuration file. Raises ValueError, also for a key that occurs twice; OSError for no
    file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key occurs twice in one object: {', '.join(key for key, _ in pairs)}")
        return found

    with reading(name or path, "a configuration (a JSON object)"):
        value = json.loads(read_bytes(path), object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(shorten(value))
    return value


def shorten(value: Any, limit: int = 60) -> str:
    """JSON of a value, cut to fit into a message."""
    text = json.dumps(redacted_values(value))
    return text if len(text) <= limit else text[: limit - 4] + " ..."


@dataclass
class Tree:
    """Nested values, and the file or flag behind each leaf."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def lay(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        """Lay values over those that there are, object by object; a list is replaced as a whole."""
        for key, value in values.items():
            if isinstance(value, dict) and value:
                self.lay(value, source, f"{prefix}{key}.")
            else:
                self.assign(f"{prefix}{key}", value, source)

    def assign(self, key: str, value: Any, source: str) -> None:
        """Set a dotted key; a number is a position in a list, that behind the last one adds an item.

        Whether the key exists is checked by the schema. Raises ValueError for a key through a value without
        keys.
        """
        parent, _, last = key.rpartition(".")
        if self.value(parent) is None:  # a default, or a task that was off
            self.assign(parent, {}, source)
        node = self.value(parent)
        if isinstance(node, dict):
            node[last] = copy.deepcopy(value)
        elif isinstance(node, list) and last.isdigit() and int(last) <= len(node):
            node[int(last) : int(last) + 1] = [copy.deepcopy(value)]
        else:
            raise ValueError(f"{source} {key}: {parent} is {shorten(node)}, which has no {last}")
        self.sources |= {inner: source for inner, _ in flatten(value, f"{key}.")}

    def source(self, key: str) -> str | None:
        """Source of a key, of the first value below it, or of what it is in; None: not set."""
        below = (source for other, source in self.sources.items() if other.startswith(f"{key}."))
        found = self.sources.get(key) or next(below, None)
        return found if found or not key else self.source(key.rpartition(".")[0])

    def value(self, key: str) -> Any:
        """The value of a dotted key; None if there is none."""
        node: Any = self.values
        for part in filter(None, key.split(".")):
            if isinstance(node, list):
                node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
            else:
                node = node.get(part) if isinstance(node, dict) else None
        return node


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is JSON if it parses as JSON, else a text. Raises
    ValueError.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text}: must be KEY=VALUE, such as optimizer.params.lr=1e-5")
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


def resolve(
    *,
    stage: int | None = None,
    engine: str | None = None,
    model: str = "eva_e",
    whole: tuple[Mapping[str, Any], str] | None = None,
    flags: Flags | None = None,
    settings: Sequence[str] = (),
) -> ResolvedConfig:
    """Merge, set, validate.

    Args:
        stage: 1 or 2; may be None with `whole`, which states it.
        engine: name of a file in ds_configs/engines, or path of one; None: zero1, or that of `whole`.
        model: name of a file in ds_configs/models, or path of one.
        whole: a complete configuration, such as `to_dict()` gives, and its origin, in place of the three
        layers.
        flags: what is laid over the layers.
        settings: "dotted.key=value" texts, applied last and in order.

    Raises:
        ValueError: everything that is wrong with the configuration, one line each.
        OSError: a file of the user's own that cannot be read.
    """
    tree, files = Tree(), list[Path]()
    named = {"engines": engine or "zero1", "models": model}
    if whole is None:
        files.append(CONFIG_ROOT / f"stage{stage}.json")
    else:
        named = {"engines": engine} if engine else {}
        tree.lay({key: value for key, value in whole[0].items() if not engine or key in OURS}, whole[1])
        if stage not in (None, stated := tree.value("visft.stage")):
            raise ValueError(f"--stage {stage}: {whole[1]} is of stage {stated} and stays in it")
    for folder, name in named.items():
        own = name.endswith(".json")
        if not own and name not in (known := available(folder)):
            nearby = nearest(name, known)
            raise ValueError(f"--{folder[:-1]} {name}: no .json file, and not in ds_configs/{folder}{nearby}")
        files.append(Path(name) if own else CONFIG_ROOT / folder / f"{name}.json")
    for path in files:
        # A shipped one is ds_configs/..., wherever it is installed.
        source = str(path.relative_to(CONFIG_ROOT.parent) if path.is_relative_to(CONFIG_ROOT) else path)
        values = load_json(path, source)
        with reading(source, 'a model file, with "override": {"stage1": {"optimizer.params.lr": 0.001}}'):
            override = values.pop("override", {}).get(f"stage{stage}", {}).items()
        tree.lay(values, source)
        for key, value in override:
            tree.assign(key, value, f"{source} (override)")
    for key, (value, flag) in (flags or {}).items():
        tree.assign(key, value, flag)
    for key, value in sorted(  # names of tasks last: a setting of another task does not turn it on again
        map(parse_assignment, settings),
        key=lambda one: one[0] == "visft.tasks" and not isinstance(one[1], dict),
    ):
        if key == "visft.tasks" and isinstance(value, str | list):
            _keep_tasks(tree, value)
        elif key == "visft.param_groups" and isinstance(value, str):
            tree.assign(key, [{"name": "trained", "params": value}], "--set")
        else:
            tree.assign(key, value, "--set")

    complete()
    try:
        # JSON mode: lists stand for tuples, everything else is as strict as the schema says.
        recipe = Recipe.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        lines = [_line(tree, *pair) for pair in problems(error, Recipe)]
        title = f"the configuration has {len(lines)} error{'s' if len(lines) > 1 else ''}:"
        raise ValueError("\n  ".join([title, *lines])) from error
    params, adapted = recipe.scheduler.params, tuple[str, ...]()
    total, warmup = params.total_num_steps or recipe.visft.updates(), params.warmup_num_steps
    assert total is not None  # checked by validation
    if warmup > total:
        adapted = (f"warm-up: {warmup} -> {total // 10} steps, because of the length of the run",)
        warmup = total // 10
    params = params.model_copy(update={"total_num_steps": total, "warmup_num_steps": warmup})
    return ResolvedConfig(
        visft=recipe.visft.filled(),
        optimizer=recipe.optimizer,
        scheduler=recipe.scheduler.model_copy(update={"params": params}),
        gradient_clipping=recipe.gradient_clipping,
        deepspeed={key: value for key, value in tree.values.items() if key not in OURS},
        sources=tree.sources,
        total_steps=total,
        pipeline_stages=recipe.pipeline.stages if recipe.pipeline else 1,
        adapted=adapted,
    )


def _keep_tasks(tree: Tree, given: str | list[Any]) -> None:
    """`--tasks detection,captioning`, or a list behind `--set visft.tasks=`: turn every other task off."""
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    source = f"--tasks {','.join(map(str, names))}"
    tasks = {
        "semantic": {},
        **(tree.value("visft.tasks") or {}),
    }  # which is in no recipe, and has defaults for all
    known = [task for task, values in tasks.items() if values is not None]
    if unknown := [str(name) for name in names if name not in known]:
        raise ValueError(
            f"{source}: no settings of a task {unknown[0]!r}{nearest(unknown[0].lower(), known)}"
        )
    for name in entries():
        if name not in names or not tasks[name]:
            tree.assign(f"visft.tasks.{name}", {} if name in names else None, source)


def changed(
    config: ResolvedConfig, settings: Sequence[str] = (), engine: str | None = None
) -> ResolvedConfig:
    """The same configuration with other values ("dotted.key=value"), or under another engine of
    ds_configs/engines.

    Raises ValueError as `resolve`.
    """
    return resolve(whole=(config.to_dict(), "the configuration"), engine=engine, settings=settings)


def problems(error: ValidationError, schema: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) of all that a schema refuses."""
    for one in error.errors(include_url=False):
        location = [str(part) for part in one["loc"]]
        key, section = ".".join(location), schema
        if one["type"] == "contradictions":
            yield from ((".".join([*location, inner]), problem) for inner, problem in one["ctx"]["found"])
        elif key in INSTEAD:
            yield key, f"follows from other keys; state {INSTEAD[key]}"
        elif one["type"] == "extra_forbidden":
            for part in location[:-1]:
                section = (
                    section if part.isdigit() else next(models_in(section.model_fields[part].annotation))
                )
            yield key, f"{_UNKNOWN}{nearest(location[-1], section.model_fields)}"
        elif one["type"] == "missing":
            yield key, f"missing; state it in a file or with --set {key}=VALUE"
        else:
            yield key, one["msg"].removeprefix("Value error, ")


def _line(tree: Tree, key: str, problem: str) -> str:
    """`key = value (source): problem`."""
    if (source := tree.source(key)) is None or problem.startswith("missing;"):
        return f"{key}: {problem}"
    if problem.startswith(_UNKNOWN):  # whose value may be a secret, whatever it is called
        return f"{key} ({source}): {problem}"
    given = "***" if SECRET.fullmatch(key.rpartition(".")[2]) else tree.value(key)
    return f"{key} = {shorten(given)} ({source}): {problem}"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas inside an annotation such as `tuple[ParamGroup, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
