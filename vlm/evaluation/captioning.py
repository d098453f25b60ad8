"""Caption scores as the COCO caption evaluation computes them: BLEU-1 to 4, ROUGE-L, CIDEr-D, METEOR, SPICE.

Everything about n-grams is counted at once over the whole corpus: captions become one array of word numbers, n-grams of
all lengths get numbers of their own, and scores are sums over rows (caption, n-gram, times).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm.errors import VlmError, did_you_mean
from vlm.evaluation.named_scores import NamedScores
from vlm.evaluation.ptb import ptb_tokenize

ORDERS = 4  # longest n-gram
BLEU = tuple(f"BLEU-{n}" for n in range(1, ORDERS + 1))
METRICS = (*BLEU, "ROUGE-L", "CIDEr", "METEOR", "SPICE", "exact")
DEFAULT_METRICS = METRICS[: METRICS.index("METEOR")]
# How captions become words: `ptb` here, `java` by CoreNLP itself; `whitespace` for captions that are tokenised already.
TOKENIZERS = ("ptb", "java", "whitespace")
_TINY, _SMALL = 1e-15, 1e-9  # keep an n-gram that never matches from being a logarithm of 0
_BETA = 1.2  # of ROUGE-L's F score
_SIGMA = 6.0  # of CIDEr-D's penalty on length


@dataclass(frozen=True, eq=False)
class CaptionScores(NamedScores):
    """Corpus scores by name, between 0 and 1 (CIDEr up to 10), as the official code gives them; papers print x100.

    per_image: id (or number, where captions came as a list) -> scores of its caption.
    bleu_parts: [M, 10] of each image, in the order given: matching and possible n-grams of each length, words of the
    caption and of the closest reference. BLEU is a function of their sums: `bleu_of_parts`.
    tokenizer: how captions became words; words, reference_words: those of each image, in the order given.
    """

    scores: dict[str, float]
    per_image: dict[Hashable, dict[str, float]]
    bleu_parts: np.ndarray
    tokenizer: str = "ptb"
    words: list[str] = field(default_factory=list, repr=False)
    reference_words: list[list[str]] = field(default_factory=list, repr=False)


Caption = str | Sequence[str]


def caption_scores(
    candidates: Mapping[Hashable, Caption] | Sequence[Caption],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    tokenizer: str = "ptb",
) -> CaptionScores:
    """Score one caption for each image against its references (Chen et al. 2015, "Microsoft COCO Captions", section 3).

    candidates: image id -> caption, or captions in the order of `references`. references: image id -> captions.
    metrics: any of `METRICS`; METEOR and SPICE run Java, from the extra `coco-java`. BLEU is the corpus' own score,
    METEOR too; the others are means over images. `exact`: whether a caption is one of its references, word for word.
    CIDEr is CIDEr-D, whose document frequencies come from `references`:
    one image alone scores 0.
    tokenizer: one of `TOKENIZERS`.

    Raises VlmError where the two sides are not about the same images, for an image without a reference, and for what is
    not text.
    """
    for name in metrics:
        if name not in METRICS:
            raise VlmError(f"unknown caption metric {name!r}{did_you_mean(name, METRICS)}")
    ids, said, told = _paired(candidates, references)
    words, reference_words = _tokenized(said, told, tokenizer)
    table = _Counts(words, reference_words)
    per_image: dict[str, np.ndarray] = {}
    scores: dict[str, float] = {}
    parts = table.bleu_parts()
    if set(metrics) & set(BLEU):
        scores |= dict(zip(BLEU, bleu_of_parts(parts.sum(axis=0)).tolist()))
        per_image |= dict(zip(BLEU, bleu_of_parts(parts).T))
    own: dict[str, Callable[[], np.ndarray]] = {
        "ROUGE-L": lambda: rouge_l(words, reference_words),
        "CIDEr": table.cider_d,
        "exact": lambda: np.array([float(text in told) for text, told in zip(words, reference_words)]),
    }
    for name, compute in own.items():
        if name in metrics:
            per_image[name] = compute()
            scores[name] = float(per_image[name].mean())
    if "METEOR" in metrics:
        from vlm.evaluation.coco_java import meteor

        scores["METEOR"], per_image["METEOR"] = meteor(words, reference_words)
    if "SPICE" in metrics:
        from vlm.evaluation.coco_java import spice

        scores["SPICE"], per_image["SPICE"] = spice(words, reference_words)
    names = [name for name in METRICS if name in metrics]
    rows = zip(*(per_image[name].tolist() for name in names)) if names else [()] * len(ids)
    return CaptionScores(
        {name: scores[name] for name in names},
        {key: dict(zip(names, row)) for key, row in zip(ids, rows)},
        parts,
        tokenizer,
        words,
        reference_words,
    )


def bleu_of_parts(parts: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 [..., 4] of sums of `CaptionScores.bleu_parts` [..., 10] (Papineni et al. 2002, section 2.3).

    Geometric mean of clipped precisions times exp(1 - reference length / length) where the captions are shorter.
    """
    matches, possible = parts[..., :ORDERS], parts[..., ORDERS : 2 * ORDERS]
    length, closest = parts[..., -2], parts[..., -1]
    products = np.cumprod((matches + _TINY) / (possible + _SMALL), axis=-1)
    bleu = products ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return bleu * penalty[..., None]


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L [M] of each caption (Lin 2004, section 3), words parted by a space; an empty caption is one empty word.

    Precision and recall are each the best over the references.
    """
    scores = np.zeros(len(candidates))
    for number, (candidate, others) in enumerate(zip(candidates, references)):
        words = candidate.split(" ")
        # Bit i of a word's mask: it stands at place i of the caption.
        masks: dict[str, int] = {}
        for place, word in enumerate(words):
            masks[word] = masks.get(word, 0) | 1 << place
        precision = recall = 0.0
        for other in others:
            other_words = other.split(" ")
            common = _longest_common(masks, len(words), other_words)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(other_words))
        if precision and recall:
            scores[number] = (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return scores


def _longest_common(masks: dict[str, int], length: int, words: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time as bits (Hyyrö 2004)."""
    everything = (1 << length) - 1
    row = everything
    for word in words:
        if mask := masks.get(word, 0):
            matched = row & mask
            row = ((row + matched) | (row - matched)) & everything
    return length - row.bit_count()


