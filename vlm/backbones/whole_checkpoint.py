"""Checkpoints that hold a whole vision-language model: an image encoder or a language model may be taken out of one."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from vlm.backbones.blip2_checkpoint import is_blip2, read_blip2
from vlm.backbones.checkpoint_parts import Part
from vlm.backbones.hf_loading import read_config
from vlm.backbones.llava_checkpoint import is_llava, read_llava


class WholeCheckpoint(Protocol):
    """What `LlavaCheckpoint` and `Blip2Checkpoint` have in common.

    base: the checkpoint beside which adapters or a bridge lie, if they do; its tokeniser is the model's.
    tower: the checkpoint whose image preprocessor is the tower's, and whose weights where `vision_config` is None.
    """

    @property
    def reference(self) -> str: ...
    @property
    def text_config(self) -> Any: ...
    @property
    def vision_config(self) -> Any: ...
    @property
    def base(self) -> str | None: ...
    @property
    def tower(self) -> str: ...
    def state(self, part: Part) -> dict[str, Tensor]: ...


# (does a `config.json` belong to it, its reader). Another family is one more entry.
_FAMILIES: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[str], WholeCheckpoint]], ...] = (
    (is_llava, read_llava),
    (is_blip2, read_blip2),
)


def read_whole(reference: str) -> WholeCheckpoint | None:
    """The whole model that a hub id or local folder holds; None for a part. Raises VlmError if there is neither."""
    config = read_config(reference)
    return next((read(reference) for fits, read in _FAMILIES if fits(config)), None)
