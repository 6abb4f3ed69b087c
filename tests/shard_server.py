"""A web server for tests that serves a folder, counts what it was asked, and fails when told to."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Served:
    """A running server.

    `faults` are used up one per GET request of a shard, those for its first byte (which ask for its size) left out: a
    status ("500", "429"), "reset" (the connection breaks), "cut" (half of the body), "slow" (nothing for
    `slow_seconds`), "shifted" (another range than asked for), "flipped" (one byte differs), "short" (a shorter body
    that claims to be all); "fine" lets one pass.
    """

    folder: Path
    ranges: bool = True
    url: str = ""
    slow_seconds: float = 0.5
    delay: float = 0.0  #: seconds before each answer
    faults: deque[str] = field(default_factory=deque)
    requests: list[tuple[str, str, int, int]] = field(default_factory=list)  #: (method, file, offset, bytes sent)
    authorization: str | None = None  #: the header without which everything is refused
    query: str = ""  #: likewise, behind the "?" of every address
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gets(self, suffix: str = ".tar") -> list[tuple[str, int, int]]:
        """(file, offset, bytes) of the GET requests for shards, in order."""
        return [request[1:] for request in self.requests if request[0] == "GET" and request[1].endswith(suffix)]


@contextmanager
def serve(folder: Path, *, ranges: bool = True) -> Iterator[Served]:
    """Serve `folder` at `served.url`."""
    served = Served(folder, ranges)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # header and body are two packets, of which the second would wait 40 ms

        def do_HEAD(self) -> None:
            path = folder / urlsplit(self.path).path.strip("/")
            time.sleep(served.delay)
            served.requests.append(("HEAD", path.name, 0, 0))
            if not self._may():
                self._begin(401, 0)
                return
            self._begin(200 if path.is_file() else 404, path.stat().st_size if path.is_file() else 0)

        def do_GET(self) -> None:
            with served.lock:
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                self._get(folder / urlsplit(self.path).path.strip("/"))
            finally:
                with served.lock:
                    served.at_once -= 1

        def _may(self) -> bool:
            given = self.headers.get("Authorization"), urlsplit(self.path).query
            return given == (served.authorization, served.query)

        def _get(self, path: Path) -> None:
            if not self._may():
                self._begin(401, 0)
                return
            asked_size = self.headers.get("Range") == "bytes=0-0"
            faulty = served.faults and path.suffix == ".tar" and not asked_size
            fault = served.faults.popleft() if faulty else "fine"
            time.sleep(served.slow_seconds if fault == "slow" else served.delay)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if served.ranges else None
            if fault.isdigit() or not path.is_file():
                served.requests.append(("GET", path.name, int(wanted[1]) if wanted else 0, 0))
                self._begin(int(fault) if fault.isdigit() else 404, 0)
                return
            size = path.stat().st_size
            first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
            if first >= size:
                self._begin(416, 0)
                return
            if fault == "shifted":
                first, last = first + 1, last + 1
            with path.open("rb") as file:
                file.seek(first)
                body = file.read(last + 1 - first)
            if fault == "flipped":
                body = bytes([body[0] ^ 1]) + body[1:]
            if fault == "short":
                body, last = body[:-1], last - 1
            served.requests.append(("GET", path.name, first, len(body)))
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            extra = {"Content-Range": f"bytes {first}-{last}/{size}"} if wanted else {}
            self._begin(206 if wanted else 200, len(body), extra)
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            if fault == "cut":
                self.close_connection = True

        def _begin(self, status: int, size: int, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(size))
            for name, value in (extra or {}).items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, ValueError):  # the other side left, or this one did on purpose
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # of the usual 5, a burst of connections overflows; its client tries again after 1 s

    server = Server(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
