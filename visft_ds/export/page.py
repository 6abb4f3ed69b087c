"""index.html beside an export: the detector in a browser, by onnxruntime-web."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from visft_ds.files import write_text

NO_BOXES = "--web shows boxes: export detection or segmentation with --format onnx"


def write_page(folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page for the first file that finds boxes."""
    name = next(name for name, of_file in facts.items() if of_file["task"] in ("detection", "segmentation"))
    names = [category["name"] for category in facts[name]["categories"]]
    page = (files("visft_ds.export") / "page.html").read_text(encoding="utf-8")
    filled = page.replace("MODEL_FILE", f"{name}.onnx").replace("CATEGORIES", json.dumps(names))
    write_text(folder / "index.html", filled)
