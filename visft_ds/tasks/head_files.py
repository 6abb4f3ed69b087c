"""Files of heads by their names: ours, a checkpoint's, the published ones. Imports no tensor library."""

from __future__ import annotations

from pathlib import Path

from visft_ds.files import reading
from visft_ds.run_files import PARAMETERS_FILE
from visft_ds.tasks import config_class


def head_files(folder: Path, task: str) -> list[Path]:
    """Files that may hold a task's head: ours, a checkpoint's, else those named as the published ones.

    `folder` may be a file.
    """
    if folder.is_file():
        return [folder]
    values = folder / PARAMETERS_FILE
    if values.is_file():
        from safetensors import safe_open  # it costs what --help has not

        with reading(values, "values of a checkpoint"), safe_open(values, framework="numpy") as file:
            return [values] if f"visft_head.{task}" in (file.metadata() or {}) else []
    word = config_class(task).published
    ours = folder / f"{task}.safetensors"
    if ours.is_file():
        return [ours]
    published = [folder / f"eva_{tower}_{word}_heads.ckpt" for tower in "eg"]
    if task == "segmentation":
        published.append(folder / "pytorch_model.bin")  # of PMT
    return [path for path in published if path.is_file()]
