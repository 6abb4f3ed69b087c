"""Commands that are run once: a step is named by a hash of its command and of the steps that it reads from.

A file from outside the folder is known by its path: where its content changes, another folder is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visft_ds import __version__

#: Raised where steps of earlier releases of this package must not be taken for those of this one.
FORMAT = 1
STEPS = "steps"  #: folder of all of them, below that of the comparison


@dataclass(frozen=True)
class Step:
    """Command of a comparison, and the path of its result."""

    title: str  #: for people
    stem: str  #: kind and hash: name of its folder, log and marker
    command: tuple[str, ...]
    out: Path  #: what it writes
    marker: Path  #: exists once it has finished
    log: Path
    needs: tuple[str, ...]  #: stems of the steps before it
    resumes: bool  #: goes on with what it left; otherwise that is removed before it starts again
    proof: Path | None  #: without it, exit status 0 is not the end: a training that is asked to stop ends well, too


@dataclass
class StepList:
    """The steps of one or more questions; equal ones are there once.

    The folder of a step has its hash in its name, and the commands that read it are hashed with this name in them: a
    hash covers everything that a step came from.
    """

    root: Path
    steps: dict[str, Step] = field(default_factory=dict)  #: by stem, in an order in which they can be run

    def add(
        self,
        kind: str,
        title: str,
        command: Callable[[Path], Sequence[str]],
        *,
        needs: Sequence[Step] = (),
        identity: Mapping[str, Any] | None = None,
        inside: Step | None = None,
        resumes: bool = False,
        proof: Path | None = None,
    ) -> Step:
        """Add a step unless there is an equal one; returns the one that is there.

        Args:
            kind: beginning of its name.
            command: from the folder that it writes to its words.
            identity: what decides about the result, where the command is not the best description of it.
            proof: below its folder, what is there once it has finished.
            inside: it writes into the folder of that step, which it needs.
        """
        folder = self.root / STEPS
        place = inside.out if inside else Path("OUT")
        what = {"format": FORMAT, "version": __version__, "what": identity or list(command(place))}
        text = json.dumps(what, sort_keys=True).replace(f"{folder}/", "")  # the same wherever the folder is
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        stem = f"{kind}-{key}"
        if stem not in self.steps:
            out = inside.out if inside else folder / stem
            before = (*needs, *([inside] if inside else []))
            self.steps[stem] = Step(
                title=title,
                stem=stem,
                command=tuple(command(out)),
                out=out,
                marker=folder / f"{stem}.json",
                log=folder / f"{stem}.log",
                needs=tuple(dict.fromkeys(step.stem for step in before)),
                resumes=resumes or inside is not None,
                proof=out / proof if proof else None,
            )
        return self.steps[stem]
