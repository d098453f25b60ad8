"""What a recipe may say of a model: its parts, the bridge between them, and the families they make."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, field_validator, model_validator

from vlm.schema import Strict

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Pool = Literal["pooled", "cls", "mean", "attention"]
TowerProjection = Literal["linear", "mlp", "none"]


def _from_the_end(layers: list[int]) -> list[int]:
    if any(layer >= 0 for layer in layers):
        raise ValueError("layers count from the end, -1 is the last")
    if len(set(layers)) < len(layers):
        raise ValueError("a layer is named twice")
    return layers


# Two layers or more, counted from the end.
PoolLayers = Annotated[list[int], Field(min_length=2), AfterValidator(_from_the_end)]


def name_only(value: Any) -> Any:
    """A bare string is short for `{name: STRING}`."""
    return {"name": value} if isinstance(value, str) else value


class ImageEncoderSpec(Strict):
    """A frozen (or trained) image encoder.

    layer: which hidden state is read, counted from the end (-1: the last; -2: LLaVA's and BLIP-2's choice).
    drop_cls: leave prefix tokens (CLS, registers) out of the token output.
    image_size: pixels; the part's own if not given.
    resize: `shortest` (and centre crop), `square` (squash), `pad` (LLaVA-1.5) or `anyres` (LLaVA-1.6: the squashed
        picture and tiles of a larger copy); the part's own if not given.
    grid_pinpoints: sizes (height, width) in pixels that `anyres` may scale a picture into; by default LLaVA-1.6's 1x2,
        2x1, 2x2, 3x1 and 1x3 tiles.
    pool_layers: make the picture's pooled embedding of several layers, their tokens' means side by side (timm, with a
        dual tower); the encoder's own if not given.
    """

    name: str
    layer: int = -1
    drop_cls: bool = True
    image_size: int | None = Field(default=None, ge=1)
    resize: Literal["shortest", "square", "pad", "anyres"] | None = None
    grid_pinpoints: list[tuple[int, int]] | None = Field(default=None, min_length=1)
    pool_layers: PoolLayers | None = None
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _layers_are_of_the_whole(self) -> "ImageEncoderSpec":
        if self.pool_layers is not None and self.layer != -1:
            raise ValueError("`pool_layers` reads several layers and `layer` cuts some away: give one of them")
        return self

    @model_validator(mode="after")
    def _pinpoints_go_with_anyres(self) -> "ImageEncoderSpec":
        if self.grid_pinpoints is not None and self.resize != "anyres":
            raise ValueError("`grid_pinpoints` goes with `resize: anyres`")
        return self


def _one_size(encoder: ImageEncoderSpec) -> ImageEncoderSpec:
    if encoder.resize == "anyres":
        raise ValueError("`resize: anyres` is for a generative model with a projection")
    return encoder


def _tokens_alone(encoder: ImageEncoderSpec) -> ImageEncoderSpec:
    if encoder.pool_layers is not None:
        raise ValueError("`pool_layers` is for a dual encoder: this model reads tokens, not the pooled embedding")
    return encoder


class LoraSpec(Strict):
    """Low-rank adapters in the language model (Hu et al. 2021), through peft, scoped to the language model by path.

    targets: ends of linear layers' names; `all-linear` means every linear layer but the vocabulary projection.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class LanguageModelSpec(Strict):
    """A frozen (or trained) language model, decoder-only or encoder-decoder, with optional LoRA.

    quantization: hold the frozen weights in 4 bits (NF4, Dettmers et al. 2023) or 8 (Dettmers et al. 2022); CUDA only.
    trust_remote_code: run the Python beside the weights of an `hf:` part that transformers does not know.
    """

    name: str
    lora: LoraSpec | None = None
    precision: Precision = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _code_lies_beside_hf_parts(self) -> "LanguageModelSpec":
        if self.trust_remote_code and not self.name.startswith("hf:"):
            raise ValueError("`trust_remote_code` is for a part named `hf:...`; others have no code of their own")
        return self


class TextEncoderSpec(Strict):
    """A frozen (or trained) text encoder.

    pool_layers: make a text's pooled embedding of several layers, their tokens' means side by side (BERT and its kin;
        of 6 layers, -7 is the word embeddings); the encoder's own if not given.
    """

    name: str
    pool_layers: PoolLayers | None = None
    precision: Precision = "auto"


