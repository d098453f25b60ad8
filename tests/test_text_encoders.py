"""One protocol for every text encoder; pooling is the checkpoint's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import tiny_bert, tiny_hf_image_model, tiny_language_model, tiny_open_clip_model

from vlm.backbones.starter import minilm_folder
from vlm.backbones.text import TextEncoder, build_text_encoder
from vlm.errors import VlmError

TEXTS = ["a cat", "a photo of a red cat sitting on a chair", "blue"]


@pytest.fixture(scope="module")
def name_of(tiny_folder: Callable[..., Path]) -> Callable[[str], str]:
    def name(kind: str) -> str:
        if kind == "bert":
            return f"hf:{tiny_folder(tiny_bert)}"
        if kind == "open_clip":
            return f"open_clip:vlm-test-ViT/{tiny_folder(tiny_open_clip_model) / 'open_clip.pt'}"
        return f"hf:{tiny_folder(tiny_hf_image_model, kind)}"

    return name


KINDS = ["bert", "clip", "siglip", "open_clip"]


@pytest.fixture(scope="module")
def build(name_of: Callable[[str], str]) -> Callable[[str], TextEncoder]:
    return lambda kind: build_text_encoder(name_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_as_announced(build, kind):
    encoder = build(kind)
    batch = encoder.tokenize(TEXTS)
    features = encoder(**batch)
    assert batch["ids"].shape == batch["mask"].shape
    assert features.tokens.shape == (*batch["ids"].shape, encoder.width)
    assert features.pooled.shape == (3, encoder.pooled_width)
    assert features.pooled.isfinite().all()
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.train().training


@pytest.mark.parametrize("kind", KINDS)
def test_alone_or_in_a_batch_is_the_same(build, kind):
    encoder = build(kind)
    together = encoder(**encoder.tokenize(TEXTS)).pooled
    alone = torch.cat([encoder(**encoder.tokenize([text])).pooled for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut_at_the_context(build, kind):
    encoder = build(kind)
    batch = encoder.tokenize(["cat " * 200, "cat"])
    assert batch["ids"].shape[1] == encoder.context_length
    assert encoder(**batch).pooled.isfinite().all()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pooled_is_the_embedding_of_the_whole_checkpoint(build, name_of, kind):
    encoder = build(kind)
    whole = transformers.AutoModel.from_pretrained(name_of(kind).removeprefix("hf:"))
    batch = encoder.tokenize(TEXTS)
    mask = {"attention_mask": batch["mask"]} if kind == "clip" else {}
    expected = whole.get_text_features(batch["ids"], **mask).pooler_output
    torch.testing.assert_close(encoder(**batch).pooled, expected, atol=1e-5, rtol=1e-5)


def test_pooled_is_the_embedding_of_open_clip(build, name_of):
    import open_clip

    arch, _, checkpoint = name_of("open_clip").removeprefix("open_clip:").partition("/")
    whole = open_clip.create_model(arch, pretrained=checkpoint).eval()
    encoder = build("open_clip")
    batch = encoder.tokenize(TEXTS)
    ids = open_clip.get_tokenizer(arch)(TEXTS)
    assert batch["ids"].shape[1] == 12 < ids.shape[1]  # no padding behind the longest text
    torch.testing.assert_close(encoder(**batch).pooled, whole.encode_text(ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch["mask"].sum(1), torch.tensor([4, 12, 3]))  # start, words, end


def test_the_padding_id_within_a_text_is_a_token(build):
    """CLIP's id 0 is padding behind a text and an exclamation mark in one."""
    encoder = build("open_clip")
    batch = encoder.tokenize(["!%"])
    assert (batch["ids"] == 0).any()
    assert batch["mask"].all()
    assert batch["ids"][0, -1] == batch["ids"].max()  # the end-of-text token is still there


def test_bert_pools_its_first_token(build):
    encoder = build("bert")
    features = encoder(**encoder.tokenize(TEXTS))
    assert torch.equal(features.pooled, features.tokens[:, 0])


@pytest.mark.parametrize("mode", ["mean_tokens", "max_tokens", "cls_token"])
def test_pooling_follows_the_sentence_transformers_configuration(tmp_path, mode):
    folder = tiny_bert(tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    config = {f"pooling_mode_{name}": name == mode for name in ("mean_tokens", "max_tokens", "cls_token")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    encoder = build_text_encoder(f"hf:{folder}")
    assert encoder.context_length == 20
    batch = encoder.tokenize(TEXTS)
    features = encoder(**batch)
    for tokens, mask, pooled in zip(features.tokens, batch["mask"], features.pooled):
        words = tokens[mask.bool()]  # [T, D]
        expected = {"mean_tokens": words.mean(0), "max_tokens": words.amax(0), "cls_token": words[0]}[mode]
        torch.testing.assert_close(pooled, expected)


def test_pooling_that_is_not_supported_is_named(tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(VlmError, match="lasttoken"):
        build_text_encoder(f"hf:{folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("starter:minilm", "did you mean 'minilm-l6'"),
        ("timm:resnet50", "unknown source 'timm'"),
        ("open_clip:ViT-B-32/openia", "did you mean 'openai'"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, message):
    with pytest.raises(VlmError, match=message):
        build_text_encoder(name)


def test_a_language_model_is_no_text_encoder(tiny_folder):
    with pytest.raises(VlmError, match="no text encoder can be made of a 'opt' model"):
        build_text_encoder(f"hf:{tiny_folder(tiny_language_model, 'opt')}")


@pytest.mark.starter
def test_minilm_puts_paraphrases_together_and_equals_pooling_by_hand():
    encoder = build_text_encoder("starter:minilm-l6")
    assert (encoder.width, encoder.pooled_width, encoder.context_length) == (384, 384, 256)
    texts = ["A man is playing a guitar.", "Someone plays the guitar", "The stock market fell sharply today."]
    pooled = encoder(**encoder.tokenize(texts)).pooled
    similarity = torch.nn.functional.cosine_similarity(pooled[0:1], pooled)
    assert similarity[1] > 0.8
    assert similarity[2] < 0.2
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    model = transformers.AutoModel.from_pretrained(minilm_folder())
    for text, mine in zip(texts, pooled):
        tokens = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(mine, tokens.mean(0), atol=1e-5, rtol=1e-5)
