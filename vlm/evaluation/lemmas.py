"""OK-VQA as LAVIS scores it: nouns and verbs of an answer become their lemmas before it is compared.

OK-VQA's own answers are stemmed, so that "dogs" is wrong where people said "dog" until it is lemmatised (LAVIS,
`Blip2T5._lemmatize`).
"""

import importlib
import importlib.util
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from vlm.data.records import Record
from vlm.errors import VlmError
from vlm.evaluation.answers import AnswerScores, mean_scores
from vlm.evaluation.vqa import vqa_accuracy

_MODEL = "en_core_web_sm"


def lemmatized(tokens: Iterable[Any]) -> str:
    """The words of a parsed text, nouns and verbs as lemmas, parted by spaces.

    tokens: as spaCy gives them, with `pos_`, `lemma_` and `text`.
    """
    return " ".join(token.lemma_ if token.pos_ in ("NOUN", "VERB") else token.text for token in tokens)


def score_lemmas(records: Sequence[Record], texts: Sequence[str | None]) -> AnswerScores:
    """`official-2017` of lemmatised answers. Raises VlmError without spaCy and its small English model."""
    parser = _parser()
    said = [None if text is None else lemmatized(parser(text)) for text in texts]
    found = vqa_accuracy(said, [record.answers for record in records], "official-2017")
    return mean_scores(records, found.per_sample, "question_type", "answer_type")


@cache
def _parser() -> Any:
    if importlib.util.find_spec("spacy") is None or importlib.util.find_spec(_MODEL) is None:
        raise VlmError(
            f"the protocol lavis-okvqa lemmatises by spaCy's {_MODEL}; run: pip install spacy, then "
            f"python -m spacy download {_MODEL}"
        )
    return importlib.import_module("spacy").load(_MODEL)
