"""Command lines: errors that name the nearest flag, numbers that a flag does not take, packages that it needs."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from visft_ds import CHECKOUT
from visft_ds.redaction import redacted

_UNKNOWN = "unrecognized arguments: "
#: Packages of the extra `eval`, as they are imported.
EVAL = ("open_clip", "sklearn")


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that answers a misspelt flag with the one that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the message, then end with status 2."""
        if message.startswith(_UNKNOWN):
            known = _flags(self)
            for word in message.removeprefix(_UNKNOWN).split():
                near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
                message += f"; did you mean {near[0]}?" if word.startswith("--") and near else ""
        super().error(redacted(message))


def check_least(given: object, **least: int) -> None:
    """Raise ValueError for a flag, an attribute of `given`, whose number is smaller than it may be; None: not given."""
    for name, smallest in least.items():
        value = getattr(given, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not allowed: give at least {smallest}")


def install_command(extra: str = "") -> str:
    """Command that installs this package where it came from, with an extra."""
    editable, source = ("-e ", ".") if CHECKOUT else ("", "visft_ds")
    return f"pip install {editable}" + (f"'{source}[{extra}]'" if extra else source)


def check_extra(what: str, extra: str, packages: Sequence[str]) -> None:
    """Raise ValueError for packages of an extra, as they are imported, that `what` needs and that are not installed."""
    if lacking := [name for name in packages if find_spec(name) is None]:
        raise ValueError(f"{what} needs {', '.join(lacking)}, not installed here: {install_command(extra)}")


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of its sub-commands."""
    found = {flag for flag in parser._option_string_actions if flag.startswith("--")} - {"--local_rank"}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set[str]().union(*(_flags(inner) for inner in action.choices.values()))
    return found
