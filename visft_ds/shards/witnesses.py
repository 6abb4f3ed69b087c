"""What speaks of a split beside its shards: the manifest and index that are there, and the records of its build.

All of it may be damaged or foreign. A repair hears every witness, and says which it believed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from visft_ds.data.manifest import INDEX_DTYPE, VERSION, Category, index_path, manifest_digest, manifest_path
from visft_ds.shards.problem import some
from visft_ds.shards.tar_scan import BLOCK, parse_header
from visft_ds.shards.verify import UNKNOWN, WRITER, check_fields
from visft_ds.tasks.captioning.vocabulary import TOKENIZER


@dataclass(frozen=True)
class Rest:
    """The parts of a manifest that the shards do not say."""

    categories: Sequence[Category] = ()
    quarantine: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Witnesses:
    """Everything that is there, as far as it can be read."""

    manifest: Mapping[str, Any] | None  #: its fields, if it has the form of one, whatever its digest says
    record: Mapping[str, Any]  #: options and sources as the build recorded them, or nothing
    shard_records: Sequence[Mapping[str, Any]]  #: of each shard, or nothing
    rows: Sequence[npt.NDArray[Any] | None]  #: index rows of each shard; None where there is no index
    ours: bool  #: whether the shards were written by this project, which is stricter with its own

    @classmethod
    def gather(cls, root: Path, split: str, names: Sequence[str]) -> Witnesses:
        """Read what there is about the shards of these names."""
        work = root / f".{split}.build"
        record = _read_json(work / "options.json")
        record = record if isinstance(record.get("sources"), dict) else {}
        manifest = _read_manifest(root, split)
        ours = bool(record) or _is_ours(root / names[0], manifest)
        shard_records = [_read_json(work / f"{name}.json") for name in names]
        return cls(manifest, record, shard_records, _read_rows(root, split, len(names)), ours)

    @property
    def digest_fits(self) -> bool:
        """Whether the manifest is as it was written."""
        return self.manifest is not None and self.manifest.get("sha256") == manifest_digest(self.manifest)

    @property
    def good(self) -> bool:
        """Whether the manifest is as this version of the program wrote it."""
        return self.manifest is not None and self.digest_fits and self.manifest.get("version") == VERSION

    @property
    def digests(self) -> Mapping[str, str]:
        """Name -> sha256 of the shards as they were made, by the manifest if it is good, else by the records."""
        if self.manifest is not None and self.good:
            return {shard["name"]: shard["sha256"] for shard in self.manifest["shards"]}
        return {one["name"]: one["sha256"] for one in self.shard_records if {"name", "sha256"} <= one.keys()}

    @property
    def unknown(self) -> Sequence[str]:
        """What an earlier repair could not know."""
        return () if self.manifest is None else self.manifest["options"].get(UNKNOWN, ())

    @property
    def decoded(self) -> bool:
        """Whether the build decoded the pictures, so that the index has their hashes."""
        options = self.record or ({} if self.manifest is None else self.manifest["options"])
        return bool(options.get("check", "decode") == "decode")

    def rest(self) -> Rest:
        """What the manifest says beyond the shards."""
        if self.manifest is None:
            return Rest()
        table = [Category(**category) for category in self.manifest["categories"]]
        return Rest(table, *(self.manifest[name] for name in ("quarantine", "findings", "options", "sources")))

    def recover(self, used: set[int], given: Sequence[Mapping[str, Any]]) -> tuple[Rest, list[str]]:
        """What the shards do not say, from the best witness that there is.

        Args:
            used: raw ids of the categories that annotations have.
            given: entries {"id", "name"} of a COCO file.

        Returns:
            (the rest of the manifest, notes that say where it comes from).
        """
        rest, notes = self.rest(), []
        doubt = "" if self.digest_fits else ", whose digest does not fit: look whether they are right"
        unknown = set(self.unknown) - {"categories"} - ({"options", "sources"} if self.record else set())
        unknown |= set() if self.ours else {WRITER}
        options, sources = dict(rest.options), dict(rest.sources)
        options.pop(UNKNOWN, None)
        if self.record:
            options |= {name: value for name, value in self.record.items() if name not in ("version", "sources")}
            sources = self.record["sources"]
            notes.append("options and sources are those in the records of the build")
        elif self.manifest is not None:
            notes.append(f"options and sources are those of the old manifest{doubt}")
        else:
            unknown |= {"options", "sources"}
        if self.manifest is not None:
            notes.append(f"the quarantine list and the findings are those of the old manifest{doubt}")
        else:
            unknown |= {"quarantine", "findings"}
            notes.append("nothing tells how many shards there were: the last one that is there is taken for the last")
        table, nameless = self._categories(used, given, doubt, notes)
        unknown |= {"categories"} if nameless else set()
        if unknown:
            notes.append(f"marked as unknown in the options: {', '.join(sorted(unknown))}")
            options[UNKNOWN] = sorted(unknown)
        options["tokenizer"] = TOKENIZER
        return Rest(table, rest.quarantine, rest.findings, options, sources), notes

    def _categories(
        self, used: set[int], given: Sequence[Mapping[str, Any]], doubt: str, notes: list[str]
    ) -> tuple[list[Category], list[int]]:
        """(the table, raw ids of those whose names nothing tells)."""
        names = {category.coco_id: category.name for category in self.rest().categories}
        if "categories" in self.unknown:
            names = {number: name for number, name in names.items() if name != _placeholder(number)}
        if names:
            notes.append(f"the names of categories are those of the old manifest{doubt}")
        if given:
            names |= {entry["id"]: entry["name"] for entry in given}
            notes.append("the names of categories are those given")
        nameless = sorted(used - names.keys())
        if nameless:
            shown = some([str(number) for number in nameless])
            notes.append(f"nothing tells the names of categories {shown}: give --instances")
        names |= {number: _placeholder(number) for number in nameless}
        return [Category(place, number, names[number]) for place, number in enumerate(sorted(names))], nameless


def _placeholder(number: int) -> str:
    """The name of a category whose name nothing tells."""
    return f"category {number}"


def _read_manifest(root: Path, split: str) -> dict[str, Any] | None:
    fields = _read_json(manifest_path(root, split))
    try:
        check_fields(fields, split)
    except ValueError:  # it lacks something that a manifest has, so that nothing in it can be relied on
        return None
    return fields


def _read_rows(root: Path, split: str, shards: int) -> list[npt.NDArray[Any] | None]:
    """Rows of the index that is there, to give damage a name, for each shard; None where it cannot be read."""
    unknown: list[npt.NDArray[Any] | None] = [None] * shards
    path = index_path(root, split)
    if not path.is_file():
        return unknown
    # Not numpy.load: what it raises for a damaged header is no closed list.
    data = path.read_bytes()
    start = 10 + int.from_bytes(data[8:10], "little")
    rows = (len(data) - start) // INDEX_DTYPE.itemsize
    if rows < 1 or data[:start] != _index_header(rows):
        return unknown
    index = np.frombuffer(data, INDEX_DTYPE, rows, start)
    if np.any(np.diff(index["shard"]) < 0):
        return unknown
    first = np.searchsorted(index["shard"], np.arange(shards + 1))
    return [index[start:end] for start, end in pairwise(first.tolist())]


def _index_header(rows: int) -> bytes:
    """How the file of an index with so many rows begins."""
    buffer = io.BytesIO()
    entries = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(buffer, entries)
    return buffer.getvalue()


def _is_ours(path: Path, manifest: Mapping[str, Any] | None) -> bool:
    """By what an earlier repair found out, or by the first header of a shard."""
    if manifest is not None:
        return WRITER not in manifest["options"].get(UNKNOWN, ())
    with open(path, "rb") as file:
        block = file.read(BLOCK)
    try:
        return parse_header(block).canonical
    except ValueError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    try:
        content = orjson.loads(path.read_bytes()) if path.is_file() else {}
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}
