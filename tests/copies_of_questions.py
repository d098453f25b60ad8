"""Miniature copies of the published data sets of open questions."""

from typing import Any

from published_files import JPG, TEST_2017, TRAIN_2014, TRAIN_2017, VAL_2014, VAL_2017, Copy, Members, as_json


def humans(*answers: str) -> list[dict[str, Any]]:
    return [{"answer_id": n, "answer_confidence": "yes", "answer": text} for n, text in enumerate(answers, 1)]


TEN = ("net",) * 7 + ("netting", "mesh", "net")


def vqa_files(prefix: str, questions: str, annotations: str, part: str, number: int) -> tuple[Members, Members]:
    """Questions and annotations of a part, in their archives."""
    question = {"image_id": number, "question": f"What is {part}?", "question_id": 10 * number}
    note = {
        "question_type": "what is",
        "multiple_choice_answer": "net",
        "answers": humans(*TEN),
        "image_id": number,
        "answer_type": "other",
        "question_id": 10 * number,
    }
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": part}
    return (
        {f"{prefix}{questions}": as_json({**head, "questions": [question], "task_type": "Open-Ended"})},
        {f"{prefix}{annotations}": as_json({**head, "annotations": [note]})},
    )


VQA_TRAIN = vqa_files(
    "v2_", "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014", 9
)

