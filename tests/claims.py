"""Would the tests see a mistake? `python -m tests.claims [ID ...]` makes those of claims.md, one at a time.

Each is made in a copy of the project, where the test of its claim must fail.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "claims.md"
FOLDERS = ("visft_ds", "tests", "tools", "launchers", "ds_configs", "docs")
SECONDS = 900
_ROW = re.compile(
    r"\| (?P<name>[a-z0-9-]+) \| (?P<text>[^|]+) \| `(?P<test>[^`]+)`(?P<slow> \(slow\))? \| "
    r"`(?P<file>[^`]+)`: `(?P<old>[^`]+)` -> (?:`(?P<new>[^`]+)`|nothing) \|"
)


@dataclass(frozen=True)
class Claim:
    """One line of claims.md: what the project says of itself, the test that holds it, a mistake that the test sees."""

    name: str
    text: str
    test: str  #: as pytest takes it
    slow: bool
    file: str
    old: str  #: found once in the file
    new: str

    def mutated(self, root: Path) -> str:
        """The text of the file with the mistake in it. Raises ValueError where there is no such place, or several."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times, not once, {self.old!r}")
        return text.replace(self.old, self.new)


def read_claims(path: Path = LIST) -> list[Claim]:
    """The rows of all tables. Raises ValueError for a row of another form."""
    claims = []
    for line in path.read_text().splitlines():
        if not line.startswith("|") or line.startswith(("| id ", "|---")):
            continue
        if (match := _ROW.fullmatch(line)) is None:
            raise ValueError(f"{path} has a row of another form: {line}")
        found = {name: (text or "").replace(r"\|", "|") for name, text in match.groupdict().items()}
        claims.append(Claim(**{**found, "slow": bool(found["slow"])}))  # type: ignore[arg-type]
    return claims


def run_mutated(claim: Claim, folder: Path) -> tuple[int, str]:
    """Run the test of a claim in a copy of the project that has the mistake: exit code of pytest, what it printed."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name)  # with what Python has compiled, which the copied times keep valid
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    (folder / claim.file).write_text(claim.mutated(ROOT))
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-m", "slow or not slow", claim.test]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed = f"no end after {SECONDS} s"
    return process.returncode, printed


def notices(claim: Claim) -> tuple[bool | None, str]:
    """Whether the test of a claim sees the mistake (None where it was skipped), and what pytest printed."""
    with tempfile.TemporaryDirectory(prefix="claim-") as folder:
        code, printed = run_mutated(claim, Path(folder))
    if code == 0 and re.search(r"\d+ skipped", printed) and not re.search(r"\d+ passed", printed):
        return None, printed
    # 2 or 4: a file that cannot be read or found; 5: no test at all; 1 without a number of tests: pytest itself failed.
    return code == 1 and re.search(r"\d+ (failed|error)", printed) is not None, printed


def main() -> int:
    """Print a table; 1 where a mistake was not seen."""
    claims = read_claims()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims of claims.md; all but the slow ones by default")
    parser.add_argument("--slow", action="store_true", help="the slow ones too")
    given = parser.parse_args()
    if unknown := set(given.ids) - {claim.name for claim in claims}:
        parser.error(f"claims.md has no {', '.join(sorted(unknown))}")
    chosen = [c for c in claims if (c.name in given.ids if given.ids else given.slow or not c.slow)]
    survived = 0
    for claim in chosen:
        began = time.monotonic()
        seen, printed = notices(claim)
        survived += seen is False
        word = "skipped" if seen is None else "seen" if seen else "NOT SEEN"
        print(f"{word:8}  {time.monotonic() - began:5.0f} s  {claim.name}", flush=True)
        if not seen:
            print(f"{claim.test}\n{claim.file}: {claim.old} -> {claim.new}\n{printed[-2000:]}", flush=True)
    print(f"{len(chosen)} mistakes, {survived} not seen")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
