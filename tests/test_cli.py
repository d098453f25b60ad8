"""The commands: what they list, how they end on mistakes, and that asking for help costs no import of torch."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm.cli.main import app
from vlm.cli.parts import SOURCES, STARTER_PARTS
from vlm.cli.train import app as train_app

RUN = CliRunner()
HEAVY = "{'torch', 'transformers', 'timm', 'open_clip', 'numpy'}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with one entry of each kind, and something that is none of its business."""
    root = tmp_path / "cache"
    monkeypatch.setenv("VLM_CACHE", str(root))
    for name, size in (("features/encoder-1", 3000), ("models/model-1", 2000), ("data/set-1", 1000)):
        (root / name).mkdir(parents=True)
        (root / name / "file.bin").write_bytes(bytes(size))
    (root / "models" / "model-1.lock").touch()
    (root / "precious").mkdir()
    return root


def names(root: Path) -> list[str]:
    """What `vlm cache list --json` names."""
    done = RUN.invoke(app, ["cache", "list", "--json"])
    content = json.loads(done.stdout)
    assert content["folder"] == str(root)
    return [entry["name"] for entry in content["entries"]]


# --- help and imports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["main", "train", "eval"])
def test_help_imports_no_torch(module: str) -> None:
    code = (
        f"import sys; sys.argv = ['command', '--help']\n"
        f"from vlm.cli.{module} import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"assert not {HEAVY} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_import_vlm_imports_no_torch() -> None:
    code = f"import sys, vlm\ndir(vlm)\nassert not {HEAVY} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


# --- vlm -------------------------------------------------------------------------------------------------------------


def test_vlm_mounts_every_sub_command() -> None:
    done = RUN.invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in ("models", "recipes", "quickstart", "data", "cache"):
        assert command in done.stdout
    for command in ("list", "prepare"):
        assert command in RUN.invoke(app, ["data", "--help"]).stdout


def test_vlm_prints_its_version() -> None:
    import vlm

    assert RUN.invoke(app, ["--version"]).stdout.strip() == vlm.__version__


def test_recipes_are_listed_with_their_first_line() -> None:
    told = {row["name"]: row["about"] for row in json.loads(RUN.invoke(app, ["recipes", "--json"]).stdout)}
    assert told["starter/llava_pretrain"].startswith("Stage 1")
    lines = RUN.invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(told)
    assert all(told.values())  # a recipe without a word about itself helps nobody


def test_models_lists_sources_and_starter_parts_with_licences() -> None:
    content = json.loads(RUN.invoke(app, ["models", "--json"]).stdout)
    assert {part["name"] for part in content["starter"]} == {part.name for part in STARTER_PARTS}
    assert all(part["licence"] and part["megabytes"] and part["parameters"] for part in content["starter"])
    done = RUN.invoke(app, ["models"])
    assert "starter:smollm2-135m" in done.stdout
    assert "Apache-2.0" in done.stdout


def test_the_sources_told_are_those_of_the_builders() -> None:
    from vlm.backbones import starter
    from vlm.backbones.image import IMAGE_SOURCES
    from vlm.backbones.language import _FOLDERS
    from vlm.backbones.names import SOURCES as KNOWN

    told = {source.name.partition(":")[0]: source.kinds for source in SOURCES}
    assert set(told) == set(KNOWN)
    assert {name for name, kinds in told.items() if "image" in kinds} == set(IMAGE_SOURCES)
    assert {name for name, kinds in told.items() if "language" in kinds} == set(_FOLDERS)
    known = {"image": starter.STARTER_IMAGE, "text": starter.STARTER_TEXT, "language": starter.STARTER_LANGUAGE}
    parts = {kind: tuple(p.name.removeprefix("starter:") for p in STARTER_PARTS if p.kind == kind) for kind in known}
    assert parts == known


@pytest.mark.starter
def test_the_sizes_told_are_those_of_the_weights() -> None:
    from vlm.backbones.image import build_image_encoder
    from vlm.backbones.text import build_text_encoder
    from vlm.model_spec import ImageEncoderSpec

    told = {part.name: part.parameters for part in STARTER_PARTS}
    image = build_image_encoder(ImageEncoderSpec(name="starter:efficientnet_lite0"))
    assert told[image.name] == sum(p.numel() for p in image.parameters())
    text = build_text_encoder("starter:minilm-l6")
    assert told[text.name] == sum(p.numel() for p in text.parameters())


def test_the_cache_is_listed_with_sizes(cache: Path) -> None:
    assert names(cache) == ["features/encoder-1", "models/model-1", "data/set-1"]
    shown = RUN.invoke(app, ["cache", "list"]).stdout
    assert "model-1" in shown
    assert "precious" not in shown


def test_an_empty_cache_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "none"))
    assert "holds nothing" in RUN.invoke(app, ["cache", "list"]).stdout
    assert RUN.invoke(app, ["cache", "clear", "--yes"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["model-1"], ["features/encoder-1", "data/set-1"]),
        (["features/encoder-1"], ["models/model-1", "data/set-1"]),
        (["data"], ["features/encoder-1", "models/model-1"]),
        ([], []),
    ],
)
def test_clearing_deletes_what_was_named_and_nothing_else(cache: Path, arguments: list[str], left: list[str]) -> None:
    done = RUN.invoke(app, ["cache", "clear", "--yes", *arguments])
    assert done.exit_code == 0, done.stderr
    assert names(cache) == left
    assert (cache / "precious").is_dir()


