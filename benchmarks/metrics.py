"""Caption scores against pycocoevalcap, and VQA accuracy against the official algorithm written out: times and scores.

    python benchmarks/metrics.py [--captions FOLDER_OR_FILE] [--images 5000] [--questions 9000]

Captions are made at run time: words of COCO-like captions (of an oracle bundle, or of a built-in list) drawn again,
six a picture. Both sides get the same raw captions, in one process, one thread; pycocoevalcap needs Java and
`pip install "vlm[coco-java]"`. Prints one JSON object.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.evaluation import caption_scores, vqa_accuracy
from vlm.evaluation.vqa_tables import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION

_WORDS = (
    "a man riding wave on top of the surfboard; two dogs play with red ball in grass; woman's kitchen has an old, "
    "white stove; the cat isn't sleeping near a window. Three giraffes stand by trees at the zoo"
)


def sentences(source: Path | None) -> list[str]:
    """Captions to draw words from: of a bundle's captions.json, of a .jsonl.gz, or the built-in ones."""
    if source is None:
        return _WORDS.split(";")
    if source.suffix == ".gz":
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            return [json.loads(line)[0] for line in lines]
    file = source / "captions.json" if source.is_dir() else source
    return [row["caption"] for row in json.loads(file.read_text(encoding="utf-8"))["annotations"]]


def corpus(images: int, source: list[str], seed: int) -> tuple[dict[int, str], dict[int, list[str]]]:
    """A caption and five references for each picture: sentences of the source with a few words drawn anew."""
    rng = random.Random(seed)
    words = [word for text in source for word in text.split()]
    candidates, references = {}, {}
    for number in range(images):
        theme = rng.choice(source).split()

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


def questions(count: int, source: list[str], seed: int) -> tuple[dict[int, str], list[dict[str, Any]]]:
    """Questions with ten answers each, frequent ones most often, some written otherwise."""
    rng = random.Random(seed)
    words = sorted({word for text in source for word in text.split()})
    common = ["yes", "no", "2", "white", "1", "blue", "red", "the dog", "Two", "don't know", "none", "a red bus."]
    predictions, annotations = {}, []
    for number in range(count):
        pool = [rng.choice(common), rng.choice(common), " ".join(rng.sample(words, rng.randint(1, 3)))]
        if rng.random() < 0.35:
            pool = pool[:1]
        answers = [{"answer": rng.choice(pool), "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]
        annotations.append({"question_id": number, "answers": answers})
        predictions[number] = rng.choice(pool)
    return predictions, annotations


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest of some runs in seconds, and what the call gives."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - began)
    return best, result


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="a bundle of captions, a captions.json or a .jsonl.gz")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--questions", type=int, default=9000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    oracles = os.environ.get("VLM_ORACLES")
    default = Path(oracles) / "ptb" / "captions.jsonl.gz" if oracles else None
    source = sentences(options.captions or (default if default and default.is_file() else None))

    candidates, references = corpus(options.images, source, seed=0)
    ours, scores = timed(lambda: dict(caption_scores(candidates, references)), options.repeats)
    theirs, expected = timed(lambda: pycocoevalcap_scores(candidates, references), options.repeats)
    captions = {
        "images": options.images,
        "vlm_seconds": round(ours, 3),
        "pycocoevalcap_seconds": round(theirs, 3),
        "times_faster": round(theirs / ours, 2),
        "largest_difference": max(abs(scores[name] - value) for name, value in expected.items()),
    }

    predictions, annotations = questions(options.questions, source, seed=0)
    # Answers normalised in one run are remembered in the next: only the first run of ours counts.
    ours, accuracy = timed(lambda: vqa_accuracy(predictions, annotations).accuracy, 1)
    theirs, plain = timed(lambda: plain_vqa_accuracy(predictions, annotations), options.repeats)
    vqa = {
        "questions": options.questions,
        "vlm_seconds": round(ours, 3),
        "official_algorithm_seconds": round(theirs, 3),
        "times_faster": round(theirs / ours, 2),
        "largest_difference": abs(accuracy - plain),
    }
    print(json.dumps({"captions": captions, "vqa": vqa}, indent=2))


if __name__ == "__main__":
    main()
