"""Scale of an experiment: toy scale makes its own images and base weights, any other model takes the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
#: Names of benchmarks by the style of their images.
HOME, _AWAY = "style-a", "style-b"
#: Where a second detection data set is looked for at other scales.
SECOND = "data/objects365"
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

    @property
    def toy(self) -> bool:
        """Return True if images and base weights are made on the way."""
        return self.data is None

    def stage_settings(self, stage: int) -> tuple[str, ...]:
        """--set values of a stage, the user's last."""
        toy = (*TOY_BOTH, *(TOY_STAGE1 if stage == 1 else TOY_STAGE2)) if self.toy else ()
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
        return self.processes == 1 and self.toy

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
        if scale.model != TOY_MODEL:
            raise ValueError(
                f"--model {scale.model} needs images: --data SHARDS, made by visft shards (toy images are for "
                f"--model {TOY_MODEL})"
            )
        given = [name for name in ("heads", "benchmarks", "text") if getattr(scale, name)]
        if given:
            names = ", ".join(f"--{name.rstrip('s') if name == 'benchmarks' else name}" for name in given)
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
