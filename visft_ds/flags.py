"""Command lines: errors that name the nearest flag, numbers and sizes that a flag takes, packages that it
needs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from visft_ds import CHECKOUT, program
from visft_ds.errors import IN_FLAGS

_UNKNOWN = "unrecognized arguments: "
#: Sentences of argparse, and what stands for them.
_SENTENCES = (
    (r"argument (\S+): invalid float value: (.*)", r"\1 \2 is not allowed: give a number"),
    (r"argument (\S+): invalid int value: (.*)", r"\1 \2 is not allowed: give a whole number"),
    (r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1 \2 is not allowed: give one of \3"),
    (r"argument (\S+): expected (?:one|at least one) argument", r"\1 needs a value"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 do not go together: give one of them"),
    (r"the following arguments are required: (.*)", r"missing \1"),
)
#: Packages of the extra `eval`, as they are imported.
EVAL = ("open_clip", "sklearn", "matplotlib")
#: Flag -> the argument of another name.
_ARGUMENTS = {
    "from": "start",
    "set": "settings",
    "download": "download=True",
    "reset-heads": "reset_heads=True",
}
#: A whole command line, a setting, or any other flag with the word behind it.
_FLAGS_OR_COMMAND = re.compile(
    r"`[^`\n]*`|\b(?:visft|deepspeed|pip|hf|curl) [^\n;)]*"
    r"|--set (?P<quote>'?)(?P<key>[\w.<>]+)=(?P<value>.*?)(?P=quote)(?=[\s,;)]|$)"
    r"|--(?P<flag>[a-z][a-z_-]*)(?: (?!--)(?P<word>'[^']*'|[^\s,;)]+))?"
)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that answers in one line, a misspelt flag with the one that was probably
    meant.
    """

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """The flags, which may also stand between the members of a list, as in RUN --out DIR IMAGE."""
        if any(action.nargs in ("*", "+") for action in self._get_positional_actions()):
            return self.parse_intermixed_args(args, namespace)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message, then end with status 2."""
        self.exit(2, f"{self.prog}: {self.hinted(message)}; see {self.prog} --help\n")

    def hinted(self, message: str) -> str:
        """The message in words of ours, with the nearest flag."""
        for sentence, plain in _SENTENCES:
            message = re.sub(sentence, plain, message)
        if not message.startswith(_UNKNOWN):
            return message
        words = message.removeprefix(_UNKNOWN).split()
        # The value of an unknown flag is not repeated, however it is joined to it: it may be a secret.
        flags = []
        for word in words:
            match = re.match(r"-+[\w-]*", word)
            if match is not None:
                flags.append(match[0])
        message = _UNKNOWN + " ".join(flags or words)
        known = _flags(self)
        for flag in flags:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.7)
            if flag.startswith("--") and near:
                message += f"; did you mean {near[0]}?"
        if not flags and "--data" in known:
            message += f"; did you mean --data {words[0]}?"
        return message


def command_parser(name: str, description: str | None) -> Parser:
    """The parser of a command, whose description is printed as it is written."""
    layout = argparse.RawDescriptionHelpFormatter
    return Parser(prog=program(name), description=description, formatter_class=layout)


class Command(Parser):
    """Parser of a command that answers everything it refuses with one ValueError, and prints examples."""

    def __init__(self, name: str, description: str, epilog: str) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=program(name),
            description=description,
            epilog=epilog,
            formatter_class=layout,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{self.hinted(message)}; see {self.prog} --help")


def add_num_gpus(group: argparse._ActionsContainer, default: int | None = None) -> None:
    """Add `--num_gpus`. Without a default only for the help: `resilience.processes.without_num_gpus` takes it
    out of the command line.
    """
    group.add_argument(
        "--num_gpus",
        "--num-gpus",
        type=int,
        default=argparse.SUPPRESS if default is None else default,
        metavar="N",
        help=f"processes on this machine, one for each GPU; CPUs, too (default: {default or 1})",
    )


def check_least(options: object, **least: int) -> None:
    """Raise ValueError for a flag, an attribute of `options`, that is no whole number or below its least;
    None: not given.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= smallest):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {value!r} is not allowed: give a whole number of at least {smallest}")


