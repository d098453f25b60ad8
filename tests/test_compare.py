"""Paired comparison of two evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vlm.cli.main import app
from vlm.errors import VlmError
from vlm.evaluation.compare import compare


def write(folder: Path, scores: np.ndarray, per_picture: int = 1) -> Path:
    folder.mkdir(parents=True)
    rows = [{"id": str(n), "image": f"{n // per_picture}.png", "score": float(s)} for n, s in enumerate(scores)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_a_steady_difference_is_found_and_chance_is_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 400).astype(float)
    better = np.where(rng.random(400) < 0.15, 1.0, base)
    shuffled = np.where(rng.random(400) < 0.2, 1 - base, base)
    a = write(tmp_path / "a" / "eval" / "toy", base).parents[1]
    found = compare(a, write(tmp_path / "b", better), "toy")
    assert found.difference == pytest.approx(100 * (better - base).mean())
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    assert found.p < 0.01
    assert found.better + found.worse + found.same == 400
    noise = compare(a, write(tmp_path / "c", shuffled), "toy")
    assert noise.interval[0] < 0 < noise.interval[1]
    assert noise.p > 0.05
    same = compare(a, a, "toy")
    assert (same.difference, same.interval, same.p) == (0, (0, 0), 1)


def test_pairing_is_narrower_than_two_intervals_and_pictures_stay_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    gain = (rng.random(100) < 0.3).astype(float)
    alone = compare(write(tmp_path / "a", np.zeros(100)), write(tmp_path / "b", gain), "toy")
    repeated = np.repeat(gain, 4)
    clustered = compare(write(tmp_path / "c", np.zeros(400), 4), write(tmp_path / "d", repeated, 4), "toy")
    assert clustered.interval == pytest.approx(alone.interval, abs=1e-9)  # four equal questions a picture tell no more


def test_what_cannot_be_compared_is_an_error_in_one_line(tmp_path: Path) -> None:
    a = write(tmp_path / "a", np.ones(3))
    with pytest.raises(VlmError, match=r"no samples\.jsonl of toy; run: vlm-eval toy"):
        compare(a, tmp_path / "absent", "toy")
    with pytest.raises(VlmError, match=r"the sample ids do not match .* 3: 1 missing \(2\)"):
        compare(a, write(tmp_path / "b", np.ones(2)), "toy")
    (tmp_path / "b" / "samples.jsonl").write_text('{"id": 1}\n')
    done = CliRunner().invoke(app, ["compare", str(a), str(tmp_path / "b"), "toy"])
    assert done.exit_code == 2
    assert "samples.jsonl:1: not a sample" in done.stderr


def test_the_command_prints_both_and_the_difference(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", np.zeros(4)), write(tmp_path / "b", np.ones(4))
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "toy"])
    assert done.exit_code == 0, done.output
    assert "+100.00" in done.stdout
    summary = json.loads(CliRunner().invoke(app, ["compare", str(a), str(b), "toy", "--json"]).stdout)
    assert (summary["a"], summary["b"], summary["better"]) == (0, 100, 4)