class ProjectionSpec(Strict):
    """The projection bridge: image tokens to the language model's width.

    type: `linear`, or `mlp` with `depth` linear layers and GELU between them (LLaVA-1.5: 2).
    reduce: `none`, `pool` (adaptive average to a `tokens` grid) or `pixel_shuffle` by `factor` (nanoVLM, Idefics3).
    input_norm: layer norm on the image tokens, for encoders that end without one.
    match_embeddings: scale the initial output to the RMS of the language model's token embeddings.
    """

    type: Literal["linear", "mlp"] = "mlp"
    depth: int = Field(default=2, ge=2, le=8)
    reduce: Literal["none", "pool", "pixel_shuffle"] = "none"
    tokens: int | None = Field(default=None, ge=1)
    factor: int = Field(default=2, ge=2)
    input_norm: bool = False
    match_embeddings: bool = False

    @model_validator(mode="after")
    def _tokens_go_with_pooling(self) -> "ProjectionSpec":
        if (self.reduce == "pool") != (self.tokens is not None):
            raise ValueError("`tokens` is the number of image tokens after `reduce: pool`: give both or neither")
        return self


class DualTowerSpec(Strict):
    """The dual tower: pooling and projection of both sides into one space, and the scale of their similarity.

    image_pool, text_pool: `pooled` (the encoder's own embedding), `cls` (the first token), `mean` (over tokens) or
    `attention` (one learned query).
    image_projection, text_projection: `linear`, `mlp` (two layers with GELU), or `none` where the pooled embedding is
    in the joint space already (CLIP's towers).
    width: of the joint space; by default that of the side without projection, else 512.
    logits: `softmax` (CLIP) or `sigmoid` (SigLIP).
    start: where linear projections begin: `random`, or `canonical`: the canonical correlations of
    the training pairs' features (Hotelling 1936) with a ridge, in closed form, which training then refines.
    ridge: with `start: canonical`, what is added to each side's covariance, as a share of its mean variance,
    by default .5.
    logit_scale: where the factor on the cosine starts: a number, or `published` for that of the checkpoint both
    encoders come from; by default 1/.07 (softmax) or 10 (sigmoid).
    logit_bias: where a sigmoid's bias starts, by default -10; with `logit_scale: published` the checkpoint's.
    """

    width: int | None = Field(default=None, ge=1)
    image_pool: Pool = "pooled"
    text_pool: Pool = "pooled"
    image_projection: TowerProjection = "linear"
    text_projection: TowerProjection = "linear"
    start: Literal["random", "canonical"] = "random"
    ridge: float | None = Field(default=None, gt=0)
    logits: Literal["softmax", "sigmoid"] = "softmax"
    logit_scale: Annotated[float, Field(gt=0)] | Literal["published"] | None = None
    logit_bias: float | None = None

    @model_validator(mode="after")
    def _canonical_is_linear(self) -> "DualTowerSpec":
        linear = self.image_projection == self.text_projection == "linear"
        if self.start == "canonical" and not (linear and "attention" not in (self.image_pool, self.text_pool)):
            raise ValueError("`start: canonical` is for two linear projections of embeddings without attention pooling")
        if self.start == "random" and self.ridge is not None:
            raise ValueError("`ridge` goes with `start: canonical`")
        return self

    @model_validator(mode="after")
    def _bias_goes_with_sigmoid(self) -> "DualTowerSpec":
        if self.logit_bias is not None and (self.logits == "softmax" or self.logit_scale == "published"):
            raise ValueError("`logit_bias` goes with `logits: sigmoid` and a `logit_scale` that is not `published`")
        return self


