"""Tier 2: merged formats, evaluation, benchmarks, planner, resolved configurations, helps and errors; minutes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.freeze import entries, tier1
from tests.freeze.cases import Case, Outcome, Settings, Words, flags
from tests.freeze.entries import Entries

MODELS = ("debug", "debug_convnext", "overfit", "clip_vit_b", "eva_g", "eva_e")
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "pipeline")
#: Tower of the small CLIP, which has all that any form of weights needs.
CLIP = {"width": 32, "depth": 1, "num_heads": 2}
#: Cluster -> what is planned on it.
CLUSTERS: dict[str, Words] = {
    "8xA100-80GB": ("--model", "eva_e", "--stage", "2"),
    "8xV100-32GB": ("--model", "eva_g", "--stage", "2"),
    "4xV100-16GB": ("--model", "eva_g", "--stage", "1"),
    "1xH100-80GB": ("--model", "debug"),
    "4xA100-40GB": ("--model", "eva_e", "--stage", "1", "--engine", "zero3"),
    "8x4090": ("--model", "clip_vit_b", "--stage", "2", "--engine", "zero2"),
    "2xL40S-48GB": ("--model", "debug_convnext", "--stage", "1", "--engine", "zero0"),
    "3x3090-24GB": ("--model", "debug", "--stage", "2", "--set", "visft.model.recompute=block"),
}
_COMMANDS = {
    "launchers/train.py": (),
    "launchers/supervise.py": (),
    "tools/demo.py": (),
    "tools/doctor.py": (),
    "tools/evaluate.py": ("benchmarks",),
    "tools/make_shards.py": ("build", "verify", "info", "repair", "diff", "export", "which"),
    "tools/make_toy_coco.py": (),
    "tools/merge_lora.py": (),
    "tools/profile.py": (
        *("train", "data", "plan", "ops", "peft", "comm"),
        *("sharing", "features", "heads", "ap", "build", "save"),
    ),
    "tools/replay.py": (),
}


def cases(coco: Path | None) -> list[Case]:
    """Everything that is compared before a push, beside tier 1 (whose runs it uses)."""
    return [
        *_merges(),
        *_evaluations(),
        *_plans(),
        *(_dry_runs(model) for model in MODELS),
        _all_blocks(),
        *_helps(),
        *_errors(),
        *([] if coco is None else _photographs(coco)),
    ]


def skipped(coco: Path | None) -> dict[str, str]:
    """Cases that are left out -> why."""
    return {} if coco is not None else {"coco": "no --coco DIR was given"}


def printed(outcomes: Sequence[Outcome]) -> Entries:
    """Exit status and text of the only command."""
    (outcome,) = outcomes
    return {"status": outcome.code, "text": entries.text(outcome.out + outcome.err)}


def _files(folder: str) -> Any:
    return lambda outcomes: entries.folder(Path(folder))


def _merges() -> list[Case]:
    """Every form of merged weights, over a base that is a whole CLIP, and what else merge_lora writes."""
    settings: Settings = {
        **tier1.LESS,
        "visft.model.overrides": CLIP,
        "visft.heads.start": "random",
    }
    based = tier1.train("stage2-based", 2, settings, needs=("shards",))

    def merge(name: str, *words: str, runs: Sequence[str] = ("stage2-based",), needs: Words = ()) -> Case:
        adapters = [word for run in runs for word in ("--adapter", f"train/{run}")]
        command = ("tools/merge_lora.py", *adapters, "--out", f"merged/{name}", *words)
        needs = (*needs, *(f"train/{run}" for run in runs))
        return Case(f"merged/{name}", ((command,),), _files(f"merged/{name}"), needs)

    own = "train/stage2-qv/export/backbone.safetensors"
    return [
        based,
        *(merge(name, "--format", name, "--verify") for name in ("timm", "eva_clip", "open_clip", "lavis")),
        merge("peft", "--format", "peft"),
        merge("timm-bf16", "--dtype", "bf16"),
        merge("timm-scaled", "--scale", "0.5"),
        merge("average", "--base", own, runs=("stage2-qv", "stage2-qv-sizes")),
        *(merge(run, runs=(run,)) for run in ("stage2-qv", "stage2-linears", "stage2-full", "stage2-lora-and-norms")),
        merge("convnext", "--verify", runs=("convnext-stage2",)),
        merge("convnext-peft", "--format", "peft", runs=("convnext-stage2",)),
    ]


def _evaluations() -> list[Case]:
    """Numbers, results and pictures of runs, and a table of benchmarks."""

    def evaluate(run: str, name: str = "", *words: str) -> Case:
        out = f"evaluated/{name or run}"
        command = ("tools/evaluate.py", "--run", f"train/{run}", "--out", out, "--images", "2", *words)
        return Case(out, ((command,),), _files(out), (f"train/{run}",))

    models = ("--model", "base=train/stage2-qv/export/backbone.safetensors", "--model", "run=train/stage2-qv")
    sources = ("--benchmark", "digits")
    table = ("tools/evaluate.py", "benchmarks", *models, *sources, "--out", "benchmarks", "--threads", "1")

    def read(outcomes: Sequence[Outcome]) -> Entries:
        return entries.file(Path("benchmarks/benchmarks.json"))

    return [
        *(
            evaluate(run)
            for run in ("stage1-shared", "stage2-qv", "stage2-qv-packed", "stage2-full", "convnext-stage2")
        ),
        evaluate("stage2-based", "beam", "--beam-size", "3", "--tasks", "captioning", "--limit", "5"),
        Case("benchmarks", ((table,),), read, ("train/stage2-qv", "toy-others")),
    ]


def _plans() -> list[Case]:
    def plan(cluster: str, words: Words) -> Case:
        out = Path(f"plan-{cluster}.json")
        command = ("tools/profile.py", "plan", "--cluster", cluster, *words, "--json", str(out))
        return Case(f"plan/{cluster}", ((command,),), lambda outcomes: entries.file(out))

    return [plan(cluster, words) for cluster, words in CLUSTERS.items()]


def _dry_run(words: Words) -> tuple[tuple[Words, ...], ...]:
    """The commands that `_resolved` reads. Before 0.3 a dry run printed the configuration and then the report."""
    return ((*words, "--json"), words), (words,)


def _resolved(outcomes: Sequence[Outcome]) -> Entries:
    """The resolved configuration, and the report of a dry run, of which one line is about this machine."""
    resolved, told = outcomes
    found: Entries = {"status": told.code}
    if resolved.out.startswith("{"):
        found |= dict(entries.flat(json.JSONDecoder().raw_decode(resolved.out)[0], "config"))
    begins = json.JSONDecoder().raw_decode(told.out)[1] if told.out.startswith("{") else 0
    report = told.out[begins:] + told.err
    lines = [line for line in report.splitlines() if not line.strip().startswith("verdict")]
    return {**found, "report": entries.text("\n".join(lines))}


def _dry_runs(model: str) -> Case:
    """Both stages under every engine."""
    names = [(stage, engine) for stage in ("1", "2") for engine in ENGINES]
    commands = tuple(
        forms
        for stage, engine in names
        for forms in _dry_run(
            ("launchers/train.py", "--stage", stage, "--model", model, "--engine", engine, "--dry-run")
        )
    )

    def read(outcomes: Sequence[Outcome]) -> Entries:
        return {
            f"stage{stage}-{engine}/{key}": value
            for number, (stage, engine) in enumerate(names)
            for key, value in _resolved(outcomes[2 * number : 2 * number + 2]).items()
        }

    return Case(f"dry-run/{model}", commands, read, status=None, environment={"WORLD_SIZE": "2", "RANK": "0"})


def _all_blocks() -> Case:
    """Every key of the schema with its default, the optional blocks too."""
    settings: Settings = {"visft.features": {}, "visft.data.sets": [{"name": "other", "root": "elsewhere"}]}
    words = ("launchers/train.py", "--stage", "1", "--model", "debug", "--dry-run", *flags(settings))
    return Case("dry-run/all-blocks", _dry_run(words), _resolved, status=None)


def _helps() -> list[Case]:
    commands = [(tool, *inner) for tool, names in _COMMANDS.items() for inner in ((), *((name,) for name in names))]
    return [
        Case(f"help/{'/'.join(words).partition('/')[2]}", (((*words, "--help"),),), printed, status=None)
        for words in commands
    ]


def _errors() -> list[Case]:
    """The lines of bad_commands.txt."""
    found = []
    for line in Path(__file__).with_name("bad_commands.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, words = line.split(": ", 1)
            needs = ("shards", "train/stage1-shared", "train/stage2-qv", "train/stage2-full")
            found.append(Case(f"error/{name}", ((tuple(shlex.split(words)),),), printed, needs, status=None))
    return found


def _photographs(coco: Path) -> list[Case]:
    """A few photographs: shards, training, evaluation."""

    def build(split: str) -> Words:
        parts = [f"--images={coco}/{split}2017", f"--instances={coco}/annotations/instances_{split}2017.json"]
        parts += [f"--captions={coco}/annotations/captions_{split}2017.json", "--out=coco", f"--split={split}"]
        return ("tools/make_shards.py", "build", *parts, "--workers=1", "--quiet")

    def read(outcomes: Sequence[Outcome]) -> Entries:
        return entries.folder(Path("coco"), whole=True)

    stage1 = tier1.train(
        "coco-stage1", 1, {**tier1.SIZES, "visft.mode": "sampled"}, data="coco", needs=("coco/shards",)
    )
    command = ("tools/evaluate.py", "--run", "train/coco-stage1", "--out", "evaluated/coco", "--images", "2")
    return [
        Case("coco/shards", ((build("train"),), (build("val"),)), read),
        stage1,
        Case("evaluated/coco", ((command,),), _files("evaluated/coco"), ("train/coco-stage1",)),
    ]
