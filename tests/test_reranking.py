"""Retrieval with a Q-Former: the best query counts, and matching ranks the nearest again, both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generative_parts import pictures
from test_qformer_model import qformer_spec
from tiny_models import randomize

from vlm.errors import VlmError
from vlm.evaluation import Benchmark, evaluate, retrieval_recall
from vlm.evaluation.benchmark import load_benchmark
from vlm.evaluation.reranking import OUTSIDE, Pairs, rerank
from vlm.model_spec import QFormerSpec
from vlm.models.build import build_model
from vlm.models.qformer_model import QFormerModel

WORDS = ("red", "blue", "green", "yellow", "black")
THINGS = ("cat", "chair", "circle", "triangle", "square")


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> QFormerModel:
    built = build_model(QFormerSpec.model_validate(qformer_spec(tiny_folder)), device="cpu", precision="fp32")
    randomize(built.bridge)
    randomize(built.heads)
    torch.nn.init.constant_(built.heads.temperature, 0.07)
    return built


def captioned(
    folder: Path, count: int = 15, single: bool = False, same: int = 0
) -> tuple[Path, list[str], list[list[str]]]:
    """Pictures with one or two captions each, no two the same; single: with one each. same: so many share theirs."""
    paths = pictures(folder, count)
    told = [f"a {word} {thing}" for thing in THINGS for word in WORDS]
    captions = [[told[i], *([f"a photo of {told[i]}"] if not single and i % 3 == 0 else [])] for i in range(count)]
    if same:
        captions = [["the same"] if i < same else ["another"] for i in range(count)]
    lines = [
        {"id": str(i), "image": Path(path).name, "captions": told}
        for i, (path, told) in enumerate(zip(paths, captions))
    ]
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file, paths, captions


def plan(file: Path, **options: Any) -> Benchmark:
    data = {"name": str(file), "format": "captions_jsonl"}
    return Benchmark.model_validate({"name": "tiny", "dataset": data, "task": "retrieval", **options})


def naive(model: QFormerModel, paths: list[str], captions: list[list[str]], k: int) -> dict[str, float]:
    """LAVIS' way: all similarities at once, then a loop over queries and their k nearest, one pair at a time."""
    texts = [text for told in captions for text in told]
    owner = [i for i, told in enumerate(captions) for _ in told]
    sims = (model.encode_image(paths) @ model.encode_text(texts).T).amax(1)
    scores = {}
    for way, table in (("TR", sims), ("IR", sims.T)):
        ranked = torch.full_like(table, -100.0)
        for query, row in enumerate(table):
            for candidate in row.topk(min(k, len(row))).indices.tolist():
                image, text = (query, candidate) if way == "TR" else (candidate, query)
                with torch.inference_mode():
                    states = model.bridge.joint(model.see([paths[image]]), model.tokenize([texts[text]]))
                    logit = model.heads.match_logits(states)[0, 1]
                ranked[query, candidate] = row[candidate] + logit
        for depth in (1, 5, 10):
            right = 0
            for query, row in enumerate(ranked):
                best = row.topk(min(depth, k)).indices.tolist()
                right += any((owner[c] == query) if way == "TR" else (owner[query] == c) for c in best)
            scores[f"{way}@{depth}"] = 100 * right / len(ranked)
    return scores


def test_the_scores_are_those_of_a_loop_over_pairs(model: QFormerModel, tmp_path: Path) -> None:
    file, paths, captions = captioned(tmp_path)
    found = evaluate(plan(file, rerank=10), model, output=tmp_path / "out", progress=False)
    wanted = naive(model, paths, captions, 10)
    assert {name: found.metrics[name] for name in wanted} == pytest.approx(wanted)
    texts = [text for told in captions for text in told]
    owner = [i for i, told in enumerate(captions) for _ in told]
    alone = retrieval_recall(model.encode_image(paths), model.encode_text(texts), owner)
    for name in wanted:
        assert found.metrics[f"ITC_{name}"] == pytest.approx(alone[name])
    assert any(found.metrics[f"ITC_{name}"] != found.metrics[name] for name in wanted)
    assert found.settings["rerank"] == 10
    # What is shown first is what matching put first.
    best = {sample.id: sample.ranking[0] for sample in found.samples}
    assert found.metrics["TR@1"] == pytest.approx(
        100 * np.mean([best[f"{i}:TR"] in captions[i] for i in range(len(paths))])
    )


