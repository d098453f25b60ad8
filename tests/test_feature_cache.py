"""Frozen features are computed once per picture, shared by whoever asks, and never stale or torn."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dual_parts import dual_spec
from generative_parts import generative_model, pictures
from PIL import Image
from tiny_models import tiny_hf_image_model

import vlm.data.feature_cache as feature_cache
from vlm.backbones.image import build_image_encoder
from vlm.data.feature_cache import cache_features, frozen_features
from vlm.data.images import BrokenImage, load_image
from vlm.data.references import inside
from vlm.errors import VlmError
from vlm.model_spec import DualEncoderSpec, ImageEncoderSpec
from vlm.models.build import build_model


@pytest.fixture
def encoder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return build_image_encoder(ImageEncoderSpec(name=f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}"))


def tokens_of(encoder):
    """What the cache is to keep: the encoder's tokens."""
    return frozen_features(encoder, "tokens", lambda features: features.tokens)


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
    cache = cache_features(tokens_of(encoder), paths, batch_size=5)
    with torch.inference_mode():
        computed = encoder(torch.stack([encoder.transform.eval(load_image(p)) for p in paths])).tokens
    for path, tokens in zip(paths, computed):
        assert cache(path).dtype == dtype
        torch.testing.assert_close(cache(path), tokens, rtol=0, atol=0)


def test_only_new_pictures_are_computed_and_equal_files_once(encoder, tmp_path, count):
    paths = pictures(tmp_path, 4)
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(paths[0]).read_bytes())
    cache_features(tokens_of(encoder), paths[:2])
    cache_features(tokens_of(encoder), [*paths, str(copy)])
    cache = cache_features(tokens_of(encoder), paths)
    assert count() == 4
    assert len(cache.segments) == 2


def test_a_changed_picture_or_encoder_is_computed_anew(encoder, tmp_path, count):
    (path,) = pictures(tmp_path, 1)
    before = cache_features(tokens_of(encoder), [path])(path).clone()
    load_image(path).rotate(90).save(path)
    assert not torch.equal(cache_features(tokens_of(encoder), [path])(path), before)
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    cache_features(tokens_of(encoder), [path])
    assert count() == 3


def test_a_torn_or_unfinished_segment_is_rebuilt(encoder, tmp_path, count):
    paths = pictures(tmp_path, 3)
    whole = [cache_features(tokens_of(encoder), paths)(p).clone() for p in paths]
    folder = tokens_of(encoder).folder
    (data,) = folder.glob("*.bin")
    data.write_bytes(data.read_bytes()[:-8])
    (folder / "segment-00007.bin").write_bytes(b"no index beside it")
    cache = cache_features(tokens_of(encoder), paths)
    assert count() == 6
    for path, tokens in zip(paths, whole):
        torch.testing.assert_close(cache(path), tokens)


def test_broken_pictures_are_listed_and_raise_when_asked_for(encoder, tmp_path):
    paths = pictures(tmp_path, 2)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG torn")
    cache = cache_features(tokens_of(encoder), [*paths, str(bad), str(tmp_path / "missing.png")])
    assert set(cache.broken) == {str(bad), str(tmp_path / "missing.png")}
    with pytest.raises(BrokenImage, match=r"bad\.png"):
        cache(str(bad))


