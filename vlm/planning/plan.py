"""What a recipe costs, before anything is trained or downloaded."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from typing import Any

from vlm.errors import VlmError
from vlm.models.meta import build_on_meta
from vlm.planning.hardware import USABLE, find_gpu
from vlm.planning.measure import DTYPES, Measured, encoder_is_frozen, measure
from vlm.planning.memory import Memory, memory
from vlm.planning.parts import context_of
from vlm.planning.workload import workload
from vlm.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """Everything `vlm-train RECIPE --plan` says; bytes, operations, hours.

    options: (checkpointing, sharded) in words -> memory of one GPU. flops: part -> forward and backward of a sample.
    levers: overrides that make it fit, [] where it fits or nothing does. steps, hours: None where the number of
    samples is not known. cache: bytes of all features of the frozen image encoder, None where it learns.
    """

    gpu: str
    gpus: int
    precision: str
    micro_batch_size: int
    parameters: dict[str, int]
    trained: dict[str, int]
    text_tokens: int
    labels: int
    assumed: bool
    flops: dict[str, tuple[float, float]]
    memory: Memory
    options: dict[str, float]
    limit: float
    fits: bool
    levers: list[str]
    cache: float | None
    cached: bool
    samples: int | None
    steps: int | None
    share: float
    hours: float | None

    @property
    def flops_per_sample(self) -> float:
        """Operations of a sample in training."""
        return sum(forward + backward for forward, backward in self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        total = {"flops_per_sample": self.flops_per_sample, "memory_total": self.memory.total}
        return {**asdict(self), **total}


def make_plan(
    recipe: Recipe,
    gpu: str = "h100",
    gpus: int = 1,
    share: float = 0.4,
    tokens: int | None = None,
    samples: int | None = None,
) -> Plan:
    """Plan a run on `gpus` of that kind, each reaching `share` of its peak.

    tokens, samples: text tokens of a sample and samples of an epoch, where more is known than the estimate by kind.
    Raises VlmError for what `vlm-train` would refuse, and for parts whose configuration is not known offline.
    """
    card = find_gpu(gpu)
    if gpus < 1 or not 0 < share <= 1:
        raise VlmError("--gpus is at least 1, --share of the peak above 0 and at most 1")
    precision = recipe.train.precision if recipe.train.precision != "auto" else "bf16"
    shape = build_on_meta(recipe.model, recipe.trainable, precision)
    if getattr(shape, "tiling", None) is not None:
        raise VlmError("--plan: image_encoder.resize: anyres: how many tiles a picture becomes, its size alone tells")
    work = workload(recipe, context_of(shape), tokens, samples)
    frozen = encoder_is_frozen(shape)
    cached = frozen and recipe.data.cache_features and not (recipe.data.augment and not recipe.data.cached_views)
    mine = math.ceil(recipe.train.batch_size / gpus)
    micro = min(recipe.train.micro_batch_size or mine, mine)
    trial = _Trial(recipe, work, precision, mine, cached, gpus)
    found = trial.measured(micro, recipe.train.gradient_checkpointing, recipe.train.fsdp)
    chosen = trial.memory(micro, recipe.train.gradient_checkpointing, recipe.train.fsdp)
    limit = card.memory * USABLE
    fits = chosen.total <= limit
    steps = recipe.train.steps
    if steps is None and work.samples is not None:
        steps = math.ceil((recipe.train.epochs or 1) * work.samples / recipe.train.batch_size)
    each = sum(forward + backward for forward, backward in found.flops.values())
    peak = card.single if precision == "fp32" else card.half
    hours = None if steps is None else each * steps * recipe.train.batch_size / (gpus * peak * share) / 3600
    return Plan(
        gpu=gpu,
        gpus=gpus,
        precision=precision,
        micro_batch_size=micro,
        parameters=found.parameters,
        trained=found.trained,
        text_tokens=work.text_tokens,
        labels=work.labels,
        assumed=work.assumed,
        flops=found.flops,
        memory=chosen,
        options=trial.options(micro),
        limit=limit,
        fits=fits,
        levers=[] if fits else trial.levers(micro, limit),
        cache=_cache_bytes(shape, recipe, work.samples, precision) if frozen else None,
        cached=cached,
        samples=work.samples,
        steps=steps,
        share=share,
        hours=hours,
    )


class _Trial:
    """Measurements of a recipe by micro-batch size and checkpointing, each made once."""

    def __init__(self, recipe: Recipe, work: Any, precision: str, mine: int, cached: bool, gpus: int) -> None:
        self.recipe, self.work, self.precision = recipe, work, precision
        self.mine, self.cached, self.gpus = mine, cached, gpus
        self._made: dict[tuple[int, bool, int], Measured] = {}

    def measured(self, micro: int, checkpointing: bool, sharded: bool) -> Measured:
        """The measurement. Raises VlmError where layers cannot be checkpointed."""
        # A language model's layers are shared one by one; gradients of what is gathered at once are whole till the end.
        shares = self.gpus if sharded and self._language is not None else 1
        key = micro, checkpointing, shares
        if key not in self._made:
            self._made[key] = measure(
                self.recipe, self.work, self.precision, micro, self.mine, self.cached, checkpointing, shares
            )
        return self._made[key]

    def memory(self, micro: int, checkpointing: bool, sharded: bool, four_bits: bool = False) -> Memory:
        """Memory of one GPU."""
        found = self.measured(micro, checkpointing, sharded)
        four_bits = four_bits or getattr(self._language, "quantization", "none") == "4bit"
        return memory(found.held, found.working, micro < self.mine, self.gpus, sharded, four_bits)

    @property
    def _language(self) -> Any:
        return getattr(self.recipe.model, "language_model", None)

    @property
    def shards(self) -> bool:
        """Whether `train.fsdp` could be on."""
        return self.gpus > 1

    def checkpoints(self, micro: int) -> list[bool]:
        """Off, and on where the model has layers for it."""
        try:
            self.measured(micro, True, self.recipe.train.fsdp)
        except VlmError:
            return [False]
        return [False, True]

    def options(self, micro: int) -> dict[str, float]:
        """Total memory with and without checkpointing and sharding."""
        return {
            f"gradient_checkpointing={str(on).lower()} fsdp={str(sharded).lower()}": self.memory(
                micro, on, sharded
            ).total
            for on in self.checkpoints(micro)
            for sharded in ([False, True] if self.shards else [False])
        }

    def levers(self, micro: int, limit: float) -> list[str]:
        """The first overrides that fit: those that cost least time first."""
        section = self.recipe.train
        sizes = [micro >> n for n in range(micro.bit_length()) if micro >> n >= 1]
        modes = self.checkpoints(micro) if not section.gradient_checkpointing else [True]
        sharding = [False, True] if self.shards and not section.fsdp else [section.fsdp]
        frozen = self._language is not None and "language_model.*" not in self.recipe.trainable
        for four_bits in [False, True] if frozen else [False]:
            for sharded in sharding:
                if four_bits and sharded:
                    continue
                for on in modes:
                    if self.memory(sizes[-1], on, sharded, four_bits).total > limit:
                        continue

                    def fits(size: int, on: bool = on, sharded: bool = sharded, four_bits: bool = four_bits) -> bool:
                        return self.memory(size, on, sharded, four_bits).total <= limit

                    size = sizes[bisect_left(sizes, True, key=fits)]  # smaller ones need less
                    return [
                        *([f"train.micro_batch_size={size}"] if size != micro else []),
                        *(["train.gradient_checkpointing=true"] if on and not section.gradient_checkpointing else []),
                        *(["train.fsdp=true"] if sharded and not section.fsdp else []),
                        *(["model.language_model.quantization=4bit"] if four_bits else []),
                    ]
        return []


def _cache_bytes(model: Any, recipe: Recipe, samples: int | None, precision: str) -> float | None:
    """Bytes of the features of all pictures; those of a sample where it is not known how many there are."""
    encoder = model.image_encoder
    values = encoder.num_tokens * encoder.width
    if recipe.model.type == "dual_encoder" and model.bridge.image.attention is None:
        values = model.bridge.image.width_in
    return float(values * DTYPES[precision].itemsize * (samples or 1) * max(1, recipe.data.cached_views))
