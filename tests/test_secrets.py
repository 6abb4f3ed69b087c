"""Secrets are neither written nor printed."""

from __future__ import annotations

from pathlib import Path
from traceback import format_exception

import fsspec.config
import pytest

import visft_ds
from tests.shard_server import serve
from visft_ds.data.fetch import Cache, RemoteFolder
from visft_ds.redaction import redacted, redacted_values, redacted_words, refuse_secrets


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
    with serve(tmp_path) as served, pytest.raises(ValueError, match="cannot be read") as refused:
        RemoteFolder(served.url, Cache(tmp_path)).read("x", 9)  # the server wants neither header nor token
    assert "ClientResponseError" in str(refused.value)
    assert "hidden" not in "".join(format_exception(refused.value)) + repr(refused.value.__cause__)
