"""Where batches come from: samples of all data sources, in an order that depends on seed and step alone."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlm.data.catalogue import find_shards, load_dataset
from vlm.data.content_hash import content_hash
from vlm.data.feature_cache import FeatureCache, PictureFeatures, Together, cache_features
from vlm.data.grouping import GroupedOrder
from vlm.data.images import load_image
from vlm.data.mixing import MixtureOrder
from vlm.data.samples import Sample
from vlm.data.sharded_samples import ShardedSamples, Unread, shard_sizes
from vlm.data.tiling import TiledPicture, stack_pictures
from vlm.data.transforms import ImageTransform
from vlm.errors import VlmError
from vlm.recipe import DataSection, DataSpec

MAX_CACHED = 5_000_000  # pictures in shards whose features are kept: their paths and hashes lie in memory


@dataclass(frozen=True, slots=True)
class Placed:
    """A sample, its place in the endless order of training, and the step that meets it there."""

    place: int
    step: int
    sample: Sample | Unread


@dataclass(frozen=True)
class Prepared:
    """A sample ready to collate: what its model made of its texts, and its pictures' pixels [3,H,W] or features.

    place: in the endless order of training.
    """

    texts: Any
    images: tuple[str, ...]
    tensors: dict[str, Tensor | TiledPicture]
    place: int


@dataclass
class SampleSource:
    """All training samples, their order, and the way to a picture's tensor.

    load_picture: (path, step) -> pixels [3,H,W], tiles, or features.
    broken: sample id -> reason, for samples that were skipped.
    """

    model: Any
    section: DataSection
    sources: list[Sequence[Sample]]
    order: MixtureOrder
    load_picture: Callable[[str, int], Tensor | TiledPicture]
    log: Callable[[str], None]
    broken: dict[str, str] = field(default_factory=dict)
    _begun: list[Future[Any]] = field(default_factory=list)
    _grouped: GroupedOrder | None = None

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.section.workers) if self.section.workers else None

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(map(len, self.sources))

    def keep_features(self, together: Together) -> None:
        """Cache the features of frozen encoders if the recipe says so; the processes share the pictures.

        Raises VlmError where `cached_views` cannot work, and if the disk has no room.
        """
        model, section = self.model, self.section
        wanted = section.cache_features and (not section.augment or section.cached_views)
        features = model.picture_features() if wanted else None
        if section.cached_views and (features is None or not section.augment):
            raise VlmError("data.cached_views: needs a frozen image encoder, data.cache_features and data.augment=true")
        if features is not None and (paths := _pictures(self.sources)):

            def kept(wanted: PictureFeatures) -> FeatureCache:
                return cache_features(wanted, paths, announce=self.log, together=together)

            if section.cached_views:
                self.load_picture = _kept_crops(features, model.image_encoder.transform, section, self.order.seed, kept)
            else:
                cache = kept(features)
                self.load_picture = lambda path, step: cache(path)
        if section.cache_features and not any(isinstance(samples, ShardedSamples) for samples in self.sources):
            texts = [text for samples in self.sources for sample in samples for text in sample.texts]
            model.keep_text_features(texts, self.log)

    def batch(self, step: int, batch_size: int) -> list[Placed]:
        """The samples of the whole global batch of `step`; those in shards are read by the process that takes them."""
        pairs = self.order.batch(step, batch_size)
        if self.section.group_by_modality_length:
            if self._grouped is None or self._grouped.batch_size != batch_size:
                self._grouped = GroupedOrder(
                    self.order, batch_size, self._shows_pictures, self._length, seed=self.order.seed
                )
            pairs = self._grouped.batch(step)
        places = enumerate(pairs, start=step * batch_size)
        return [Placed(place, step, self._sample(source, index, place)) for place, (source, index) in places]

    def every(self, size: int) -> Iterator[list[Placed]]:
        """Every sample once, `size` together, in the order of the sources."""
        count = 0
        for number, source in enumerate(self.sources):
            for start in range(0, len(source), size):
                indices = range(start, min(start + size, len(source)))
                yield [Placed(count + i, 0, self._sample(number, i, count + i)) for i in indices]
            count += len(source)

    def _shows_pictures(self, pair: tuple[int, int]) -> bool:
        return bool(self.sources[pair[0]][pair[1]].images)

    def _length(self, pair: tuple[int, int]) -> int:
        """Words of a sample, LLaVA's estimate of its tokens."""
        conversations = self.sources[pair[0]][pair[1]].conversations
        return sum(len(turn.text.split()) for turns in conversations for turn in turns)

    def _sample(self, source: int, index: int, place: int) -> Sample | Unread:
        samples = self.sources[source]
        if isinstance(samples, ShardedSamples):
            return Unread(samples, index, draw=_number(self.order.seed, place))
        return samples[index]

    def prepare(self, samples: Sequence[Placed], upcoming: Sequence[Placed] = ()) -> list[Prepared]:
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
        for placed, result in zip(samples, results):
            if isinstance(result, Prepared):
                ready.append(result)
            else:
                self.skip(placed.sample.id, str(result))
        return ready

    def _prepare(self, placed: Placed) -> Prepared | VlmError:
        try:
            sample = placed.sample.read() if isinstance(placed.sample, Unread) else placed.sample
            sample = sample.worded(_number(self.order.seed, "wording", placed.place))
            texts = self.model.prepare_texts(sample, self.section.max_length)
            pictures = {path: self.load_picture(path, placed.step) for path in sample.images}
            return Prepared(texts, sample.images, pictures, placed.place)
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
        places = [sample.place for sample in prepared]
        batch = self.model.collate([(sample.texts, sample.images) for sample in prepared], places)
        return batch.with_images(lambda paths: stack_pictures([tensors[path] for path in paths]))


