"""The pages say what the program says: keys of the configuration, messages, and no page is too long."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
#: Words by which the description of a number says what is counted or measured.
UNITS = (
    *(
        "pixels",
        "metres",
        "depths",
        "cells",
        "steps",
        "seconds",
        "bytes",
        "images",
        "epoch",
        "epochs",
        "evaluations",
        "status",
    ),
    *(
        "bands",
        "channels",
        "layers",
        "blocks",
        "heads",
        "points",
        "words",
        "captions",
        "classes",
        "masks",
        "boxes",
    ),
    *("beams", "checkpoints", "processes", "ranks", "values", "indices", "times", "candidates", "units"),
    *("probability", "share", "weight", "scale", "rate", "rates", "norm", "seed", "rank"),
)


def choices(annotation: Any) -> set[Any]:
    """Values of the literals of an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set[Any]().union(*(choices(argument) for argument in get_args(annotation)))


def problem_of(key: Any) -> str | None:
    """What the description of a key of the configuration lacks; None: nothing."""
    text = key.description
    if len(text.split()) < 2 or re.match(r"\S+:", text):
        return "must begin with a noun that says what the value is"
    values = choices(key.info.annotation)
    missing = [json.dumps(value) for value in values if not re.search(rf"\b{value}\b", text, re.IGNORECASE)]
    if missing and len(values) > 1:
        return f"does not explain {', '.join(missing)}"
    if " or null" in key.values and "null:" not in text:
        return "does not explain null"
    if "integer" in key.values or "number" in key.values:
        if not set(re.findall(r"\w+", text)) & set(UNITS):
            return "has no unit"
        if "≥" not in key.values and ">" not in key.values:
            return "has no range"
    return None


def test_every_key_says_what_it_is_its_unit_and_its_range() -> None:
    """As the page of keys shows them; a range comes from the type."""
    reference = runpy.run_path(str(ROOT / "docs/reference.py"))
    reference["complete"]()
    keys = [*reference["leaves"](reference["Recipe"])]
    assert len(keys) > 150
    # Other tests of the process may have registered a task of their own, which the schema keeps.
    keys = [key for key in keys if not key.name.startswith("visft.tasks.classification")]
    problems = [(key.name, problem_of(key)) for key in keys]
    assert [f"{name} {problem}" for name, problem in problems if problem] == []


def test_no_page_is_too_long() -> None:
    """A page that is read, not looked up, has one subject."""
    looked_up = {"evidence", "architecture", "configuration", "numbers", "api"}
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.stem not in looked_up]
    lengths = {page.name: len(page.read_text(encoding="utf-8").split()) for page in pages}
    assert {name: length for name, length in lengths.items() if length > 1550} == {}


def pages() -> dict[str, str]:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md")]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def test_files_and_names_in_code_that_pages_name_exist() -> None:
    """`data/plan.py`, below the package or the repository; in `model.py: forward` the name behind it."""
    missing = []
    for page, text in pages().items():
        for name, _, inside in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|sbatch|example))(: (\w+))?`", text):
            files = [path for path in (ROOT / name, ROOT / "visft_ds" / name) if path.is_file()]
            defined = files and re.search(
                rf"^ *(?:def|class) {inside}\b", files[0].read_text("utf-8"), re.MULTILINE
            )
            if not files or (inside and not defined):
                missing.append(f"{page}: {name}: {inside}")
    assert missing == []


def is_there(word: str, page: str) -> bool:
    """False for a word in backticks that names a place in the repository, where nothing is."""
    first, _, rest = word.partition("/")
    of_repository = ("docs", "tests", "launchers", "ds_configs", "tools", "visft_ds", ".github", ".ci")
    if rest and first in of_repository:
        return (ROOT / word).exists()
    if re.fullmatch(r"test_\w+\.py", word):
        return any((ROOT / "tests").rglob(word))
    if re.fullmatch(r"Makefile|[A-Z]+\.md|\w+\.toml", word):
        return (ROOT / word).is_file()
    if page == "docs/architecture.md" and re.fullmatch(r"(\w+/)+", word):
        return (ROOT / word).is_dir() or any((ROOT / "visft_ds").rglob(word.rstrip("/")))
    if page == "ds_configs/README.md" and re.fullmatch(r"(engines/|models/)?\w+\.json", word):
        return word == "my.json" or (ROOT / "ds_configs" / word).is_file()
    return True


def test_places_of_the_repository_that_pages_name_exist() -> None:
    """Files of any ending, and folders; names of files that users have or commands write are not looked at."""
    missing = []
    for page, text in pages().items():
        words = re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", text)
        missing += [f"{page}: {word}" for word in words if not is_there(word, page)]
    assert missing == []


def test_the_hours_of_8_h100_are_told_alike_everywhere() -> None:
    """The table of backbones; README has the sum of both stages, memory-and-speed the paper's stage 2."""
    text = pages()
    hours = {}
    pattern = r"^\| `(\w+)` .* ([\d.]+) \+ ([\d.]+) \|$"
    for name, first, second in re.findall(pattern, text["docs/backbones.md"], re.MULTILINE):
        hours[name] = [float(first), float(second)]
    (readme,) = re.findall(r"DINOv3-B (\d+) hours, EVA-ViT-E (\d+) \(predicted\)", text["README.md"])
    assert [int(number) for number in readme] == [round(sum(hours[name])) for name in ("dinov3_b", "eva_e")]
    (stage_2,) = re.findall(
        r"^\| 8 x H100 \|.*\| ([\d.]+) \|$", text["docs/memory-and-speed.md"], re.MULTILINE
    )
    assert hours["eva_e"][1] == float(stage_2)