class _Counts:
    """N-grams of all captions, candidates first. Of each length: sorted rows (caption, n-gram, times)."""

    def __init__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        self.images = len(candidates)
        self.owner = np.repeat(np.arange(self.images), [len(others) for others in references])  # [R]
        numbers: dict[str, int] = {}
        encoded: list[int] = []
        lengths: list[int] = []
        for caption in (*candidates, *(text for others in references for text in others)):
            words = caption.split()
            lengths.append(len(words))
            encoded += [numbers.setdefault(word, len(numbers)) for word in words]
        self.lengths = np.array(lengths)  # [M + R] candidates first
        caption_of = np.repeat(np.arange(len(lengths)), lengths)  # [T]
        left = np.repeat(np.cumsum(self.lengths), lengths) - np.arange(len(encoded))  # words from here to the end
        tokens = np.array(encoded, dtype=np.int64)
        grams, place = tokens, np.arange(len(tokens))
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (caption, n-gram, times) of each n
        for n in range(1, ORDERS + 1):
            if n > 1:
                goes_on = left[place] >= n
                place = place[goes_on]
                # An n-gram is the (n-1)-gram at its start and its last word.
                pairs = grams[goes_on] * len(numbers) + tokens[place + n - 1]
                grams = np.unique(pairs, return_inverse=True)[1].reshape(-1)
            size = int(grams.max(initial=0)) + 1
            keys, times = np.unique(caption_of[place] * size + grams, return_counts=True)
            self.rows.append((keys // size, keys % size, times))

    def _split(self, n: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
        """Rows of candidates and of references for n-grams, and for each reference row the caption's row with the same
        n-gram, and whether there is one."""
        caption, gram, times = self.rows[n - 1]
        first = int(np.searchsorted(caption, self.images))
        mine = (caption[:first], gram[:first], times[:first])
        theirs = (caption[first:] - self.images, gram[first:], times[first:])
        size = int(gram.max(initial=0)) + 1
        keys = mine[0] * size + mine[1]
        wanted = self.owner[theirs[0]] * size + theirs[1]
        at = np.minimum(np.searchsorted(keys, wanted), max(0, first - 1))
        same = keys[at] == wanted if first else np.zeros(len(wanted), dtype=bool)
        return mine, theirs, at, same

    def bleu_parts(self) -> np.ndarray:
        """[M, 10]: clipped matches of each n, n-grams of each n, words, and words of the closest reference."""
        parts = np.zeros((self.images, 2 * ORDERS + 2))
        words = self.lengths[: self.images]
        for n in range(1, ORDERS + 1):
            mine, theirs, at, same = self._split(n)
            most = np.zeros(len(mine[0]), dtype=np.int64)  # the most times any reference holds the n-gram
            np.maximum.at(most, at[same], theirs[2][same])
            parts[:, n - 1] = np.bincount(mine[0], weights=np.minimum(most, mine[2]), minlength=self.images)
            parts[:, ORDERS + n - 1] = np.maximum(0, words - n + 1)
        other = self.lengths[self.images :]
        # The closest length, the shorter of two that are as close.
        order = np.lexsort((other, np.abs(other - words[self.owner]), self.owner))
        closest = np.zeros(self.images)
        closest[self.owner[order][::-1]] = other[order][::-1]  # of several writes to a place the last one stays
        parts[:, -2], parts[:, -1] = words, closest
        return parts

    def cider_d(self) -> np.ndarray:
        """CIDEr-D [M] (Vedantam et al. 2015, section 5), with the official code's raw counts and bigram length."""
        references = len(self.owner)
        bigrams = np.maximum(0, self.lengths - 1)
        delta = bigrams[: self.images][self.owner] - bigrams[self.images :]
        penalty = np.exp(-(delta**2) / (2 * _SIGMA**2))
        total = np.zeros(references)
        for n in range(1, ORDERS + 1):
            mine, theirs, at, same = self._split(n)
            size = int(self.rows[n - 1][1].max(initial=0)) + 1
            holding = np.unique(self.owner[theirs[0]] * size + theirs[1]) % size  # once for each image
            documents = np.bincount(holding, minlength=size)
            weight = np.log(float(self.images)) - np.log(np.maximum(1.0, documents))  # [G]
            mine_vector, their_vector = mine[2] * weight[mine[1]], theirs[2] * weight[theirs[1]]
            mine_norm = np.sqrt(np.bincount(mine[0], weights=mine_vector**2, minlength=self.images))
            their_norm = np.sqrt(np.bincount(theirs[0], weights=their_vector**2, minlength=references))
            common = np.minimum(mine_vector[at[same]], their_vector[same]) * their_vector[same]
            dot = np.bincount(theirs[0][same], weights=common, minlength=references)
            norms = mine_norm[self.owner] * their_norm
            total += np.divide(dot, norms, out=np.zeros(references), where=norms != 0) * penalty
        count = np.bincount(self.owner, minlength=self.images)
        return 10 * np.bincount(self.owner, weights=total, minlength=self.images) / ORDERS / count


def _paired(
    candidates: Mapping[Hashable, Caption] | Sequence[Caption],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]],
) -> tuple[list[Hashable], list[str], list[list[str]]]:
    """Ids, captions and references in the order of `references`, checked."""
    ids: list[Hashable]
    if isinstance(candidates, Mapping) != isinstance(references, Mapping):
        raise VlmError("captions: give candidates and references both by image id, or both in the same order")
    if isinstance(candidates, Mapping) and isinstance(references, Mapping):
        from vlm.evaluation.vqa import check_same_ids

        by_id = {str(key): caption for key, caption in candidates.items()}
        check_same_ids(list(candidates), list(references), "captions", what="image")
        ids, told = list(references), list(references.values())
        said = [by_id[str(key)] for key in ids]
    else:
        said, told = list(candidates), list(references)  # type: ignore[arg-type]
        ids = list(range(len(told)))
        if len(said) != len(told):
            raise VlmError(f"{len(said)} captions for {len(told)} images: give one caption for each image")
    if not told:
        raise VlmError("captions: nothing to score")
    texts = [_one_text(key, caption) for key, caption in zip(ids, said)]
    for key, others in zip(ids, told):
        if isinstance(others, str) or not len(others) or not all(isinstance(text, str) for text in others):
            raise VlmError(f"image {key!r}: its references must be a list of at least one text, found {others!r}")
    return ids, texts, [list(others) for others in told]


def _one_text(key: Hashable, caption: object) -> str:
    if isinstance(caption, (list, tuple)) and len(caption) == 1:
        caption = caption[0]
    if not isinstance(caption, str):
        raise VlmError(f"image {key!r}: one caption has to be given as text, found {caption!r}")
    return caption


def _tokenized(said: list[str], told: list[list[str]], tokenizer: str) -> tuple[list[str], list[list[str]]]:
    if tokenizer not in TOKENIZERS:
        raise VlmError(f"unknown tokeniser {tokenizer!r}{did_you_mean(tokenizer, TOKENIZERS)}")
    if tokenizer == "java":
        from vlm.evaluation.coco_java import java_ptb_tokenize

        # In the order of the official wrapper, which runs once for each side.
        flat = iter(java_ptb_tokenize([text for others in told for text in others]))
        return java_ptb_tokenize(said), [[next(flat) for _ in others] for others in told]
    if tokenizer == "ptb":
        words = iter(_in_order([text for others in told for text in others]))
        return _in_order(said), [[next(words) for _ in others] for others in told]
    return [" ".join(text.split()) for text in said], [[" ".join(text.split()) for text in others] for others in told]


def _in_order(captions: list[str]) -> list[str]:
    return [ptb_tokenize(text, following) for text, following in zip(captions, [*captions[1:], ""])]
