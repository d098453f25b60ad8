"""The Q-Former bridge: BERT's weights, masks, packing, shared keys and values, sizes, bad input."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import randomize, tiny_bert, tiny_hf_image_model

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_init import build_qformer, qformer_tokenizer
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.text_batch import TextBatch
from vlm.errors import VlmError
from vlm.model_spec import QFormerBridgeSpec
from vlm.schema import validate

SIZES = QFormerSizes(width=24, layers=3, heads=2, ffn=40, num_queries=5, image_width=20, vocabulary=50, positions=16)
BLIP2 = QFormerSizes(768, 12, 12, 3072, 32, 1408, 30523, 512)


def random_qformer(sizes: QFormerSizes = SIZES, dtype: torch.dtype = torch.float64) -> QFormer:
    return randomize(QFormer(sizes)).to(dtype)  # type: ignore[return-value]


def image_tokens(count: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 7, SIZES.image_width, generator=torch.Generator().manual_seed(1)).to(dtype)


def text_batch(*lengths: int) -> TextBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    return TextBatch.of([torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths])


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_published_sizes_to_the_unit() -> None:
    """LAVIS' counts: the Q-Former with its tied word head, everything stage 1 trains, and stage 2's Q-Former."""
    with torch.device("meta"):
        bridge, heads = QFormer(BLIP2), QFormerHeads(768, 30523, 256)
        bare = QFormer(QFormerSizes(768, 12, 12, 3072, 32, 1408, 0, 512))
    outside = parameters(bridge.image_norm) + bridge.query_tokens.numel()
    assert parameters(bridge, heads.words) - outside == 186_282_811
    assert parameters(bridge, heads) == 186_705_470
    assert parameters(bare) - outside == 105_137_664


def test_one_pass_with_a_block_mask_equals_the_cached_path() -> None:
    """Queries and text in one sequence, where queries see queries and text sees all queries and its past."""
    bridge, texts = random_qformer(), text_batch(4, 7, 1)
    image, count, length = bridge.image(image_tokens()), SIZES.num_queries, texts.ids.shape[1]
    block = torch.ones(count + length, count + length, dtype=torch.bool).tril()
    block[:count, :count] = True
    queries, states = bridge.joint_with_text(image, texts, block[None, None])
    alone = bridge.queries(image)
    torch.testing.assert_close(queries, alone.states, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts.pack(states), bridge.causal(alone, texts), atol=1e-6, rtol=0)


def test_one_token_at_a_time_equals_the_whole_text() -> None:
    bridge, texts = random_qformer(), text_batch(5, 5, 5)
    queries = bridge.queries(bridge.image(image_tokens()))
    prefixes, steps = [tuple(t.expand(3, -1, -1, -1) for t in kv) for kv in queries.keys_values], []
    for position in range(5):
        states, new = bridge.next_states(texts.ids[:, position], position, prefixes)  # type: ignore[arg-type]
        prefixes = [tuple(torch.cat(pair, 2) for pair in zip(old, own)) for old, own in zip(prefixes, new)]
        steps.append(states)
    torch.testing.assert_close(torch.stack(steps, 1).flatten(0, 1), bridge.causal(queries, texts))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=2, max_size=5))
def test_texts_alone_or_together_are_the_same(lengths: list[int]) -> None:
    """Padding changes nothing in any pass, whatever the lengths."""
    bridge, texts = random_qformer(), text_batch(*lengths)
    image = bridge.image(image_tokens(len(lengths)))
    queries = bridge.queries(image)
    together = [bridge.first_text_state(texts), bridge.joint(image, texts), bridge.causal(queries, texts)]
    one_by_one: list[list[torch.Tensor]] = [[], [], []]
    for row in range(len(lengths)):
        text, alone = texts.select([row]), image.select([row])
        one_by_one[0].append(bridge.first_text_state(text))
        one_by_one[1].append(bridge.joint(alone, text))
        one_by_one[2].append(bridge.causal(queries.select([row]), text))
    for whole, parts in zip(together, one_by_one):
        torch.testing.assert_close(whole, torch.cat(parts), atol=1e-10, rtol=0)


def test_many_texts_of_one_image_share_its_keys_and_values() -> None:
    """m texts an image give what each pair gives alone, and the image is projected once."""
    bridge, texts = random_qformer(), text_batch(3, 5, 2, 4, 6, 1)
    image = bridge.image(image_tokens(2))
    shared = bridge.joint(image, texts)
    pairs = [bridge.joint(image.select([row // 3]), texts.select([row])) for row in range(6)]
    torch.testing.assert_close(shared, torch.cat(pairs), atol=1e-10, rtol=0)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("layers", [1, 4])
def test_texts_begun_once_give_several_images_the_same(layers: int, every: int) -> None:
    """And go through the first layer's self-attention and feed-forward net no more."""
    bridge = random_qformer(replace(SIZES, layers=layers, cross_attention_every=every)).eval()
    image, texts = bridge.image(image_tokens()), text_batch(2, 5, 4, 7)
    begun = bridge.begin(texts)
    first = bridge.layers[0]
    rows: list[int] = []
    hooks = [
        part.register_forward_hook(lambda *_: rows.append(1))
        for part in (first.self_attention.query, first.self_attention.key, first.text_ffn)
    ]
    found = [bridge.joint(image.select([i]), begun.select(chosen)) for i, chosen in ((0, [1, 3]), (2, [3, 0, 2]))]
    for hook in hooks:
        hook.remove()
    assert not rows
    for states, (i, chosen) in zip(found, ((0, [1, 3]), (2, [3, 0, 2]))):
        torch.testing.assert_close(states, bridge.joint(image.select([i]), texts.select(chosen)), atol=1e-10, rtol=0)


