"""visft_ds: supervised fine-tuning of vision foundation models on DeepSpeed.

The public names are those of `_PUBLIC`; each is imported when it is first asked for.
"""

import sys
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visft_ds.api import fit as fit
    from visft_ds.evals.evaluate import EvaluationResult as EvaluationResult
    from visft_ds.evals.evaluate import evaluate as evaluate
    from visft_ds.monitor.callbacks import Callback as Callback
    from visft_ds.train import FitResult as FitResult

__version__ = "0.1.0"

#: Public name -> the module that has it.
_PUBLIC = {
    "Callback": "visft_ds.monitor.callbacks",
    "EvaluationResult": "visft_ds.evals.evaluate",
    "FitResult": "visft_ds.train",
    "evaluate": "visft_ds.evals.evaluate",
    "fit": "visft_ds.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


#: Functions in which a program still imports itself: what costs seconds is imported when its flags are right.
_IMPORTING = ("<module>", "main", "_parser")


def _name_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say how to enter the environment where a program of this repository cannot even be imported."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    codes = [frame.f_code for frame, _ in walk_tb(trace)]
    importing = all(code.co_name in _IMPORTING or "importlib" in code.co_filename for code in codes)
    if name is None or name.startswith(f"{__name__}.") or not importing:
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"{Path(sys.argv[0]).name}: no package {name!r} in {sys.executable}. Enter the project's environment: "
        "`make install` once, then `. .venv/bin/activate`",
        file=sys.stderr,
    )


_PROGRAM = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "").resolve()
if _PROGRAM.parent in {Path(__file__).resolve().parents[1] / folder for folder in ("tools", "launchers")}:
    sys.excepthook = _name_missing_package
