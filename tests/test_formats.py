"""Readers: what they take from each format, and malformed entries counted with file and line."""

import json
from pathlib import Path

import pytest

from vlm.data.easy_vqa import derive_caption, question_type
from vlm.data.formats import FORMATS, read_records
from vlm.data.records import Message, Record
from vlm.errors import VlmError


def write(folder: Path, name: str, content: object) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def read(format: str, path: Path, split: str = "train", **options: object) -> list[Record]:
    records, broken = read_records(format, path, split, **options)  # type: ignore[arg-type]
    assert broken == []
    return records


def reasons(format: str, path: Path, split: str = "train") -> list[tuple[str, str]]:
    return [(Path(b.where).name, b.reason) for b in read_records(format, path, split)[1]]


# --- easy-VQA


@pytest.mark.parametrize(
    ("pairs", "caption"),
    [
        ([("what is the blue shape?", "rectangle")], "a blue rectangle"),
        ([("what color is the triangle?", "blue")], "a blue triangle"),
        ([("what color is the shape?", "teal"), ("what shape is present?", "circle")], "a teal circle"),
        ([("is there a red shape?", "yes"), ("is a circle present?", "yes")], "a red circle"),
        ([("does the image not contain a red shape?", "no"), ("is no circle present?", "no")], "a red circle"),
        ([("is there not a red shape?", "yes"), ("what shape is present?", "circle")], None),
        ([("what color is the shape?", "red"), ("is there a circle?", "no"), ("is no triangle present?", "yes")],
         "a red rectangle"),
        ([("what color is the shape?", "red"), ("is there a circle?", "no")], None),
        ([("what is the blue shape?", "rectangle"), ("what color is the shape?", "red")], None),
        ([], None),
    ],
)  # fmt: skip
def test_captions_follow_from_questions_and_answers(pairs: list[tuple[str, str]], caption: str | None) -> None:
    assert derive_caption(pairs) == caption


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what color is the shape?", "red", "color"),
        ("what is the color of the circle?", "red", "color"),
        ("what is the blue shape?", "circle", "shape"),
        ("what shape is present?", "circle", "shape"),
        ("is there a red shape?", "no", "yes/no"),
    ],
)
def test_question_types(question: str, answer: str, kind: str) -> None:
    assert question_type(question, answer) == kind


def test_easy_vqa_records_and_broken_entries(tmp_path: Path) -> None:
    items = [["what is the blue shape?", "circle", 4], ["", "yes", 4], "junk", ["is there a circle?", "yes", 9]]
    write(tmp_path, "test/questions.json", items)
    (tmp_path / "test/images").mkdir()
    records, broken = read_records("easy_vqa", tmp_path, "test")
    assert records[0] == Record(
        id="test-0",
        images=(str(tmp_path / "test/images/4.png"),),
        captions=("a blue circle",),
        question="what is the blue shape?",
        answers=("circle",),
        meta={"question_type": "shape", "answer_type": "other", "image_id": 4},
    )
    assert (records[1].id, records[1].captions, records[1].meta["answer_type"]) == ("test-3", (), "yes/no")
    assert [b.reason for b in broken] == ["the question is empty", "expected [question, answer, image id]"]
    assert broken[0].where.endswith("questions.json: entry 2")
    captioned, broken = read_records("easy_vqa_captions", tmp_path, "test")  # a record a picture, where it is sure
    assert captioned == [Record("test-4", (str(tmp_path / "test/images/4.png"),), ("a blue circle",))]
    assert broken == []


# --- LLaVA


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": "human" if n % 2 == 0 else "gpt", "value": value} for n, value in enumerate(values)]


