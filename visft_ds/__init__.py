"""visft_ds: supervised fine-tuning of vision foundation models on DeepSpeed.

The public names are those of `_PUBLIC`; each is imported when it is first asked for.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visft_ds.api import fit as fit
    from visft_ds.evals.evaluate import EvaluationResult as EvaluationResult
    from visft_ds.evals.evaluate import evaluate as evaluate
    from visft_ds.predict.model import ImageFeatures as ImageFeatures
    from visft_ds.predict.model import Model as Model
    from visft_ds.predict.model import load as load
    from visft_ds.predict.model import load_backbone as load_backbone
    from visft_ds.predict.results import Boxes as Boxes
    from visft_ds.predict.results import Instance as Instance
    from visft_ds.predict.results import Masks as Masks
    from visft_ds.predict.results import Prediction as Prediction
    from visft_ds.train import FitResult as FitResult


def _settle_threads() -> None:
    """Choose how OpenMP waits and, in one of several ranks, its threads; what the user has set stays.

    It reads this when torch is imported. By default its threads spin at each barrier, also while another
    process has their core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    if ranks.isdecimal() and int(ranks) > 1:
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(ranks))))


_settle_threads()

__version__ = "0.2.0"  # pyproject.toml reads it without an import

#: The engine and the checkpoints use private names of exactly these releases.
DEEPSPEED = ">=0.19.8,<0.20"

_ABOVE = Path(__file__).resolve().parents[1]
#: The checkout that this package lies in; None: it was installed from a wheel.
CHECKOUT = _ABOVE if (_ABOVE / "setup.py").is_file() else None
_SHELLS = {_ABOVE / folder for folder in ("tools", "launchers")}

_MODULES = {
    "api": ("fit",),
    "evals.evaluate": ("EvaluationResult", "evaluate"),
    "predict.model": ("ImageFeatures", "Model", "load", "load_backbone"),
    "predict.results": ("Boxes", "Instance", "Masks", "Prediction"),
    "train": ("FitResult",),
}
#: Public name -> the module that has it, which is imported when the name is used: torch alone takes seconds.
_PUBLIC = {name: f"visft_ds.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


#: This process is one command (`cli.run`): what it imports stays to its end.
is_command = False


@contextmanager
def importing() -> Iterator[None]:
    """No garbage is collected inside, nor, in a command, ever looked for in what is there then: imports make
    a million objects that stay, and looking through them is a fifth of the start.
    """
    modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if is_command and len(sys.modules) > modules:
            gc.freeze()
        gc.enable()


def program(command: str) -> str:
    """Name of a command for its usage line, as it was typed: `visft COMMAND`, or a script of the checkout."""
    script = Path(sys.argv[0]).resolve()
    return f"{script.parent.name}/{script.name}" if script.parent in _SHELLS else f"visft {command}"
