"""The pages: what is typed from them is read by the parsers that will read it, and links lead somewhere."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.pages import (
    EVERY,
    FENCE,
    GENERATED,
    HISTORY,
    KINDS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    check,
    check_json,
    commands_in,
    inline_commands,
    links,
)

#: At the start of a line or of inline code, maybe behind a prompt and variables.
COMMAND = re.compile(r"(?:^|(?<!`)`)(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python3?|deepspeed|torchrun) [^`\n]*", re.M)
ENTER = re.compile(r"^.*`make install`.*`\. \.venv/bin/activate`.*$", re.M)
#: Folders of the project in which a page may name a file, with braces and stars as a shell reads them.
NAMED = re.compile(r"\b(?:tests|tools|launchers|visft_ds|ds_configs|docs)/[\w/.{},*-]*\w")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
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


@pages
def test_every_block_is_checked(page: Path) -> None:
    """By the parsers of its commands, as JSON or by the compiler. What is shown as refused is refused in its words."""
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if not block.commands:
            assert block.kind in KINDS, f"{where}: say behind the fence what it is: {', '.join(KINDS)}"
        if block.kind == "python" and str(page.relative_to(ROOT)) not in GENERATED:
            compile(block.text, where, "exec")
        elif block.kind == "json":
            check_json(block.text)
        elif "\nerror: " in block.text:
            [command], shown = block.commands, block.text.partition("\nerror: ")[2]
            with pytest.raises(ValueError, match=rf"(?s)^{re.escape(shown.rstrip())}$"):
                check(command)
        else:
            for command in block.commands:
                try:
                    check(command)
                except ValueError as error:
                    raise AssertionError(f"{where}: {command}: {error}") from error


@pages
def test_commands_within_sentences_have_such_flags(page: Path) -> None:
    for command in inline_commands(page):
        try:
            check(command, whole=False)
        except ValueError as error:
            raise AssertionError(f"{page.name}: `{command}`: {error}") from error


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("visft shrads a", "no command 'shrads'"),
        ("visft train --stage 2 --model debgu", "no such file"),
        ("visft train --stage 2 --model debug --set visft.sede=1", "did you mean visft.seed"),
        ("deepspeed --num_gpus 8 launchers/train.py --stage 3", "must be 1"),
        ("visft predict photos --modle runs/stage2", "its parser refuses it"),
        ("python tools/evaluate.py --run", "its parser refuses it"),
        ("python tools/evaluat.py --run a", "there is no tools/evaluat.py"),
        ("torchrun --nproc-per-node 2 -m visft_ds.launch --stages 1", "did you mean --stage"),
        ("python -m pytest tests/test_nothing.py", "there is no tests/test_nothing.py"),
        ("make demos", "no target demos"),
        ("pip install 'visft_ds[evals]'", "no extra evals"),
        ("visft plan --cluster 8xH100 --stagee 2", "did you mean --stage"),
    ],
)
def test_a_command_that_could_not_be_typed_is_found(command: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check(command)


def test_a_block_that_is_not_known_is_found() -> None:
    assert commands_in("== output\n  of something\n") == []
    assert commands_in("$ visft doctor\nready\n") == ["visft doctor"]
    assert commands_in("visft merge --adapter a \\\n    --out b\n") == ["visft merge --adapter a --out b"]
    with pytest.raises(ValueError, match="is no known command"):
        commands_in("visft doctor\nvisfd doctor\n")
    with pytest.raises(ValueError, match=r"visft\.dta"):
        check_json('{"visft": {"dta": {"root": "a"}}}')


@pytest.mark.parametrize("page", EVERY, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: there is no {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: no such heading"


def test_every_entry_of_the_log_has_a_row_in_its_table() -> None:
    log = ROOT / "docs/LOG.md"
    entries = {anchor for anchor in anchors(log) if anchor.startswith("20")}
    assert len(entries) > 60 and not entries - {target.removeprefix("#") for target in links(log)}


@pages
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """But in blocks, which are checked by what they are."""
    for text in NAMED.findall(re.sub(r"\]\([^)]*\)", "", FENCE.sub("", page.read_text(encoding="utf-8")))):
        parts = [part.split(",") for part in re.split(r"[{}]", text)]
        for name in ("".join(parts) for parts in itertools.product(*parts)):
            assert any(ROOT.glob(name)) or any(ROOT.glob(f"{name}.py")), f"{page.name} names {name}"


@pages
def test_lines_fit_a_screen(page: Path) -> None:
    """But those of tables, and what cannot be broken."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        assert len(line) <= 120 or line.startswith(("|", "![")) or len(words) < 3, f"{page.name}, line {number}"


def test_the_readme_is_read_in_four_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """docs/getting-started.md explains messages by what they say."""
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("visft_ds/**/*.py"))
    said = "".join(re.sub(r'"\n\s*f?"', "", text) for text in texts)
    text = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8").partition("| message |")[2]
    explained = [part for row in text.splitlines()[2:] for part in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(explained) >= 12
    assert [text for text in explained if text not in said] == []


def test_history_is_all_that_is_left_out() -> None:
    assert set(EVERY) - set(PAGES) == {*HISTORY, ROOT / "tests/claims.md"}
