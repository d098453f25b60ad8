"""A model's parts on the meta device: shapes and parameter counts from configurations alone, no weights, no memory."""

from typing import Any

import torch
from torch import nn

from vlm.backbones.image_encoder import ImageEncoder
from vlm.backbones.image_hf import FAMILIES, HfTower
from vlm.backbones.known_configs import find_config
from vlm.backbones.language import inject_lora
from vlm.backbones.names import parse_part_name
from vlm.bridges.projection import Projection
from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_init import qformer_sizes
from vlm.bridges.qformer_projection import QFormerProjection
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError
from vlm.model_spec import GenerativeSpec, ImageEncoderSpec, LanguageModelSpec, QFormerProjectionSpec, QFormerSpec
from vlm.models.freezing import freeze_all_but, named_trainable


class MetaModel(nn.Module):
    """The parts under the names that `trainable` patterns match; it has shapes and cannot run."""

    def __init__(
        self,
        image_encoder: ImageEncoder,
        bridge: Projection | QFormer,
        network: nn.Module | None = None,
        heads: QFormerHeads | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.bridge = bridge
        if network is not None:
            self.language_model = nn.Module()
            self.language_model.network = network
        if heads is not None:
            self.heads = heads

    def counts(self) -> dict[str, int]:
        """Parameters of each part; tied ones count once. Layers that are dropped at load are not there."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}

    def trained(self) -> dict[str, int]:
        """Trained parameters of each part, `language_model.lora` apart."""
        sums: dict[str, int] = {}
        for name, parameter in named_trainable(self):
            part = "language_model.lora" if ".lora." in name else name.partition(".")[0]
            sums[part] = sums.get(part, 0) + parameter.numel()
        return sums


def build_on_meta(spec: GenerativeSpec | QFormerSpec, trainable: list[str] | tuple[str, ...] = ()) -> MetaModel:
    """The model that `spec` describes, of `hf:` parts, with what matches `trainable` set to learn.

    Raises VlmError for a part whose configuration is not known, and for what `build_model` would refuse.
    """
    image_encoder = _image_encoder(spec.image_encoder)
    model = _qformer(spec, image_encoder) if isinstance(spec, QFormerSpec) else _generative(spec, image_encoder)
    model.requires_grad_(False)
    if trainable:
        freeze_all_but(model, trainable)
    return model


def _qformer(spec: QFormerSpec, image_encoder: ImageEncoder) -> MetaModel:
    sizes = qformer_sizes(spec.bridge, image_encoder.width)
    with torch.device("meta"):
        heads = QFormerHeads(sizes.width, sizes.vocabulary, spec.bridge.embed_width)
        return MetaModel(image_encoder, QFormer(sizes), heads=heads)


def _generative(spec: GenerativeSpec, image_encoder: ImageEncoder) -> MetaModel:
    with torch.device("meta"):
        network = _network(spec.language_model)
        width = int(network.get_input_embeddings().embedding_dim)
        bridge: Projection | QFormerProjection
        if isinstance(spec.bridge, QFormerProjectionSpec):
            sizes = qformer_sizes(spec.bridge, image_encoder.width, text=spec.bridge.instruction)
            bridge = QFormerProjection(sizes, width)
        else:
            shape = image_encoder.width, width, image_encoder.num_tokens, image_encoder.grid
            bridge = Projection(spec.bridge, *shape, tiles=spec.image_encoder.resize == "anyres")
    return MetaModel(image_encoder, bridge, network)


def _image_encoder(spec: ImageEncoderSpec) -> ImageEncoder:
    import transformers

    config = find_config(_hf(spec.name))
    vision = getattr(config, "vision_config", config)
    family = FAMILIES.get(vision.model_type)
    if family is None:
        raise VlmError(f"{spec.name}: no image encoder can be made of a {config.model_type!r} model")
    size = spec.image_size or int(vision.image_size)
    with torch.device("meta"):
        tower = HfTower(getattr(transformers, family.model)(vision), family, spec.layer, (size, size), set())
        return ImageEncoder(spec.name, tower, ImageTransform(size=(size, size)), spec.layer, spec.drop_cls)


def _network(spec: LanguageModelSpec) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = find_config(_hf(spec.name))
    config = getattr(config, "text_config", config)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    network = factory.from_config(config)
    if spec.lora is not None:
        inject_lora(network, spec.lora)
    return network


def _hf(name: str) -> str:
    return parse_part_name(name, allowed=("hf",)).reference
