"""Fetching one file over HTTP: resumed where it broke off, checked, and in place only when it is whole."""

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.errors import VlmError

HUB = "hf://datasets/"
RETRIES = 5  # in a row without a byte received
_PIECE = 1 << 20
_TIMEOUT = 60  # seconds without an answer
_WORTH_ANOTHER_TRY = frozenset({408, 425, 429, 500, 502, 503, 504})

# (bytes that are there, bytes there will be or None)
Progress = Callable[[int, int | None], None]


class Interrupted(Exception):
    """The connection broke, what was received is kept; says why."""


def fetch(
    url: str,
    to: Path,
    size: int | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress = lambda done, total: None,
    wait: float = 1.0,
) -> None:
    """Download `url` to the file `to`; what an earlier try left in `to` + `.part` is not fetched again.

    url: http(s), or `hf://datasets/OWNER/NAME/PATH` on the Hugging Face Hub. size, sha256, md5: what the file must be;
    where neither digest is known, the one that the server states (the Hub's, S3's).
    wait: seconds before the first retry, doubled each time; the count starts again whenever bytes arrive.
    Raises VlmError if the server refuses or keeps breaking off, if the disk is full (what was received is kept), or if
    the file is not the one expected (then it is removed, for the next try has to start anew).
    """
    part = to.with_name(to.name + ".part")
    tries = 0
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        while True:
            before = _length(part)
            try:
                stated = _receive(url, part, progress)
                break
            except Interrupted as error:
                tries = 1 if _length(part) > before else tries + 1
                if tries > RETRIES:
                    raise VlmError(f"{url}: {error} ({tries} times in a row); run it again to go on") from error
                time.sleep(wait * 2 ** (tries - 1))
        told = {"sha256": sha256, "md5": md5} if sha256 or md5 else stated
        if problem := difference(part, size, **told):
            part.unlink()
            raise VlmError(f"{url}: damaged, or another version than expected: {problem}; removed, run it again")
        part.replace(to)
    except OSError as error:
        raise VlmError(f"{error.filename or to}: cannot be written: {error.strerror or error}") from error


def difference(file: Path, size: int | None = None, sha256: str | None = None, md5: str | None = None) -> str | None:
    """In what a file differs from the one expected, None if in nothing that is given."""
    if size not in (None, found := _length(file)):
        return f"{found:,} bytes, expected {size:,}"
    for algorithm, wanted in (("sha256", sha256), ("md5", md5)):
        if wanted and digest(file, algorithm) != wanted.lower():
            return f"{algorithm.upper()} is not {wanted}"
    return None


def digest(file: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal digest of a file of any size."""
    found = hashlib.new(algorithm)
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def _receive(url: str, part: Path, progress: Progress) -> dict[str, str]:
    """One request for what `part` lacks; the digest of the whole file that the server states, if it does.

    Raises Interrupted where another request may help, VlmError where none will.
    """
    have = _length(part)
    redirects = _Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(_request(url, have), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows: the part is whole, or of another file
            if _total(error.headers.get("Content-Range")) == have:
                return redirects.stated
            part.unlink(missing_ok=True)
            raise Interrupted("the server has another file than the one begun") from error
        if error.code in _WORTH_ANOTHER_TRY:
            raise Interrupted(f"the server answers {error.code} {error.reason}") from error
        raise VlmError(f"{url}: the server answers {error.code} {error.reason}{_advice(url, error.code)}") from error
    except (OSError, http.client.HTTPException) as error:  # no network, no such host, refused, timed out
        raise Interrupted(f"no connection: {getattr(error, 'reason', None) or error}") from error
    with answer:
        # A server that does not know ranges sends the whole file again.
        resumed = answer.status == 206 and _start(answer.headers.get("Content-Range")) == have
        done = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length and length.isdecimal() else None
        with part.open("ab" if resumed else "wb") as file:
            progress(done, total)
            while True:
                try:
                    piece = answer.read(_PIECE)
                except (OSError, http.client.HTTPException) as error:
                    raise Interrupted(f"the connection broke after {done:,} bytes") from error
                if not piece:
                    break
                file.write(piece)
                done += len(piece)
                progress(done, total)
    if total is not None and done != total:
        raise Interrupted(f"the connection broke after {done:,} of {total:,} bytes")
    return redirects.stated or _stated(answer.headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects are followed; the digest that the Hub states beside one is kept, for the store behind it knows none."""

    def __init__(self) -> None:
        self.stated: dict[str, str] = {}

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.stated = self.stated or _stated(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _stated(headers: Any) -> dict[str, str]:
    """The digest in an answer's headers: the Hub's SHA-256 of a large file, S3's MD5 of one that came in one part."""
    linked = (headers.get("X-Linked-ETag") or "").strip('"')
    if re.fullmatch("[0-9a-f]{64}", linked):
        return {"sha256": linked}
    tag = (headers.get("ETag") or "").strip('"')
    plain = headers.get("Server") == "AmazonS3" and "kms" not in (headers.get("x-amz-server-side-encryption") or "")
    return {"md5": tag} if plain and re.fullmatch("[0-9a-f]{32}", tag) else {}


def _request(url: str, have: int) -> urllib.request.Request:
    headers: dict[str, str] = {"User-Agent": "vlm"}
    if url.startswith(HUB):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        owner, name, path = url.removeprefix(HUB).split("/", 2)
        url = hf_hub_url(f"{owner}/{name}", path, repo_type="dataset")
        headers = build_hf_headers(library_name="vlm")
    token = headers.pop("authorization", None)
    request = urllib.request.Request(url, headers=headers)
    if token:  # it is meant for the Hub, not for the store it redirects to
        request.add_unredirected_header("Authorization", token)
    if have:
        request.add_header("Range", f"bytes={have}-")
    return request


def _advice(url: str, code: int) -> str:
    if code in (401, 403) and url.startswith(HUB):
        page = "/".join(url.removeprefix(HUB).split("/")[:2])
        return f"; accept the terms of the data set {page} on the Hub and run: hf auth login"
    return ""


def _start(content_range: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", content_range or "")
    return int(match[1]) if match else None


def _total(content_range: Any) -> int | None:
    match = re.search(r"/(\d+)$", content_range or "")
    return int(match[1]) if match else None


def _length(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
