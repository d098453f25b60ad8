"""LAVIS' checkpoints of BLIP-2 as models of ours: the file holds what was trained, and names no part."""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from vlm.backbones.lavis_checkpoint import LavisCheckpoint, read_lavis
from vlm.bridges.qformer_keys import from_lavis
from vlm.errors import VlmError
from vlm.model_spec import ModelSpec
from vlm.models.build import build_model
from vlm.models.freezing import some_names
from vlm.paths import read_yaml
from vlm.schema import Strict, validate

# Width of the image tokens -> the encoder of the published files.
_ENCODERS = {
    1408: {"name": "hf:Salesforce/blip2-itm-vit-g", "layer": -1, "drop_cls": False},
    1024: {"name": "hf:openai/clip-vit-large-patch14", "layer": -2, "drop_cls": False},
}
# (kind of language model, its width) -> (language model of the published files, template).
_LANGUAGE_MODELS = {
    ("opt", 2560): ("hf:facebook/opt-2.7b", "blip2_opt"),
    ("opt", 4096): ("hf:facebook/opt-6.7b", "blip2_opt"),
    ("t5", 2048): ("hf:google/flan-t5-xl", "blip2_t5"),
    ("t5", 4096): ("hf:google/flan-t5-xxl", "blip2_t5"),
    ("llm", 4096): ("hf:lmsys/vicuna-7b-v1.1", "instructblip"),
    ("llm", 5120): ("hf:lmsys/vicuna-13b-v1.1", "instructblip"),
}


class _Beside(Strict):
    """The YAML file of a checkpoint's name beside it: the model as a recipe says it."""

    model: ModelSpec = Field()


def load_lavis(path: Path, device: str | torch.device | None = None, precision: str = "auto") -> Any:
    """The model of a LAVIS checkpoint of BLIP-2's first or second stage, frozen and in eval mode.

    The parts it does not hold are those of the file `NAME.yaml` beside it (`model: ...` as in a recipe), else those of
    the published files of its sizes. Raises VlmError where neither says, and for keys that are missing or left over.
    """
    checkpoint = read_lavis(path)
    model = build_model(lavis_spec(checkpoint), device=device, precision=precision)
    state = lavis_state(checkpoint)
    check_language(checkpoint.encoder_decoder, model, str(path))
    own = dict(model.named_parameters(remove_duplicate=False))
    parts = {"bridge", "heads", *(name.partition(".")[0] for name in state)}
    wanted = {name for name in own if name.partition(".")[0] in parts}
    for what, keys in (("lacks", wanted - state.keys()), ("has keys without a place:", state.keys() - own.keys())):
        if keys:
            raise VlmError(f"{path}: {what} {some_names(sorted(keys))}")
    if wrong := sorted(name for name in state if state[name].shape != own[name].shape):
        shapes = f"{tuple(state[wrong[0]].shape)} there, {tuple(own[wrong[0]].shape)} in the model"
        raise VlmError(f"{path}: shapes differ for {some_names(wrong)} ({shapes})")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return model


def lavis_state(checkpoint: LavisCheckpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint by our names."""
    state = from_lavis(checkpoint.bridge, str(checkpoint.path))
    state |= {f"image_encoder.tower.model.{key}": value for key, value in checkpoint.vision.items()}
    return state | {f"language_model.network.{key}": value for key, value in checkpoint.language.items()}


def check_language(encoder_decoder: bool | None, model: Any, where: str) -> None:
    """Raise VlmError where a checkpoint was trained for the other kind of language model than `model` has."""
    language = getattr(model, "language_model", None)
    if encoder_decoder is None or language is None or language.is_encoder_decoder == encoder_decoder:
        return
    kinds = {True: "an encoder-decoder (T5)", False: "a decoder-only model"}
    raise VlmError(
        f"{where}: was trained for {kinds[encoder_decoder]}, but {language.name} is {kinds[not encoder_decoder]}"
    )


def lavis_spec(checkpoint: LavisCheckpoint) -> Any:
    """The model that a checkpoint belongs to, by the file beside it or by its sizes."""
    path = checkpoint.path
    if (beside := path.with_suffix(".yaml")).is_file():
        return validate(_Beside, read_yaml(beside), where=str(beside)).model
    hint = f"; say what it is in {path.with_suffix('.yaml').name} beside it (`model: ...`, as in a recipe)"
    width, (_, queries, _) = len(checkpoint.bridge["ln_vision.weight"]), checkpoint.bridge["query_tokens"].shape
    if width not in _ENCODERS:
        raise VlmError(f"{path}: no published BLIP-2 reads image tokens of width {width}{hint}")
    spec: dict[str, Any] = {"image_encoder": _ENCODERS[width], "bridge": {"type": "qformer", "num_queries": queries}}
    if checkpoint.family is None:
        return validate(_Beside, {"model": {"type": "qformer", **spec}}, where=str(path)).model
    size = len(checkpoint.bridge[f"{checkpoint.family}_proj.bias"])
    if (checkpoint.family, size) not in _LANGUAGE_MODELS:
        raise VlmError(f"{path}: no published BLIP-2 has a {checkpoint.family} language model of width {size}{hint}")
    name, template = _LANGUAGE_MODELS[checkpoint.family, size]
    spec["bridge"]["instruction"] = checkpoint.has_text
    spec |= {"type": "generative", "language_model": name, "template": template}
    caption = "A short image caption." if checkpoint.has_text else "a photo of"
    spec |= {
        "question_prompt": "<image>Question: {question} Short answer:",
        "caption_prompt": f"<image>{caption}",
    }
    return validate(_Beside, {"model": spec}, where=str(path)).model
