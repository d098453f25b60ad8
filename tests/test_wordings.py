"""Requests in several wordings (`data.train.N.prompts`): what is asked for, and how one is drawn."""

from collections import Counter
from types import SimpleNamespace

import pytest

from vlm import VlmError, load_recipe
from vlm.data.records import Message, Record
from vlm.data.samples import caption_samples, make_samples
from vlm.data.templates import render
from vlm.recipe import DataSpec
from vlm.schema import validate


class Model:
    def question_messages(self, question: str, answer: str | None = None) -> list[Message]:
        return [Message("user", f"<image>{question}"), Message("assistant", answer or "")]

    def caption_messages(self, caption: str | None = None) -> list[Message]:
        return [Message("user", "<image>"), Message("assistant", caption or "")]


TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
ASKED = Record("1", images=("a.png",), question="What {colour} is it?", answers=("red", "pink"))


def spec(**keys: object) -> DataSpec:
    return validate(DataSpec, {"dataset": "vqav2", **keys}, where="recipe")


def said(sample: object) -> list[str]:
    return [turn.text for turns in sample.conversations for turn in turns]  # type: ignore[attr-defined]


def test_every_wording_is_drawn_as_often_and_the_draw_alone_decides() -> None:
    wordings = ["<image>Question: {question}", "<image>{question} Short answer:", "<image>Q: {question} A:"]
    (sample,) = make_samples([ASKED], spec(use="vqa", prompts=wordings), Model())
    told = Counter(said(sample.worded(draw))[0] for draw in range(3000))
    assert set(told) == {wording.replace("{question}", "What {colour} is it?") for wording in wordings}
    assert all(900 < count < 1100 for count in told.values())
    assert said(sample.worded(7)) == said(sample.worded(7))
    assert said(sample.worded(7))[1] == "red"
    assert said(sample)[0] == "<image>Question: What {colour} is it?"


def test_conversations_of_one_picture_are_worded_each_for_itself() -> None:
    questions = [Record(str(i), images=("a.png",), question=f"q{i}", answers=(f"a{i}",)) for i in range(20)]
    (sample,) = make_samples(
        questions, spec(use="vqa", prompts=["<image>1 {question}", "<image>2 {question}"]), Model()
    )
    asked = said(sample.worded(0))[::2]
    assert [text.split()[1] for text in asked] == [f"q{i}" for i in range(20)]
    assert len({text.split()[0] for text in asked}) == 2


def test_questions_are_learned_from_their_answers() -> None:
    (sample,) = make_samples([ASKED], spec(use="questions", prompts=["<image>Ask for {answer}."]), Model())
    assert said(sample.worded(1)) == ["<image>Ask for red.", "What {colour} is it?"]


def test_without_wordings_the_model_asks_in_its_own() -> None:
    record = Record("1", images=("a.png",), captions=("a cat", "an animal"))
    samples = make_samples([record], spec(use="captions", share_image=False), Model())
    assert [said(sample.worded(5)) for sample in samples] == [["<image>", "a cat"], ["<image>", "an animal"]]
    worded = make_samples([record], spec(use="captions", prompts=["<image>Describe."]), Model())
    assert said(worded[0].worded(5)) == ["<image>Describe.", "a cat", "<image>Describe.", "an animal"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompts": ["<image>x"]}, "say what they ask for"),
        ({"prompts": ["<image>x"], "use": "conversation"}, "say what they ask for"),
        ({"prompts": ["<image>x"], "use": "vqa"}, "needs <image> and {question}"),
        ({"prompts": ["x"], "use": "captions"}, "needs <image>"),
        ({"use": "questions"}, r"give `prompts` with `\{answer\}`"),
    ],
)
def test_wordings_that_do_not_fit(keys: dict[str, object], message: str) -> None:
    with pytest.raises(VlmError, match=message):
        spec(**keys)


def test_a_model_that_is_asked_nothing_takes_no_wordings() -> None:
    with pytest.raises(VlmError, match="asked nothing"):
        caption_samples([], spec(use="captions", prompts=["<image>x"]))


def test_recipes_draw_as_published() -> None:
    """MiniGPT-4's four requests; InstructBLIP's 13 for captions, 10 for questions, and questions to given answers."""
    recipe = load_recipe("minigpt4_stage2")
    (aligned,) = recipe.data.train
    turns = [Message("user", aligned.prompts[0]), Message("assistant", "A cat.")]
    told, (said,) = render(turns, recipe.model.template, SimpleNamespace(**dict.fromkeys(TOKENS)))
    assert told == "###Human: <Img><image></Img> Describe this image in detail. ###Assistant: A cat.###"
    assert told[slice(*said)] == "A cat.###"
    assert len(aligned.prompts) == 4
    mixed = load_recipe("instructblip").data.train
    assert {(s.use, len(s.prompts)) for s in mixed} >= {("captions", 13), ("vqa", 10), ("conversation", 0)}
    assert {s.dataset for s in mixed if s.use == "questions"} == {"vqav2", "okvqa", "aokvqa"}
