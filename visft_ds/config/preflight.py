"""Check for a run's input files before any process allocates a model: names only, no tensor library."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds.config.resolve import ResolvedConfig
from visft_ds.config.task_schema import TasksConfig

#: File name of published base weights -> command that fetches it into a folder. Sources: the model cards of
#: https://huggingface.co/QuanSun/EVA-CLIP and https://github.com/salesforce/LAVIS (lavis/models/eva_vit.py).
PUBLISHED_WEIGHTS = {
    "EVA02_CLIP_E_psz14_plus_s9B.pt": (
        "hf download QuanSun/EVA-CLIP EVA02_CLIP_E_psz14_plus_s9B.pt --local-dir {folder}"
    ),
    "eva_vit_g.pth": (
        "curl -L --create-dirs -o {folder}/eva_vit_g.pth "
        "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
    ),
}

#: Copies in a run's folder of what it was given.
INPUTS_FOLDER = "inputs"
#: Our tasks in the names of the published files (https://huggingface.co/TencentARC/ViSFT).
PUBLISHED_TASKS = {"detection": "detection", "segmentation": "segment", "captioning": "caption"}


@dataclass(frozen=True)
class Missing:
    """Missing input of a run."""

    what: str
    path: str  #: where it is looked for
    command: str  #: what makes it


def missing_inputs(config: ResolvedConfig) -> list[Missing]:
    """Shards, vocabulary, base weights and stage-1 heads that are not there; empty when the run can start."""
    return [*_shards(config), *_vocabulary(config), *_weights(config), *_heads(config)]


def _shards(config: ResolvedConfig) -> Iterator[Missing]:
    data = config.visft.data
    splits = {data.train: "training"} | ({data.val: "evaluation"} if config.visft.run.eval_every else {})
    for split, purpose in splits.items():
        manifest = Path(data.root) / f"{split}.manifest.json"
        if not is_url(data.root) and not manifest.is_file():
            command = (
                f"python tools/make_shards.py build --images COCO/{split}2017 "
                f"--instances COCO/annotations/instances_{split}2017.json "
                f"--captions COCO/annotations/captions_{split}2017.json --out {data.root} --split {split}"
            )
            yield Missing(f"shards for {purpose} (or name their folder with --data)", str(manifest), command)
    for one in data.sets:
        manifest = Path(one.root) / f"{one.split}.manifest.json"
        if not is_url(one.root) and not manifest.is_file():
            command = f"python tools/make_shards.py build ... --out {one.root} --split {one.split}"
            yield Missing(f"shards of the data set {one.name}", str(manifest), command)
        if one.categories is not None and not Path(one.categories).is_file():
            command = f"python tools/make_shards.py info {one.root} --split {one.split} --categories"
            yield Missing(f"categories of the data set {one.name} (its names)", one.categories, command)


def is_url(root: str) -> bool:
    """Return True if shards are read over a network; they are looked for only when they are opened."""
    return "://" in root and not root.startswith("file://")


def _vocabulary(config: ResolvedConfig) -> Iterator[Missing]:
    task = config.visft.tasks.captioning
    if task is None or task.vocabulary.file is None or Path(task.vocabulary.file).is_file():
        return
    command = "put it there, or take the words of the captions: --set visft.tasks.captioning.vocabulary.file=null"
    yield Missing("vocabulary of the captions", task.vocabulary.file, command)


def _weights(config: ResolvedConfig) -> Iterator[Missing]:
    model = config.visft.model
    if model.weights is None or Path(model.weights).is_file():
        return
    path = Path(model.weights)
    fetch = PUBLISHED_WEIGHTS.get(
        path.name, "put the file there, or name another one with --set visft.model.weights=FILE"
    )
    yield Missing(f"base weights of {model.name}", str(path), fetch.format(folder=path.parent))


def _heads(config: ResolvedConfig) -> Iterator[Missing]:
    heads = config.visft.heads
    if heads.path is None:
        return
    tasks = config.visft.tasks.enabled()
    absent = [task for task in tasks if not head_files(Path(heads.path), task)]
    if absent:
        command = f"deepspeed --num_gpus 8 launchers/train.py --stage 1 --model {config.visft.model.name}"
        if "visft.data.root" in config.sources:
            command += f" --data {config.visft.data.root}"
        if len(tasks) < len(TasksConfig.model_fields):
            command += f" --set visft.tasks={','.join(tasks)}"
        folder, where = Path(heads.path), heads.path
        if folder.is_dir():
            where = ", ".join(str(folder / f"{task}.safetensors") for task in absent)
            for inside in heads_inside(folder):
                if all(head_files(inside, task) for task in tasks):
                    command = f"the run has them in a folder of it: --set visft.heads.path={inside}"
        yield Missing(f"heads of stage 1: {', '.join(absent)} (or --set visft.heads.path=FOLDER)", where, command)


def heads_inside(run: Path) -> tuple[Path, Path]:
    """Folders of a run in which heads can lie: those that it was given and copied, and those that it trained."""
    return run / INPUTS_FOLDER / "heads", run / "export"


def head_files(folder: Path, task: str) -> list[Path]:
    """Files that may hold a task's head: ours, else those named as the published ones. `folder` may be a file."""
    if folder.is_file():
        return [folder]
    own = folder / f"{task}.safetensors"
    if own.is_file():
        return [own]
    published = (folder / f"eva_{tower}_{PUBLISHED_TASKS[task]}_heads.ckpt" for tower in ("e", "g"))
    return [path for path in published if path.is_file()]


def render_missing(missing: Sequence[Missing]) -> str:
    """Message for missing inputs: what is missing, where it was looked for, and the commands that make it, in order."""
    lines = [f"this run cannot start: {len(missing)} of its inputs {'is' if len(missing) == 1 else 'are'} missing"]
    for item in missing:
        lines += [f"  - {item.what}", f"    not found: {item.path}"]
    lines.append("make them with:")
    for item in missing:
        wrapped = textwrap.wrap(item.command, width=100, break_long_words=False, break_on_hyphens=False)
        lines.append("  " + " \\\n      ".join(wrapped))  # a backslash, so that it can be pasted as it stands
    return "\n".join(lines)
