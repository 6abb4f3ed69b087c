"""Scale of an experiment: toy scale makes its own images and base weights, any other model takes the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from visft_ds.demo import PRETRAINED, PROBED
from visft_ds.demo import TRAIN as DEMO_TRAIN
from visft_ds.experiments.ablations.steps import Step, StepList
from visft_ds.flags import check_least

TOY_MODEL = "debug"
#: Images of the toy sets and their side in pixels; `b` is drawn in other colours, textures and grounds.
TOY_TRAIN, TOY_VAL, TOY_SIDE = 1500, 200, 112
#: Pictures of classes, to train probes with and to test.
TOY_CLASS_TRAIN, TOY_CLASS_TEST = 240, 480
#: Benchmarks beside those of the toy sets.
TOY_BUILT_IN = ("digits",)
#: How the base weights of the toy model learn from captions: its tower, and how long; then how texts learn alone.
TOY_PRETRAINING = ("--set", "width=128", "--set", "depth=2", "--set", "num_heads=4", "--steps", "400")
TOY_TEXT = ("--steps", "60", "--batch-size", "128", "--lr", "1e-3")
#: --set values of both stages at toy scale, then of one of them: a few minutes for all arms and seeds of a question.
TOY_BOTH = ("visft.run.rehearsal=false", "visft.run.save_every=1000", "visft.run.eval_every=0")
TOY_STAGE1 = ("scheduler.params.total_num_steps=300", "visft.shared.batch_size=12")
TOY_STAGE2 = (
    "scheduler.params.total_num_steps=60",
    "scheduler.params.warmup_num_steps=10",
    *(f"visft.tasks.{task}.batch_size=8" for task in ("detection", "segmentation", "captioning")),
)
#: Seed of the images of the second data set, of the same categories; those of the first are of seed 0.
TOY_SECOND_SEED = 1
#: Side of the toy images of a pretrained base in pixels; shapes that no training image shows.
EVEN_SIDE, HELD = 224, ("heart", "arrow")
#: Names of benchmarks by the style of their images; the last two are looked at once, when all is done.
HOME, AWAY, THIRD, HELD_OUT = "style-a", "style-b", "style-c", "held-out"
_BASE = re.compile(r"timm:([\w.]+)=(.+)")
#: Where a second detection data set is looked for at other scales.
SECOND = "data/objects365"
BASE = "base.safetensors"
#: How backbones are written whose base weights have no text side to keep.
_LAYOUTS = {"eva_g": "timm"}


@dataclass(frozen=True)
class Scale:
    """Size and data from a command line; equal for all questions of a folder."""

    model: str = TOY_MODEL  #: file of ds_configs/models
    processes: int = 1  #: of each training; more than one are started by deepspeed
    data: str | None = None  #: shards; None: toy images, made on the way
    second: str = SECOND  #: shards of the second data set
    heads: str | None = None  #: folder of stage-1 heads; None: they are trained
    benchmarks: tuple[str, ...] = ()  #: out of domain, as visft evaluate benchmarks takes them
    text: str | None = None  #: file with the text tower, where the base weights have none
    settings: tuple[str, ...] = ()  #: --set of every training
    vary_base: bool = False  #: toy base weights for each seed, instead of the same for all
    base: str | None = None  #: timm:NAME=FILE, in place of the weights of the model's file
    even: bool = False  #: toy images whose colours say nothing of their shapes

    @property
    def toy(self) -> bool:
        """Return True if images are made on the way."""
        return self.data is None

    @property
    def pretrained(self) -> bool:
        """Return True if the base is no toy that learns from toy captions, but one with weights of its own."""
        return not self.toy or self.model != TOY_MODEL

    @property
    def train(self) -> int:
        """Number of toy images to learn from."""
        return DEMO_TRAIN[PRETRAINED] if self.pretrained else TOY_TRAIN

    @cached_property
    def base_file(self) -> tuple[str, Path] | None:
        """(name in timm, file) of the base, where it is not that of the model's file. Raises ValueError without any."""
        if self.base is None:
            from visft_ds.interop.efficientnet import installed

            return ("tf_efficientnet_lite0", installed()) if self.even and self.model == PRETRAINED else None
        if (match := _BASE.fullmatch(self.base)) is None:
            raise ValueError(f"--base {self.base}: give timm:NAME=FILE, as in timm:tf_efficientnet_lite2=weights.pth")
        if not Path(match[2]).is_file():
            raise ValueError(f"--base {self.base}: {match[2]} is no file")
        return match[1], Path(match[2])

    def stage_settings(self, stage: int) -> tuple[str, ...]:
        """--set values of a stage, the user's last."""
        toy: tuple[str, ...] = TOY_BOTH if self.toy else ()
        if not self.pretrained:
            toy += TOY_STAGE1 if stage == 1 else TOY_STAGE2
        if self.base_file:
            toy += (f"visft.model.preset=timm:{self.base_file[0]}", f"visft.model.name={self.base_file[0]}")
        return (*toy, *self.settings)

    @property
    def text_flags(self) -> tuple[str, ...]:
        """Flags for the text tower's steps and learning rate."""
        return TOY_TEXT if self.toy else ()

    @property
    def layout(self) -> str:
        """Of weights with what trained in them: that of the base weights, so that its text side is kept."""
        return "open_clip" if self.toy else _LAYOUTS.get(self.model, "eva_clip")

    @property
    def alone(self) -> bool:
        """Return True if each training is one process without a launcher."""
        return self.processes == 1 and (self.toy or self.base_file is not None)

    @property
    def training(self) -> tuple[str, ...]:
        """Words of a training before its flags."""
        launched = ("deepspeed", "--num_gpus", str(self.processes), "--module", "visft_ds.launch")
        return ("visft", "train") if self.alone else launched


