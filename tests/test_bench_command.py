"""`make bench`: what fails is named and does not end the rest; the README's table is the report's."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
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


def test_rows_of_what_was_not_run_here_stay(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text(f"{report.START}\nold\n{report.END}\n")
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(json.dumps(_result(*row)) for row in [("a", "one", 1.0), ("b", "two", 2.0)]))
    second.write_text(json.dumps(_result("b", "two", 4.0)))
    report.write(first, tmp_path)
    report.write(second, tmp_path)  # as on another machine, or in a fresh clone
    table = report.summary_in((tmp_path / "benchmarks" / "RESULTS.md").read_text())
    assert "| a | one | peer | 1.00x |" in table
    assert "| b | two | peer | 4.00x |" in table
    assert "2.00x" not in table
    assert report.summary_in((tmp_path / "README.md").read_text()) == table


def test_a_case_that_fails_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> harness.Step:
        raise FileNotFoundError("the peer's environment")

    good = harness.Case(ours=lambda: lambda: None, theirs=lambda: lambda: None, peer="itself")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "runs" / "results.jsonl")
    monkeypatch.setattr(sys, "argv", ["some.py"])
    with pytest.raises(SystemExit, match="some: failed: gone"):
        harness.main({"gone": harness.Case(ours=absent, theirs=absent, peer="nobody"), "there": good})
    assert "the peer's environment" in capsys.readouterr().err
    (line,) = (tmp_path / "runs" / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["case"] == "there"


def test_what_fails_is_named_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "gone.sh").write_text("exit 3\n")
    body = 'from pathlib import Path\nif __name__ == "__main__":\n    '
    (tmp_path / "bad.py").write_text(body + "raise SystemExit(2)\n")
    (tmp_path / "slow.py").write_text(body + "import time; time.sleep(60)\n")
    says = f"import os; Path({str(tmp_path / 'ran')!r}).write_text(os.environ['VLM_BENCH_GONE'])\n"
    (tmp_path / "good.py").write_text(body + says)
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    assert sorted(run.scripts()) == ["bad", "good", "slow"]
    problems = run.run_all(["bad", "slow", "good"], str(tmp_path / "venv"), "base", seconds=5)
    assert problems == [
        "peers/gone.sh: failed with exit status 3",
        "bad.py: failed with exit status 2",
        "slow.py: stopped after 5 seconds; the cases it had measured are kept",
    ]
    assert (tmp_path / "ran").read_text() == str(tmp_path / "venv-gone")  # where the peer was put


def test_every_benchmark_runs_by_itself() -> None:
    assert {"contrastive_loss", "metrics"} <= set(run.scripts())
    assert not {"run", "report", "harness"} & set(run.scripts())
