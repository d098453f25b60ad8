"""Open questions in layouts of their own: A-OKVQA, GQA, OCR-VQA, TextVQA, VizWiz. Splits without answers give none."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
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
    read_json_list,
)
from vlm.data.records import Record
from vlm.errors import VlmError


def read_aokvqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """A-OKVQA (Schwenk et al. 2022): `[{question_id, image_id, question, choices, correct_choice_idx,
    direct_answers}]`.

    Pictures are those of COCO 2017. `meta` holds choices, the index of the right one, and rationales.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        image, choices = item.get("image_id"), item.get("choices")
        if not isinstance(image, int):
            raise Malformed(f"`image_id` is {image!r}, expected a number")
        if not isinstance(choices, list):
            raise Malformed("no list `choices`")
        meta: dict[str, Any] = {"image_id": image, "choices": choices}
        if "correct_choice_idx" in item:
            meta["correct_choice"] = item["correct_choice_idx"]
        if "rationales" in item:
            meta["rationales"] = item["rationales"]
        return Record(
            id=_key(item, "question_id"),
            images=(str(folder / f"{image:012d}.jpg"),),
            question=checked_text(item.get("question"), "`question`").strip(),
            answers=most_frequent_first(_texts(item.get("direct_answers", []), "`direct_answers`")),
            meta=meta,
        )

    yield from each_entry(file, read_json_list(file), record)


def read_gqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """GQA (Hudson and Manning 2019): `{question id: {question, imageId, answer, fullAnswer, types}}`.

    `question_type` is the structural type (`verify`, `query`, ...); `meta` also holds the semantic and detailed ones.
    Raises VlmError for another layout.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    content = read_json(file)
    if not isinstance(content, dict):
        raise VlmError(f"{file}: expected questions by their ids (GQA), found {type(content).__name__}")
    for key, item in content.items():
        try:
            need_mapping(item)
            image = checked_text(item.get("imageId"), "`imageId`")
            types = item.get("types") or {}
            need_mapping(types)
            meta = {"image_id": image, **{f"{name}_type": kind for name, kind in types.items()}}
            if "structural" in types:
                meta["question_type"] = types["structural"]
            if "fullAnswer" in item:
                meta["full_answer"] = item["fullAnswer"]
            yield Record(
                id=key,
                images=(str(folder / f"{image}.jpg"),),
                question=checked_text(item.get("question"), "`question`").strip(),
                answers=(checked_text(item["answer"], "`answer`"),) if "answer" in item else (),
                meta=meta,
            )
        except Malformed as error:
            yield BrokenRecord(f"{file}: question {key}", str(error))


_OCR_VQA_SPLITS = {1: "train", 2: "val", 3: "test"}


def read_ocr_vqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """OCR-VQA (Mishra et al. 2019): `{book: {imageURL, title, questions, answers, split}}`.

    Splits 1, 2 and 3 are train, val and test. A record is one question about a cover, which lies in `images` as BOOK
    with the ending of its address, as the authors' script puts it there. `meta` holds title, author and genre.
    Raises VlmError for another layout.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent / "images"
    content = read_json(file)
    if not isinstance(content, dict):
        raise VlmError(f"{file}: expected books by their ids (OCR-VQA), found {type(content).__name__}")
    for book, item in content.items():
        try:
            need_mapping(item)
            if _OCR_VQA_SPLITS.get(item.get("split")) != split:
                if item.get("split") not in _OCR_VQA_SPLITS:
                    raise Malformed(f"`split` is {item.get('split')!r}, expected 1, 2 or 3")
                continue
            ending = PurePosixPath(checked_text(item.get("imageURL"), "`imageURL`")).suffix
            questions, answers = (_texts(item.get(key), f"`{key}`") for key in ("questions", "answers"))
            if len(questions) != len(answers):
                raise Malformed(f"{len(questions)} questions and {len(answers)} answers")
            meta = {key: item[key] for key in ("title", "authorName", "genre") if key in item}
            for number, (question, answer) in enumerate(zip(questions, answers)):
                yield Record(
                    id=f"{book}-{number}",
                    images=(str(folder / f"{book}{ending}"),),
                    question=question.strip(),
                    answers=(answer,),
                    meta={"image_id": book, **meta},
                )
        except Malformed as error:
            yield BrokenRecord(f"{file}: book {book}", str(error))


def read_textvqa(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """TextVQA (Singh et al. 2019): `{data: [{question_id, image_id, question, answers}]}`.

    `meta` holds `ocr_tokens` where the file has them, or the file of Rosetta's that lies beside it does
    (`TextVQA_Rosetta_OCR_v0.2_val.json`). Raises VlmError for another layout.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent
    items = list_in(read_json(file), "data", file, "TextVQA")

    found_words = _rosetta(file)

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        image = checked_text(item.get("image_id"), "`image_id`")
        kept = {key: item[key] for key in ("image_classes", "ocr_tokens") if key in item}
        if image in found_words:
            kept.setdefault("ocr_tokens", found_words[image])
        return Record(
            id=_key(item, "question_id"),
            images=(str(folder / f"{image}.jpg"),),
            question=checked_text(item.get("question"), "`question`").strip(),
            answers=most_frequent_first(_texts(item.get("answers", []), "`answers`")),
            meta={"image_id": image, **kept},
        )

    yield from each_entry(file, items, record)


def _rosetta(file: Path) -> dict[str, list[str]]:
    """Picture -> the words that Rosetta read in it, for a file of TextVQA's questions; empty where there are none."""
    beside = file.with_name(re.sub(r"^TextVQA_0\.5\.1_", "TextVQA_Rosetta_OCR_v0.2_", file.name))
    if beside == file or not beside.is_file():
        return {}
    content = read_json(beside)
    items = content.get("data") if isinstance(content, dict) else None
    try:
        return {str(item["image_id"]): [str(word) for word in item["ocr_tokens"]] for item in items or ()}
    except (TypeError, KeyError) as error:
        raise VlmError(f"{beside}: expected `data` with image_id and ocr_tokens (TextVQA's OCR): {error!r}") from error


def read_vizwiz(path: Path, split: str, images: Path | None) -> Iterator[Entry]:
    """VizWiz-VQA (Gurari et al. 2018): `[{image, question, answers: [{answer}], answer_type, answerable}]`.

    A question is known by its picture: each has one.
    """
    file = file_of(path, split, (".json",))
    folder = images or file.parent

    def record(_: int, item: Any) -> Record:
        need_mapping(item)
        name = checked_text(item.get("image"), "`image`")
        told = item.get("answers", [])
        if not isinstance(told, list):
            raise Malformed("`answers` is no list")
        for answer in told:
            need_mapping(answer)
        return Record(
            id=PurePosixPath(name).name,
            images=(str(folder / name),),
            question=checked_text(item.get("question"), "`question`").strip(),
            answers=most_frequent_first(_texts([answer.get("answer") for answer in told], "`answers`")),
            meta={"image_id": name, **{key: item[key] for key in ("answer_type", "answerable") if key in item}},
        )

    yield from each_entry(file, read_json_list(file), record)


def _texts(values: Any, what: str) -> list[str]:
    """Answers of humans; an empty one is an answer all the same."""
    if not isinstance(values, list):
        raise Malformed(f"{what} is no list")
    for value in values:
        if not isinstance(value, str):
            raise Malformed(f"{what} holds {value!r}, expected text")
    return values


def _key(item: dict[str, Any], key: str) -> str:
    if not isinstance(item.get(key), (int, str)):
        raise Malformed(f"`{key}` is missing")
    return str(item[key])