def check_scale(scale: Scale) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: another model than the toy one without data or benchmarks, or the toy one's things for toy images.
    """
    check_least(scale, processes=1)
    if scale.toy:
        if scale.model not in (TOY_MODEL, PRETRAINED):
            raise ValueError(
                f"--model {scale.model} needs images: --data SHARDS, made by visft shards (toy images are for "
                f"--model {TOY_MODEL} and {PRETRAINED})"
            )
        given = [name for name in ("heads", "text") if getattr(scale, name)]
        if given:
            names = ", ".join(f"--{name}" for name in given)
            raise ValueError(f"{names}: toy scale makes its own; give --data SHARDS too, or leave it out")
    elif not scale.benchmarks:
        raise ValueError(
            "out of domain is what ViSFT is about: give one --benchmark KIND=SOURCE or more (docs/evaluation.md), for "
            "example --benchmark zero_shot=imagenet-a --benchmark digits"
        )
    if scale.heads is not None and not Path(scale.heads).exists():
        raise ValueError(f"--heads {scale.heads}: no such folder")


# ----------------------------------------------------------------------------------------------------------- toy scale


class Toy:
    """Toy data sets and base weights. Their seed is not that of a trial: all trials see the same images."""

    def __init__(self, steps: StepList, scale: Scale) -> None:
        self.steps, self.scale = steps, scale
        self.side = EVEN_SIDE if scale.pretrained else TOY_SIDE

    def images(self, style: str, train: int, seed: int = 0, val: int = TOY_VAL) -> Step:
        """A COCO tree of drawn images."""
        words = ["visft", "toy", "--train", str(train), "--val", str(val), "--size", str(self.side)]
        words += ["--style", style, "--seed", str(seed), "--workers", "1"]
        words += ["--colours", "even"] if self.scale.even else []
        words += ["--without", ",".join(HELD)] if self.scale.even and style != "c" else []
        return self.steps.add("images", f"toy images, style {style}", lambda out: [*words, "--out", str(out)])

    def shards(self, style: str, seed: int = 0) -> Step:
        """Shards of both splits; `out` is their folder."""
        tree = self.images(style, self.scale.train, seed)
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

    def weights(self, base: Path) -> Step | None:
        """Base weights under the names that trainings read, where the file has others; `out` is the new one."""
        from visft_ds.interop.efficientnet import holds_efficientnet
        from visft_ds.interop.files import open_weights

        if not holds_efficientnet(open_weights(base)):
            return None
        words = ["visft", "merge", "--base", str(base), "--format", "timm"]
        title = f"weights of {base.name}"
        return self.steps.add("weights", title, lambda out: [*words, "--out", str(out / BASE)])

    def permuted(self, shards: str, splits: tuple[str, str], seed: int, needs: Sequence[Step]) -> Step:
        """Shards in which every image has the labels of another one, of the splits to train on and to validate."""
        words = ["visft", "shards", "permute", shards, "--seed", str(seed)]
        title = f"seed {seed}: labels of other images"
        tree = self.steps.add("permuted", title, lambda out: [*words, "--out", str(out)], needs=needs)
        return self._packed(tree, splits[1], self._packed(tree, splits[0], None))

    def dense(self, style: str = "b") -> Step:
        """Drawings of another style with masks, to learn probes from and to judge."""
        learnt, judged = (round(share * DEMO_TRAIN[PRETRAINED]) for share in PROBED)
        return self.images(style, learnt, val=judged)

    def benchmarks(self) -> tuple[list[Step], list[str]]:
        """Steps that make benchmark data, and the benchmarks: all out of domain but for the captions of style a."""
        if self.scale.even:
            away = self.dense()
            kept = [f"retention={away.out / 'val2017'},name={AWAY}"] if self.scale.pretrained else []
            return [away], [f"dense={away.out},name={AWAY}", *kept, *self.scale.benchmarks]
        home, away, classes = self.images("a", self.scale.train), self.images("b", 0), self.classes("b")
        asked = [f"retrieval={tree.out},name={name}" for tree, name in ((home, HOME), (away, AWAY))]
        asked += [f"{kind}={classes.out},name={AWAY}" for kind in ("zero_shot", "probe")]
        return [home, away, classes], [*asked, *TOY_BUILT_IN, *self.scale.benchmarks]


def clip_file(step: Step) -> Path:
    """The weights that visft contrast leaves."""
    return step.out / "open_clip_model.safetensors"
