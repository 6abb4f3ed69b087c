"""Check a tree of values against the schema: every error at once, one line each, with the nearest known name."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from visft_ds.config.deepspeed_keys import DEEPSPEED_VERSION, REFUSED, REFUSED_ZERO, DeepSpeedKeys
from visft_ds.config.layers import Tree, leaves, shorten
from visft_ds.config.records import plain
from visft_ds.config.schema import ROLES, Recipe, VisftConfig, complete
from visft_ds.redaction import is_secret, refuse_secrets
from visft_ds.tasks import entries

_ONE_BY_ONE = (
    "images pass through the backbone one by one, on some processes more than on others, which a pipeline or ZeRO-3 "
    "would wait for: use --engine zero0, zero1 or zero2"
)
ITEM = "*"  #: stands for a position in a list


def known_keys() -> tuple[str, ...]:
    """Every key a configuration may set, dotted; "*" stands for a position in a list."""
    complete()
    return _known_keys(tuple(entries()))


@functools.cache
def _known_keys(tasks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({*_model_keys(Recipe, ""), *_model_keys(DeepSpeedKeys, "")}))


def _model_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        for nested, repeated in _nested_models(info.annotation):
            yield from _model_keys(nested, f"{prefix}{name}.{ITEM}." if repeated else f"{prefix}{name}.")


def _nested_models(annotation: Any, repeated: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, repeated
    for argument in get_args(annotation):
        yield from _nested_models(argument, repeated or getattr(annotation, "__origin__", None) is tuple)


def suggest(location: Sequence[str]) -> str:
    """Suggestion for an unknown key, as a clause of a message."""
    if location == ["override"]:
        return "only a file in ds_configs/models may replace values of other files"
    *parents, name = [ITEM if part.isdigit() else part for part in location]
    prefix = "".join(f"{part}." for part in parents)
    siblings = sorted({key[len(prefix) :].split(".")[0] for key in known_keys() if key.startswith(prefix)} - {ITEM})
    refused = {"": REFUSED, "zero_optimization.": REFUSED_ZERO}.get(prefix, {})
    near = difflib.get_close_matches(name.lower(), [*siblings, *refused], n=1)
    if near and near[0] in refused:
        return f"did you mean {prefix}{near[0]}? That key may not be set: {refused[near[0]]}"
    shown = ".".join([*location[:-1], ""])
    if near:
        return f"did you mean {shown}{near[0]}?"
    elsewhere = [key for key in known_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    near = difflib.get_close_matches(name.lower(), list(by_leaf), n=1, cutoff=0.8)
    if near:
        return f"did you mean {by_leaf[near[0]]}?"
    if not prefix:
        return f"known: {', '.join(Recipe.model_fields)} and the keys of DeepSpeed {DEEPSPEED_VERSION}"
    return f"known here: {', '.join(siblings)}" if siblings else f"{prefix[:-1]} has no keys of its own"


def validate(tree: Tree) -> Recipe:
    """The typed recipe of a tree of values.

    Raises:
        ValueError: everything that is wrong, one line each: key = value (source): what is allowed, nearest name.
    """
    complete()
    errors = list(_refused(tree.values))
    handled = {key for key, _ in errors}
    ours = {key: value for key, value in tree.values.items() if key in Recipe.model_fields}
    theirs = {key: value for key, value in tree.values.items() if key not in Recipe.model_fields and key not in REFUSED}
    recipe, found = check(Recipe, ours)
    keys, more = check(DeepSpeedKeys, theirs)
    errors += [(key, message) for key, message in [*found, *more] if key not in handled]
    if recipe is not None:
        errors += [*_contradictions(recipe), *_unknown_metric(recipe.visft), *_unreached_trace(recipe)]
    if keys is not None:
        errors += _engine_contradictions(keys)
    if recipe is not None and keys is not None and keys.pipeline is not None:
        errors += _pipeline_contradictions(recipe.visft, keys)
    if recipe is not None and keys is not None:
        errors += _compile_contradictions(recipe.visft, keys)
    waits = keys is not None and (keys.pipeline is not None or keys.zero_optimization.stage == 3)
    if recipe is not None and recipe.visft.features is not None and waits:
        errors.append(("visft.features", _ONE_BY_ONE))
    if errors or recipe is None:
        raise ValueError(_render(errors, tree))
    return recipe


def _render(errors: Sequence[tuple[str, str]], tree: Tree) -> str:
    lines = [f"the configuration has {len(errors)} error{'s' if len(errors) > 1 else ''}:"]
    for key, message in errors:
        found, value = _lookup(tree.values, key)
        given = f" = {shorten('***' if is_secret(key.rpartition('.')[2]) else value)}" if found else ""
        source = tree.source(key) if found else None
        lines.append(f"  {key}{given}{f' ({source})' if source else ''}: {message}")
    return "\n".join(lines)


def _lookup(values: Any, key: str) -> tuple[bool, Any]:
    for part in key.split("."):
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return False, None
    return True, values


def _refused(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in values:
        if key in REFUSED:
            yield key, f"may not be set: {REFUSED[key]}"
    zero = values.get("zero_optimization")
    for key in zero if isinstance(zero, dict) else ():
        if key in REFUSED_ZERO:
            yield f"zero_optimization.{key}", f"may not be set: {REFUSED_ZERO[key]}"
    for key, value in leaves(values):
        if isinstance(value, str) and value and is_secret(key.rpartition(".")[2]):
            yield key, "holds a secret, which would be stored with every run: give it as an environment variable"
    for key, value in leaves({name: values[name] for name in values if name not in ("visft", *REFUSED)}):
        if value == "auto":
            yield (
                key,
                f'"auto" is a word of other trainers, DeepSpeed {DEEPSPEED_VERSION} does not know it; state a value',
            )


def check(model: type[Any], values: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    """An instance of a schema, or None and (key, problem) of each value that it refuses."""
    try:
        # JSON mode: lists stand for tuples, everything else is as strict as the schema says.
        return model.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose items are wrong is also reported as too short: one error is enough.
        return None, [_explain(item) for item in found if not (item["type"] == "too_short" and _has_inner(item, found))]


def _has_inner(item: Any, errors: Sequence[Any]) -> bool:
    depth = len(item["loc"])
    return any(other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in errors)


def _explain(details: Any) -> tuple[str, str]:
    location = [str(part) for part in details["loc"]]
    key, kind, given = ".".join(location), details["type"], details["input"]
    if kind == "extra_forbidden":
        return key, f"unknown key; {suggest(location)}"
    if kind == "missing":
        return key, f"missing; state it in a file or with --set {key}=VALUE"
    if kind in ("model_type", "dict_type"):
        return key, f"must be an object {{...}} with keys; {suggest([*location, ''])}"
    message = plain(details["msg"])
    if kind in ("float_type", "int_type", "int_from_float") and isinstance(given, str) and _is_number(given):
        return key, f"{message}; it is a text: write {given} without quotes"
    if kind == "literal_error" and isinstance(given, str):
        near = difflib.get_close_matches(
            given, details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "), n=1
        )
        message += f"; did you mean {near[0]}?" if near else ""
    return key, message


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Values that are right alone and wrong together."""
    visft, schedule = recipe.visft, recipe.scheduler
    if visft.stage == 1 and visft.lora is not None:
        yield "visft.lora", "stage 1 trains heads on the unchanged backbone: must be null; adapters belong to stage 2"
    if visft.stage == 1 and visft.heads.path is not None:
        yield "visft.heads.path", "stage 1 trains new heads: must be null; trained heads belong to stage 2"
    if visft.heads.start == "random" and visft.heads.path is not None:
        yield "visft.heads.path", 'must be null with visft.heads.start = "random", which takes no heads of stage 1'
    if not visft.tasks.enabled():
        yield "visft.tasks", f"no task is on; state at least one of: {', '.join(type(visft.tasks).model_fields)}"
    else:
        yield from _length_contradictions(recipe)
    if schedule.type != "WarmupCosineLR" and schedule.params.cos_min_ratio:
        yield "scheduler.params.cos_min_ratio", f"{schedule.type} has no cosine; remove it or use WarmupCosineLR"
    names = [group.name for group in visft.param_groups]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"visft.param_groups.{index}.name", f"two groups are called {name}; give each its own name"
    yield from _backbone_contradictions(visft)
    if visft.mode == "shared" and visft.shared is None:
        yield "visft.shared", 'missing: mode "shared" needs visft.shared.batch_size and visft.shared.micro_batch'
    enabled = visft.tasks.enabled()
    for name, task in enabled.items():
        if visft.mode == "sampled" and task.updates is None:
            yield f"visft.tasks.{name}.updates", "missing: steps are shared out in proportion to the tasks' updates"
    for name, task in enabled.items():
        for key, problem in task.contradictions():
            yield f"visft.tasks.{name}.{key}", problem
    data = visft.data
    roots = {"visft.data.root": data.root, **{f"visft.data.sets.{n}.root": one.root for n, one in enumerate(data.sets)}}
    for key, root in roots.items():
        try:
            refuse_secrets(root)
        except ValueError as error:
            yield key, str(error)
    sets = [data.train, *(other.name for other in data.sets)]
    for number, one in enumerate(data.sets):
        if one.name in sets[: number + 1]:
            yield f"visft.data.sets.{number}.name", f"another training set is called {one.name}; give each its own name"
        idle = [task for task in one.tasks or () if task not in enabled]
        if idle:
            yield f"visft.data.sets.{number}.tasks", f"{', '.join(idle)} does not train in this run"
    if visft.features is not None:
        yield from _feature_contradictions(visft)
    run = visft.run
    if run.keep_best is not None and not run.eval_every:
        yield "visft.run.keep_best", "needs an evaluation during training: set visft.run.eval_every, or null"
    elif run.keep_best is not None and run.eval_every % run.save_every:
        yield (
            "visft.run.keep_best",
            f"a step that is evaluated must be saved: visft.run.eval_every = {run.eval_every} has to be a multiple of "
            f"visft.run.save_every = {run.save_every}",
        )
    if run.stop_after and run.keep_best is None:
        metrics = [task.main for task in enabled.values()]
        yield "visft.run.stop_after", f"needs a metric: set visft.run.keep_best, such as {' or '.join(metrics)}"
    if run.trace is not None and run.trace[0] > run.trace[1]:
        yield "visft.run.trace", f"its first step {run.trace[0]} comes after its last, {run.trace[1]}"


