"""Damage to files: bytes, the structure of JSON, and headers edited so that sizes and checksums fit again.

Every kind is a function of a random generator and the files of a valid set, name -> content, and returns those that it
changed.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from visft_ds.data.shards import INDEX_DTYPE, manifest_digest

Files = Mapping[str, bytes]
Damage = Callable[[random.Random, Files], dict[str, bytes]]
#: What is raised where a changed file is no object of which there is a digest.
_NO_RECORD = (ValueError, TypeError, AttributeError, RecursionError)
Refit = Callable[[dict[str, bytes], Files], None]

#: Stands for lists in each other, so many that no parser may follow them one call deeper each.
_DEEP = "deep-inside"
_NUMBERS = (0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30)
_TEXTS = (
    "",
    "x",
    "0",
    "1",
    "nan",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\0b",
    ".",
    "..",
    "é\u2028\ud83d\ude00",
    "x" * 5000,
)
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [1, 2], {"a": 1}, {"": []}, [{}], _DEEP)
_FLOATS = (0.5, -0.0, 1e308, 1e-308, -1.5, float("nan"), float("inf"), float("-inf"))
_VALUES: tuple[Any, ...] = (*_NUMBERS, *_TEXTS, *_OTHERS, *_FLOATS)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, put in, repeated, moved, set to zero, or numbers of eight bytes replaced."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(result) + 1)
        length = rng.choice((1, 2, 8, 64, 512))
        kind = rng.randrange(8)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[place:]
        elif kind == 2:
            result[place:place] = rng.randbytes(length)
        elif kind == 3:
            result[place:place] = result[place : place + length]
        elif kind == 4:
            del result[place : place + length]
        elif kind == 5:
            result[place : place + length] = bytes(length)
        elif kind == 6:
            number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
            result[place : place + 8] = number.to_bytes(8, rng.choice(("little", "big")))
        elif place < len(result):
            result[place] = rng.randrange(256)
    return bytes(result)


def raw(*names: str) -> Damage:
    """Damage to the bytes of one of these files, or its loss."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        name = rng.choice(names)
        return {name: damaged(rng, files[name])}

    return damage


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(object or list, key) of every value inside."""
    found, waiting = [], [value]
    while waiting:
        parent = waiting.pop()
        items = parent.items() if isinstance(parent, dict) else enumerate(parent) if isinstance(parent, list) else ()
        for key, inner in items:
            found.append((parent, key))
            waiting.append(inner)
    return found


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_VALUES))


def restructured(rng: random.Random, value: Any) -> Any:
    """The same JSON value with others in it, without some, or with more."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(value)
        if not places or rng.random() < 0.02:
            value = _value(rng)
            continue
        # Long lists of numbers are most of the places, and are all alike.
        parent, key = rng.choice(
            places if rng.random() < 0.5 else [one for one in places if isinstance(one[0], dict)] or places
        )
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice((*_TEXTS, "__class__", "schema", "extra"))] = _value(rng)
        elif kind == 1:
            parent.insert(key, _value(rng))
        elif kind == 2:
            other = rng.choice(places)
            parent[key] = json.loads(json.dumps(other[0][other[1]])) if other[1] in _keys(other[0]) else None
        elif kind == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = rng.choice(
                (parent[key] + 1, -parent[key], parent[key] * 1000, float(parent[key]), parent[key] * 2**40)
            )
        elif kind == 4 and isinstance(parent, dict):
            parent[rng.choice(_TEXTS)] = parent.pop(key)
        elif kind == 5 and isinstance(parent, list):
            parent.extend(parent[:] * rng.choice((1, 3)))
        else:
            parent[key] = _value(rng)
    return value


def _keys(parent: Any) -> Any:
    return parent if isinstance(parent, dict) else range(len(parent))


def dumped(rng: random.Random, value: Any) -> bytes:
    """A value as JSON; now and then with a key twice, in another encoding, or not quite JSON."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    depth = rng.choice((70, 300, 2000, 100_000))
    text = text.replace(f'"{_DEEP}"', rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)))
    kind = rng.randrange(24)
    if kind == 0 and ":" in text:  # a key twice
        start = text.index('"')
        text = (
            f"{text[:start]}{text[start : text.index(':', start)]}: {rng.choice(('null', '1', '[]'))}, {text[start:]}"
        )
    if kind == 1:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")), "surrogatepass")
    if kind == 2:
        return text.encode("utf-8", "surrogatepass").replace(b"a", b"\xff\xfe", 1)
    return text.encode("utf-8", "surrogatepass")


def record(name: str, refit: Refit = lambda changed, files: None) -> Damage:
    """Other values, keys and types in a JSON file; `refit` makes what describes it fit again."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        changed = {name: dumped(rng, restructured(rng, json.loads(files[name])))}
        refit(changed, files)
        return changed

    return damage


def lines(name: str) -> Damage:
    """The same in one line of a file of JSON lines."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        texts = files[name].splitlines()
        place = rng.randrange(len(texts))
        texts[place] = dumped(rng, restructured(rng, json.loads(texts[place]))).replace(b"\n", b" ")
        return {name: b"\n".join(texts) + b"\n"}

    return damage


def words(*names: str) -> Damage:
    """Other words and numbers in one of these text files, or none, or more."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        name = rng.choice(names)
        parts = re.split(r"(\s+)", files[name].decode())
        for _ in range(rng.choice((1, 1, 2, 4))):
            others = (str(_value(rng)), rng.choice(("&a *a", "!!int x", "{<<: *a}", "- - -", ": :", "|", "9" * 5000)))
            parts[rng.randrange(len(parts))] = rng.choice((*others, "", rng.choice(parts) * rng.choice((1, 2, 50))))
        return {name: "".join(parts).encode("utf-8", "surrogatepass")}

    return damage


