"""A server of files on 127.0.0.1 that misbehaves as told."""

import hashlib
import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTENT = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` on 127.0.0.1 and misbehaves as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file.bin": CONTENT}
        self.cut: list[int] = []  # of the next answers, drop the connection after so many bytes
        self.claim: int | None = None  # said instead of the true length
        self.ranges = True
        self.errors: list[int] = []  # status of the next answers
        self.asked: list[str | None] = []  # the Range of each request
        self.headers: dict[str, str] = {}  # more of each answer
        self.redirects: dict[str, tuple[str, dict[str, str]]] = {}  # path -> address, more headers

    def url(self, name: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        if self.server.errors:
            self.send_error(self.server.errors.pop(0))
            return
        if self.path in self.server.redirects:
            address, headers = self.server.redirects[self.path]
            self.send_response(302)
            for name, value in {"Location": address, "Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        if self.path not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[self.path]
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if start >= len(content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response_only(206 if start else 200)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(self.server.claim or len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cut:
            body = body[: self.server.cut.pop(0)]
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
