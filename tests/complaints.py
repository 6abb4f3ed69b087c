"""What a command says on stderr, without the progress that it shows where the machine is busy."""

from __future__ import annotations

import re

_GAUGE = re.compile(r"^[^\n]+: \d+(/\d+)?[^\n]*, left [\d:]+\n", re.MULTILINE)


def complaints(errors: str) -> str:
    """Lines of stderr that are no gauge's, which is silent for its first five seconds."""
    return _GAUGE.sub("", errors)
