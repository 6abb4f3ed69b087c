"""Keys, commands and flags that are gone, each with what serves instead. Naming one is answered with that.

And keys that came later: a record without them means what its release did.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from visft_ds.tasks import registry

#: Version of run.json. 1: release 0.1, whose records do not state it. 2: without the keys below.
RUN_SCHEMA = 2
_PACK_AGAIN = "run the same `build` with another --out: the same COCO files and images give the same fingerprint"
_COPIES = "find copies with a program made for that, as imagededup, and name the images to keep in --ids FILE"
_MEASURED, _COMPARED = (
    f"what it measured stands in docs/LOG.md; commit {commit} is the last that has it"
    for commit in ("584c6d3", "eb9e60c")
)

#: Dotted key -> what serves instead; those of the tasks come from `TaskConfig.removed`.
KEYS: dict[str, str] = {
    "visft.run.average_last": "average afterwards: visft merge --adapter RUN/checkpoints/step_N --adapter ...",
    "visft.run.min_loss_scale": "an overflow at a loss scale of 1 stops the run; use visft.model.precision=bf16",
    "visft.run.skip_spikes": "leaps of the loss are reported (visft.run.spike_threshold), never refused",
    "visft.data.cache_mode": "visft.data.cache keeps whole shards (docs/data.md)",
    "visft.model.checkpoint_every": "visft.model.recompute alone decides, for all blocks: none where this was 0, "
    "block or another policy where it was 1; every k-th block is offered no more, auto takes the fastest that fits",
    "visft.model.fit_memory": "visft.model.recompute=auto, the default, takes the fastest that fits",
    "visft.model.memory_limit": "state visft.model.recompute; auto fills what the device or its control group has",
    "visft.model.base": "frozen matrices have visft.model.precision; for fewer bits use torchao on your own model",
}
#: Keys that a record written before may hold with a value that changed nothing: key -> that value.
IDLE: dict[str, Any] = {
    "visft.run.average_last": 0,
    "visft.run.min_loss_scale": 1.0,
    "visft.run.skip_spikes": 0,
    "visft.data.cache_mode": "ranges",
    "visft.model.base": "full",
}
#: Later keys -> what a record without them means.
LATER: dict[str, Any] = {"visft.model.until": None}
#: Tool -> its command, flag or "command --flag" -> what serves instead.
ARGUMENTS: dict[str, dict[str, str]] = {
    "tools/profile.py": {
        "heads": f"`train` has the time and memory of a step by part; {_MEASURED}",
        "ap": _MEASURED,
        "build": f"`visft shards build` prints its images a second; {_MEASURED}",
        "save": f"save/stall_seconds and save/write_seconds in metrics.jsonl say what a save costs; {_MEASURED}",
        "sharing": f"`train` with visft.mode=shared and with visft.mode=sampled; {_MEASURED}",
        "features": f"`train` has the steps through the backbone; {_MEASURED}",
        "data --start": _MEASURED,
        "data --shuffle": _MEASURED,
        "data --samples": f"it was for --start and --shuffle; {_MEASURED}",
        "ops --against": _COMPARED,
        "comm --csv": "--json has the same numbers",
    },
    "make_shards": {
        "repair": "run the same `build` again: it keeps whole shards, makes the others, index and manifest anew",
        "diff": "compare the fingerprints that `info` shows; equal ones mean the same samples in the same order",
        "export": "keep the COCO files that were packed; `tar -xf` gives the images, each with its label",
        "which": "`info --step N` with the same flags; where a sample lies is in its row of NAME.index.npy",
        "build --dedup": _COPIES,
        "build --against": _COPIES,
        "verify --against": _PACK_AGAIN,
        "verify --captions": _PACK_AGAIN,
    },
}


def removed_keys() -> dict[str, str]:
    """Dotted key -> what serves instead."""
    return KEYS | {key: instead for key, (instead, _) in registry.removed_settings().items()}


def removed_key(key: str) -> str | None:
    """The answer to a removed key, or None for any other."""
    instead = removed_keys().get(key)
    return None if instead is None else f"removed in 0.2: {instead}"


def refuse_removed(tool: str, arguments: Sequence[str]) -> None:
    """Check a command line for what its tool had and has no longer.

    Raises:
        ValueError: a removed command or flag; says what serves instead.
    """
    gone = ARGUMENTS.get(tool, {})
    words = [word for word in arguments if not word.startswith("--local_rank=")]  # the deepspeed launcher puts it first
    command = words[0] if words else ""
    for word in words:
        flag = word.partition("=")[0]
        for name in (flag, f"{command} {flag}"):
            if name in gone and (flag.startswith("-") or flag is word is command):
                raise ValueError(f"{name}: removed in 0.2: {gone[name]}")


def without_removed(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values of a recorded configuration without removed keys; those that did something are named on stderr."""
    kept = copy.deepcopy(dict(values))
    _ratios_to_updates(kept)
    _to_one_policy(kept)
    idle = IDLE | {key: value for key, (_, value) in registry.removed_settings().items()}
    for key, instead in removed_keys().items():
        *parents, name = key.split(".")
        node: Any = kept
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node and node.pop(name) != idle.get(key):
            print(f"{origin}: {key} was removed in 0.2 and is left out: {instead}", file=sys.stderr)
    return kept


def missing_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, nested as their keys, that a recorded configuration stands for by lacking keys of later releases."""
    missing: dict[str, Any] = {}
    for key, value in registry.earlier_settings().items():
        *parents, name = key.split(".")
        node: Any = values
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and name not in node:
            target = missing
            for parent in parents:
                target = target.setdefault(parent, {})
            target[name] = value
    return missing


def _to_one_policy(values: dict[str, Any]) -> None:
    """Give a model that states `checkpoint_every` the policy that it stood for, in place."""
    visft = values.get("visft")
    model = visft.get("model") if isinstance(visft, dict) else None
    if not isinstance(model, dict) or "checkpoint_every" not in model:
        return
    if model["checkpoint_every"] == 0:
        model["recompute"] = "none"
    if model["checkpoint_every"] in (0, 1):  # of every other number the answer to a removed key tells
        del model["checkpoint_every"]
    model.setdefault("recompute", "block")
    model.pop("fit_memory", None)  # the record has what it chose


def _ratios_to_updates(values: dict[str, Any]) -> None:
    """Give tasks that state a `ratio` their `updates` in the same proportion, in place; a run records its length."""
    visft = values.get("visft")
    tasks = visft.get("tasks") if isinstance(visft, dict) else None
    stated = [
        task
        for task in (tasks if isinstance(tasks, dict) else {}).values()
        if isinstance(task, dict) and task.get("ratio") is not None
    ]
    shares = [Fraction(str(task["ratio"])) for task in stated]
    common = math.lcm(*(share.denominator for share in shares))
    for task, share in zip(stated, shares, strict=True):
        task["updates"], task["ratio"] = int(share * common), None
