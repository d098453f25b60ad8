"""Caption scores by hand-computed cases, by pycocoevalcap's own code where it is installed, and on bad input."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import VlmError
from vlm.evaluation import caption_scores
from vlm.evaluation.captioning import DEFAULT_METRICS
from vlm.evaluation.ptb import ptb_tokenize

words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9).map(" ".join)
corpora = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=6)


def test_bleu_by_hand() -> None:
    # The references' most frequent "the" occurs twice: 2 of 7 (Papineni et al. 2002, section 2.1).
    found = caption_scores(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert found["BLEU-1"] == pytest.approx(2 / 7)
    # All words match; the closest reference has 4 words to the caption's 2.
    assert caption_scores(["a b"], [["a b c d"]])["BLEU-2"] == pytest.approx(math.exp(1 - 4 / 2))
    # Of two lengths as close the shorter counts: no penalty.
    assert caption_scores(["a b c"], [["a b c d", "a b"]])["BLEU-1"] == pytest.approx(1)


def test_rouge_l_by_hand() -> None:
    # Precision 2/2 by the first reference, recall 1/1 by the second, though no reference gives both.
    assert caption_scores(["a b"], [["a x b x", "b"]])["ROUGE-L"] == pytest.approx(1)
    precision, recall = 2 / 3, 2 / 4
    expected = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert caption_scores(["a c b"], [["a b d e"]])["ROUGE-L"] == pytest.approx(expected)


def test_cider_by_hand() -> None:
    # Unigrams and bigrams are right and rare; there is no longer n-gram: 2 of 4 lengths, x10.
    found = caption_scores(["a b", "c d"], [["a b"], ["c d"]])
    assert found["CIDEr"] == pytest.approx(5)
    assert found.per_image == {n: {**found.per_image[n], "CIDEr": pytest.approx(5)} for n in (0, 1)}
    assert caption_scores(["a b"], [["a b"]])["CIDEr"] == 0  # log of one image
    # A word that every image's references hold has no weight, and a caption of one word no bigram.
    assert caption_scores(["a", "a"], [["a"], ["a"]])["CIDEr"] == 0
    # Three bigrams too many: exp(-9/72); the unigram "a" of 4 words has the cosine 1/2.
    one, two = caption_scores({1: "a c d e", 2: "z"}, {1: ["a"], 2: ["y"]}).per_image.values()
    assert one["CIDEr"] == pytest.approx(10 / 4 * 0.5 * math.exp(-9 / 72))
    assert two["CIDEr"] == 0


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_scores_equal_pycocoevalcaps(corpus: list[tuple[str, list[str]]]) -> None:
    pytest.importorskip("pycocoevalcap", reason='needs pip install "vlm[coco-java]"')
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = {n: caption for n, (caption, _) in enumerate(corpus)}
    references = {n: others for n, (_, others) in enumerate(corpus)}
    found = caption_scores(candidates, references, tokenizer="whitespace")
    said = {n: [caption] for n, caption in candidates.items()}
    expected: dict[str, tuple[float, Any]] = {}
    bleu, each = Bleu(4).compute_score(references, said, verbose=0)
    expected |= {f"BLEU-{n + 1}": (bleu[n], each[n]) for n in range(4)}
    expected["ROUGE-L"] = Rouge().compute_score(references, said)
    if any(other for _, others in corpus for other in others):  # without a single n-gram its code fails
        expected["CIDEr"] = Cider().compute_score(references, said)
    for name, (score, per_image) in expected.items():
        assert found[name] == pytest.approx(score, abs=1e-9), name
        assert [found.per_image[n][name] for n in candidates] == pytest.approx(list(per_image), abs=1e-9), name


def test_captions_may_come_by_id_or_in_order() -> None:
    references = {"x": ["a red dog."], "y": ["two cats", "a cat"]}
    by_id = caption_scores({"y": "a cat", "x": "a dog"}, references)
    in_order = caption_scores(["a dog", ["a cat"]], list(references.values()))
    assert dict(by_id) == dict(in_order)
    assert list(by_id) == list(DEFAULT_METRICS)
    assert [by_id.per_image[key] for key in ("x", "y")] == [in_order.per_image[n] for n in (0, 1)]
    assert dict(caption_scores({"1": "a"}, {1: ["a"]})) == dict(caption_scores({1: "a"}, {1: ["a"]}))


def test_empty_captions_score_nothing_and_break_nothing() -> None:
    found = caption_scores({1: "", 2: " . ", 3: "a b"}, {1: ["a dog"], 2: ["a cat", ""], 3: ["a b"]})
    assert set(found.per_image[1].values()) == {0.0}
    assert found.per_image[2]["ROUGE-L"] == 1  # an empty caption is one empty word, as is an empty reference
    assert found.per_image[2]["CIDEr"] == 0
    assert found.per_image[3]["BLEU-1"] == pytest.approx(1)
    everything = caption_scores([""], [[""]])
    assert all(math.isfinite(value) for value in everything.values())


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_break_in_a_caption_is_a_space(separator: str) -> None:
    assert ptb_tokenize(f"a dog{separator}on grass.") == "a dog on grass"
    broken = caption_scores({1: f"a{separator}dog", 2: "a cat"}, {1: ["a dog"], 2: [f"a{separator}cat"]})
    assert dict(broken) == dict(caption_scores({1: "a dog", 2: "a cat"}, {1: ["a dog"], 2: ["a cat"]}))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_words_without_breaks(text: str) -> None:
    found = ptb_tokenize(text)
    assert found == " ".join(found.split())
    assert found == ptb_tokenize(" ".join(text.split()))  # what is remembered of chunks changes nothing


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({1: "a"}, {1: ["a"], 2: ["b"]}, r"captions: the image ids .* 2: 1 missing \(2\)"),
        ({1: "a", 3: "b"}, {1: ["a"]}, r"1 unknown \(3\)"),
        (["a"], [["a"], ["b"]], "1 captions for 2 images"),
        ({1: "a"}, [["a"]], "both by image id, or both in the same order"),
        ({1: 3}, {1: ["a"]}, "image 1: one caption has to be given as text, found 3"),
        ({1: None}, {1: ["a"]}, "found None"),
        ({1: ["a", "b"]}, {1: ["a"]}, "one caption has to be given"),
        ({1: "a"}, {1: []}, "image 1: its references must be a list of at least one text"),
        ({1: "a"}, {1: "a dog"}, "must be a list"),
        ({1: "a"}, {1: ["a", 5]}, "must be a list"),
        ([], [], "nothing to score"),
    ],
)
def test_what_cannot_be_scored_is_an_error(candidates: Any, references: Any, message: str) -> None:
    with pytest.raises(VlmError, match=message):
        caption_scores(candidates, references)


def test_unknown_names_are_errors_with_the_nearest() -> None:
    with pytest.raises(VlmError, match="did you mean 'CIDEr'"):
        caption_scores(["a"], [["a"]], metrics=["CIDER"])
    with pytest.raises(VlmError, match="unknown tokeniser 'pdb'"):
        caption_scores(["a"], [["a"]], tokenizer="pdb")


def test_meteor_and_spice_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for metric in ("METEOR", "SPICE"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            VlmError, match=rf'{metric} needs the package pycocoevalcap.*pip install "vlm\[coco-java\]"'
        ):
            caption_scores(["a"], [["a"]], metrics=[metric])
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
        monkeypatch.setattr("shutil.which", lambda name: None)
        with pytest.raises(VlmError, match=f"{metric} runs on Java"):
            caption_scores(["a"], [["a"]], metrics=[metric])
        monkeypatch.undo()
    with pytest.raises(VlmError, match="SPICE needs"):
        caption_scores(["a"], [["a"]], metrics=["SPICE"])
