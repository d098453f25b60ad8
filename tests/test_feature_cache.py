"""Frozen features are computed once per picture, shared by whoever asks, and never stale or torn."""

import json
from pathlib import Path

import pytest
import torch
from generative_parts import pictures
from tiny_models import tiny_hf_image_model

from vlm.backbones.image import build_image_encoder
from vlm.data.feature_cache import cache_features, store_folder
from vlm.data.images import BrokenImage, load_image
from vlm.errors import VlmError
from vlm.model_spec import ImageEncoderSpec


@pytest.fixture
def encoder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return build_image_encoder(ImageEncoderSpec(name=f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}"))


@pytest.fixture
def count(encoder, monkeypatch):
    """How many pictures went through the encoder."""
    seen = []
    original = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda pixels: seen.append(len(pixels)) or original(pixels))
    return lambda: sum(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_tokens_are_the_computed_ones(encoder, tmp_path, dtype):
    encoder.to(dtype)
    paths = pictures(tmp_path, 5)
    cache = cache_features(encoder, paths, batch_size=5)
    with torch.inference_mode():
        computed = encoder(torch.stack([encoder.transform.eval(load_image(p)) for p in paths])).tokens
    for path, tokens in zip(paths, computed):
        assert cache(path).dtype == dtype
        torch.testing.assert_close(cache(path), tokens, rtol=0, atol=0)


def test_only_new_pictures_are_computed_and_equal_files_once(encoder, tmp_path, count):
    paths = pictures(tmp_path, 4)
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(paths[0]).read_bytes())
    cache_features(encoder, paths[:2])
    cache_features(encoder, [*paths, str(copy)])
    cache = cache_features(encoder, paths)
    assert count() == 4
    assert len(cache.segments) == 2


def test_a_changed_picture_or_encoder_is_computed_anew(encoder, tmp_path, count):
    (path,) = pictures(tmp_path, 1)
    before = cache_features(encoder, [path])(path).clone()
    load_image(path).rotate(90).save(path)
    assert not torch.equal(cache_features(encoder, [path])(path), before)
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    cache_features(encoder, [path])
    assert count() == 3


def test_a_torn_or_unfinished_segment_is_rebuilt(encoder, tmp_path, count):
    paths = pictures(tmp_path, 3)
    whole = [cache_features(encoder, paths)(p).clone() for p in paths]
    folder = store_folder(encoder)
    (data,) = folder.glob("*.bin")
    data.write_bytes(data.read_bytes()[:-8])
    (folder / "segment-00007.bin").write_bytes(b"no index beside it")
    cache = cache_features(encoder, paths)
    assert count() == 6
    for path, tokens in zip(paths, whole):
        torch.testing.assert_close(cache(path), tokens)


def test_broken_pictures_are_listed_and_raise_when_asked_for(encoder, tmp_path):
    paths = pictures(tmp_path, 2)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG torn")
    cache = cache_features(encoder, [*paths, str(bad), str(tmp_path / "missing.png")])
    assert set(cache.broken) == {str(bad), str(tmp_path / "missing.png")}
    with pytest.raises(BrokenImage, match=r"bad\.png"):
        cache(str(bad))


def test_too_little_disk_is_told_before_anything_is_written(encoder, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(VlmError, match="VLM_CACHE"):
        cache_features(encoder, pictures(tmp_path, 1))
    assert not list(store_folder(encoder).glob("segment-*"))


def test_the_size_is_announced(encoder, tmp_path):
    said = []
    cache_features(encoder, pictures(tmp_path, 2), announce=said.append)
    assert "2 pictures" in said[0]
    (index,) = store_folder(encoder).glob("*.json")
    assert json.loads(index.read_text())["shape"][0] == 2
