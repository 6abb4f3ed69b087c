"""Tier 1: losses, exports, shards and samples of steps; a minute on two cores."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.freeze import entries
from tests.freeze.cases import Case, Outcome, Settings, Words, flags
from tests.freeze.entries import Entries

STEPS = 6
_QUICK: Settings = {
    "scheduler.params.total_num_steps": STEPS,
    "scheduler.params.warmup_num_steps": 2,
    "visft.run.rehearsal": False,
}
#: As all releases can train; those before the key came refuse it and are asked without. The goldens have its default.
_POOLED: Settings = {f"visft.tasks.{task}.loss.average": "batch" for task in ("detection", "segmentation")}
#: With which releases that have this key recompute; later ones refuse it and recompute without.
_EVERY_BLOCK: Settings = {"visft.model.checkpoint_every": 1}
LESS: Settings = {
    "visft.shared.batch_size": 8,
    **{f"visft.tasks.{task}.batch_size": 8 for task in ("detection", "segmentation", "captioning")},
}
#: Every choice of augmentation, and images of different sizes.
SIZES: Settings = {
    **LESS,
    "visft.tasks.detection.image": {
        **{"short_sides": [84, 98, 112], "max_long": 126, "crop_short_sides": [112, 126], "crop_range": [84, 112]},
        **{"eval_short": 112, "eval_max_long": 140, "fixed_size": None, "flip": 0.5},
    },
    "visft.tasks.segmentation.image": {
        **{"size": 112, "scale": [0.3, 1.5], "flip": 0.5, "eval_short": 112, "eval_max_long": 140, "fixed_size": None},
    },
}
_PACKED: Settings = {
    **SIZES,
    "visft.model.packed": True,
    "visft.tasks.segmentation.image": {**SIZES["visft.tasks.segmentation.image"], "content_only": True},
}
_STAGE1: Mapping[str, Settings] = {
    "stage1-shared": {},
    "stage1-shared-bf16": {**LESS, "visft.model.precision": "bf16"},
    "stage1-sampled": {**LESS, "visft.mode": "sampled"},
    "stage1-sampled-sizes": {**SIZES, "visft.mode": "sampled"},
    "stage1-shared-sizes": {
        **LESS,
        "visft.shared.image": {"short_sides": [84, 98, 112], "max_long": 126, "flip": 0.5, "fixed_size": None},
    },
    "stage1-features": {
        "visft.features": {"views": 1, "storage": "fp32", "cache": "features"},
        "visft.shared.batch_size": 16,
    },
    "stage1-features-bf16": {**LESS, "visft.features": {"views": 2}},
    "stage1-features-int8": {**LESS, "visft.features": {"views": 2, "storage": "int8", "cache": "features"}},
}
_RECOMPUTED = ("block", "mlp")
_STAGE2: Mapping[str, Settings] = {
    "stage2-qv": {"visft.run.save_every": 3},
    "stage2-qv-bf16": {**LESS, "visft.model.precision": "bf16"},
    "stage2-qv-shared": {"visft.mode": "shared"},
    "stage2-qv-sizes": SIZES,
    "stage2-qv-packed": _PACKED,
    "stage2-linears": {**LESS, "visft.lora.targets": ["q", "k", "v", "proj", "fc1", "fc2"]},
    "stage2-full": {**LESS, "visft.lora": None, "visft.param_groups": "backbone.*"},
    "stage2-lora-and-norms": {**LESS, "visft.param_groups": "backbone.*.lora_*,backbone.*norm*"},
    "stage2-joint": {**LESS, "visft.heads.start": "random", "visft.heads.path": None},
    "stage2-ema": {**LESS, "visft.run.ema": 0.9},
    **{f"stage2-recompute-{kind}": {**LESS, "visft.model.recompute": kind} for kind in _RECOMPUTED},
}


def train(
    name: str,
    stage: int,
    settings: Settings,
    *,
    model: str = "debug",
    heads: str = "",
    engine: str = "",
    data: str = "shards",
    needs: Words = ("shards",),
) -> Case:
    """A training of a few steps: its metrics, and whatever it exports."""
    out = f"train/{name}"
    given = {**_QUICK, **({"visft.heads.path": f"train/{heads}/export"} if heads else {}), **settings}
    words = ("launchers/train.py", "--stage", str(stage), "--model", model, "--data", data, "--out", out)
    words += ("--engine", engine) if engine else ()
    every_block = (_POOLED | _EVERY_BLOCK, _EVERY_BLOCK) if "recompute" in name else ()

    def read(outcomes: Sequence[Outcome]) -> Entries:
        found = entries.metrics(Path(out, "metrics.jsonl"))
        if "bf16" in name:
            return found  # equal within a tolerance, which hashes know nothing of
        found |= {f"export/{key}": value for key, value in entries.folder(Path(out, "export")).items()}
        saved = entries.folder(Path(out, f"checkpoints/step_{STEPS:08}"))
        # Hashes of head files are those of files that name a release.
        return found | {f"checkpoint/{key}": saved[key] for key in saved if key != "state.json/identity/heads"}

    return Case(
        out,
        (tuple(words + flags(older | given) for older in (*every_block, _POOLED, {})),),
        read,
        (*needs, f"train/{heads}") if heads else needs,
    )


def _data() -> list[Case]:
    """The toy set and its shards, byte by byte."""
    make = ("-m", "visft_ds", "toy", "--workers", "1", "--out")
    tree = ("--images", "toy/train2017", "--instances", "toy/annotations/instances_train2017.json")
    tree += ("--captions", "toy/annotations/captions_train2017.json", "--workers", "1", "--quiet")
    build = ("tools/make_shards.py", "build")
    held_out = tuple(word.replace("train2017", "val2017") for word in tree)

    def files(*folders: str) -> Callable[[Sequence[Outcome]], Entries]:
        def read(outcomes: Sequence[Outcome]) -> Entries:
            found: Entries = {}
            for folder in folders:
                for path in Path(folder).rglob("*"):
                    os.utime(path, (0, 0))  # fingerprints of image folders are of sizes and times
                found |= {f"{folder}/{name}": value for name, value in entries.folder(Path(folder), whole=True).items()}
            return found

        return read

    return [
        Case("toy", (((*make, "toy", "--train", "48", "--val", "8"),),), files("toy")),
        Case(
            "toy-others",
            (((*make, "toy-b", "--train", "0", "--val", "4", "--size=160x112", "--style=b", "--max-shapes=18"),),),
            files("toy-b"),
        ),
        Case(
            "shards",
            (
                ((*build, *tree, "--out", "shards", "--split", "train"),),
                ((*build, *held_out, "--out", "shards", "--split", "val"),),
                (("tools/make_shards.py", "verify", "shards"),),
            ),
            files("shards"),
            ("toy",),
        ),
        Case(
            "shards-others",
            (
                ((*build, *tree, "--out", "shards-others", "--split", "few", "--max-count=10", "--seed=none"),),
                ((*build, *tree, "--out", "shards-others", "--split", "small", "--reencode=q80:84", "--limit=20"),),
                ((*build, *tree, "--out", "shards-others", "--split", "plain", "--crowd=drop", "--check=header"),),
            ),
            files("shards-others"),
            ("toy",),
        ),
    ]


def _samples(name: str, stage: int, settings: Settings, data: str = "shards") -> Case:
    """The images of steps 0 to 99 and of step 1,000,000."""
    steps = [*range(100), 1_000_000]
    given = ("--stage", str(stage), "--model", "debug", "--data", data, *flags(settings))

    def command(step: int) -> tuple[Words, ...]:
        tail = ("--step", str(step), "--json", *given)
        return ("tools/make_shards.py", "which", *tail), ("tools/make_shards.py", "info", *tail)

    def read(outcomes: Sequence[Outcome]) -> Entries:
        found: Entries = {}
        for step, outcome in zip(steps, outcomes, strict=True):
            facts = json.loads(outcome.out)
            ids = facts["image_ids"]
            found[f"step{step}"] = f"{facts['task']}: {' '.join(map(str, ids.get('all', ids)))}"
        return found

    return Case(f"samples/{name}", tuple(command(step) for step in steps), read, ("shards", "shards-others"))


def _resumed() -> Case:
    """The second half of a run from its middle, after the first half of another process."""
    straight = train("stage2-qv", 2, _STAGE2["stage2-qv"], heads="stage1-shared")
    forms = straight.commands[0]
    again = tuple(tuple(word.replace("train/stage2-qv", "train/resumed") for word in words) for words in forms)

    def before() -> None:
        shutil.copytree("train/stage2-qv", "train/resumed")
        shutil.rmtree(f"train/resumed/checkpoints/step_{STEPS:08}")
        shutil.rmtree("train/resumed/export")

    def read(outcomes: Sequence[Outcome]) -> Entries:
        found = entries.metrics(Path("train/resumed/metrics.jsonl"))
        exported = entries.folder(Path("train/resumed/export"))
        return {**found, **{f"export/{name}": value for name, value in exported.items()}}

    return Case("train/resumed", (again,), read, ("train/stage2-qv",), before)


def cases() -> list[Case]:
    """Everything that is compared at every commit."""
    convnext = {"visft.lora.targets": ["stages.*.mlp.fc1"]}
    return [
        *_data(),
        *(train(name, 1, settings) for name, settings in _STAGE1.items()),
        *(
            train(name, 2, settings, heads="" if name == "stage2-joint" else "stage1-shared")
            for name, settings in _STAGE2.items()
        ),
        train("convnext-stage1", 1, LESS, model="debug_convnext"),
        train("convnext-stage2", 2, {**LESS, **convnext}, model="debug_convnext", heads="convnext-stage1"),
        *(
            train(f"{engine}-{name}", stage, settings, engine=engine, heads="stage1-shared" if stage == 2 else "")
            for engine in ("zero0", "zero3")
            for name, stage, settings in (
                ("stage1", 1, LESS),
                ("stage2", 2, {**LESS, "visft.lora.targets": ["q", "v", "fc1"]}),
            )
        ),
        _resumed(),
        _samples("stage1", 1, {}),
        _samples("stage2", 2, {"visft.seed": 7}),
        _samples("windowed", 2, {"visft.data.shuffle": "windowed", "visft.data.train": "few"}, "shards-others"),
        _samples("sets", 2, {"visft.data.sets": [{"name": "b", "root": "shards-others", "split": "plain"}]}),
    ]
