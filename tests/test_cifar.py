"""CIFAR's binary version: rows as torchvision reads its pickles, names of the classes, and damage."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10, CIFAR100

from vlm.data.cifar import read_cifar
from vlm.data.formats import read_records
from vlm.data.images import BrokenImage, load_image
from vlm.data.records import Record
from vlm.errors import VlmError

NAMES = ["airplane", "automobile", "bird"]


def cifar10(folder: Path, rows: int = 4, seed: int = 0, names: list[str] = NAMES) -> tuple[np.ndarray, np.ndarray]:
    """A CIFAR-10 of two training batches and a test batch; returns labels [3R] and pixels [3R,3072]."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")  # the original ends in an empty line
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(names), 3 * rows, dtype=np.uint8)
    pixels = random.integers(0, 256, (3 * rows, 3072), dtype=np.uint8)
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        part = slice(number * rows, (number + 1) * rows)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels[part, None], pixels[part]]).tobytes())
    return labels, pixels


def entries(path: Path, split: str = "train") -> list:
    return list(read_cifar(path, split, None))


@pytest.mark.parametrize("inner", [True, False])
def test_rows_are_pictures_with_the_name_of_their_class(tmp_path, inner):
    labels, pixels = cifar10(tmp_path / "cifar-10-batches-bin")
    records, broken = read_records("cifar", tmp_path if not inner else tmp_path / "cifar-10-batches-bin", "train")
    assert broken == []
    assert [record.label for record in records] == [NAMES[label] for label in labels[:8]]
    assert len({record.id for record in records}) == 8
    for record, row in zip(records, pixels):
        assert np.array_equal(np.asarray(load_image(record.images[0])), row.reshape(3, 32, 32).transpose(1, 2, 0))
    test, _ = read_records("cifar", tmp_path, "test")
    assert [record.label for record in test] == [NAMES[label] for label in labels[8:]]


def test_the_fine_label_of_cifar_100_counts(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "coarse_label_names.txt").write_text("a\nb\n")
    (folder / "fine_label_names.txt").write_text("apple\nbear\ncup\n")
    rows = np.zeros((3, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = [1, 0, 1], [2, 0, 1]
    rows[:, 2:] = np.arange(3)[:, None] * 10
    (folder / "train.bin").write_bytes(rows.tobytes())
    records, broken = read_records("cifar", tmp_path, "train")
    assert broken == []
    assert [record.label for record in records] == ["cup", "apple", "bear"]
    assert [np.asarray(load_image(record.images[0])).mean() for record in records] == [0, 10, 20]
    with pytest.raises(VlmError, match=r"no test\.bin"):
        entries(tmp_path, "test")


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_pictures_are_those_that_torchvision_reads(tmp_path, kind, monkeypatch):
    """The same rows as torchvision's own layout: pickles written here, which its reader opens."""
    labels, pixels = cifar10(tmp_path / "cifar-10-batches-bin")
    content = {"data": pixels[:8], ("labels" if kind is CIFAR10 else "fine_labels"): labels[:8].tolist()}
    theirs = tmp_path / kind.base_folder
    theirs.mkdir()
    (theirs / "only").write_bytes(pickle.dumps(content))
    (theirs / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: NAMES}))
    monkeypatch.setattr(kind, "train_list", [["only", ""]])
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    dataset = kind(tmp_path, train=True)
    assert len(dataset) == len(entries(tmp_path)) == 8
    for (picture, label), record in zip(dataset, entries(tmp_path)):
        assert load_image(record.images[0]).tobytes() == picture.tobytes()
        assert record.label == dataset.classes[label]


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 4 * 3073 - 1))
def test_a_cut_batch_gives_its_whole_rows_and_says_so(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cifar")
    cifar10(folder)
    batch = folder / "data_batch_2.bin"
    batch.write_bytes(batch.read_bytes()[:cut])
    found = entries(folder)
    whole = [entry for entry in found if isinstance(entry, Record)]
    assert len(whole) == 4 + cut // 3073
    assert len(found) - len(whole) == (cut % 3073 > 0)
    for record in whole:
        load_image(record.images[0])


def test_a_class_without_a_name_is_broken(tmp_path):
    labels, _ = cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("airplane\n")
    records, broken = read_records("cifar", tmp_path, "train")
    assert len(records) == (labels[:8] == 0).sum()
    assert len(broken) == (labels[:8] != 0).sum()
    assert "of 1" in broken[0].reason


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(VlmError, match="binary version"):
        entries(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with pytest.raises(VlmError, match="pickles"):
        entries(tmp_path)
    cifar10(tmp_path)
    with pytest.raises(VlmError, match="no split 'val'"):
        entries(tmp_path, "val")


def test_a_row_that_is_gone_is_a_broken_picture(tmp_path):
    cifar10(tmp_path)
    last = entries(tmp_path)[-1]
    (tmp_path / "data_batch_2.bin").write_bytes(b"")
    with pytest.raises(BrokenImage, match="pixels"):
        load_image(last.images[0])