@contextmanager
def speaking_python() -> Iterator[None]:
    """Let errors name arguments of a function where they named flags, which `errors.tell` prints again."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.__dict__[IN_FLAGS] = error.args[0]
            error.args = (with_arguments(error.args[0]),)
        raise


def with_arguments(message: str) -> str:
    """A message with arguments of Python for its flags: `--batch-size 8` becomes batch_size=8, and
    `--set visft.seed=1` settings={"visft.seed": 1}. Whole command lines stay, but for that of the help.
    """
    without_help = re.sub("; see [^;]* --help$", "", message).replace("the same command", "the same call")
    return _FLAGS_OR_COMMAND.sub(_as_argument, without_help)


def _as_argument(match: re.Match[str]) -> str:
    """Replacement of a match of `_FLAGS_OR_COMMAND`."""
    if match["key"] is not None:
        return f'settings={{"{match["key"]}": {_literal(match["value"])}}}'
    if match["flag"] is None:
        return match[0]
    name = _ARGUMENTS.get(match["flag"], match["flag"].replace("-", "_"))
    word = match["word"]
    if word is None or (word.islower() and word.isalpha()):  # no value, but a word of the sentence
        return name if word is None else f"{name} {word}"
    value = word.rstrip(":.")
    return f"{name}={_literal(value)}{word[len(value) :]}"


def _literal(text: str) -> str:
    """A value in Python; placeholders such as FOLDER stay."""
    if text.isupper():
        return text
    try:
        return repr(json.loads(text))
    except ValueError:
        return json.dumps(text.strip("'"), ensure_ascii=False)


def check_options(threshold: float = 0.5, **numbers: int | None) -> None:
    """Raise ValueError for a threshold outside of [0, 1], or whole numbers outside of [1, 8192]."""
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold!r} is not allowed: give a score from 0 to 1")
    for name, number in numbers.items():
        if number is None:
            continue
        if not isinstance(number, Integral) or not 1 <= number <= 8192:
            raise ValueError(f"{name.replace('_', ' ')} {number!r} is not allowed: give 1 to 8192")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or `1000000`. Raises ValueError for anything else and for less than one
    byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is not None:
        count = float(match[1]) * _UNITS.get(match[2].upper(), 0)
        if count >= 1:
            return math.floor(count)
    raise ValueError(
        f"{text!r} is not a size: write a number and B, KB, MB, GB, KiB, MiB or GiB, such as 5GB"
    )


def install_command(extra: str = "") -> str:
    """Command that installs this package from where it came, a checkout or a wheel, with an extra."""
    command = "pip install -e" if CHECKOUT else "pip install"
    source = shlex.quote(f"{_source()}[{extra}]" if extra else _source())
    return f"{command} {source}"


def _source() -> str:
    """The folder or wheel that this package, which is on no index, was installed from; "." for a clone where
    nobody knows.
    """
    if CHECKOUT:
        return "." if Path.cwd() == CHECKOUT else str(CHECKOUT)
    origin = json.loads(distribution("visft_ds").read_text("direct_url.json") or "{}")
    path = unquote(urlsplit(origin.get("url", "")).path)
    return path or "."


def check_extra(what: str, extra: str, packages: Sequence[str]) -> None:
    """Raise ValueError if `what` needs packages of an extra, given by their import names, that are not
    installed.
    """
    lacking = [name for name in packages if find_spec(name) is None]
    if lacking:
        raise ValueError(f"{what} needs {', '.join(lacking)}, not installed here: {install_command(extra)}")


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of its sub-commands."""
    flags = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    flags.discard("--local_rank")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                flags |= _flags(command)
    return flags
