"""Pictures from anywhere as 8-bit RGB, whatever mode their file has; errors name the file."""

import io
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vlm.data.references import open_image_reference, split_reference
from vlm.errors import VlmError

ImageLike: TypeAlias = str | Path | Image.Image | np.ndarray

MAX_PIXELS = 178_956_970  # Pillow's own hard limit: as RGB half a gigabyte

_IN_MEMORY = "<image in memory>"
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class BrokenImage(VlmError):
    """A picture that cannot be decoded. `path` names it, `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: broken image: {self.reason}"


def as_list(images: Any) -> list[Any]:
    """One or a list of images as a list. Raises VlmError for none."""
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
    pictures = list(images) if several else [images]
    if not pictures:
        raise VlmError("no images were given")
    return pictures


def load_image(image: ImageLike) -> Image.Image:
    """A path, PIL image or uint8 array [H,W,3] (or grey [H,W]) as an upright RGB picture.

    A path may be a reference into a shard (`vlm.data.references`). EXIF orientation is applied, transparency is put on
    white, 16-bit grey is scaled (not clipped), animations give their first frame. Raises BrokenImage for what is
    missing, truncated, no picture or larger than MAX_PIXELS (checked before decoding); VlmError for a value that is no
    picture at all.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        return _decoded(image, str(getattr(image, "filename", "") or _IN_MEMORY))
    if not isinstance(image, (str, Path)):
        raise VlmError(f"expected a path, a PIL image or a uint8 array [H,W,3], got {type(image).__name__}")
    path = str(image)
    if (parts := split_reference(path)) is not None:
        return _from_reference(*parts, path)
    try:
        size = Path(path).stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BrokenImage(path, getattr(error, "strerror", None) or str(error)) from error
    if not Path(path).is_file():
        raise BrokenImage(path, "not a file")
    if size == 0:
        raise BrokenImage(path, "the file is empty")
    return _from_file(path, path)


def _from_reference(container: Path, member: str, path: str) -> Image.Image:
    try:
        content = open_image_reference(container, member)
    except VlmError as error:
        raise BrokenImage(path, str(error)) from error
    if isinstance(content, np.ndarray):
        return _from_array(content)
    if not content:
        raise BrokenImage(path, "the file is empty")
    return _from_file(io.BytesIO(content), path)


def _from_file(source: str | io.BytesIO, path: str) -> Image.Image:
    try:
        with Image.open(source) as opened:
            return _decoded(opened, path)
    except (VlmError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImage(path, f"larger than {MAX_PIXELS:,} pixels; resize it first") from error
    except Exception as error:  # on bad bytes the decoders raise nearly anything, SyntaxError and struct.error included
        raise BrokenImage(path, _first_line(error)) from error


def _from_array(array: np.ndarray) -> Image.Image:
    grey_or_rgb = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not grey_or_rgb or array.size == 0:
        raise VlmError(
            f"expected a uint8 array [H,W,3] or [H,W], got {array.dtype} of shape {list(array.shape)}; "
            "floats in 0..1 become pixels by (255 * x).round().astype('uint8'), [3,H,W] by x.transpose(1, 2, 0)"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _decoded(image: Image.Image, path: str) -> Image.Image:
    """The pixels of an opened picture, upright and RGB; a new picture unless there is nothing to do."""
    if image.width * image.height > MAX_PIXELS:
        pixels = f"{image.width} x {image.height} pixels"
        raise BrokenImage(path, f"{pixels}, more than the limit of {MAX_PIXELS:,}; resize it first")
    if image.width == 0 or image.height == 0:
        raise BrokenImage(path, "no pixels")
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        rgb = _rgb(image)
    except (VlmError, MemoryError):
        raise
    except Exception as error:
        raise BrokenImage(path, _first_line(error)) from error
    if upright is None:
        return rgb
    turned = rgb.transpose(upright)
    turned.info = {}  # the orientation tag with it: loading the result again must not turn it again
    return turned


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none or EXIF is malformed (the picture itself may be fine)."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no known range; save the picture with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_wide(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    """Grey with 16 bits (`I;16`, or `I` as some Pillow versions open such files) or 32 (`I` with larger values)."""
    values = np.asarray(image).astype(np.float64)  # [H, W]
    top = 65535 if values.max() <= 65535 else 2**31 - 1
    return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
