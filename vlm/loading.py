"""`load_model`: a name or a folder becomes a model with task methods."""

from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import VlmError

if TYPE_CHECKING:
    import torch

    from vlm.models.tasks import TaskModel


def load_model(
    name: str | Path, device: "str | torch.device | None" = None, dtype: "str | torch.dtype | None" = None
) -> "TaskModel":
    """A model ready to use, frozen and in eval mode.

    name: a run folder that `vlm-train` wrote, or the `model/` folder inside it.
    device: default CUDA, else MPS, else CPU. dtype: of frozen weights, `fp32`, `bf16`, `fp16` or a torch.dtype; by
    default what the device is good at. Raises VlmError if there is nothing to load or a key does not fit.
    """
    from vlm.models.build import DESCRIPTION, load_model_folder

    path = Path(name).expanduser()
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION).is_file():
            return load_model_folder(folder, device, _precision(dtype))
    if (path / "recipe.yaml").is_file():
        raise VlmError(f"{path}: this run has not written its model yet; go on with `vlm-train RECIPE --resume`")
    raise VlmError(f"no model {str(name)!r}: expected a run folder of vlm-train (it holds model/{DESCRIPTION})")


def _precision(dtype: "str | torch.dtype | None") -> str:
    if dtype is None:
        return "auto"
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    text = str(dtype).removeprefix("torch.")
    return names.get(text, text)
