"""Prefix language modelling splits a caption at a random word; sources are drawn by the square root of their size."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from generative_parts import generative_spec, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_sentencepiece_tokenizer
from training_parts import conversations, tiny_recipe

from vlm import VlmError
from vlm.backbones.language import load_tokenizer
from vlm.data.conversation import IMAGE_SLOT, TokenizedText, tokenize_conversation
from vlm.data.records import Message
from vlm.data.splitting import split_text
from vlm.models.build import build_model
from vlm.training.source import build_source

WORDS = st.lists(st.sampled_from(["a", "photo", "of", "sitting", "triangle"]), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_sentencepiece_tokenizer(folder)
    return load_tokenizer(str(folder), "test")


def caption(words: list[str], tokenizer: object, asked: str = "") -> TokenizedText:
    ids = tokenize_conversation(
        [Message("user", f"<image>\n{asked}".strip()), Message("assistant", " ".join(words))], "blip2_t5", tokenizer
    )
    return TokenizedText(ids.ids[ids.ids.index(IMAGE_SLOT) :], ids.trained[ids.ids.index(IMAGE_SLOT) :])


@settings(max_examples=40, deadline=None)
@given(words=WORDS, place=st.integers(0, 10**9))
def test_a_caption_is_split_between_two_of_its_words(tokenizer: object, words: list[str], place: int) -> None:
    text = caption(words, tokenizer)
    split = split_text(text, tokenizer, (place, 0))
    assert split == split_text(text, tokenizer, (place, 0))
    assert split.ids == text.ids
    given_part = [i for i, before, after in zip(text.ids, text.trained, split.trained) if before and not after]
    learned = [i for i, after in zip(text.ids, split.trained) if after]
    said = tokenizer.decode(given_part).split(), tokenizer.decode(learned).split()  # type: ignore[attr-defined]
    assert said[0] + said[1] == words
    assert said[1]
    assert bool(said[0]) == (len(words) > 1)


def test_every_place_between_words_is_drawn(tokenizer: object) -> None:
    text = caption(["a", "photo", "of", "a", "triangle"], tokenizer)
    drawn = Counter(sum(split_text(text, tokenizer, (place, 0)).trained) for place in range(400))
    assert len(drawn) == 4
    assert min(drawn.values()) > 60


def test_an_answer_is_not_split(tokenizer: object) -> None:
    text = caption(["a", "photo", "of", "it"], tokenizer, asked="what is it?")
    assert split_text(text, tokenizer, (3, 0)) == text


def test_the_encoder_reads_the_first_part_and_the_decoder_learns_the_rest(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    spec = generative_spec(tiny_folder, "t5", template="blip2_t5", split_captions=True)
    model = build_model(spec, ["bridge.*"], device="cpu", precision="fp32")
    texts = [model.tokenize(model.caption_messages("a photo of a cat on a chair"))]
    paths = pictures(tmp_path, 1)
    whole = model.collate([(texts, paths)])
    parts = [model.collate([(texts, paths)], [place]) for place in range(20)]
    assert len({part.ids.shape[1] for part in parts}) > 1
    for part in parts:
        assert part.ids.shape[1] > whole.ids.shape[1]
        length = part.ids.shape[1] - whole.ids.shape[1]
        assert part.labels[0].tolist() == whole.labels[0, length:].tolist()
        assert part.ids[0, model.image_tokens : -1].tolist() == whole.labels[0, :length].tolist()
    asked = [model.tokenize(model.question_messages("what is it?", "a cat on a chair"))]
    assert model.collate([(asked, paths)], [1]).ids.shape == model.collate([(asked, paths)]).ids.shape


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("t5", {"template": "blip2_opt"}, r"blip2_opt is for a decoder-only model.*is an encoder-decoder"),
        ("t5", {"template": "instructblip"}, r"instructblip is for a decoder-only model"),
        ("opt", {"template": "blip2_t5"}, r"blip2_t5 is for an encoder-decoder.*is decoder-only"),
        ("opt", {"template": "blip2_opt", "split_captions": True}, r"split_captions: only an encoder-decoder"),
    ],
)
def test_the_other_kind_of_language_model_is_refused(
    tiny_folder: Callable[..., Path], kind: str, options: dict, error: str
) -> None:
    with pytest.raises(VlmError, match=error):
        build_model(generative_spec(tiny_folder, kind, **options), device="cpu", precision="fp32")


def test_sources_are_drawn_from_by_the_root_of_their_size(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    files = [conversations(tmp_path / name, count) for name, count in (("large", 64), ("small", 4))]
    recipe = tiny_recipe(tiny_folder, files[0], tmp_path / "run")
    (first,) = recipe.data.train
    first = first.model_copy(update={"share_image": False})
    second = first.model_copy(update={"dataset": str(files[1]), "images": str(files[1].parent)})
    section = recipe.data.model_copy(update={"train": [first, second], "sampling": "sqrt", "cache_features": False})
    model = build_model(recipe.model, recipe.trainable, "cpu", "fp32")
    source = build_source(model, section, 0, print)
    drawn = Counter(part for step in range(100) for part, _ in source.order.batch(step, 10))
    assert drawn[0] / drawn[1] == pytest.approx(8 / 2, rel=0.05)  # roots of 64 and 4
    weighted = section.model_copy(update={"train": [s.model_copy(update={"weight": 1.0}) for s in section.train]})
    with pytest.raises(VlmError, match=r"sampling: sqrt: leave out the weights"):
        build_source(model, weighted, 0, print)