def test_blocks_and_folds_change_nothing_but_the_candidates(
    model: QFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fold a query's nearest are those of its fold, so each fold scores as it would alone."""
    file, _, _ = captioned(tmp_path)
    whole = evaluate(plan(file, rerank=3, protocol="expected-5fold"), model, output=tmp_path / "a", progress=False)
    lines = file.read_text().splitlines(keepends=True)
    alone = []
    for fold in range(5):
        part = tmp_path / f"fold{fold}.jsonl"
        part.write_text("".join(lines[3 * fold : 3 * fold + 3]))
        alone.append(evaluate(plan(part, rerank=3), model, output=tmp_path / f"f{fold}", progress=False).metrics)
    for name, value in whole.metrics.items():
        assert value == pytest.approx(np.mean([one[name] for one in alone])), name
    monkeypatch.setattr("vlm.evaluation.retrieving.BLOCK", 1)
    blocks = evaluate(plan(file, rerank=3, protocol="expected-5fold"), model, output=tmp_path / "b", progress=False)
    assert blocks.metrics == pytest.approx(whole.metrics)


def test_each_pair_is_scored_once_and_each_picture_seen_twice(
    model: QFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for its embedding, once for all its pairs of both ways."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))  # another test's answers would be taken from there
    file, paths, _ = captioned(tmp_path)
    asked: list[int] = []
    seen: list[str] = []
    plain_match, plain_see = model.match_logits_of, model.see
    monkeypatch.setattr(model, "match_logits_of", lambda i, t: asked.append(len(t)) or plain_match(i, t))
    monkeypatch.setattr(model, "see", lambda images: seen.extend(images) or plain_see(images))
    evaluate(plan(file, rerank=100, also=["pessimistic"]), model, output=tmp_path / "out", progress=False)
    assert asked == [20] * len(paths)
    assert sorted(seen) == sorted([*paths, *paths])


def test_texts_of_several_pictures_are_begun_once(
    model: QFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are those of each pair alone, however many texts may be held at once; what none shares is not begun."""
    paths = pictures(tmp_path, 5)
    texts = [f"a {word} {thing}" for thing in THINGS for word in WORDS]
    wanted = [[0, 5, 7], [7, 0], [1, 2, 3, 4, 5, 6], [20], [6, 20, 0]]
    alone = [
        [model.match_each([path], [texts[n]], [[0]])[0][0] for n in numbers] for path, numbers in zip(paths, wanted)
    ]
    begun: list[int] = []
    plain = model.bridge.begin
    monkeypatch.setattr(model.bridge, "begin", lambda some: begun.append(len(some)) or plain(some))
    for most, counts in ((256, [9]), (6, [3, 3]), (1, [])):
        monkeypatch.setattr("vlm.models.qformer_model.TEXT_CHUNK", most)
        for logits, each in zip(model.match_each(paths, texts, wanted), alone, strict=True):
            torch.testing.assert_close(logits, torch.stack(each), atol=1e-5, rtol=0)
        assert begun == counts
        begun.clear()


def test_a_broken_picture_is_no_candidate(model: QFormerModel, tmp_path: Path) -> None:
    file, paths, _ = captioned(tmp_path)
    Path(paths[3]).write_bytes(b"no picture")
    found = evaluate(plan(file, rerank=4), model, output=tmp_path / "out", progress=False)
    assert [entry["id"] for entry in found.broken] == ["3:TR", "3:IR:1", "3:IR:2"]


def test_none_are_ranked_again_where_none_are_asked_for(model: QFormerModel, tmp_path: Path) -> None:
    file, paths, captions = captioned(tmp_path)
    found = evaluate(plan(file, rerank=0), model, output=tmp_path / "out", progress=False)
    assert not any(name.startswith("ITC_") for name in found.metrics)
    texts = [text for told in captions for text in told]
    owner = [i for i, told in enumerate(captions) for _ in told]
    alone = retrieval_recall(model.encode_image(paths), model.encode_text(texts), owner)
    assert found.metrics["rsum"] == pytest.approx(alone["rsum"])


def test_the_nearest_128_are_ranked_again_where_nothing_is_said(tmp_path: Path) -> None:
    """As BLIP-2 is evaluated, on COCO and on Flickr30k."""
    assert plan(tmp_path / "none.jsonl").rerank == 128
    assert [load_benchmark(name).rerank for name in ("coco_retrieval", "flickr30k_retrieval")] == [128, 128]
    asked: list[int] = []
    of_images, of_texts = rerank(
        torch.rand(2, 200), lambda _, texts: asked.append(len(texts)) or torch.rand(len(texts))
    )
    assert (of_images != OUTSIDE).sum(1).tolist() == [128, 128]
    assert (of_texts != OUTSIDE).all()  # of two pictures each is among the nearest
    assert asked == [200, 200]


def test_logits_that_are_not_finite_are_an_error_in_words() -> None:
    similarity = torch.rand(3, 4)
    with pytest.raises(VlmError, match=r"image 1 and text \d is not finite"):
        rerank(similarity, lambda image, texts: torch.full((len(texts),), float("nan") if image == 1 else 0.5), 2)
    pairs = Pairs()
    pairs.note(torch.tensor([0, 1]), torch.tensor([2, 2]))
    assert pairs.by_image() == [(0, [2]), (1, [2])]
    pairs.tell(0, [2], torch.tensor([1.5]))
    assert pairs.logits(torch.tensor([0]), torch.tensor([2])).tolist() == [1.5]
    with pytest.raises(VlmError, match="image 0 and text 3"):  # one that was never noted
        pairs.logits(torch.tensor([0]), torch.tensor([3]))