def manifest(name: str) -> Refit:
    """The manifest's own digest fits."""

    def refit(changed: dict[str, bytes], files: Files) -> None:
        try:
            fields = json.loads(changed[name])
            fields["sha256"] = manifest_digest(fields)
            changed[name] = json.dumps(fields).encode()
        except _NO_RECORD:
            return  # it can have none

    return refit


def state(name: str) -> Refit:
    """The digest of a checkpoint's record fits."""

    def refit(changed: dict[str, bytes], files: Files) -> None:
        try:
            fields = json.loads(changed[name])
            fields.pop("sha256", None)
            fields["sha256"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
            changed[name] = json.dumps(fields).encode()
        except _NO_RECORD:
            return

    return refit


def hashed(name: str, described: str, inner: Damage) -> Damage:
    """Damage to a file of a checkpoint, whose record has the new hash and size."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        changed = inner(rng, files)
        fields, (data,) = json.loads(files[name]), changed.values()
        fields["files"][described] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        changed[name] = json.dumps(fields).encode()
        state(name)(changed, files)
        return changed

    return damage


def with_index(split: str, changed: dict[str, bytes], files: Files, index: bytes) -> dict[str, bytes]:
    """An index, and the manifest that describes it."""
    fields = json.loads(files[f"{split}.manifest.json"])
    fields["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    changed |= {f"{split}.index.npy": index, f"{split}.manifest.json": json.dumps(fields).encode()}
    manifest(f"{split}.manifest.json")(changed, files)
    return changed


def index_rows(split: str) -> Damage:
    """Other numbers in the rows of an index that its manifest describes; checksums of what the rows point at fit."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        data = files[f"{split}.index.npy"]
        rows = np.load(io.BytesIO(data)).copy()
        for _ in range(rng.choice((1, 1, 2, 5))):
            row, name = rng.randrange(len(rows)), rng.choice(INDEX_DTYPE.names or ())
            bits = np.iinfo(rows.dtype[name])
            number = rng.choice((*_NUMBERS, int(rows[row][name]) + rng.choice((-1, 1, 512)), rng.getrandbits(20)))
            rows[row][name] = min(max(number, int(bits.min)), int(bits.max))
        shard = files[f"{split}-000000.tar"]
        for row in rows if rng.random() < 0.5 else ():
            for part in ("image", "label"):
                start, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
                if 0 <= start <= start + size:
                    row[f"{part}_crc32"] = zlib.crc32(shard[start : start + size])
        return with_index(split, {}, files, data[: len(data) - rows.nbytes] + rows.tobytes())

    return damage


def index_bytes(split: str) -> Damage:
    """A damaged index, header included, that its manifest describes."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        data = files[f"{split}.index.npy"]
        if rng.random() < 0.5:
            shapes = (
                b"(99999999999,)",
                b"(-1,)",
                b"(2, 2)",
                b"()",
                b"(4.0,)",
                b"(4,)*9",
                b"None",
                b"(" * 99 + b")" * 99,
            )
            data = data.replace(b"(4,)", rng.choice(shapes), 1)
        else:
            data = damaged(rng, data[:256]) + data[256:]
        return with_index(split, {}, files, data)

    return damage


def labels(split: str) -> Damage:
    """Another label in a shard, whose place and checksum its index has."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        data = files[f"{split}.index.npy"]
        rows = np.load(io.BytesIO(data)).copy()
        row = rows[rng.randrange(len(rows))]
        shard = files[f"{split}-000000.tar"]
        start = int(row["label_offset"])
        label = json.loads(shard[start : start + int(row["label_size"])])
        if rng.random() < 0.3 and label["annotations"]:
            pixels = label["width"] * label["height"]
            code = {"size": [label["height"], label["width"]], "counts": [9, pixels - 9]}
            label["annotations"][0]["segmentation"] = code
        text = dumped(rng, restructured(rng, label))
        row["label_offset"], row["label_size"], row["label_crc32"] = len(shard), len(text), zlib.crc32(text)
        fields = json.loads(files[f"{split}.manifest.json"])
        fields["shards"][0]["bytes"] = len(shard) + len(text)
        known = {**files, f"{split}.manifest.json": json.dumps(fields).encode()}
        index = data[: len(data) - rows.nbytes] + rows.tobytes()
        return with_index(split, {f"{split}-000000.tar": shard + text}, known, index)

    return damage


def safetensors_header(name: str, entry: str | None = None) -> Damage:
    """Other values in the header of a .safetensors file, or in the JSON under `entry` of its metadata."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        data = files[name]
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if entry is None:
            text = dumped(rng, restructured(rng, header))
        else:
            told = dumped(rng, restructured(rng, json.loads(header["__metadata__"][entry])))
            header["__metadata__"][entry] = told.decode("utf-8", "replace")
            text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return {name: len(text).to_bytes(8, "little") + text + data[8 + length :]}

    return damage


def pickled(name: str) -> Damage:
    """Other opcodes, numbers and bytes in a pickle that stands as it is in the file."""

    def damage(rng: random.Random, files: Files) -> dict[str, bytes]:
        data = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.randrange(min(len(data), 4096))
            if rng.random() < 0.4:
                data[place] = rng.choice(b"].})(tRcbuaseqrKMJGXUBQ0\x80\x85\x86\x87\x88\x8a\x8c\x8e\x93\x95")
            elif rng.random() < 0.5:
                data[place : place + 4] = rng.choice((2**31 - 1, 2**30, 2**32 - 1)).to_bytes(4, "little")
            else:
                data[place] = rng.randrange(256)
        return {name: bytes(data)}

    return damage
