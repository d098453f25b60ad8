"""Caption scores against pycocoevalcap, and VQA accuracy against the official algorithm written out: times and scores.

Captions are made at run time: words of COCO-like captions drawn again, six a picture. Both sides get the same raw
captions, in one process, one thread; pycocoevalcap needs Java and `pip install "vlm[coco-java]"`.
"""

import contextlib
import io
import random
import re
from collections.abc import Mapping
from typing import Any

from harness import Case, main

from vlm.evaluation import caption_scores, vqa_accuracy
from vlm.evaluation.vqa_tables import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

IMAGES, QUESTIONS = 5000, 9000
SENTENCES = (
    "a man riding wave on top of the surfboard",
    "two dogs play with red ball in grass",
    "woman's kitchen has an old, white stove",
    "the cat isn't sleeping near a window",
    "Three giraffes stand by trees at the zoo",
    "A double-decker bus (No. 12) waits at 5:30 p.m. beside St. Mary's church",
    'a sign that says "stop" hangs over the well-lit street',
    "People are flying kites, some of them huge, on a beach; others watch",
    "a plate with broccoli, rice & half a lemon on it",
    "The baseball player's swinging his bat while the umpire can't see",
)


def corpus() -> tuple[dict[int, str], dict[int, list[str]]]:
    """A caption and five references for each picture: `SENTENCES` with a few words drawn anew."""
    rng = random.Random(0)
    words = [word for text in SENTENCES for word in text.split()]
    candidates, references = {}, {}
    for number in range(IMAGES):
        theme = rng.choice(SENTENCES).split()

        def variant(theme: list[str] = theme) -> str:
            drawn = [rng.choice(words) if rng.random() < 0.3 else word for word in theme]
            return " ".join(drawn[: rng.randint(max(1, len(drawn) - 3), len(drawn))]) + rng.choice([".", "", " ."])

        candidates[number] = variant()
        references[number] = [variant() for _ in range(5)]
    return candidates, references


def pycocoevalcap_scores(candidates: dict[int, str], references: dict[int, list[str]]) -> dict[str, float]:
    """Tokenisation, BLEU, ROUGE-L and CIDEr as pycocoevalcap's COCOEvalCap runs them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    told = {key: [{"caption": text} for text in texts] for key, texts in references.items()}
    said = {key: [{"caption": text}] for key, text in candidates.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        told, said = PTBTokenizer().tokenize(told), PTBTokenizer().tokenize(said)
        bleu, _ = Bleu(4).compute_score(told, said, verbose=0)
        scores = {f"BLEU-{n + 1}": float(value) for n, value in enumerate(bleu)}
        scores["ROUGE-L"] = float(Rouge().compute_score(told, said)[0])
        scores["CIDEr"] = float(Cider().compute_score(told, said)[0])
    return scores


# --- the official VQA algorithm (protocol `official`), question by question ---

_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(\,)(\d)")


def _punctuation(text: str) -> str:
    result = text
    for sign in PUNCTUATION:
        if sign + " " in text or " " + sign in text or re.search(_COMMA, text) is not None:
            result = result.replace(sign, "")
        else:
            result = result.replace(sign, " ")
    return _PERIOD.sub("", result, 32)


def _articles(text: str) -> str:
    words = [NUMBERS.setdefault(word, word) for word in text.lower().split()]
    words = [word for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def plain_vqa_accuracy(predictions: dict[int, str], annotations: list[dict[str, Any]]) -> float:
    """In per cent: normalise, then for each human the share of agreeing others."""
    total = 0.0
    for annotation in annotations:
        answers = [dict(answer) for answer in annotation["answers"]]
        said = predictions[annotation["question_id"]].replace("\n", " ").replace("\t", " ").strip()
        for answer in answers:
            answer["answer"] = answer["answer"].replace("\n", " ").replace("\t", " ").strip()
        if len({answer["answer"] for answer in answers}) > 1:
            for answer in answers:
                answer["answer"] = _articles(_punctuation(answer["answer"]))
            said = _articles(_punctuation(said))
        shares = []
        for answer in answers:
            others = [other for other in answers if other != answer]
            matching = [other for other in others if other["answer"] == said]
            shares.append(min(1, len(matching) / 3))
        total += sum(shares) / len(shares)
    return 100 * total / len(annotations)


def questions() -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Predictions for questions with ten answers each, frequent ones most often, some written otherwise."""
    rng = random.Random(0)
    words = sorted({word for text in SENTENCES for word in text.split()})
    common = ["yes", "no", "2", "white", "1", "blue", "red", "the dog", "Two", "don't know", "none", "a red bus."]
    predictions, annotations = {}, []
    for number in range(QUESTIONS):
        pool = [rng.choice(common), rng.choice(common), " ".join(rng.sample(words, rng.randint(1, 3)))]
        if rng.random() < 0.35:
            pool = pool[:1]
        answers = [{"answer": rng.choice(pool), "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]
        annotations.append({"question_id": number, "answers": answers})
        predictions[number] = rng.choice(pool)
    return predictions, annotations


def same(ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    """Both sides' scores; ours may be more."""
    for name, value in theirs.items():
        if abs(ours[name] - value) > 1e-9:
            raise AssertionError(f"{name}: {ours[name]} here, {value} there")


def captions() -> Case:
    """Captions a second, tokenisation included."""
    made = corpus()
    return Case(
        ours=lambda: lambda: caption_scores(*made),
        theirs=lambda: lambda: pycocoevalcap_scores(*made),
        peer="pycocoevalcap",
        amount=IMAGES,
        unit="captions",
        repeats=3,
        check=same,
    )


def answers() -> Case:
    """Answers a second. Answers that were normalised once are remembered: the first turn is the one that counts."""
    made = questions()
    return Case(
        ours=lambda: lambda: {"accuracy": vqa_accuracy(*made).accuracy},
        theirs=lambda: lambda: {"accuracy": plain_vqa_accuracy(*made)},
        peer="the official algorithm, written out",
        amount=QUESTIONS,
        unit="answers",
        repeats=0,
        check=same,
    )


if __name__ == "__main__":
    main({"caption scores": captions(), "VQA accuracy": answers()}, ["pycocoevalcap"])
