"""HTML of the pages by Sphinx: `make docs`. The pages are plain Markdown, which GitHub shows as it is."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import reference  # noqa: E402

reference.write(ROOT / "docs")
project = "visft_ds"
author = copyright = "The visft_ds authors"
version = re.findall(r'^__version__ = "(.*?)"', (ROOT / "visft_ds/__init__.py").read_text(), re.M)[0]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
suppress_warnings = ["docutils"]  # of docstrings, which are plain text
highlight_language = "bash"  #: of blocks that do not say what they are
html_theme = "furo"
html_static_path = ["pages.css"]
html_css_files = ["pages.css"]
html_copy_source = False
root_doc = "docs/README"
#: Left to right in the sidebar's order; a new page in docs/ has to find its place here.
CONTENTS = (
    *(
        "getting-started",
        "python",
        "own-data",
        "labels",
        "depth",
        "data",
        "images-and-labels",
        "bands",
        "training-data",
        "training",
        "backbones",
        "runs",
        "clusters",
    ),
    *(
        "memory-and-speed",
        "plan-and-profile",
        "export",
        "onnx",
        "evaluation",
        "judge",
        "paper",
        "questions",
        "troubleshooting",
    ),
    *("evidence", "architecture", "configuration", "numbers", "api"),
)
AROUND = {
    "README": "README",
    "ds_configs/README": "Configuration files",
    "CONTRIBUTING": "Contributing",
    "CHANGELOG": "Changelog",
    "SECURITY": "Security",
}
include_patterns = [f"{name}.md" for name in (*AROUND, root_doc, *(f"docs/{page}" for page in CONTENTS))]
myst_heading_anchors = 6


def add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Give the index the list of pages that Sphinx wants, which GitHub would show as code."""
    if name == root_doc:
        around = (f"{title} </{page}>" for page, title in AROUND.items())
        pages = "\n".join((*(f"/docs/{page}" for page in CONTENTS), *around))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
