"""visft_ds: supervised fine-tuning of vision foundation models on DeepSpeed."""

import sys
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

__version__ = "0.1.0"


def _name_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say how to enter the environment where a program of this repository cannot even be imported."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    importing = all(frame.f_code.co_name == "<module>" for frame, _ in walk_tb(trace))
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
