"""A web server for tests that serves a folder, counts what it was asked for, and fails when told to."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Served:
    """A running server.

    `faults` are used up one a request for a shard: a status ("500"), "cut" (half of the body), "flipped" (one
    byte differs); "fine" lets one pass.
    """

    url: str = ""
    faults: deque[str] = field(default_factory=deque)
    shards: Counter[str] = field(default_factory=Counter)  #: requests by file name
    ranges: int = 0  #: requests for a part of a file
    authorization: str | None = None  #: the header without which everything is refused


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve `folder` at `served.url`."""
    served, lock = Served(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = folder / urlsplit(self.path).path.strip("/")
            status, data, fault = 200, path.read_bytes() if path.is_file() else b"", "fine"
            with lock:
                served.ranges += "Range" in self.headers
                if body and path.suffix == ".tar":
                    served.shards[path.name] += 1
                    fault = served.faults.popleft() if served.faults else "fine"
            if self.headers.get("Authorization") != served.authorization:
                status, data = 401, b""
            elif not path.is_file() or fault.isdigit():
                status, data = int(fault) if fault.isdigit() else 404, b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault == "flipped":
                data = bytes([data[0] ^ 1]) + data[1:]
            if body:
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = fault == "cut"

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
