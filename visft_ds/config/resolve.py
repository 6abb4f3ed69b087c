"""Resolved configuration out of ds_configs/ (or one file of the user's own), flags and --set."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visft_ds.config.layers import (
    CONFIG_ROOT,
    Replaced,
    Tree,
    apply_override,
    assign,
    display,
    load_json,
    merge,
    parse_assignment,
)
from visft_ds.config.schema import OptimizerConfig, ParamGroup, Recipe, SchedulerConfig, VisftConfig
from visft_ds.config.validate import validate
from visft_ds.tasks import BUILT_IN, entries

#: Sources of values that a start adapts, and says so.
SHORT_RUN, FEW_IMAGES = "the length of the run", "the number of images"
#: What may differ between a run and its resumption, as globs over dotted keys: where files lie, what is logged and
#: saved, and how the work is divided. Weights, heads and data are compared by their content, in the checkpoint.
#: DeepSpeed's own keys are left out as well: a checkpoint does not depend on the ZeRO stage.
NOT_IDENTITY = (
    "visft.run.*",
    "visft.data.root",
    "visft.data.sets.*.root",
    "visft.data.sets.*.categories",  # its content counts
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
class ResolvedConfig:
    """A validated configuration. Nothing in it is null that a trainer would have to decide."""

    visft: VisftConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    gradient_clipping: float
    deepspeed: Mapping[str, Any]  #: DeepSpeed's own keys as given; no batch, precision, optimizer or scheduler keys
    sources: Mapping[str, str]  #: dotted key -> file or flag that set it; keys left at their default are absent
    replaced: tuple[Replaced, ...]  #: values that a model file or a flag replaced on purpose

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
        ours = Recipe(
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            gradient_clipping=self.gradient_clipping,
            visft=self.visft,
        )
        values = {**copy.deepcopy(dict(self.deepspeed)), **ours.model_dump(mode="json")}
        tasks = values["visft"]["tasks"]  # of other packages, those that train: installing one changes nothing
        for name in [name for name, task in tasks.items() if task is None and name not in BUILT_IN]:
            del tasks[name]
        return values

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that must be equal to resume a run (all but `NOT_IDENTITY`)."""
        values = self.to_dict()
        flat = flatten({key: values[key] for key in Recipe.model_fields})
        return {key: value for key, value in flat if not _is_no_identity(key)}

    def fingerprint(self) -> str:
        """SHA-256 of `identity()`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def _is_no_identity(key: str) -> bool:
    return any(fnmatch.fnmatch(key, glob) for glob in NOT_IDENTITY)


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
    keys = sorted({*theirs, *ours})
    absent = "(absent)"
    pairs = ((key, theirs.get(key, absent), ours.get(key, absent)) for key in keys)
    return [f"{key}: {json.dumps(old)} -> {json.dumps(new)}" for key, old, new in pairs if old != new]


def available(folder: str) -> list[str]:
    """Names that --engine ("engines") or --model ("models") accept."""
    return sorted(path.stem for path in (CONFIG_ROOT / folder).glob("*.json"))


def _layer_file(folder: str, flag: str, name: str) -> Path:
    """The file of a name in ds_configs, or one of the user's own by its path. Raises ValueError."""
    if name.endswith(".json"):
        return Path(name)  # whoever reads it says so where there is none
    known = available(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"{flag} {name}: no such file {display(CONFIG_ROOT / folder)}/{name}.json{hint} "
            f"There are: {', '.join(known)}, or the path of a .json file"
        )
    return CONFIG_ROOT / folder / f"{name}.json"


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
    """Merge, override, set, validate.

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
    if recorded is not None:
        values, origin = recorded
        tree = merge([(origin, values)])
    elif file is not None:
        tree = merge([(display(Path(file)), load_json(Path(file)))])
        stated = tree.values.get("visft", {}).get("stage") if isinstance(tree.values.get("visft"), dict) else None
        if stage is not None and stated != stage:
            raise ValueError(
                f"--stage {stage}: {display(Path(file))} states visft.stage = {stated}; leave one of them out"
            )
    else:
        if stage not in (1, 2):
            raise ValueError(f"--stage {stage}: must be 1 (train the heads) or 2 (train the backbone's adapters)")
        tree = _merge_layers(stage, engine, model)
    for flag, (key, value) in (flags or {}).items():
        assign(tree, key, value, flag)
    if tasks is not None:
        _keep_tasks(tree, tasks, "--tasks ")
    for text in settings:
        _apply(tree, text)
    for task, why in (idle or {}).items():
        assign(tree, f"visft.tasks.{task}", None, why)
    return _typed(tree)


def _apply(tree: Tree, text: str) -> None:
    """`--set KEY=VALUE`, with the short forms of `visft.tasks` (names) and of `visft.param_groups` (globs)."""
    key, value = parse_assignment(text)
    if key == "visft.tasks" and not isinstance(value, dict):
        _keep_tasks(tree, value, "--set visft.tasks=")
        return
    if key == "visft.param_groups" and isinstance(value, str):
        value = [{"name": "trained", "params": value}]
    assign(tree, key, value, "--set")


def _keep_tasks(tree: Tree, value: Any, flag: str) -> None:
    """`--tasks detection,captioning`, the same behind `--set visft.tasks=`, or a JSON list of names: turn every other
    task off."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    known = list(entries())
    given = f"{flag}{','.join(names) if isinstance(value, str) else json.dumps(value)}"
    if not isinstance(names, list) or not names or any(name not in known for name in names):
        unknown = [name for name in names if name not in known] if isinstance(names, list) else []
        near = [match for name in unknown for match in difflib.get_close_matches(str(name).lower(), known, n=1)]
        hint = f"; did you mean {' and '.join(dict.fromkeys(near))}?" if near else "."
        raise ValueError(
            f"{given}: give names of tasks, for example {flag}{known[0]} or {flag}{known[0]},{known[-1]}{hint} "
            f"There are: {', '.join(known)}"
        )
    visft = tree.values.get("visft")
    tasks = visft.get("tasks") if isinstance(visft, dict) else None
    absent = [name for name in names if not isinstance(tasks, dict) or tasks.get(name) is None]
    if absent:
        raise ValueError(
            f"{given}: {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} off, or without settings, in what "
            "comes before; state every task to keep in one --set, and its settings (visft.tasks.<task>.batch_size, "
            "...) in a file"
        )
    for name in known:
        if name not in names:
            assign(tree, f"visft.tasks.{name}", None, given)


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
    return _typed(merge([(origin, values)]))


