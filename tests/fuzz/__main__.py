"""Many damaged files for every reader: `python -m tests.fuzz --inputs 50000`; fails where one is a surprise.

A surprise is an exception that is not the documented one, more than 1 GiB of memory, or 2 s of CPU time. An input is
known by (seed, reader, number): `--reader NAME --number N` repeats it and shows the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.fuzz.readers import READERS, Reader

MEMORY = 1 << 30  #: bytes
CPU = 2.0  #: seconds
_HANGS = 60.0  #: seconds of the clock after which a call that does not return ends everything


#: (reader, seed, number) of inputs that were surprises once; they are read at every run.
FORMER = (
    ("images", 1, 909),
    ("torch legacy", 1, 507),
    ("heads", 0, 877),
    ("shards", 5, 1311),
    ("run", 11, 44),
    ("run of 0.1", 0, 230),
    ("heads", 1, 40),
    ("YOLO", 0, 4967),
    ("COCO JSON", 7, 1032),
)


@dataclass
class Tally:
    """Outcomes of a reader."""

    inputs: int = 0
    well: int = 0  #: right results and clear errors
    tracebacks: int = 0
    excesses: int = 0  #: of memory or time
    seconds: float = 0.0
    surprises: Counter[str] = field(default_factory=Counter)  #: kind -> how often
    examples: dict[str, int] = field(default_factory=dict)  #: kind -> the first such input


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Let this process have so much more memory than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _wants_memory(error: BaseException | None) -> bool:
    """Return True where an error, or one behind it, is about memory: a clear text does not make it a small request."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    """The last line of the package in a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/visft_ds/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error).splitlines()[0][:90] if str(error) else ''}"


def run(reader: Reader, numbers: Sequence[int], seed: int, *, show: bool = False) -> Tally:
    """Read so many damaged sets."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "valid"
        folder.mkdir()
        reader.make(folder)
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }
        work = Path(name) / "work"
        shutil.copytree(folder, work)
        reader.read(work)  # a valid set is read
        began = time.process_time()
        for number in numbers:
            rng = random.Random(f"{seed} {reader.name} {number}")
            changed = reader.damage[number % len(reader.damage)](rng, files)
            for place in work.rglob("*"):
                if place.is_file() and str(place.relative_to(work)) not in files:
                    place.unlink()
            for place, data in {**files, **changed}.items():
                (work / place).write_bytes(data)
            _one(reader, work, tally, number, show=show)
        tally.seconds = time.process_time() - began
    return tally


def _one(reader: Reader, work: Path, tally: Tally, number: int, *, show: bool) -> None:
    faulthandler.dump_traceback_later(_HANGS, exit=True)
    began, found = time.process_time(), ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            reader.read(work)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        if _wants_memory(error):
            found = f"memory: {_place(error)}"
            tally.excesses += 1
        elif not isinstance(error, reader.allowed):
            found = _place(error)
            tally.tracebacks += 1
        if show:
            traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    used = time.process_time() - began
    if used > CPU:
        found = f"{used:.1f} s of CPU time {found}"
        tally.excesses += 1
    tally.inputs += 1
    tally.well += not found
    if found:
        tally.surprises[found] += 1
        tally.examples.setdefault(found, number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz all readers, or one; returns 1 where there was a surprise."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=[one.name for one in READERS], help="this one alone")
    parser.add_argument("--number", type=int, help="this input of --reader alone, with its traceback")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Detected pickle protocol|invalid escape sequence")  # in pickles; torch goes on
    chosen = [one for one in READERS if given.reader in (None, one.name)]
    share = given.inputs / sum(one.share for one in chosen)
    tallies = {}
    with _bounded():
        for reader in chosen:
            first, count = (given.number, 1) if given.number is not None else (0, max(1, round(share * reader.share)))
            numbers = range(first, first + count)
            tallies[reader.name] = tally = run(reader, numbers, given.seed, show=given.number is not None)
            print(
                f"{reader.name:20} {tally.inputs:7} {tally.well:7} {tally.tracebacks:5} {tally.excesses:5} "
                f"{tally.seconds:7.1f} s",
                flush=True,
            )
            for found, count in tally.surprises.most_common():
                print(
                    f"    {count:5} x {found}  (--reader {reader.name!r} --number {tally.examples[found]})", flush=True
                )
    for name, seed, number in FORMER if given.reader is None else ():
        again = run(next(one for one in READERS if one.name == name), (number,), seed)
        for found in again.surprises:
            print(f"    again: {found}  (--reader {name!r} --seed {seed} --number {number})", flush=True)
        tallies[f"{name} {seed} {number}"] = again
    wrong = sum(one.tracebacks + one.excesses for one in tallies.values())
    print(f"{'all':20} {sum(one.inputs for one in tallies.values()):7} inputs, {wrong} surprises")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
