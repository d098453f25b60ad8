"""Build a model of any family from its specification, and keep what was trained of it in a folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.backbones.image import ImageEncoder, build_image_encoder
from vlm.backbones.language import LanguageModel, build_language_model
from vlm.backbones.pair import build_pair
from vlm.bridges.dual_tower import DualTower
from vlm.bridges.projection import Projection
from vlm.bridges.qformer_init import build_qformer, qformer_tokenizer
from vlm.bridges.qformer_projection import build_qformer_projection
from vlm.devices import pick_device, pick_precision, storage_dtype
from vlm.errors import VlmError
from vlm.model_spec import (
    DualEncoderSpec,
    GenerativeSpec,
    ImageEncoderSpec,
    LanguageModelSpec,
    ModelSpec,
    QFormerProjectionSpec,
    QFormerSpec,
)
from vlm.models.dual_encoder import DualEncoder
from vlm.models.freezing import freeze_all_but, load_trained_state, trained_state
from vlm.models.generative import GenerativeModel
from vlm.models.qformer_model import QFormerModel
from vlm.models.tasks import TaskModel
from vlm.paths import read_yaml
from vlm.schema import Strict, dump_yaml, validate

DESCRIPTION, WEIGHTS = "model.yaml", "trained.safetensors"


class ModelDescription(Strict):
    """`model.yaml` of a model folder: how to build the frozen parts and which parameters the weights fill."""

    vlm: str
    model: ModelSpec
    trainable: list[str]
    fingerprints: dict[str, str]


def build_model(
    spec: ModelSpec,
    trainable: list[str] | tuple[str, ...] = (),
    device: str | torch.device | None = None,
    precision: str = "auto",
    seed: int = 0,
) -> Any:
    """The model that `spec` describes, on `device`, in eval mode; what matches `trainable` learns, in fp32.

    Initial weights depend on `seed` alone.
    """
    place = pick_device(device)
    precision = pick_precision(precision, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[spec.type](spec, precision)
    model.requires_grad_(False)
    if trainable:
        freeze_all_but(model, trainable)
    model.to(place)
    return model.eval()


def _generative(spec: GenerativeSpec, precision: str) -> GenerativeModel:
    language_model = build_language_model(spec.language_model, precision)
    check_kind(spec, language_model)
    image_encoder = _image_encoder(spec.image_encoder, precision)
    if isinstance(spec.bridge, QFormerProjectionSpec):
        reader = build_qformer_projection(spec.bridge, image_encoder.width, language_model.width)
        instructions = qformer_tokenizer(spec.bridge) if spec.bridge.instruction else None
        return GenerativeModel(spec, image_encoder, reader, language_model, instructions)
    tiles = spec.image_encoder.resize == "anyres"
    widths = image_encoder.width, language_model.width
    bridge = Projection(spec.bridge, *widths, image_encoder.num_tokens, image_encoder.grid, tiles)
    if spec.bridge.match_embeddings:
        bridge.match_scale(language_model.embeddings.weight)
    return GenerativeModel(spec, image_encoder, bridge, language_model)


# Templates that suit one kind of language model alone -> whether that is an encoder-decoder.
_KIND_OF_TEMPLATE = {"blip2_opt": False, "instructblip": False, "blip2_t5": True}


def check_kind(spec: GenerativeSpec, language_model: LanguageModel) -> None:
    """Raise VlmError where template or options want the other kind of language model."""
    is_t5 = language_model.is_encoder_decoder
    told = f"{language_model.name} is {'an encoder-decoder' if is_t5 else 'decoder-only'}"
    wanted = _KIND_OF_TEMPLATE.get(spec.template, is_t5)
    if wanted != is_t5:
        kind = "an encoder-decoder such as T5; use blip2_opt" if wanted else "a decoder-only model; use blip2_t5"
        raise VlmError(f"model.template: {spec.template} is for {kind}: {told}")
    if spec.split_captions and not is_t5:
        raise VlmError(f"model.split_captions: only an encoder-decoder reads one part and says the other; {told}")


def _dual_encoder(spec: DualEncoderSpec, precision: str) -> DualEncoder:
    pair = build_pair(spec.image_encoder, spec.text_encoder)
    bridge = DualTower(
        spec.bridge,
        (pair.image.width, pair.image.pooled_width),
        (pair.text.width, pair.text.pooled_width),
        pair.image.num_prefix_tokens > 0,
        pair.text.has_cls,
    )
    if spec.bridge.logit_scale == "published":
        if pair.logits is None:
            raise VlmError("bridge.logit_scale: published: both encoders must come from one published dual encoder")
        bridge.start_logits(*pair.logits)
    pair.image.to(storage_dtype(_first(spec.image_encoder.precision, precision)))
    pair.text.to(storage_dtype(_first(spec.text_encoder.precision, precision)))
    return DualEncoder(spec, pair.image, pair.text, bridge)


def _qformer(spec: QFormerSpec, precision: str) -> QFormerModel:
    image_encoder = _image_encoder(spec.image_encoder, precision)
    bridge, heads = build_qformer(spec.bridge, image_encoder.width)
    assert heads is not None
    return QFormerModel(spec, image_encoder, bridge, heads, qformer_tokenizer(spec.bridge))


# `type` of a specification -> its builder: (specification, precision of frozen weights) -> model on the CPU.
BUILDERS: dict[str, Callable[[Any, str], TaskModel]] = {
    "generative": _generative,
    "dual_encoder": _dual_encoder,
    "qformer": _qformer,
}


def _image_encoder(spec: ImageEncoderSpec, precision: str) -> ImageEncoder:
    encoder = build_image_encoder(spec, spec.resize)
    encoder.to(storage_dtype(_first(spec.precision, precision)))
    return encoder


def _first(precision: str, fallback: str) -> str:
    return precision if precision != "auto" else fallback


def save_model_folder(
    model: Any, trainable: list[str], folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `model.yaml` and the trained weights aside, then put them in place at once.

    weights: `trained_state` of the model, where it lies in shards that one process alone cannot read.
    Raises VlmError where they cannot be written; what was there stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    import vlm

    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    description = ModelDescription(
        vlm=vlm.__version__, model=model.spec, trainable=list(trainable), fingerprints=_fingerprints(model)
    )
    try:
        aside.mkdir(parents=True)
        save_file(trained_state(model) if weights is None else weights, aside / WEIGHTS, metadata={"format": "pt"})
        dump_yaml(json.loads(description.model_dump_json()), aside / DESCRIPTION)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        hint = "" if isinstance(error, OSError) else "; is the disk full?"
        raise VlmError(f"the model {folder} could not be written: {error}{hint}") from error


def load_model_folder(
    folder: Path,
    device: str | torch.device | None = None,
    precision: str = "auto",
    quantized: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """A model from a folder written by `save_model_folder`, frozen and in eval mode.

    quantized: hold the language model as it was trained on; False loads its whole weights instead.
    trust_remote_code: run Python beside the language model's weights where the folder asks for it; a folder may be
    somebody else's, so that its own word for it is not enough.
    Raises VlmError if a file is missing, a key does not fit, or a frozen part is not the one it was trained with.
    """
    description = validate(ModelDescription, read_yaml(folder / DESCRIPTION), where=str(folder / DESCRIPTION))
    spec = description.model
    language = getattr(spec, "language_model", None)
    if isinstance(language, LanguageModelSpec) and language.trust_remote_code and not trust_remote_code:
        raise VlmError(
            f"{folder}: its language model {language.name!r} runs Python that lies beside its weights; if you trust "
            "it, load_model(..., trust_remote_code=True) or vlm-eval --trust-remote-code"
        )
    if not quantized and isinstance(language, LanguageModelSpec):
        whole = language.model_copy(update={"quantization": "none"})
        spec = spec.model_copy(update={"language_model": whole})
    model = build_model(spec, description.trainable, device, precision)
    load_trained_state(model, read_weights(folder / WEIGHTS), where=str(folder / WEIGHTS))
    if precision == "fp32":
        for part, found in _fingerprints(model).items():
            if description.fingerprints.get(part, found) != found:
                name = getattr(model, part).name
                raise VlmError(f"{folder}: {name} has other weights than the ones it was trained with")
    model.requires_grad_(False)
    return model.eval()


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Name -> fingerprint of the frozen encoders."""
    parts = {name: getattr(model, name, None) for name in ("image_encoder", "text_encoder")}
    return {
        name: part.fingerprint()
        for name, part in parts.items()
        if part is not None and not any(p.requires_grad for p in part.parameters())
    }


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises VlmError if it is missing or torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise VlmError(f"{path}: no such file") from error
    except SafetensorError as error:
        raise VlmError(f"{path}: not a whole safetensors file: {error}") from error
