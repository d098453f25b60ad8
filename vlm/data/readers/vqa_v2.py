"""VQA in the layout of the VQA data set (Goyal et al. 2017), which OK-VQA shares, and in BLIP's and LAVIS's lists.

Official: a file of questions `{questions: [{question_id, image_id, question}], data_subtype}` and one of annotations
`{annotations: [{question_id, image_id, question_type, answer_type, multiple_choice_answer, answers: [{answer}]}]}`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm.data.parsing import (
    BrokenRecord,
    Entry,
    Malformed,
    checked_text,
    each_entry,
    file_of,
    list_in,
    most_frequent_first,
    need_mapping,
    read_json,
)
from vlm.data.readers.coco import picture_place
from vlm.data.records import Record
from vlm.errors import VlmError

_OTHER_KEYS = ("question_id", "question", "answer", "image")


def read_vqa_v2(path: Path, split: str, images: Path | None, questions: Path | None = None) -> Iterator[Entry]:
    """A record for each question: its id is the question's, its answers are all humans', the most frequent one first.

    path: the annotations; the questions alone (as of test splits: records have no answers); or a list of
    `{question_id, question, answer, image}`. questions: beside the annotations under its official name if left out.
    Annotations of a part of the questions are about that part, as in the official code. An annotation without its
    question is malformed.
    images: the folder of pictures `COCO_val2014_000000000042.jpg`, or the one that holds `val2014/`.
    Raises VlmError for another layout, or annotations without questions.
    """
    file = file_of(path, split, (".json",))
    content = read_json(file)
    folder = images or file.parent
    if isinstance(content, list) and questions is None:
        yield from _list(file, content, picture_place(folder))
        return
    answers: dict[str, Any] | None = None
    if isinstance(content, dict) and "annotations" in content:
        annotations = list_in(content, "annotations", file, "VQA")
        answers = {}
        for number, item in enumerate(annotations):
            if not isinstance(item, dict) or "question_id" not in item:
                yield BrokenRecord(f"{file}: annotation {number + 1}", "no `question_id`")
            else:
                answers[str(item["question_id"])] = item
        annotated, file = file, questions or _questions_beside(file)
        content = read_json(file)
    elif questions is not None:
        raise VlmError(f"{file}: expected a mapping with a list `annotations` (VQA) beside the questions")
    asked = list_in(content, "questions", file, "VQA")
    yield from _official(file, asked, answers, str(content.get("data_subtype") or ""), picture_place(folder))
    if answers is not None:
        ids = {str(item.get("question_id")) for item in asked if isinstance(item, dict)}
        for key in (key for key in answers if key not in ids):
            yield BrokenRecord(str(annotated), f"{file.name} has no question {key}")


def _official(
    file: Path,
    questions: list[Any],
    annotations: dict[str, Any] | None,
    part: str,
    place: Callable[[str, str], str],
) -> Iterator[Entry]:
    # The questions of test-dev are about pictures of the test set.
    part = "test2015" if part.startswith("test-dev") else part

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        key, image = item.get("question_id"), item.get("image_id")
        if not isinstance(key, (int, str)):
            raise Malformed("`question_id` is missing")
        meta: dict[str, Any] = {"image_id": image}
        answers: tuple[str, ...] = ()
        if annotations is not None:
            told = annotations[str(key)]
            answers = _human_answers(told)
            meta |= {name: told[name] for name in ("question_type", "answer_type") if name in told}
        name = item.get("image")
        if not isinstance(name, str):
            if not isinstance(image, int):
                raise Malformed(f"`image_id` is {image!r}, expected a number")
            name = f"COCO_{part}_{image:012d}.jpg"
        return Record(
            id=str(key),
            images=(place(name, part),),
            question=checked_text(item.get("question"), "`question`").strip(),
            answers=answers,
            meta=meta,
        )

    for number, item in enumerate(questions):
        key = item.get("question_id") if isinstance(item, dict) else None
        if annotations is None or key is None or str(key) in annotations:
            try:
                yield record(number, item)
            except Malformed as error:
                yield BrokenRecord(f"{file}: entry {number + 1}", str(error))


def _human_answers(annotation: dict[str, Any]) -> tuple[str, ...]:
    """What each human said, the most frequent answer in front: it is the one to train on."""
    told = annotation.get("answers")
    if not isinstance(told, list) or not told:
        raise Malformed(f"question {annotation['question_id']} has no list `answers`")
    answers = []
    for item in told:
        need_mapping(item)
        if not isinstance(item.get("answer"), str):  # an empty one is an answer all the same
            raise Malformed(f"question {annotation['question_id']}: an answer is {item.get('answer')!r}, expected text")
        answers.append(item["answer"])
    return most_frequent_first(answers, annotation.get("multiple_choice_answer"))


def _list(file: Path, items: list[Any], place: Callable[[str, str], str]) -> Iterator[Entry]:
    """LAVIS's lists; an entry of Visual Genome has one answer and no question id."""

    def record(number: int, item: Any) -> Record:
        need_mapping(item)
        told = item.get("answer", [])
        answers = told if isinstance(told, list) else [told]
        if not all(isinstance(answer, str) for answer in answers):
            raise Malformed("`answer` holds something else than text")
        return Record(
            id=str(item.get("question_id", f"{item.get('dataset', 'entry')}-{number}")),
            images=(place(checked_text(item.get("image"), "`image`"), ""),),
            question=checked_text(item.get("question"), "`question`").strip(),
            answers=most_frequent_first(answers),
            meta={key: value for key, value in item.items() if key not in _OTHER_KEYS},
        )

    yield from each_entry(file, items, record)


def _questions_beside(annotations: Path) -> Path:
    """`v2_OpenEnded_mscoco_val2014_questions.json` beside `v2_mscoco_val2014_annotations.json`."""
    name = annotations.name.replace("mscoco_", "OpenEnded_mscoco_").replace("_annotations", "_questions")
    beside = annotations.with_name(name)
    if beside == annotations or not beside.is_file():
        raise VlmError(f"{annotations}: holds answers without questions; give the file of questions as `questions`")
    return beside
