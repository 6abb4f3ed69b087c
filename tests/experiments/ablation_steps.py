"""Steps of a few lines for the runner, in a file that imports little: its processes import it too."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path

from visft_ds.experiments.ablations.run import Runner
from visft_ds.experiments.ablations.steps import Step, StepList

TELL = "import sys, pathlib; out = pathlib.Path(sys.argv[1]); out.mkdir(); (out / 'told').write_text('done')"


def steps_of(root: Path, texts: Mapping[str, str], needs: Mapping[str, str]) -> Mapping[str, Step]:
    """Scripts as steps, by their names; `needs` names the one before each."""
    steps = StepList(root)
    made: dict[str, Step] = {}
    for name, text in texts.items():
        script = root / f"{sha256(text.encode()).hexdigest()[:8]}.py"
        script.write_text(text)
        before = [made[needs[name]]] if name in needs else []
        made[name] = steps.add(name, name, partial(_command, script), needs=before)
    return steps.steps


def _command(script: Path, out: Path) -> list[str]:
    return [sys.executable, str(script), str(out)]


def run_steps(
    steps: Mapping[str, Step], *, jobs: int = 1, weights: Mapping[str, float] | None = None
) -> tuple[dict[str, str], list[str]]:
    """(title of what failed -> reason, what was said); steps weigh 1 unless `weights` says more of their titles."""
    said: list[str] = []
    runner = Runner(jobs, forks=False, say=said.append, weigh=lambda step: (weights or {}).get(step.title, 1.0))
    failures = runner.run(steps)
    return {steps[stem].title: failure.reason for stem, failure in failures.items()}, said
