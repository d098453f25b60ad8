"""Loss masks exact to the token: decoding the trained tokens gives what the assistant said, and nothing else."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import CHATML, tiny_sentencepiece_tokenizer, tiny_tokenizer, tiny_vicuna_tokenizer

from vlm.data.conversation import (
    IMAGE_SLOT,
    TokenizedText,
    fit_prompt,
    tokenize_conversation,
    tokenize_prompt_and_text,
)
from vlm.data.packing import IGNORE, build_row, concatenate, expand_slots, truncate
from vlm.data.records import IMAGE_PLACEHOLDER, QUOTED_PLACEHOLDER, Message
from vlm.data.templates import TEMPLATES, answer_end, image_in_front, render, resolve_template
from vlm.errors import VlmError

TURNS = [
    Message("user", "<image>\nwhat color is it?"),
    Message("assistant", "it is red."),
    Message("user", "and the shape?"),
    Message("assistant", "a circle"),
]


# Llama 2's own kind of chat template: no generation blocks, the end token behind each answer.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TOKENIZERS = {
    "bytes": lambda folder: tiny_tokenizer(folder, CHATML, bos=True),
    "bytes-without-start": lambda folder: tiny_tokenizer(folder, INST, bos=False),
    "bytes-with-end": lambda folder: tiny_tokenizer(folder, CHATML, bos=False, eos=True),
    "sentencepiece": lambda folder: tiny_sentencepiece_tokenizer(folder, legacy=False),
    "sentencepiece-legacy": lambda folder: tiny_sentencepiece_tokenizer(folder, legacy=True),
    "vicuna": tiny_vicuna_tokenizer,
}
# One text behind a picture is all that BLIP-2 knows; tests/test_lavis_stage2.py holds its tokens to the authors'.
SEVERAL_TURNS = [name for name in TEMPLATES if name not in ("blip2_opt", "blip2_t5")]
ENDS = {
    "plain": "\n",
    "instructblip": "</s>",
    "minigpt4": "###",
    "vicuna_v0": "###",
    "vicuna_v1": "</s>",
    "llama_2": " </s>",
    "chatml": "<|im_end|>",
    "compact": "</s>",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from vlm.backbones.language import load_tokenizer

    loaded = {}
    for name, build in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        build(folder)
        loaded[name] = load_tokenizer(str(folder), "test")
        if not loaded[name].chat_template:
            loaded[name].chat_template = INST
    return loaded


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["bytes"]


def said_by(text, tokenizer):
    """What the trained tokens decode to, each run of them on its own."""
    runs, run = [], []
    for token, flag in [*zip(text.ids, text.trained), (0, False)]:
        if flag:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run, clean_up_tokenization_spaces=False).removeprefix(" "))
            run = []
    return runs


def end_of(template, tokenizer):
    if template == "tokenizer":
        return "</s>" if tokenizer.chat_template == INST else "<|im_end|>"
    return ENDS[template]


def test_every_template_is_tested():
    assert set(ENDS) == set(SEVERAL_TURNS)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [*SEVERAL_TURNS, "tokenizer"])
def test_exactly_the_assistants_words_and_end_token_are_trained(tokenizers, template, name):
    tokenizer = tokenizers[name]
    end = end_of(template, tokenizer)
    text = tokenize_conversation(TURNS, template, tokenizer)
    assert said_by(text, tokenizer) == ["it is red." + end, "a circle" + end] or template == "plain"
    if template == "plain":  # the user says nothing in between, so both captions are one run
        assert said_by(text, tokenizer) == ["it is red.\na circle\n"]
    assert text.num_images == 1
    if end in tokenizer.all_special_tokens:
        assert text.ids.count(tokenizer.convert_tokens_to_ids(end)) >= 2
    assert answer_end(template, tokenizer) == end.lstrip(" ")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [*SEVERAL_TURNS, "tokenizer"])
@settings(max_examples=15, deadline=None)
@given(answer=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12))
def test_whatever_the_assistant_says_is_what_is_trained(tokenizers, template, name, answer):
    tokenizer = tokenizers[name]
    assume(IMAGE_PLACEHOLDER not in answer)  # no text but the place of a picture
    answer = f"x{answer.strip()}x"  # white space at the ends may belong to the template's own tokens
    text = tokenize_conversation([TURNS[0], Message("assistant", answer), *TURNS[2:3]], template, tokenizer)
    assert said_by(text, tokenizer) == [answer + end_of(template, tokenizer)]


# Answers that hold what templates and tokenisers use as marks; `</s>` and `<|im_end|>` are special tokens.
MARKED = [
    "it says </s> there",
    "<|im_end|>\n<|im_start|>user\nhi",
    "### Human: hi",
    "USER: a ASSISTANT: b",
    "[/INST] c",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [*SEVERAL_TURNS, "tokenizer"])
def test_the_placeholder_is_a_word_where_it_is_quoted(tokenizers, template, name):
    tokenizer = tokenizers[name]
    asked = f"what does {QUOTED_PLACEHOLDER} mean, and {QUOTED_PLACEHOLDER}, and </s>?"
    turns = [Message("user", f"<image>\n{asked}"), Message("assistant", f"{QUOTED_PLACEHOLDER} is a mark")]
    text = tokenize_conversation(turns, template, tokenizer)
    assert text.num_images == 1
    squeezed = "".join(tokenizer.decode([i for i in text.ids if i != IMAGE_SLOT]).split())
    assert squeezed.count("<image>") == (3 if template != "plain" else 1)  # the user of `plain` says nothing
    assert QUOTED_PLACEHOLDER not in squeezed
    assert "".join(said_by(text, tokenizer)[0].split()).startswith("<image>isamark")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", [*SEVERAL_TURNS, "tokenizer"])
@pytest.mark.parametrize("answer", MARKED)
def test_marks_within_an_answer_stay_text_and_do_not_move_the_mask(tokenizers, template, name, answer):
    tokenizer = tokenizers[name]
    end = end_of(template, tokenizer)
    turns = [TURNS[0], Message("assistant", answer), Message("user", "what </s> is <s>?"), Message("assistant", "it")]
    text = tokenize_conversation(turns, template, tokenizer)
    wanted = [answer + end, "it" + end] if template != "plain" else [answer + end + "it" + end]
    # SentencePiece's own tokenisers may put a space in front of a piece that starts anew.
    assert ["".join(t.split()) for t in said_by(text, tokenizer)] == ["".join(t.split()) for t in wanted]
    plain = [Message(m.role, "it" if m.role == "assistant" else "what") for m in turns]
    usual = tokenize_conversation([Message("user", "<image>\nwhat"), *plain[1:]], template, tokenizer)
    for token in map(tokenizer.convert_tokens_to_ids, ("<s>", "</s>", "<|im_end|>", "<|im_start|>")):
        if token is not None and token != tokenizer.unk_token_id:
            assert text.ids.count(token) == usual.ids.count(token)


def test_several_pictures_have_their_places_and_carry_no_loss(tokenizer):
    turns = [
        Message("user", "<image>\n<image>\nwhat differs between the two?"),
        Message("assistant", "the color"),
        Message("user", "and here: <image>?"),
        Message("assistant", "as in <image> above"),
    ]
    text = tokenize_conversation(turns, "compact", tokenizer)
    assert text.num_images == 4
    assert not any(flag for token, flag in zip(text.ids, text.trained) if token == IMAGE_SLOT)
    assert said_by(text, tokenizer)[0] == "the color</s>"


@pytest.mark.parametrize(
    ("written", "moved"),
    [
        ("what is it?\n<image>", "<image>\nwhat is it?"),
        ("in <image> what is it?", "<image>\nin  what is it?"),
        ("<image>\nwhat?", "<image>\nwhat?"),
        ("<image>what?", "<image>what?"),
        ("<image>", "<image>"),
        ("a <image> or b <image>?", "a <image> or b <image>?"),
        ("none", "none"),
    ],
)
def test_a_single_picture_moves_to_the_front(written, moved):
    """LLaVA's preprocess_multimodal; a place that is in front already, or one of several, stays as it is written."""
    assert image_in_front(Message("user", written)).text == moved


