"""Asking a model about many things: in batches, shared out among processes, each answer kept as it comes.

What is asked about is a list of pieces: questions, pictures, captions. The batches depend on the pieces alone, so every
process parts them alike and takes every n-th batch, whatever is known of their answers already: no piece is lost or
asked twice, and an evaluation that was killed goes on with the same batches.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from vlm.data.content_hash import content_hashes
from vlm.evaluation.responses import Responses, gathered, processes
from vlm.evaluation.task import Prediction

Value = TypeVar("Value")


@dataclass(frozen=True)
class Form(Generic[Value]):
    """How an answer is kept as JSON. row: None for what is not to be kept, such as a picture that cannot be read."""

    row: Callable[[Value], dict[str, Any] | None]
    value: Callable[[dict[str, Any]], Value]


def _prediction_row(prediction: Prediction) -> dict[str, Any] | None:
    if prediction.text is None:
        return None
    return {"text": prediction.text} | ({"ranking": prediction.ranking} if prediction.ranking else {})


PREDICTION = Form(_prediction_row, lambda row: Prediction(row["text"], ranking=tuple(row.get("ranking", ()))))


def _array_row(value: np.ndarray | str) -> dict[str, Any] | None:
    if isinstance(value, str):
        return None
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
    return {"type": value.dtype.str, "shape": value.shape, "content": content}


def _array(row: dict[str, Any]) -> np.ndarray | str:
    # A copy: what lies on somebody else's bytes cannot be written to, which torch warns of.
    return np.frombuffer(base64.b64decode(row["content"]), dtype=row["type"]).reshape(row["shape"]).copy()


# Numbers, bit for bit as they were; a text says why there are none.
EMBEDDING: Form[np.ndarray | str] = Form(_array_row, _array)


@dataclass
class Asking:
    """How a task asks a model. batch_size: pieces asked at once. advance: told how many records are done.

    kept: the answers known already, where they are kept at all.
    """

    batch_size: int
    advance: Callable[[int], None] = lambda done: None
    kept: Responses | None = None

    def share(
        self,
        batches: Sequence[list[int]],
        call: Callable[[list[int]], Sequence[Value]],
        requests: Callable[[list[int]], Sequence[tuple[tuple[str, ...], str]]],
        form: Form[Value],
        done: Callable[[int], int] = lambda piece: 1,
    ) -> list[Value]:
        """The answers to all pieces, 0 to N - 1, in every process.

        batches: the numbers of the pieces that are asked together. call: numbers -> an answer each. requests: numbers
        -> (pictures, what is asked about them) of each: answers to the same are the same. done: how many records a
        piece finishes.
        """
        rank, world = processes()
        found: dict[int, Value] = {}
        for batch in batches[rank::world]:
            keys = request_keys(requests(batch)) if self.kept else [None] * len(batch)
            rows = [self.kept.get(key) if self.kept else None for key in keys]
            found |= {piece: form.value(row) for piece, row in zip(batch, rows, strict=True) if row is not None}
            if unknown := [(piece, key) for piece, key in zip(batch, keys, strict=True) if piece not in found]:
                said = call([piece for piece, _ in unknown])
                found |= {piece: value for (piece, _), value in zip(unknown, said, strict=True)}
                if self.kept:
                    new = [(key, form.row(value)) for (_, key), value in zip(unknown, said, strict=True)]
                    self.kept.add([(key, row) for key, row in new if key is not None and row is not None])
            self.advance(sum(map(done, batch)))
        everything = gathered(found)
        return [everything[piece] for piece in range(sum(map(len, batches)))]


def request_keys(requests: Sequence[tuple[tuple[str, ...], str]]) -> list[str | None]:
    """Of each request a hash of its pictures' content and of what is asked; None where a picture cannot be read."""
    hashes = content_hashes([path for pictures, _ in requests for path in pictures])
    keys: list[str | None] = []
    for pictures, text in requests:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
        contents = [hashes[path] for path in pictures]
        for content in contents:
            digest.update(b"|" + str(content).encode())
        keys.append(None if None in contents else digest.hexdigest())
    return keys


def in_batches(lengths: Sequence[int], size: int, groups: Sequence[Any] | None = None) -> Iterator[list[int]]:
    """Numbers of pieces in batches of up to `size`, pieces of like length together, the longest first.

    groups: of each piece what is never split, such as the picture it is about; a batch holds at least one group. The
    longest come first, so that what does not fit into memory shows at once, and little is padding.
    """
    members: dict[Any, list[int]] = {}
    for number in range(len(lengths)):
        members.setdefault(groups[number] if groups is not None else number, []).append(number)
    batch: list[int] = []
    for group in sorted(members.values(), key=lambda group: -max(lengths[number] for number in group)):
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch
