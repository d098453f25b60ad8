"""Judgements of pairs from a file: `[{image_id, caption, match}]`, or samples.jsonl of the task `matching`.

Which pairs are right follows from the data set: a caption that reads as one of the picture's own. Every own caption has
to be judged, and as many wrong ones for each picture, whichever captions of other pictures those are.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.predictions import read_rows
from vlm.evaluation.retrieving import listed
from vlm.evaluation.vqa import check_same_ids

SAYS = ("no match", "match")  # what samples.jsonl calls the judgements


@dataclass(frozen=True)
class Pair:
    """A picture by its number, a caption, whether it is right, and how much the file is for a match (above 0 it is
    one); None where the picture could not be read, with the reason."""

    picture: int
    caption: str
    right: bool
    margin: float | None
    problem: str | None = None


def read_pairs(
    path: Path, everything: Sequence[Record], records: Sequence[Record], partial: bool
) -> tuple[list[Pair], dict[str, int] | None]:
    """The pairs about the pictures of `records`, a picture's right ones first, and what `partial` passed over.

    The file must hold exactly their pairs, or those of `everything`. Raises VlmError that counts and names missing,
    unknown and repeated pairs, unless `partial`.
    """
    rows = [_entry(row, f"{path}: row {number}") for number, row in enumerate(read_rows(path), 1)]
    pairs, given, wanted = _sorted(rows, records, everything)
    if not partial and sorted(given) != sorted(wanted):
        # Of a part of the data set the file may be about the whole.
        pairs, given, wanted = _sorted(rows, everything, everything)
        check_same_ids(given, wanted, str(path), "pair")
        shown, paths = set(listed(records)[0]), listed(everything)[0]
        pairs = {key: pair for key, pair in pairs.items() if paths[pair.picture] in shown}
    if not pairs:
        raise VlmError(f"{path}: none of {len(rows):,} pairs is about the {len(records):,} records")
    passed = {
        "missing": len(set(wanted) - set(given)),
        "unknown": len(set(given) - set(wanted)),
        "repeated": len(given) - len(set(given)),
    }
    return list(pairs.values()), passed if partial else None


def _sorted(
    rows: list[tuple[str, str, float | None, str | None]], records: Sequence[Record], everything: Sequence[Record]
) -> tuple[dict[str, Pair], list[str], list[str]]:
    """Pairs by name (`ID:right:1`), in order; the names that the file gives, and those it should give."""
    paths, names, captions, owner = listed(records)
    own: dict[int, list[str]] = defaultdict(list)
    for picture, caption in zip(owner.tolist(), captions, strict=True):
        own[picture].append(caption)
    distinct, known = len(set(captions)), set(listed(everything)[2])
    wanted = []
    for picture, told in own.items():
        wanted += [f"{names[picture]}:right:{n + 1}" for n in range(len(told))]
        wrong = min(len(told), distinct - len(set(told)))
        wanted += [f"{names[picture]}:wrong:{n + 1}" for n in range(wrong)]
    numbers = {path: number for number, path in enumerate(paths)}
    pictures = {record.id: numbers[record.images[0]] for record in records}
    given: list[str] = []
    found: dict[str, Pair] = {}
    seen: Counter[tuple[int, str]] = Counter()
    wrong_of: dict[int, list[str]] = defaultdict(list)
    for key, caption, margin, problem in rows:
        if key not in pictures:
            given.append(f"{key}: {caption}")
            continue
        picture = pictures[key]
        name, told = names[picture], own[picture]
        right = caption in told
        if right:
            places = [n for n, text in enumerate(told, 1) if text == caption]
            turn = places[min(seen[picture, caption], len(places) - 1)]  # once too often is a repetition
        elif caption not in known:
            given.append(f"{key}: {caption}")
            continue
        else:
            if caption not in wrong_of[picture]:
                wrong_of[picture].append(caption)
            turn = wrong_of[picture].index(caption) + 1
        seen[picture, caption] += 1
        given.append(f"{name}:{'right' if right else 'wrong'}:{turn}")
        found.setdefault(given[-1], Pair(picture, caption, right, margin, problem))
    return {name: found[name] for name in wanted if name in found}, given, wanted


def _entry(row: Any, where: str) -> tuple[str, str, float | None, str | None]:
    """Picture's id, caption, margin, and why there is none."""
    wanted = "expected {image_id, caption, match}, match being true, false or a probability, or samples.jsonl"
    if not isinstance(row, dict):
        raise VlmError(f"{where}: {wanted}, found {type(row).__name__}")
    if "image_id" in row and "match" in row:
        key, caption, said = str(row["image_id"]), row.get("caption"), row["match"]
    elif "id" in row and "prediction" in row:
        key, caption, said = str(row["id"]).rsplit(":", 2)[0], row.get("question"), row["prediction"]
        if said is None:
            return key, _text(caption, where), None, str(row.get("error") or "no prediction")
        said = SAYS.index(said) if said in SAYS else said
    else:
        raise VlmError(f"{where}: {wanted}, found keys {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(said, (bool, int, float)) or not 0 <= said <= 1:
        raise VlmError(f"{where}: {wanted}, found {said!r}")
    return key, _text(caption, where), float(said) - 0.5, None


def _text(caption: Any, where: str) -> str:
    if not isinstance(caption, str):
        raise VlmError(f"{where}: the caption must be text, found {caption!r}")
    return caption
