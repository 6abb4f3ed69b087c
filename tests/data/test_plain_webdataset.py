"""Our shards are ordinary tars that any WebDataset reader opens, and what a reader could be tricked into is refused."""

from __future__ import annotations

import gc
import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.coco_tree import make_split
from visft_ds.data import open_webdataset as plain_webdataset
from visft_ds.data.manifest import Manifest
from visft_ds.data.open_webdataset import check_secure, open_split
from visft_ds.data.shards import ShardReader
from visft_ds.shards.shard_writer import TarWriter
from visft_ds.shards.verify import verify


@pytest.fixture(scope="module", autouse=True)
def _all_collected() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def _files_left_open() -> Iterator[None]:
    """webdataset leaves closing its files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect(1)  # what is young; all of it, with everything that torch has, takes a tenth of a second


def _check_samples(samples: list[dict[str, Any]], split: Manifest) -> None:
    """In the order of the index, keys as promised, both members with their bytes."""
    assert [sample["__key__"] for sample in samples] == [f"{one:012d}" for one in split.index["image_id"].tolist()]
    with ShardReader(split) as reader:
        for index, sample in enumerate(samples):
            assert {name for name in sample if not name.startswith("__")} == {"jpg", "json"}
            assert (sample["jpg"], sample["json"]) == reader.read(index)


def test_a_split_opens_in_order_with_all_its_bytes(split: Manifest) -> None:
    _check_samples(list(open_split(split)), split)
    decoded = next(iter(open_split(split).decode("rgb8")))
    row = split.index[0]
    assert decoded["jpg"].shape == (row["height"], row["width"], 3)
    assert decoded["json"]["image_id"] == row["image_id"]


def test_webdataset_alone_opens_the_shards(split: Manifest) -> None:
    urls = [str(split.root / shard.name) for shard in split.shards]
    wds = plain_webdataset.webdataset
    _check_samples(list(wds.WebDataset(urls, shardshuffle=False, empty_check=False)), split)


def test_pythons_tarfile_sees_what_is_promised(split: Manifest) -> None:
    for shard in split.shards:
        with tarfile.open(split.root / shard.name, "r:") as tar:
            members = tar.getmembers()
        assert len(members) == 2 * shard.count
        for image, label in zip(members[::2], members[1::2], strict=True):
            assert (image.name.split("."), label.name.split(".")) == (
                [image.name[:12], "jpg"],
                [image.name[:12], "json"],
            )
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type, bool(m.pax_headers)) for m in members}
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE, False)}
        assert shard.bytes % 10240 == 0, "other tar programs pad to this"
        first = (split.root / shard.name).read_bytes()[:512]
        assert first[257:265] == b"ustar\x0000", "POSIX USTAR, not the header of GNU tar"


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program on this machine")
def test_the_tar_program_sees_what_is_promised(split: Manifest) -> None:
    path = split.root / split.shards[0].name
    result = subprocess.run(
        ["tar", "--utc", "--full-time", "-tvf", str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    )
    if "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, timeout=600).stdout:
        pytest.skip("tar on this machine is not GNU tar, whose listing is known")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    keys = [f"{one:012d}" for one in split.index["image_id"][: split.shards[0].count].tolist()]
    assert [line[-1] for line in lines] == [f"{key}.{kind}" for key in keys for kind in ("jpg", "json")]
    assert {tuple(line[:2] + line[3:5]) for line in lines} == {("-rw-r--r--", "0/0", "1970-01-01", "00:00:00")}


class _Bomb:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


@pytest.mark.parametrize("extension", ["pyd", "pickle", "pkl", "pth", "py"])
def test_a_member_that_could_run_code_is_refused_and_never_run(split: Manifest, tmp_path: Path, extension: str) -> None:
    trace = tmp_path / "executed"
    copy = Path(shutil.copytree(split.root, tmp_path / "copy"))
    assert pickle.loads(pickle.dumps(_Bomb(trace))) is None and trace.exists(), "the bomb is a real one"  # noqa: S301
    trace.unlink()
    with open(copy / "toy-000001.tar", "wb") as file:
        tar = TarWriter(file)
        tar.add(f"000000000001.{extension}", pickle.dumps(_Bomb(trace)))
        tar.close()
    dataset = open_split(Manifest.load(copy, "toy", check_shards=False)).decode("rgb8")
    with pytest.raises(ValueError, match=rf"member '000000000001.{extension}' is not allowed in a shard"):
        list(dataset)
    # Even somebody who opens the file with the library alone is safe, because its security is on.
    if extension != "py":
        urls = str(copy / "toy-000001.tar")
        with pytest.raises((ValueError, plain_webdataset.webdataset.DecodingError)):
            list(plain_webdataset.webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert not trace.exists()


def test_shell_commands_as_urls_are_refused(tmp_path: Path) -> None:
    wds = plain_webdataset.webdataset
    with pytest.raises(ValueError, match="cannot open pipe URLs"):
        list(wds.WebDataset(f"pipe:touch {tmp_path}/executed", shardshuffle=False))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["a?b", "a#b", "a::b", "a;b"])
def test_paths_that_webdataset_would_misread_are_refused(split: Manifest, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(split.root, tmp_path / name))
    with pytest.raises(ValueError, match=r"would not take .* for a path"):
        open_split(Manifest.load(copy, "toy"))


def test_the_allow_list_cannot_be_replaced(split: Manifest) -> None:
    with pytest.raises(ValueError, match=r"filter samples with \.select\(\) instead"):
        open_split(split, select_files=None)


def test_an_insecure_import_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_secure()
    monkeypatch.setattr(plain_webdataset.webdataset.utils, "enforce_security", False)
    with pytest.raises(RuntimeError, match="imported before with its security off"):
        check_secure()


def test_security_is_on_where_the_environment_says_nothing() -> None:
    """In a process of its own, because an import happens once."""
    code = (
        "import os; os.environ.pop('WDS_SECURE', None); import visft_ds.data.open_webdataset as ours, webdataset; "
        "ours.check_secure(); print(webdataset.utils.enforce_security, os.environ['WDS_SECURE'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.stdout == "True 1\n", result.stderr


@pytest.mark.parametrize("kind", ["name", "symbolic link", "hard link", "device"])
def test_members_of_a_tar_stay_inside(tmp_path: Path, kind: str) -> None:
    split = make_split(tmp_path / "split")
    assert isinstance(split.root, Path)
    path = split.root / split.shards[0].name
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("../outside.jpg" if kind == "name" else "inside.jpg")
        member.type = {
            "name": tarfile.REGTYPE,
            "symbolic link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
        }[kind]
        member.linkname, member.size = "/etc/passwd" if "link" in kind else "", 3 if kind == "name" else 0
        tar.addfile(member, io.BytesIO(b"abc"[: member.size]))
    problems = [str(problem) for problem in verify(split.root, "toy")]
    assert any(path.name in problem for problem in problems), "its bytes are not those of the manifest"
    if kind != "name":
        assert any(f"is a {kind.replace('device', 'character device')}" in problem for problem in problems), problems
    samples = iter(open_split(Manifest.load(split.root, "toy", check_shards=False)))
    if kind == "name":
        with pytest.raises(ValueError, match=r"'\.\./outside.jpg' is not allowed: it leads out of its folder"):
            next(samples)
    else:
        assert "root:" not in str(next(samples)), "what is no file is passed over"
