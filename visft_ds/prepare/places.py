"""Places of the files a run was given: those it has copies of, and those it only knows where they were.

    RUN/inputs/heads/...          the heads, under their own names
    RUN/inputs/vocabulary.json    the word map, where one was given
    RUN/inputs/categories.json    the categories of its heads: [{"id", "coco_id", "name"}, ...]
    RUN/run.json, "inputs"        base weights and shards: where they were, absolutely and from the run, and what proves
                                  them (sha256 of a file, fingerprint of a split)

`run.record` writes all of it when a run starts.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import INPUTS_FOLDER, head_files, heads_inside, run_of
from visft_ds.config.resolve import display
from visft_ds.config.schema import VisftConfig
from visft_ds.data.shards import Manifest, manifest_path
from visft_ds.pretrained import local
from visft_ds.run.folder import recorded_inputs, saved_something

WEIGHTS, HEADS, DATA = "visft.model.weights", "visft.heads.path", "visft.data.root"
WORDS = ".vocabulary.file"  #: end of the key of a word map
#: Inside RUN/inputs.
VOCABULARY_FILE, CATEGORIES_FILE = "vocabulary.json", "categories.json"
_REMEDIES = {
    WEIGHTS: f"--backbone FILE (evaluate), --base FILE (merge) or --set {WEIGHTS}=FILE (train)",
    DATA: f"--data FOLDER (train, evaluate) or --set {DATA}=FOLDER (train)",
}


def paths_of(config: VisftConfig) -> dict[str, str]:
    """Dotted key -> path of each file or folder that a configuration names as an input; not what a server has."""
    found = {WEIGHTS: config.model.weights, HEADS: config.heads.path, DATA: config.data.root}
    words = config.tasks.with_words()
    if words is not None:
        found[f"visft.tasks.{words[0]}{WORDS}"] = words[1].vocabulary.file
    for number, one in enumerate(config.data.sets):
        found[f"visft.data.sets.{number}.root"] = one.root
        found[f"visft.data.sets.{number}.categories"] = one.categories
    return {key: path for key, path in found.items() if path is not None and "://" not in path}


def with_paths(config: ResolvedConfig, paths: Mapping[str, str]) -> ResolvedConfig:
    """The same configuration with other paths, by dotted key as in `paths_of`."""
    visft = config.visft
    for key, path in paths.items():
        visft = _changed(visft, key.split(".")[1:], path)
    return replace(config, visft=visft)


def located(config: ResolvedConfig, run: Path, trusted: Collection[str] | None = None) -> ResolvedConfig:
    """The configuration with the paths at which the inputs of the run lie now.

    Args:
        trusted: keys whose path is a user's word: taken where it leads to something, whose content is compared by
            whoever opens it. None: all, and of a run that saved nothing, which need not be this one, nothing is taken.

    Raises:
        ValueError: as `find`.
    """
    if trusted is None and not saved_something(run):
        return config
    visft, found = config.visft, {}
    for key, path in paths_of(visft).items():
        if not ((trusted is None or key in trusted) and _is_there(visft, key, path)):
            found[key] = str(find(run, visft, key))
    return with_paths(config, found)


def of_parent(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration of a fork that has not begun, with the inputs of the run that it comes from where they lie now.

    Raises:
        ValueError: as `find`; a folder of its own that is that run's.
    """
    run = None if config.visft.start is None else run_of(Path(config.visft.start.path))
    out = Path(config.visft.run.out or "")
    if run is not None and run.resolve() == out.resolve():
        raise ValueError(f"--out {out} is the run to start from, which goes on without --from: name another folder")
    if run is None or saved_something(out):
        return config
    record = display(run / "run.json")
    return located(config, run, [key for key in paths_of(config.visft) if config.sources.get(key) != record])


