"""The task methods of the public contract; a model family overrides those it can do."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from vlm.errors import UnsupportedTask

# Task -> the families that can do it.
FAMILIES: dict[str, tuple[str, ...]] = {
    "encode_image": ("dual encoder", "Q-Former"),
    "encode_text": ("dual encoder", "Q-Former"),
    "classify": ("dual encoder", "Q-Former"),
    "match": ("Q-Former",),
    "caption": ("Q-Former", "generative"),
    "answer": ("generative",),
    "chat": ("generative",),
    "score": ("generative",),
}


class TaskModel(nn.Module):
    """Base of every family: each task it does not override raises `UnsupportedTask`, naming the families that can."""

    family: str = ""

    def keep_text_features(self, texts: Sequence[str], announce: Callable[[str], None]) -> None:
        """Encode texts that training will meet once and for all, where a frozen text encoder allows it."""

    def start_on(self, batches: Iterable[Any]) -> str:
        """Set what learns by the training data before the first step, where the recipe says so; what was done, or "".

        batches: every training sample once, collated; made as they are gone through.
        """
        return ""

    def comparison_parameters(self) -> list[nn.Parameter]:
        """What a comparison of embeddings reads beside them (logit scale, bias)."""
        return []

    def say_sample(self, sample: Any, **generation: Any) -> tuple[str, str, str]:
        """(what was asked, what the model says, what was wanted) of a training sample."""
        raise UnsupportedTask(f"train.sample_every: a {self.family} model says nothing; leave it at 0")

    def after_step(self) -> None:
        """Called after each optimiser step, to keep parameters in their bounds."""

    def _cannot(self, task: str) -> NoReturn:
        raise UnsupportedTask(f"a {self.family} model cannot `{task}`; these can: {', '.join(FAMILIES[task])}")

    def encode_image(self, images: Any) -> Tensor:
        """Unit-length embeddings of images."""
        self._cannot("encode_image")

    def encode_text(self, texts: Any) -> Tensor:
        """Unit-length embeddings of texts."""
        self._cannot("encode_text")

    def classify(self, images: Any, labels: Any, templates: Any = None) -> Tensor:
        """Probabilities [B,C] of labels."""
        self._cannot("classify")

    def match(self, images: Any, texts: Any) -> Tensor:
        """Probability [B] that image i and text i match."""
        self._cannot("match")

    def caption(self, images: Any, prompt: str | None = None, **generation: Any) -> list[str]:
        """A caption for each image."""
        self._cannot("caption")

    def answer(self, images: Any, questions: Any, **generation: Any) -> list[str]:
        """An answer to each question about its image."""
        self._cannot("answer")

    def chat(self, messages: Any, **generation: Any) -> str:
        """The next turn of a conversation."""
        self._cannot("chat")

    def score(self, images: Any, texts: Any, prompts: Any = None) -> Tensor:
        """Sum of log-probabilities [B] of each text after its prompt."""
        self._cannot("score")
