"""Commands as pages, launchers, help and messages print them, pasted: each meets the parser that it would
meet.

Training commands are resolved and their batches divided among the ranks that their launcher starts, up to
where torch would be needed; for more ranks than the batch allows the message must say what to add, and that
must work. Other commands are stopped once their flags are read. What is not run here is listed in
`ELSEWHERE`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from deepspeed.launcher import runner
from torch.distributed.run import get_args_parser

from tests.coco_tree import write_tree
from tests.options import known_keys
from visft_ds import cli, doctor, flags, launch
from visft_ds.config import ResolvedConfig, derive_batches, resolve
from visft_ds.config.record import RUN_SCHEMA
from visft_ds.config.resolve import available
from visft_ds.doctor import check_memory
from visft_ds.planner import command as planner
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.model import deepspeed_dict
from visft_ds.prepare.settle import settle
from visft_ds.pretrained import on_hub
from visft_ds.profiling import command as profile
from visft_ds.resilience.processes import without_num_gpus
from visft_ds.shards import cli as shards_cli
from visft_ds.tasks import entries

ROOT = Path(__file__).resolve().parents[1]
#: What `make docs` writes from the code beside the pages.
WRITTEN = ("api.md", "configuration.md", "numbers.md")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ds_configs/README.md",
    *(page for page in (ROOT / "docs").glob("*.md") if page.name not in WRITTEN),
]
FORMS = [*(ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"), ROOT / "SECURITY.md"]
SCRIPTS = [*(ROOT / "launchers").iterdir(), *(ROOT / "tools").iterdir()]
HOSTFILE = ROOT / "launchers/hostfile.example"
RANKS = (1, 8, 16, 64)
#: Flags of other programs that texts name: pip, SLURM, torchrun, git, curl, mypy, TensorBoard.
OTHERS_FLAGS = (
    *("--no-deps", "--no-index", "--index-url", "--no-build-isolation"),
    *("--onnx", "--minShapes", "--optShapes", "--maxShapes"),  # of trtexec
    *("--nodes", "--ntasks", "--ntasks-per-node", "--gres", "--signal"),
    *("--nnodes", "--node_rank", "--nproc_per_node", "--nproc-per-node", "--master_addr", "--master_port"),
    *(
        "--standalone",
        "--max-restarts",
        "--no-python",
        "--always",
        "--dirty",
        "--abbrev",
        "--exclude",
        "--create-dirs",
    ),
    "--strict",
    "--logdir",
)
#: Programs that are not of this project; of `make` and `pip` the target and the extra are looked up.
ELSEWHERE = (
    "curl",
    "export",
    "hf",
    "tensorboard",
    "pyproject-build",
    "twine",
    "tools/gpu.sh",
    "tools/gpu_kit.sh",
    "unzip",
    "wget",
)
SCRIPTED = {"launchers/train.py": "train", "tools/profile.py": "profile"}
SCRIPTED |= {"visft_ds.launch": "train", "tools/merge_lora.py": "merge", "tools/make_shards.py": "shards"}
#: Names that stand for something of the user's, in commands that a page prints.
FOLDERS = (
    "MYFOLDER",
    "coco",
    "photos",
    "rooms",
    "MYPHOTOS",
    "ADAPTER",
    "HEADS",
    "published",
    "shards",
    "data/coco",
)
RUNS = ("RUN", "runs/stage2", "runs/stage1")


class Command(NamedTuple):
    """A command of this project, without its launcher."""

    name: str  #: such as "train"
    words: list[str]
    ranks: int  #: that the launcher starts


# Where commands are printed


def blocks(text: str) -> Iterator[str]:
    """Lines of the fenced blocks of a page that a shell reads, one command each; of a transcript those after
    `$`.
    """
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language:
            continue
        lines = block.replace("\\\n", " ").splitlines()
        if lines[0].startswith("$ "):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        # Evidence records how rows were made: for any seed, and with a gap for what stands in the line above.
        yield from (line.replace("=SEED", "=1") for line in lines if " ... " not in line)


def mentions(text: str) -> Iterator[str]:
    """Commands within a sentence; those with a gap for the reader, such as `visft report RUN [RUN ...]`, are
    none.
    """
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        programs = (
            "visft ",
            "deepspeed --",
            "torchrun ",
            "sbatch --nodes",
            "python -m visft_ds ",
            "python launchers/",
        )
        begins = span.startswith((*programs, "python tools/"))
        if begins and not re.search(r"\.\.\.|\[|COMMAND", span):
            yield span


def of_help(text: str) -> Iterator[str]:
    """Examples in the help of a command, which stand in lines of their own; what follows two spaces explains
    them.
    """
    for line in text.splitlines():
        example = re.split(r"\s{2,}", line.strip())[0]
        if re.match(r"\s+(visft|deepspeed|torchrun) ", line) and not re.search(r"\.\.\.|\[|COMMAND", example):
            yield example


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands of a page name, as far as resolving a command looks at it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(entries(), "classification", "tests.fourth_task:SPEC")  # the task of architecture.md
    for name in FOLDERS:
        (tmp_path / name).mkdir(parents=True)
    for name in RUNS:
        (tmp_path / name).mkdir(parents=True)
        stage = int(name[-1]) if name[-1].isdigit() else 1
        settings = ["visft.data.root=MYFOLDER-shards"] if name == "runs/stage1" else []
        config = resolve(stage=stage, model="debug", settings=settings).to_dict()
        record = {"schema": RUN_SCHEMA, "config": config}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    (tmp_path / "hostfile").write_bytes((ROOT / "launchers/hostfile.example").read_bytes())
    monkeypatch.setattr(
        "visft_ds.prepare.settle.on_this_machine", lambda *_, **__: None
    )  # --download fetches nothing
    return tmp_path


# What a shell and a launcher make of them


def parse(text: str) -> Command | None:
    """The command of this project in a line; None for other programs."""
    words = shlex.split(re.sub(r"\$\(.*\)", "X", text), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if not words:
        return None
    program, rest = words[0], words[1:]
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert set(targets) <= set(
            re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        ), text
        return None
    if "pip" in words[:3]:
        extras = [name for group in re.findall(r"\[([\w,]+)\]", text) for name in group.split(",")]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(extras) <= set(known), text
        return None
    if program in ELSEWHERE:
        return None
    if program in ("python", "python3"):
        return of_module(rest)
    if program == "visft":
        return counted(rest[0], rest[1:]) if rest[0] in cli.COMMANDS else None
    if program == "deepspeed":
        given = runner.parse_args(rest)
        ranks = given.num_gpus
        if ranks < 0:
            ranks = sum(runner.fetch_hostfile(given.hostfile).values())
        return of_script(given.user_script, given.user_args, ranks)
    if program == "torchrun":
        given = get_args_parser().parse_args(rest)
        ranks = int(given.nnodes.split(":")[0]) * int(given.nproc_per_node)
        return of_script(given.training_script, given.training_script_args, ranks)
    assert program == "sbatch", text
    return of_slurm(rest)


def counted(name: str, words: Sequence[str]) -> Command:
    rest, count = without_num_gpus(words)
    return Command(name, rest, count or 1)


def of_module(words: Sequence[str]) -> Command | None:
    """`python -m visft_ds NAME`, or a script of this repository."""
    if words[0] != "-m":
        return of_script(words[0], words[1:], 1)
    return counted(words[2], words[3:]) if words[1] == "visft_ds" else None


def of_script(script: str, words: Sequence[str], ranks: int) -> Command | None:
    if script == "SCRIPT":  # the reader's own
        return None
    if script == "visft_ds":
        return Command(words[0], list(words[1:]), ranks)
    assert script == "visft_ds.launch" or (ROOT / script).is_file(), script
    return Command(SCRIPTED[script], list(words), ranks)


def of_slurm(words: Sequence[str]) -> Command:
    """Options of sbatch stand before the script and win over those in it."""
    place = words.index("launchers/slurm.sbatch")
    text = (ROOT / words[place]).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    named = " ".join(words[:place]).replace("=", " ").split()
    options |= {flag.removeprefix("--"): value for flag, value in zip(named[::2], named[1::2], strict=True)}
    ranks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}", "a task for each GPU"
    return Command("train", list(words[place + 1 :]), ranks)


# Pasting


class Parsed(BaseException):
    """The flags of a command were read."""


def paste(command: Command, monkeypatch: pytest.MonkeyPatch) -> ResolvedConfig | None:
    """Read a command's flags as the command does; of a training one resolve all, and divide its batches.

    Raises ValueError or SystemExit for what the command refuses.
    """
    name, words, ranks = command
    if name == "profile":
        _, words = profile.build_parser().parse_known_args(words)
        name = "train"
    if name != "train":
        read_flags(name, words, monkeypatch)
        return None
    config = settle(words).config
    ranks = max(ranks, config.pipeline_stages)  # as a dry run on one process
    batches = derive_batches(config, ranks)
    precision = config.visft.model.precision
    deepspeed_dict(config, batches, "bf16" if precision == "auto" else precision)
    return config


def read_flags(
    name: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch, *, all_of_it: bool = True
) -> None:
    """Let a command read its flags, and no more. `all_of_it`: what is required must be there."""
    read = flags.Parser.parse_args

    def stop(parser: Any, *given: Any) -> Any:
        for action in parser._actions if not all_of_it else ():
            action.required = False
        read(parser, *given)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", stop)
        try:
            status = cli.main([name, *words])
        except Parsed:
            return
    raise ValueError(f"ended with {status} before its flags were read")


def failures(place: str, lines: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of the commands printed in a place those that fail, with why."""
    failed = list[str]()
    for line in lines:
        try:
            command = parse(line)
            if command is not None and "--help" not in command.words:
                paste(command, monkeypatch)
        except (ValueError, OSError, SystemExit, AssertionError, KeyError) as error:
            failed.append(f"{place}: {line}\n    {error!r}")
    return failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_accepted(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    assert failures(page.name, [*blocks(text)], monkeypatch) == []
    for span in mentions(text):
        command = parse(span)
        if command is not None and "--help" not in command.words:
            read_flags(command.name, command.words, monkeypatch, all_of_it=False)


def test_the_commands_of_scripts_and_forms_are_accepted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[str]()
    for file in (*SCRIPTS, *FORMS):
        text = file.read_text(encoding="utf-8")
        lines = re.findall(r"^# +((?:sbatch|deepspeed) .+)$", text, re.MULTILINE)
        lines += [span for span in mentions(text) if "--" in span]
        assert failures(file.name, lines, monkeypatch) == []
        found += lines
    assert any(line.startswith("sbatch") for line in found)


def test_the_examples_of_help_are_accepted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 0
    for words in (["--help"], *([name, "--help"] for name in cli.COMMANDS)):
        with contextlib.suppress(SystemExit):
            cli.main(words)
        lines = [*of_help(capsys.readouterr().out)]
        count += len(lines)
        assert failures(" ".join(words), lines, monkeypatch) == []
    assert count > 20


def every_training() -> Iterator[Command]:
    """Every command of visft train in a block of a page, whatever launcher it has."""
    for page in PAGES:
        for line in blocks(page.read_text(encoding="utf-8")):
            command = parse(line.replace("--hostfile hostfile", f"--hostfile {HOSTFILE}"))
            if command is not None and command.name == "train":
                yield command


def distinct_trainings() -> dict[str, list[str]]:
    """Words of these commands, each once."""
    return {shlex.join(command.words): command.words for command in every_training()}


def of_output(text: str) -> list[str]:
    """Commands in lines of their own that a command prints, or behind the colon of a line."""
    return re.findall(r"^(?:.*?: )? *((?:visft|deepspeed|sbatch|hf|pip|curl) .+)$", text, re.MULTILINE)


@pytest.mark.parametrize("model", available("models"))
def test_what_makes_missing_inputs_can_be_pasted(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is downloaded to, it is looked for."""
    (here / "data/coco").rename(here / "elsewhere")
    for stage in (1, 2):
        config = resolve(stage=stage, model=model)
        lines = of_output(render_missing(missing_inputs(config)).partition("make them with:")[2])
        assert lines
        (here / "FOLDER").mkdir(exist_ok=True)
        assert failures(model, lines, monkeypatch) == []
        for repository, file in re.findall(r"^hf download (\S+) (\S+)$", "\n".join(lines), re.MULTILINE):
            assert on_hub(str(config.visft.model.weights)) == f"hf-hub:{repository}/{file}"


@pytest.mark.parametrize(
    ("cluster", "ranks", "batch", "images", "rate"),
    [
        ("1xA10G", 1, (), 32, 2e-3),
        ("8xH100", 8, ("--batch-size", "128"), 128, 4e-3),
        ("2x8xH100", 16, ("--batch-size", "128", "--set", "optimizer.params.lr=3e-3"), 128, 3e-3),
        ("8x8xL40", 64, ("--batch-size", "16"), 64, 2.8e-3),
    ],
)
def test_what_plan_prints_can_be_pasted(
    cluster: str,
    ranks: int,
    batch: tuple[str, ...],
    images: int,
    rate: float,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the user's own settings, and the learning rate that goes with the batch; the ranks are those of
    the launcher, whose hostfile has as many machines.
    """
    machines = max(1, ranks // 8)
    (here / "hostfile").write_text("".join(f"node-{number} slots=8\n" for number in range(machines)))
    own = ["--set", "visft.tasks=detection", "--set", "visft.model.weights=a file.pt"]
    words = ["--cluster", cluster, "--stage", "2", "--model", "debug", *own, *batch]
    assert planner.main(words) == 0
    lines = of_output(capsys.readouterr().out)
    assert len(lines) == (2 if machines > 1 else 1)
    for line in lines:
        command = parse(line)
        assert command is not None and command.ranks == ranks
        config = paste(command, monkeypatch)
        assert config is not None and (config.visft.stage, config.visft.model.preset) == (2, "debug")
        assert (
            set(config.visft.tasks.enabled()) == {"detection"} and config.visft.model.weights == "a file.pt"
        )
        assert derive_batches(config, ranks).batch_size == {"detection": images}
        assert config.optimizer.params.lr == rate and line.count("--batch-size") <= 1


def test_a_plan_that_does_not_fit_prints_no_command_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("visft_ds.planner.search.MEMORY_SHARE", 1e-6)
    words = ["--cluster", "1xT4", "--stage", "2", "--model", "debug", "--set", "visft.tasks=detection"]
    assert planner.main([*words, "--batch-size", "1"]) == 2
    printed = capsys.readouterr().out
    assert "nothing fits" in printed and of_output(printed) == []
    assert all(engine in printed for engine in ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"))


def test_what_shards_and_doctor_print_can_be_pasted(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(here / "some pictures", 8)
    for file, kind in ((tree.instances, "instances"), (tree.captions, "captions")):
        file.rename(file.with_name(f"{kind}_valid.json"))
    (here / "some pictures/images").rename(here / "some pictures/valid")
    assert shards_cli.main(["some pictures"]) == 0
    (line,) = of_output(capsys.readouterr().out)
    assert failures("shards", [line], monkeypatch) == []
    monkeypatch.setattr("visft_ds.planner.memory.plan_largest", lambda _: SimpleNamespace(total=2**60))
    monkeypatch.setattr("visft_ds.doctor.examine", lambda *_: check_memory("debug"))
    assert doctor.main([]) == 1
    lines = of_output(capsys.readouterr().out)
    assert len(lines) == 2 and failures("doctor", lines, monkeypatch) == []


def test_flags_and_keys_in_messages_and_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever text of the package or of a page names: a flag is one of some command, a key one of the
    schema.
    """
    known = {"--local_rank", "--version", *OTHERS_FLAGS}
    for words in (
        *([name, "--help"] for name in cli.COMMANDS),
        ["shards", "build", "--help"],
        ["shards", "permute", "--help"],
        ["shards", "index", "--help"],
    ):
        with contextlib.suppress(SystemExit):
            cli.main(words)
        known |= set(re.findall(r"--[a-zA-Z][\w-]*", capsys.readouterr().out))
    keys = [*known_keys(), "visft.tasks.classification"]  # the example of a task of one's own
    unknown = list[str]()
    texts = {place: "\n".join(messages) for place, messages in texts_of_package().items()}
    for page in (*PAGES, *FORMS):  # but of tools of the tests, whose flags nothing but they know
        plain = re.sub(r"python -m tests\.[^`]*", "", page.read_text(encoding="utf-8"))
        texts[str(page.relative_to(ROOT))] = plain
    for place, text in texts.items():
        unknown += [
            f"{place}: {flag}"
            for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)
            if flag not in known
        ]
        for key in re.findall(r"(?<![\w/.-])visft\.[a-z][\w.]*\w", text):
            plain = re.sub(r"\.(\d+|N)\b", ".0", key)
            if plain not in keys and not any(other.startswith(f"{plain}.") for other in keys):
                unknown.append(f"{place}: {key}")
    assert unknown == [], "\n".join(unknown)


def test_messages_that_are_explained_are_printed() -> None:
    """Each message of the page is a text of the package, with a gap for `...`."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(explained) > 20
    texts = [text for messages in texts_of_package().values() for text in messages]
    unknown = [message for message in explained if not any(prints(text, message) for text in texts)]
    assert unknown == []


def prints(text: str, message: str) -> bool:
    """Return True if the words of a message stand in a text, in their order."""
    place = 0
    for words in message.split("..."):
        place = text.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


@functools.cache
def texts_of_package() -> dict[str, list[str]]:
    """Module -> its texts."""
    texts = dict[str, list[str]]()
    for file in (ROOT / "visft_ds").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts[str(file.relative_to(ROOT))] = list(texts_in(tree))
    return texts


def texts_in(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, of which a message consists; a gap stands for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_on_more_ranks_a_command_works_or_is_told_what_to_add(here: Path) -> None:
    added = set[str]()
    for words in distinct_trainings().values():
        config = settle(words).config
        for ranks in RANKS:
            if ranks % config.pipeline_stages:
                continue
            try:
                derive_batches(config, ranks)
                continue
            except ValueError as error:
                advice = re.search(r": add (.+?) \(for Adam", str(error))
            assert advice is not None, words
            larger = settle([*words, *shlex.split(advice[1])]).config
            assert derive_batches(larger, ranks).processes == ranks
            added.add(advice[1])
    assert "--batch-size 64 --lr 2.8e-5" in added


@pytest.mark.parametrize("stage", [1, 2])
def test_the_flags_for_more_gpus_are_those_that_a_start_advises(stage: int) -> None:
    """The page says for 16, 32 and 64 GPUs what a start on 64 says; the first try of a cluster runs on any of
    them.
    """
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| 16, 32, 64 \|(.+)\|(.+)\|$", page, re.MULTILINE)
    (flags_of_page,) = re.findall("`(.+)`", row[stage - 1])
    with pytest.raises(ValueError, match=re.escape(f": add {flags_of_page} (")):
        derive_batches(resolve(stage=stage), 64)
    words = ["--stage", str(stage), *shlex.split(flags_of_page)]
    (first_try,) = re.findall(r"`(--stage 1 --model debug .+)`", page)
    for ranks in (16, 32, 64):
        for line in (words, shlex.split(first_try)):
            assert derive_batches(settle(line).config, ranks).processes == ranks


@pytest.mark.slow
@pytest.mark.parametrize("words", distinct_trainings().values(), ids=shlex.join)
def test_a_printed_training_command_runs_dry(
    words: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole dry run, as rank 0 of the ranks that its launcher starts; only files may be missing."""
    ranks = max(command.ranks for command in every_training() if command.words == words)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    status = launch.main([*words, "--dry-run"])
    printed = capsys.readouterr()
    assert status == 0 or "this run cannot start" in printed.err, printed.err
    assert "dry run: nothing is started" in printed.out
