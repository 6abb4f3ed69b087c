"""Slow tests for a limited time, in an order that the commit decides: over many commits each one runs.

    python -m tests.slow --minutes 30

Each test runs in a process of its own. One that fails runs again; it fails the command when it fails twice. What the
time did not reach is printed. Exit status: 0 no test failed twice, 1 at least one did.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit() -> str:
    """The commit that is checked out; "none" outside a repository."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def in_order(tests: Sequence[str], seed: str) -> list[str]:
    """The tests in an order that is a function of the seed."""
    return sorted(tests, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


def collect() -> list[str]:
    """Names of all slow tests.

    Raises:
        RuntimeError: pytest cannot collect them.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", "slow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pytest collects no slow tests:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def run_one(name: str, seconds: float) -> str:
    """ "passed", "skipped", "failed" or "cut off" (not done after so many seconds); output is shown where it failed."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-m", "slow", "-rs", name]
    # A session of its own: what a test leaves behind ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "cut off"
    if process.returncode:
        print(output[-8000:], flush=True)
        return "failed"
    return "skipped" if " skipped" in output and " passed" not in output else "passed"


def run_for(
    tests: Sequence[str], seconds: float, run: Callable[[str, float], str], clock: Callable[[], float] = time.monotonic
) -> dict[str, str]:
    """What became of each test, in order; those that the time did not reach are absent.

    Args:
        run: runs a test within some seconds and says "passed", "skipped", "failed" or "cut off".
    """
    end, results = clock() + seconds, {}
    for name in tests:
        began = clock()
        if began >= end:
            break
        results[name] = run(name, end - began)
        if results[name] == "failed":
            again = run(name, end - clock()) if clock() < end else "cut off"
            results[name] = "failed twice" if again == "failed" else f"failed, then {again}"
        print(f"{results[name]:9} {clock() - began:6.0f} s  {name}", flush=True)
    return results


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="slow tests for a limited time, in an order that the commit decides")
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args(argv)
    tests = in_order(collect(), commit())
    results = run_for(tests, 60 * given.minutes, run_one)
    left = [name for name in tests if results.get(name, "cut off").endswith("cut off")]
    failed = [name for name, result in results.items() if result == "failed twice"]
    print(f"\nleft out, for lack of time: {len(left)} of {len(tests)}", *left, sep="\n   ")
    if failed:
        print("failed twice:", *failed, sep="\n   ")
    passed = sum(result in ("passed", "failed, then passed") for result in results.values())
    skipped = sum(result == "skipped" for result in results.values())
    print(f"slow: {passed} passed, {len(failed)} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
