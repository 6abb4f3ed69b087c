"""Resolved configuration: stage, engine and model file of ds_configs/, then flags and --set; later ones win.

`merge` lays the layers over each other (a `Tree`), `validated` checks all of it at once (a `Recipe`), a
`Draft` takes what data and hardware decide, and `Draft.config` fills in the rest (a `ResolvedConfig`).
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
from visft_ds.files import read_bytes, reading
from visft_ds.redaction import SECRET, redacted_values
from visft_ds.settings.fields import nearest
from visft_ds.tasks import entries

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
    "visft.model.compile",
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
    identity = {}
    for key, value in flatten({key: values[key] for key in OURS}):
        if not any(fnmatch.fnmatch(key, glob) for glob in NOT_IDENTITY):
            identity[key] = value
    return identity


def differences(there: Mapping[str, Any], config: ResolvedConfig) -> list[str]:
    """Settings in which a run differs from one that is to continue, a line each: those of both first.

    A key that the release of that run did not have yet is compared with its default.

    Args:
        there: `identity` of the run that is to continue.
    """
    here = config.identity()
    lines = [
        f"{key}: {json.dumps(there[key])} -> {json.dumps(here[key])}"
        for key in sorted(there.keys() & here.keys())
        if there[key] != here[key]
    ]
    new = here.keys() - there.keys()
    defaults = _defaults(config, new)
    one_sided = dict[str, str]()  # by the part that is absent, such as a whole task
    for key in sorted(new):
        if key not in defaults:
            absent = _absent_part(key, there)
            value = json.dumps(here[key]) if absent == key else "(set)"
            one_sided[absent] = f"{absent}: (absent) -> {value}"
        elif defaults[key] != here[key]:
            default = json.dumps(defaults[key])
            one_sided[key] = f"{key}: {default} (its default) -> {json.dumps(here[key])}"
    for key in sorted(there.keys() - here.keys()):
        if there[key] is not None:
            absent = _absent_part(key, here)
            value = json.dumps(there[key]) if absent == key else "(set)"
            one_sided[absent] = f"{absent}: {value} -> (absent)"
    return [*lines, *one_sided.values()]


def _absent_part(key: str, other: Mapping[str, Any]) -> str:
    """The shortest beginning of a dotted key with nothing below it in `other`, such as a task that is off."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        beginning = ".".join(parts[:count])
        if not any(f"{name}.".startswith(f"{beginning}.") for name in other):
            return beginning
    return key


def _defaults(config: ResolvedConfig, keys: Collection[str]) -> dict[str, Any]:
    """Identity of the configuration where nobody states these keys; empty if one of them must be stated."""
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
    rest = {}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, nested in pairs:
        left = _without(nested, keys, f"{prefix}{key}.")
        if left is not _GONE:
            rest[key] = left
    if value and not rest:
        return _GONE
    return rest if isinstance(value, dict) else list(rest.values())


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is nested in objects and lists."""
    if isinstance(value, list):
        value = {str(number): nested for number, nested in enumerate(value)}
    if not isinstance(value, dict):
        yield prefix[:-1], value
        return
    for key, nested in value.items():
        yield from flatten(nested, f"{prefix}{key}.")


def available(folder: str) -> list[str]:
    """Names that --engine ("engines") or --model ("models") accept."""
    return sorted(path.stem for path in (CONFIG_ROOT / folder).glob("*.json"))


def load_json(path: Path, name: str | None = None) -> dict[str, Any]:
    """The object in a configuration file. Raises ValueError, also for a key that occurs twice; OSError for no
    file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"a key occurs twice in one object: {', '.join(key for key, _ in pairs)}")
        return values

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
        if key in self.sources:
            return self.sources[key]
        for other, source in self.sources.items():
            if other.startswith(f"{key}."):
                return source
        return self.source(key.rpartition(".")[0]) if key else None

    def is_stated(self, key: str) -> bool:
        """Return True if a flag of the user sets this key, a key below it, or what it is in."""
        for other, source in self.sources.items():
            related = f"{key}.".startswith(f"{other}.") or other.startswith(f"{key}.")
            # What a backbone brings along gives way to what is decided about it.
            if related and source.startswith("--") and not source.startswith("--backbone "):
                return True
        return False

    def value(self, key: str) -> Any:
        """The value of a dotted key; None if there is none."""
        node: Any = self.values
        for name in filter(None, key.split(".")):
            if isinstance(node, dict):
                node = node.get(name)
            elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            else:
                return None
        return node


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is JSON, or a text if it is none. Raises ValueError."""
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
    files = list[Path]()
    if whole is None:
        files.append(CONFIG_ROOT / f"stage{stage}.json")
        files.append(_file_of("engine", engine or DEFAULT_ENGINE))
        files.append(_file_of("model", model))
    else:
        values, origin = whole
        tree.lay({key: value for key, value in values.items() if not engine or key in OURS}, origin)
        stated = tree.value("visft.stage")
        if stage is not None and stage != stated:
            raise ValueError(f"--stage {stage}: {origin} is of stage {stated} and stays in it")
        if engine:
            files.append(_file_of("engine", engine))
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

    task_names = list[str | list[Any]]()
    for key, value in map(parse_assignment, settings):
        if key == "visft.tasks" and isinstance(value, str | list):
            task_names.append(value)
        elif key == "visft.param_groups" and isinstance(value, str):
            tree.assign(key, [{"name": "trained", "params": value}], "--set")
        else:
            tree.assign(key, value, "--set")
    # Last: a setting of another task does not turn it on again.
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
    # Of label maps no recipe speaks, and all their settings have defaults.
    tasks = {"semantic": {}, **(tree.value("visft.tasks") or {})}
    known = [task for task, values in tasks.items() if values is not None]
    for name in map(str, names):
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
        warmup = params.warmup_num_steps
        if warmup > total:
            warmup = total // 10
            why = f"a tenth of the run: {params.warmup_num_steps} steps would be longer than it"
            decisions = [*decisions, Decision("scheduler.params.warmup_num_steps", warmup, why)]
        params = params.model_copy(update={"total_num_steps": total, "warmup_num_steps": warmup})
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


def problems(error: ValidationError, schema: type[BaseModel]) -> Iterator[tuple[str, str]]:
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
            yield key, f"{_UNKNOWN}{nearest(location[-1], section.model_fields, most=3, before=before)}"
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
    is_secret = SECRET.fullmatch(key.rpartition(".")[2])
    value = "***" if is_secret else tree.value(key)
    return f"{key} = {shorten(value)} ({source}): {problem}"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Schemas inside an annotation such as `tuple[ParamGroup, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)
