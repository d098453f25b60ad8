"""The Q-Former's first stage gives LAVIS' numbers on LAVIS' weights, for every bundle `$VLM_ORACLES/lavis/stage1_*`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lavis_bundles import FirstStage, bundles, reading, stage_one
from torch import Tensor

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import from_lavis, to_lavis
from vlm.bridges.qformer_states import ImageKeysValues, QueryStates
from vlm.data.text_batch import TextBatch
from vlm.errors import VlmError
from vlm.evaluation.reranking import rerank
from vlm.models.qformer_generation import generate_ids
from vlm.objectives.itm import draw_negatives, itm_loss
from vlm.objectives.lm import cross_entropy_sum
from vlm.objectives.query_itc import query_itc_loss, query_similarity

STATES = 1e-4  # hidden states and logits


@pytest.fixture(params=bundles("stage1"))
def bundle(request: pytest.FixtureRequest) -> Iterator[FirstStage]:
    with reading(FirstStage(request.param), request.node.originalname) as bundle:
        yield bundle


@pytest.fixture
def parts(bundle: FirstStage) -> Iterator[tuple[QFormer, QFormerHeads]]:
    with torch.no_grad():
        yield bundle.qformer()


def close(found: Tensor, wanted: Tensor, tolerance: float = STATES) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def test_every_key_has_a_name_both_ways(bundle: FirstStage) -> None:
    """There and back again, the tied copies and the buffer included."""
    back = to_lavis(from_lavis(bundle.weights))
    assert back.keys() == bundle.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in bundle.weights.items())


def test_a_strange_key_is_an_error(bundle: FirstStage) -> None:
    with pytest.raises(VlmError, match=r"no place for the key Qformer.bert.pooler.dense.weight"):
        from_lavis({**bundle.weights, "Qformer.bert.pooler.dense.weight": torch.zeros(1)})
    untied = {**bundle.weights, "Qformer.cls.predictions.decoder.bias": torch.zeros(1)}
    with pytest.raises(VlmError, match="tied"):
        from_lavis(untied)


def test_queries_alone(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """Every layer's states, the keys and values that are kept, and the embeddings."""
    bridge, heads = parts
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output[0][0])) for layer in bridge.layers]
    normed: list[Tensor] = []
    layer = bridge.layers[0].cross_attention.key
    hooks.append(layer.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0])))
    output = bridge.queries(bridge.image(bundle.inputs["image_tokens"]))
    for hook in hooks:
        hook.remove()
    want = bundle.expected
    close(normed[0], want["ln_vision_out"])
    close(torch.stack(seen).unflatten(1, (-1, bridge.num_queries)), want["query_hidden_states"][1:])
    close(output.states, want["query_output"])
    close(output.keys_values[-1][0], want["past_key_last_layer"])
    close(output.keys_values[-1][1], want["past_value_last_layer"])
    close(heads.embed_queries(output.states), want["image_feats"])


