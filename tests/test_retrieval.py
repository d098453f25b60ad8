"""Recall at k and median ranks: against a plain ranking, with ties, folds, missing pictures, and in bounded memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import VlmError
from vlm.evaluation import retrieval
from vlm.evaluation.intervals import Medians
from vlm.evaluation.retrieval import TIE_RULES, retrieval_recall


def plain(scores: np.ndarray, right: np.ndarray, tie_rule: str, ks: tuple[int, ...]) -> dict[int, float]:
    """Recall in per cent by sorting each row [Q,C], ties broken for or against the right candidates."""
    ranks = []
    for row, mine in zip(scores, right):
        if mine.any():
            order = sorted(
                range(len(row)), key=lambda i: (-row[i], mine[i] if tie_rule == "pessimistic" else not mine[i])
            )
            ranks.append(next(place for place, i in enumerate(order) if mine[i]))
    return {k: 100 * float(np.mean(np.array(ranks) < k)) for k in ks}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_scores_are_those_of_a_plain_ranking(seed: int, m: int, n: int, block: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers: dot products are exact, and with few values many of them tie.
    images, texts = (rng.integers(-2 if ties else -99, 3 if ties else 99, (rows, 3)).astype(float) for rows in (m, n))
    owner = rng.integers(0, m, n)
    right = owner[None] == np.arange(m)[:, None]  # [M, N]
    scores = images @ texts.T
    for rule in ("optimistic", "pessimistic"):
        found = retrieval_recall(images, texts, owner, block=block, tie_rule=rule)
        for k, wanted in plain(scores, right, rule, (1, 5, 10)).items():
            assert found[f"TR@{k}"] == pytest.approx(wanted)
        for k, wanted in plain(scores.T, right.T, rule, (1, 5, 10)).items():
            assert found[f"IR@{k}"] == pytest.approx(wanted)
        assert found["rsum"] == pytest.approx(sum(found[f"{way}@{k}"] for way in ("TR", "IR") for k in (1, 5, 10)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_expected_is_the_mean_over_random_orders_of_what_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, texts = (rng.integers(0, 2, (rows, 2)).astype(float) for rows in (4, 8))
    owner = rng.integers(0, 4, 8)
    found = retrieval_recall(images, texts, owner, ks=(1, 3))
    right = owner[None] == np.arange(4)[:, None]
    # The same scores with the ties broken at random, many times.
    drawn: dict[str, list[float]] = {"TR@1": [], "TR@3": [], "IR@1": [], "IR@3": []}
    for _ in range(400):
        scores = images @ texts.T + rng.uniform(0, 0.5, (4, 8))
        for name, table, mine in (("TR", scores, right), ("IR", scores.T, right.T)):
            for k, value in plain(table, mine, "optimistic", (1, 3)).items():
                drawn[f"{name}@{k}"].append(value)
    for key, values in drawn.items():
        assert found[key] == pytest.approx(np.mean(values), abs=5 * np.std(values) / 20 + 1e-9), key


def test_a_model_that_sees_no_difference_scores_chance_all_or_nothing_by_the_tie_rule() -> None:
    images, texts = np.ones((20, 4)), np.ones((20, 4))
    wanted = {"expected": (5.0, 50.0, 10.5), "optimistic": (100.0, 100.0, 1.0), "pessimistic": (0.0, 0.0, 20.0)}
    assert wanted.keys() == set(TIE_RULES)
    for rule, (first, tenth, median) in wanted.items():
        found = retrieval_recall(images, texts, np.arange(20), tie_rule=rule)
        for way in ("TR", "IR"):
            assert found[f"{way}@1"] == pytest.approx(first)
            assert found[f"{way}@10"] == pytest.approx(tenth)
            assert found[f"{way}_median_rank"] == pytest.approx(median)


def test_equal_captions_tie_wherever_they_stand() -> None:
    """The same row at other places of a product may come out different in its last bit; that must not decide."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 33)).astype(np.float32)
    caption = rng.normal(size=33).astype(np.float32)
    texts = np.tile(caption, (40, 1))
    assert retrieval_recall(images, texts, np.arange(40))["TR@1"] == pytest.approx(100 / 40)


def test_pictures_without_captions_are_candidates_but_ask_nothing() -> None:
    images = np.eye(3)
    found = retrieval_recall(images, images[[2, 1]] + 2 * images[0], [2, 1])
    assert found["IR@1"] == 0  # the picture nobody describes comes first
    assert np.isnan(found.recalls["TR@1"][0])
    assert found["TR@1"] == 100


