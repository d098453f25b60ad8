"""Downloads from a server that misbehaves: whole and right, or an error and nothing."""

import errno
import hashlib
import tempfile
from pathlib import Path
from typing import IO, Any

import hypothesis
import hypothesis.strategies as st
import pytest
from file_server import CONTENT, SHA, Server, running

from vlm.data import download as download_module
from vlm.data.download import RETRIES, fetch
from vlm.errors import VlmError


def test_a_file_is_fetched_whole_and_checked(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    fetch(server.url(), tmp_path / "f", len(CONTENT), SHA, progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not (tmp_path / "f.part").exists()


def test_dropped_connections_are_resumed_where_they_broke(server: Server, tmp_path: Path) -> None:
    server.cut = [100_000, 50_000]
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "f").read_bytes() == CONTENT


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=8), ranges=st.booleans())
def test_wherever_connections_break_the_file_is_whole_or_absent(cuts: list[int], ranges: bool) -> None:
    with running() as server, tempfile.TemporaryDirectory() as folder:
        server.cut, server.ranges = list(cuts), ranges
        to = Path(folder) / "f"
        try:
            fetch(server.url(), to, wait=0)
        except VlmError:
            assert not to.exists()
            server.cut = []
            fetch(server.url(), to, wait=0)
        assert to.read_bytes() == CONTENT


def test_a_later_run_goes_on_with_what_is_there(server: Server, tmp_path: Path) -> None:
    server.cut = [1000] + [0] * RETRIES
    with pytest.raises(VlmError, match=r"broke after 1,000 of 300,000 bytes \(6 times in a row\); run it again"):
        fetch(server.url(), tmp_path / "f", wait=0)
    assert (tmp_path / "f.part").stat().st_size == 1000
    assert not (tmp_path / "f").exists()
    server.asked.clear()
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert server.asked == ["bytes=1000-"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut = False, [100_000]
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_part_that_is_whole_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_part_of_another_longer_file_is_started_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_that_claims_more_than_it_sends_is_asked_for_the_rest(server: Server, tmp_path: Path) -> None:
    server.claim = len(CONTENT) + 10
    fetch(server.url(), tmp_path / "f", wait=0)
    assert server.asked == [None, f"bytes={len(CONTENT)}-"]  # and told that nothing follows
    assert (tmp_path / "f").read_bytes() == CONTENT
    server.ranges = False
    with pytest.raises(VlmError, match=r"broke after 300,000 of 300,010 bytes"):
        fetch(server.url(), tmp_path / "g", wait=0)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {"sha256": SHA}])
def test_a_server_that_claims_less_is_found_out(server: Server, tmp_path: Path, known: dict[str, Any]) -> None:
    server.claim = 1000
    with pytest.raises(VlmError, match=r"file\.bin: damaged, or another version"):
        fetch(server.url(), tmp_path / "f", wait=0, **known)
    assert list(tmp_path.glob("f*")) == []


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_wrong_checksum_removes_the_file(server: Server, tmp_path: Path, algorithm: str) -> None:
    wrong = "0" * (64 if algorithm == "sha256" else 32)
    with pytest.raises(VlmError, match=rf"{algorithm.upper()} is not 000.*removed, run it again"):
        fetch(server.url(), tmp_path / "f", wait=0, **{algorithm: wrong})  # type: ignore[arg-type]
    assert list(tmp_path.glob("f*")) == []


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server: Server, tmp_path: Path) -> None:
    server.errors = [503, 429]
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert len(server.asked) == 3
    server.asked.clear()
    with pytest.raises(VlmError, match="no-such: the server answers 404 Not Found"):
        fetch(server.url("no-such"), tmp_path / "g", wait=0)
    assert len(server.asked) == 1


def test_no_connection_is_said_in_one_line(server: Server, tmp_path: Path) -> None:
    url = server.url()
    server.shutdown()
    server.server_close()
    with pytest.raises(VlmError, match=r"no connection: .*run it again to go on") as caught:
        fetch(url, tmp_path / "f", wait=0)
    assert "\n" not in str(caught.value)


def test_a_full_disk_keeps_what_was_received(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "_PIECE", 100_000)
    opened = Path.open

    class Full:
        def __init__(self, file: IO[bytes]) -> None:
            self.file, self.left = file, 2

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, piece: bytes) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(piece)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode="r", **more: Full(opened(self, mode, **more)))
        with pytest.raises(VlmError, match="cannot be written: No space left on device"):
            fetch(server.url(), tmp_path / "f", wait=0)
    kept = (tmp_path / "f.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    server.asked.clear()
    fetch(server.url(), tmp_path / "f", sha256=SHA, wait=0)
    assert server.asked == [f"bytes={kept}-"]


def test_a_token_of_the_hub_goes_to_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    request = download_module._request("hf://datasets/owner/name/sub/train.json", 5)
    assert request.full_url.endswith("/datasets/owner/name/resolve/main/sub/train.json")
    assert request.headers["Range"] == "bytes=5-"
    # What is not redirected is in this mapping only.
    assert "Authorization" not in request.headers
    assert request.unredirected_hdrs["Authorization"] == "Bearer hf_secret"


MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.mark.parametrize(
    ("linked", "headers", "checked"),
    [
        ({"X-Linked-ETag": f'"{SHA}"'}, {}, True),  # as the Hub redirects to where a large file lies
        ({}, {"Server": "AmazonS3", "ETag": f'"{MD5}"'}, True),
        ({}, {"Server": "AmazonS3", "ETag": f'"{MD5}-3"'}, False),  # of several parts: no digest of the whole
        ({}, {"Server": "AmazonS3", "ETag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms"}, False),
        ({}, {"ETag": f'"{MD5}"'}, False),  # any server's, which means anything
    ],
)
def test_a_digest_that_the_server_states_is_checked(
    server: Server, tmp_path: Path, linked: dict[str, str], headers: dict[str, str], checked: bool
) -> None:
    server.headers, server.redirects = headers, {"/linked": (server.url(), linked)}
    server.cut = [1000]
    fetch(server.url("linked"), tmp_path / "f", wait=0)
    assert (tmp_path / "f").read_bytes() == CONTENT
    server.files["/file.bin"] = bytes(len(CONTENT))  # damaged on the way
    if checked:
        with pytest.raises(VlmError, match=r"damaged, or another version than expected: (SHA256|MD5) is not"):
            fetch(server.url("linked"), tmp_path / "g", wait=0)
        assert not (tmp_path / "g.part").exists()
    fetch(server.url("linked"), tmp_path / "g", sha256=hashlib.sha256(bytes(len(CONTENT))).hexdigest(), wait=0)
