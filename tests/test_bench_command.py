"""`make bench`: what fails is named and does not end the rest; the README's table is the report's."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
import run  # noqa: E402


def _result(benchmark: str, case: str, speed: float) -> dict:
    machine = {"cpu": "cpu", "threads": 2, "gpu": None, "python": "3.11", "versions": {"torch": "2"}, "date": "d"}
    return {
        "benchmark": benchmark,
        "case": case,
        "peer": "peer",
        "seconds": {"ours": 1.0, "theirs": speed},
        "amount": 2.0,
        "unit": "steps",
        "speed": speed,
        "speed_target": 1.5,
        "memory": {"ours": 2**20, "theirs": 2**21, "share": 0.5},
        "memory_target": None,
        "machine": machine,
    }


def test_the_readmes_table_is_the_reports() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.START in readme
    file = ROOT / "benchmarks" / "RESULTS.md"
    wanted = report.summary_in(file.read_text(encoding="utf-8")) if file.is_file() else f"{report.NOTHING}\n"
    assert report.summary_in(readme) == wanted


def test_the_newest_result_of_a_case_counts_and_others_stay(tmp_path: Path) -> None:
    import json

    lines = [json.dumps(_result("b", "one", 1.0)), json.dumps(_result("a", "two", 2.0))]
    lines.append(json.dumps(_result("b", "one", 3.0)))
    results = report.newest(lines)
    assert [(r["benchmark"], r["speed"]) for r in results] == [("a", 2.0), ("b", 3.0)]
    text = report.text_of(results)
    assert "1.5x reached" in text
    assert "| b | one | peer | 3.00x | 0.50 |" in report.summary_in(text)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.fill_readme(readme, report.summary_in(text))
    assert report.summary_in(readme.read_text()) == report.summary_in(text)
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")


def test_what_fails_is_named_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "gone.sh").write_text("exit 3\n")
    body = 'from pathlib import Path\nif __name__ == "__main__":\n    '
    (tmp_path / "bad.py").write_text(body + "raise SystemExit(2)\n")
    (tmp_path / "slow.py").write_text(body + "import time; time.sleep(60)\n")
    (tmp_path / "good.py").write_text(body + f"Path({str(tmp_path / 'ran')!r}).touch()\n")
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    assert sorted(run.scripts()) == ["bad", "good", "slow"]
    problems = run.run_all(["bad", "slow", "good"], str(tmp_path / "venv"), "base", seconds=5)
    assert problems == [
        "peers/gone.sh: failed with exit status 3",
        "bad.py: failed with exit status 2",
        "slow.py: stopped after 5 seconds; the cases it had measured are kept",
    ]
    assert (tmp_path / "ran").exists()


def test_every_benchmark_runs_by_itself() -> None:
    assert {"contrastive_loss", "metrics"} <= set(run.scripts())
    assert not {"run", "report", "harness"} & set(run.scripts())