def build_source(model: Any, section: DataSection, seed: int, log: Callable[[str], None]) -> SampleSource:
    """Load all data sources; `keep_features` is next."""
    weights = [spec.weight for spec in section.train if spec.weight is not None]
    if weights and len(weights) < len(section.train):
        raise VlmError("data.train: give every source a weight, or none")
    if weights and section.sampling == "sqrt":
        raise VlmError("data.sampling: sqrt: leave out the weights of data.train, or set it to size")
    loaded = [_load(model, spec, log) for spec in section.train]
    sources = [samples for samples, _ in loaded]
    shards = [samples.sizes if isinstance(samples, ShardedSamples) else None for samples in sources]
    if section.group_by_modality_length and any(shards):
        raise VlmError("data.group_by_modality_length: shards are read in the order they lie in; set it to false")
    if section.sampling == "sqrt":
        weights = [math.sqrt(len(samples)) for samples in sources]  # Dai et al. 2023 (InstructBLIP), section 2.2
    order = MixtureOrder([len(s) for s in sources], weights or None, seed, shards, section.shuffle_buffer)

    source = SampleSource(model, section, sources, order, _pixels(model, section, seed), log)
    for _, broken in loaded:
        for where, reason in broken:
            source.skip(where, reason)
    return source


def _pixels(model: Any, section: DataSection, seed: int) -> Callable[[str, int], Tensor | TiledPicture]:
    """How a picture becomes pixels: as in evaluation, or a random crop that seed, step and picture decide."""
    encoder = model.image_encoder
    if (tiling := getattr(model, "tiling", None)) is not None:
        if section.augment:
            raise VlmError("data.augment: tiles of `resize: anyres` are not cropped at random: set it to false")
        return lambda path, step: tiling.cut(path)
    learns = any(p.requires_grad for p in encoder.parameters())
    if not (learns if section.augment is None else section.augment):
        return lambda path, step: encoder.transform.eval(load_image(path))

    def crop(path: str, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(_number(seed, step, path))
        return encoder.transform.train(load_image(path), generator)

    return crop


def _kept_crops(
    features: PictureFeatures,
    transform: ImageTransform,
    section: DataSection,
    seed: int,
    kept: Callable[[PictureFeatures], FeatureCache],
) -> Callable[[str, int], Tensor]:
    """Features of one of a few crops of a picture; its content and the seed decide what they show, the step which."""
    caches = []
    for view in range(section.cached_views):

        def load(path: str, view: int = view) -> Tensor:
            generator = torch.Generator().manual_seed(_number(seed, view, content_hash(path)))
            return transform.train(load_image(path), generator)

        caches.append(kept(replace(features, kind=f"{features.kind}-crop{seed}.{view}", load=load)))
    return lambda path, step: caches[_number(seed, step, path) % len(caches)](path)


def _number(*parts: Any) -> int:
    """63 bits that depend on the parts alone."""
    text = " ".join(map(str, parts)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


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
