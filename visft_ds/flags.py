"""Command lines whose errors name the nearest flag."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from visft_ds.redaction import redacted

_UNKNOWN = "unrecognized arguments: "


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


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser and of its sub-commands."""
    found = {flag for flag in parser._option_string_actions if flag.startswith("--")} - {"--local_rank"}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set[str]().union(*(_flags(inner) for inner in action.choices.values()))
    return found
