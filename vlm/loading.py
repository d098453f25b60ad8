"""`load_model`: a name or a folder becomes a model with task methods."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import VlmError

if TYPE_CHECKING:
    import torch

    from vlm.models.tasks import TaskModel

# OWNER/NAME, as the hub has it; a path of yours has another form or exists.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_model(
    name: str | Path,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    trust_remote_code: bool = False,
) -> "TaskModel":
    """A model ready to use, frozen and in eval mode.

    name: a run folder that `vlm-train` wrote, or the `model/` folder inside it; `open_clip:ARCH/TAG_OR_FILE`; or a
    Hugging Face id or local folder of a model in transformers' layout (`vlm.models.published.PUBLISHED`); or a BLIP-2
    of LAVIS (`.pth`).
    device: default CUDA, else MPS, else CPU. dtype: of frozen weights, `fp32`, `bf16`, `fp16` or a torch.dtype; by
    default what the device is good at. trust_remote_code: allow a run folder whose recipe said so to run the Python
    beside its language model's weights. Raises VlmError if there is nothing to load or a key does not fit.
    """
    from vlm.backbones.lavis_checkpoint import is_lavis
    from vlm.models.build import DESCRIPTION, load_model_folder

    path = Path(name).expanduser()
    if (folder := model_folder(path)) is not None:
        return load_model_folder(folder, device, _precision(dtype), trust_remote_code=trust_remote_code)
    if (path / "recipe.yaml").is_file():
        raise VlmError(f"{path}: this run has not written its model yet; go on with `vlm-train RECIPE --resume`")
    text = str(name)
    if is_lavis(path):
        from vlm.models.published_lavis import load_lavis

        return load_lavis(path, device, _precision(dtype))
    if text.startswith("open_clip:"):
        from vlm.models.published_dual_encoder import load_open_clip

        return load_open_clip(text.removeprefix("open_clip:"), device, _precision(dtype))
    if (path / "config.json").is_file() or (HUB_ID.fullmatch(text) and not path.exists()):
        from vlm.models.published import load_published

        return load_published(str(path) if path.exists() else text, device, _precision(dtype))
    raise VlmError(
        f"no model {text!r}: expected a run folder of vlm-train (it holds model/{DESCRIPTION}), a folder with "
        "config.json, a Hugging Face id such as openai/clip-vit-base-patch32, or open_clip:ARCH/TAG"
    )


def model_folder(path: Path) -> Path | None:
    """The folder of a trained model that `path` is or holds; None if it is none of ours."""
    from vlm.models.build import DESCRIPTION

    return next((folder for folder in (path, path / "model") if (folder / DESCRIPTION).is_file()), None)


def _precision(dtype: "str | torch.dtype | None") -> str:
    if dtype is None:
        return "auto"
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    text = str(dtype).removeprefix("torch.")
    return names.get(text, text)