def test_too_little_disk_is_told_before_anything_is_written(encoder, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(VlmError, match="VLM_CACHE"):
        cache_features(tokens_of(encoder), pictures(tmp_path, 1))
    assert not list(tokens_of(encoder).folder.glob("segment-*"))


def test_the_size_is_announced(encoder, tmp_path):
    said = []
    cache_features(tokens_of(encoder), pictures(tmp_path, 2), announce=said.append)
    assert "2 pictures" in said[0]
    (index,) = tokens_of(encoder).folder.glob("*.json")
    assert json.loads(index.read_text())["shape"][0] == 2


def test_what_is_kept_is_the_models_choice_and_part_of_the_key(encoder, tmp_path):
    paths = pictures(tmp_path, 3)
    mean = frozen_features(encoder, "mean", lambda features: features.tokens.mean(1))
    pooled = cache_features(mean, paths)
    tokens = cache_features(tokens_of(encoder), paths)
    assert mean.folder != tokens_of(encoder).folder
    for path in paths:
        torch.testing.assert_close(pooled(path), tokens(path).mean(0))


def test_an_encoder_that_learns_has_nothing_to_keep(encoder):
    next(encoder.parameters()).requires_grad_(True)
    assert tokens_of(encoder) is None


def test_pictures_in_shards_and_rows_of_cifar_are_kept_and_equal_pictures_share(encoder, tmp_path, count):
    (path,) = pictures(tmp_path, 1)
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(path, "a/0.png")
    batch = tmp_path / "data_batch_1.bin"
    rows = np.random.default_rng(0).integers(0, 256, (2, 3073), dtype=np.uint8)
    batch.write_bytes(rows.tobytes())
    references = [path, inside(shard, "a/0.png"), inside(batch, 1), inside(batch, 3074)]
    cache = cache_features(tokens_of(encoder), references)
    assert count() == 3  # the file and its copy in the shard are one picture
    torch.testing.assert_close(cache(references[0]), cache(references[1]))
    pixels = rows[1, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    with torch.inference_mode():
        computed = encoder(encoder.transform.eval(Image.fromarray(pixels))[None]).tokens[0]
    torch.testing.assert_close(cache(references[3]), computed)


def test_features_fill_several_segments(encoder, tmp_path, count, monkeypatch):
    monkeypatch.setattr(feature_cache, "SEGMENT_BYTES", 4_000)
    paths = pictures(tmp_path, 9)
    cache = cache_features(tokens_of(encoder), paths, batch_size=2)
    assert len(cache.segments) > 2
    again = cache_features(tokens_of(encoder), paths)
    assert count() == 9
    for path in paths:
        torch.testing.assert_close(again(path), cache(path))


@pytest.mark.parametrize("content", [b"", b"{", b'{"keys": []}', b'{"keys": [], "shape": [1, 2], "dtype": "float32"}'])
def test_an_unreadable_index_is_rebuilt(encoder, tmp_path, count, content):
    paths = pictures(tmp_path, 2)
    cache_features(tokens_of(encoder), paths)
    (index,) = tokens_of(encoder).folder.glob("*.json")
    index.write_bytes(content)
    cache_features(tokens_of(encoder), paths)
    assert count() == 4


_KILLED = """
import sys, time, torch
from pathlib import Path
import vlm.data.feature_cache as feature_cache
from vlm.data.feature_cache import PictureFeatures, cache_features

feature_cache.SEGMENT_BYTES = 64
def encode(numbers):
    if numbers.min() >= 8:
        print("writing", flush=True)
        time.sleep(600)
    return numbers[:, None].repeat(1, 4).float()
load = lambda path: torch.tensor(int(Path(path).read_text()))
features = PictureFeatures("slow", "number", lambda: "0", load, encode)
cache_features(features, sys.argv[1:], batch_size=3)
"""


def test_a_process_killed_while_it_writes_loses_only_what_it_had_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / f"{number}.txt" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    environment = {**os.environ, "PYTHONPATH": str(Path(feature_cache.__file__).parents[2])}
    killed = subprocess.Popen(
        [sys.executable, "-c", _KILLED, *map(str, paths)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    assert killed.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()

    encoded = []

    def encode(numbers):
        encoded.extend(numbers.tolist())
        return numbers[:, None].repeat(1, 4).float()

    features = feature_cache.PictureFeatures(
        "slow", "number", lambda: "0", lambda path: torch.tensor(int(Path(path).read_text())), encode
    )
    assert [file for file in features.folder.iterdir() if ".partial" in file.name]
    cache = cache_features(features, list(map(str, paths)))
    assert sorted(encoded) == list(range(6, 20))  # six were in a whole segment
    assert [cache(str(path))[0].item() for path in paths] == list(range(20))
    assert not [file for file in features.folder.iterdir() if ".partial" in file.name]


_SHARED = """
import os, sys, torch
from datetime import timedelta
from pathlib import Path
from torch import distributed
from vlm.data.feature_cache import PictureFeatures, Together, cache_features
from vlm.data.images import BrokenImage

distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
rank, world = distributed.get_rank(), distributed.get_world_size()
folder = Path(sys.argv[1])
os.environ["VLM_CACHE"] = str(folder / (f"cache-{rank}" if sys.argv[2] == "apart" else "cache"))

def load(path):
    text = Path(path).read_text()
    if not text.isdigit():
        raise BrokenImage(path, "no number")
    with open(folder / f"asked-{rank}.txt", "a") as log:
        log.write(text + "\\n")
    return torch.tensor(int(text))

def gather(own):
    said = [None] * world
    distributed.all_gather_object(said, own)
    return said

features = PictureFeatures("shared", "number", lambda: "0", load, lambda numbers: numbers[:, None].repeat(1, 4).float())
paths = sorted(map(str, folder.glob("*.number")))
cache = cache_features(features, paths, batch_size=3, together=Together(rank, world, gather))
for path in paths:
    text = Path(path).read_text()
    assert path in cache.broken if not text.isdigit() else cache(path).tolist() == [int(text)] * 4
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("disk", ["shared", "apart"])
def test_processes_share_the_work_and_find_what_the_others_did(tmp_path, disk):
    """On a disk that all see nothing is computed twice; on disks of their own each computes the rest itself."""
    for number in range(23):
        (tmp_path / f"{number:02d}.number").write_text(str(number) if number % 10 else "no number")
    program = tmp_path / "program.py"
    program.write_text(_SHARED)
    environment = {**os.environ, "PYTHONPATH": str(Path(feature_cache.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [*launcher, str(program), str(tmp_path), disk]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = [(tmp_path / f"asked-{rank}.txt").read_text().split() for rank in range(3)]
    everything = sorted(str(number) for number in range(23) if number % 10)
    if disk == "shared":
        assert sorted(text for one in asked for text in one) == everything
        assert all(asked)
    else:
        assert all(sorted(one) == everything for one in asked)


# --- looked up when a model is asked ----------------------------------------------------------------------------------


def images_of(tmp_path):
    """Paths, a picture in a shard, and pictures in memory; and all of them in memory."""
    paths = pictures(tmp_path, 4)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(paths[3], "0.png")
    memory = [Image.open(path).convert("RGB") for path in paths]
    return [paths[0], Path(paths[1]), memory[2], inside(tmp_path / "shard.tar", "0.png")], memory


@pytest.mark.parametrize("family", ["generative", "dual"])
def test_a_model_looks_up_what_is_kept_and_says_the_same(tiny_folder, tmp_path, monkeypatch, family):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    if family == "generative":
        model = generative_model(tiny_folder)
        encode = model.encode_pictures
    else:
        spec = DualEncoderSpec.model_validate(dual_spec(tiny_folder))
        model = build_model(spec, ["bridge.*"], device="cpu", precision="fp32")
        encode = model.encode_image
    images, memory = images_of(tmp_path)
    expected = encode(memory)
    torch.testing.assert_close(encode(images), expected)  # nothing kept yet
    cache_features(model.picture_features(), [images[0], images[3]])
    seen = []
    original = model.image_encoder.forward
    monkeypatch.setattr(model.image_encoder, "forward", lambda pixels: seen.append(len(pixels)) or original(pixels))
    torch.testing.assert_close(encode(images), expected)
    assert seen == [2]
    cache_features(model.picture_features(), [str(images[1])])
    torch.testing.assert_close(encode(images), expected)
    assert seen == [2, 1, 1]
    torch.testing.assert_close(encode([images[0], images[3]]), expected[[0, 3]])
    assert seen == [2, 1, 1]
    with torch.no_grad():
        for parameter in model.image_encoder.parameters():
            parameter.mul_(1.5)
    changed = encode(memory)
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(encode(images), changed)  # what other weights said is not found
    with pytest.raises(BrokenImage, match=r"missing\.png"):
        encode([images[0], str(tmp_path / "missing.png")])
