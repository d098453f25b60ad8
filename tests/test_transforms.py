"""Evaluation transforms equal the libraries' own; the training transform depends on its generator alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as v1

from vlm.data.transforms import ImageTransform, random_crop_box
from vlm.errors import VlmError

sizes = st.tuples(st.integers(20, 150), st.integers(20, 150))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: resampling mistakes show, single-pixel noise does not drown them."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@settings(max_examples=15, deadline=None)
@given(sizes, st.sampled_from([0.875, 0.9, 1.0]), st.sampled_from(["center", "squash"]))
def test_equals_timm(size, crop_pct, crop_mode):
    from timm.data import create_transform

    options = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
    theirs = create_transform((3, 48, 48), crop_pct=crop_pct, crop_mode=crop_mode, **options)
    resize = {"center": "shortest", "squash": "square"}[crop_mode]
    ours = ImageTransform(size=(48, 48), resize=resize, crop_pct=crop_pct, **options)
    image = picture(*size)
    torch.testing.assert_close(ours.eval(image), theirs(image), atol=1e-6, rtol=0)


def test_equals_timm_for_a_size_that_is_not_square():
    from timm.data import create_transform

    theirs = create_transform((3, 32, 48), crop_pct=0.9, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    ours = ImageTransform((32, 48), (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", crop_pct=0.9)
    torch.testing.assert_close(ours.eval(picture(77, 91)), theirs(picture(77, 91)), atol=1e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(sizes, st.sampled_from(["shortest", "squash"]))
def test_equals_open_clip(size, resize_mode):
    from open_clip.transform import image_transform

    theirs = image_transform(40, is_train=False, resize_mode=resize_mode)
    ours = ImageTransform(size=(40, 40), resize={"shortest": "shortest", "squash": "square"}[resize_mode])
    image = picture(*size)
    torch.testing.assert_close(ours.eval(image), theirs(image), atol=1e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(sizes)
def test_equals_transformers_clip_on_pillow(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    ours = ImageTransform(size=(40, 40), crop_rounding="floor")
    image = picture(*size)
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ours.eval(image), expected, atol=2e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(sizes)
def test_equals_transformers_siglip_on_pillow(size):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    theirs = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    ours = ImageTransform(
        (40, 40), tuple(theirs.image_mean), tuple(theirs.image_std), resize="square", interpolation="bicubic"
    )
    image = picture(*size)
    expected = theirs(image, return_tensors="pt", resample=3).pixel_values[0]
    torch.testing.assert_close(ours.eval(image), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [(30, 51), (51, 30), (40, 40)])
def test_padding_puts_the_picture_in_the_middle_of_the_mean_colour(size):
    transform = ImageTransform(size=(51, 51), resize="pad", interpolation="nearest")
    width, height = size
    pixels = transform.with_size(max(size)).eval(Image.new("RGB", size, (255, 0, 0)))  # [3, H, W]
    red = (pixels[0] - (1 - transform.mean[0]) / transform.std[0]).abs() < 1e-5
    rows, columns = red.any(1).nonzero().flatten(), red.any(0).nonzero().flatten()
    assert (rows[0].item(), len(rows)) == ((max(size) - height) // 2, height)
    assert (columns[0].item(), len(columns)) == ((max(size) - width) // 2, width)
    assert (pixels[:, ~red].abs() < 0.02).all()  # int(255 * mean) is the mean within a grey level


@settings(max_examples=15, deadline=None)
@given(sizes, st.integers(0, 1000))
def test_training_crop_equals_torchvision_with_the_same_random_numbers(size, seed):
    image = picture(*size)
    ours = ImageTransform(size=(32, 32)).train(image, torch.Generator().manual_seed(seed))
    crop = v2.RandomResizedCrop((32, 32), scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = v2.RandomHorizontalFlip()(crop(image))
    tensor = v2.functional.to_dtype(v2.functional.pil_to_tensor(theirs), torch.float32, scale=True)
    expected = v2.functional.normalize(tensor, list(ImageTransform().mean), list(ImageTransform().std))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_training_transform_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    ImageTransform(size=(16, 16)).train(picture(40, 30), torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.random.get_rng_state())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 100))
def test_random_crops_lie_inside_the_picture(height, width, seed):
    top, left, h, w = random_crop_box((height, width), (0.5, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(seed))
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_any_mode_becomes_three_channels(mode):
    pixels = ImageTransform(size=(24, 24)).eval(picture(40, 30).convert(mode))
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.float32


def test_survives_being_written_down():
    transform = ImageTransform(size=(32, 48), resize="pad", crop_pct=0.9)
    assert ImageTransform.from_dict(transform.to_dict()) == transform


def test_unknown_values_are_named():
    with pytest.raises(VlmError, match="did you mean 'shortest'"):
        ImageTransform(resize="shortets")
    with pytest.raises(VlmError, match="did you mean 'crop_pct'"):
        ImageTransform.from_dict({"crop_pc": 1})


def test_showing_the_whole_picture_drops_the_crop():
    transform = ImageTransform(crop_pct=0.875)
    assert transform.with_resize("square").crop_pct == 1.0
    assert transform.with_resize("shortest").crop_pct == 0.875


def test_every_value_is_normalised_to_the_bits_of_torchvision():
    transform = ImageTransform(size=(16, 16), mean=(0.1, 0.5, 0.77), std=(0.3, 0.123, 1.0))
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    picture = Image.fromarray(np.concatenate([values, values[::-1], values.transpose(1, 0, 2)], axis=2))
    expected = v1.normalize(v1.to_tensor(picture), list(transform.mean), list(transform.std))
    assert torch.equal(transform.eval(picture), expected)
