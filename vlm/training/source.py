"""Where batches come from: samples of all data sources, in an order that depends on seed and step alone."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm.data.catalogue import find_shards, load_dataset
from vlm.data.feature_cache import cache_features
from vlm.data.images import load_image
from vlm.data.mixing import MixtureOrder
from vlm.data.samples import Sample
from vlm.data.sharded_samples import ShardedSamples, Unread, shard_sizes
from vlm.errors import VlmError
from vlm.recipe import DataSection, DataSpec

MAX_CACHED = 5_000_000  # pictures in shards whose features are kept: their paths and hashes lie in memory


@dataclass(frozen=True)
class Prepared:
    """A sample ready to collate: what its model made of its texts, and its pictures' pixels [3,H,W] or tokens [N,D]."""

    texts: Any
    images: tuple[str, ...]
    tensors: dict[str, Tensor]


@dataclass
class SampleSource:
    """All training samples, their order, and the way to a picture's tensor.

    broken: sample id -> reason, for samples that were skipped.
    """

    model: Any
    section: DataSection
    sources: list[Sequence[Sample]]
    order: MixtureOrder
    load_picture: Callable[[str], Tensor]
    log: Callable[[str], None]
    broken: dict[str, str] = field(default_factory=dict)
    _begun: list[Future[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.section.workers) if self.section.workers else None

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(map(len, self.sources))

    def batch(self, step: int, batch_size: int) -> list[Sample | Unread]:
        """The samples of the whole global batch of `step`; those in shards are read by the process that takes them."""
        return [self._sample(source, index) for source, index in self.order.batch(step, batch_size)]

    def _sample(self, source: int, index: int) -> Sample | Unread:
        samples = self.sources[source]
        return Unread(samples, index) if isinstance(samples, ShardedSamples) else samples[index]

    def prepare(self, samples: Sequence[Sample | Unread], upcoming: Sequence[Sample | Unread] = ()) -> list[Prepared]:
        """Samples as tokens and tensors; broken ones are left out, counted and logged.

        upcoming: what is asked for next, begun already if there are workers.
        Raises VlmError once more than `max_broken` of all samples are broken.
        """
        if self._pool is None:
            results: Iterable[Prepared | VlmError] = map(self._prepare, samples)
        else:
            begun = self._begun or [self._pool.submit(self._prepare, sample) for sample in samples]
            self._begun = [self._pool.submit(self._prepare, sample) for sample in upcoming]
            results = (future.result() for future in begun)
        ready = []
        for sample, result in zip(samples, results):
            if isinstance(result, Prepared):
                ready.append(result)
            else:
                self.skip(sample.id, str(result))
        return ready

    def _prepare(self, place: Sample | Unread) -> Prepared | VlmError:
        try:
            sample = place.read() if isinstance(place, Unread) else place
            texts = self.model.prepare_texts(sample, self.section.max_length)
            return Prepared(texts, sample.images, {path: self.load_picture(path) for path in sample.images})
        except VlmError as error:
            return error

    def skip(self, name: str, reason: str) -> None:
        """Note a broken sample; raises VlmError when there are too many."""
        if name in self.broken:
            return
        self.broken[name] = reason
        self.log(f"skipped {name}: {reason}")
        if len(self.broken) > self.section.max_broken * self.num_samples:
            raise VlmError(
                f"{len(self.broken)} of {self.num_samples} samples are broken, more than data.max_broken="
                f"{self.section.max_broken} allows; the last: {name}: {reason}"
            )

    def collate(self, prepared: Sequence[Prepared]) -> Any:
        """Prepared samples as one batch with the tensors of its pictures."""
        tensors = {path: tensor for sample in prepared for path, tensor in sample.tensors.items()}
        batch = self.model.collate([(sample.texts, sample.images) for sample in prepared])
        return batch.with_images(lambda paths: torch.stack([tensors[path] for path in paths]))


def build_source(model: Any, section: DataSection, seed: int, log: Callable[[str], None]) -> SampleSource:
    """Load all data sources, and cache the frozen encoder's features if the recipe says so."""
    weights = [spec.weight for spec in section.train if spec.weight is not None]
    if weights and len(weights) < len(section.train):
        raise VlmError("data.train: give every source a weight, or none")
    loaded = [_load(model, spec, log) for spec in section.train]
    sources = [samples for samples, _ in loaded]
    shards = [samples.sizes if isinstance(samples, ShardedSamples) else None for samples in sources]
    order = MixtureOrder([len(s) for s in sources], weights or None, seed, shards, section.shuffle_buffer)

    def pixels(path: str) -> Tensor:
        return model.image_encoder.transform.eval(load_image(path))

    source = SampleSource(model, section, sources, order, pixels, log)
    for _, broken in loaded:
        for where, reason in broken:
            source.skip(where, reason)
    features = model.picture_features() if section.cache_features else None
    if features is not None and (paths := _pictures(sources)):
        source.load_picture = cache_features(features, paths, announce=log)
    return source


def _pictures(sources: Sequence[Sequence[Sample]]) -> list[str]:
    """All pictures of all samples. Raises VlmError for shards that hold more than can be told apart in memory."""
    paths: list[str] = []
    for samples in sources:
        if not isinstance(samples, ShardedSamples):
            paths += [path for sample in samples for path in sample.images]
        elif len(samples) > MAX_CACHED:
            raise VlmError(
                f"data.cache_features: {len(samples):,} pictures in shards are more than the {MAX_CACHED:,} whose "
                "features can be kept; set it to false, or give the source a limit"
            )
        else:
            paths += samples.pictures()
    return paths


def _load(model: Any, spec: DataSpec, log: Callable[[str], None]) -> tuple[Sequence[Sample], list[tuple[str, str]]]:
    """The samples of one source, and (where, reason) of each record that was broken."""
    if (shards := find_shards(spec.dataset, spec.split, spec.format, spec.images)) is not None:
        if spec.images is not None:
            raise VlmError("data.train: pictures of the format webdataset lie in the shards; leave `images` out")
        whole = spec.model_copy(update={"share_image": True})  # a record is one sample, so that places are known
        sizes = shard_sizes(shards, spec.limit, log)
        return ShardedSamples(shards, sizes, lambda record: model.samples([record], whole)), []
    data = load_dataset(spec.dataset, spec.split, format=spec.format, images=spec.images, limit=spec.limit)
    samples: list[Sample] = model.samples(data.records, spec)
    if not samples:
        raise VlmError(f"data set {spec.dataset!r}, split {spec.split!r}: no record to train on as use: {spec.use}")
    return samples, [(broken.where, broken.reason) for broken in data.broken]
