"""The pages: whoever types a command from one must have been told how to enter the environment it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The log and the changelog are left out: their commands are history.
HISTORY = {ROOT / "docs/LOG.md", ROOT / "CHANGELOG.md"}
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md")} - HISTORY)
#: At the start of a line or of inline code, maybe behind a prompt and variables.
COMMAND = re.compile(r"(?:^|(?<!`)`)(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python3?|deepspeed|torchrun) [^`\n]*", re.M)
ENTER = re.compile(r"^.*`make install`.*`\. \.venv/bin/activate`.*$", re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_how_to_enter_the_environment_before_its_first_command(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    command, enter = COMMAND.search(text), ENTER.search(text)
    assert command is None or (enter is not None and enter.start() < command.start()), (
        f"{page.name} begins with {command[0]!r}; say first: `make install` once, then `. .venv/bin/activate`"
    )


def test_commands_are_told_from_code() -> None:
    """The pattern must find commands, or the test above says nothing."""
    for text in ("```\npython a.py\n```", "x\n$ python a.py", "so `torchrun a.py`", "A=1 deepspeed --num_gpus 8 a.py"):
        assert COMMAND.search(text), text
    for text in ("```python\nimport a\n```", "in python we trust", "`deepspeed` is imported in"):
        assert not COMMAND.search(text), text
