"""Two commits side by side on this machine: what they compute, write and print, and whether any of it differs.

    python -m tests.freeze 584c6d3 HEAD             tier 1, at every commit: losses, exports, shards, samples of steps
    python -m tests.freeze 584c6d3 HEAD --tier 2    and, before a push: merged formats, planner, evaluation, texts, ...

Differences that are meant stand in tests/golden/removed.txt of the newer commit: an entry's name or a glob, then why.
Results are kept by commit, machine and release of torch in ~/.cache/visft_ds/freeze.
Exit status: 0 equal but for that list, 1 different, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.freeze.cases import TOLERANCES
from tests.freeze.worker import ENVIRONMENT

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LIST = "tests/golden/removed.txt"
#: Tier -> files that decide about its results.
SOURCES = {1: ("cases.py", "entries.py", "tier1.py", "worker.py"), 2: ("tier2.py", "bad_commands.txt")}
ABSENT = object()
SHOWN = 4  # differences of a case


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.freeze", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", nargs="?", default="HEAD", help="another one (HEAD)")
    parser.add_argument("--tier", type=int, choices=(1, 2), default=1, help="2: also what takes minutes (1)")
    parser.add_argument("--coco", type=Path, metavar="DIR", help="tier 2: a small COCO tree as well")
    parser.add_argument("--fresh", action="store_true", help="compute both, whatever is kept of earlier comparisons")
    parser.add_argument("--all", action="store_true", help=f"show more than {SHOWN} differences of a case")
    given = parser.parse_args(arguments)
    if given.coco is not None and not (given.coco / "annotations").is_dir():
        parser.error(f"--coco {given.coco} has no annotations/")
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # workers must not outlive this process
    try:
        commits = [_git("rev-parse", "--verify", f"{name}^{{commit}}").strip() for name in (given.old, given.new)]
        listed = _listed(commits[1])
    except subprocess.CalledProcessError as error:
        parser.error(error.stderr.strip())
    old, new = _results(commits, given.tier, given.coco, fresh=given.fresh)
    print(f"freeze {commits[0][:9]} -> {commits[1][:9]}, tier {given.tier}, {time.perf_counter() - began:.0f} s")
    return report(old, new, listed, most=None if given.all else SHOWN)


def report(old: Mapping[str, Any], new: Mapping[str, Any], listed: Mapping[str, str], most: int | None) -> int:
    """Print what differs; returns the exit status.

    Args:
        old, new: results of a worker.
        listed: name or glob of an entry -> why it may differ.
        most: differences of a case to print; None: all.
    """
    differing = dict(differences(old["entries"], new["entries"]))
    for side, results in (("old", old), ("new", new)):
        differing |= {name: (f"[{side}] ran", why) for name, why in results["failed"].items()}
        for name, why in results["skipped"].items():
            print(f"skipped  {name} ({side}): {why}")
    reasons = {
        name: next((glob for glob in listed if name == glob or fnmatch.fnmatchcase(name, glob)), None)
        for name in differing
    }
    wrong = {name: pair for name, pair in differing.items() if reasons[name] is None}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in wrong:
        groups["/".join(name.split("/")[:2])].append(name)
    for group, names in groups.items():
        names.sort(key=lambda name: "/step" not in name)  # losses say more than hashes
        for name in names[:most]:
            print("\n".join(shown(name, *wrong[name])))
        if len(names) > len(names[:most]):
            print(f"  ... and {len(names) - len(names[:most])} more under {group} (--all)")
    used = {glob for glob in reasons.values() if glob is not None}
    kinds = {name.split("/")[0] for name in old["entries"]}  # those of tier 2 were not looked at in tier 1
    for glob in sorted(glob for glob in listed.keys() - used if glob.split("/")[0] in kinds):
        print(f"no longer different: {glob} ({listed[glob]})")
    compared = len(old["entries"].keys() | new["entries"].keys())
    if wrong:
        print(f"{len(wrong)} of {compared} entries differ, {len(differing) - len(wrong)} more are in {LIST}")
        return 1
    print(f"equal but for the list: {compared} entries, {len(differing)} of them differ as {LIST} says")
    return 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Entries that only one has, or that are not equal (within `TOLERANCES`)."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, ABSENT), new.get(name, ABSENT)
        if type(before) is type(after) and (before == after or (before != before and after != after)):
            continue
        allowed = next((most for glob, most in TOLERANCES.items() if fnmatch.fnmatchcase(name, glob)), 0.0)
        numbers = isinstance(before, int | float) and isinstance(after, int | float)
        if allowed and numbers and abs(before - after) <= allowed * max(abs(before), abs(after)):
            continue
        yield name, (before, after)


def shown(name: str, before: Any, after: Any) -> Iterator[str]:
    """Lines that say how an entry differs; of long texts only the lines that do."""
    if isinstance(before, str) and isinstance(after, str) and "\n" in before + after:
        yield f"differs  {name}:"
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        yield from (f"    {line}" for line in list(lines)[2:])
        return
    values = ["(absent)" if value is ABSENT else value for value in (before, after)]
    yield f"differs  {name}: {values[0]} -> {values[1]}"


def _listed(commit: str) -> dict[str, str]:
    """Entries that may differ at a commit -> why. Lines are `NAME REASON`; empty ones and those with # are none."""
    try:
        content = _git("show", f"{commit}:{LIST}")
    except subprocess.CalledProcessError:
        return {}  # a commit from before the list
    lines = [line.split(maxsplit=1) for line in content.splitlines() if line.strip() and not line.startswith("#")]
    bare = [line[0] for line in lines if len(line) < 2]
    if bare:
        raise SystemExit(f"{LIST}: no reason behind {bare[0]}")
    return {name: why for name, why in lines}


