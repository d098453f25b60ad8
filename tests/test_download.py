"""Downloads from a server that misbehaves, and archives made to do harm: whole and right, or an error and nothing."""

import errno
import hashlib
import http.server
import io
import json
import random
import stat
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import hypothesis
import hypothesis.strategies as st
import pytest
from typer.testing import CliRunner

from vlm.cli.data import app
from vlm.data import download as download_module
from vlm.data.catalogue import load_dataset, load_spec
from vlm.data.download import RETRIES, fetch
from vlm.data.prepare import check, prepare, status
from vlm.data.unpack import BrokenArchive, unpack
from vlm.errors import VlmError
from vlm.schema import dump_yaml

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
        self.send_response(206 if start else 200)
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


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


# --- downloading


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


# --- unpacking


def zipped(files: dict[str, bytes], file: Path, **attributes: int) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = attributes.get("mode", stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return file


def tarred(files: dict[str, bytes], file: Path, **attributes: Any) -> Path:
    mode: Any = {".gz": "w:gz", ".xz": "w:xz"}.get(file.suffix, "w")
    with tarfile.open(file, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return file


MAKERS = [(zipped, "a.zip"), (tarred, "a.tar"), (tarred, "a.tar.gz"), (tarred, "a.tar.xz")]
each_kind = pytest.mark.parametrize(("make", "name"), MAKERS, ids=[name for _, name in MAKERS])
PICTURES = {"val/1.jpg": b"one" * 1000, "val/2.jpg": b"two" * 1000, "readme.txt": b"x", "other/3.jpg": b""}


@each_kind
def test_the_wanted_members_are_unpacked_and_no_others(make: Any, name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack(make(PICTURES, tmp_path / name), out, ["val", "readme.txt"])
    found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {key: value for key, value in PICTURES.items() if not key.startswith("other")}


@each_kind
def test_a_folder_around_everything_does_no_harm(make: Any, name: str, tmp_path: Path) -> None:
    files = {"./release/val/1.jpg": b"1", "release/a.json": b"2", "__MACOSX/val/1.jpg": b"junk"}
    unpack(make(files, tmp_path / name), tmp_path / "out", ["val", "a.json"])
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {"val/1.jpg": b"1", "a.json": b"2"}


@each_kind
def test_all_of_an_archive_becomes_a_new_folder(make: Any, name: str, tmp_path: Path) -> None:
    unpack(make(PICTURES, tmp_path / name), tmp_path / "deep/out", ["."])
    assert sorted(p.name for p in (tmp_path / "deep/out").iterdir()) == ["other", "readme.txt", "val"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_a_killed_unpacking_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "out/.unpacking-a.zip-x1/content/val/1.jpg"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    unpack(zipped(PICTURES, tmp_path / "a.zip"), tmp_path / "out", ["val"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["val"]


@each_kind
def test_what_is_there_stays(make: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "out/val").mkdir(parents=True)
    (tmp_path / "out/val/1.jpg").write_bytes(b"mine")
    unpack(make(PICTURES, tmp_path / name), tmp_path / "out", ["val", "readme.txt"])
    assert (tmp_path / "out/val/1.jpg").read_bytes() == b"mine"


@each_kind
@pytest.mark.parametrize("evil", ["../evil", "val/../../evil", "/evil", "val\\..\\evil", "C:evil"])
def test_names_that_lead_out_are_refused(make: Any, name: str, evil: str, tmp_path: Path) -> None:
    archive = make({"val/1.jpg": b"1", evil: b"evil"}, tmp_path / name)
    with pytest.raises(BrokenArchive, match="leads out of the folder; nothing is unpacked"):
        unpack(archive, tmp_path / "deep/out", ["val"])
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [archive]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    archive = tarred({"val/1.jpg": b""}, tmp_path / "a.tar", type=kind, linkname="../../secret")
    with pytest.raises(BrokenArchive, match=r"'val/1\.jpg' is a link or device"):
        unpack(archive, tmp_path / "out", ["val"])
    assert list((tmp_path / "out").iterdir()) == []


def test_links_of_a_zip_are_refused(tmp_path: Path) -> None:
    archive = zipped({"val/1.jpg": b"../../secret"}, tmp_path / "a.zip", mode=stat.S_IFLNK | 0o777)
    with pytest.raises(BrokenArchive, match="is a link or device"):
        unpack(archive, tmp_path / "out", ["val"])


@each_kind
def test_a_bomb_is_stopped(make: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "a.tar":
        pytest.skip("it is not compressed")
    monkeypatch.setattr("vlm.data.unpack._ROOM", 1000)
    archive = make({"val/1.jpg": b"\0" * 20_000_000}, tmp_path / name)
    with pytest.raises(BrokenArchive, match="grows to more than 200 times its size"):
        unpack(archive, tmp_path / "out", ["val"])
    assert list((tmp_path / "out").iterdir()) == []


@each_kind
def test_a_truncated_archive_leaves_nothing(make: Any, name: str, tmp_path: Path) -> None:
    content = random.Random(1)
    archive = make({f"val/{n}.jpg": content.randbytes(5000) for n in range(5)}, tmp_path / name)
    archive.write_bytes(archive.read_bytes()[:12_000])
    with pytest.raises(BrokenArchive, match=r"damaged archive|not in this archive"):
        unpack(archive, tmp_path / "out", ["val"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_member_of_a_zip_is_found(tmp_path: Path) -> None:
    archive = zipped({"val/1.jpg": random.Random(2).randbytes(5000)}, tmp_path / "a.zip")
    content = bytearray(archive.read_bytes())
    content[2000] ^= 255
    archive.write_bytes(content)
    with pytest.raises(BrokenArchive, match="damaged archive"):
        unpack(archive, tmp_path / "out", ["val"])


@each_kind
def test_a_member_that_is_missing_is_named(make: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenArchive, match="train is not in this archive"):
        unpack(make(PICTURES, tmp_path / name), tmp_path / "out", ["val", "train"])
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar.gz"):
        (tmp_path / name).write_text("<html>Not found</html>")
        with pytest.raises(BrokenArchive, match="damaged archive"):
            unpack(tmp_path / name, tmp_path / "out", ["val"])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm.data.unpack._copy", full)
    with pytest.raises(VlmError, match="cannot be unpacked: No space left on device"):
        unpack(zipped(PICTURES, tmp_path / "a.zip"), tmp_path / "out", ["val"])
    assert list((tmp_path / "out").iterdir()) == []


# --- whole data sets


def write_data_set(server: Server, folder: Path, **changes: Any) -> str:
    """A data set of an annotation file and an archive of pictures, and its YAML file."""
    lines = "".join(json.dumps({"image": f"{n}.jpg", "caption": f"Picture {n}."}) + "\n" for n in (1, 2))
    server.files["/train.jsonl"] = lines.encode()
    archive = zipped({"val/1.jpg": b"1", "val/2.jpg": b"2", "junk": b""}, folder / "images.zip")
    server.files["/images.zip"] = archive.read_bytes()
    content = {
        "name": "mine",
        "licence": "CC0-1.0",
        "format": "captions_jsonl",
        "downloads": [
            {
                "url": server.url("train.jsonl"),
                "to": "mine/train.jsonl",
                "size": len(lines),
                "sha256": hashlib.sha256(lines.encode()).hexdigest(),
            },
            {"url": server.url("images.zip"), "to": "mine", "unpack": ["val"]},
        ],
        "splits": {"train": {"path": "data:mine/train.jsonl", "images": "data:mine/val", "size": 2, "pictures": 2}},
        **changes,
    }
    dump_yaml(content, folder / "mine.yaml")
    return str(folder / "mine.yaml")


def test_a_data_set_is_downloaded_unpacked_and_loaded(server: Server, tmp_path: Path, data: Path) -> None:
    name = write_data_set(server, tmp_path)
    with pytest.raises(VlmError, match=r"val is missing; run: vlm data prepare mine"):
        load_dataset(name, "train")
    assert [line.partition(" is missing; run: vlm data prepare")[0] for line in check(name)] == [
        str(data / "mine/train.jsonl"),
        str(data / "mine/val"),
    ]
    assert server.asked == []  # checking fetches nothing
    assert prepare(name, progress=False) == data / "mine"
    assert [r.images for r in load_dataset(name, "train").records] == [
        (str(data / "mine/val/1.jpg"),),
        (str(data / "mine/val/2.jpg"),),
    ]
    assert check(name, checksums=True) == []
    asked = len(server.asked)
    prepare(name, progress=False)
    assert len(server.asked) == asked
    assert [p for p in (data / ".downloads").iterdir() if p.suffix != ".lock"] == []


def test_a_broken_archive_is_removed_and_fetched_anew(server: Server, tmp_path: Path, data: Path) -> None:
    name = write_data_set(server, tmp_path)
    whole = server.files["/images.zip"]
    server.files["/images.zip"] = whole[:100]
    with pytest.raises(VlmError, match=r"images\.zip: damaged archive.* it came from http.*images\.zip and is removed"):
        prepare(name, progress=False)
    server.files["/images.zip"] = whole
    prepare(name, progress=False)
    assert check(name) == []


def test_a_file_of_the_wrong_content_is_told_where_it_lies(server: Server, tmp_path: Path, data: Path) -> None:
    name = write_data_set(server, tmp_path)
    prepare(name, progress=False)
    file = data / "mine/train.jsonl"
    file.write_text(file.read_text().replace("Picture 1", "Picture 9"))
    assert check(name) == []
    assert "SHA256 is not" in check(name, checksums=True)[0]
    file.write_text("")
    (line,) = check(name)
    assert line.startswith(f"{file}: 0 bytes, expected")


def test_pictures_missing_on_disk_are_counted(server: Server, tmp_path: Path, data: Path) -> None:
    name = write_data_set(server, tmp_path)
    prepare(name, progress=False)
    (data / "mine/val/2.jpg").unlink()
    (line,) = check(name)
    assert f"the picture {data / 'mine/val/2.jpg'} is missing" in line


def test_what_comes_by_hand_says_which_file_goes_where(server: Server, tmp_path: Path, data: Path) -> None:
    name = write_data_set(server, tmp_path)
    content = load_spec(name)[0].model_dump(exclude_defaults=True)
    content["downloads"][1] = {
        "url": "https://example.org/form",
        "to": "mine/val",
        "by_hand": "Fill in the form, unpack images.zip into this folder.",
    }
    dump_yaml(content, Path(name))
    with pytest.raises(
        VlmError, match=r"by hand: .*mine/val: Fill in the form, unpack .* \(https://example\.org/form\)"
    ):
        prepare(name, progress=False)
    assert (data / "mine/train.jsonl").is_file()  # what can be downloaded is
    assert check(name) == [
        f"{data / 'mine/val'} is missing; Fill in the form, unpack images.zip into this folder "
        "(https://example.org/form)"
    ]
    (data / "mine/val").mkdir()
    for n in (1, 2):
        (data / f"mine/val/{n}.jpg").write_bytes(b"")
    prepare(name, progress=False)


def test_only_what_a_split_needs_is_fetched(server: Server, tmp_path: Path) -> None:
    name = write_data_set(server, tmp_path)
    content = load_spec(name)[0].model_dump(exclude_defaults=True)
    content["splits"]["test"] = {"path": "data:mine/test.jsonl"}
    content["downloads"].append({"url": server.url("test.jsonl"), "to": "mine/test.jsonl", "splits": ["test"]})
    dump_yaml(content, Path(name))
    assert status(name) == f"not prepared; run: vlm data prepare {name}"
    prepare(name, progress=False, splits=["train"])
    assert check(name, ["train"]) == []
    assert status(name) == f"train ready; run: vlm data prepare {name}"
    with pytest.raises(VlmError, match=r"test\.jsonl: the server answers 404"):
        prepare(name, progress=False)
    with pytest.raises(VlmError, match="no split 'tset'; did you mean 'test'"):
        check(name, ["tset"])


def test_shards_are_fetched_one_by_one(server: Server, tmp_path: Path, data: Path) -> None:
    server.files |= {f"/s-{n:03d}.tar": b"x" for n in range(3)}
    changes = {"downloads": [{"url": server.url("s-{000..002}.tar"), "to": "mine/{000..002}.tar"}]}
    name = write_data_set(server, tmp_path, **changes)
    assert check(name)[0].startswith(f"{data / 'mine/000.tar'} and 2 more are missing; run: vlm data prepare")
    with pytest.raises(VlmError):  # they are no shards
        prepare(name, progress=False)
    assert sorted(p.name for p in (data / "mine").iterdir()) == ["000.tar", "001.tar", "002.tar"]


def test_too_little_room_is_said_before_fetching(
    server: Server, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_data_set(server, tmp_path)
    monkeypatch.setattr("vlm.data.obtain.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(VlmError, match=r"train\.jsonl: \d+ bytes, and .* has room for 5; see VLM_DATA"):
        prepare(name, progress=False)
    assert server.asked == []


@pytest.mark.parametrize(
    ("download", "message"),
    [
        ({"url": "file:///etc/passwd", "to": "a"}, "url"),
        ({"url": "https://a.org/x", "to": "../a"}, "expected a place inside the data folder"),
        ({"url": "https://a.org/x", "to": "/a"}, "expected a place inside the data folder"),
        ({"url": "https://a.org/x", "to": "a", "unpack": ["../b"]}, "expected a place inside the data folder"),
        ({"url": "https://a.org/{0..3}", "to": "a"}, "different numbers of files"),
        ({"url": "https://a.org/x", "to": "a", "splits": ["tain"]}, "split 'tain'; did you mean 'train'"),
        ({"url": "https://a.org/x", "to": "a", "sha256": "x"}, "sha256"),
    ],
)
def test_a_malformed_download_names_the_key(
    server: Server, tmp_path: Path, download: dict[str, Any], message: str
) -> None:
    with pytest.raises(VlmError, match=rf"mine\.yaml: .*{message}"):
        load_spec(write_data_set(server, tmp_path, downloads=[download]))


def test_the_commands_fetch_and_check(server: Server, tmp_path: Path) -> None:
    name = write_data_set(server, tmp_path)
    result = CliRunner().invoke(app, ["check", name])
    assert result.exit_code == 1
    assert "train.jsonl is missing" in result.stdout
    assert CliRunner().invoke(app, ["prepare", name, "--split", "train"]).exit_code == 0
    result = CliRunner().invoke(app, ["check", name, "--checksums"])
    assert (result.exit_code, result.stdout) == (0, f"{name}: nothing is missing\n")
    assert json.loads(CliRunner().invoke(app, ["check", name, "--json"]).stdout) == {"name": name, "problems": []}
