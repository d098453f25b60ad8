"""Damage to a shard loses only what it hit, and no name leads out of it."""

import gzip
import io
import json
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_parts import picture, read, shard_of

import vlm.data.tar_index as tar_index_module
from vlm.data.images import load_image
from vlm.data.tar_index import tar_index
from vlm.errors import VlmError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


def good(number: int) -> list[tuple[str, bytes]]:
    return [(f"{number}.png", picture(seed=number, size=40)), (f"{number}.txt", f"caption {number}".encode())]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.05, 0.99))
def test_a_shard_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path_factory, share):
    shard = shard_of(tmp_path_factory.mktemp("cut") / "a.tar", *good(0), *good(1), *good(2))
    whole = {record.id: record.captions for record in read(shard)[0]}
    end = max(offset + size for offset, size in tar_index(shard).members.values())
    content = shard.read_bytes()
    shard.write_bytes(content[: max(600, int(end * share))])
    records, broken = read(shard)
    assert broken
    for record in records:
        assert whole[record.id] == record.captions
        load_image(record.images[0])
    assert len(records) < 3


def test_bad_members_lose_only_their_own_sample(tmp_path):
    shard = shard_of(
        tmp_path / "a.tar",
        *good(0),
        ("no-caption.png", picture()),
        ("no-picture.txt", b"text"),
        ("empty.png", picture()),
        ("empty.txt", b"  "),
        ("latin.png", picture()),
        ("latin.txt", "é".encode("latin-1")),
        ("json.png", picture()),
        ("json.json", b"{"),
        ("list.png", picture()),
        ("list.json", b"[1]"),
        ("number.png", picture()),
        ("number.json", b'{"caption": 3}'),
        ("surrogate.png", picture()),
        ("surrogate.json", b'{"caption": "\\ud800"}'),
        ("ours.json", b'{"record": {"captions": 3}}'),
        *good(1),
    )
    records, broken = read(shard)
    assert [record.id for record in records] == ["0", "1"]
    reasons = {entry.where.rpartition(": ")[2]: entry.reason for entry in broken}
    assert reasons.keys() == {
        *("no-caption", "no-picture", "empty", "latin", "json", "list", "number", "surrogate", "ours"),
    }
    for key, part in (
        ("no-caption", "no caption"),
        ("no-picture", "no picture"),
        ("empty", "empty"),
        ("latin", "not valid UTF-8"),
        ("json", "not valid JSON"),
        ("surrogate", "not valid UTF-8"),
    ):
        assert part in reasons[key]
    assert all(str(shard) in entry.where for entry in broken)


def test_of_files_of_one_name_the_first_counts_and_the_second_is_told(tmp_path):
    shard = shard_of(tmp_path / "a.tar", *good(0), ("0.txt", b"another"), *good(1))
    records, broken = read(shard)
    assert [record.captions[0] for record in records] == ["caption 0", "caption 1"]
    assert [entry.reason for entry in broken] == ["a second file '0.txt'"]


def test_keys_that_come_again_in_another_shard_stay_apart(tmp_path):
    for name in "ab":
        shard_of(tmp_path / f"{name}.tar", ("1.png", picture()), ("1.txt", name.encode()))
    records, broken = read(tmp_path / "{a,b}.tar")
    assert broken == []
    assert [(record.id, record.captions[0]) for record in records] == [("1", "a"), ("1#2", "b")]


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "C:/evil.txt", "..\\evil.txt"])
def test_names_that_point_out_of_the_archive_are_refused(tmp_path, name):
    shard = shard_of(tmp_path / "a.tar", *good(0), (name, b"x"))
    records, broken = read(shard)
    assert [record.id for record in records] == ["0"]
    assert ["outside the archive" in entry.reason for entry in broken] == [True]
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in good(0):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
    records, broken = read(tmp_path / "a.tar")
    assert [record.id for record in records] == ["0"]
    assert "link or a special file" in broken[0].reason


def test_a_compressed_or_other_file_is_an_error_with_a_way_out(tmp_path):
    shard = shard_of(tmp_path / "a.tar", *good(0))
    (tmp_path / "gz.tar").write_bytes(gzip.compress(shard.read_bytes()))
    (tmp_path / "not.tar").write_bytes(b"not an archive" * 100)
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(VlmError, match="decompress it"):
        read(tmp_path / "gz.tar")
    for name in ("not.tar", "zero.tar"):
        with pytest.raises(VlmError, match="not a tar archive"):
            read(tmp_path / name)


def test_an_empty_shard_gives_nothing(tmp_path):
    assert read(shard_of(tmp_path / "a.tar")) == ([], [])


def test_an_index_is_kept_and_made_anew_when_the_shard_changes(tmp_path):
    shard = shard_of(tmp_path / "a.tar", *good(0))
    assert list(tar_index(shard).members) == ["0.png", "0.txt"]
    (kept,) = (tmp_path / "cache" / "shards" / "index").iterdir()
    kept.write_bytes(kept.read_bytes()[:20])
    shard_of(shard, *good(0), *good(1))
    assert len(tar_index(shard).members) == 4
    whole = gzip.decompress(kept.read_bytes())
    assert len(json.loads(whole)["members"]) == 4
    for damage in (b"", kept.read_bytes()[:30], b"nothing of the kind", gzip.compress(b"[]"), gzip.compress(b"{}")):
        kept.write_bytes(damage)
        tar_index_module._opened.clear()
        assert len(tar_index(shard).members) == 4
        assert gzip.decompress(kept.read_bytes()) == whole


def test_indexes_in_memory_are_bounded_and_grouped_once(tmp_path, monkeypatch):
    import vlm.data.webdataset_shards as shards_module

    grouped = []
    original = shards_module._grouped
    monkeypatch.setattr(shards_module, "_grouped", lambda index: grouped.append(index) or original(index))
    monkeypatch.setattr(tar_index_module, "_MAX_OPENED", 5)
    tar_index_module._opened.clear()
    shards = [shard_of(tmp_path / f"{n}.tar", *good(0), *good(1)) for n in range(3)]
    for shard in shards:
        for _ in range(3):
            samples, _ = shards_module.shard_samples(shard)
            assert [sample.key for sample in samples] == ["0", "1"]
    assert len(grouped) == 3
    assert sum(len(index.members) for index in tar_index_module._opened.values()) <= 5


def test_long_and_foreign_names_are_read(tmp_path):
    name = "ordner/" + "ü" * 90 + "/bild"
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        files = ((f"{name}.png", picture()), (f"{name}.txt", b"a"))
        records, broken = read(shard_of(tmp_path / f"{number}.tar", *files, format=format))
        assert broken == []
        assert records[0].id == name
