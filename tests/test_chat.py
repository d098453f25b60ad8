"""`vlm chat` driven through its standard input."""

import pytest
from generative_parts import generative_spec, pictures
from tiny_models import tiny_hf_image_model
from typer.testing import CliRunner

from vlm import load_model
from vlm.cli.chat import Conversation, _streamer
from vlm.cli.main import app
from vlm.models.build import build_model, save_model_folder

RUN = CliRunner()


@pytest.fixture
def run(tiny_folder, tmp_path):
    spec = generative_spec(tiny_folder, "llama", template="vicuna_v1")
    save_model_folder(build_model(spec, ["bridge.*"], "cpu", "fp32"), ["bridge.*"], tmp_path / "run")
    return tmp_path / "run"


def _talk(run, *lines, image=None, **options):
    words = ["chat", str(run), *([image] if image else []), "--max-new-tokens", "6", "--device", "cpu"]
    return RUN.invoke(app, words, input="".join(line + "\n" for line in lines), **options)


def _user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def _squeezed(text):
    return "".join(text.split())


def test_a_conversation_says_what_the_model_says(run, tmp_path):
    one, two = pictures(tmp_path, 2)
    model = load_model(run, "cpu")
    first = _user("what is it?", one)
    said = [model.chat([first], max_new_tokens=6)]
    history = [first, {"role": "assistant", "content": said[0]}, _user("and here?", two)]
    said.append(model.chat(history, max_new_tokens=6))
    done = _talk(run, "what is it?", f"/image {two}", "and here?", "/quit", "not read", image=one)
    assert done.exit_code == 0, done.output
    expected = f"(picture 32 x 32)\n{said[0]}\n(picture 32 x 32)\n{said[1]}\n"
    assert _squeezed(done.stdout) == _squeezed(expected)


def test_reset_forgets_what_was_said_and_shown(run, tmp_path):
    (one,) = pictures(tmp_path, 1)
    model = load_model(run, "cpu")
    fresh = model.chat([_user("what is a circle?")], max_new_tokens=6)
    done = _talk(run, "what is it?", "/reset", "what is a circle?", image=one)  # ends with the input
    assert done.exit_code == 0
    assert _squeezed(done.stdout).endswith(_squeezed(f"(forgotten)\n{fresh}"))


def test_mistakes_are_told_and_the_conversation_goes_on(run, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    lines = [
        "",
        "/image",
        "/image nowhere.png",
        f"/image {tmp_path / 'torn.png'}",
        "/imag x",
        "look at <image>",
        "/help",
    ]
    done = _talk(run, *lines, "what is it?")
    assert done.exit_code == 0, done.output
    told = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(told) == 5
    assert "did you mean '/image'" in done.output
    assert "/reset forgets" in done.output


def test_a_broken_first_picture_and_a_model_that_cannot_talk_end_in_one_line(run, tiny_folder, tmp_path):
    done = _talk(run, "hello", image="nowhere.png")
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    dual = tiny_folder(tiny_hf_image_model, "clip")
    done = _talk(dual, "hello")
    assert done.exit_code == 2
    assert "generative" in done.output


def test_the_stop_of_a_template_is_not_shown(tiny_folder, capsys):
    model = build_model(generative_spec(tiny_folder, "llama", template="vicuna_v0"), [], "cpu", "fp32")
    streamer = _streamer(model)
    for piece in ("a #", "# b", " c##", "#", " d"):
        streamer.on_finalized_text(piece)
    streamer.on_finalized_text("", stream_end=True)
    assert capsys.readouterr().out.startswith("a ## b c")
    assert "###" not in capsys.readouterr().out


def test_a_system_message_stays_through_a_reset():
    talk = Conversation(None, "be brief", {})
    talk.messages.append({"role": "user", "content": "a"})
    talk.take("/reset")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