def test_llava_conversations(tmp_path: Path) -> None:
    items = [
        {"id": "a", "image": "x/1.jpg", "conversations": turns("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
        {"id": 7, "image": ["1.jpg", "2.jpg"], "conversations": turns("Compare <image> and <image>.", "Same.")},
        {"id": "text", "conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "Hello")]},
        {"id": "unmarked", "image": "3.jpg", "conversations": turns("What?", "A dog."), "model": "gpt-4"},
    ]
    records = read("llava_json", write(tmp_path, "l.json", items), images=tmp_path)
    assert [r.id for r in records] == ["a", "7", "text", "unmarked"]
    assert records[0].images == (str(tmp_path / "x/1.jpg"),)
    assert [m.role for m in records[0].messages] == ["user", "assistant", "user", "assistant"]
    assert len(records[1].images) == 2
    assert records[2].images == ()
    assert records[2].messages[0] == Message("system", "Be brief.")
    assert records[3].messages[0] == Message("user", "<image>\nWhat?")
    assert records[3].meta == {"model": "gpt-4"}


def test_llava_conversations_start_with_the_human(tmp_path: Path) -> None:
    conversation = [{"from": "gpt", "value": "(continued)"}, *turns("Hi", "Hello")]
    records = read("llava_json", write(tmp_path, "l.json", [{"id": "a", "conversations": conversation}]))
    assert [m.text for m in records[0].messages] == ["Hi", "Hello"]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"image": "1.jpg", "conversations": turns("<image> <image>", "Two.")}, "2 placeholder(s) <image> for 1"),
        ({"conversations": turns("<image>", "One.")}, "1 placeholder(s) <image> for 0"),
        ({"image": "1.jpg"}, "no list `conversations`"),
        ({"conversations": turns("Hi", "")}, "what gpt says is empty"),
        ({"conversations": turns("Hi", "  \n")}, "what gpt says is empty"),
        ({"conversations": [{"from": "human"}]}, "what human says is missing"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown speaker 'bot'"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown speaker"),
        ({"conversations": turns("Hi")}, "the assistant says nothing"),
        ({"conversations": []}, "the assistant says nothing"),
        ({"image": 5, "conversations": turns("Hi", "Ho")}, "`image` is int"),
        ({"conversations": ["x"]}, "expected keys with values, found str"),
        (None, "expected keys with values, found NoneType"),
    ],
)
def test_malformed_conversations_are_counted(tmp_path: Path, item: object, reason: str) -> None:
    good = {"id": "ok", "conversations": turns("Hi", "Hello")}
    records, broken = read_records("llava_json", write(tmp_path, "l.json", [good, item]), "train")
    assert [r.id for r in records] == ["ok"]
    assert len(broken) == 1
    assert broken[0].reason.startswith(reason)
    assert broken[0].where.endswith("l.json: entry 2")


# --- captions


def test_coco_captions_are_grouped_by_picture(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 3, "file_name": "3.jpg"}, {"id": 5, "file_name": "5.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "A cat. "},
            {"id": 2, "image_id": 9, "caption": "A dog."},
            {"id": 3, "image_id": 3, "caption": "Cat on mat."},
            {"id": 4, "image_id": 77, "caption": "Nobody's."},
            {"id": 5, "image_id": 9, "caption": ""},
        ],
    }
    file = write(tmp_path, "coco.json", content)
    records, broken = read_records("captions_json", file, "val", images=tmp_path)
    assert [(r.id, r.captions) for r in records] == [("9", ("A dog.",)), ("3", ("A cat.", "Cat on mat."))]
    assert records[0].images == (str(tmp_path / "9.jpg"),)
    assert [b.reason for b in broken] == ["no image has the id 77", "`caption` is empty", "no caption"]


