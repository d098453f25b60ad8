"""CapFilt: captions are written and filtered shard by shard, the same however often it was killed and by how many."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_qformer_model import qformer_spec
from tiny_models import randomize
from typer.testing import CliRunner

from vlm import VlmError
from vlm.data.catalogue import load_dataset
from vlm.data.records import Record
from vlm.data.shard_writer import write_shards
from vlm.model_spec import QFormerSpec
from vlm.models.build import build_model
from vlm.models.capfilt import Recaptioning, pieces_of, recaption
from vlm.models.nucleus import SeededNucleus

# Runs in children that share its imports: `PLACE RANK WORLD KILL`, at which call of the matcher to die.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from vlm.models import nucleus
from vlm.models.capfilt import Recaptioning, pieces_of, recaption

folder, calls = Path(sys.argv[1]), 0

class Model:
    def caption(self, images, prompt=None, **generation):
        (nucleus,) = generation["logits_processor"]
        return [f"drawn {g.initial_seed() % 1000} of {image.getpixel((0, 0))[0]}"
                for g, image in zip(nucleus.generators, images, strict=True)]

    def match(self, images, texts):
        global calls
        calls += 1
        if calls == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([len(text) % 3 / 2 for text in texts])

for batch in sys.argv[2:]:
    children = []
    for run in batch.split(","):
        place, rank, world, kill = run.split()
        kill = int(kill)
        if (child := os.fork()) == 0:
            pieces = pieces_of(f"{folder}/shards", "train", 10, "webdataset")[0]
            settings = Recaptioning("fake", "fake", batch_size=2)
            recaption(pieces, folder / place, settings, Model(), Model(), (int(rank), int(world)))
            os._exit(0)
        children.append((child, signal.SIGKILL if kill else 0))
    for child, status in children:
        assert os.waitpid(child, 0)[1] == status, batch
    if kill:
        assert [path.name for path in sorted((folder / place).glob("*.tar"))] == ["shard-000000.tar"]
        os.utime(folder / place / "shard-000000.tar", (1, 1))
"""


