"""Loss masks exact to the token: decoding the trained tokens gives what the assistant said, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHATML, tiny_tokenizer

from vlm.data.conversation import (
    IMAGE_SLOT,
    TEMPLATES,
    TokenizedText,
    fit_prompt,
    resolve_template,
    tokenize_conversation,
    tokenize_prompt_and_text,
)
from vlm.data.packing import IGNORE, build_row, concatenate, expand_slots, truncate
from vlm.data.records import Message
from vlm.errors import VlmError

TURNS = [
    Message("user", "<image>\nwhat color is it?"),
    Message("assistant", "it is red."),
    Message("user", "and the shape?"),
    Message("assistant", "a circle"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from vlm.backbones.language import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder, chat_template=CHATML)
    return load_tokenizer(str(folder), "test")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("plain", ["it is red.\n", "a circle\n"]),
        ("vicuna_v1", ["it is red.</s>", "a circle</s>"]),
        ("chatml", ["it is red.<|im_end|>", "a circle<|im_end|>"]),
        ("compact", ["it is red.</s>", "a circle</s>"]),
    ],
)
def test_exactly_the_assistants_words_and_end_token_are_trained(tokenizer, template, said):
    text = tokenize_conversation(TURNS, template, tokenizer)
    trained = tokenizer.decode([i for i, flag in zip(text.ids, text.trained) if flag])
    assert trained.replace(" ", "") == "".join(said).replace(" ", "")
    assert text.num_images == 1


def test_a_template_without_generation_blocks_gives_the_same_mask(tokenizer):
    """The mask found by rendering turn by turn equals the one that the marked template gives."""
    marked = TEMPLATES["compact"]
    bare = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert tokenize_conversation(TURNS, bare, tokenizer) == tokenize_conversation(TURNS, marked, tokenizer)


def test_a_prompt_is_what_comes_before_the_answer_in_training(tokenizer):
    for template in ("vicuna_v1", "chatml", "compact", "plain"):
        whole = tokenize_conversation(TURNS[:2], template, tokenizer)
        prompt = tokenize_conversation(TURNS[:1], template, tokenizer, add_generation_prompt=True)
        first = whole.trained.index(True)
        assert whole.ids[:first] == prompt.ids, template


def test_templates_that_cannot_be_used_say_why(tokenizer):
    with pytest.raises(VlmError, match="did you mean 'vicuna_v1'"):
        resolve_template("vicuna_v", tokenizer)
    with pytest.raises(VlmError, match="empty"):
        tokenize_conversation([Message("user", "  ")], "compact", tokenizer)
    rewriting = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(VlmError, match="rewrites earlier turns"):
        tokenize_conversation(TURNS, rewriting, tokenizer)


def test_a_verbatim_prompt_and_its_text_are_one_string(tokenizer):
    spaced = tokenize_prompt_and_text("a picture of", "a cat", tokenizer)
    assert spaced.ids[:1] == (IMAGE_SLOT,) or IMAGE_SLOT in spaced.ids[:2]
    decoded = tokenizer.decode([i for i in spaced.ids if i != IMAGE_SLOT], skip_special_tokens=True)
    assert decoded == "a picture of a cat"
    assert tokenize_prompt_and_text("a picture of ", "a cat", tokenizer).ids == spaced.ids


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 6), st.integers(8, 60))
def test_cutting_a_prompt_keeps_the_picture_and_the_end(before, after, tail, limit):
    ids = (*range(1, before), IMAGE_SLOT, *range(100, 100 + after), *range(200, 200 + tail))
    text = TokenizedText(ids, (False,) * len(ids))
    try:
        cut = fit_prompt(text, limit, tail)
    except VlmError:
        assert before + tail > limit
        return
    assert len(cut.ids) == min(limit, len(ids))
    assert cut.num_images == 1
    assert not tail or cut.ids[-tail:] == ids[-tail:]


def test_a_training_text_is_cut_after_splicing_and_never_through_the_picture():
    text = TokenizedText((1, IMAGE_SLOT, 2, 3, 4, 5), (False, False, False, False, True, True))
    expanded = expand_slots(text, 4)
    assert truncate(expanded, 8).ids == (1, *[IMAGE_SLOT] * 4, 2, 3, 4)
    with pytest.raises(VlmError, match="pictures do not fit"):
        truncate(expanded, 4)
    with pytest.raises(VlmError, match="nothing is left"):
        truncate(expanded, 7)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5), st.lists(st.tuples(tokens, tokens), max_size=3))
def test_every_text_of_a_shared_row_is_found_along_its_own_path(texts, more):
    """Walking from a label's position up the tree gives the text's own tokens, each at its own position."""

    def row_of(pairs):
        built = [TokenizedText((*q, *a), (False,) * len(q) + (True,) * len(a)) for q, a in pairs]
        return build_row(built, ())

    groups = [texts, more] if more else [texts]
    row = concatenate([row_of(group) for group in groups])
    ancestors = {}
    for node, parent in enumerate(row.parents):
        ancestors[node] = {node} | (ancestors[parent] if parent >= 0 else set())
    found = []
    for end in range(len(row)):
        if row.labels[end] == IGNORE:
            continue
        seen = [i for i in range(end + 1) if row.nodes[i] in ancestors[row.nodes[end]]]
        assert [row.positions[i] for i in seen] == list(range(len(seen)))
        found.append((tuple(row.ids[i] for i in seen), row.labels[end]))
    wanted = [(tuple((*q, *a)[: len(q) + k]), a[k]) for group in groups for q, a in group for k in range(len(a))]
    assert sorted(found) == sorted(wanted)