def test_each_pass_runs_only_its_own_feed_forward() -> None:
    bridge, texts = random_qformer(), text_batch(3, 2)
    image = bridge.image(image_tokens(2))
    called: list[str] = []
    for layer in bridge.layers:
        layer.query_ffn.register_forward_hook(lambda *_: called.append("query"))
        layer.text_ffn.register_forward_hook(lambda *_: called.append("text"))
    queries = bridge.queries(image)
    assert called == ["query"] * 3
    called.clear()
    bridge.first_text_state(texts)
    bridge.causal(queries, texts)
    assert called == ["text"] * 6
    called.clear()
    bridge.joint(image, texts)  # nobody reads the text behind the last layer
    assert called.count("query") == 3
    assert called.count("text") == 2


def test_dropout_differs_between_images_and_stops_in_eval_mode() -> None:
    sizes = QFormerSizes(**{**SIZES.__dict__, "dropout": 0.3})
    bridge = random_qformer(sizes)
    image = bridge.image(image_tokens(1).expand(2, -1, -1))
    bridge.train()
    first, second = bridge.queries(image).states
    assert not torch.allclose(first, second)
    bridge.eval()
    first, second = bridge.queries(image).states
    torch.testing.assert_close(first, second)


# --- BERT's weights ---------------------------------------------------------------------------------------------------


def test_a_text_alone_gets_berts_own_states(tiny_folder: Callable[..., Path]) -> None:
    """transformers' BertModel on the same checkpoint; the first segment's embedding is part of the positions."""
    from transformers import AutoTokenizer, BertModel

    folder = tiny_folder(tiny_bert)
    spec = QFormerBridgeSpec(init=f"hf:{folder}", num_queries=4)
    bridge, _ = build_qformer(spec, image_width=20)
    words = ["a photo of a cat", "what color is the shape in the picture?"]
    texts = qformer_tokenizer(spec)(words, limit=32)
    batch = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    assert texts.ids.tolist() == batch["input_ids"].tolist()
    with torch.no_grad():
        wanted = BertModel.from_pretrained(folder)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        found = bridge.eval().text(texts)
    torch.testing.assert_close(found[texts.mask], wanted[texts.mask], atol=1e-5, rtol=0)


