"""Shards are read as other tools read them, and written from any reader and back."""

import io
import json
import string
from pathlib import Path

import pytest
import webdataset
from generative_parts import pictures
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from shard_parts import picture, read, shard_of

from vlm.data.images import load_image
from vlm.data.records import Message, Record
from vlm.data.shard_writer import write_shards
from vlm.data.tar_index import read_member
from vlm.data.webdataset_shards import expand_shards
from vlm.errors import VlmError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


# --- what a sample is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_a_picture_with_its_caption_class_and_json(tmp_path, kind):
    suffix = {"jpeg": "jpg"}.get(kind, kind)
    about = {"caption": "not this one", "url": "u", "similarity": 0.3}
    shard = shard_of(
        tmp_path / "a.tar",
        (f"000.{suffix}", picture(kind)),
        ("000.txt", "  a cat é \n".encode()),
        ("000.json", json.dumps(about).encode()),
        (f"001.{suffix}", picture(kind, 1)),
        ("001.cls", b"7\n"),
        (f"002.{suffix.upper()}", picture(kind, 2)),
        ("002.json", json.dumps({"captions": ["one", "two"], "label": 3}).encode()),
    )
    records, broken = read(shard)
    assert broken == []
    assert [(r.id, r.captions, r.label) for r in records] == [
        ("000", ("a cat é",), None),
        ("001", (), "7"),
        ("002", ("one", "two"), "3"),
    ]
    assert records[0].meta == {"url": "u", "similarity": 0.3}
    expected = Image.open(io.BytesIO(picture(kind, 1))).convert("RGB")
    assert load_image(records[1].images[0]).tobytes() == expected.tobytes()


def test_samples_are_those_of_the_webdataset_library(tmp_path):
    files = []
    for number in (3, 1, 2):
        files += [(f"d/{number}.a.png", picture(seed=number)), (f"d/{number}.txt", f"text {number}".encode())]
        files += [(f"d/{number}.json", json.dumps({"n": number}).encode())]
    shards = [shard_of(tmp_path / "s-0.tar", *files), shard_of(tmp_path / "s-1.tar", *files[:3])]
    theirs = list(webdataset.WebDataset([str(s) for s in shards], shardshuffle=False))
    records, broken = read(tmp_path / "s-{0..1}.tar")
    assert broken == []
    assert len(theirs) == len(records) == 4
    for sample, record in zip(theirs, records):
        assert record.id.partition("#")[0] == sample["__key__"]
        assert record.captions == (sample["txt"].decode(),)
        assert record.meta == json.loads(sample["json"])
        container, _, member = record.images[0].partition("::")
        assert read_member(Path(container), member) == sample["a.png"]


def test_shards_that_the_webdataset_library_writes_are_read(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for number in range(4):
            writer.write({"__key__": f"{number:04d}", "jpg": picture("jpeg", number), "txt": f"n {number}".encode()})
    records, broken = read(tmp_path / "a.tar")
    assert broken == []
    assert [record.captions[0] for record in records] == ["n 0", "n 1", "n 2", "n 3"]


def test_shards_of_ours_are_read_by_the_webdataset_library(tmp_path):
    paths = pictures(tmp_path, 3)
    write_shards([Record(str(n), (p,), (f"caption {n}",)) for n, p in enumerate(paths)], tmp_path / "out", size=2)
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == ["caption 0", "caption 1", "caption 2"]
    assert [sample["png"] for sample in samples] == [Path(path).read_bytes() for path in paths]


def test_files_that_belong_to_no_sample_are_left_out(tmp_path):
    shard = shard_of(
        tmp_path / "a.tar",
        ("__readme__.txt", b"x"),
        (".hidden", b"x"),
        ("README", b"x"),
        ("1.png", picture()),
        ("1.txt", b"a"),
        ("1.npy", b"ignored"),
    )
    records, broken = read(shard)
    assert broken == []
    assert [record.id for record in records] == ["1"]


# --- which shards -----------------------------------------------------------------------------------------------------


def test_braces_count_and_list_as_a_shell_does(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-08.tar", "x.tar", "y.tar"):
        shard_of(tmp_path / name)
    names = [path.name for path in expand_shards(tmp_path / "a-{08..10}.tar")]
    assert names == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert [path.name for path in expand_shards(str(tmp_path / "{a,b}-{08..08}.tar"))] == ["a-08.tar", "b-08.tar"]
    assert [path.name for path in expand_shards([tmp_path / "y.tar", tmp_path / "x.tar"])] == ["y.tar", "x.tar"]


@settings(max_examples=30, deadline=None)
@given(
    low=st.integers(0, 200), count=st.integers(1, 30), width=st.integers(0, 6), letters=st.sampled_from(["", "{a,b}"])
)
def test_braces_are_those_of_the_braceexpand_library(low, count, width, letters):
    from braceexpand import braceexpand

    from vlm.data.webdataset_shards import expand_braces

    # Both ends as wide as the wider: a pattern whose ends differ in width is nobody's shards.
    ends = [f"{number:0{width}d}" for number in (low, low + count - 1)]
    pattern = f"s{letters}-{{{ends[0]}..{ends[1]}}}.tar"
    assume(len(ends[0]) == len(ends[1]))
    assert expand_braces(pattern) == list(braceexpand(pattern))


def test_a_folder_gives_the_shards_of_the_split(tmp_path):
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        shard_of(tmp_path / name, ("1.png", picture()), ("1.txt", name.encode()))
    assert [r.captions[0] for r in read(tmp_path)[0]] == ["train-0.tar", "train-1.tar"]
    assert [r.captions[0] for r in read(tmp_path, "val")[0]] == ["val-0.tar"]
    assert len(read(tmp_path, "other")[0]) == 3
    (tmp_path / "other").mkdir()
    shard_of(tmp_path / "other" / "0.tar", ("1.png", picture()), ("1.txt", b"inner"))
    assert [r.captions[0] for r in read(tmp_path, "other")[0]] == ["inner"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("missing-{0..3}.tar", "4 of 4 shards are missing"),
        ("a-{3..1}.tar", "count upwards"),
        ("a-{0..9999999}.tar", "fewer than"),
        ("{0..9999}{0..9999}.tar", "more than"),
        ("s3://bucket/a.tar", "local files"),
        ("https://example.org/a.tar", "local files"),
    ],
)
def test_patterns_that_name_no_shards_say_so(pattern, message):
    with pytest.raises(VlmError, match=message):
        expand_shards(pattern)


def test_pipes_run_only_where_they_are_allowed(tmp_path):
    shard = shard_of(tmp_path / "a.tar", ("1.png", picture()), ("1.txt", b"a"))
    ran = tmp_path / "ran"
    pipe = f"pipe:touch {ran}; cat {shard}"
    with pytest.raises(VlmError, match="run a program"):
        expand_shards(pipe)
    with pytest.raises(VlmError):
        read(Path(pipe))
    assert not ran.exists()
    (kept,) = expand_shards(pipe, allow_pipes=True)
    assert kept.read_bytes() == shard.read_bytes()
    assert ran.exists()
    with pytest.raises(VlmError, match="status 3"):
        expand_shards("pipe:exit 3", allow_pipes=True)


# --- writing ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
META = st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), st.integers() | TEXT, max_size=3)