def test_answers_of_evaluations_are_listed_and_cleared(cache: Path) -> None:
    (cache / "responses").mkdir()
    (cache / "responses" / "abc.0.jsonl").write_text("{}\n")
    assert "responses/abc.0.jsonl" in names(cache)
    assert RUN.invoke(app, ["cache", "clear", "responses", "--yes"]).exit_code == 0
    assert names(cache) == ["features/encoder-1", "models/model-1", "data/set-1"]


def test_clearing_asks_first(cache: Path) -> None:
    assert RUN.invoke(app, ["cache", "clear"], input="n\n").exit_code == 1
    assert len(names(cache)) == 3
    assert RUN.invoke(app, ["cache", "clear"], input="y\n").exit_code == 0
    assert names(cache) == []


def test_clearing_a_link_leaves_what_it_points_to(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    (cache / "models" / "linked").symlink_to(elsewhere)
    assert RUN.invoke(app, ["cache", "clear", "linked", "--yes"]).exit_code == 0
    assert (elsewhere / "file").read_text() == "kept"
    assert not (cache / "models" / "linked").exists()


def test_an_unknown_cache_entry_is_one_line_with_a_suggestion(cache: Path) -> None:
    done = RUN.invoke(app, ["cache", "clear", "models/model-2", "--yes"])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "'models/model-1'" in done.stderr
    assert len(names(cache)) == 3


def test_quickstart_trains_scores_and_shows_each_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.cli import quickstart

    monkeypatch.chdir(tmp_path)
    calls: list[tuple] = []

    def train(name: str, overrides: list[str] | None, resume: bool) -> None:
        calls.append((name, overrides, resume))
        model = tmp_path / "runs" / name / "model"
        model.mkdir(parents=True)
        (model / "model.yaml").touch()

    stages = [replace(stage, show=lambda folder: calls.append(("show", folder))) for stage in quickstart.STAGES[:1]]
    monkeypatch.setattr(quickstart, "STAGES", (*stages, *quickstart.STAGES[1:]))
    monkeypatch.setattr("vlm.cli.data.prepare", lambda name: calls.append(("prepare", name)))
    monkeypatch.setattr("vlm.cli.train.train", train)
    monkeypatch.setattr("vlm.cli.eval.evaluate", lambda names, model, limit: calls.append((names, model, limit)))
    done = RUN.invoke(app, ["quickstart", "train.steps=3", "--limit", "5"])
    assert done.exit_code == 0, done.output
    expected: list[tuple] = [("prepare", "openmoji")]
    scores: list[tuple] = []
    for stage in quickstart.STAGES:
        expected += [(name, ["train.steps=3"], False) for name in stage.recipes]
        score: list[tuple] = [([name], f"runs/{stage.recipes[-1]}", 5) for name in stage.benchmarks]
        score += [("show", Path(f"runs/{stage.recipes[-1]}"))] if stage.show else []
        expected += score
        scores += score
    assert calls == expected
    RUN.invoke(app, ["quickstart", "--limit", "5"])
    assert calls[len(expected) :] == [("prepare", "openmoji"), *scores]  # what is trained stays


# --- vlm-train -------------------------------------------------------------------------------------------------------


def test_train_lists_the_shipped_recipes() -> None:
    done = RUN.invoke(train_app, ["--list"])
    assert done.exit_code == 0
    assert "starter/llava_finetune" in done.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe"),
        (["starter/lava_pretrain"], "did you mean 'starter/llava_pretrain'"),
        (["starter/llava_pretrain", "train.stpes=3"], "did you mean 'steps'"),
        (["starter/llava_pretrain", "trian.steps=3"], "did you mean 'train'"),
        (["starter/llava_pretrain", "train.steps=many"], "train.steps"),
        (["starter/llava_pretrain", "train.steps"], "KEY=VALUE"),
        (["starter/llava_pretrain", "train.steps=!!python/name:os.system"], "not plain YAML"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_status_2(arguments: list[str], message: str) -> None:
    done = RUN.invoke(train_app, arguments)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: !!python/object/apply:os.system ['true']\n", ":1: not plain YAML"),
        ("model: [\n", "not plain YAML"),
        ("- a list\n", "expected keys with values, found list"),
        ("", "expected keys with values"),
        ("model: {type: generative}\n", "image_encoder"),
    ],
)
def test_a_wrong_recipe_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    done = RUN.invoke(train_app, [str(file)])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "mine.yaml" in done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("main", ["dta"], "No such command 'dta'"),
        ("main", ["data", "prepare"], "Missing argument"),
        ("train", ["--resum"], "No such option: --resum"),
        ("eval", ["easy_vqa", "--model", "x", "--limit", "0"], "--limit"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_status_2(
    command: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(SystemExit) as end:
        import_module(f"vlm.cli.{command}").main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert message in told


def test_debug_shows_the_traceback() -> None:
    from vlm.errors import VlmError

    for command, arguments in ((train_app, ["none", "--debug"]), (app, ["--debug", "data", "prepare", "none"])):
        assert isinstance(RUN.invoke(command, arguments).exception, VlmError)
