"""The steps that toy scale begins with: drawn images, their shards, and a backbone that has learnt from captions."""

from __future__ import annotations

from pathlib import Path

from visft_ds.experiments.ablations.scales import (
    TOY_BUILT_IN,
    TOY_CLASS_TEST,
    TOY_CLASS_TRAIN,
    TOY_PRETRAINING,
    TOY_SIDE,
    TOY_TRAIN,
    TOY_VAL,
)
from visft_ds.experiments.ablations.steps import Step, StepList

#: Seed of the images of the second data set, of the same categories; those of the first are of seed 0.
SECOND = 1
#: Names of benchmarks by the style of their images.
HOME, _AWAY = "style-a", "style-b"


class Toy:
    """Toy data sets and base weights. Their seed is not that of a trial: all trials see the same images."""

    def __init__(self, steps: StepList) -> None:
        self.steps = steps

    def images(self, style: str, train: int, seed: int = 0) -> Step:
        """A COCO tree of drawn images."""
        words = ["visft", "toy", "--train", str(train), "--val", str(TOY_VAL), "--size", str(TOY_SIDE)]
        words += ["--style", style, "--seed", str(seed), "--workers", "1"]
        return self.steps.add("images", f"toy images, style {style}", lambda out: [*words, "--out", str(out)])

    def shards(self, style: str, seed: int = 0) -> Step:
        """Shards of both splits; `out` is their folder."""
        tree = self.images(style, TOY_TRAIN, seed)
        train = self._packed(tree, "train", None)
        return self._packed(tree, "val", train)

    def _packed(self, tree: Step, split: str, inside: Step | None) -> Step:
        notes = tree.out / "annotations"
        words = ["visft", "shards", "build", "--images", str(tree.out / f"{split}2017"), "--split", split]
        words += ["--instances", str(notes / f"instances_{split}2017.json"), "--quiet"]
        words += ["--captions", str(notes / f"captions_{split}2017.json")]
        title = f"shards of {tree.title.removeprefix('toy ')}: {split}"
        return self.steps.add(
            "shards",
            title,
            lambda out: [*words, "--out", str(out)],
            needs=[tree],
            inside=inside,
            resumes=True,
        )

    def base(self, seed: int) -> Step:
        """A small CLIP that has learnt from images and captions of style a; `clip_file` are its weights."""
        shards = self.shards("a")
        words = ["visft", "contrast", "pretrain", "--data", str(shards.out), *TOY_PRETRAINING, "--seed", str(seed)]
        title = f"seed {seed}: base weights"
        return self.steps.add("base", title, lambda out: [*words, "--out", str(out)], needs=[shards])

    def classes(self, style: str) -> Step:
        """Pictures of one shape in folders of classes, to train and to test."""
        words = ["visft", "toy", "--classification", "shape", "--size", str(TOY_SIDE), "--style", style]
        words += ["--train", str(TOY_CLASS_TRAIN), "--val", str(TOY_CLASS_TEST)]
        return self.steps.add("classes", f"toy classes, style {style}", lambda out: [*words, "--out", str(out)])

    def benchmarks(self) -> tuple[list[Step], list[str]]:
        """Steps that make benchmark data, and the benchmarks: all out of domain but for the captions of style a."""
        home, away, classes = self.images("a", TOY_TRAIN), self.images("b", 0), self.classes("b")
        asked = [f"retrieval={tree.out},name={name}" for tree, name in ((home, HOME), (away, _AWAY))]
        asked += [f"{kind}={classes.out},name={_AWAY}" for kind in ("zero_shot", "probe")]
        return [home, away, classes], [*asked, *TOY_BUILT_IN]


def clip_file(step: Step) -> Path:
    """The weights that visft contrast leaves."""
    return step.out / "open_clip_model.safetensors"