def _backbone_contradictions(visft: VisftConfig) -> Iterator[tuple[str, str]]:
    """Contradictions between settings for our own towers and settings for models of timm."""
    model, targets = visft.model, visft.lora.targets if visft.lora else ()
    if model.timm is None:
        for number, target in enumerate(targets):
            if target not in ROLES:
                near = difflib.get_close_matches(target, ROLES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                known = ", ".join(f"'{role}'" for role in ROLES)
                yield f"visft.lora.targets.{number}", f"must be one of {known} with preset {model.preset}{hint}"
        return
    if own := [name for name in model.overrides.model_dump(exclude_none=True) if name != "image_size"]:
        yield (
            "visft.model.overrides",
            f"{model.preset} has its own shape: only image_size may be set, not {', '.join(own)}; --backbone "
            f"{model.preset} in place of --set drops them, as does --set visft.model.overrides={{}}",
        )
    if model.recompute not in ("auto", "none", "block"):
        yield "visft.model.recompute", f"must be auto, none or block with {model.preset}"
    if model.packed:
        yield "visft.model.packed", f"must be false with {model.preset}, whose images are padded"
    if model.compile != "none":
        yield "visft.model.compile", f"must be none with {model.preset}"


def _unknown_metric(visft: VisftConfig) -> Iterator[tuple[str, str]]:
    """Check that the metric of the best checkpoint is one that this run's evaluations give."""
    best, measured = visft.run.keep_best, [name for task in visft.tasks.enabled().values() for name in task.metrics]
    if best is None or best in measured:
        return
    near = difflib.get_close_matches(best.lower(), (lower := {name.lower(): name for name in measured}), n=1)
    hint = f"did you mean {lower[near[0]]}? " if near else ""
    yield "visft.run.keep_best", f"is no metric of this run's tasks; {hint}known: {', '.join(measured)}"


def _unreached_trace(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Check that the steps to trace begin within the run; one without a length has an error of its own."""
    stated, trace = recipe.scheduler.params.total_num_steps, recipe.visft.run.trace
    total = recipe.visft.updates() if stated is None else stated
    if trace is not None and total is not None and trace[0] > total:
        yield "visft.run.trace", f"its first step {trace[0]} comes after the last one of the run, {total}"


def _length_contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.scheduler.params.total_num_steps is None and recipe.visft.updates() is None:
        yield (
            "scheduler.params.total_num_steps",
            "missing: state the length of the run, or visft.tasks.<task>.updates of every task",
        )


def _feature_contradictions(visft: VisftConfig) -> Iterator[tuple[str, str]]:
    if visft.stage != 1:
        yield "visft.features", "stage 2 changes the backbone, and with it all features: must be null"
    if visft.model.packed:
        yield (
            "visft.model.packed",
            "must be false with visft.features: images whose features are kept pass through the backbone one by one, "
            "without padding",
        )


def _engine_contradictions(keys: DeepSpeedKeys) -> Iterator[tuple[str, str]]:
    zero = keys.zero_optimization
    parameters = zero.offload_param is not None and zero.offload_param.device != "none"
    optimizer = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    if parameters and zero.stage != 3:
        yield "zero_optimization.offload_param", f"needs zero_optimization.stage = 3; the stage is {zero.stage}"
    if optimizer and zero.stage == 0:
        yield "zero_optimization.offload_optimizer", "needs zero_optimization.stage = 1, 2 or 3; the stage is 0"
    if optimizer and keys.zero_force_ds_cpu_optimizer is not False:
        yield (
            "zero_force_ds_cpu_optimizer",
            "must be false with offload_optimizer: DeepSpeed would ask for its own CPU optimizer, which it compiles",
        )


def _compile_contradictions(visft: VisftConfig, keys: DeepSpeedKeys) -> Iterator[tuple[str, str]]:
    model, key = visft.model, "visft.model.compile"
    if model.compile == "none":
        return
    if keys.zero_optimization.stage == 3:
        yield (
            key,
            "must be none with ZeRO-3, which gathers the weights of every layer in Python, between the operators of a "
            "block: use --engine zero1 or zero2",
        )
    if model.kernels == "triton":
        yield key, "must be none with visft.model.kernels = triton: the compiler makes kernels of its own"
    if not visft.run.rehearsal:
        yield key, "must be none without visft.run.rehearsal, which is when blocks are compiled"


def _pipeline_contradictions(visft: VisftConfig, keys: DeepSpeedKeys) -> Iterator[tuple[str, str]]:
    zero = keys.zero_optimization
    if zero.stage != 1:
        yield (
            "zero_optimization.stage",
            "must be 1 with a pipeline: DeepSpeed refuses 2 and 3, and with 0 it clips by the gradient of one stage",
        )
    if visft.model.packed:
        yield "visft.model.packed", "must be false with a pipeline: use --engine zero0, zero1, zero2 or zero3"
    if visft.model.timm is not None:
        yield (
            "visft.model.preset",
            "timm's models cannot be divided into stages: use --engine zero0, zero1, zero2 or zero3",
        )
    if zero.overlap_comm:
        yield "zero_optimization.overlap_comm", "must be false with a pipeline, which reduces gradients after a step"
    for name in ("tensorboard", "wandb", "csv_monitor", "comet"):
        if getattr(keys, name) is not None:
            yield (
                name,
                "remove it with a pipeline: in an evaluation DeepSpeed would wait for processes that do not write; "
                "metrics.jsonl and TensorBoard files are written all the same",
            )
