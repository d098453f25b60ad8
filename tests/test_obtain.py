"""Data sets that are downloaded: fetched, checked, unpacked, loaded, or told what has to come by hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from archives import zipped
from file_server import Server
from typer.testing import CliRunner

from vlm.cli.data import app
from vlm.data.catalogue import load_dataset, load_spec
from vlm.data.prepare import check, prepare, status
from vlm.errors import VlmError
from vlm.schema import dump_yaml


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


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


def without_published_checksums(server: Server, folder: Path) -> str:
    """A data set of a file, and of an archive of a file and pictures, none with a digest."""
    name = write_data_set(server, folder)
    content = load_spec(name)[0].model_dump(exclude_defaults=True)
    del content["downloads"][0]["sha256"], content["downloads"][0]["size"]
    archive = zipped({"val/1.jpg": b"1", "val/2.jpg": b"2", "facts.json": b"{}"}, folder / "images.zip")
    server.files["/images.zip"] = archive.read_bytes()
    content["downloads"][1]["unpack"] = ["val", "facts.json"]
    dump_yaml(content, Path(name))
    return name


def test_a_file_without_published_checksum_is_trusted_once(
    server: Server, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = without_published_checksums(server, tmp_path)
    prepare(name)
    told = [line for line in capsys.readouterr().err.splitlines() if "trusted" in line]
    assert told == [
        "mine: no checksum is published of train.jsonl, images.zip: trusted as fetched now, compared with "
        f"{data / 'digests.json'} from now on"
    ]
    expected = {
        server.url("train.jsonl"): server.files["/train.jsonl"],
        server.url("images.zip"): server.files["/images.zip"],
        server.url("images.zip#facts.json"): b"{}",
    }
    kept = json.loads((data / "digests.json").read_text())
    assert kept == {key: hashlib.sha256(content).hexdigest() for key, content in expected.items()}
    assert check(name, checksums=True) == []
    prepare(name)
    assert "trusted" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["train.jsonl", "facts.json"])
def test_a_change_of_what_was_fetched_is_found_without_published_checksum(
    server: Server, tmp_path: Path, data: Path, place: str
) -> None:
    name = without_published_checksums(server, tmp_path)
    prepare(name, progress=False)
    file = data / "mine" / place
    file.write_text(file.read_text() + "\n")
    assert check(name) == []
    (line,) = check(name, checksums=True)
    assert line.startswith(f"{file}: not what was fetched: SHA256 is not ")
    file.unlink()
    prepare(name, progress=False)
    assert check(name, checksums=True) == []


@pytest.mark.parametrize("place", ["train.jsonl", "images.zip"])
def test_another_file_at_a_known_address_is_refused(server: Server, tmp_path: Path, data: Path, place: str) -> None:
    name = without_published_checksums(server, tmp_path)
    prepare(name, progress=False)
    for file in (data / "mine/train.jsonl", data / "mine/facts.json"):
        file.unlink()
    server.files[f"/{place}"] += b"\n"
    with pytest.raises(VlmError, match=rf"{place}: not the file that it was the first time .* delete the line"):
        prepare(name, progress=False)
    kept = json.loads((data / "digests.json").read_text())
    del kept[server.url(place)]
    (data / "digests.json").write_text(json.dumps(kept))
    prepare(name, progress=False)
    assert check(name, checksums=True) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_an_unreadable_record_of_checksums_is_named(server: Server, tmp_path: Path, data: Path, text: str) -> None:
    name = without_published_checksums(server, tmp_path)
    data.mkdir()
    (data / "digests.json").write_text(text)
    with pytest.raises(VlmError, match=r"digests\.json: .*; remove it to begin anew"):
        prepare(name, progress=False)


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
