"""`vlm-eval`: what it prints and writes, and how it ends on mistakes."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_parts import FakeModel, toy_benchmark, toy_records
from typer.testing import CliRunner

from vlm.cli.errors import one_line_errors
from vlm.cli.eval import app
from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation import evaluate


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return toy_records(tmp_path)


@pytest.fixture
def benchmark(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return toy_benchmark(records, tmp_path, monkeypatch)


def test_the_command_prints_a_table_and_writes_the_files(benchmark: str, tmp_path: Path) -> None:
    evaluate(benchmark, FakeModel(), output=tmp_path / "first", progress=False)
    predictions = str(tmp_path / "first" / "samples.jsonl")
    arguments = [benchmark, "--predictions", predictions, "--output", str(tmp_path / "out"), "protocol=lmms", "also=[]"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    for text in ("lmms", "50.00", "95 % interval", "majority answer", "report.html"):
        assert text in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["protocol"] == "lmms"


def test_json_output_is_one_line_per_benchmark(benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(benchmark).read_text().replace("name: toy", "name: other"))
    monkeypatch.setattr("vlm.loading.load_model", lambda name, **options: FakeModel())
    arguments = [benchmark, str(other), "--model", "m", "--json", "--limit", "1", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["benchmark"], line["model"], line["count"]) for line in lines] == [("toy", "m", 1), ("other", "m", 1)]
    assert (tmp_path / "out" / "other" / "results.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["easy_vqb", "--model", "m"], "no benchmark 'easy_vqb'.*did you mean 'easy_vqa'"),
        (["easy_vqa"], "either --model NAME or --predictions FILE"),
        ([], "name a benchmark"),
        (["easy_vqa", "--model", "m", "protocl=x"], "unknown key 'protocl'"),
        (["easy_vqa", "a", "--predictions", "f"], "answers of one benchmark"),
    ],
)
def test_errors_are_one_line_on_stderr_with_exit_status_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)


def test_debug_lets_the_traceback_through() -> None:
    done = CliRunner().invoke(app, ["easy_vqb", "--model", "m", "--debug"])
    assert isinstance(done.exception, VlmError)


def test_listing_shows_the_shipped_benchmarks() -> None:
    assert "easy_vqa" in CliRunner().invoke(app, ["--list"]).stdout
    assert "easy_vqa" in json.loads(CliRunner().invoke(app, ["--list", "--json"]).stdout)


def _raise(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        with one_line_errors():
            raise error

    return body


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (VlmError("a\nb"), 2),
        (FileNotFoundError(2, "absent"), 2),
        (PermissionError(13, "forbidden"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_mend_ends_a_command_in_one_line(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    with pytest.raises(typer.Exit) as caught:
        _raise(error)()
    assert caught.value.exit_code == status
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback() -> None:
    for error in (OSError(5, "Input/output error"), ValueError("bug")):
        with pytest.raises(type(error)):
            _raise(error)()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlm-eval', '--help']\n"
        "from vlm.cli.eval import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--predictions" in done.stdout
