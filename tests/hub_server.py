"""A small HTTP server that answers as the Hugging Face hub does, for one folder of files a repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """repositories: id -> folder. cut_once: names of files whose first download breaks off in the middle.

    downloads: (repository, file, first byte sent) of each GET. requests: the path of every request.
    """

    def __init__(self, repositories: dict[str, Path], cut_once: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.to_cut = set(cut_once)
        self.downloads: list[tuple[str, str, int]] = []
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: object) -> None:
        """Tests read `requests` instead."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.server.requests.append(self.path)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe("/".join(parts[2:4]), parts[4:])
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repository not in self.server.repositories or parts[2:3] != ["resolve"]:
            return self._refuse("RepoNotFound")
        file = self.server.repositories[repository] / name
        if not file.is_file():
            return self._refuse("EntryNotFound")
        content = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if with_body else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            self.server.downloads.append((repository, name, start))
            if name in self.server.to_cut:
                self.server.to_cut.remove(name)
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                return None
            self.wfile.write(content[start:])
        return None

    def _describe(self, repository: str, rest: list[str]) -> None:
        if repository not in self.server.repositories:
            return self._refuse("RepoNotFound")
        files = sorted(self.server.repositories[repository].iterdir())
        if rest[:1] == ["tree"]:
            return self._json(
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in files]
            )
        siblings = [{"rfilename": file.name} for file in files]
        return self._json({"id": repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if code == "EntryNotFound":
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub_server(repositories: dict[str, Path], cut_once: tuple[str, ...] = ()) -> Iterator[HubServer]:
    """A running server, until the block ends."""
    server = HubServer(repositories, cut_once)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
