"""Readers of published benchmarks, on miniature copies in the layouts their authors publish."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from reader_parts import read, reasons, write

from vlm.data.formats import read_records
from vlm.data.images import BrokenImage, load_image
from vlm.data.records import Record
from vlm.data.references import picture_bytes, picture_exists
from vlm.errors import VlmError

# --- open questions


AOKVQA = {
    "split": "val",
    "image_id": 461751,
    "question_id": "22jbM6gDxdaMaunuzgrsBB",
    "question": "What is in the motorcyclist's mouth?",
    "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
    "correct_choice_idx": 3,
    "direct_answers": ["stick", "cigarette", "cigarette"],
    "difficult_direct_answer": False,
    "rationales": ["He's smoking."],
}


def test_aokvqa_has_choices_and_direct_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "aokvqa_v1p0_val.json", [AOKVQA])
    (record,) = read("aokvqa", file, images=tmp_path)
    assert record == Record(
        id="22jbM6gDxdaMaunuzgrsBB",
        images=(str(tmp_path / "000000461751.jpg"),),
        question="What is in the motorcyclist's mouth?",
        answers=("cigarette", "stick", "cigarette"),
        meta={
            "image_id": 461751,
            "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
            "correct_choice": 3,
            "rationales": ["He's smoking."],
        },
    )
    test = {key: AOKVQA[key] for key in ("image_id", "question_id", "question", "choices")}
    (record,) = read("aokvqa", write(tmp_path / "test.json", [test]), "test")
    assert (record.answers, "correct_choice" in record.meta) == ((), False)


def test_gqa_groups_by_its_types(tmp_path: Path) -> None:
    content = {
        "201307251": {
            "imageId": "n161313",
            "question": "Is it overcast?",
            "answer": "no",
            "fullAnswer": "No, it is clear.",
            "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
            "isBalanced": True,
        },
        "7": {"imageId": "1", "question": "Which?", "isBalanced": True},
        "8": {"imageId": 5, "question": "Which?"},
    }
    file = write(tmp_path / "testdev_balanced_questions.json", content)
    records, broken = read_records("gqa", file, "testdev")
    assert records[0].images == (str(tmp_path / "n161313.jpg"),)
    assert (records[0].id, records[0].answers, records[0].meta["question_type"]) == ("201307251", ("no",), "verify")
    assert (records[0].meta["semantic_type"], records[0].meta["full_answer"]) == ("global", "No, it is clear.")
    assert records[1].answers == ()
    assert [b.reason for b in broken] == ["`imageId` is int, expected text"]


def test_textvqa_keeps_ten_answers(tmp_path: Path) -> None:
    item = {
        "question": "what is the brand?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Camera"],
        "question_id": 34602,
        "answers": ["clos culombu", *["dakota"] * 9],
        "set_name": "val",
    }
    content = {"dataset_type": "val", "data": [item, {**item, "answers": ["a", 5]}]}
    file = write(tmp_path / "TextVQA_0.5.1_val.json", content)
    records, broken = read_records("textvqa", file, "val", images=tmp_path)
    assert (records[0].id, records[0].answers[:2]) == ("34602", ("dakota", "clos culombu"))
    assert records[0].images == (str(tmp_path / "003a8ae2ef43b901.jpg"),)
    assert [b.reason for b in broken] == ["`answers` holds 5, expected text"]
    assert "ocr_tokens" not in records[0].meta
    words = {"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["dakota", "DIGITAL"], "ocr_info": []}]}
    beside = write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", words)
    records, _ = read_records("textvqa", file, "val", images=tmp_path)
    assert records[0].meta["ocr_tokens"] == ["dakota", "DIGITAL"]
    beside.write_text('{"data": [{"image_id": "1"}]}')
    with pytest.raises(VlmError, match="expected `data` with image_id and ocr_tokens"):
        read_records("textvqa", file, "val", images=tmp_path)


def test_vizwiz_is_known_by_its_picture(tmp_path: Path) -> None:
    item = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
        "answers": [{"answer": "no", "answer_confidence": "no"}, *[{"answer": "unanswerable"}] * 9],
        "answer_type": "unanswerable",
        "answerable": 0,
    }
    test = {"image": "VizWiz_test_00000001.jpg", "question": "What?"}
    first, second = read("vizwiz", write(tmp_path / "val.json", [item, test]))
    assert (first.id, first.answers[0], len(first.answers)) == ("VizWiz_val_00000000.jpg", "unanswerable", 10)
    assert first.meta["answer_type"] == "unanswerable"
    assert second.answers == ()


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("gqa", [], "expected questions by their ids"),
        ("scienceqa", [], "expected questions by their ids"),
        ("textvqa", {"questions": []}, "expected a list `data`"),
        ("aokvqa", {}, "expected a list of entries"),
        ("vizwiz", {}, "expected a list of entries"),
        ("visual_genome", {}, "expected a list of entries"),
    ],
)
def test_another_layout_is_said(tmp_path: Path, format: str, content: object, message: str) -> None:
    with pytest.raises(VlmError, match=rf"x\.json: {message}"):
        read(format, write(tmp_path / "x.json", content))


# --- choices


def science(**changes: object) -> dict[str, object]:
    return {
        "question": "Which state is farthest north?",
        "choices": ["West Virginia", "Louisiana"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "subject": "social science",
        "split": "test",
        **changes,
    }


def test_scienceqa_with_and_without_pictures(tmp_path: Path) -> None:
    problems = {"1": science(), "5": science(image=None, hint="Think."), "9": science(split="train")}
    write(tmp_path / "problems.json", problems)
    records = read("scienceqa", tmp_path, "test")
    assert [r.id for r in records] == ["1", "5"]
    assert records[0].images == (str(tmp_path / "images/test/1/image.png"),)
    assert (records[0].answers, records[0].meta["correct_choice"]) == (("West Virginia",), 0)
    assert (records[1].images, records[1].meta["hint"]) == ((), "Think.")
    assert [r.id for r in read("scienceqa", tmp_path, "test-images")] == ["1"]
    assert [r.id for r in read("scienceqa", tmp_path / "problems.json", "train")] == ["9"]


def test_malformed_choices_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "problems.json", {"1": science(answer=2), "2": science(choices="a"), "3": 4, "4": science()})
    assert reasons("scienceqa", tmp_path, "test") == [
        "problems.json: question 1: `answer` is 2, expected the number of one of 2 choices",
        "problems.json: question 2: no list of texts `choices`",
        "problems.json: question 3: expected keys with values, found int",
    ]


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(buffer, "PNG") if colour == "noise" else Image.new(
        "RGB", (400, 300), colour
    ).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_mmbench_pictures_are_read_from_within_the_table(tmp_path: Path) -> None:
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit"
    rows = [
        f'241\t"Which is ""right""?\nLook."\tÄ hint\tone\ttwo\t\t\tB\tocr\t{picture("red")}\tfine\tdev',
        "1000241\tWhich?\t\ttwo\tone\t\t\tA\tocr\t241\tfine\tdev",
        f"242\tWhat?\t\ta\tb\tc\td\t\tlogic\t{picture('noise')}\tcoarse\ttest",
        "243\tWhat?\t\ta\tb\tc\td\tA\tlogic\t999\tcoarse\ttest",
        f"244\tWhat?\t\ta\tb\tc\td\tE\tlogic\t{picture('blue')}\tcoarse\ttest",
        "245\tWhat?",
    ]
    file = write(tmp_path / "dev.tsv", "\n".join([header, *rows]) + "\n")
    records, broken = read_records("base64_tsv", tmp_path, "dev")
    assert [r.id for r in records] == ["241", "1000241", "242"]
    first, rotated, third = records
    assert first.question == 'Which is "right"?\nLook.'
    assert (first.answers, first.meta["choices"], first.meta["correct_choice"]) == (("two",), ["one", "two"], 1)
    assert (first.meta["hint"], first.meta["l2-category"]) == ("Ä hint", "fine")
    assert rotated.images == first.images
    assert load_image(first.images[0]).size == (400, 300)
    assert load_image(first.images[0]).getpixel((5, 5))[0] > 240  # type: ignore[index]
    assert load_image(third.images[0]).size == (40, 40)
    assert picture_bytes(third.images[0]).startswith(b"\x89PNG")
    assert picture_exists(first.images[0])
    assert (third.answers, third.meta["choices"]) == ((), ["a", "b", "c", "d"])
    assert [b.reason for b in broken] == [
        "`image` is neither base64 nor the index of an earlier row",
        "`answer` is 'E', expected one of A, B, C, D",
        "2 fields, the header has 12",
    ]
    assert broken[0].where == f"{file}:6 (row 4)"


def test_mme_tables_have_questions_without_choices(tmp_path: Path) -> None:
    rows = f"0\t{picture('red')}\tIs it red? Please answer yes or no.\tYes\tcolor\tperception\n"
    rows += f"1\t{picture('red')}\tIs it blue? Please answer yes or no.\tNo\tcolor\tperception\n"
    file = write(tmp_path / "MME.tsv", f"index\timage\tquestion\tanswer\tcategory\tl2-category\n{rows}")
    record, other = read("base64_tsv", file)
    assert other.images == record.images  # MME scores both questions about a picture together
    assert (record.answers, dict(record.meta)) == (("Yes",), {"category": "color", "l2-category": "perception"})


def test_a_table_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VlmError, match=r"x\.tsv:1: no column image; the header has \['index', 'question'\]"):
        read("base64_tsv", write(tmp_path / "x.tsv", "index\tquestion\n"))


@pytest.mark.parametrize("member", ["0-8", "x-8", "0", "0-99999"])
def test_a_broken_reference_into_a_table_is_a_broken_picture(tmp_path: Path, member: str) -> None:
    file = write(tmp_path / "x.tsv", "not base64!")
    with pytest.raises(BrokenImage):
        load_image(f"{file}::{member}")


# --- yes or no


def test_pope_by_category_and_all_together(tmp_path: Path) -> None:
    for category in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog?", "label": label}
            for n, label in ((1, "yes"), (2, "no"))
        ]
        write(tmp_path / f"coco_pope_{category}.json", "\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "val2014").mkdir()
    popular = read("pope", tmp_path, "popular")
    assert [(r.id, r.answers, r.meta["category"]) for r in popular] == [
        ("1", ("yes",), "popular"),
        ("2", ("no",), "popular"),
    ]
    assert popular[0].images == (str(tmp_path / "val2014/COCO_val2014_000000310196.jpg"),)
    every = read("pope", tmp_path, "test")
    assert [r.id for r in every] == [f"{c}-{n}" for c in ("random", "popular", "adversarial") for n in (1, 2)]
    assert read("pope", tmp_path / "coco_pope_popular.json", "test") == popular
    write(tmp_path / "coco_pope_random.json", '{"image": "1.jpg", "text": "?", "label": "perhaps"}\n{"image\n')
    assert [r.partition(": ")[2][:16] for r in reasons("pope", tmp_path, "random")] == [
        "`label` is 'perh",
        "not valid JSON: ",
    ]
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(VlmError, match=r"no file like coco_pope_random\.json"):
        read("pope", tmp_path, "test")


def test_mme_folders_of_both_kinds(tmp_path: Path) -> None:
    two = "Is this red? Please answer yes or no.\tYes\nIs this blue? Please answer yes or no.\tNo\n"
    write(tmp_path / "color/0001.txt", two)
    write(tmp_path / "color/0001.jpg", "")
    write(tmp_path / "artwork/questions_answers_YN/7.txt", two)
    write(tmp_path / "artwork/images/7.png", "")
    records = read("mme", tmp_path, "test")
    assert [r.id for r in records] == ["artwork/7/1", "artwork/7/2", "color/0001/1", "color/0001/2"]
    assert [r.images[0] for r in records[1:3]] == [
        str(tmp_path / "artwork/images/7.png"),
        str(tmp_path / "color/0001.jpg"),
    ]
    assert (records[1].answers, records[1].meta) == (("No",), {"category": "artwork", "image_id": "7"})
    write(tmp_path / "color/0001.txt", "Is this red?\n")
    assert reasons("mme", tmp_path, "test") == ["0001.txt:1: expected a question, a tab, and Yes or No"]
    with pytest.raises(VlmError, match="no folders of categories"):
        read("mme", tmp_path / "color", "test")


def test_ocr_vqa_has_a_record_a_question_and_its_split(tmp_path: Path) -> None:
    address = "http://ecx.images-amazon.com/images/I/51c.jpg"
    book = {"imageURL": address, "title": "Mom's Plan", "genre": "Calendars", "authorName": "Sandra", "split": 1}
    content = {
        "761183272": {**book, "questions": ["Who wrote this?", "What is the title?"], "answers": ["Sandra", "Plan"]},
        "1": {**book, "split": 2, "questions": ["Is this a book?"], "answers": ["Yes"]},
        "2": {**book, "questions": ["Why?"], "answers": []},
        "3": {**book, "split": 9, "questions": [], "answers": []},
    }
    file = write(tmp_path / "dataset.json", content)
    records, broken = read_records("ocr_vqa", file, "train")
    assert [(r.id, r.question, r.answers) for r in records] == [
        ("761183272-0", "Who wrote this?", ("Sandra",)),
        ("761183272-1", "What is the title?", ("Plan",)),
    ]
    assert {r.images for r in records} == {(str(tmp_path / "images" / "761183272.jpg"),)}
    assert records[0].meta["title"] == "Mom's Plan"
    assert [b.reason for b in broken] == ["1 questions and 0 answers", "`split` is 9, expected 1, 2 or 3"]
    assert [r.id for r in read_records("ocr_vqa", file, "val")[0]] == ["1-0"]
    with pytest.raises(VlmError, match="books by their ids"):
        read("ocr_vqa", write(tmp_path / "list.json", []))
