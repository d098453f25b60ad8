"""Pictures of every mode and every kind of damage become RGB, or an error that names the file."""

import contextlib
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.images import MAX_PIXELS, BrokenImage, load_image
from vlm.errors import VlmError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Red above, blue below; the left tenth green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2] = RED
    pixels[height // 2 :] = (0, 0, 255)
    pixels[:, : width // 10] = (0, 255, 0)
    return Image.fromarray(pixels)


def near(pixel: object, expected: tuple[int, int, int], by: int = 12) -> bool:
    return bool(np.abs(np.array(pixel, int) - expected).max() <= by)


def test_rgb_pictures_come_unchanged_from_path_string_pil_and_array(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture().save(file)
    for source in (file, str(file), picture(), np.asarray(picture())):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(loaded, picture())


def test_truncated_jpeg_is_broken_and_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.jpg"
    picture(400, 300).save(file)
    file.write_bytes(file.read_bytes()[:1500])
    with pytest.raises(BrokenImage, match=r"cut\.jpg: broken image: .*truncated") as caught:
        load_image(file)
    assert caught.value.path == str(file)
    with Image.open(file) as lazily_opened, pytest.raises(BrokenImage, match=r"cut\.jpg"):
        load_image(lazily_opened)


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tiff", "bmp", "jpg"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_a_cut_off_file_of_any_kind_is_broken_or_still_a_picture(tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BrokenImage, match=r"cut\."):
        load_image(file)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
def test_flipped_bytes_give_a_picture_or_broken_image_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"flipped.{suffix}"
    picture().save(file, suffix)
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    with contextlib.suppress(BrokenImage):
        assert load_image(file).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "empty"),
        ("text.png", b"this is no picture", "cannot identify"),
        ("missing.png", None, "No such file"),
    ],
)
def test_empty_missing_and_other_files_are_broken(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenImage, match=f"{name}: broken image: .*{reason}"):
        load_image(tmp_path / name)
    with pytest.raises(BrokenImage, match="not a file"):
        load_image(tmp_path)
    with pytest.raises(BrokenImage, match="null"):
        load_image("a\0b.png")


def _huge_png(file: Path, width: int, height: int) -> None:
    """A PNG of a few bytes whose header promises `width` x `height` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("pillow_limit", [89_478_485, None])
def test_a_huge_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pillow_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    file = tmp_path / "bomb.png"
    _huge_png(file, 60_000, 60_000)
    with pytest.raises(BrokenImage, match=rf"bomb\.png: broken image: .*{MAX_PIXELS:,}"):
        load_image(file)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    file = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, quality=95)
    loaded = load_image(file)
    assert loaded.mode == "RGB"
    assert near(loaded.getpixel((8, 8)), RED)


def test_palettes_keep_their_colours(tmp_path: Path) -> None:
    file = tmp_path / "palette.png"
    picture().quantize(8).save(file)
    assert Image.open(file).mode == "P"
    assert near(load_image(file).getpixel((20, 5)), RED)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_put_on_white(tmp_path: Path, mode: str) -> None:
    file = tmp_path / f"{mode}.png"
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.save(file, transparency=1)
    elif mode == "RGB":
        Image.new("RGB", (8, 8), (10, 20, 30)).save(file, transparency=(10, 20, 30))
    else:
        Image.new(mode, (8, 8), (10, 20, 30, 0) if mode == "RGBA" else (10, 0)).save(file)
    loaded = load_image(file)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((4, 4)) == WHITE


def test_half_transparent_black_on_white_is_grey() -> None:
    assert near(load_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128))).getpixel((1, 1)), (127, 127, 127), by=1)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, dtype: str) -> None:
    values = np.linspace(0, 65535, 256).round().reshape(16, 16)
    file = tmp_path / "wide.tiff"
    Image.fromarray(values.astype(dtype)).save(file)
    loaded = np.asarray(load_image(file))
    assert np.array_equal(loaded[..., 0], np.arange(256).reshape(16, 16))
    assert (loaded[..., 0] == loaded[..., 2]).all()


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(file)
    assert load_image(file).getpixel((0, 0)) == (128, 128, 128)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "float.tiff"
    Image.fromarray(np.ones((4, 4), np.float32)).save(file)
    with pytest.raises(BrokenImage, match="float pixels"):
        load_image(file)


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    loaded = load_image(Image.new("RGB", (6, 4), WHITE).convert(mode))
    assert (loaded.mode, loaded.size) == ("RGB", (6, 4))
    assert near(loaded.getpixel((3, 2)), WHITE, by=2)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(file).n_frames == 3
    assert near(load_image(file).getpixel((8, 8)), RED, by=20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int) -> None:
    # How a camera that was turned stores an upright picture: the inverse of what the tag says to do.
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    turned = picture()
    for transpose in stored:
        turned = turned.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.jpg"
    turned.save(file, exif=exif, quality=95, subsampling=0)
    loaded = load_image(file)
    assert loaded.size == (40, 30)
    assert near(loaded.getpixel((30, 4)), RED, by=40)
    assert near(loaded.getpixel((1, 15)), (0, 255, 0), by=60)
    assert np.array_equal(load_image(loaded), loaded)
    with Image.open(file) as opened:
        assert np.array_equal(load_image(opened), loaded)


def test_malformed_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "odd.jpg"
    picture().save(file, exif=b"Exif\0\0garbage that is no TIFF header")
    assert load_image(file).size == (40, 30)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 of shape \[4, 4, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 of shape \[3, 4, 4\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 of shape \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 of shape \[0, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \[2, 4, 4, 3\]"),
    ],
)
def test_unfit_arrays_are_refused_by_shape_and_type(array: np.ndarray, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        load_image(array)


def test_a_value_that_is_no_picture_is_refused() -> None:
    with pytest.raises(VlmError, match="got int"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(VlmError, match="got bytes"):
        load_image(b"\x89PNG")  # type: ignore[arg-type]


def test_broken_image_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BrokenImage("a.jpg", "cut off")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "cut off", "a.jpg: broken image: cut off")
