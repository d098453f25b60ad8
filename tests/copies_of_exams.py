"""Miniature copies of the published benchmarks whose answers are choices, or yes and no."""

import base64
import json
from typing import Any

from published_files import JPG, VAL_2014, Copy, Members, as_json


def table(rows: list[dict[str, Any]]) -> bytes:
    """A table of VLMEvalKit."""
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


PICTURE = base64.b64encode(JPG).decode()


def mmbench(question: str, first: str, answer: str | None = "A") -> bytes:
    row = {"index": 241, "question": question, "hint": "", "A": first, "B": "x", "C": "y", "D": "z"}
    more = {} if answer is None else {"answer": answer}
    row |= {**more, "category": "identity_reasoning", "image": PICTURE, "source": "s", "l2-category": "attribute"}
    turned = {
        **row,
        "index": 1_000_241,
        "A": "x",
        "B": first,
        **({} if answer is None else {"answer": "B"}),
        "image": 241,
    }
    return table([row, turned])


def pope(word: str) -> bytes:
    rows = [
        {"question_id": n, "image": "COCO_val2014_000000000042.jpg", "text": f"Is there a {word}?", "label": label}
        for n, label in enumerate(("yes", "no"), 1)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


def science(split: str, image: str | None) -> dict[str, Any]:
    return {
        "question": f"Which one, {split}?",
        "choices": ["Ohio", "Iowa"],
        "answer": 1,
        "hint": "",
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "",
        "solution": "",
        "split": split,
    }


SCIENCE = {
    str(n): science(split, image)
    for n, (split, image) in enumerate(
        [(split, image) for split in ("train", "val", "test") for image in ("image.png", None)], 1
    )
}


def science_pictures(split: str) -> Members:
    number = next(key for key, item in SCIENCE.items() if item["split"] == split and item["image"])
    return {f"{split}/{number}/image.png": JPG}


def science_records(split: str, with_text: bool) -> list[tuple[Any, ...]]:
    number = next(key for key, item in SCIENCE.items() if item["split"] == split and item["image"])
    both = [(f"scienceqa/images/{split}/{number}/image.png", f"Which one, {split}?", ("Iowa",))]
    return both + ([(None, f"Which one, {split}?", ("Iowa",))] if with_text else [])


EXAMS: dict[str, Copy] = {
    "mmbench": Copy(
        files={
            "MMBench_DEV_EN.tsv": mmbench("Which?", "A dog"),
            "MMBench_TEST_EN.tsv": mmbench("Which?", "A dog", None),
            "MMBench_DEV_CN.tsv": mmbench("图中是什么?", "狗"),
            "MMBench_TEST_CN.tsv": mmbench("图中是什么?", "狗", None),
        },
        records={
            "dev": [(None, "Which?", ("A dog",))] * 2,
            "test": [(None, "Which?", ())] * 2,
            "dev-cn": [(None, "图中是什么?", ("狗",))] * 2,
            "test-cn": [(None, "图中是什么?", ())] * 2,
        },
    ),
    "mme": Copy(
        files={
            "MME.tsv": table(
                [
                    {"index": n, "image": PICTURE, "question": "Is it?", "answer": answer, "category": "color"}
                    for n, answer in enumerate(("Yes", "No"))
                ]
            )
        },
        records={"test": [(None, "Is it?", ("Yes",)), (None, "Is it?", ("No",))]},
    ),
    "pope": Copy(
        files={
            **{f"coco_pope_{kind}.json": pope(kind) for kind in ("random", "popular", "adversarial")},
            "val2014.zip": VAL_2014,
        },
        records={
            split: [
                ("coco/val2014/COCO_val2014_000000000042.jpg", f"Is there a {kind}?", (label,))
                for kind in kinds
                for label in ("yes", "no")
            ]
            for split, kinds in {
                "test": ("random", "popular", "adversarial"),
                **{kind: (kind,) for kind in ("random", "popular", "adversarial")},
            }.items()
        },
    ),
    "scienceqa": Copy(
        files={
            "problems.json": as_json(SCIENCE),
            **{f"images/{split}.zip": science_pictures(split) for split in ("train", "val", "test")},
        },
        records={
            f"{split}{end}": science_records(split, with_text=not end)
            for split in ("train", "val", "test")
            for end in ("", "-images")
        },
    ),
}
