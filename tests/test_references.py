"""References to pictures inside other files: told from paths, opened, and named where they cannot be."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.data.images import BrokenImage, load_image
from vlm.data.references import inside, open_image_reference, picture_bytes, picture_exists, split_reference
from vlm.errors import VlmError

NAME = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/:."), min_size=1, max_size=12)


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(buffer, "png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("x/1.png", buffer.getvalue()), ("bad.png", b"\x89PNG"), ("none.png", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return tmp_path / "a.tar"


@given(folder=NAME, member=NAME, suffix=st.sampled_from([".tar", ".bin"]))
def test_a_reference_comes_apart_as_it_was_put_together(folder, member, suffix):
    container = Path("/no") / folder / f"file{suffix}"
    assert split_reference(inside(container, member)) == (container, member)
    assert split_reference(str(container)) is None
    assert split_reference(f"/no/{folder}/{member}.png") is None
    assert split_reference(f"{container}::") is None


def test_a_file_of_such_a_name_is_a_file(tmp_path):
    path = tmp_path / "odd.tar::1.png"
    Image.new("RGB", (2, 2), "red").save(path, "png")
    assert split_reference(str(path)) is None
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_in_a_shard_is_the_picture(shard):
    reference = inside(shard, "x/1.png")
    assert np.array_equal(np.asarray(load_image(reference)).ravel(), np.arange(48))
    assert picture_bytes(reference)[:4] == b"\x89PNG"
    assert picture_exists(reference)
    assert picture_exists(inside(shard, "missing.png"))  # the shard is there; what it holds is not looked at
    assert not picture_exists(inside(shard.with_name("b.tar"), "x/1.png"))


@pytest.mark.parametrize(
    ("member", "message"), [("bad.png", "broken"), ("none.png", "empty"), ("gone.png", "no file 'gone.png'")]
)
def test_a_bad_member_names_shard_and_member(shard, member, message):
    with pytest.raises(BrokenImage, match=message) as error:
        load_image(inside(shard, member))
    assert error.value.path == inside(shard, member)


def test_a_missing_container_is_a_broken_picture(tmp_path):
    for reference in (inside(tmp_path / "no.tar", "1.png"), inside(tmp_path / "no.bin", 1)):
        with pytest.raises(BrokenImage):
            load_image(reference)
        with pytest.raises((VlmError, OSError)):
            picture_bytes(reference)


@pytest.mark.parametrize("member", ["-1", "x", "1.5", "10000", "²"])
def test_an_offset_that_is_none_is_refused(tmp_path, member):
    batch = tmp_path / "a.bin"
    batch.write_bytes(bytes(4000))
    assert open_image_reference(batch, "928").shape == (32, 32, 3)
    with pytest.raises(VlmError, match="pixels from byte"):
        open_image_reference(batch, member)
    with pytest.raises(BrokenImage):
        load_image(inside(batch, member))


def test_pictures_of_files_are_their_bytes(tmp_path):
    path = tmp_path / "1.png"
    path.write_bytes(b"content")
    assert picture_bytes(str(path)) == b"content"
    with pytest.raises(OSError):
        picture_bytes(str(tmp_path / "missing.png"))