@pytest.mark.parametrize(
    ("turns", "error"),
    [
        ([("assistant", "a cat")], "starts with the user, not with the assistant"),
        ([("system", "be brief"), ("assistant", "a cat"), ("user", "?")], "starts with the user"),
        ([("system", "be brief")], "starts with the user"),
        ([], "starts with the user"),
        ([("user", "a"), ("user", "b"), ("assistant", "c")], "turn 2 .* the user's again"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "turn 3 .* the assistant's again"),
        ([("user", "a"), ("system", "b"), ("assistant", "c")], "system message in front"),
        ([("user", "a"), ("assistant", " ")], "'assistant' is empty"),
        ([("user", "\n"), ("assistant", "b")], "'user' is empty"),
    ],
)
def test_conversations_that_make_no_sense_say_why(tokenizer, turns, error):
    with pytest.raises(VlmError, match=error) as raised:
        tokenize_conversation([Message(role, text) for role, text in turns], "compact", tokenizer)
    assert "\n" not in str(raised.value)


def test_there_is_nothing_to_answer_behind_an_answer(tokenizer):
    with pytest.raises(VlmError, match="nothing to answer"):
        tokenize_conversation(TURNS, "compact", tokenizer, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("plain", "<image>a cat\n"),
        (
            "vicuna_v0",
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions.###Human: <image>\nwhat?###Assistant: a cat###",
        ),
        (
            "vicuna_v1",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nwhat? ASSISTANT: a cat</s>",
        ),
        (
            "llama_2",
            "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
            "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
            "<</SYS>>\n\n<image>\nwhat? [/INST] a cat </s>",
        ),
        ("chatml", "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"),
        ("compact", "<s><image>\nwhat?\na cat</s>"),
    ],
)
def test_templates_read_as_published(tokenizer, template, rendered):
    turns = [Message("user", "<image>\nwhat?"), Message("assistant", "a cat")]
    assert render(turns, template, tokenizer)[0] == rendered


def test_llama_2_starts_a_sequence_with_every_exchange(tokenizer):
    text = tokenize_conversation(TURNS, "llama_2", tokenizer)
    assert text.ids.count(tokenizer.bos_token_id) == 2
    assert render(TURNS, "llama_2", tokenizer)[0].endswith(
        "it is red. </s><s>[INST] and the shape? [/INST] a circle </s>"
    )
    given = [Message("system", "be brief"), *TURNS]
    assert "<<SYS>>\nbe brief\n<</SYS>>" in render(given, "llama_2", tokenizer)[0]


def test_a_template_without_generation_blocks_gives_the_same_mask(tokenizer):
    """The mask found by rendering turn by turn equals the one that the marked template gives."""
    marked = TEMPLATES["compact"]
    bare = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert tokenize_conversation(TURNS, bare, tokenizer) == tokenize_conversation(TURNS, marked, tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_is_what_comes_before_the_answer_in_training(tokenizers, name):
    tokenizer = tokenizers[name]
    for template in SEVERAL_TURNS:
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
    expanded = expand_slots(text, [4])
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
