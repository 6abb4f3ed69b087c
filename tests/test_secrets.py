"""Secrets are refused, or neither written nor printed."""

from __future__ import annotations

from pathlib import Path
from traceback import format_exception

import fsspec.config
import pytest

from tests.shard_server import serve
from visft_ds.data.fetch import download
from visft_ds.prepare.settle import settle
from visft_ds.redaction import redacted, redacted_values, refuse_secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/x?sig=abc#f", "https://***@host/x?***"),
        ("see https://host/f?sig=abc there", "see https://host/f?*** there"),
        ("not found: //me:pw@host/x", "not found: //***@host/x"),
        ("not found: me:pw@host:x/y, me:pw@host", "not found: ***@host:x/y, ***@host"),
        *(
            (text, text)
            for text in ("timm:NAME@0.5: no", "hf-hub:ORG/NAME@main", "open_clip:A:b@1", "a //b/c@d/e")
        ),
        ("the token is abcdefgh", "the token is ***"),
        *((text, text) for text in ("http://localhost:8000/a", "images/a?c.jpg", "tokenizer=ptb, tokens=4")),
    ],
)
def test_what_is_masked_and_what_is_not(text: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "abcdefgh")
    assert redacted(text) == masked
    assert redacted_values({"x": [1, None, text], "api_key": "y"}) == {
        "x": [1, None, masked],
        "api_key": "***",
    }


def test_the_url_of_a_folder_holds_no_secret() -> None:
    for url in ("https://host:80/a", "file:///folder#1", "folder?x"):
        refuse_secrets(url)
    for url in (
        "https://me:hidden@host/x",
        "https://host/x?token=hidden",
        "s3://key:hidden@bucket",
        "gs://b/x#hidden",
    ):
        with pytest.raises(ValueError, match="FSSPEC_HTTP") as refused:
            refuse_secrets(url)
        assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        *(["--api-token", "hidden"], ["--token=hidden"], ["--token:hidden"]),
        *(
            ["--set=comet.api_key=hidden"],
            ["--set=visft.run.api_key=hidden"],
            ['--set=comet={"key": "hidden"}'],
        ),
    ],
)
def test_a_secret_on_the_command_line_is_refused_without_a_word_of_it(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"token|api_key|comet") as refused:
        settle(["--stage", "1", "--model", "debug", *words])
    assert "hidden" not in str(refused.value)


def test_errors_of_a_server_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"headers": {"Authorization": "Bearer hidden1"}, "params": {"token": "hidden2"}}
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    with serve(tmp_path) as served, pytest.raises(ValueError, match="cannot be read") as refused:
        download(f"{served.url}/x", tmp_path / "x")  # the server wants neither header nor token
    assert "hidden" not in "".join(format_exception(refused.value)) + repr(refused.value.__cause__)
