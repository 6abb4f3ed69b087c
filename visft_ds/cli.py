"""The command `visft`: every program of this package by its name. A program is imported when its name is
given.
"""

from __future__ import annotations

import atexit
import difflib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

import visft_ds
from visft_ds import __version__, importing
from visft_ds.errors import exit_code, tell
from visft_ds.resilience.processes import check_environment, start_ranks, without_num_gpus
from visft_ds.resilience.stop import SecondInterrupt, interrupt


class Program(NamedTuple):
    """Place and purpose of a command."""

    module: str
    help: str
    function: str = "main"  #: (words after the command) -> exit status
    continues: bool = False  #: the same command goes on with what was interrupted
    but_not: tuple[str, ...] = ()  #: the first words after it of those that do not


COMMANDS = {
    "demo": Program(
        "visft_ds.demo",
        "run the full pipeline at small scale: drawings, both stages, evaluation, report",
        continues=True,
    ),
    "toy": Program("visft_ds.toy.coco", "draw a toy data set in COCO's own form"),
    "shards": Program(
        "visft_ds.shards.cli",
        "make, verify and describe shards",
        continues=True,
        but_not=("index", "permute", "verify", "info"),
    ),
    "train": Program("visft_ds.launch", "train a stage: 1 heads, 2 the backbone's adapters", continues=True),
    "evaluate": Program(
        "visft_ds.evals.cli", "measure box AP, mask AP and captions of a run on labelled data"
    ),
    "judge": Program(
        "visft_ds.evals.cli", "test whether training improved the backbone, and at what cost", "judge", True
    ),
    "predict": Program(
        "visft_ds.predict.cli", "find boxes, masks and captions in your own images", continues=True
    ),
    "report": Program("visft_ds.evals.cli", "write a page about one run, or several side by side", "report"),
    "labels": Program("visft_ds.evals.cli", "rank labels that a run denies, on a page", "labels"),
    "export": Program(
        "visft_ds.export.cli", "write the model as ONNX, or weights for timm, transformers, open_clip, PEFT"
    ),
    "merge": Program("visft_ds.merge.cli", "merge adapters into base weights, or several into their mean"),
    "vlm": Program("visft_ds.merge.cli", "put a trained tower into BLIP-2 or a model like LLaVA", "vlm"),
    "plan": Program("visft_ds.planner.command", "predict memory and time of a training run on a cluster"),
    "profile": Program(
        "visft_ds.profiling.command", "measure speed, time by part and memory of a training run"
    ),
    "ablate": Program(
        "visft_ds.experiments.ablate",
        "compare the gain of stage 2 with controls, over several seeds",
        continues=True,
    ),
    "doctor": Program("visft_ds.doctor", "check whether this machine is ready to train"),
}
#: Purpose -> its commands, as the help lists them.
GROUPS = {
    "prepare data": ("shards", "labels", "toy"),
    "train": ("train", "demo"),
    "use the result": ("predict", "evaluate", "report", "export", "merge", "vlm"),
    "judge": ("judge", "ablate"),
    "plan and check": ("plan", "profile", "doctor"),
}
#: Those that several processes do together; `visft train` looks at its configuration before it starts them.
PARALLEL = ("evaluate", "judge", "profile")


def usage() -> str:
    """Help of `visft`: its commands by what they are for."""
    lines = ["usage: visft COMMAND ...          visft COMMAND --help lists its flags"]
    for purpose, names in GROUPS.items():
        lines += ["", f"{purpose}:"]
        lines += [f"  {name:9}  {COMMANDS[name].help}" for name in names]
    lines += [
        "",
        f"On the GPUs of this machine: visft train --num_gpus 8 --stage 2, likewise {', '.join(PARALLEL)}.",
        "Through a launcher, also on several machines (torchrun -m takes the same modules):",
        "  deepspeed --num_gpus 8 --module visft_ds.launch --stage 2",
        "  deepspeed --num_gpus 8 --module visft_ds evaluate --run RUN",
    ]
    return "\n".join(lines)


def run() -> NoReturn:
    """The command `visft`, in a process of its own.

    At the end of a process Python takes its objects apart one by one: of the libraries that a command imports
    there are a million, which takes a second. What is to be done at the end is done, the rest is left to the
    system.
    """
    ended: list[int] = []

    def leave() -> None:
        if ended:  # otherwise an exception is on its way
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended[0])

    visft_ds.is_command = True
    atexit.register(leave)  # the first to be registered is the last to be called
    ended.append(main())
    sys.exit(ended[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    2 for an unknown command and for an environment that no launcher sets, 130 after a Ctrl-C, 141 for a
    closed output pipe.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("--local_rank="):  # the deepspeed launcher puts it in front
        words.insert(1, words.pop(0))
    name = words[0] if words else ""
    try:
        try:
            is_main = threading.current_thread() is threading.main_thread()  # which alone handles signals
            # `nohup` leaves it ignored.
            if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, interrupt)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `start_ranks`
            return _run(words)
        finally:
            sys.stdout.flush()  # at its end Python only complains
    except BrokenPipeError as error:
        return tell(error)
    except KeyboardInterrupt as error:
        # A second one ends what is still ending, without the traceback of wherever it is.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\n{name or 'visft'}: interrupted{_after(words)}", file=sys.stderr, flush=True)
        if visft_ds.is_command and "RANK" in os.environ and not isinstance(error, SecondInterrupt):
            # By the signal, not by a number, which is that of a rank that stopped and saved: others may wait
            # for this one, and `start_ranks` ends them. After a second Ctrl-C the first rank may still save.
            signal.raise_signal(signal.SIGINT)
        return exit_code(error)


def _after(words: Sequence[str]) -> str:
    """Clause about what an interrupted command left behind."""
    command = COMMANDS.get(words[0]) if words else None
    if command is None or not command.continues:
        return ""
    if len(words) > 1 and words[1] in command.but_not:
        return "; the same command begins anew"
    return "; the same command continues"


def _run(words: list[str]) -> int:
    if not words:
        print(usage(), file=sys.stderr)
        return 2
    name = words[0]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"visft {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" did you mean {near[0]}?" if near else ""
        print(f"visft: no command {name!r};{hint} visft --help lists them", file=sys.stderr)
        return 2
    count = None
    try:
        check_environment()
        if name in PARALLEL:
            words, count = without_num_gpus(words)
    except ValueError as error:
        return tell(error, f"visft {name}")
    if count is not None and "RANK" not in os.environ:
        return start_ranks(words, count)
    command = COMMANDS[name]
    with importing():
        function = getattr(import_module(command.module), command.function)
    return int(function(words[1:]))
