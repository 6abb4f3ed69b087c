"""Resolved configuration: stage, engine and model file of ds_configs/, then flags and --set; later ones win."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from visft_ds import CHECKOUT
from visft_ds.config.deepspeed_keys import INSTEAD
from visft_ds.config.schema import OURS, OptimizerConfig, ParamGroup, Recipe, SchedulerConfig, VisftConfig, complete
from visft_ds.config.validate import check, nearest
from visft_ds.files import read_bytes, reading
from visft_ds.redaction import is_secret, redacted_values
from visft_ds.tasks import BUILT_IN, entries

AnyPath = str | os.PathLike[str]  #: a path as users give it
#: ds_configs/: beside the package in a checkout, inside of it where it was installed from a wheel.
CONFIG_ROOT = (CHECKOUT or Path(str(resources.files("visft_ds")))) / "ds_configs"
#: What may differ between a run and its resumption, as globs over dotted keys: where files lie, what is logged and
#: saved, and how the work is divided. Weights, heads and data are compared by their content, in the checkpoint.
#: DeepSpeed's own keys are left out as well: a checkpoint does not depend on the ZeRO stage.
NOT_IDENTITY = (
    "visft.run.*",
    "visft.data.root",
    "visft.data.sets.*.root",
    "visft.data.shuffle",  # the order of samples counts
    "visft.data.num_workers",
    "visft.data.prefetch_steps",
    "visft.data.cache*",
    "visft.features.cache",
    "visft.heads.path",
    "visft.start*",  # of no account once a run has saved something
    "visft.model.name",
    "visft.model.weights",
    "visft.model.recompute",
    "visft.model.kernels",
    "visft.model.tf32",
    "visft.model.compile",
    "visft.tasks.*.micro_batch",
    "visft.tasks.*.decoding.*",
    "visft.tasks.*.vocabulary.file",
    "visft.shared.micro_batch",
)


@dataclass(frozen=True)
class Adapted:
    """Value that a start adapts, and says so."""

    key: str  #: dotted
    old: Any
    new: Any
    why: str


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration. Nothing in it is null that a trainer would have to decide."""

    visft: VisftConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    gradient_clipping: float
    deepspeed: Mapping[str, Any]  #: DeepSpeed's own keys as given; no batch, precision, optimizer or scheduler keys
    sources: Mapping[str, str]  #: dotted key -> file or flag that set it; keys left at their default are absent
    adapted: tuple[Adapted, ...] = ()

    @property
    def total_steps(self) -> int:
        """Length of the run in optimiser steps."""
        assert self.scheduler.params.total_num_steps is not None  # resolving filled it in
        return self.scheduler.params.total_num_steps

    @property
    def pipeline_stages(self) -> int:
        """Processes that hold one model together; 1 without a pipeline."""
        return int(self.deepspeed.get("pipeline", {}).get("stages", 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, defaults included; given back with --deepspeed_config it resolves to the same."""
        plain: dict[str, Any] = {"gradient_clipping": self.gradient_clipping}
        for key in ("optimizer", "scheduler", "visft"):
            plain[key] = getattr(self, key).model_dump(mode="json")
        tasks = plain["visft"]["tasks"]  # of other packages, those that train: installing one changes nothing
        for name in [name for name, task in tasks.items() if task is None and name not in BUILT_IN]:
            del tasks[name]
        return {**copy.deepcopy(dict(self.deepspeed)), **plain}

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that must be equal to resume a run (all but `NOT_IDENTITY`)."""
        values = self.to_dict()
        flat = flatten({key: values[key] for key in OURS})
        return {key: value for key, value in flat if not any(fnmatch.fnmatch(key, glob) for glob in NOT_IDENTITY)}

    def fingerprint(self) -> str:
        """SHA-256 of `identity()`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is nested in objects and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield prefix[:-1], value
    else:
        for key, nested in pairs:
            yield from flatten(nested, f"{prefix}{key}.")


def identity_differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Lines for the keys that differ between two `identity()` dicts: `key: theirs -> ours`."""
    absent = "(absent)"
    pairs = ((key, theirs.get(key, absent), ours.get(key, absent)) for key in sorted({*theirs, *ours}))
    return [f"{key}: {json.dumps(old)} -> {json.dumps(new)}" for key, old, new in pairs if old != new]


def available(folder: str) -> list[str]:
    """Names that --engine ("engines") or --model ("models") accept."""
    return sorted(path.stem for path in (CONFIG_ROOT / folder).glob("*.json"))


def _layer_file(folder: str, name: str) -> Path:
    """The file of a name in ds_configs, or one of the user's own by its path. Raises ValueError."""
    if name.endswith(".json"):
        return Path(name)  # whoever reads it says so if there is none
    if name not in (known := available(folder)):
        raise ValueError(
            f"--{folder[:-1]} {name}: there is no {CONFIG_ROOT.name}/{folder}/{name}.json, and it is no .json "
            f"file{nearest(name, known)}"
        )
    return CONFIG_ROOT / folder / f"{name}.json"


def display(path: Path) -> str:
    """A path as a person would type it: relative to the current folder if it lies below it; a shipped configuration
    as ds_configs/..., wherever it is installed."""
    absolute, here = path.resolve(), Path.cwd()
    if absolute.is_relative_to(CONFIG_ROOT.resolve()):
        return str(CONFIG_ROOT.name / absolute.relative_to(CONFIG_ROOT.resolve()))
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def load_json(path: Path) -> dict[str, Any]:
    """The object in a configuration file. Raises ValueError, also for a key that stands twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key stands twice in one object: {', '.join(key for key, _ in pairs)}")
        return found

    if not path.is_file():
        raise ValueError(f"{display(path)}: no such file")
    with reading(display(path), "a configuration (a JSON object)"):
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

    def lay(self, values: Mapping[str, Any], source: str) -> None:
        """Lay values over those that there are, object by object; a list is replaced as a whole."""
        for key, value in _leaves(values):
            self.assign(key, value, source)

    def assign(self, key: str, value: Any, source: str) -> None:
        """Set a dotted key; a number is a position in a list, that behind the last one adds an item.

        Whether the key exists is checked by the schema. Raises ValueError for a key through a value without keys.
        """
        node: Any = self.values
        *parents, last = key.split(".")
        for depth, part in enumerate(parents):
            step: Any = _position(node, part, f"{source} {key}", most=-1) if isinstance(node, list) else part
            inner = node[step] if isinstance(node, list) else node.get(part)
            if inner is None:  # an absent or null object (a default, or a task that was off) is opened
                inner = node[step] = {}
            if not isinstance(inner, dict | list):
                where = ".".join(parents[: depth + 1])
                raise ValueError(f"{source} {key}: {where} is {shorten(inner)} and has no keys")
            node = inner
        if isinstance(node, list):
            place = _position(node, last, f"{source} {key}")
            node[place : place + 1] = [copy.deepcopy(value)]
        else:
            if isinstance(node.get(last), dict | list):  # what was below is gone
                self.sources = {other: by for other, by in self.sources.items() if not other.startswith(f"{key}.")}
            node[last] = copy.deepcopy(value)
        self.sources |= {inner: source for inner, _ in flatten(value, f"{key}.")}

    def source(self, key: str) -> str | None:
        """Source of a key, of the first value below it, or of what it is in; None: not set."""
        below = (source for other, source in self.sources.items() if f"{other}.".startswith(f"{key}."))
        found = next(below, None)
        return found if found or not key else self.source(key.rpartition(".")[0])

    def value(self, key: str) -> Any:
        """The value of a dotted key. Raises KeyError, IndexError, TypeError or ValueError if there is none."""
        node: Any = self.values
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, list) else node[part]
        return node


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no object; an empty object counts as a leaf."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _position(items: list[Any], part: str, where: str, most: int = 0) -> int:
    if not part.isdigit() or int(part) > len(items) + most:
        raise ValueError(f"{where}: a list of {len(items)}; give a position up to {len(items) + most}")
    return int(part)


def parse_assignment(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is JSON if it parses as JSON, else a text. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f'--set {text}: must be KEY=VALUE, for example --set optimizer.params.lr=1e-5 (lists: "[1, 2]")'
        )
    try:
        return key.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return key.strip(), value


def resolve(
    *,
    stage: int | None = None,
    engine: str = "zero1",
    model: str = "eva_e",
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    tasks: str | None = None,
    idle: Mapping[str, str] | None = None,
    recorded: tuple[Mapping[str, Any], str] | None = None,
) -> ResolvedConfig:
    """Merge, set, validate.

    Args:
        stage: 1 or 2; may be None with `file`, which states it.
        engine: name of a file in ds_configs/engines, or path of one.
        model: name of a file in ds_configs/models, or path of one.
        file: one complete file that replaces the three layers.
        settings: "dotted.key=value" texts, applied last and in order.
        flags: flag -> (dotted key, value), applied before `settings`.
        tasks: names of the tasks that take part, separated by commas, as behind --tasks.
        idle: task -> what turns it off.
        recorded: values of a run's record, and their origin, in place of the three layers.

    Raises:
        ValueError: everything that is wrong with the configuration, one line each.
    """
    tree = Tree()
    if recorded is not None:
        tree.lay(*recorded)
    elif file is not None:
        tree.lay(load_json(Path(file)), display(Path(file)))
        if stage is not None and dict(_leaves(tree.values)).get("visft.stage") != stage:
            raise ValueError(
                f"--stage {stage}: {display(Path(file))} states another visft.stage; leave one of them out"
            )
    elif stage not in (1, 2):
        raise ValueError(f"--stage {stage}: must be 1 (train the heads) or 2 (train the backbone's adapters)")
    else:
        for path in (CONFIG_ROOT / f"stage{stage}.json", _layer_file("engines", engine), _layer_file("models", model)):
            values, source = load_json(path), display(path)
            override = values.pop("override", {}) if path.parent.name != CONFIG_ROOT.name else {}
            tree.lay(values, source)
            with reading(source, 'a model file, with "override": {"stage1": {"optimizer.params.lr": 0.001}}'):
                for key, value in override.get(f"stage{stage}", {}).items():
                    tree.assign(key, value, f"{source} (override)")
    for flag, (key, value) in (flags or {}).items():
        tree.assign(key, value, flag)
    if tasks is not None:
        _keep_tasks(tree, tasks, "--tasks ")
    for text in settings:
        _apply(tree, text)
    for task, why in (idle or {}).items():
        tree.assign(f"visft.tasks.{task}", None, why)
    return _typed(tree)


def _apply(tree: Tree, text: str) -> None:
    """`--set KEY=VALUE`, with the short forms of `visft.tasks` (names) and of `visft.param_groups` (globs)."""
    key, value = parse_assignment(text)
    if key == "visft.tasks" and not isinstance(value, dict):
        _keep_tasks(tree, value, "--set visft.tasks=")
        return
    if key == "visft.param_groups" and isinstance(value, str):
        value = [{"name": "trained", "params": value}]
    tree.assign(key, value, "--set")


def _keep_tasks(tree: Tree, value: Any, flag: str) -> None:
    """`--tasks detection,captioning`, or a list behind `--set visft.tasks=`: turn every other task off."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    given, known = f"{flag}{value if isinstance(value, str) else json.dumps(value)}", list(entries())
    if not isinstance(names, list) or not names:
        raise ValueError(f"{given}: give names of tasks, such as {flag}{known[0]},{known[-1]}")
    if unknown := [str(name) for name in names if name not in known]:
        raise ValueError(f"{given}: there is no task {unknown[0]}{nearest(unknown[0].lower(), known)}")
    tasks = tree.values.get("visft", {}).get("tasks") or {}
    if absent := [name for name in names if tasks.get(name) is None]:
        raise ValueError(f"{given}: {' and '.join(absent)} is off, or without settings, in what comes before")
    for name in known:
        if name not in names:
            tree.assign(f"visft.tasks.{name}", None, given)


def _drop_idle_groups(visft: VisftConfig) -> VisftConfig:
    """Without the parameter groups of heads that take no part: a recipe for three tasks also serves for one."""
    off = tuple(f"heads.{name}." for name in entries() if name not in visft.tasks.enabled())
    used = [(group, [glob for glob in group.globs() if not glob.startswith(off)]) for group in visft.param_groups]
    kept = tuple(
        group if len(globs) == len(group.globs()) else group.model_copy(update={"params": ",".join(globs)})
        for group, globs in used
        if globs
    )
    return visft.model_copy(update={"param_groups": kept}) if kept else visft


def _with_random_heads(visft: VisftConfig) -> VisftConfig:
    """With a parameter group of all heads, where they start at random in stage 2 and no group names any."""
    if any(glob.startswith("heads.") for group in visft.param_groups for glob in group.globs()):
        return visft
    heads = ParamGroup(name="heads", params="heads.*")
    return visft.model_copy(update={"param_groups": (*visft.param_groups, heads)})


def resolve_values(values: Mapping[str, Any], origin: str) -> ResolvedConfig:
    """The configuration that `to_dict()` gave, e.g. out of a run's record; `origin` names it in errors."""
    return resolve(recorded=(values, origin))


def changed(config: ResolvedConfig, settings: Sequence[str] = (), engine: str | None = None) -> ResolvedConfig:
    """The same configuration with other values ("dotted.key=value"), or under another engine of ds_configs/engines.

    Raises:
        ValueError: as `resolve`.
    """
    return resolve(recorded=(with_engine(config.to_dict(), engine), "the configuration"), settings=settings)


def with_engine(values: Mapping[str, Any], engine: str | None) -> dict[str, Any]:
    """The values of a configuration with those of another engine, if one is given. Raises ValueError."""
    if engine is None:
        return dict(values)
    gone = {key for name in available("engines") for key in load_json(_layer_file("engines", name))}
    kept = {key: value for key, value in values.items() if key not in gone}
    return kept | load_json(_layer_file("engines", engine))


def _typed(tree: Tree) -> ResolvedConfig:
    """The typed configuration of a tree of values. Raises ValueError, with a line for each error."""
    complete()
    recipe, errors = check(Recipe, tree.values)
    if recipe is None:
        lines = [f"the configuration has {len(errors)} error{'s' if len(errors) > 1 else ''}:"]
        raise ValueError("\n  ".join([*lines, *(_line(tree, key, problem) for key, problem in errors)]))
    visft, scheduler, adapted = _drop_idle_groups(recipe.visft), recipe.scheduler, list[Adapted]()
    params = scheduler.params
    if params.total_num_steps is None:
        params = params.model_copy(update={"total_num_steps": visft.updates()})
    if params.total_num_steps is not None and params.warmup_num_steps > params.total_num_steps:
        warmup = params.total_num_steps // 10
        why = "the length of the run"
        adapted.append(Adapted("scheduler.params.warmup_num_steps", params.warmup_num_steps, warmup, why))
        params = params.model_copy(update={"warmup_num_steps": warmup})
    if visft.run.out is None:
        run = visft.run.model_copy(update={"out": f"runs/stage{visft.stage}-{visft.model.name}"})
        visft = visft.model_copy(update={"run": run})
    if visft.stage == 2 and visft.heads.start == "random":
        visft = _with_random_heads(visft)
    elif visft.stage == 2 and visft.heads.path is None:
        heads = visft.heads.model_copy(update={"path": f"runs/stage1-{visft.model.name}/export"})
        visft = visft.model_copy(update={"heads": heads})
    return ResolvedConfig(
        visft=visft,
        optimizer=recipe.optimizer,
        scheduler=scheduler.model_copy(update={"params": params}),
        gradient_clipping=recipe.gradient_clipping,
        deepspeed={key: value for key, value in tree.values.items() if key not in OURS},
        sources=tree.sources,
        adapted=tuple(adapted),
    )


def _line(tree: Tree, key: str, problem: str) -> str:
    """`key = value (source): problem`."""
    if key in INSTEAD:
        problem = f"follows from other keys; state {INSTEAD[key]}"
    try:
        value = tree.value(key)
    except (KeyError, IndexError, TypeError, ValueError):  # it is missing
        return f"{key}: {problem}"
    given = "***" if is_secret(key.rpartition(".")[2]) else value
    return f"{key} = {shorten(given)} ({tree.source(key)}): {problem}"
