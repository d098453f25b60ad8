"""Vision-language models from frozen parts: a frozen image encoder, a trained bridge, a frozen language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import vlm` and the commands'
# `--help` do not pay for importing torch.
_PUBLIC = {
    "load_model": "vlm.loading",
    "load_recipe": "vlm.recipe",
    "train": "vlm.training",
    "evaluate": "vlm.evaluation",
    "UnsupportedTask": "vlm.errors",
    "VlmError": "vlm.errors",
}
__all__ = ["UnsupportedTask", "VlmError", "__version__", "evaluate", "load_model", "load_recipe", "train"]

if TYPE_CHECKING:
    from vlm.errors import UnsupportedTask, VlmError
    from vlm.evaluation import evaluate
    from vlm.loading import load_model
    from vlm.recipe import load_recipe
    from vlm.training import train


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
