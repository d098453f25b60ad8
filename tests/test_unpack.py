"""Archives made to do harm: what was wanted of them and nothing else, or an error and nothing."""

import errno
import random
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from archives import tarred, zipped

from vlm.data.unpack import BrokenArchive, unpack
from vlm.errors import VlmError

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


@pytest.mark.parametrize(("make", "name"), [kind for kind in MAKERS if kind[1] != "a.tar"])  # that is not compressed
def test_a_bomb_is_stopped(make: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