class QFormerParts(Strict):
    """The Q-Former: learned queries that read an image, in layers of a BERT (BLIP-2).

    init: the BERT it starts from, in transformers' layout; gives width, heads, vocabulary and tokeniser. Or a published
    BLIP-2 or InstructBLIP, whose Q-Former is taken as it is.
    num_queries: learned queries, and so the tokens a picture becomes.
    layers: the first so many of the BERT's; all if not given.
    cross_attention_every: layers 0, n, 2n, ... look at the image.
    dropout: on hidden states and attention probabilities in training.
    """

    type: Literal["qformer"] = "qformer"
    init: str = "hf:bert-base-uncased"
    num_queries: int = Field(default=32, ge=1)
    layers: int | None = Field(default=None, ge=1)
    cross_attention_every: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class QFormerBridgeSpec(QFormerParts):
    """A Q-Former that contrasts and matches images and texts (BLIP-2's first stage).

    embed_width: of the joint space of images and texts.
    """

    embed_width: int = Field(default=256, ge=1)


class QFormerProjectionSpec(QFormerParts):
    """A Q-Former between an image encoder and a language model (BLIP-2's second stage, InstructBLIP, MiniGPT-4).

    instruction: the queries read what the user asks as well (InstructBLIP).
    instruction_length: tokens of it that they read; longer ones are cut.
    """

    instruction: bool = False
    instruction_length: int = Field(default=128, ge=3)


class GenerativeSpec(Strict):
    """The generative family: image tokens, projected (LLaVA) or read by a Q-Former (BLIP-2's second stage), spliced
    into a language model's prompt.

    template: a name of `vlm.data.templates.TEMPLATES`, `tokenizer` for the tokeniser's own chat template, or
    jinja text with `{% generation %}` blocks around what the model says.
    question_prompt, caption_prompt: the user's text around a question, and the one that asks for a caption, in training
    and in `answer` and `caption` alike.
    split_captions: an encoder-decoder reads a random first part of a caption and learns to say the rest (BLIP-2,
    section 3.2); in training, where nothing was asked.
    """

    type: Literal["generative"] = "generative"
    image_encoder: ImageEncoderSpec
    bridge: Annotated[ProjectionSpec | QFormerProjectionSpec, Field(discriminator="type")] = ProjectionSpec()
    language_model: LanguageModelSpec
    template: str = "tokenizer"
    question_prompt: str = "<image>\n{question}"
    caption_prompt: str = "<image>"
    split_captions: bool = False

    _tokens = field_validator("image_encoder")(_tokens_alone)
    _short = field_validator("image_encoder", "language_model", mode="before")(name_only)

    @field_validator("bridge", mode="before")
    @classmethod
    def _projection_by_default(cls, value: Any) -> Any:
        return {"type": "mlp", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _tiles_are_projected(self) -> "GenerativeSpec":
        if isinstance(self.bridge, QFormerProjectionSpec):
            _one_size(self.image_encoder)
        return self

    @field_validator("question_prompt")
    @classmethod
    def _question_has_a_place(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("`{question}` is missing: it marks where the question goes")
        return value


class DualEncoderSpec(Strict):
    """The contrastive family (CLIP, SigLIP, LiT): images and texts as points in one space."""

    type: Literal["dual_encoder"] = "dual_encoder"
    image_encoder: ImageEncoderSpec
    bridge: DualTowerSpec = DualTowerSpec()
    text_encoder: TextEncoderSpec

    _short = field_validator("image_encoder", "text_encoder", mode="before")(name_only)
    _whole = field_validator("image_encoder")(_one_size)


class QFormerSpec(Strict):
    """The Q-Former family, first stage (BLIP-2): contrast, matching and captions over a frozen image encoder.

    text_length: tokens of a text in training, [CLS] and [SEP] among them; longer ones are cut.
    match_length: tokens of a text in `encode_text` and `match` (BLIP-2's retrieval: 35).
    """

    type: Literal["qformer"] = "qformer"
    image_encoder: ImageEncoderSpec
    bridge: QFormerBridgeSpec = QFormerBridgeSpec()
    text_length: int = Field(default=32, ge=3)
    match_length: int = Field(default=35, ge=3)

    _short = field_validator("image_encoder", mode="before")(name_only)
    _whole = field_validator("image_encoder")(_one_size)
    _tokens = field_validator("image_encoder")(_tokens_alone)


# The families, told apart by `type`.
ModelSpec: TypeAlias = Annotated[GenerativeSpec | DualEncoderSpec | QFormerSpec, Field(discriminator="type")]