def changed(config: ResolvedConfig, settings: Sequence[str] = (), engine: str | None = None) -> ResolvedConfig:
    """The same configuration with other values ("dotted.key=value"), or under another engine of ds_configs/engines.

    Raises:
        ValueError: as `resolve`.
    """
    tree = merge([("the configuration", with_engine(config.to_dict(), engine))])
    for text in settings:
        _apply(tree, text)
    return _typed(tree)


def with_engine(values: Mapping[str, Any], engine: str | None) -> dict[str, Any]:
    """The values of a configuration with those of another engine, where one is given. Raises ValueError."""
    if engine is None:
        return dict(values)
    gone = {key for name in available("engines") for key in load_json(_layer_file("engines", "--engine", name))}
    return {key: value for key, value in values.items() if key not in gone} | load_json(
        _layer_file("engines", "--engine", engine)
    )


def _merge_layers(stage: int, engine: str, model: str) -> Tree:
    files = [
        CONFIG_ROOT / f"stage{stage}.json",
        _layer_file("engines", "--engine", engine),
        _layer_file("models", "--model", model),
    ]
    layers = [(display(path), load_json(path)) for path in files]
    name, values = layers[-1]
    override = values.pop("override", {})
    tree = merge(layers)
    apply_override(tree, override, f"stage{stage}", name)
    return tree


def _typed(tree: Tree) -> ResolvedConfig:
    recipe = validate(tree)
    visft, scheduler = _drop_idle_groups(recipe.visft), recipe.scheduler
    if scheduler.params.total_num_steps is None:
        steps = scheduler.params.model_copy(update={"total_num_steps": visft.updates()})
        scheduler = scheduler.model_copy(update={"params": steps})
    params, replaced = scheduler.params, [entry for entry in tree.replaced if entry.new != entry.old]
    if params.total_num_steps is not None and params.warmup_num_steps > params.total_num_steps:
        warmup = params.total_num_steps // 10
        replaced.append(Replaced("scheduler.params.warmup_num_steps", params.warmup_num_steps, warmup, SHORT_RUN))
        scheduler = scheduler.model_copy(update={"params": params.model_copy(update={"warmup_num_steps": warmup})})
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
        scheduler=scheduler,
        gradient_clipping=recipe.gradient_clipping,
        deepspeed={key: value for key, value in tree.values.items() if key not in Recipe.model_fields},
        sources=dict(tree.sources),
        replaced=tuple(replaced),
    )
