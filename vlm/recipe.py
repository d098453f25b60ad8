"""What a recipe may say: model, objectives, data, optimiser, schedule, training, evaluation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm.model_spec import ModelSpec, Precision, name_only
from vlm.paths import find_yaml, read_yaml
from vlm.schema import Strict, apply_overrides, validate


class ObjectiveSpec(Strict):
    """One objective of `vlm.objectives.OBJECTIVES` and its share of the loss.

    smoothing: share of the target that is spread over all answers (itc: the batch, lm: the vocabulary).
    equal_texts: pictures that have a text in common count as one (itc, sigmoid_itc, itm): for data where many pictures
    share a caption, so that none of them is a wrong one for it.
    """

    name: str
    weight: float = Field(default=1.0, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    equal_texts: bool = False


class DataSpec(Strict):
    """One source of training samples.

    dataset: a name under `datasets/`, a YAML file, or (with `format`) a file or folder of yours.
    use: what to train on: `captions`, `vqa`, `conversation`, or `questions` to given answers; by default whatever the
    record holds.
    prompts: the user's text in several wordings, of which one is drawn each time a sample is met; by default the
    model's own. `<image>` marks the picture, `{question}` (or, with use: questions, `{answer}`) what is asked.
    share_image: put all questions of a picture into one sequence behind one copy of its tokens.
    weight: relative sampling weight in the mixture; by default the number of samples.
    """

    dataset: str
    split: str = "train"
    format: str | None = None
    images: str | None = None
    use: Literal["auto", "captions", "vqa", "conversation", "questions"] = "auto"
    prompts: tuple[str, ...] = ()
    share_image: bool = True
    weight: float | None = Field(default=None, gt=0)
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _prompts_fit_use(self) -> "DataSpec":
        wanted = {"captions": "", "vqa": "{question}", "questions": "{answer}"}
        if self.prompts and self.use not in wanted:
            raise ValueError(f"prompts: say what they ask for: use: {', '.join(wanted)}")
        if self.use == "questions" and not self.prompts:
            raise ValueError("use: questions: give `prompts` with `{answer}` in them")
        for prompt in self.prompts:
            if "<image>" not in prompt or wanted[self.use] not in prompt:
                raise ValueError(f"prompts: {prompt!r} needs <image> and {wanted[self.use]}".removesuffix(" and "))
        return self


class DataSection(Strict):
    """All training data.

    max_broken: share of broken samples past which training stops.
    max_length: tokens of a sequence, image tokens included; by default the language model's context.
    cache_features: compute frozen image features once and keep them on disk, those of texts in memory.
    augment: random crops of the encoder's training transform; by default where the image encoder learns. Features of
        random crops are not cached.
    group_by_modality_length: batches hold samples with pictures or samples without, sorted by length (LLaVA-1.5).
    shuffle_buffer: samples of WebDataset shards that are shuffled together, rounded up to whole shards.
    workers: threads that decode and tokenise the next batch while this one trains; 0 does it in between.
    sampling: how often a source without `weight` is drawn from: by its `size`, or by the square root of it (`sqrt`,
        InstructBLIP).
    cached_views: with `augment: true` and a frozen encoder, crops of each picture whose features are kept; each time
        one of them is drawn. 0: every crop is new, and encoded.
    """

    train: list[DataSpec] = Field(min_length=1)
    max_broken: float = Field(default=0.001, ge=0, le=1)
    max_length: int | None = Field(default=None, ge=8)
    cache_features: bool = True
    augment: bool | None = None
    cached_views: int = Field(default=0, ge=0)
    sampling: Literal["size", "sqrt"] = "size"
    group_by_modality_length: bool = False
    shuffle_buffer: int = Field(default=50_000, ge=1)
    workers: int = Field(default=0, ge=0)


_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Strict):
    """AdamW. `groups` gives learning rates by name pattern, e.g. `{"language_model.lora.*": 2.0e-4}`.

    image_layer_decay: factor on the learning rate of an image encoder that learns, once for each layer behind (BEiT).
    """

    lr: float = Field(gt=0)
    groups: dict[str, Annotated[float, Field(ge=0)]] = {}
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad: float | None = Field(default=1.0, gt=0)
    image_layer_decay: float = Field(default=1.0, gt=0, le=1)


class ScheduleSection(Strict):
    """Learning rate over time: linear warm-up from `warmup_start`, then `name` down to `min_lr`, as shares of lr.

    warmup: steps if 1 or more, else share of all steps.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0)
    warmup_start: float = Field(default=0.0, ge=0, le=1)
    min_lr: float = Field(default=0.0, ge=0, le=1)


class TrainSection(Strict):
    """The loop.

    batch_size: samples of one optimiser step over all processes; with `share_image` a sample is a picture with its
    questions. micro_batch_size: samples that go through the model at once (memory); the result does not depend on it.
    cpu_offload: what the forward pass keeps for the backward pass waits in the CPU's memory (CUDA only).
    fsdp: share weights, gradients and optimiser among processes (full shard), where they do not fit on one.
    compile: transformer layers that gradients flow through run compiled; pays where a run takes an hour.
    gradient_checkpointing: compute the inside of transformer layers again in the backward pass (memory for time).
    """

    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Precision = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    cpu_offload: bool = False
    fsdp: bool = False
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    sample_every: int = Field(default=0, ge=0)
    max_bad_steps: int = Field(default=10, ge=1)
    track: list[Literal["tensorboard", "trackio"]] = []

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        return self


class EvaluationSection(Strict):
    """Benchmarks scored while training: every `every` steps (0: only at the end) on the first `limit` samples."""

    benchmarks: list[str] = []
    every: int = Field(default=0, ge=0)
    limit: int | None = Field(default=None, ge=1)


class Recipe(Strict):
    """One experiment. `trainable` lists name patterns of what learns; everything else is frozen."""

    model: ModelSpec
    objectives: list[ObjectiveSpec] = Field(default=[ObjectiveSpec(name="lm")], min_length=1)
    data: DataSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    evaluation: EvaluationSection = EvaluationSection()
    trainable: list[str] = Field(default=["bridge.*"], min_length=1)
    init_from: str | list[str] | None = None
    output: str

    @model_validator(mode="after")
    def _one_start(self) -> "Recipe":
        if self.init_from is not None and getattr(self.model.bridge, "start", "random") != "random":
            raise ValueError("`init_from` starts from other weights, `bridge.start` from the data: give one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _heads_learn_with_their_bridge(cls, value: Any) -> Any:
        model = value.get("model") if isinstance(value, dict) else None
        kind = model.get("type") if isinstance(model, dict) else getattr(model, "type", None)
        return {"trainable": ["bridge.*", "heads.*"], **value} if kind == "qformer" else value

    @field_validator("objectives", mode="before")
    @classmethod
    def _objective_names(cls, value: Any) -> Any:
        return [name_only(item) for item in value] if isinstance(value, list) else value

    @field_validator("objectives")
    @classmethod
    def _each_objective_once(cls, value: list[ObjectiveSpec]) -> list[ObjectiveSpec]:
        if len({spec.name for spec in value}) < len(value):
            raise ValueError("an objective is named twice; give it a `weight`")
        return value


def load_recipe(name: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with `KEY=VALUE` overrides applied.

    Raises VlmError that names the file and the key, with the nearest known key where one is unknown.
    """
    path = find_yaml("recipes", str(name))
    return validate(Recipe, apply_overrides(read_yaml(path), list(overrides)), where=str(path))