def _results(commits: Sequence[str], tier: int, coco: Path | None, *, fresh: bool) -> list[dict[str, Any]]:
    """Results of the commits, kept ones or computed side by side."""
    places = [_kept(commit, tier, coco) for commit in commits]
    found = {} if fresh else {place: _read(place) for place in places if place.is_file()}
    with tempfile.TemporaryDirectory(prefix="freeze-", ignore_cleanup_errors=True) as temporary:
        # The same commit twice is computed twice only where that is asked for.
        folders = {Path(temporary, str(at)): at for at in range(len(commits)) if places[at] not in found}
        if not fresh and places[0] == places[1]:
            folders = dict(list(folders.items())[:1])
        jobs = max(1, len(os.sched_getaffinity(0)) // max(1, len(folders)))
        workers = {folder: _start(folder, commits[at], tier, jobs, coco) for folder, at in folders.items()}
        computed = {}
        try:
            for folder, worker in workers.items():
                if worker.wait():
                    raise SystemExit(
                        f"the worker of {commits[folders[folder]]} ended with exit status {worker.returncode}"
                    )
                computed[folders[folder]] = _read(folder / "result.json")
        finally:
            for worker in workers.values():
                with contextlib.suppress(ProcessLookupError):  # raised when nobody of the group is left
                    os.killpg(worker.pid, signal.SIGKILL)  # a worker and the cases it is at
    for at, results in computed.items():
        found[places[at]] = results
        if not results["failed"]:  # a failure may be the machine's
            places[at].parent.mkdir(parents=True, exist_ok=True)
            places[at].write_text(json.dumps(results), encoding="utf-8")
    return [computed.get(at, found[places[at]]) for at in range(len(commits))]


def _read(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _start(folder: Path, commit: str, tier: int, jobs: int, coco: Path | None) -> subprocess.Popen[bytes]:
    """Check a commit out and start its worker."""
    checkout = folder / "code"
    checkout.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=REPOSITORY, check=True, capture_output=True)
    subprocess.run(["tar", "-x"], cwd=checkout, input=archive.stdout, check=True)
    words = [checkout, folder / "work", folder / "result.json", f"tier{tier}", jobs]
    words += [] if coco is None else [coco.resolve()]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.freeze.worker", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(checkout)},
        start_new_session=True,
    )


def _kept(commit: str, tier: int, coco: Path | None) -> Path:
    """Where results are kept: they hold for a commit, these cases, this machine and the libraries that compute."""
    sources = [(HERE / name).read_bytes() for number in range(1, tier + 1) for name in SOURCES[number]]
    libraries = [f"{name} {version(name)}" for name in ("torch", "deepspeed", "numpy", "timm", "torchvision")]
    processor = [
        line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")
    ]
    machine = [platform.node(), *processor[:1], platform.python_version(), *libraries, str(coco and coco.resolve())]
    mark = hashlib.sha256(b"\0".join([*sources, *(word.encode() for word in machine)])).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "visft_ds" / "freeze" / f"{commit}-{tier}-{mark}.json"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
