"""What others may read: nothing that is written or printed holds a secret, and modes are those the user asks for."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from traceback import format_exception

import fsspec.config
import pytest
from visft_ds.data.store import open_store

import visft_ds
from tests.ranks import REPOSITORY
from tests.shard_server import serve
from visft_ds.redaction import redacted, redacted_values, redacted_words, refuse_secrets

#: Kind -> text that may stand nowhere.
SECRETS = {
    "hub token": "hf_QkVJTkdTRUNSRVQ",
    "environment key": "wJalrXUtnFEMIkeyOfTheEnvironment",
    "store key": "k3yOfTheStore",
    "password": "pa55-of-the-account",
    "query token": "t0k3n-of-the-query",
    "signature": "5ignatureOfAmazon",
    "sas": "5igOfAzure",
    "flag": "f1ag-behind-token",
    "tracker key": "ap1-key-of-the-tracker",
}


@pytest.fixture(
    scope="module", params=[pytest.param(0o027, id="027"), pytest.param(0o077, id="077", marks=pytest.mark.slow)]
)
def day(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, bytes]:
    """(folder of all that `secrets_case` wrote, umask, what it said)."""
    base = tmp_path_factory.mktemp("day")
    given = base / "secrets.json"
    given.write_text(json.dumps(SECRETS))
    words = [sys.executable, "-m", "tests.secrets_case", str(base / "all"), str(given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(
        words, cwd=REPOSITORY, env=environment, umask=request.param, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert found.returncode == 0, found.stdout.decode()[-6000:]
    return base / "all", request.param, found.stdout


def test_no_secret_is_written_or_printed(day: tuple[Path, int, bytes]) -> None:
    folder, _, said = day
    texts = {**SECRETS, "password, encoded": b64encode(f"me:{SECRETS['password']}".encode()).decode()}
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("run/run.json", "evaluation/metrics.json", "merged/README.md", "d/d.manifest.json"):
        assert files[name]
    everything = {**files, "the console": said}
    found = [(name, kind) for name, data in everything.items() for kind, text in texts.items() if text.encode() in data]
    shown = [line for line in said.decode().splitlines() if any(text in line for text in texts.values())]
    assert not found, f"{found}\n" + "\n".join(shown[:10])
    assert said.count(b"***") > 20, "the errors did not come to the secrets at all"


def test_modes_are_those_of_the_umask(day: tuple[Path, int, bytes]) -> None:
    folder, umask, _ = day
    wrong = {}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            wrong[str(path.relative_to(folder))] = oct(mode)
    assert wrong == {}
    assert any(path.suffix == ".whole" for path in folder.rglob("*")), "there was no cache"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/x?sig=abc#f", "https://***@host/x?***"),
        ("s3://key:with/and?@bucket/x", "s3://***@bucket/x"),
        ("see https://host/f?sig=abc: there is no such file", "see https://host/f?***: there is no such file"),
        ("abfs://box@account.dfs.core.windows.net/x?sv=1&sig=Z", "abfs://box@account.dfs.core.windows.net/x?***"),
        ("Authorization: Basic dXNlcg==, more", "Authorization: Basic ***, more"),
        ("'Authorization': 'Bearer abc', 'b': 1", "'Authorization': '***', 'b': 1"),
        ("illegal header b'Bearer hf_q'", "illegal header b'Bearer ***'"),
        (
            "Max retries exceeded with url: /p?X-Amz-Signature=ABC&v=1",
            "Max retries exceeded with url: /p?X-Amz-Signature=***&v=1",
        ),
        ("AccountName=a;AccountKey=abc;x", "AccountName=a;AccountKey=***;x"),
        ('{"api_key": "zzz", "x": 1}', '{"api_key": "***", "x": 1}'),
        ("password='a b&c,d', x=1", "password='***', x=1"),
        (r'{"password": "a; \"b\" c", "x": 1}', '{"password": "***", "x": 1}'),
        *(
            (text, text)
            for text in (
                "http://localhost:8000/a@b",
                "http://[::1]:80/x@y",
                "hf://datasets/a/b@main/x",
                "images/a?c.jpg",
                "tokenizer=ptb, tokens=4, pad_token=<pad>, token: 3",
                "Basic settings of it",
            )
        ),
    ],
)
def test_what_is_masked_and_what_is_not(text: str, masked: str) -> None:
    assert redacted(text) == masked


def test_commands_and_records_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "abcdefgh")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    words = ["visft", "--token", "x", "--data", "https://a:b@h", "--api-key=q", "abcdefgh", "falsehood"]
    masked = ["visft", "--token", "***", "--data", "https://***@h", "--api-key=***", "***", "falsehood"]
    assert redacted_words(words) == masked
    values = {"comet": {"api_key": "x", "project": "p"}, "list": [1, None, "https://a:b@h"], "pad_token": "<pad>"}
    expected = {"comet": {"api_key": "***", "project": "p"}, "list": [1, None, "https://***@h"], "pad_token": "<pad>"}
    assert redacted_values(values) == expected


def test_the_url_of_a_folder_holds_no_secret() -> None:
    refuse_secrets("https://host:80/a@b")
    refuse_secrets("file:///folder#1")
    refuse_secrets("folder?x")
    for url in ("https://me:hidden@host/x", "https://host/x?token=hidden", "s3://key:hidden@bucket", "gs://b/x#hidden"):
        with pytest.raises(ValueError, match="FSSPEC_HTTP") as refused:
            refuse_secrets(url)
        assert "hidden" not in str(refused.value)


def test_tracebacks_hold_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    visft_ds._name_missing_package(RuntimeError, RuntimeError("no answer of https://me:hidden@host"), None)
    assert capsys.readouterr().err == "RuntimeError: no answer of https://***@host\n"
    options = {"headers": {"Authorization": "Bearer hidden1"}, "params": {"token": "hidden2"}}
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    with serve(tmp_path) as served, pytest.raises(ValueError, match="access was denied") as refused:
        open_store(served.url).load("x")  # the server wants neither header nor token
    assert "ClientResponseError" in "".join(format_exception(refused.value))
    assert "hidden" not in "".join(format_exception(refused.value)) + repr(refused.value.__cause__)
