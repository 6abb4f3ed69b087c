"""Configurations of other libraries, searched for settings by which a library would run code of someone else's.

A model is weights and settings: loading one runs nothing of it. transformers imports Python files of a folder where
`auto_map` names them and `trust_remote_code` is set, and open_clip passes on what a folder says of its tokenizer, both
included. Tokenizers that are data (tokenizer.json, a SentencePiece model, a vocabulary with merges) need neither.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from visft_ds.files import read_bytes

#: Settings that name Python files to import, or allow it.
_CODE = frozenset({"auto_map", "custom_code", "custom_generate", "custom_pipelines", "trust_remote_code"})
#: End of settings that choose an implementation; a name with a slash is a repository of compiled code.
_IMPLEMENTATION = "_implementation"
#: Levels of lists and objects in each other; real configurations have about ten. Libraries walk them recursively.
DEEPEST = 64
#: By which open_clip and timm know a folder.
LOCAL = "local-dir:"


def check_folder(folder: Path) -> None:
    """Look through all configurations in a folder, as `check_config` does."""
    for path in _configs(folder):
        check_config(_parse(path), str(path))


def check_config(config: Any, source: str) -> None:
    """Look through a configuration, and those of every folder that it names, and that these name.

    Raises ValueError where one of them asks for code, is nested too deep or is no JSON object.
    """
    pending, seen = [(config, source)], {source}
    while pending:
        for path in [path for folder in _search(*pending.pop()) for path in _configs(folder)]:
            if str(path) not in seen:
                seen.add(str(path))
                pending.append((_parse(path), str(path)))


def _configs(folder: Path) -> list[Path]:
    """All that a library may read settings from; vocabularies (tokenizer.json, vocab.json) are not among them."""
    return sorted(folder.resolve().glob("*config*.json"))


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder or file of a configuration")
    try:
        content = json.loads(read_bytes(path, 2**24))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(_too_deep(str(path))) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object of settings, found {type(content).__name__}")
    return content


def _search(config: Any, source: str) -> list[Path]:
    """Folders that a configuration names. Raises ValueError as `check_config`."""
    folders = []
    pending: list[tuple[Any, tuple[str, ...]]] = [(config, ())]
    while pending:
        value, trail = pending.pop()
        if len(trail) > DEEPEST:
            raise ValueError(_too_deep(source))
        if isinstance(value, dict):
            for key, inner in value.items():
                if inner and (key in _CODE or (key.endswith(_IMPLEMENTATION) and "/" in str(inner))):
                    raise ValueError(_refusal(source, ".".join((*trail, key)), inner))
                pending.append((inner, (*trail, key)))
        elif isinstance(value, list):
            pending += [(inner, (*trail, str(index))) for index, inner in enumerate(value)]
        elif isinstance(value, str) and os.path.isdir(value.removeprefix(LOCAL)):  # also False for too long a name
            folders.append(Path(value.removeprefix(LOCAL)))
    return folders


def _too_deep(source: str) -> str:
    return f"{source} is nested deeper than {DEEPEST} levels, as no model's configuration is: fetch it again"


def _refusal(source: str, key: str, value: Any) -> str:
    return (
        f"{source}: {key} = {reprlib.repr(value)} asks for foreign code to be run, which no model file may. Remove "
        f"{key.rpartition('.')[2]} where the library has this model or tokenizer itself; a tokenizer can be data alone "
        f"(tokenizer.json, a SentencePiece model, a vocabulary with merges)"
    )