VQA_VAL = vqa_files("v2_", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014", 42)

VQA_DEV, _ = vqa_files("v2_", "OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015", 1)

VQA_TEST, _ = vqa_files("v2_", "OpenEnded_mscoco_test2015_questions.json", "", "test2015", 1)

OK_TRAIN = vqa_files(
    "", "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json", "train2014", 9
)

OK_VAL = vqa_files("", "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014", 42)


def textvqa(split: str, answers: bool) -> bytes:
    item = {
        "question": "what brand?",
        "image_id": f"00{split}",
        "image_classes": ["Phone"],
        "image_width": 4,
        "image_height": 4,
        "question_tokens": ["what", "brand"],
        "question_id": 0,
        "set_name": split,
    }
    if answers:
        item["answers"] = ["nokia"] * 9 + ["noka"]
    return as_json({"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [item]})


def rosetta(split: str) -> bytes:
    return as_json({"data": [{"image_id": f"00{split}", "ocr_tokens": ["NOKIA"], "ocr_info": []}]})


NOKIA = ("nokia",) * 9 + ("noka",)


def gqa(key: str, answer: str | None) -> bytes:
    item: dict[str, Any] = {"question": "Is the sky dark?", "imageId": "2354786", "isBalanced": True}
    if answer:
        types = {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"}
        item |= {"answer": answer, "fullAnswer": "Yes.", "types": types, "semantic": [], "groups": {"global": None}}
    return as_json({key: item})


SKY = ("gqa/images/2354786.jpg", "Is the sky dark?", ("yes",))


def aokvqa(image: int, truth: bool) -> bytes:
    item = {"split": "x", "image_id": image, "question_id": "22Mex", "question": "What now?", "choices": ["a", "b"]}
    if truth:
        item |= {
            "correct_choice_idx": 1,
            "direct_answers": ["b"] * 10,
            "rationales": ["r"],
            "difficult_direct_answer": False,
        }
    return as_json([item])


def vizwiz(split: str, answers: bool) -> bytes:
    item: dict[str, Any] = {"image": f"VizWiz_{split}_00000000.jpg", "question": "What's this?"}
    if answers:
        told_by = [{"answer": "basil", "answer_confidence": "yes"}] * 10
        item |= {"answers": told_by, "answer_type": "other", "answerable": 1}
    return as_json([item])


QUESTIONS: dict[str, Copy] = {
    "aokvqa": Copy(
        files={
            "aokvqa_v1p0.tar.gz": {
                "./aokvqa_v1p0_train.json": aokvqa(9, True),
                "./aokvqa_v1p0_val.json": aokvqa(42, True),
                "./aokvqa_v1p0_test.json": aokvqa(1, False),
                "./large_vocab_train.csv": b"",
            },
            "train2017.zip": TRAIN_2017,
            "val2017.zip": VAL_2017,
            "test2017.zip": TEST_2017,
        },
        records={
            "train": [("coco/train2017/000000000009.jpg", "What now?", ("b",) * 10)],
            "val": [("coco/val2017/000000000042.jpg", "What now?", ("b",) * 10)],
            "test": [("coco/test2017/000000000001.jpg", "What now?", ())],
        },
    ),
    "gqa": Copy(
        files={
            "questions1.2.zip": {
                "train_balanced_questions.json": gqa("02930152", "yes"),
                "val_balanced_questions.json": gqa("05451384", "yes"),
                "testdev_balanced_questions.json": gqa("201307251", "yes"),
                "test_balanced_questions.json": gqa("201973434", None),
                "train_all_questions/train_all_questions_0.json": b"{}",
                "readme.txt": b"",
            },
            "gqa/images.zip": {"images/2354786.jpg": JPG},
        },
        records={"train": [SKY], "val": [SKY], "testdev": [SKY], "test": [(*SKY[:2], ())]},
    ),
    "ocr_vqa": Copy(
        by_hand={
            "ocr_vqa/dataset.json": as_json(
                {
                    str(split): {
                        "imageURL": f"http://ecx.images-amazon.com/images/I/{split}.jpg",
                        "title": "Mom's Plan",
                        "split": split,
                        "questions": ["Who wrote this?"],
                        "answers": ["Sandra"],
                    }
                    for split in (1, 2, 3)
                }
            ),
            **{f"ocr_vqa/images/{split}.jpg": JPG for split in (1, 2, 3)},
        },
        records={
            split: [(f"ocr_vqa/images/{number}.jpg", "Who wrote this?", ("Sandra",))]
            for number, split in enumerate(("train", "val", "test"), 1)
        },
    ),
    "okvqa": Copy(
        files={
            "data/OpenEnded_mscoco_train2014_questions.json.zip": OK_TRAIN[0],
            "data/mscoco_train2014_annotations.json.zip": OK_TRAIN[1],
            "data/OpenEnded_mscoco_val2014_questions.json.zip": OK_VAL[0],
            "data/mscoco_val2014_annotations.json.zip": OK_VAL[1],
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014,
        },
        records={
            "train": [("coco/train2014/COCO_train2014_000000000009.jpg", "What is train2014?", TEN)],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", "What is val2014?", TEN)],
        },
    ),
    "textvqa": Copy(
        files={
            **{f"TextVQA_0.5.1_{split}.json": textvqa(split, split != "test") for split in ("train", "val", "test")},
            **{f"TextVQA_Rosetta_OCR_v0.2_{split}.json": rosetta(split) for split in ("train", "val", "test")},
            "train_val_images.zip": {f"train_images/00{split}.jpg": JPG for split in ("train", "val")},
            "test_images.zip": {"test_images/00test.jpg": JPG},
        },
        records={
            "train": [("textvqa/train_images/00train.jpg", "what brand?", NOKIA)],
            "val": [("textvqa/train_images/00val.jpg", "what brand?", NOKIA)],
            "test": [("textvqa/test_images/00test.jpg", "what brand?", ())],
        },
    ),
    "vizwiz": Copy(
        files={
            "Annotations.zip": {f"{split}.json": vizwiz(split, split != "test") for split in ("train", "val", "test")},
            **{
                f"images/{split}.zip": {f"{split}/VizWiz_{split}_00000000.jpg": JPG}
                for split in ("train", "val", "test")
            },
        },
        records={
            split: [
                (
                    f"vizwiz/{split}/VizWiz_{split}_00000000.jpg",
                    "What's this?",
                    ("basil",) * 10 if split != "test" else (),
                )
            ]
            for split in ("train", "val", "test")
        },
    ),
    "vqav2": Copy(
        files={
            "v2_Questions_Train_mscoco.zip": VQA_TRAIN[0],
            "v2_Annotations_Train_mscoco.zip": VQA_TRAIN[1],
            "v2_Questions_Val_mscoco.zip": VQA_VAL[0],
            "v2_Annotations_Val_mscoco.zip": VQA_VAL[1],
            "v2_Questions_Test_mscoco.zip": VQA_TEST | VQA_DEV,
            "train2014.zip": TRAIN_2014,
            "val2014.zip": VAL_2014,
            "test2015.zip": {"test2015/COCO_test2015_000000000001.jpg": JPG},
        },
        records={
            "train": [("coco/train2014/COCO_train2014_000000000009.jpg", "What is train2014?", TEN)],
            "val": [("coco/val2014/COCO_val2014_000000000042.jpg", "What is val2014?", TEN)],
            "test": [("coco/test2015/COCO_test2015_000000000001.jpg", "What is test2015?", ())],
            "test-dev": [("coco/test2015/COCO_test2015_000000000001.jpg", "What is test2015?", ())],
        },
    ),
}