@pytest.mark.parametrize("rule", TIE_RULES)
def test_a_picture_that_could_not_be_read_is_wrong_both_ways_and_no_candidate(rule: str) -> None:
    images = np.eye(4)
    texts = np.repeat(np.eye(4), 2, axis=0)
    owner = np.repeat(np.arange(4), 2)
    images[1] = np.nan  # whatever stands there is not read
    found = retrieval_recall(images, texts, owner, tie_rule=rule, present=[True, False, True, True], top=1)
    assert found["TR@1"] == found["IR@1"] == 75
    assert 1 not in found.top_images
    assert found["TR@10"] == found["IR@10"] == 75
    nobody = retrieval_recall(images, texts, owner, tie_rule=rule, present=[False] * 4)
    assert nobody["rsum"] == 0
    assert nobody["TR_median_rank"] == np.inf


def test_folds_are_searched_alone_and_count_alike() -> None:
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(20, 6)), rng.normal(size=(50, 6))
    owner = np.sort(rng.integers(0, 20, 50))
    whole = retrieval_recall(images, texts, owner, folds=5)
    parts = []
    for fold in range(5):
        mine = owner // 4 == fold
        parts.append(retrieval_recall(images[4 * fold : 4 * fold + 4], texts[mine], owner[mine] - 4 * fold))
    for key in ("TR@1", "IR@1", "IR@5", "rsum", "TR_median_rank", "IR_median_rank"):
        assert whole[key] == pytest.approx(np.mean([part[key] for part in parts])), key
    assert whole["IR@1"] == pytest.approx(100 * np.nanmean(whole.contributions["IR@1"]))
    with pytest.raises(VlmError, match="20 pictures cannot be parted into 3 folds"):
        retrieval_recall(images, texts, owner, folds=3)


def test_no_block_of_similarities_is_larger_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real: Callable[..., torch.Tensor] = retrieval.similarities

    def noted(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        shapes.append((len(queries), len(candidates)))
        return real(queries, candidates)

    monkeypatch.setattr(retrieval, "similarities", noted)
    rng = np.random.default_rng(0)
    retrieval_recall(rng.normal(size=(300, 4)), rng.normal(size=(900, 4)), rng.integers(0, 300, 900), block=9000)
    assert max(rows * columns for rows, columns in shapes) <= 9000
    assert sum(rows for rows, columns in shapes if columns == 900) == 300  # every query once
    assert sum(rows for rows, columns in shapes if columns == 300) == 900


def test_tensors_of_any_float_type_serve_and_the_best_candidates_are_told() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        images = torch.eye(3, dtype=dtype, requires_grad=True)
        found = retrieval_recall(images, torch.eye(3)[[1, 0, 2]], torch.tensor([1, 0, 2]), top=5)
        assert found["rsum"] == 600
        assert found["IR_median_rank"] == 1
        assert found.top_texts.shape == (3, 5)
        assert found.top_texts[:, 0].tolist() == [1, 0, 2]
        assert found.top_images[:, 0].tolist() == [1, 0, 2]
        assert (found.top_texts[:, 3:] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_rule": "optimist"}, "did you mean 'optimistic'"),
        ({"text_embeds": np.ones((3, 5))}, r"same width, got \[3, 4\] and \[3, 5\]"),
        ({"image_embeds": np.ones((3, 2, 2, 4))}, r"got \[3, 2, 2, 4\]"),
        ({"text_embeds": np.ones((0, 4))}, "0 captions"),
        ({"text_to_image": [0, 1, 3]}, "0 to 2"),
        ({"text_to_image": [0, 1, -1]}, "0 to 2"),
        ({"text_to_image": [0.0, 1.0, 2.0]}, "numbers of pictures"),
        ({"text_to_image": [0, 1]}, "each of 3 captions"),
        ({"text_embeds": np.full((3, 4), np.nan)}, "caption 0 .* not finite"),
        ({"image_embeds": np.full((3, 4), np.inf)}, "picture 0 .* not finite"),
        ({"ks": ()}, "ks"),
        ({"block": 0}, "block"),
    ],
)
def test_what_cannot_be_scored_is_an_error(change: dict, message: str) -> None:
    arguments = {"image_embeds": np.ones((3, 4)), "text_embeds": np.ones((3, 4)), "text_to_image": [0, 1, 2]}
    with pytest.raises(VlmError, match=message):
        retrieval_recall(**{**arguments, **change})


def test_one_picture_with_one_caption_is_found() -> None:
    assert retrieval_recall([[1.0]], [[1.0]], [0])["rsum"] == 600


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_medians_of_resamples_are_those_of_the_repeated_samples(seed: int, folds: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 9, 12).astype(float)
    values[rng.random(12) < 0.2] = np.nan
    groups = np.arange(12) % folds
    times = rng.integers(1, 4, (3, 12))
    expected = [
        np.mean(
            [
                np.nanmedian(np.repeat(values, row)[np.repeat(groups, row) == g])
                for g in range(folds)
                if not np.isnan(values[groups == g]).all()
            ]
        )
        for row in times
    ]
    np.testing.assert_allclose(Medians(values, groups).of(times), expected)
