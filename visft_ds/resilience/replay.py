"""Replay of a refused step, which names the module and the image of the first value that is not finite.

    visft replay runs/stage2-eva_e --step 123

Exit status: 0 nothing came up again, 1 something is not finite, 2 unusable input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser
from visft_ds.resilience.errors import tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 nothing came up again, 1 something is not finite, 2 unusable input."""
    parser = Parser(prog=program("replay"), description="Repeat a step of a run that was refused.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--step", type=int, metavar="N", help="a step whose state before it was kept; none: names them")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="findings to print for a micro-batch (8)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="where a file lies here, e.g. visft.data.root=DIR",
    )
    options = parser.parse_args(arguments)
    from visft_ds.resilience.nan_debug import replay  # imports torch, which costs seconds

    try:
        return replay(options.run, options.step, options.set, options.limit)
    except (ValueError, OSError) as error:
        return tell(error)