@st.composite
def any_record(draw, paths: list[str]):
    """A record of any reader: captions, a question, a conversation or a class, with no picture up to three."""
    images = tuple(draw(st.lists(st.sampled_from(paths), max_size=3)))
    turns = draw(st.lists(TEXT, max_size=4))
    return Record(
        id=draw(TEXT),
        images=images,
        captions=tuple(draw(st.lists(TEXT, max_size=3))),
        question=draw(st.none() | TEXT),
        answers=tuple(draw(st.lists(TEXT, max_size=3))),
        messages=tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns)),
        label=draw(st.none() | TEXT),
        meta=draw(META),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), size=st.integers(1, 4))
def test_records_in_are_records_out(tmp_path_factory, data, size):
    folder = tmp_path_factory.mktemp("round")
    paths = pictures(folder, 2)
    Image.open(paths[0]).save(folder / "third.bmp")
    given_ = data.draw(st.lists(any_record([*paths, str(folder / "third.bmp")]), min_size=1, max_size=7))
    written = write_shards(given_, folder / "out", size=size)
    assert written.records == len(given_)
    assert len(written.shards) == -(-len(given_) // size)
    back, broken = read(folder / "out")
    assert broken == []
    assert [_without_pictures(record) for record in back] == [_without_pictures(r) for r in _unique(given_)]
    for one, other in zip(back, given_):
        pixels = [load_image(image).tobytes() for image in other.images]
        assert [load_image(image).tobytes() for image in one.images] == pixels


def _without_pictures(record: Record) -> tuple:
    fields = (record.id, record.captions, record.question, record.answers, record.messages, record.label)
    return (*fields, dict(record.meta))


def _unique(records: list[Record]) -> list[Record]:
    """The records with the ids that any reader gives to repeated ones."""
    from vlm.data.formats import _with_unique_ids

    return list(_with_unique_ids(iter(records)))


def test_shards_of_shards_are_the_same_bytes(tmp_path):
    paths = pictures(tmp_path, 3)
    first = write_shards([Record(str(n), (p,), (f"c {n}",)) for n, p in enumerate(paths)], tmp_path / "one", size=2)
    records, _ = read(tmp_path / "one")
    second = write_shards(records, tmp_path / "two", size=2)
    assert [path.read_bytes() for path in first.shards] == [path.read_bytes() for path in second.shards]
    assert json.loads((tmp_path / "two" / "sizes.json").read_text()) == {"shard-000000.tar": 2, "shard-000001.tar": 1}


def test_a_broken_picture_is_left_out_of_the_shards_and_listed(tmp_path):
    (path,) = pictures(tmp_path, 1)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG")
    records = [Record("1", (path,), ("a",)), Record("2", (str(bad),), ("b",))]
    written = write_shards(records, tmp_path / "out")
    assert written.records == 1
    assert [broken.where for broken in written.broken] == ["2"]
    with pytest.raises(VlmError, match="no record could be written"):
        write_shards(records[1:], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".none*"))
    with pytest.raises(VlmError, match="there already"):
        write_shards(records, tmp_path / "out")


def test_the_command_writes_any_data_set(tmp_path):
    from typer.testing import CliRunner

    from vlm.cli.data import app

    for label in ("cat", "dog"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        pictures(tmp_path / "mine" / label, 2, seed=len(label))
    words = ["shard", str(tmp_path / "mine"), "--format", "image_folder", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [*words, "--size", "3"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["records"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mine-train-000000.tar",
        "mine-train-000001.tar",
        "sizes.json",
    ]
    assert [record.label for record in read(tmp_path / "out")[0]] == ["cat", "cat", "dog", "dog"]
