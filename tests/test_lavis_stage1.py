"""The Q-Former's first stage gives LAVIS' numbers on LAVIS' weights, for every bundle `$VLM_ORACLES/lavis/stage1_*`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lavis_bundles import Bundle, bundles
from torch import Tensor

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import from_lavis, to_lavis
from vlm.errors import VlmError

STATES = 1e-4  # hidden states and logits


@pytest.fixture(params=bundles("stage1"), scope="module")
def bundle(request: pytest.FixtureRequest) -> Bundle:
    folder: Path = request.param
    return Bundle(folder)


@pytest.fixture
def parts(bundle: Bundle) -> Iterator[tuple[QFormer, QFormerHeads]]:
    with torch.no_grad():
        yield bundle.qformer()


def close(found: Tensor, wanted: Tensor, tolerance: float = STATES) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def test_every_key_has_a_name_both_ways(bundle: Bundle) -> None:
    """There and back again, the tied copies and the buffer included."""
    back = to_lavis(from_lavis(bundle.weights))
    assert back.keys() == bundle.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in bundle.weights.items())


def test_a_strange_key_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(VlmError, match=r"no place for the key Qformer.bert.pooler.dense.weight"):
        from_lavis({**bundle.weights, "Qformer.bert.pooler.dense.weight": torch.zeros(1)})
    untied = {**bundle.weights, "Qformer.cls.predictions.decoder.bias": torch.zeros(1)}
    with pytest.raises(VlmError, match="tied"):
        from_lavis(untied)


def test_queries_alone(bundle: Bundle, parts: tuple[QFormer, QFormerHeads]) -> None:
    """Every layer's states, the keys and values that are kept, and the embeddings."""
    bridge, heads = parts
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output[0])) for layer in bridge.layers]
    normed: list[Tensor] = []
    layer = bridge.layers[0].cross_attention.key
    hooks.append(layer.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0])))
    output = bridge.queries(bridge.image(bundle.inputs["image_tokens"]))
    for hook in hooks:
        hook.remove()
    want = bundle.expected
    close(normed[0], want["ln_vision_out"])
    close(torch.stack(seen), want["query_hidden_states"][1:])
    close(output.states, want["query_output"])
    close(output.keys_values[-1][0], want["past_key_last_layer"])
    close(output.keys_values[-1][1], want["past_value_last_layer"])
    close(heads.embed_queries(output.states), want["image_feats"])


def test_texts_alone(bundle: Bundle, parts: tuple[QFormer, QFormerHeads]) -> None:
    bridge, heads = parts
    texts, want = bundle.texts, bundle.expected
    states = bridge.text(texts)
    close(states[texts.mask], want["text_hidden"][:, : states.shape[1]][texts.mask])
    first = bridge.first_text_state(texts)
    close(first, states[:, 0], 1e-5)
    close(heads.embed_text(first), want["text_feat"])


def test_queries_and_texts_that_see_each_other(bundle: Bundle, parts: tuple[QFormer, QFormerHeads]) -> None:
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


def test_texts_behind_the_queries(bundle: Bundle, parts: tuple[QFormer, QFormerHeads]) -> None:
    bridge, heads = parts
    assert bridge.embeddings is not None
    texts, want = bundle.texts.with_first(bundle.config["token_ids"]["dec_bos"]), bundle.expected
    states = bridge.causal(bridge.queries(bridge.image(bundle.inputs["image_tokens"])), texts)
    width = texts.ids.shape[1]
    close(states, want["lm_hidden"][:, :width][texts.mask])
    close(heads.words(states, bridge.embeddings.words.weight), want["lm_logits"][:, :width][texts.mask])