@pytest.mark.parametrize("format", ["captions_json", "captions_jsonl", "captions_csv", "captions_tsv"])
def test_caption_lists_in_every_form_give_the_same_records(tmp_path: Path, format: str) -> None:
    rows = [
        {"image": "1.jpg", "caption": "A “cat”, sitting.", "source": "web"},
        {"image": "b/2.jpg", "caption": "Ein Hündchen"},
    ]
    if format == "captions_json":
        file = write(tmp_path, "c.json", rows)
    elif format == "captions_jsonl":
        file = write(tmp_path, "c.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif format == "captions_csv":
        table = '\ufeffimage,caption,source\r\n1.jpg,"A “cat”, sitting.",web\r\nb/2.jpg,Ein Hündchen,\r\n'
        file = write(tmp_path, "c.csv", table)
    else:
        file = write(
            tmp_path, "c.tsv", "filepath\ttitle\tsource\n1.jpg\tA “cat”, sitting.\tweb\nb/2.jpg\tEin Hündchen\t\n"
        )
    records = read(format.replace("tsv", "csv"), file)
    assert [r.captions for r in records] == [("A “cat”, sitting.",), ("Ein Hündchen",)]
    assert [r.images for r in records] == [(str(tmp_path / "1.jpg"),), (str(tmp_path / "b/2.jpg"),)]
    assert records[0].meta["source"] == "web"


def test_several_captions_a_picture(tmp_path: Path) -> None:
    file = write(tmp_path, "c.jsonl", '{"id": "x", "image": "/abs/1.jpg", "captions": ["One.", "Two."]}\n')
    assert read("captions_jsonl", file)[0] == Record(id="x", images=("/abs/1.jpg",), captions=("One.", "Two."))


def test_malformed_lines_are_counted_with_their_number(tmp_path: Path) -> None:
    lines = [
        b'{"image": "1.jpg", "caption": "ok"}',
        b'{"image": "1.jpg", "caption": ',
        b'{"image": "1.jpg", "caption": ""}',
        b'{"caption": "no picture"}',
        b'{"image": "1.jpg"}',
        b'{"image": "1.jpg", "captions": []}',
        b'{"image": "1.jpg", "caption": "\xff\xfe"}',
        b'{"image": "1.jpg", "caption": "\\ud800"}',
        b"[1, 2]",
        b"[" * 100_000,
        b'{"image": "2.jpg", "caption": "ok"}',
    ]
    file = write(tmp_path, "c.jsonl", b"\n".join(lines))
    records, broken = read_records("captions_jsonl", file, "train")
    assert [r.id for r in records] == ["1", "11"]
    assert [Path(b.where).name for b in broken] == [f"c.jsonl:{n}" for n in range(2, 11)]
    expected = ["not valid JSON", "`caption` is empty", "`image` is missing", "`caption` is missing", "no caption"]
    expected += ["not valid JSON", "`caption` is not valid UTF-8", "expected keys", "not valid JSON"]
    assert all(b.reason.startswith(text) for b, text in zip(broken, expected))


def test_malformed_rows_of_a_table_are_counted_with_their_line(tmp_path: Path) -> None:
    table = b'image,caption\n1.jpg,ok\n2.jpg\n3.jpg,\n4.jpg,a,b\n5.jpg,\xff\n6.jpg,"two\nlines"\n7.jpg,ok\n'
    file = write(tmp_path, "c.csv", table)
    assert [r.images[0][-5:] for r in read_records("captions_csv", file, "train")[0]] == ["1.jpg", "6.jpg", "7.jpg"]
    assert reasons("captions_csv", file) == [
        ("c.csv:3", "`caption` is missing"),
        ("c.csv:4", "`caption` is empty"),
        ("c.csv:5", "more fields than the 2 of the header"),
        ("c.csv:6", "`caption` is not valid UTF-8"),
    ]


def test_a_field_past_the_limit_of_csv_is_one_broken_row(tmp_path: Path) -> None:
    file = write(tmp_path, "c.csv", f"image,caption\n1.jpg,{'x' * 200_000}\n2.jpg,ok\n")
    records, broken = read_records("captions_csv", file, "train")
    assert [r.captions for r in records] == [("ok",)]
    assert len(broken) == 1


def test_an_index_column_without_a_name_does_no_harm(tmp_path: Path) -> None:
    records = read("captions_csv", write(tmp_path, "c.csv", ",image,caption\n0,1.jpg,ok\n"))
    assert (records[0].captions, dict(records[0].meta)) == (("ok",), {})


def test_a_table_without_the_columns_says_which(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"c\.csv:1: no column of texts \(captions or caption or title\)"):
        read_records("captions_csv", write(tmp_path, "c.csv", "image,text\n1.jpg,ok\n"), "train")


def test_a_folder_stands_for_the_file_of_the_split(tmp_path: Path) -> None:
    write(tmp_path, "val.jsonl", '{"image": "1.jpg", "caption": "ok"}')
    assert len(read("captions_jsonl", tmp_path, "val")) == 1
    with pytest.raises(VlmError, match=r"no train\.jsonl in this folder"):
        read_records("captions_jsonl", tmp_path, "train")


# --- image folder


def test_image_folder_takes_classes_from_folders(tmp_path: Path) -> None:
    for name in ("b_dog/2.PNG", "a cat/1.jpg", "a cat/deep/3.webp", "a cat/notes.txt", ".cache/9.png", "stray.png"):
        write(tmp_path, name, b"")
    records, broken = read_records("image_folder", tmp_path, "train")
    assert [(r.id, r.label) for r in records] == [
        ("a cat/1.jpg", "a cat"),
        ("a cat/deep/3.webp", "a cat"),
        ("b_dog/2.PNG", "b_dog"),
    ]
    assert [b.reason for b in broken] == ["lies in no folder that names its class"]


def test_image_folder_finds_the_split_but_not_a_class_of_its_name(tmp_path: Path) -> None:
    write(tmp_path, "split/test/cat/1.jpg", b"")
    write(tmp_path, "split/train/dog/1.jpg", b"")
    assert [r.label for r in read("image_folder", tmp_path / "split", "test")] == ["cat"]
    write(tmp_path, "classes/train/1.jpg", b"")
    write(tmp_path, "classes/boat/1.jpg", b"")
    assert [r.label for r in read("image_folder", tmp_path / "classes", "train")] == ["boat", "train"]


# --- all


def test_ids_become_unique(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"id": i, "image": "1.jpg", "caption": "x"}) for i in ("a", "a#2", "a", "a", "b"))
    assert [r.id for r in read("captions_jsonl", write(tmp_path, "c.jsonl", lines))] == ["a", "a#2", "a#3", "a#4", "b"]


