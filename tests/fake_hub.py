"""A Hugging Face hub on loopback, as far as huggingface_hub asks it for models: facts, files, refusals."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files by name."""

    files: dict[str, bytes]


@dataclass
class FakeHub:
    """What the hub has, what goes wrong, and what it was asked for."""

    repositories: dict[str, Repository]
    portal: bool = False  #: every answer is a page that asks to log in
    requests: list[str] = field(default_factory=list)  #: "GET path"
    url: str = ""


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: object, **repositories: Repository) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to in this process, with a cache of its own. `__` in a name stands for
    `/`.
    """
    from huggingface_hub import close_session, constants

    hub = FakeHub({name.replace("__", "/"): one for name, one in repositories.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.hub.portal:
            self._answer(200, b"<html>log in</html>", {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if repository := self._repository(match[1]):
                self._facts(match[1], repository)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if repository := self._repository(match[1]):
                self._file(repository, match[2])
        else:
            self._refuse(404, "RepoNotFound")

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        return repository

    def _facts(self, name: str, repository: Repository) -> None:
        siblings = [{"rfilename": file, "size": len(data)} for file, data in repository.files.items()]
        facts = {
            "id": name,
            "sha": COMMIT,
            "private": False,
            "gated": False,
            "siblings": siblings,
            "tags": [],
        }
        body = json.dumps({**facts, "cardData": {"license": "mit"}}).encode()
        self._answer(200, body, {"Content-Type": "application/json"})

    def _file(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.files[name]
        tag = hashlib.sha256(data).hexdigest()
        self._answer(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
