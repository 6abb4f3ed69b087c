"""A strict scan of a tar, which reports damage instead of stopping early.

Python's tarfile, and with it every WebDataset reader, takes a damaged header in the middle for the end of the
archive: the rest of a shard is lost silently. Here nothing is skipped. Whatever is neither a member nor the proper
end is a `Damage`, and the scan goes on at the next block that is a valid header, so that one bad byte costs one sample.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = 512
#: Limit of a payload in bytes, far above any image: a damaged header could otherwise claim all memory.
MAX_PAYLOAD = 1 << 28
_MAX_EXTENDED = 1 << 20
_ZERO = bytes(BLOCK)

_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_TYPES = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a character device",
    "4": "a block device",
    "5": "a folder",
    "6": "a FIFO",
    "g": "a global extended header",
    "x": "an extended header",
    "L": "a GNU long name",
    "K": "a GNU long link",
    "S": "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    header: int  #: offset of its first header
    offset: int  #: of its payload
    payload: bytes = field(repr=False)


@dataclass(frozen=True)
class Damage:
    """Something in a tar that is neither a whole regular file nor the end of the archive."""

    offset: int
    message: str
    cut: bool = False  #: whether it is a good header whose payload goes on behind the end of the file


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    kind: str  #: the type flag; "0" for a regular file
    canonical: bool  #: byte for byte what `shard_writer.TarWriter` writes for this name and size


class TarScan:
    """Iterate over the members and damages of a tar of `size` bytes, in order.

    Args:
        file: opened for reading at its start.
        size: of the file in bytes.
        plain: accept what other programs write as well: owners and times, GNU and POSIX long names, folders (which are
            skipped). Else every header must be exactly what this project writes.

    After the iteration `sha256` is the digest of the whole file. At most one payload is in memory at a time.
    """

    def __init__(self, file: BinaryIO, size: int, *, plain: bool = False) -> None:
        self._file, self._size, self._plain = file, size, plain
        self._digest = hashlib.sha256()
        self._pushed: bytes | None = None  # a block that was read too early
        self._ended = False
        self.offset = 0

    @property
    def sha256(self) -> str:
        """Digest of what was read, in hexadecimal."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Member | Damage]:
        searching = False  # after damage, for the next header
        extended: dict[str, str] = {}  # what extended headers say about the member that follows
        first = 0  # offset of the first header of a member
        while block := self._block():
            start = self.offset - len(block)
            if block == _ZERO and searching:
                continue
            if block == _ZERO:
                yield from self._end(start)
                searching = self._pushed is not None
                continue
            try:
                header = parse_header(block)
            except ValueError as error:
                if not searching:
                    yield Damage(start, str(error))
                searching, extended = True, {}
                continue
            if (refused := self._refuse_size(header, start)) is not None:
                yield refused
                searching, extended = True, {}
                continue
            searching = False
            first = first if extended else start
            data = self._take(header.size + -header.size % BLOCK)
            if any(data[header.size :]):
                yield Damage(start + BLOCK + header.size, f"the padding behind {header.name!r} is not empty")
            payload = data[: header.size]
            if self._plain and header.kind in "xgL":
                try:
                    extended |= _extended(header.kind, payload)
                except ValueError as error:
                    yield Damage(start, str(error))
                continue
            if header.kind != "0":
                if not (self._plain and header.kind == "5"):
                    what = _TYPES.get(header.kind, f"of type {header.kind!r}")
                    yield Damage(start, f"member {header.name!r} is {what}; only regular files are allowed")
            else:
                if not header.canonical and not self._plain:
                    yield Damage(start, f"the header of {header.name!r} is valid, but not the one that was written")
                yield Member(extended.get("path", header.name), first, start + BLOCK, payload)
            extended = {}
        if not searching and not self._ended:
            yield Damage(self._size, "the end of the archive is missing: the file was cut")

    def _end(self, start: int) -> Iterator[Damage]:
        """After a first empty block: the rest must be empty too, at least one block more."""
        blocks = 1
        while (block := self._take(BLOCK)) == _ZERO:
            blocks += 1
        if block:
            self._pushed = block
            left = self._size - self.offset + len(block)
            yield Damage(start, f"{blocks} empty blocks, where other tar programs stop, but {left} bytes follow")
        elif blocks == 1:
            yield Damage(start, "a single empty block at the end instead of two: the file was cut")
        self._ended = not block

    def _refuse_size(self, header: _Header, start: int) -> Damage | None:
        left = self._size - start - BLOCK
        if header.size > left:
            return Damage(start, f"{header.name!r} is cut: only {left} of {header.size} bytes are there", cut=True)
        limit = MAX_PAYLOAD if header.kind == "0" else _MAX_EXTENDED
        if header.size > limit:
            return Damage(start, f"{header.name!r} has {header.size} bytes; allowed are {limit}")
        return None

    def _block(self) -> bytes:
        if self._pushed is not None:
            block, self._pushed = self._pushed, None
            return block
        return self._take(BLOCK)

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.offset += len(data)
        return data


def parse_header(block: bytes) -> _Header:
    """Read one header block. Raises ValueError that says which part of it is wrong."""
    if len(block) < BLOCK:
        raise ValueError(f"the file ends in the middle of a block ({len(block)} bytes)")
    written = _octal(block[148:156])
    # In the sum, the field of the sum itself counts as eight spaces.
    if written is None or written != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ValueError("the checksum of the header does not fit")
    magic = block[257:265]
    if magic not in (b"ustar\x0000", b"ustar  \0"):
        raise ValueError(f"no USTAR header: magic {magic!r}")
    size = _octal(block[124:136])
    if size is None:
        raise ValueError(f"the header has no octal size: {block[124:136]!r}")
    try:
        name, prefix = _text(block[:100]), _text(block[345:500]) if magic.endswith(b"00") else ""
    except ValueError as error:
        raise ValueError(f"the name in the header is not UTF-8: {error}") from error
    canonical = (
        block[100:124] == _TEMPLATE[100:124]
        and block[124:136] == b"%011o\0" % size
        and block[136:148] == _TEMPLATE[136:148]
        and block[148:156] == b"%06o\0 " % written
        and block[156:] == _TEMPLATE[156:]
        and name.encode() == block[:100].rstrip(b"\0")
    )
    kind = "0" if block[156] == 0 else chr(block[156])
    return _Header(f"{prefix}/{name}" if prefix else name, size, kind, canonical)


def _octal(field: bytes) -> int | None:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8")


def _extended(kind: str, payload: bytes) -> dict[str, str]:
    """Parse an extended header into the name of the next member, {"path": name} or {}.

    Raises ValueError if it is malformed, changes a size, describes a sparse file or names all members.
    """
    if kind == "L":
        return {"path": _text(payload)}
    known: dict[str, str] = {}
    rest = payload
    while rest:
        length, _, _ = rest.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(rest):
            raise ValueError("an extended header is malformed")
        name, _, value = rest[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if name == b"size" or name.startswith(b"GNU.sparse"):
            raise ValueError(f"an extended header changes {name.decode('ascii', 'replace')}: write the tar as USTAR")
        if name == b"path":
            known["path"] = value.decode("utf-8")
        rest = rest[int(length) :]
    if kind == "g" and known:
        raise ValueError("a global extended header gives all members one name")
    return known
