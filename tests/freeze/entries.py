"""Entries: what a case leaves, as named values that two commits can be compared by.

An entry's name is a path of words without blanks; its value a number, a text, a truth value or null. What says when,
where or by what release a file was written is left out by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entries = dict[str, Any]

#: Keys of JSON files and of safetensors' metadata: releases, and hashes of whole files that hold a release's name.
LEFT_OUT = {
    *("visft_ds", "versions", "base_sha256", "trained_on", "sha256", "git"),
    *("started", "command", "time", "seconds"),
}
_BLANKS = re.compile(r"\s+")
_PROCESS = re.compile(r"tmp-\d+")
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")
#: Values of a step that do not depend on the clock.
_OF_A_STEP = re.compile(r"loss/.*|lr/.*|gradient_norm|loss_scale|skipped|refused|not_finite")


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A JSON value as entries; an empty list or object is one, too."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key not in LEFT_OUT:
                yield from flat(inner, f"{name}/{_BLANKS.sub('_', key)}")
    elif isinstance(value, list) and value and any(isinstance(inner, dict | list) for inner in value):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{name}/{place}")
    else:
        value = json.dumps(value) if isinstance(value, dict | list) else value
        yield name, value.replace(os.getcwd(), "WORK") if isinstance(value, str) else value


def text(content: str) -> str:
    """A text without this folder, numbers of processes, and hashes of whole files."""
    return _PROCESS.sub("tmp-N", _SHA256.sub("<sha256>", content.replace(os.getcwd(), "WORK")))


def metrics(path: Path) -> Entries:
    """All losses, rates and norms of the steps of a metrics.jsonl, and its evaluations."""
    found: Entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind, step = record.pop("kind"), record.pop("step")
        keep = _OF_A_STEP if kind == "step" else re.compile(r"(?!time$|seconds|.*_seconds$|.*per_second$)")
        found |= {f"{kind}{step}/{name}": value for name, value in record.items() if keep.match(name)}
    assert found, f"{path} has no steps"
    return found


def raw_tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, facts and bytes of every tensor of a .safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for name, facts in header.items():
        if name != "__metadata__":
            first, last = facts["data_offsets"]
            yield name, facts, body[first:last]


def metadata(path: Path) -> dict[str, str]:
    """Metadata of a .safetensors file."""
    content = path.read_bytes()
    found: dict[str, str] = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__", {})
    return found


def tensors(path: Path) -> Entries:
    """Type, shape and hash of every tensor of a .safetensors file, and its metadata."""
    found: Entries = {}
    for key, value in metadata(path).items():
        try:
            found |= flat({key: json.loads(value)}, "metadata")
        except json.JSONDecodeError:
            found |= flat({key: value}, "metadata")
    for name, facts, content in raw_tensors(path):
        shape = ",".join(map(str, facts["shape"]))
        found[name] = f"{facts['dtype']}[{shape}] {hashlib.sha256(content).hexdigest()[:16]}"
    return found


def pickled(path: Path) -> Entries:
    """Type, shape and hash of every tensor of a file of torch.save."""
    import torch  # what starts the comparison does without

    found: Entries = {}
    for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
        content = value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else str(value.item()).encode()
        shape = ",".join(map(str, value.shape))
        found[name] = f"{value.dtype}[{shape}] {hashlib.sha256(content).hexdigest()[:16]}"
    return found


def file(path: Path) -> Entries:
    """Entries of one file by its suffix; of unknown ones the hash."""
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix in (".pt", ".pth"):
        return pickled(path)
    if path.suffix == ".json":
        return {name.removeprefix("/"): value for name, value in flat(json.loads(path.read_text("utf-8")), "")}
    if path.suffix in (".md", ".txt"):
        return {"text": text(path.read_text(encoding="utf-8"))}
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def folder(path: Path, *, whole: bool = False) -> Entries:
    """Entries of all files below a folder but hidden ones, which are notes of a command for itself.

    Args:
        whole: only a hash of each file, for those that are promised byte by byte.
    """
    found: Entries = {}
    for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        name = inner.relative_to(path).as_posix()
        if name.startswith(".") or "/." in name:
            continue
        if whole:
            found[f"{name}/sha256"] = hashlib.sha256(inner.read_bytes()).hexdigest()
        else:
            found |= {f"{name}/{key}": value for key, value in file(inner).items()}
    assert found, f"{path} is empty"
    return found
