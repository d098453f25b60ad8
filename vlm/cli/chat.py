"""`vlm chat`: a conversation in the terminal, answers printed as they come."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = "/image PATH shows a picture with what you say next, /reset forgets everything, /quit ends."
_COMMANDS = ("/image", "/reset", "/quit", "/help")


def chat(
    model: Annotated[str, typer.Argument(help="A run folder, or any name that `load_model` takes.")],
    image: Annotated[str | None, typer.Argument(help="A picture to talk about.")] = None,
    system: Annotated[str | None, typer.Option(help="System message, in place of the template's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token; above: sample.")] = 0.0,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; by default what suits the device.")] = None,
) -> None:
    """Talk with a model: /image PATH, /reset, /quit."""
    from vlm.loading import load_model
    from vlm.models.tasks import TaskModel

    talker: Any = load_model(model, device, dtype)
    if type(talker).chat is TaskModel.chat:
        talker.chat([])  # raises, naming the families that can
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if temperature > 0:
        generation |= {"do_sample": True, "temperature": temperature}
    conversation = Conversation(talker, system, generation)
    if image is not None:
        conversation.show(image)
    if sys.stdin.isatty():
        typer.echo(HELP)
    while (line := _read_line()) is not None and line != "/quit":
        conversation.take(line)


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


class Conversation:
    """What was said so far, and the pictures that go with what is said next."""

    def __init__(self, model: Any, system: str | None, generation: dict[str, Any]) -> None:
        self.model = model
        self.generation = generation
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self.opening)
        self.pictures: list[dict[str, Any]] = []

    def take(self, line: str) -> None:
        """One line: a command, or something to answer. What goes wrong is told and leaves all as it was."""
        from vlm.errors import VlmError, did_you_mean

        command, _, rest = line.partition(" ")
        try:
            if not line:
                return
            if command == "/image":
                self.show(rest.strip())
            elif command == "/reset":
                self.messages, self.pictures = list(self.opening), []
                typer.echo("(forgotten)")
            elif command == "/help":
                typer.echo(HELP)
            elif command.startswith("/") and "/" not in command[1:]:
                raise VlmError(f"unknown command {command!r}{did_you_mean(command, _COMMANDS)}")
            else:
                self.say(line)
        except VlmError as error:
            typer.echo(f"error: {error}", err=True)

    def show(self, path: str) -> None:
        """Add a picture to what is said next. Raises VlmError if it cannot be read."""
        from vlm.data.images import load_image
        from vlm.errors import VlmError

        if not path:
            raise VlmError("/image wants the path of a picture")
        picture = load_image(Path(path).expanduser())
        self.pictures.append({"type": "image", "image": picture})
        typer.echo(f"(picture {picture.width} x {picture.height})")

    def say(self, text: str) -> None:
        """Answer, printing as it comes; Ctrl-C ends the answer and takes the question back."""
        asked = {"role": "user", "content": [*self.pictures, {"type": "text", "text": text}]}
        try:
            answer = self.model.chat([*self.messages, asked], streamer=_streamer(self.model), **self.generation)
        except KeyboardInterrupt:
            typer.echo("\n(interrupted)")
            return
        self.messages += [asked, {"role": "assistant", "content": answer or "..."}]
        self.pictures = []


def _streamer(model: Any) -> Any:
    """transformers' TextStreamer, which keeps what ends an answer to itself."""
    from transformers import TextStreamer

    ends = getattr(model, "answer_stops", [])

    class Printer(TextStreamer):
        held = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.held += text
            for end in ends:
                self.held = self.held.partition(end)[0] if end in self.held else self.held
            # The start of an end may be the start of the end.
            keep = max((n for end in ends for n in range(len(end)) if self.held.endswith(end[:n])), default=0)
            shown = self.held if stream_end or not keep else self.held[:-keep]
            print(shown, flush=True, end="\n" if stream_end else "")
            self.held = self.held[len(shown) :]

    return Printer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
