"""The cases of one commit, in a process that imports its code once and forks for each case.

    python -m tests.freeze.worker CHECKOUT WORK RESULT WHAT JOBS [COCO]

WHAT: tier1, or tier2 (all of tier 1 too). WORK must not exist yet.

Imports cost as much as several cases. A fork has them, shares nothing else, and computes with one thread.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.freeze import tier1, tier2
from tests.freeze.cases import Case, Outcome, Words

TOOLS = ("evaluate", "make_shards", "make_toy_coco", "merge_lora", "profile")
LONGEST = 900.0  # seconds of a case
#: What of the environment decides about numbers or texts.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE", "NO_COLOR"), "1"),
    **{"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", "LC_ALL": "C.UTF-8"},
    "PYTHONHASHSEED": "0",
}


def main() -> None:
    """Run, and write {"entries": ..., "failed": {case: why}, "skipped": {case: why}, ...}."""
    checkout, work, result = (Path(word).resolve() for word in sys.argv[1:4])
    what, jobs = sys.argv[4], int(sys.argv[5])
    coco = Path(sys.argv[6]) if len(sys.argv) > 6 else None
    sys.path[0] = str(checkout)  # was the repository of this file
    began = time.perf_counter()
    _import(checkout)
    work.mkdir()
    os.chdir(work)
    cases = {
        "tier1": tier1.cases,
        "tier2": lambda: [*tier1.cases(), *tier2.cases(coco)],
    }[what]()
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for case, answer in _run_all(cases, checkout, jobs):
        seconds[case.name] = answer["cpu_seconds"]
        if "error" in answer:
            failed[case.name] = answer["error"]
        else:
            found |= {f"{case.name}/{name}": value for name, value in answer["entries"].items()}
    record: dict[str, Any] = {
        "entries": found,
        "failed": failed,
        "skipped": tier2.skipped(coco) if what == "tier2" else {},
        "cpu_seconds": seconds,
    }
    record["seconds"] = time.perf_counter() - began
    result.write_text(json.dumps(record), encoding="utf-8")
    os._exit(0)  # without a word of what libraries have to say about the end of a process


def _import(checkout: Path) -> None:
    """Import what the commands need, by their files alone: run each as a module that is not the main program."""
    import visft_ds

    assert Path(visft_ds.__file__).is_relative_to(checkout), f"{visft_ds.__file__} is not of {checkout}"
    path = list(sys.path)
    for name in TOOLS:
        runpy.run_path(str(checkout / f"tools/{name}.py"), run_name="not_main")
        sys.path[:] = path
    import torch

    import visft_ds.train  # the command imports it late

    torch.set_num_threads(1)
    gc.freeze()  # else collections of the forks would copy every page of what they share


def _run_all(cases: Sequence[Case], checkout: Path, jobs: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with what its process answered; those whose needs have failed are not run."""
    waiting = {case.name: case for case in cases}
    running: dict[int, Case] = {}
    done: dict[str, bool] = {}
    while waiting or running:
        for case in list(waiting.values()):
            lost = [name for name in case.needs if done.get(name) is False]
            if lost:
                del waiting[case.name]
                done[case.name] = False
                yield case, {"error": f"needs {lost[0]}, which failed", "cpu_seconds": 0.0}
            elif len(running) < jobs and all(done.get(name) for name in case.needs):
                del waiting[case.name]
                running[_start(case, checkout)] = case
        assert running or not waiting, f"cases that need what there is not: {', '.join(waiting)}"
        if not running:
            break
        process, _, used = os.wait4(-1, 0)
        case = running.pop(process)
        answer = _answer(case)
        done[case.name] = "error" not in answer
        yield case, {**answer, "cpu_seconds": used.ru_utime + used.ru_stime}


def _log(case: Case, suffix: str) -> Path:
    path = Path("logs", case.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _start(case: Case, checkout: Path) -> int:
    """Fork; the child runs the case, leaves its answer in a file and ends."""
    log = _log(case, ".json")
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    signal.alarm(int(LONGEST))  # ends the process
    try:
        outcomes = _outcomes(case, checkout)
        answer: dict[str, Any] = {"entries": case.read(outcomes)}
    except BaseException as error:  # noqa: BLE001  # whatever it is, the other side reports it
        answer = {"error": "".join(traceback.format_exception(error))}
    log.write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)


def _answer(case: Case) -> dict[str, Any]:
    try:
        return json.loads(_log(case, ".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"error": f"its process died, or took more than {LONGEST:.0f} s"}


def _outcomes(case: Case, checkout: Path) -> list[Outcome]:
    """Run the commands of a case.

    Raises:
        RuntimeError: another exit status than expected.
    """
    os.environ.update(case.environment)
    if case.before is not None:
        case.before()
    outcomes = []
    for place, forms in enumerate(case.commands):
        for words in forms:
            outcome = _run(words, checkout, _log(case, f".{place}"))
            if outcome.code != 2:
                break
        if case.status is not None and outcome.code != case.status:
            tail = "\n".join((outcome.out + outcome.err).splitlines()[-15:])
            raise RuntimeError(f"exit status {outcome.code}: {' '.join(outcome.words)}\n{tail}")
        outcomes.append(outcome)
    return outcomes


def _run(words: Words, checkout: Path, log: Path) -> Outcome:
    """Run a command as `python FILE ARGUMENTS` would, in this process; what it prints goes to files."""
    kept, sys.argv = sys.argv, list(words)
    sys.stdout.flush()
    sys.stderr.flush()
    files = [log.with_name(log.name + suffix) for suffix in (".out", ".err")]
    saved = [os.dup(number) for number in (1, 2)]
    for number, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    path = list(sys.path)
    try:
        runpy.run_path(str(checkout / words[0]), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        sys.argv, sys.path[:] = kept, path
    out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Outcome(words, code, *(text.replace(str(checkout), "CODE") for text in (out, err)))


if __name__ == "__main__":
    main()
