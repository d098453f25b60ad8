"""What a recipe's steps see: how many samples there are, and how long they are."""

from dataclasses import dataclass
from typing import Any

from vlm.data.catalogue import load_spec
from vlm.errors import VlmError
from vlm.paths import yaml_names
from vlm.recipe import DataSpec, Recipe


@dataclass(frozen=True)
class Load:
    """A micro-batch of one process.

    samples, pictures: in it. rows: sequences of a language model. text_tokens: of a row (of a text, where a sample is
    a pair), beside its image tokens. labels: those of a row that carry loss. compared: pairs of the whole batch.
    packed: whether a row holds several texts, which then need a mask of who sees whom.
    """

    samples: int
    pictures: int
    rows: int
    text_tokens: int
    labels: int
    compared: int = 0
    packed: bool = True


@dataclass(frozen=True)
class Workload:
    """An epoch and its samples. samples: None where only the data themselves would tell.

    text_tokens, labels: of a sample, on average; assumed: whether that is an estimate by its kind.
    """

    samples: int | None
    pictures_per_sample: float
    text_tokens: int
    labels: int
    assumed: bool
    packed: bool = True

    def load(self, samples: int, compared: int = 0) -> Load:
        """A micro-batch of that many samples."""
        pictures = max(1, round(samples * self.pictures_per_sample))
        return Load(samples, pictures, samples, self.text_tokens, self.labels, compared, self.packed)


# Text tokens of a sample, and those among them that carry loss: means of the kinds of data, in words of Llama's
# vocabulary. Captions of the web and of COCO have 10 to 20; LLaVA-Instruct's and the mix's conversations about 250.
_LENGTHS = {"captions": (24, 18), "vqa": (40, 6), "questions": (40, 12), "conversation": (280, 180)}
_QUESTIONS = {"vqa": 9.5, "conversation": 1.0, "captions": 1.0}  # of a picture, where one sample holds all


def workload(recipe: Recipe, context: int, tokens: int | None = None, samples: int | None = None) -> Workload:
    """What a recipe trains on. tokens, samples: what is known better than the estimates.

    context: tokens that a text encoder always sees (CLIP pads to it), 0 where a text is as long as it is.
    """
    sizes = [_size(source, recipe) for source in recipe.data.train]
    known = samples if samples is not None else (None if None in sizes else sum(s or 0 for s in sizes))
    uses = [_use(source, recipe) for source in recipe.data.train]
    weights = [size or 1 for size in sizes]
    lengths = [_lengths(use, source, recipe) for use, source in zip(uses, recipe.data.train)]
    mean = [sum(w * length[i] for w, length in zip(weights, lengths)) / sum(weights) for i in (0, 1)]
    text, labels = (max(1, round(value)) for value in mean)
    if tokens is not None:
        text, labels = tokens, max(1, round(labels * tokens / text))
    if context:
        text = labels = context
    if recipe.model.type == "qformer":
        text = min(text, recipe.model.text_length)
    if limit := recipe.data.max_length:
        text, labels = min(text, limit), min(labels, limit)
    return Workload(known, 1.0, text, min(labels, text), assumed=tokens is None and not context)


def _lengths(use: str, source: DataSpec, recipe: Recipe) -> tuple[float, float]:
    text, labels = _LENGTHS[use]
    if use == "vqa" and source.share_image and recipe.model.type == "generative":
        return text * _QUESTIONS[use] * 0.5, labels * _QUESTIONS[use]
    return text, labels


def _use(source: DataSpec, recipe: Recipe) -> str:
    if recipe.model.type != "generative":
        return "captions"
    if recipe.model.template == "plain":  # a picture and its caption, whatever the file calls them
        return "captions"
    if source.use != "auto":
        return source.use
    kind = _format(source)
    return "conversation" if kind == "llava_json" else "vqa" if "vqa" in kind else "captions"


def _spec(source: DataSpec) -> Any:
    try:
        return load_spec(source.dataset)[0] if source.dataset in yaml_names("datasets") else None
    except VlmError:
        return None


def _format(source: DataSpec) -> str:
    spec = _spec(source)
    return source.format or (spec.format if spec is not None else "")


def _size(source: DataSpec, recipe: Recipe) -> int | None:
    """Samples of one source, by what its description says."""
    spec = _spec(source)
    split = spec.splits.get(source.split) if spec is not None else None
    if split is None:
        return source.limit
    size = split.size
    if recipe.model.type == "generative" and split.pictures and (source.share_image or source.use == "captions"):
        size = split.pictures
    return size if size is None or source.limit is None else min(size, source.limit)
