"""Prompt templates and class names of zero-shot classification, by name.

The 80 ImageNet templates and the 1,000 class names are OpenAI's, as open_clip ships them; the 18 CIFAR templates are
those of openai/CLIP, data/prompts.md.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from vlm.backbones.starter import package_file
from vlm.errors import VlmError, did_you_mean

PLACE = "{}"  # where a class name goes

Labels: TypeAlias = Sequence[str] | Mapping[str, str | Sequence[str]]  # class names, or each with its own prompts

_CIFAR_KINDS = (
    "a photo of {} {{}}.",
    "a blurry photo of {} {{}}.",
    "a black and white photo of {} {{}}.",
    "a low contrast photo of {} {{}}.",
    "a high contrast photo of {} {{}}.",
    "a bad photo of {} {{}}.",
    "a good photo of {} {{}}.",
    "a photo of {} small {{}}.",
    "a photo of {} big {{}}.",
)


def _imagenet() -> list[str]:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template(PLACE) for template in OPENAI_IMAGENET_TEMPLATES]


def _cifar() -> list[str]:
    return [kind.format(article) for article in ("a", "the") for kind in _CIFAR_KINDS]


def _simple() -> list[str]:
    return ["a photo of a {}."]


def _name_alone() -> list[str]:
    return [PLACE]


# Adding a set of templates is adding one entry here.
TEMPLATE_SETS: dict[str, Callable[[], list[str]]] = {
    "imagenet": _imagenet,
    "cifar": _cifar,
    "simple": _simple,
    "name": _name_alone,
}


def prompt_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates with `{}` where the class name goes: a set by name (`TEMPLATE_SETS`), or your own checked.

    Raises VlmError for an unknown name, an empty list, or a template without `{}`.
    """
    if isinstance(templates, str):
        if PLACE in templates:
            return [templates]
        if templates not in TEMPLATE_SETS:
            raise VlmError(f"unknown prompt templates {templates!r}{did_you_mean(templates, TEMPLATE_SETS)}")
        return TEMPLATE_SETS[templates]()
    if not templates:
        raise VlmError("prompt templates: the list is empty; give at least one, e.g. 'a photo of a {}.'")
    if lacking := next((text for text in templates if PLACE not in text), None):
        raise VlmError(f"prompt template {lacking!r} has no {PLACE} for the class name")
    return list(templates)


@lru_cache(maxsize=1)
def _imagenet_classes() -> dict[str, str]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    # Both lists are in the order of the 1,000 classes.
    synsets = package_file("timm", "data/_info/imagenet_synsets.txt").read_text(encoding="utf-8").split()
    if len(synsets) != len(IMAGENET_CLASSNAMES):
        raise VlmError(f"timm lists {len(synsets)} synsets and open_clip {len(IMAGENET_CLASSNAMES)} class names")
    return dict(zip(synsets, IMAGENET_CLASSNAMES))


# Adding a table of class names is adding one entry here: label -> what a prompt calls it, in the order of the classes.
CLASS_NAMES: dict[str, Callable[[], dict[str, str]]] = {"imagenet": _imagenet_classes}


def class_names(name: str) -> dict[str, str]:
    """Label -> class name, in the order of the classes. `imagenet`: the 1,000 synsets (`n01440764` -> `tench`)."""
    if name not in CLASS_NAMES:
        raise VlmError(f"unknown table of class names {name!r}{did_you_mean(name, CLASS_NAMES)}")
    return dict(CLASS_NAMES[name]())


def label_prompts(labels: Labels, templates: str | Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Label -> its prompts. Raises VlmError for labels or prompts that make no classifier."""
    if isinstance(labels, str):
        raise VlmError(f"classify: labels are a list of class names; got the text {labels!r}")
    names = list(labels)
    if not names:
        raise VlmError("classify: no labels were given")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise VlmError(f"classify: label {number} is {name!r}; expected a class name")
        if name in names[:number]:
            raise VlmError(f"classify: the label {name!r} is given twice; give every class once")
    if isinstance(labels, Mapping):
        if templates is not None:
            raise VlmError("classify: labels with prompts of their own take no templates")
        own = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in labels.items()}
        if lacking := next((name for name, prompts in own.items() if not prompts), None):
            raise VlmError(f"classify: no prompts for the label {lacking!r}")
        return own
    forms = prompt_templates("simple" if templates is None else templates)
    return {name: tuple(form.replace(PLACE, name) for form in forms) for name in names}
