"""COCO captions and VQA in every layout they are published in; files of ones own under `vlm-eval`."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm import evaluate
from vlm.data.catalogue import load_dataset
from vlm.data.formats import read_records
from vlm.data.records import Record
from vlm.errors import VlmError

COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 391895, "file_name": "COCO_val2014_000000391895.jpg"},
        {"id": 60623, "file_name": "COCO_val2014_000000060623.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 60623, "caption": "A girl with a spoon.\n"},
        {"id": 2, "image_id": 391895, "caption": "A man on a bike."},
        {"id": 3, "image_id": 60623, "caption": "Someone eats."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014" if number > 1 else "train2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "imgid": number - 1,
            "sentids": [1, 2],
            "sentences": [{"tokens": ["a"], "raw": f"A {number}.", "imgid": 0, "sentid": 1}, {"raw": "B."}],
            "split": split,
        }
        for number, split in enumerate(("train", "restval", "val", "test"), 1)
    ],
}
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 42, "question": "What color are the bins? ", "question_id": 42001},
    ],
}
ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "what color are the",
            "multiple_choice_answer": "blue",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)],
            "image_id": image,
            "answer_type": "other",
            "question_id": question,
        }
        for question, image, said in ((42001, 42, ["teal", *["blue"] * 9]), (262148000, 262148, ["down"] * 10))
    ],
}


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def read(format: str, path: Path, split: str = "val", **options: Any) -> list[Record]:
    records, broken = read_records(format, path, split, **options)
    assert broken == []
    return records


# --- captions


def test_official_captions_are_grouped_by_picture_in_the_order_of_pictures(tmp_path: Path) -> None:
    first, second = read("coco_captions", write(tmp_path / "captions_val2014.json", COCO))
    assert (first.id, first.meta["image_id"], first.captions) == ("391895", 391895, ("A man on a bike.",))
    assert first.images == (str(tmp_path / "COCO_val2014_000000391895.jpg"),)
    assert second.captions == ("A girl with a spoon.", "Someone eats.")


@pytest.mark.parametrize("year", [2014, 2017])
def test_pictures_are_found_in_the_folder_of_their_part_or_the_one_above(tmp_path: Path, year: int) -> None:
    name = "COCO_val2014_000000391895.jpg" if year == 2014 else "000000391895.jpg"
    image = {"id": 391895, "file_name": name, "coco_url": f"http://images.cocodataset.org/val{year}/{name}"}
    content = {"images": [image], "annotations": [{"image_id": 391895, "caption": "A man."}]}
    file = write(tmp_path / "annotations/captions.json", content)
    folder = tmp_path / f"images/val{year}"
    folder.mkdir(parents=True)
    for images in (folder, folder.parent):
        assert read("coco_captions", file, images=images)[0].images == (str(folder / name),)


def test_pictures_without_annotations_are_those_of_a_test_set(tmp_path: Path) -> None:
    file = write(tmp_path / "image_info_test2014.json", {"images": COCO["images"]})
    assert [(r.id, r.captions) for r in read("coco_captions", file)] == [("391895", ()), ("60623", ())]


def test_a_file_for_scoring_alone_needs_no_names_of_pictures(tmp_path: Path) -> None:
    content = {"images": [{"id": 0}], "annotations": [{"image_id": 0, "caption": "One."}]}
    (record,) = read("coco_captions", write(tmp_path / "c.json", content))
    assert (record.id, record.images, record.captions) == ("0", (), ("One.",))


@pytest.mark.parametrize(("split", "ids"), [("train", "12"), ("restval", "2"), ("val", "3"), ("test", "4")])
def test_karpathy_trains_on_restval_too(tmp_path: Path, split: str, ids: str) -> None:
    records = read("coco_captions", write(tmp_path / "dataset_coco.json", KARPATHY), split, images=tmp_path)
    assert "".join(r.id for r in records) == ids
    assert records[0].captions == (f"A {ids[0]}.", "B.")


def test_karpathy_pictures_lie_in_the_folder_the_file_says(tmp_path: Path) -> None:
    (tmp_path / "train2014").mkdir()
    (tmp_path / "val2014").mkdir()
    records = read("coco_captions", write(tmp_path / "dataset_coco.json", KARPATHY), "train")
    assert [Path(r.images[0]).parent.name for r in records] == ["train2014", "val2014"]


def test_flickr30k_is_known_by_the_name_of_the_picture(tmp_path: Path) -> None:
    image = {"sentids": [0], "imgid": 0, "sentences": [{"raw": "Two men."}], "split": "test", "filename": "1007.jpg"}
    (record,) = read("coco_captions", write(tmp_path / "dataset_flickr30k.json", {"images": [image]}), "test")
    assert (record.id, record.images, record.captions) == ("1007", (str(tmp_path / "1007.jpg"),), ("Two men.",))


def test_a_split_that_karpathy_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"dataset_coco\.json: no split 'tset'; did you mean 'test'"):
        read("coco_captions", write(tmp_path / "dataset_coco.json", KARPATHY), "tset")


def test_lavis_lists_become_a_record_for_each_picture(tmp_path: Path) -> None:
    name = "val2014/COCO_val2014_000000522418.jpg"
    train = [
        {"caption": "A woman.", "image": name, "image_id": "coco_522418"},
        {"caption": "A cake.", "image": "val2014/COCO_val2014_000000000007.jpg", "image_id": "coco_7"},
        {"caption": "She cuts.", "image": name, "image_id": "coco_522418"},
    ]
    test = [{"image": name, "caption": ["A woman.", "She cuts."]}]
    first, second = read("coco_captions", write(tmp_path / "coco_karpathy_train.json", train))
    (tested,) = read("coco_captions", write(tmp_path / "coco_karpathy_test.json", test))
    assert first.id == tested.id == "522418"
    assert first.captions == tested.captions == ("A woman.", "She cuts.")
    assert first.images == tested.images == (str(tmp_path / name),)
    assert second.captions == ("A cake.",)


def test_malformed_captions_are_counted_with_their_place(tmp_path: Path) -> None:
    content = json.loads(json.dumps(KARPATHY))
    content["images"][2]["sentences"] = []
    content["images"].append({"split": "val", "filename": "5.jpg", "sentences": [{"raw": 5}]})
    _, broken = read_records("coco_captions", write(tmp_path / "d.json", content), "val")
    assert [(Path(b.where).name, b.reason) for b in broken] == [
        ("d.json: entry 3", "no caption"),
        ("d.json: entry 5", "`raw` is int, expected text"),
    ]
    listed = [{"image": "1.jpg", "caption": "x"}, {"caption": "x"}, {"image": "2.jpg", "caption": ["x", ""]}, 3]
    records, broken = read_records("coco_captions", write(tmp_path / "l.json", listed), "val")
    assert [r.id for r in records] == ["1"]
    assert [b.reason for b in broken] == [
        "`image` is missing",
        "`caption` is empty",
        "expected keys with values, found int",
    ]


# --- VQA


def official(folder: Path) -> tuple[Path, Path]:
    questions = write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", QUESTIONS)
    return write(folder / "v2_mscoco_val2014_annotations.json", ANNOTATIONS), questions


def test_questions_and_annotations_are_joined_by_id(tmp_path: Path) -> None:
    annotations, questions = official(tmp_path)
    first, second = read("vqa_v2", annotations, questions=questions)
    assert first.id == "262148000"
    assert second == Record(
        id="42001",
        images=(str(tmp_path / "COCO_val2014_000000000042.jpg"),),
        question="What color are the bins?",
        answers=("blue", "teal", *["blue"] * 8),
        meta={"image_id": 42, "question_type": "what color are the", "answer_type": "other"},
    )
    # The questions are found beside the annotations under their official name.
    assert read("vqa_v2", annotations) == [first, second]


def test_annotations_of_some_questions_are_about_those(tmp_path: Path) -> None:
    annotations, questions = official(tmp_path)
    write(annotations, {**ANNOTATIONS, "annotations": ANNOTATIONS["annotations"][:1]})
    assert [r.id for r in read("vqa_v2", annotations, questions=questions)] == ["42001"]


def test_a_test_split_has_questions_without_answers(tmp_path: Path) -> None:
    (tmp_path / "test2015").mkdir()
    file = write(tmp_path / "q.json", {**QUESTIONS, "data_subtype": "test-dev2015"})
    record = read("vqa_v2", file, "test-dev")[0]
    assert record.answers == ()
    assert record.images == (str(tmp_path / "test2015/COCO_test2015_000000262148.jpg"),)


def test_lavis_lists_of_questions(tmp_path: Path) -> None:
    items = [
        {
            "question_id": 7,
            "question": "How many?",
            "answer": ["2", "3", "3"],
            "image": "val2014/1.jpg",
            "dataset": "vqa",
        },
        {"question": "What?", "answer": "a dog", "image": "VG_100K/2.jpg", "dataset": "vg"},
        {"question_id": 8, "question": "Why?", "image": "test2015/3.jpg"},
    ]
    first, second, third = read("vqa_v2", write(tmp_path / "vqa_train.json", items))
    assert (first.id, first.answers, first.meta["dataset"]) == ("7", ("3", "2", "3"), "vqa")
    assert (second.id, second.answers) == ("vg-1", ("a dog",))
    assert (third.answers, third.images) == ((), (str(tmp_path / "test2015/3.jpg"),))


def test_questions_and_annotations_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    questions = json.loads(json.dumps(QUESTIONS))
    questions["questions"] += [
        {"question": "?", "question_id": 1, "image_id": 1},
        {"question": "?", "question_id": 2, "image_id": "x"},
        {"question": "?", "question_id": 3, "image_id": 3},
        {"question": "?"},
    ]
    annotations = json.loads(json.dumps(ANNOTATIONS))
    annotations["annotations"] += [
        {"question_id": 2, "answers": [{"answer": ""}]},
        {"question_id": 3, "answers": [{"answer": 3}]},
        {"question_id": 99, "answers": []},
        {},
    ]
    records, broken = read_records(
        "vqa_v2", write(tmp_path / "a.json", annotations), "val", questions=write(tmp_path / "q.json", questions)
    )
    assert [r.id for r in records] == ["262148000", "42001"]
    assert [(Path(b.where).name, b.reason) for b in broken] == [
        ("a.json: annotation 6", "no `question_id`"),
        ("q.json: entry 4", "`image_id` is 'x', expected a number"),
        ("q.json: entry 5", "question 3: an answer is 3, expected text"),
        ("q.json: entry 6", "`question_id` is missing"),
        ("a.json", "q.json has no question 99"),
    ]


def test_what_cannot_be_joined_is_said(tmp_path: Path) -> None:
    annotations, questions = write(tmp_path / "a.json", ANNOTATIONS), write(tmp_path / "q.json", QUESTIONS)
    with pytest.raises(VlmError, match=r"a\.json: holds answers without questions; give .* `questions`"):
        read("vqa_v2", annotations)
    with pytest.raises(VlmError, match=r"q\.json: expected a mapping with a list `annotations`"):
        read("vqa_v2", questions, questions=questions)
    with pytest.raises(VlmError, match=r"no\.json: no such file of questions"):
        read("vqa_v2", annotations, questions=tmp_path / "no.json")
    with pytest.raises(VlmError, match=r"format 'coco_captions' takes no file of questions"):
        read("coco_captions", annotations, questions=questions)
    with pytest.raises(VlmError, match=r"c\.json: expected a list `questions`"):
        read("vqa_v2", write(tmp_path / "c.json", COCO["images"][0]))  # type: ignore[index]


def test_predictions_about_files_of_ones_own_are_scored_without_pictures(tmp_path: Path) -> None:
    annotations, questions = official(tmp_path / "elsewhere")
    results = [{"question_id": 42001, "answer": "blue"}, {"question_id": 262148000, "answer": "up"}]
    result = evaluate(
        "easy_vqa",
        predictions=write(tmp_path / "r.json", results),
        overrides=[
            "dataset.format=vqa_v2",
            f"dataset.annotations={annotations}",
            f"dataset.questions={questions}",
            "protocol=official",
            "also=[]",
            "baselines=null",
        ],
        output=tmp_path / "out",
    )
    assert result.score == pytest.approx(50)
    assert result.tables["per_question_type"] == {"what color are the": pytest.approx(50)}


def test_predictions_are_scored_by_name_once_the_annotations_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_DATA", str(tmp_path / "data"))
    official(tmp_path / "data/vqav2")
    results = [{"question_id": 42001, "answer": "blue"}, {"question_id": 262148000, "answer": "up"}]
    options = ["dataset.name=vqav2", "dataset.split=val", "protocol=official", "also=[]", "baselines=null"]
    result = evaluate(
        "easy_vqa", predictions=write(tmp_path / "r.json", results), overrides=options, output=tmp_path / "out"
    )
    assert result.score == pytest.approx(50)
    with pytest.raises(VlmError, match=r"val2014 is missing; run: vlm data prepare vqav2"):
        load_dataset("vqav2", "val")


def test_karpathys_splits_load_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_DATA", str(tmp_path))
    write(tmp_path / "karpathy/dataset_coco.json", KARPATHY)
    (tmp_path / "coco/val2014").mkdir(parents=True)
    (record,) = load_dataset("coco_captions", "test").records
    assert record.images == (str(tmp_path / "coco/val2014/COCO_val2014_000000000004.jpg"),)