def test_limit_stops_reading(tmp_path: Path) -> None:
    file = write(tmp_path, "c.jsonl", '{"image": "1.jpg", "caption": "x"}\n' * 5 + "broken")
    assert len(read("captions_jsonl", file, limit=3)) == 3


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_missing_file_is_named(tmp_path: Path, format: str) -> None:
    with pytest.raises(VlmError, match=r"nowhere: no such file or folder|are missing, .*nowhere"):
        read_records(format, tmp_path / "nowhere", "train")


def test_a_missing_picture_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="pics: no such folder of pictures"):
        read_records("llava_json", write(tmp_path, "l.json", []), "train", images=tmp_path / "pics")


def test_easy_vqa_without_the_split_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"val/questions\.json: cannot be read"):
        read_records("easy_vqa", tmp_path, "val")


@pytest.mark.parametrize("format", ["llava_json", "captions_json"])
def test_a_malformed_json_file_names_file_and_line(tmp_path: Path, format: str) -> None:
    with pytest.raises(VlmError, match=r"x\.json:2: not valid JSON"):
        read_records(format, write(tmp_path, "x.json", "[1,\n2,,"), "train")
    with pytest.raises(VlmError, match=r"y\.json: not valid JSON"):
        read_records(format, write(tmp_path, "y.json", b'"\xff"'), "train")
    with pytest.raises(VlmError, match="expected a list"):
        read_records(format, write(tmp_path, "z.json", {"a": 1}), "train")


def test_an_unknown_format_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match="unknown format 'lava_json'; did you mean 'llava_json'"):
        read_records("lava_json", tmp_path, "train")
