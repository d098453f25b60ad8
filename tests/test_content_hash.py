"""A picture is known by its content; what did not change is not read again."""

import os
import tarfile

import pytest
from generative_parts import pictures

import vlm.data.content_hash as module
from vlm.data.content_hash import content_hash, content_hashes
from vlm.data.references import inside


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The paths whose content was read."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    seen = []
    original = module.picture_bytes
    monkeypatch.setattr(module, "picture_bytes", lambda path: seen.append(path) or original(path))
    return seen


def aged(*paths, seconds=100):
    """Files that changed a while ago."""
    for path in paths:
        stat = os.stat(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - seconds * 10**9))


def test_files_that_did_not_change_are_read_once(tmp_path, reads):
    paths = pictures(tmp_path, 3)
    aged(*paths)
    first = content_hashes(paths)
    assert first == {path: content_hash(path) for path in paths}
    reads.clear()
    assert content_hashes(paths) == first
    assert reads == []


def test_a_changed_file_is_read_again(tmp_path, reads):
    one, other = pictures(tmp_path, 2)
    aged(one, other)
    before = content_hashes([one, other])
    os.replace(other, one)
    reads.clear()
    assert content_hashes([one]) == {one: before[other]}  # another time of change
    assert content_hashes([other]) == {other: None}


def test_a_file_that_just_changed_is_not_trusted(tmp_path, reads):
    (path,) = pictures(tmp_path, 1)
    content_hashes([path])
    content_hashes([path])
    assert len(reads) == 2


def test_pictures_in_shards_are_remembered_until_the_shard_changes(tmp_path, reads):
    paths = pictures(tmp_path, 2)
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(paths[0], "0.png")
        archive.add(paths[1], "1.png")
    aged(shard)
    references = [inside(shard, "0.png"), inside(shard, "1.png"), inside(shard, "2.png")]
    first = content_hashes(references)
    assert list(first.values()) == [content_hash(paths[0]), content_hash(paths[1]), None]
    reads.clear()
    assert content_hashes(references) == first
    assert reads == references[2:]  # what could not be read is tried again
    aged(shard, seconds=-50)
    reads.clear()
    content_hashes(references[:2])
    assert reads == references[:2]


def test_relative_paths_and_odd_names(tmp_path, reads, monkeypatch):
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pictures(tmp_path / folder, 1, seed=ord(folder))[0]
        (made,) = (tmp_path / folder).iterdir()
        made = made.rename(made.with_name(os.fsdecode(b"odd-\xff.png")))
        aged(made)
        monkeypatch.chdir(tmp_path / folder)
        names.append(content_hashes([made.name])[made.name])
        assert names[-1] == content_hashes([str(made)])[str(made)]
    assert names[0] != names[1]


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_a_damaged_memory_is_begun_anew(tmp_path, reads, content):
    (path,) = pictures(tmp_path, 1)
    aged(path)
    expected = content_hashes([path])
    module._file().write_bytes(content)
    for _ in range(3):
        assert content_hashes([path]) == expected
    reads.clear()
    content_hashes([path])
    assert reads == []


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, reads, monkeypatch):
    (path,) = pictures(tmp_path, 1)
    aged(path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    assert content_hashes([path, "nothing\0here"]) == {path: content_hash(path), "nothing\0here": None}
