"""Output at the end of the demo: a report, one sheet of pictures, and a table on the screen.

The demo's folder holds stage1/ and stage2/ (runs), evaluation/{stage1,stage2}/, merged/backbone.safetensors and
shards/; where it began with pretrained weights, out_of_domain/; else evaluation/merged/ and, where there are few images
to train on, evaluation/{stage1,stage2}-train/.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from visft_ds.data.shards import Manifest
from visft_ds.evals.compare import Evaluation, compare_results, read_evaluation
from visft_ds.evals.out_of_domain import Comparison, read_comparison
from visft_ds.evals.report import Report, comparison, write_report
from visft_ds.interop.backbones import timm_settings
from visft_ds.interop.files import UNTIL, open_weights
from visft_ds.interop.layouts import tower_in
from visft_ds.interop.timm_names import create_model_call
from visft_ds.interop.towers import open_tower
from visft_ds.models.timm_backbone import build_timm
from visft_ds.monitor.console import Section, print_plan
from visft_ds.tasks import shown_metrics
from visft_ds.tasks.pictures import save_png


def show_demo(out: Path, durations: Mapping[str, float], *, photographs: Path | None, seconds: float) -> None:
    """Write report.html and comparison.png into the demo's folder and print what was learnt.

    Args:
        durations: step of the demo -> its seconds.
        photographs: the COCO tree it trained on; None: generated images.
        seconds: since the demo was started.

    Raises:
        ValueError: a run or evaluation that is not there.
    """
    held_out = [_evaluation(out, stage) for stage in (1, 2)]
    beyond = read_comparison(out / "out_of_domain") if (out / "out_of_domain").exists() else None
    merged = None if beyond else read_evaluation("merged", out / "evaluation/merged")
    trained = [
        _evaluation(out, stage, "-train") for stage in (1, 2) if (out / f"evaluation/stage{stage}-train").exists()
    ]
    files = {
        "heads": out / "stage1/export",
        "adapter (PEFT)": out / "stage2/export/adapter",
        "merged weights (timm)": out / "merged/backbone.safetensors",
        "results and pictures": out / "evaluation/stage2",
        **({"out of domain": out / "out_of_domain"} if beyond else {}),
        "comparison": out / "comparison.png",
        "report": out / "report.html",
    }
    report = Report(
        title="visft_ds demo",
        introduction=_introduction(photographs, len(Manifest.load(out / "shards", "train")), held_out[0].tasks, beyond),
        runs={"stage 1": out / "stage1", "stage 2": out / "stage2"},
        evaluations=held_out,
        beyond=beyond,
        merged=merged,
        training=trained,
        files={name: Path(short_path(path)) for name, path in files.items()},
        commands=_next_commands(out, files["merged weights (timm)"]),
        seconds=durations,
    )
    write_report(files["report"], report)
    sheet = comparison(trained or held_out)
    if sheet is not None:
        save_png(sheet, files["comparison"])
    times = [(name, f"{value:.0f}") for name, value in durations.items()] + [("all, now", f"{seconds:.0f}")]
    head = ("", *(evaluation.label for evaluation in held_out), "difference")
    names = [name for name in shown_metrics() if name in held_out[0].metrics]
    same = [(task, compare_results(held_out[1], merged, task).text()) for task in held_out[1].tasks if merged]
    tokenizer = held_out[1].tokenizer
    columns = (*head, "merged") if merged else head
    title = "in domain: held-out images" if beyond else "held-out images"
    sections = [
        *(_sections(beyond) if beyond else []),
        Section(title, [_row(name, held_out, merged) for name in names], columns),
        Section("training images", [_row(name, trained) for name in names] if trained else [], head),
        Section("captions", [("words", f"cut by {tokenizer}; papers print 100 times as much")] if tokenizer else []),
        Section("merged weights against the adapter", same),
        Section("seconds", times),
        Section("files", [(name, short_path(path)) for name, path in files.items()]),
    ]
    print()
    print_plan("visft_ds demo: done", [section for section in sections if section.rows])


def _sections(beyond: Comparison) -> list[Section]:
    lines = [(line.name, line.before, line.after, line.change) for line in beyond.lines()]
    title = "out of domain: drawings of another style, features frozen; percent, 95 % intervals over images, * is shown"
    return [Section(title, lines, ("", *beyond.labels, "difference")), Section("gained and lost", beyond.outcome())]


def short_path(path: Path | str) -> str:
    """A path as one would type it here. Links are not followed: python of an environment is a link out of it."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _evaluation(out: Path, stage: int, suffix: str = "") -> Evaluation:
    return read_evaluation(f"after stage {stage}", out / f"evaluation/stage{stage}{suffix}")


def _row(name: str, pair: list[Evaluation], merged: Evaluation | None = None) -> tuple[str, ...]:
    first, second = (evaluation.metrics[name] for evaluation in pair)
    numbers = (f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}")
    return (name, *numbers, f"{merged.metrics[name]:.3f}") if merged else (name, *numbers)


def _introduction(photographs: Path | None, images: int, tasks: list[str], beyond: Comparison | None) -> list[str]:
    what = f"{images} photographs of {photographs}" if photographs else f"{images} generated images of textured shapes"
    heads = f"heads for {', '.join(tasks[:-1])} and {tasks[-1]}" if len(tasks) > 1 else f"a head for {tasks[0]}"
    if beyond:
        return [
            f"Both stages of ViSFT on {what}, whose colours say nothing of them: first {heads} on EfficientNet-Lite0 "
            f"with ImageNet weights, then LoRA adapters in its late convolutions, trained through the frozen heads.",
            "It is judged where nothing was trained: on drawings of another style, by probes of its frozen features. "
            "This is one seed; intervals are over images and say nothing of other trainings.",
        ]
    return [
        f"Both stages of ViSFT on {what}: first {heads} on a frozen backbone, then LoRA adapters inside the backbone, "
        f"trained through the frozen heads.",
        "The backbone is tiny and starts from random weights, so the numbers show that the whole way works, not how "
        "good ViSFT makes a pretrained backbone."
        + (" Photographs it has not seen need a pretrained one and far more of them." if photographs else ""),
    ]


def _next_commands(out: Path, weights: Path) -> dict[str, str]:
    """Commands to go on with: purpose -> text to paste."""
    weight_file = open_weights(weights)
    if (of := timm_settings(weight_file)) is not None:
        until = weight_file.metadata.get(UNTIL)
        ending = build_timm(of[0], until=until, device="meta").ending()
        load = [
            "import timm, torch",
            "",
            f'model = timm.create_model("{of[0]}", checkpoint_path="{short_path(weights)}")',
        ]
        load += [*ending, f"model.forward_features  # images -> what {until} gives"]
    else:
        file, layout = open_tower(weights)
        load = [
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f"model = {create_model_call(tower_in(file, layout))}",
            f'weights = load_file("{short_path(weights)}")',
            'weights["pos_embed"] = weights["pos_embed"][:, 1:]  # this backbone has no class token',
            "model.load_state_dict(weights)",
        ]
    train = "\n".join(f"deepspeed --num_gpus 8 --module visft_ds.launch --stage {stage}" for stage in (1, 2))
    return {
        "Losses and pictures of both stages in TensorBoard:": f"tensorboard --logdir {short_path(out)}",
        "The merged weights in timm:": "\n".join(load),
        "The real thing, EVA-ViT-E on COCO; each command says what it still needs and how to make it:": train,
    }
