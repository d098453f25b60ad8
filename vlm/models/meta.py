"""A whole model on the meta device: shapes and parameter counts from configurations alone, no weights, no memory."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vlm.backbones.image_encoder import ImageEncoder, Tower
from vlm.backbones.image_hf import FAMILIES, HfTower
from vlm.backbones.image_open_clip import check_arch, open_clip_transform, visual_tower
from vlm.backbones.image_timm import build_untrained_timm
from vlm.backbones.joined_layers import join_image_layers, join_text_layers
from vlm.backbones.known_configs import find_config
from vlm.backbones.language import LanguageModel, inject_lora
from vlm.backbones.names import PartName, parse_part_name
from vlm.backbones.text import (
    BIDIRECTIONAL,
    DUAL,
    HfDualTextTower,
    HfTextTower,
    OpenClipTextTower,
    TextEncoder,
    TextTower,
    pool_cls,
)
from vlm.bridges.dual_tower import DualTower
from vlm.bridges.projection import Projection
from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_init import QFormerTokenizer, qformer_sizes
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.bridges.qformer_projection import QFormerProjection
from vlm.data.transforms import ImageTransform
from vlm.devices import storage_dtype
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
from vlm.models.freezing import freeze_all_but, named_trainable
from vlm.models.generative import GenerativeModel
from vlm.models.qformer_model import QFormerModel
from vlm.models.tasks import TaskModel

# Attributes of configurations that say how many layers there are.
_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer")


def build_on_meta(
    spec: ModelSpec,
    trainable: list[str] | tuple[str, ...] = (),
    precision: str = "fp32",
    depth: int | None = None,
) -> Any:
    """The model that `spec` describes, with what matches `trainable` set to learn, in eval mode; it holds no weights.

    precision: of what is frozen; what learns is fp32. depth: layers of encoders and language model, fewer than theirs.
    Texts cannot be tokenised. Layers that are dropped at load are not there.
    Raises VlmError for a part whose configuration is not known, and for what `build_model` would refuse.
    """
    builders: dict[str, Any] = {"generative": _generative, "dual_encoder": _dual_encoder, "qformer": _qformer}
    with torch.device("meta"):
        model: TaskModel = builders[spec.type](spec, precision, depth)
    model.requires_grad_(False)
    if trainable:
        freeze_all_but(model, trainable)
    return model.eval()


def part_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; tied ones count once."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def trained_sizes(model: nn.Module) -> dict[str, int]:
    """Trained parameters of each part, `language_model.lora` apart."""
    sums: dict[str, int] = {}
    for name, parameter in named_trainable(model):
        part = "language_model.lora" if ".lora." in name else name.partition(".")[0]
        sums[part] = sums.get(part, 0) + parameter.numel()
    return sums


def _generative(spec: GenerativeSpec, precision: str, depth: int | None) -> GenerativeModel:
    image_encoder = _image_encoder(spec.image_encoder, precision, depth)
    network = _network(spec.language_model, precision, depth)
    language_model = LanguageModel(spec.language_model.name, network, _NoTokenizer())
    bridge: Projection | QFormerProjection
    instructions = None
    if isinstance(spec.bridge, QFormerProjectionSpec):
        sizes = qformer_sizes(spec.bridge, image_encoder.width, text=spec.bridge.instruction)
        bridge = QFormerProjection(sizes, language_model.width)
        instructions = _qformer_tokenizer(sizes) if spec.bridge.instruction else None
    else:
        shape = image_encoder.width, language_model.width, image_encoder.num_tokens, image_encoder.grid
        bridge = Projection(spec.bridge, *shape, tiles=spec.image_encoder.resize == "anyres")
    return GenerativeModel(spec, image_encoder, bridge, language_model, instructions)


def _dual_encoder(spec: DualEncoderSpec, precision: str, depth: int | None) -> DualEncoder:
    image = _image_encoder(spec.image_encoder, precision, depth)
    text = _text_encoder(spec.text_encoder.name, spec.text_encoder.pool_layers, depth)
    text.to(_dtype(spec.text_encoder.precision, precision))
    widths = (image.width, image.pooled_width), (text.width, text.pooled_width)
    return DualEncoder(spec, image, text, DualTower(spec.bridge, *widths, image.num_prefix_tokens > 0, text.has_cls))


def _qformer(spec: QFormerSpec, precision: str, depth: int | None) -> QFormerModel:
    image_encoder = _image_encoder(spec.image_encoder, precision, depth)
    sizes = qformer_sizes(spec.bridge, image_encoder.width)
    heads = QFormerHeads(sizes.width, sizes.vocabulary, spec.bridge.embed_width)
    return QFormerModel(spec, image_encoder, QFormer(sizes), heads, _qformer_tokenizer(sizes))


def _qformer_tokenizer(sizes: QFormerSizes) -> QFormerTokenizer:
    return QFormerTokenizer(_NoTokenizer(), sizes.vocabulary - 1)


def _dtype(own: str, precision: str) -> torch.dtype:
    return storage_dtype(own if own != "auto" else precision)


# ---- parts ----------------------------------------------------------------------------------------------------------


def _image_encoder(spec: ImageEncoderSpec, precision: str, depth: int | None) -> ImageEncoder:
    part = parse_part_name(spec.name, allowed=("timm", "open_clip", "hf", "starter"))
    tower, transform = _TOWERS[part.source](part, spec, depth)
    tower = join_image_layers(tower, spec.pool_layers, spec.name)
    encoder = ImageEncoder(spec.name, tower, transform, spec.layer, spec.drop_cls, spec.pool_layers)
    return encoder.to(_dtype(spec.precision, precision))


def _hf_tower(part: PartName, spec: ImageEncoderSpec, depth: int | None) -> tuple[Tower, ImageTransform]:
    import transformers

    config = find_config(part.reference)
    vision = getattr(config, "vision_config", config)
    family = FAMILIES.get(vision.model_type)
    if family is None:
        raise VlmError(f"{spec.name}: no image encoder can be made of a {config.model_type!r} model")
    size = spec.image_size or int(vision.image_size)
    model = getattr(transformers, family.model)(_shallow(vision, depth))
    tower = HfTower(model, family, spec.layer, (size, size), set())
    return tower, ImageTransform(size=(size, size))


def _open_clip_tower(part: PartName, spec: ImageEncoderSpec, depth: int | None) -> tuple[Tower, ImageTransform]:
    model = _open_clip(part.reference, depth, spec.image_size)
    return visual_tower(model.visual, spec.layer, part.reference), open_clip_transform(model, part.reference)


def _timm_tower(part: PartName, spec: ImageEncoderSpec, depth: int | None) -> tuple[Tower, ImageTransform]:
    name = "tf_efficientnet_lite0" if part.source == "starter" else part.reference
    return build_untrained_timm(name, spec.layer, spec.image_size, depth)


_TOWERS = {"hf": _hf_tower, "open_clip": _open_clip_tower, "timm": _timm_tower, "starter": _timm_tower}


def _open_clip(reference: str, depth: int | None, image_size: int | None = None) -> Any:
    """An open_clip model without its logit scale's value, whatever its tag's weights are."""
    import open_clip

    arch, _ = check_arch(reference)
    options: dict[str, Any] = {"force_image_size": image_size} if image_size else {}
    if depth is not None:
        config = open_clip.get_model_config(arch)
        if "timm_model_name" not in config["vision_cfg"]:
            options["vision_cfg"] = {**config["vision_cfg"], "layers": depth}
        options["text_cfg"] = {**config["text_cfg"], "layers": depth}
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.ERROR))  # it warns that there are no weights
    try:
        return open_clip.create_model(
            arch, device="meta", force_custom_text=True, pretrained_image=False, pretrained_text=False, **options
        )
    finally:
        logging.disable(disabled)


def _text_encoder(name: str, layers: list[int] | None, depth: int | None) -> TextEncoder:
    import transformers

    part = parse_part_name(name, ("hf", "open_clip", "starter"))
    if part.source == "open_clip":
        text = _open_clip(part.reference, depth).text
        tower = join_text_layers(OpenClipTextTower(text), layers, name)
        return TextEncoder(name, tower, _no_tokens(text.context_length), text.context_length)
    config = find_config(_text_reference(part))
    config = getattr(config, "text_config", config)
    kind, context = config.model_type, int(config.max_position_embeddings)
    if kind in DUAL:
        tower = HfDualTextTower(getattr(transformers, DUAL[kind][0])(_shallow(config, depth)))
        return TextEncoder(name, _unmasked(join_text_layers(tower, layers, name)), _no_tokens(context), context)
    if kind not in BIDIRECTIONAL:
        raise VlmError(f"{name}: no text encoder can be made of a {kind!r} model")
    options: dict[str, Any] = {} if kind == "distilbert" else {"add_pooling_layer": False}
    model = getattr(transformers, BIDIRECTIONAL[kind])(_shallow(config, depth), **options)
    context -= 2 if kind in ("roberta", "xlm-roberta", "mpnet") else 0
    if layers and depth is not None:  # a shallower model's first one
        layers = list({max(layer, -depth - 1) for layer in layers})
    tower = join_text_layers(HfTextTower(model, pool_cls), layers, name)
    return TextEncoder(name, _unmasked(tower), _no_tokens(context), context, has_cls=True)


def _text_reference(part: PartName) -> str:
    from vlm.backbones.starter import minilm_folder

    return str(minilm_folder()) if part.source == "starter" else part.reference


def _network(spec: LanguageModelSpec, precision: str, depth: int | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = find_config(_language_reference(spec.name))
    config = _shallow(getattr(config, "text_config", None) or config, depth)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    network = factory.from_config(config, dtype=_dtype(spec.precision, precision))
    if spec.lora is not None:
        inject_lora(network, spec.lora)
    return network


def _language_reference(name: str) -> str:
    part = parse_part_name(name, allowed=("hf", "gguf", "starter"))
    if part.source == "gguf":
        from vlm.backbones.starter import gguf_folder

        return str(gguf_folder(part.reference))
    return "HuggingFaceTB/SmolLM2-135M-Instruct" if part.source == "starter" else part.reference


def _shallow(config: Any, depth: int | None) -> Any:
    """A configuration with at most `depth` layers."""
    if depth is not None:
        for key in _DEPTHS:
            if isinstance(own := getattr(config, key, None), int):
                setattr(config, key, min(own, depth))
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:depth]
    return config


def _unmasked(tower: TextTower) -> TextTower:
    """The tower seeing all texts as equally long: whether they are is not asked of tensors without values."""
    forward = tower.forward
    tower.forward = lambda ids, mask: forward(ids, None)  # type: ignore[method-assign]
    return tower


def _no_tokens(length: int) -> Any:
    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        return ids, torch.ones_like(ids)

    return tokenize


class _NoTokenizer:
    """Stands where a tokeniser would: shapes do not depend on words."""

    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = 0
    sep_token_id: int = 0
    chat_template: str | None = None

    def __call__(self, text: Any, **options: Any) -> Any:
        raise VlmError("this model has shapes only: it cannot read texts")

    def decode(self, ids: Any, **options: Any) -> str:
        raise VlmError("this model has shapes only: it cannot write texts")

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0