def test_texts_alone(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    bridge, heads = parts
    texts, want = bundle.texts, bundle.expected
    states = bridge.text(texts)
    close(states[texts.mask], want["text_hidden"][:, : states.shape[1]][texts.mask])
    first = bridge.first_text_state(texts)
    close(first, states[:, 0], 1e-5)
    close(heads.embed_text(first), want["text_feat"])


def test_queries_and_texts_that_see_each_other(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """The three kinds of pairs with the negatives of the bundle."""
    bridge, heads = parts
    texts, want, count = bundle.texts, bundle.expected, bundle.sizes.num_queries
    image = bridge.image(bundle.inputs["image_tokens"])
    wrong_images, wrong_texts = (bundle.inputs[f"neg_{kind}_idx"].tolist() for kind in ("image", "text"))
    pairs = [(image, texts), (image.select(wrong_images), texts), (image, texts.select(wrong_texts))]
    size = len(texts)
    for number, (images, captions) in enumerate(pairs):
        rows = slice(number * size, (number + 1) * size)
        queries, states = bridge.joint_with_text(images, captions)
        hidden, mask = want["itm_hidden"][rows], captions.mask
        close(queries, hidden[:, :count])
        close(states[mask], hidden[:, count : count + mask.shape[1]][mask])
        close(bridge.joint(images, captions), queries, 1e-5)
        close(heads.match_logits(queries), want["itm_logits"][rows])


def test_texts_behind_the_queries(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    bridge, heads = parts
    assert bridge.embeddings is not None
    texts, want = bundle.texts.with_first(bundle.config["token_ids"]["dec_bos"]), bundle.expected
    states = bridge.causal(bridge.queries(bridge.image(bundle.inputs["image_tokens"])), texts)
    width = texts.ids.shape[1]
    close(states, want["lm_hidden"][:, :width][texts.mask])
    close(heads.words(states, bridge.embeddings.words.weight), want["lm_logits"][:, :width][texts.mask])


def test_features_and_matches_of_whole_texts(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """LAVIS' `extract_features` on texts that are not cut, its Blip2ITM, and every picture with several texts."""
    bridge, heads = parts
    want, image = bundle.expected, bridge.image(bundle.inputs["image_tokens"])
    whole = TextBatch.from_mask(bundle.inputs["rerank_input_ids"], bundle.inputs["rerank_attention_mask"])
    texts = whole.select(range(len(image)))
    close(heads.embed_queries(bridge.queries(image).states), want["extract_image_embeds_proj"])
    close(heads.embed_text(bridge.text(texts))[texts.mask], want["extract_text_embeds_proj"][texts.mask])
    close(bridge.joint(image, texts), want["extract_multimodal_embeds"])
    cut = bundle.texts
    close(heads.match_logits(bridge.joint(image, cut)), want["blip2itm_itm_logits"])
    points = heads.embed_queries(bridge.queries(image).states)
    cosines = query_similarity(points, heads.embed_text(bridge.first_text_state(cut)))
    close(cosines.diagonal()[:, None], want["blip2itm_itc"])
    rows, columns = want["itm_grid_4x4"].shape
    slots = [row for row in range(rows) for _ in range(columns)]
    logits = heads.match_logits(bridge.pairs(image, slots, cut.select(list(range(columns)) * rows)))
    close(logits[:, 1].view(rows, columns), want["itm_grid_4x4"])


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES, GRADIENTS = 5e-6, 1e-3


def pairs_of(
    bundle: FirstStage, bridge: QFormer, heads: QFormerHeads
) -> tuple[Tensor, Tensor, QueryStates, ImageKeysValues]:
    image = bridge.image(bundle.inputs["image_tokens"])
    queries = bridge.queries(image)
    first = bridge.first_text_state(bundle.texts)
    return heads.embed_queries(queries.states), heads.embed_text(first), queries, image


def losses_of(bundle: FirstStage, bridge: QFormer, heads: QFormerHeads) -> dict[str, Tensor]:
    """The three losses with the bundle's negatives."""
    assert bridge.embeddings is not None
    points, texts, queries, image = pairs_of(bundle, bridge, heads)
    size, smoothing = len(texts), bundle.config["label_smoothing"]
    itc = query_itc_loss(points, texts, 1 / heads.temperature, smoothing=smoothing) / size
    wrong_images, wrong_texts = (bundle.inputs[f"neg_{kind}_idx"].tolist() for kind in ("image", "text"))
    right = heads.match_logits(bridge.joint(image, bundle.texts))
    wrong = [
        heads.match_logits(bridge.joint(image.select(wrong_images), bundle.texts)),
        heads.match_logits(bridge.joint(image, bundle.texts.select(wrong_texts))),
    ]
    itm = itm_loss(right, torch.cat(wrong))[0] / (3 * size)
    said, labels = bundle.texts.with_first(bundle.config["token_ids"]["dec_bos"]), bundle.texts.next_tokens()
    words = bridge.embeddings.words.weight
    states = bridge.causal(queries, said.without_last())
    lm = cross_entropy_sum(states, labels, lambda s: heads.words(s, words), smoothing=smoothing)[0] / len(labels)
    return {"loss": itc + itm + lm, "loss_itc": itc, "loss_itm": itm, "loss_lm": lm}


def test_similarities_and_what_negatives_are_drawn_from(
    bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]
) -> None:
    """The weights of the repository's head: positives masked before the softmax, with and without picture ids."""
    points, texts, _, _ = pairs_of(bundle, *parts)
    want = bundle.expected
    logits = query_similarity(points, texts) / parts[1].temperature
    close(logits, want["sim_i2t"])
    close(logits.T, want["sim_t2i"])
    ids = bundle.inputs["image_ids"].flatten()
    alone, shared = torch.eye(len(ids), dtype=torch.bool), ids[:, None] == ids
    for name, rows, belong in (
        ("neg_weights_i2t_head", logits, alone),
        ("neg_weights_t2i_head", logits.T, alone),
        ("head_neg_weights_i2t_with_image_id", logits, shared),
        ("head_neg_weights_t2i_with_image_id", logits.T, shared),
    ):
        # Inverting the distribution at evenly spread numbers draws each candidate as often as its weight says.
        steps = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        for row in range(len(ids)):
            drawn = draw_negatives(rows[[row]].expand(1000, -1), belong[[row]].expand(1000, -1), steps)
            close(drawn.bincount(minlength=len(ids)) / 1000, want[name][row], 2e-3)


def test_losses_and_gradients(bundle: FirstStage) -> None:
    """ITC, ITM, LM and their sum, and every gradient of ordinary autograd (`grad_full`)."""
    bridge, heads = bundle.qformer()
    losses = losses_of(bundle, bridge, heads)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(bundle.told[name], abs=LOSSES), name
    losses["loss"].backward()
    named = {f"bridge.{n}": p.grad for n, p in bridge.named_parameters()}
    named |= {f"heads.{n}": p.grad for n, p in heads.named_parameters()}
    assert [name for name, gradient in named.items() if gradient is None] == bundle.told["no_grad_params"]
    found = to_lavis({name: gradient for name, gradient in named.items() if gradient is not None})
    compared = 0
    for key in bundle.expected:
        if key.startswith("grad_full/"):
            gradient, wanted = found[key.removeprefix("grad_full/")], bundle.expected[key]
            assert (gradient - wanted).norm() <= GRADIENTS * wanted.norm(), key
            compared += 1
    for key, norm in bundle.told["grad_norms_full"].items():
        if not key.endswith(".key.bias"):  # zero up to rounding
            assert found[key].norm().item() == pytest.approx(norm, rel=GRADIENTS), key
            compared += 1
    assert compared > 50


def test_gradients_of_each_loss_alone(bundle: FirstStage) -> None:
    bridge, heads = bundle.qformer()
    parameters = {f"bridge.{n}": p for n, p in bridge.named_parameters()}
    parameters |= {f"heads.{n}": p for n, p in heads.named_parameters()}
    losses = losses_of(bundle, bridge, heads)
    for name, told in bundle.told["grad_norms_by_loss_full"].items():
        gradients = torch.autograd.grad(losses[name], list(parameters.values()), retain_graph=True, allow_unused=True)
        found = to_lavis({key: g for key, g in zip(parameters, gradients) if g is not None})
        for key, norm in told.items():
            assert (found[key].norm().item() if key in found else 0.0) == pytest.approx(norm, rel=GRADIENTS), (
                name,
                key,
            )


def test_contrast_that_knows_which_pictures_are_the_same(bundle: FirstStage) -> None:
    bridge, heads = bundle.qformer()
    points, texts, _, _ = pairs_of(bundle, bridge, heads)
    ids = bundle.inputs["image_ids"].flatten()
    loss = query_itc_loss(points, texts, 1 / heads.temperature, ids, bundle.config["label_smoothing"]) / len(texts)
    assert loss.item() == pytest.approx(bundle.told["head_loss_itc_with_image_id"], abs=LOSSES)


# --- generation -------------------------------------------------------------------------------------------------------


def test_generated_ids(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """Greedy as LAVIS says it; beams by the rule of transformers 5."""
    bridge, heads = parts
    settings, ids = bundle.config["generate"], bundle.config["token_ids"]
    queries = bridge.queries(bridge.image(bundle.inputs["image_tokens"]))
    prompt = torch.full((len(queries.states), 1), ids["dec_bos"])

    def generated(**options: Any) -> list[list[int]]:
        found = generate_ids(
            bridge, heads.words, queries, prompt, ids["sep"], ids["pad"], max_length=settings["max_length"], **options
        )
        return [[i for i in row if i != ids["pad"]] for row in found.tolist()]

    for minimum in settings["min_length"]:
        suffix = "" if minimum <= 1 else f"_minlen{minimum}"
        greedy = [[i for i in row if i != ids["pad"]] for row in bundle.expected[f"greedy{suffix}_ids"].tolist()]
        assert generated(min_length=minimum) == greedy
        for beams in settings["num_beams"]:
            if beams > 1:
                wanted = bundle.beams[f"beam{beams}{suffix}"]
                options = {name: settings[name] for name in ("length_penalty", "early_stopping")}
                assert generated(num_beams=beams, min_length=minimum, **options) == wanted["ids"]


def test_texts_and_captions_as_words(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """Texts become the bundle's ids, ids LAVIS' captions, and the model says its greedy ones."""
    model = stage_one(bundle, *parts)
    tokenizer, config = model.tokenizer, bundle.config
    for limit, texts, mask, told in (
        (config["max_txt_len"], "input_ids", "attention_mask", config["texts"]),
        (config["rerank_text_len"], "rerank_input_ids", "rerank_attention_mask", config["rerank_texts"]),
    ):
        wanted, found = TextBatch.from_mask(bundle.inputs[texts], bundle.inputs[mask]), tokenizer(told, limit)
        assert torch.equal(found.ids, wanted.ids)
        assert found.lengths == wanted.lengths
    for key in bundle.told:
        if key.startswith("caption_"):
            rows = bundle.expected[f"{key.removeprefix('caption_')}_ids"].tolist()
            assert [tokenizer.decode(row) for row in rows] == bundle.told[key]
    settings = config["generate"]
    for minimum in settings["min_length"]:
        wanted = bundle.told["caption_greedy" if minimum <= 1 else f"caption_greedy_minlen{minimum}"]
        images = list(range(len(wanted)))
        found = model.caption(images, num_beams=1, max_length=settings["max_length"], min_length=minimum)
        assert found == wanted


def test_reranked_retrieval(bundle: FirstStage, parts: tuple[QFormer, QFormerHeads]) -> None:
    """Both directions, and no pair is scored twice."""
    bridge, heads = parts
    texts = TextBatch.from_mask(bundle.inputs["rerank_input_ids"], bundle.inputs["rerank_attention_mask"])
    image = bridge.image(bundle.inputs["image_tokens"])
    points = heads.embed_queries(bridge.queries(image).states)
    similarity = query_similarity(points, heads.embed_text(bridge.first_text_state(texts)))
    close(similarity, bundle.expected["rerank_sims"])
    scored: list[tuple[int, int]] = []

    def score(number: int, wanted: list[int]) -> Tensor:
        scored.extend((number, text) for text in wanted)
        return heads.match_logits(bridge.joint(image.select([number]), texts.select(wanted)))[:, 1]

    assert bundle.told["rerank_k"] == bundle.config["rerank_k"]
    of_images, of_texts = rerank(similarity, score, bundle.told["rerank_k"])
    close(of_images, bundle.expected["rerank_i2t"])
    close(of_texts, bundle.expected["rerank_t2i"])
    assert len(scored) == len(set(scored))
