"""The pages as data: their blocks, the commands in them, and the parser that each command is read by.

`python -m tests.pages` lists every block with what is done with it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from visft_ds.cli import COMMANDS
from visft_ds.config import build_parser, resolve, resolve_arguments
from visft_ds.shards.cli import COMMANDS as SHARDS

ROOT = Path(__file__).parents[1]
#: Their commands are history.
HISTORY = (ROOT / "docs/LOG.md", ROOT / "CHANGELOG.md")
EVERY = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ds_configs/*.md"), ROOT / "tests/claims.md"})
PAGES = [page for page in EVERY if page not in HISTORY and page.name != "claims.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
#: At the start of a line or of inline code, maybe behind a prompt and variables.
VARIABLES = r"(?:[A-Z_]+=\S+ )*"
OURS = ("visft", "python", "python3", "deepspeed", "torchrun", "make", "pip")
#: Programs of others, whose flags nobody here can read.
OTHERS = {
    "export": "sets a variable of the shell",
    "cd": "changes the folder",
    "cp": "copies a file",
    "git": "git's own",
    "hf": "of huggingface_hub, needs the network",
    "aws": "of Amazon, needs the network",
    "ssh": "needs another machine",
    "scp": "needs another machine",
    "tar": "unpacks what scp brought",
    "sbatch": "needs SLURM; `make test-cluster` runs it",
    "srun": "needs SLURM; `make test-cluster` runs it",
    "docker": "needs a container engine",
    "tensorboard": "starts a server",
    "bash": "a script of its own",
    "tools/gpu_kit.sh": "packs a folder for another machine",
    ".": "enters an environment",
}
_START = re.compile(rf"(?:\$ )?{VARIABLES}(?:{'|'.join(map(re.escape, (*OURS, *OTHERS)))})(?= |$)")
#: Signatures, compared with the code.
GENERATED = {"docs/api.md": "written from the code, which tests/test_api.py compares"}
#: Words that stand for something of the reader's.
PLACEHOLDERS = {"MODEL": "debug", "KEY=VALUE": "visft.seed=1", "N": "2"}
#: How a block without commands of a shell is checked, by the word behind its fence.
KINDS = {
    "python": "compiled; run by a slow test",
    "json": "parsed; keys of a configuration are looked up",
    "text": "output, or a drawing: there is nothing to run",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Its commands, each on one line; behind prompts, if it has any: what is not is output."""
        return commands_in(self.text) if self.kind in ("", "bash", "console", "sh") else []


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def commands_in(text: str) -> list[str]:
    """Commands of a block. Raises ValueError for a line that is neither a command nor behind a prompt's output."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    if prompts := [line[2:] for line in lines if line.startswith("$ ")]:
        return prompts
    found = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    strange = [line for line in found if not _START.match(line)]
    if strange and len(strange) < len(found):
        raise ValueError(f"{strange[0]!r} is no known command: put a prompt before those that are, or apart what it is")
    return [] if strange else found


def inline_commands(page: Path) -> list[str]:
    """`visft ...` and the like within sentences and tables, which may leave out what does not matter there."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(rf"(?<!`)`({VARIABLES}(?:visft|deepspeed|torchrun|python) [^`\n]+)`(?!`)", text)


class Told(Exception):
    """What a parser was given, and what it made of it."""

    def __init__(self, parser: argparse.ArgumentParser, rest: Sequence[str]) -> None:
        super().__init__()
        self.parser, self.rest = parser, list(rest)


def asked(main: Callable[[Sequence[str]], Any], words: Sequence[str], *, only_flags: bool) -> Told:
    """Call a command until it has read its flags, and no further.

    Args:
        only_flags: do not even read them.
    """
    original, depth = argparse.ArgumentParser.parse_known_args, 0

    def spy(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> Any:
        nonlocal depth
        if depth == 0 and only_flags:
            raise Told(parser, ())
        depth += 1
        try:
            found, rest = original(parser, *given, **more)
        finally:
            depth -= 1
        if depth == 0:
            raise Told(parser, rest)
        return found, rest

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", spy):
        try:
            main(list(words))
        except Told as told:
            return told
    raise AssertionError(f"{words} are read by no parser")


def check(command: str, *, whole: bool = True) -> str:
    """Read a command by its own parser; returns what was done with it.

    Args:
        whole: it could be typed as it is; else only its program and flags are looked up.

    Raises:
        ValueError: it could not be typed: an unknown command, flag, key, file, test or target of make.
    """
    words = shlex.split(command.removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    whole = whole and not any(word in ("...", "[...]") for word in words)
    program, *rest = (PLACEHOLDERS.get(word, word) for word in words)
    for sign in ("|", ">", "2>", "&", "&&", ";"):
        if sign in rest:
            rest = rest[: rest.index(sign)]
    if program in OTHERS:
        return OTHERS[program]
    return {
        "visft": _visft,
        "deepspeed": _launched,
        "torchrun": _launched,
        "make": _make,
        "pip": _pip,
    }.get(program, _python)(rest, whole, *([program] if program in ("deepspeed", "torchrun") else []))


def _visft(words: Sequence[str], whole: bool) -> str:
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--num_gpus=") else [word])]
    if not whole and words[0] in ("COMMAND", "--help", "--version"):
        return "names all commands"
    if words[0] in ("--help", "--version"):
        return "prints and ends"
    if words[0] not in COMMANDS:
        raise ValueError(f"visft has no command {words[0]!r}")
    words = list(words)
    if "--num_gpus" in words:
        place = words.index("--num_gpus")
        words[place : place + 2] = []
    known = COMMANDS[words[0]]
    return _ours(getattr(import_module(known.module), known.function), words[0], words[1:], whole)


def _ours(main: Callable[[Sequence[str]], Any], name: str, words: Sequence[str], whole: bool) -> str:
    """A command of the package: read by its parser, and the rest, flags of a training, by that of visft train."""
    if name == "shards" and words and words[0] not in (*SHARDS, "--help"):
        words = ["build", *words]  # as the command does where the folder is there
    trains = main.__module__ == "visft_ds.launch"
    if whole and "--help" not in words:
        told = None if trains else _read(main, words)
        if trains or (told is not None and told.rest and name in ("plan", "profile", "shards")):
            if told is None or told.rest[0].startswith("--"):  # else the folder of `visft shards info`
                _training(words if told is None else told.rest)
        elif told is not None and told.rest:
            raise ValueError(f"{name} does not know {told.rest}")
        return "read by its parser"
    flags = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
    if "--" in words:
        flags = {word for word in words[: words.index("--")] if word.startswith("--")}
    known = _flags(build_parser())
    if not trains:
        told = asked(main, [word for word in words if word != "--help"], only_flags=True)
        known = _flags(told.parser) | (known if name in ("plan", "profile", "shards") else set())
    if unknown := flags - known - {"--help"}:
        raise ValueError(f"{name} has no flags {', '.join(sorted(unknown))}")
    return "its flags are looked up"


def _read(main: Callable[[Sequence[str]], Any], words: Sequence[str]) -> Told:
    try:
        return asked(main, words, only_flags=False)
    except (SystemExit, argparse.ArgumentError) as error:
        raise ValueError(f"{' '.join(words)}: its parser refuses it") from error


def _training(words: Sequence[str]) -> None:
    """Resolve the configuration of a training; of one that begins with another run, which is not here, the flags."""
    if "--from" in words or "--deepspeed_config" in words or "--run" in words:
        unknown = {word for word in build_parser().parse_known_args(words)[1] if word.startswith("--")} - {"--run"}
        if unknown:
            raise ValueError(f"visft train does not know {', '.join(unknown)}")
        return
    words = [word for word in words if word != "--download"]  # nothing is fetched here
    own = [word for word in words if re.fullmatch(r"[\w./]+\.json", word)]
    resolve_arguments(["debug" if word in own else word for word in words])


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    found = {flag for flag in parser._option_string_actions if flag.startswith("--")}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set[str]().union(*(_flags(inner) for inner in action.choices.values()))
    return found


def _launched(words: Sequence[str], whole: bool, launcher: str) -> str:
    """`deepspeed FLAGS SCRIPT ...`, `torchrun FLAGS -m MODULE ...`: the launcher's parser finds where ours begins."""
    if not whole:
        place = next((i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("visft_ds")), None)
        if place is None:
            return "names the launcher"
        return _program(words[place], words[place + 1 :], whole)
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words)
        return _program(found.training_script, found.training_script_args, whole)
    from deepspeed.launcher.runner import parse_args

    found = parse_args(words)
    return _program(found.user_script, found.user_args, whole)


def _python(words: Sequence[str], whole: bool) -> str:
    return _program(words[1], words[2:], whole) if words[0] == "-m" else _program(words[0], words[1:], whole)


def _program(name: str, words: Sequence[str], whole: bool) -> str:
    """A script of the checkout or a module."""
    if name == "visft_ds":
        return _visft(words, whole)
    if name == "visft_ds.launch":
        return _ours(import_module(name).main, "train", words, whole)
    if name == "pip":
        return _pip(words, whole)
    if name == "pytest":
        files = [word.partition("::")[0] for word in words if word.startswith("tests")]
        if lacking := [file for file in files if not _exists(file)]:
            raise ValueError(f"pytest: there is no {lacking[0]}")
        return "its files are looked up; the suite runs them"
    if re.fullmatch(r"(tools|launchers)/\w+\.py", name) and _exists(name):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["main"]:
                assert node.module is not None
                main = import_module(node.module).main
                return _ours(main, {"make_shards": "shards"}.get(Path(name).stem, Path(name).stem), words, whole)
        return "a program of the checkout: it is there"
    if name.startswith("tests."):
        if not _exists(name.replace(".", "/")) and not _exists(name.replace(".", "/") + ".py"):
            raise ValueError(f"there is no {name}")
        return "a module of the tests: it is there"
    if re.fullmatch(r"[\w/]+\.py|SCRIPT|FILE", name) and not (ROOT / name.partition("/")[0]).is_dir():
        return "a program of the reader's own"
    raise ValueError(f"there is no {name}")


def _exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/"))) if "*" in path else (ROOT / path).exists()


def _make(words: Sequence[str], whole: bool) -> str:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    if unknown := [word for word in words if re.fullmatch(r"[a-z][a-z-]+", word) and word not in targets]:
        raise ValueError(f"make has no target {unknown[0]}")
    return "a target of the Makefile"


def _pip(words: Sequence[str], whole: bool) -> str:
    extras = {extra for word in words if (found := re.search(r"\[([\w,]+)\]$", word)) for extra in found[1].split(",")}
    if unknown := extras - set(_extras()):
        raise ValueError(f"there is no extra {', '.join(unknown)}")
    return "its extras are looked up"


@functools.cache
def _extras() -> tuple[str, ...]:
    with mock.patch("setuptools.setup") as setup:
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": ROOT / "setup.py"})
    return tuple(setup.call_args.kwargs["extras_require"])


def check_json(text: str) -> str:
    """Parse a JSON block; look up the keys of one that is a configuration. Raises ValueError."""
    content = json.loads(text if text.lstrip().startswith(("{", "[")) else f"{{{text}}}")
    if not isinstance(content, dict) or not {"visft", "zero_optimization", "optimizer"} & set(content):
        return "parsed"
    stage = content.get("visft", {}).get("stage", 2)
    resolve(stage=stage, model="debug", settings=[f"{k}={json.dumps(v)}" for k, v in _leaves(content)])
    return "parsed, its keys are looked up"


def _leaves(content: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def anchors(page: Path) -> set[str]:
    """Names of the headings of a page, as GitHub and the HTML have them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{n}" if n else slug for slug, last in found.items() for n in range(last + 1)}


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page, but those of the web."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def described() -> Iterator[str]:
    """A line for each block of each page: place, kind, what is done with it."""
    for page in PAGES:
        for block in blocks(page):
            if block.commands:
                done = "; ".join(sorted({check(command) for command in block.commands}))
            else:
                done = GENERATED.get(str(page.relative_to(ROOT))) or KINDS.get(block.kind, "NOTHING")
            yield f"{page.relative_to(ROOT)}:{block.line}: {block.kind or 'commands'}: {done}"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(*described(), sep="\n")