def test_the_start_from_bert(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Queries' feed-forward nets are copies, cross-attention is fresh, [DEC] has a row, BERT's head is used."""
    import transformers as t

    folder = tiny_folder(tiny_bert)
    masked = t.BertForMaskedLM.from_pretrained(folder)
    torch.nn.init.normal_(masked.cls.predictions.transform.dense.weight)
    masked.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bridge, heads = build_qformer(QFormerBridgeSpec(init=f"hf:{tmp_path}"), image_width=20)
    assert heads is not None
    for ours, theirs in zip(bridge.layers, masked.bert.encoder.layer):
        for ffn in (ours.query_ffn, ours.text_ffn):
            assert torch.equal(ffn.up.weight, theirs.intermediate.dense.weight)
            assert torch.equal(ffn.norm.bias, theirs.output.LayerNorm.bias)
    assert bridge.embeddings.words.weight.shape[0] == masked.config.vocab_size + 1
    assert torch.equal(heads.words.dense.weight, masked.cls.predictions.transform.dense.weight)
    assert 0.015 < bridge.layers[0].cross_attention.key.weight.std() < 0.025
    assert bridge.layers[1].cross_attention is None
    assert heads.temperature.item() == pytest.approx(0.07)


def test_stage_two_has_no_text_side(tiny_folder: Callable[..., Path]) -> None:
    bridge, heads = build_qformer(QFormerBridgeSpec(init=f"hf:{tiny_folder(tiny_bert)}"), 20, text=False)
    assert heads is None
    assert not any("text_ffn" in name or "embeddings" in name for name, _ in bridge.named_parameters())
    assert bridge.queries(bridge.image(torch.randn(2, 3, 20))).states.shape == (2, 32, bridge.width)
    with pytest.raises(VlmError, match="without its text side"):
        bridge.text(text_batch(3))


@pytest.mark.starter
def test_minilm_gives_six_layers_of_width_384() -> None:
    """Sentence-transformers' MiniLM has no word head, so that starts fresh."""
    spec = QFormerBridgeSpec(init="starter:minilm-l6")
    bridge, heads = build_qformer(spec, image_width=48)
    assert (bridge.width, len(bridge.layers), bridge.sizes.heads, bridge.sizes.ffn) == (384, 6, 12, 1536)
    assert heads is not None
    assert bridge.sizes.vocabulary == 30523 == len(heads.words.bias)
    tokenizer = qformer_tokenizer(spec)
    texts = tokenizer(["A cat.", "A dog that sleeps."], limit=6)
    assert texts.lengths == (5, 6)
    assert tokenizer.decode([tokenizer.start, *texts.ids[1].tolist()]) == "a dog that sleeps"


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_makes_no_qformer(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(VlmError, match="starts from a BERT, this is a 'vit' model"):
        build_qformer(QFormerBridgeSpec(init=f"hf:{tiny_folder(tiny_hf_image_model, 'vit')}"), 20)
    with pytest.raises(VlmError, match=r"bridge.layers: 3: .* has 2"):
        build_qformer(QFormerBridgeSpec(init=f"hf:{tiny_folder(tiny_bert)}", layers=3), 20)
    with pytest.raises(VlmError, match="did you mean"):
        build_qformer(QFormerBridgeSpec(init="starter:minilm-16"), 20)


def test_sizes_that_make_no_qformer() -> None:
    with pytest.raises(VlmError, match="num_queries"):
        validate(QFormerBridgeSpec, {"num_queries": 0}, where="recipe")
    with pytest.raises(VlmError, match="at least one query"):
        QFormer(QFormerSizes(**{**SIZES.__dict__, "num_queries": 0}))
    with pytest.raises(VlmError, match="5 heads"):
        QFormer(QFormerSizes(**{**SIZES.__dict__, "heads": 5}))


def test_inputs_that_do_not_fit() -> None:
    bridge = random_qformer()
    image = bridge.image(image_tokens(2))
    with pytest.raises(VlmError, match=r"image tokens \[B,N,20\]"):
        bridge.image(torch.zeros(2, 3, 21))
    with pytest.raises(VlmError, match="3 texts for 2 images"):
        bridge.joint(image, text_batch(1, 2, 3))
    with pytest.raises(VlmError, match="17 tokens; it takes 16"):
        bridge.text(text_batch(17))
    with pytest.raises(VlmError, match="padded on the right"):
        TextBatch.from_mask(torch.ones(1, 2, dtype=torch.long), torch.tensor([[0, 1]]))


def test_half_precision_tokens_are_normed_in_fp32() -> None:
    bridge = random_qformer(dtype=torch.float32)
    tokens = image_tokens(1, torch.float32) * 3000
    wide, half = bridge.image(tokens.half().float()).layers[0], bridge.image(tokens.half()).layers[0]
    assert wide is not None
    assert half is not None
    torch.testing.assert_close(half[0], wide[0])