def find(run: Path, config: VisftConfig, key: str, split: str | None = None) -> Path:
    """An input of a recorded run: its own copy; else what lies where the record says and has the recorded content.

    Looked at are the path as it was given (from the current folder), where that was, and the same way from the run as
    then: run and files may have been moved together. Without a record or copy the path counts as it was given.

    Args:
        key: as in `paths_of`.
        split: shards of this split will do where those of the recorded one are not.

    Raises:
        ValueError: nothing of the kind there; names each place, and what to give.
    """
    given = local(paths_of(config)[key]) if key == WEIGHTS else Path(paths_of(config)[key])
    copy = _copy(run, config, key, given.name)
    record = recorded_inputs(run).get(key)
    if copy is not None or record is None:
        return copy or given
    beside = Path(os.path.normpath(run.resolve() / record["beside"]))
    places: dict[str, Path] = {}
    for place in (given, Path(record["path"]), beside):
        places.setdefault(os.path.abspath(place), place)
    problems = []
    for place in places.values():
        problem = _problem(place, record, split)
        if problem is None:
            return place
        problems.append(f"\n  {place}: {problem}")
    wanted = f"sha256 {record['sha256']}" if "sha256" in record else f"fingerprint {record['fingerprint']}"
    raise ValueError(
        f"{key} of the run in {run} ({wanted}) is nowhere that it was:{''.join(problems)}\nname it by "
        f"{_REMEDIES.get(key, f'the configuration, {key}')}"
    )


def data_of_run(run: Path, config: VisftConfig, split: str) -> str:
    """Folder or URL of a run's shards, for one of their splits. Raises ValueError as `find`."""
    return str(find(run, config, DATA, split)) if DATA in paths_of(config) else config.data.root


def _copy(run: Path, config: VisftConfig, key: str, name: str) -> Path | None:
    """The run's own copy of an input, whose name was `name`; None where it has none."""
    if key.endswith(WORDS):
        words = run / INPUTS_FOLDER / VOCABULARY_FILE
        return words if words.is_file() else None
    if key != HEADS:
        return None
    folder = heads_inside(run)[0]
    if (folder / name).is_file():  # the run was given a file in place of a folder
        return folder / name
    return folder if _is_there(config, key, folder) else None


def _is_there(config: VisftConfig, key: str, path: str | Path) -> bool:
    """Return True if there is something of the kind at a path, whatever its content."""
    if key == HEADS:
        return all(head_files(Path(path), task) for task in config.tasks.enabled())
    if key == WEIGHTS:
        return local(path).is_file()
    path = Path(path)
    splits = {DATA: config.data.train} | {f"visft.data.sets.{n}.root": s.split for n, s in enumerate(config.data.sets)}
    return (manifest_path(path, splits[key]) if key in splits else path).is_file()


def _problem(place: Path, record: Mapping[str, str], split: str | None) -> str | None:
    """Reason against a place; None: what lies there is what the run has worked with."""
    if "sha256" in record:
        if not place.is_file():
            return "no such file"
        status = place.stat()
        found = _digest(place.resolve(), status.st_size, status.st_mtime_ns)
        return None if found == record["sha256"] else f"another file, sha256 {found}"
    if not manifest_path(place, record["split"]).is_file():
        other = split is not None and manifest_path(place, split).is_file()
        return None if other else f"no shards of {record['split']}"
    try:
        found = Manifest.load(place, record["split"]).fingerprint
    except ValueError as error:
        return str(error)
    return None if found == record["fingerprint"] else f"other shards, fingerprint {found}"


@cache
def _digest(path: Path, size: int, written: int) -> str:
    """sha256 of a file that may have gigabytes and is asked for again while a command starts."""
    from visft_ds.interop.weights import sha256_file  # imports torch, which costs seconds

    return sha256_file(path)


def _changed(value: Any, names: Sequence[str], path: str) -> Any:
    """A value of the configuration with another path in it, at the end of a chain of names and numbers."""
    if not names:
        return path
    if isinstance(value, tuple):
        return tuple(
            _changed(one, names[1:], path) if number == int(names[0]) else one for number, one in enumerate(value)
        )
    return value.model_copy(update={names[0]: _changed(getattr(value, names[0]), names[1:], path)})
