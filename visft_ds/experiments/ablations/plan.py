"""From a question to commands: which arms and seeds share what, and what is measured of each.

A trial is one arm with one seed:

    pretraining (toy scale) -> stage 1 -> stage 2 of the arm -> evaluation in domain, benchmarks out of domain

The seed is that of all of them: what two arms of a seed share is done once, and a difference over seeds contains the
accidents of every training before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from string import Template
from typing import Any

import torch

from visft_ds.config import Missing, ResolvedConfig, missing_inputs, resolve_arguments
from visft_ds.experiments.ablations.questions import RECIPE, TOWERS, Arm, Question
from visft_ds.experiments.ablations.scales import BASE, TOY_SECOND_SEED, TOY_SIDE, Scale, Toy, clip_file
from visft_ds.experiments.ablations.steps import STEPS, Step, StepList
from visft_ds.interop.layouts import depth_of, is_lora
from visft_ds.models.backbone import build_empty
from visft_ds.prepare.model import plan_groups
from visft_ds.pretrained import local
from visft_ds.run.folder import ADAPTER_FOLDER, BACKBONE_FILE, TRAINED_BACKBONE_FILE

#: Labels of the two models of a trial in the table of benchmarks.
BEFORE, AFTER = "before", "after"
MERGED = "merged.safetensors"
#: Beginnings of settings that decide values, not what trains: a model of timm takes seconds to build.
_SHAPELESS = ("visft.seed=", "visft.model.weights=", "visft.data.root=", "visft.heads.path=")
#: Beginnings of benchmarks that need a text side.
_BY_TEXT = ("zero_shot=", "retrieval=")


@dataclass(frozen=True)
class Trial:
    """Arm with a seed, and the steps whose results are its numbers."""

    arm: str
    seed: int
    before: Step  #: in domain: the heads on the base weights
    after: Step  #: in domain: once stage 2 is done
    benchmarks: Step  #: out of domain, both


@dataclass(frozen=True)
class AblationPlan:
    """All of a question."""

    name: str
    question: Question
    trials: Sequence[Trial]

    @property
    def seeds(self) -> list[int]:
        """Seeds of its trials."""
        return list(dict.fromkeys(trial.seed for trial in self.trials))

    @property
    def ends(self) -> list[Step]:
        """Steps whose results are read."""
        return [step for trial in self.trials for step in (trial.before, trial.after, trial.benchmarks)]


@dataclass(frozen=True)
class _Training:
    """A training, and what it leaves."""

    step: Step
    config: ResolvedConfig
    trained: frozenset[str]  #: first parts of the names of what trains: "heads", "backbone", "lora"

    @property
    def export(self) -> Path:
        return self.step.out / "export"

    def parts(self) -> list[str]:
        """Flags of visft evaluate for the parts in its export folder that replace those before."""
        words = ["--backbone", str(self.export / TRAINED_BACKBONE_FILE)] if "backbone" in self.trained else []
        words += ["--heads", str(self.export)] if "heads" in self.trained else []
        return words + (["--adapter", str(self.export / ADAPTER_FOLDER)] if "lora" in self.trained else [])


class Planner:
    """Plans questions of one scale into one list of steps."""

    def __init__(self, root: Path, scale: Scale) -> None:
        self.scale = scale
        self.steps = StepList(root)
        self._relabelled: set[str] = set()  # stems of shards
        self.missing: dict[str, Missing] = {}  #: by path: files of the user's that are not there
        self._toy = Toy(self.steps, scale)

    def plan(self, name: str, question: Question, seeds: Sequence[int]) -> AblationPlan:
        """Every arm with every seed.

        Raises:
            ValueError: a configuration that cannot be, with the arm it belongs to.
        """
        trials = []
        for seed in seeds:
            for arm in question.arms:
                try:
                    trials.append(self._trial(f"{name}: {arm.name}, seed {seed}", arm, seed))
                except ValueError as error:
                    raise ValueError(f"{name}, arm {arm.name!r}: {error}") from error
        return AblationPlan(name, question, trials)

    def _trial(self, title: str, arm: Arm, seed: int) -> Trial:
        stage2 = self._stage2(title, arm, seed) if arm.updates else None
        return Trial(
            arm=arm.name,
            seed=seed,
            before=self._in_domain(f"{_of(arm, seed)}: heads before stage 2", arm, seed, None),
            after=self._in_domain(f"{title}: in domain", arm, seed, stage2),
            benchmarks=self._out_of_domain(title, arm, seed, stage2),
        )

    # ------------------------------------------------------------------------------------------- trainings

    def _stage1(self, arm: Arm, seed: int) -> _Training:
        title = f"{_of(arm, seed)}: stage 1{', permuted labels' if arm.permuted else ''}"
        kept = [f"visft.features.cache={self.steps.root / STEPS / 'kept'}"] if self.scale.base_file else []
        return self._training("stage1", title, 1, [*self._both(arm), *kept], seed, self._labels(arm, seed))

    def _stage2(self, title: str, arm: Arm, seed: int) -> _Training:
        recipe = self._recipe(2)
        steps = round(arm.updates * recipe.total_steps)
        if arm.joint and not arm.short:
            steps += self._recipe(1).total_steps
        settings = [f"scheduler.params.total_num_steps={steps}"] if steps != recipe.total_steps else []
        second = self._toy.shards("a", TOY_SECOND_SEED) if self.scale.toy and "$second" in "".join(arm.stage2) else None
        needs: list[Step] = [*self._labels(arm, seed), *([second] if second else [])]
        values = {**self._values(recipe), "second": str(second.out) if second else self.scale.second}
        settings += [*self._both(arm), *(_filled(text, values) for text in arm.stage2)]
        settings += [f"visft.lora.targets={json.dumps(TOWERS[arm.tower].targets)}"] if arm.tower else []
        if not arm.joint and self._given_heads(arm):
            settings.append(f"visft.heads.path={self.scale.heads}")
        elif not arm.joint:
            stage1 = self._stage1(arm, seed)
            settings.append(f"visft.heads.path={stage1.export}")
            needs.append(stage1.step)
        return self._training("stage2", f"{title}: stage 2", 2, settings, seed, needs)

    def _values(self, recipe: ResolvedConfig) -> Mapping[str, str]:
        """Variables for settings of arms beside $second, see `questions`."""
        rate, model, stage1 = recipe.optimizer.params.lr, recipe.visft.model, self._recipe(1)
        depth = _depth(model.preset, tuple(model.backbone_options().items()))
        last = range(depth - max(1, depth // 4), depth)
        values = {
            "rate": f"{rate:g}",
            "tenth": f"{rate / 10:g}",
            "hundredth": f"{rate / 100:g}",
            "heads": f"{stage1.optimizer.params.lr:g}",
            "mode": stage1.visft.mode,
            "shared": str(stage1.visft.shared.batch_size if stage1.visft.shared else 1),
        }
        if depth:
            values["last"] = ",".join(f"backbone.blocks.{number}.*" for number in last)
        return values

    def _training(
        self, kind: str, title: str, stage: int, settings: Sequence[str], seed: int, needs: Sequence[Step]
    ) -> _Training:
        chosen = [*self.scale.stage_settings(stage), *settings, f"visft.seed={seed}"]
        if self.scale.toy:
            needs = [*needs, self._toy.shards("a")]
        if not any(setting.startswith("visft.model.weights=") for setting in chosen):
            weights, made = self._weights(seed)
            chosen += [f"visft.model.weights={weights}"] if weights else []
            needs = [*needs, *made]
        chosen += [f"visft.data.root={step.out}" for step in needs if step.stem in self._relabelled]
        words = self._words(stage, chosen)
        config, trained = self._checked(stage, tuple(chosen))
        ours = str(self.steps.root / STEPS)
        gaps = [] if self.scale.toy else missing_inputs(config)
        self.missing |= {gap.path: gap for gap in gaps if not gap.path.startswith(ours)}
        visft, training = config.visft, self.scale.training
        files = [visft.data.root, *(dataset.root for dataset in visft.data.sets), visft.model.weights, visft.heads.path]
        proof = ADAPTER_FOLDER if "lora" in trained else TRAINED_BACKBONE_FILE
        proof = f"{next(iter(visft.tasks.enabled()))}.safetensors" if stage == 1 else proof
        step = self.steps.add(
            kind,
            title,
            lambda out: [*training, *words, "--out", str(out)],
            needs=needs,
            # Not the command: arms that come to the same configuration are one training.
            identity={"configuration": config.fingerprint(), "files": files, "processes": self.scale.processes},
            resumes=True,
            proof=Path("export") / proof,
        )
        return _Training(step, config, trained)

    @cache  # noqa: B019  # a planner lives as long as its plan
    def _checked(self, stage: int, settings: tuple[str, ...]) -> tuple[ResolvedConfig, frozenset[str]]:
        """The configuration, and what trains; a glob that matches nothing is reported now."""
        config = resolve_arguments(self._words(stage, settings))[1]
        return config, self._trained(stage, tuple(one for one in settings if not one.startswith(_SHAPELESS)))

    @cache  # noqa: B019
    def _trained(self, stage: int, settings: tuple[str, ...]) -> frozenset[str]:
        config = resolve_arguments(self._words(stage, settings))[1]
        names = [name for group in plan_groups(config.visft, config.optimizer.params) for name in group.names]
        return frozenset("lora" if is_lora(name) else name.partition(".")[0] for name in names)

    def _words(self, stage: int, settings: Sequence[str]) -> list[str]:
        words = ["--stage", str(stage), "--model", self.scale.model, "--data", self._data]
        return words + [part for setting in settings for part in ("--set", setting)]

    def _recipe(self, stage: int) -> ResolvedConfig:
        return self._checked(stage, tuple(self.scale.stage_settings(stage)))[0]

    def _both(self, arm: Arm) -> tuple[str, ...]:
        """Settings of both stages: those of the arm, and where it takes another backbone."""
        if arm.tower and self.scale.base_file:
            raise ValueError("this question is about other towers than --base: leave that out")
        return (*arm.both, *(TOWERS[arm.tower].settings(self.scale.toy, TOY_SIDE) if arm.tower else ()))

    def _labels(self, arm: Arm, seed: int) -> list[Step]:
        """The shards with labels of other images that an arm learns from, if it does."""
        if not arm.permuted:
            return []
        shards = [self._toy.shards("a")] if self.scale.toy else []
        data = self._recipe(1).visft.data
        step = self._toy.permuted(self._data, (data.train, data.val), seed, shards)
        self._relabelled.add(step.stem)
        return [step]

    def _weights(self, seed: int) -> tuple[Path | None, list[Step]]:
        """File that trainings begin with where it is not that of the model's configuration, and its step."""
        if self.scale.base_file:
            file = self.scale.base_file[1]
            step = self._renamed
            return (step.out / BASE, [step]) if step else (file, [])
        if not self.scale.toy:
            return None, []
        base = self._base(seed)
        return clip_file(base), [base]

    @cached_property
    def _renamed(self) -> Step | None:
        return self._toy.weights(self.scale.base_file[1]) if self.scale.base_file else None

    def _given_heads(self, arm: Arm) -> bool:
        """Return True if heads are given: those of the model's own tower fit no other."""
        return self.scale.heads is not None and arm.tower is None

    def _base(self, seed: int) -> Step:
        return self._toy.base(seed if self.scale.vary_base else 0)

    @cached_property
    def _data(self) -> str:
        return str(self._toy.shards("a").out) if self.scale.data is None else self.scale.data

    def _first(self, recipe: Arm, seed: int) -> _Training:
        """The first training of a seed: stage 1, or where its heads are given the stage 2 of the recipe."""
        given = self._given_heads(recipe)
        return self._stage2(f"seed {seed}: recipe", recipe, seed) if given else self._stage1(recipe, seed)

    # ----------------------------------------------------------------------------------------- evaluations

    def _in_domain(self, title: str, arm: Arm, seed: int, trained: _Training | None) -> Step:
        """All heads on the validation images: those of before, and what the training put in their place.

        Every arm is judged on images as one and the same run prepares them.
        """
        tasks = ",".join(self._recipe(1).visft.tasks.enabled())
        recipe = replace(RECIPE, tower=arm.tower)
        run = self._first(recipe, seed)
        words = ["visft", "evaluate", "--run", str(run.step.out), "--images", "0", "--tasks", tasks]
        parts = trained.parts() if trained else []
        words += parts if "--adapter" in parts else [*parts, "--adapter", "none"]
        needs = [run.step, *([trained.step] if trained else [])]
        return self.steps.add("evaluation", title, lambda out: [*words, "--out", str(out)], needs=needs)

    def _out_of_domain(self, title: str, arm: Arm, seed: int, trained: _Training | None) -> Step:
        """Base and result in one table."""
        needs: list[Step] = []
        benchmarks: Sequence[str] = self.scale.benchmarks
        if self.scale.toy:
            needs, benchmarks = self._toy.benchmarks()
        if arm.tower:
            stage1 = self._stage1(arm, seed)
            needs.append(stage1.step)
            base, benchmarks = str(stage1.step.out), _without_text(benchmarks)
        elif self.scale.base_file:
            if arm.text:
                raise ValueError("--base is a model of timm, which has no text side that could learn")
            first = self._first(RECIPE, seed)
            needs.append(first.step)
            base, benchmarks = str(first.step.out), _without_text(benchmarks)
        elif self.scale.toy:
            needs.append(self._base(seed))
            base = str(clip_file(needs[-1]))
        else:
            model = self._recipe(2).visft.model
            base = str(local(model.weights)) if model.weights else ""
            if model.weights is None or model.timm:
                self._check_no_text(arm, "without weights" if model.weights is None else "of timm")
                first = self._first(RECIPE, seed)
                needs.append(first.step)
                if model.weights is None:
                    base = str(first.export / BACKBONE_FILE)  # every training writes its random base
                else:  # the run knows which model of timm its file is of
                    base = f"{first.step.out}@0" if self._given_heads(RECIPE) else str(first.step.out)
        after = base
        if trained is not None:
            step, after = self._whole(title, trained, merge=arm.text)
            needs.append(step)
        if arm.text:
            step = self._text(title, after, seed, needs)
            needs, after = [*needs, step], str(clip_file(step))
        words = ["visft", "evaluate", "benchmarks", "--images", "0"]
        words += ["--model", f"{BEFORE}={base}", "--model", f"{AFTER}={after}"]
        words += [part for benchmark in benchmarks for part in ("--benchmark", benchmark)]
        words += ["--text", self.scale.text] if self.scale.text else []
        words += ["--cache", str(self.steps.root / STEPS / "features")]
        title = f"{title}: out of domain"
        return self.steps.add("benchmarks", title, lambda out: [*words, "--out", str(out)], needs=needs, resumes=True)

    def _check_no_text(self, arm: Arm, kind: str) -> None:
        """Raise ValueError where a model without text side would need one; else it shows after all trainings."""
        asked = [f"--benchmark {benchmark}" for benchmark in self.scale.benchmarks if benchmark.startswith(_BY_TEXT)]
        asked += ["learning of texts"] if arm.text else []
        if asked:
            raise ValueError(
                f"--model {self.scale.model} is a model {kind} and has no text side for {', '.join(asked)}: give base "
                f"weights of a CLIP (--set visft.model.weights=FILE, or another --model), or ask for --benchmark "
                f"probe=SOURCE or digits"
            )

    def _whole(self, title: str, trained: _Training, *, merge: bool) -> tuple[Step, str]:
        """A step and what names its result to visft evaluate benchmarks.

        A backbone that trained itself was exported as it trained, without class token and text side: it is merged into
        its base, which has them.

        Args:
            merge: an adapter as well: text tuning leaves one out of the weights that it writes.
        """
        if "backbone" not in trained.trained and not merge:
            return trained.step, str(trained.step.out)
        layout = "timm" if trained.config.visft.model.timm else self.scale.layout
        words = ["visft", "merge", "--adapter", str(trained.step.out), "--format", layout]
        title = f"{title}: whole weights"
        step = self.steps.add("merged", title, lambda out: [*words, "--out", str(out / MERGED)], needs=[trained.step])
        return step, str(step.out / MERGED)

    def _text(self, title: str, model: str, seed: int, needs: Sequence[Step]) -> Step:
        """The text tower learns from the captions of the training images."""
        words = ["visft", "contrast", "text", "--model", model, "--data", self._data, "--train", "lora"]
        words += [*self.scale.text_flags, "--seed", str(seed)]
        needs = [*needs, self._toy.shards("a")] if self.scale.toy else needs
        title = f"{title}: text"
        return self.steps.add("text", title, lambda out: [*words, "--out", str(out)], needs=needs)


@cache
def _depth(preset: str, options: tuple[tuple[str, Any], ...]) -> int:
    """Number of blocks of a ViT, 0 for other networks."""
    return depth_of(build_empty(preset, torch.float32, dict(options)).state_dict())


def _filled(text: str, values: Mapping[str, str]) -> str:
    """A setting of an arm with the values that it names. Raises ValueError for a name that means nothing."""
    try:
        return Template(text).substitute(values)
    except KeyError as error:
        known = ", ".join(f"${name}" for name in values)
        raise ValueError(f"{text}: {error} is no name of a value; there are: {known}") from error


def _of(arm: Arm, seed: int) -> str:
    return f"{arm.tower}, seed {seed}" if arm.tower else f"seed {seed}"


def _without_text(benchmarks: Sequence[str]) -> list[str]:
    """Those that a tower without a text side can take part in. Raises ValueError where there is none."""
    kept = [benchmark for benchmark in benchmarks if not benchmark.startswith(_BY_TEXT)]
    if not kept:
        raise ValueError("towers without a text side are judged by probes: give a --benchmark probe=SOURCE or digits")
    return kept