class Fake:
    """Says how bright a picture is, and that a text matches which says so."""

    def caption(self, images: list[Any], prompt: str | None = None, **generation: Any) -> list[str]:
        return [f"as bright as {image.getpixel((0, 0))[0]}" for image in images]

    def match(self, images: list[Any], texts: list[str]) -> torch.Tensor:
        return torch.tensor(
            [0.9 if text.endswith(f" {i.getpixel((0, 0))[0]}") else 0.2 for i, text in zip(images, texts)]
        )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve pictures in four shards; every second web caption is right, one picture has none."""
    records = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(path)
        captions = () if number == 5 else (f"web says {number * 20 if number % 2 else 'buy now'}",)
        records.append(Record(f"r{number}", (str(path),), captions, meta={"page": number}))
    write_shards(records, tmp_path / "shards", 3)
    return tmp_path / "shards"


def run(shards: Path, output: Path, settings: Recaptioning, *models: Any, **options: Any) -> dict[str, int] | None:
    return recaption(pieces_of(str(shards), "train", 10, "webdataset")[0], output, settings, *models, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_captions_that_match_are_kept_and_the_rest_is_counted(shards: Path, tmp_path: Path) -> None:
    total = run(shards, tmp_path / "out", Recaptioning("c", "m"), Fake(), Fake())
    assert total == {
        "records": 12,
        "broken": 0,
        "web": 11,
        "web_kept": 5,
        "synthetic": 12,
        "synthetic_kept": 12,
        "records_kept": 12,
    }
    data = load_dataset(str(tmp_path / "out"), "train", format="webdataset")
    assert data.records[3].captions == ("web says 60", "as bright as 60")
    assert data.records[3].meta["caption_sources"] == ["web", "synthetic"]
    assert data.records[3].meta["match"] == [0.9, 0.9]
    assert data.records[3].meta["page"] == 3
    assert data.records[4].captions == ("as bright as 80",)
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {f"shard-{n:06d}.tar": 3 for n in range(4)}


def test_a_filter_alone_leaves_out_records_without_a_caption_that_matches(shards: Path, tmp_path: Path) -> None:
    total = run(shards, tmp_path / "out", Recaptioning(None, "m"), None, Fake())
    assert total is not None
    assert (total["records_kept"], total["synthetic"], total["web_kept"]) == (5, 0, 5)
    everything = run(shards, tmp_path / "all", Recaptioning(None, "m", threshold=0.1), None, Fake())
    assert everything is not None
    assert everything["records_kept"] == 11
    none = run(shards, tmp_path / "none", Recaptioning(None, "m", threshold=1.0), None, Fake())
    assert none is not None
    assert none["records_kept"] == 0
    assert not list((tmp_path / "none").glob("*.tar"))


def test_a_picture_that_cannot_be_read_is_counted_and_left_out(shards: Path, tmp_path: Path) -> None:
    shard = shards / "shard-000001.tar"
    content = shard.read_bytes()
    at = content.index(b"\x89PNG")
    shard.write_bytes(content[:at] + b"XXXX" + content[at + 4 :])
    total = run(shards, tmp_path / "out", Recaptioning("c", "m"), Fake(), Fake())
    assert total is not None
    assert (total["records"], total["broken"], total["records_kept"]) == (12, 1, 11)


def test_killed_and_shared_by_processes_it_writes_the_same(shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runs = ["alone 0 1 0,shared 0 2 0,shared 1 2 0", "killed 0 1 4", "killed 0 1 0"]  # the fourth call: second shard
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path), *runs], env=environment, timeout=280, check=True)
    alone, killed, shared = (tmp_path / name for name in ("alone", "killed", "shared"))
    assert (killed / "shard-000000.tar").stat().st_mtime == 1  # not written again
    for path in killed.glob(".*"):
        path.unlink()  # what the kill left behind
    assert contents(killed) == contents(alone) == contents(shared)
    assert len(contents(alone)) == 4 + 4 + 3


def test_settings_that_changed_are_refused(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "out", Recaptioning("c", "m"), Fake(), Fake())
    with pytest.raises(VlmError, match=r"another threshold \(0.5, now 0.6\)"):
        run(shards, tmp_path / "out", Recaptioning("c", "m", threshold=0.6), Fake(), Fake())
    with pytest.raises(VlmError, match="something else wrote"):
        run(shards, shards, Recaptioning("c", "m"), Fake(), Fake())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (Recaptioning(None, None), "give a captioner"),
        (Recaptioning("c", "m", threshold=2), "threshold"),
        (Recaptioning("c", "m", batch_size=0), "1 to 32"),
        (Recaptioning("c", "m", max_new_tokens=2), "min_new_tokens"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: Recaptioning, match: str) -> None:
    with pytest.raises(VlmError, match=match):
        settings.check()


def test_a_nucleus_is_drawn_from_as_often_as_its_tokens_are_probable() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(2000, 4)
    drawn = SeededNucleus(range(2000), top_p=0.9)(torch.zeros(2000, 1), logits).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 2000
    assert shares[3] == 0
    torch.testing.assert_close(shares[:3], torch.tensor([0.5, 0.3, 0.15]) / 0.95, atol=0.05, rtol=0)
    assert SeededNucleus([1], top_p=0.1)(torch.zeros(1, 1), logits[:1]).argmax(-1).item() == 0
    with pytest.raises(ValueError, match="2000 rows for 1 seeds"):
        SeededNucleus([1])(torch.zeros(2000, 1), logits)


def test_a_q_former_writes_and_filters_the_same_in_any_batch(
    shards: Path, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    model = build_model(QFormerSpec.model_validate(qformer_spec(tiny_folder)), device="cpu", precision="fp32")
    randomize(model.bridge)
    randomize(model.heads)
    sizes = {}
    for batch_size in (1, 8):
        settings = Recaptioning("q", "q", threshold=0.0, captions=2, batch_size=batch_size)
        sizes[batch_size] = run(shards, tmp_path / str(batch_size), settings, model.eval(), model)
    first, second = (load_dataset(str(tmp_path / str(n)), "train", format="webdataset").records for n in (1, 8))
    assert sizes[1] == sizes[8]
    assert [record.captions for record in first] == [record.captions for record in second]
    assert len({text for record in first for text in record.captions if not text.startswith("web")}) >= 12
    for a, b in zip(first, second, strict=True):
        assert a.meta["match"] == pytest.approx(b.meta["match"], abs=2e-5)


def test_the_command_says_what_it_needs(shards: Path, tmp_path: Path) -> None:
    from vlm.cli.main import app

    command = ["data", "recaption", str(shards), "--format", "webdataset", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(app, command)
    assert found.exit_code != 0
    assert not (tmp_path / "out").exists()
