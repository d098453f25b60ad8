"""The dual encoder (CLIP, SigLIP, LiT): images and texts as unit-length points in one space."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.backbones.image import ImageEncoder
from vlm.backbones.text import TextEncoder
from vlm.bridges.canonical import DEFAULT_RIDGE, canonical_projections
from vlm.bridges.dual_tower import DualTower
from vlm.data.feature_cache import PictureFeatures, frozen_features
from vlm.data.images import as_list, load_image
from vlm.data.pairs import PairBatch, pair_batch
from vlm.data.prompts import Labels, label_prompts
from vlm.data.records import Record
from vlm.data.samples import Sample, caption_samples, only_caption
from vlm.data.stored_features import encode_pictures
from vlm.errors import VlmError
from vlm.model_spec import DualEncoderSpec
from vlm.models.counting import forward_operations
from vlm.models.freezing import set_mode
from vlm.models.tasks import TaskModel
from vlm.objectives.objective import ReadOuts
from vlm.recipe import DataSpec

IMAGE_CHUNK, TEXT_CHUNK = 64, 256  # pictures and texts that go through an encoder at once
KEPT_TEXTS_BYTES = 4_000_000_000  # of text features in memory
_CLASSIFIERS = 8  # kept


class DualEncoder(TaskModel):
    """An image encoder and a text encoder beside each other (Radford et al. 2021)."""

    family = "dual encoder"

    def __init__(
        self, spec: DualEncoderSpec, image_encoder: ImageEncoder, text_encoder: TextEncoder, bridge: DualTower
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.bridge = bridge
        self._classifiers: dict[Any, Tensor] = {}
        self._kept_texts: tuple[dict[str, int], Tensor] | None = None  # text -> row of features [n,D]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.bridge.logit_scale.device

    def train(self, mode: bool = True) -> "DualEncoder":
        """Train mode for what trains; frozen parts stay in eval mode."""
        set_mode(self, mode)
        self._classifiers.clear()
        return self

    # ---- training: captions to pairs, pairs to embeddings ------------------------------------------------------

    def samples(self, records: Sequence[Record], spec: DataSpec) -> list[Sample]:
        """Training samples of records: one for each caption of a picture."""
        return caption_samples(records, spec)

    def prepare_texts(self, sample: Sample, limit: int | None = None) -> str:
        """A sample's caption. Raises VlmError for one that is empty, or that does not go with exactly one picture."""
        return only_caption(sample)

    def collate(self, samples: Sequence[tuple[str, Sequence[str]]], places: Sequence[int] = ()) -> PairBatch:
        """Captions, each with the path of its picture, as one batch."""
        texts = [text for text, _ in samples]
        pictures = [paths[0] for _, paths in samples]
        kept = self._kept_texts
        if kept is not None and all(text in kept[0] for text in texts):
            none = torch.zeros(len(texts), 0, dtype=torch.long)
            return pair_batch(none, none, pictures, places, kept[1][[kept[0][text] for text in texts]])
        return pair_batch(**self.text_encoder.tokenize(texts), pictures=pictures, places=places)

    def empty_batch(self) -> PairBatch:
        """A batch of no pairs, for a process that has none while others do."""
        none = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        shapes = [(0, 1, head.width_in) if head.attention else (0, head.width_in) for head in self.bridge.heads]
        image, text = (torch.zeros(shape, device=self.device) for shape in shapes)
        batch = pair_batch(none, none, [], [], text).to(self.device)
        return replace(batch, image_inputs=image)

    @torch.inference_mode()
    def keep_text_features(self, texts: Sequence[str], announce: Callable[[str], None]) -> None:
        """Encode texts once, where the text encoder is frozen and pooled, and keep the features in memory."""
        self._kept_texts = None
        if _learns(self.text_encoder) or self.bridge.text.attention is not None:
            return
        unique = sorted(set(texts), key=len)  # texts of a length share a chunk: little padding
        size = len(unique) * self.bridge.text.width_in * 4
        if size > KEPT_TEXTS_BYTES:
            announce(f"texts are encoded anew each time: features of {len(unique):,} would take {size / 1e9:.1f} GB")
            return

        def encode(chunk: Sequence[str]) -> Tensor:
            return self.text_features(**self.text_encoder.tokenize(list(chunk)))

        features = _in_chunks(encode, unique, TEXT_CHUNK)
        self._kept_texts = ({text: row for row, text in enumerate(unique)}, features.float().cpu().clone())

    @torch.no_grad()
    def start_on(self, batches: Iterable[PairBatch]) -> str:
        """With `bridge.start: canonical`, start the projections from the canonical correlations of all pairs."""
        spec = self.spec.bridge
        if spec.start != "canonical":
            return ""
        pairs = (self._pair_features(batch) for batch in batches if len(batch))
        self.bridge.start_projections(*canonical_projections(pairs, self.bridge.width, spec.ridge or DEFAULT_RIDGE))
        return "the projections start from the canonical correlations of the training pairs"

    def _pair_features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """What both projections take of a batch of pairs: [b,D] and [b,T]."""
        inputs = batch.image_inputs
        assert inputs is not None
        image = self.image_features(inputs) if inputs.ndim == 4 else inputs
        text = batch.text_features
        return image[batch.image_index], self.text_features(batch.ids, batch.mask) if text is None else text

    def read_pairs(self, read: ReadOuts) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings, image [b,E] and text [b,E], of a batch of pairs."""
        batch: PairBatch = read.batch
        inputs = batch.image_inputs
        assert inputs is not None
        image = self.embed_image_features(self.image_features(inputs) if inputs.ndim == 4 else inputs)
        if batch.text_features is not None:
            text = self.embed_text_features(batch.text_features)
        else:
            text = self.embed_ids(batch.ids, batch.mask)
        return (image[batch.image_index] if len(batch) else image), text

    def comparison_parameters(self) -> list[nn.Parameter]:
        """Logit scale and bias."""
        bridge = self.bridge
        return [bridge.logit_scale] if bridge.logit_bias is None else [bridge.logit_scale, bridge.logit_bias]

    def after_step(self) -> None:
        """Keep the logit scale within its bounds."""
        self.bridge.clamp_scale()

    def operations(self, batch: PairBatch) -> float:
        """Matrix operations of a training step on a batch; features that are given count as nothing."""
        images = 0 if batch.image_inputs is None or batch.image_inputs.ndim != 4 else len(batch.image_inputs)
        total = images * self._image_operations * (3 if _learns(self.image_encoder) else 1)
        return total + 2.0 * batch.ids.numel() * self._text_weights * (3 if _learns(self.text_encoder) else 1)

    @cached_property
    def _image_operations(self) -> float:
        return forward_operations(self.image_encoder, torch.zeros(1, 3, *self.image_encoder.transform.size))

    @cached_property
    def _text_weights(self) -> int:
        return sum(p.numel() for n, p in self.text_encoder.named_parameters() if p.ndim > 1 and "embedding" not in n)

    # ---- pictures and texts to embeddings, in two steps so that the first can be cached ------------------------

    def image_features(self, pixels: Tensor) -> Tensor:
        """What the bridge takes of pixels [B,3,H,W]: [B,D], with pooling by attention tokens [B,N,D].

        Without gradient where the encoder is frozen.
        """
        with torch.set_grad_enabled(_learns(self.image_encoder) and torch.is_grad_enabled()):
            features = self.image_encoder(pixels)
            return self.bridge.image.pool(features.tokens, features.pooled)

    def picture_features(self) -> PictureFeatures | None:
        """What the feature cache keeps of a picture: its `image_features`; nothing while the encoder learns."""
        head = self.bridge.image
        kind = "tokens" if head.kind == "attention" else head.kind
        return frozen_features(self.image_encoder, kind, lambda features: head.pool(features.tokens, features.pooled))

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the bridge takes of token ids [B,T] and mask [B,T]: [B,D], with pooling by attention tokens [B,T,D]."""
        with torch.set_grad_enabled(_learns(self.text_encoder) and torch.is_grad_enabled()):
            features = self.text_encoder(ids, mask)
            return self.bridge.text.pool(features.tokens, features.pooled, mask)

    def embed_image_features(self, features: Tensor) -> Tensor:
        """Unit-length embeddings [B,E] of `image_features`."""
        return self.bridge.image(features)

    def embed_text_features(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unit-length embeddings [B,E] of `text_features`; `mask` [B,T] with pooling by attention."""
        return self.bridge.text(features, mask)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit-length embeddings [B,E] of pixels [B,3,H,W]."""
        return self.embed_image_features(self.image_features(pixels))

    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit-length embeddings [B,E] of token ids [B,T] and mask [B,T]."""
        return self.embed_text_features(self.text_features(ids, mask), mask)

    # ---- tasks -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_image(self, images: Any) -> Tensor:
        """Unit-length embeddings [B,E] of images: one or a list of PIL images, paths or uint8 arrays [H,W,3].

        Raises BrokenImage for a picture that cannot be read, VlmError for an empty list.
        """
        features = self.picture_features()

        def embed(chunk: Sequence[Any]) -> Tensor:
            if features is not None:
                return self.embed_image_features(encode_pictures(features, chunk).to(self.device))
            pixels = torch.stack([self.image_encoder.transform.eval(load_image(image)) for image in chunk])
            return self.embed_pixels(pixels.to(self.device))

        return _in_chunks(embed, as_list(images), IMAGE_CHUNK)

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-length embeddings [B,E] of one or more texts, cut at the text encoder's context length."""
        wanted = [texts] if isinstance(texts, str) else list(texts)
        if not wanted:
            raise VlmError("encode_text: no texts were given")
        if strange := [type(text).__name__ for text in wanted if not isinstance(text, str)]:
            raise VlmError(f"encode_text: expected text, got {strange[0]}")
        return _in_chunks(lambda chunk: self.embed_ids(**self.text_encoder.tokenize(list(chunk))), wanted, TEXT_CHUNK)

    @torch.inference_mode()
    def classify(self, images: Any, labels: Labels, templates: str | Sequence[str] | None = None) -> Tensor:
        """Probabilities [B,C] of labels.

        labels: class names, or a mapping from each to its own prompts. templates: prompts with `{}` for the class name,
        or the name of a set (`imagenet`, `cifar`, `simple`: the default, `name`).
        A softmax model's rows sum to 1. A sigmoid model (SigLIP) judges each label by itself, so its rows need not.
        Raises VlmError for labels that are missing, empty or repeated, and for a template without `{}`.
        """
        classifier = self.classifier(labels, templates)
        return self.bridge.probabilities(self.encode_image(images), classifier)

    @torch.inference_mode()
    def classifier(self, labels: Labels, templates: str | Sequence[str] | None = None) -> Tensor:
        """One unit-length row [C,E] a label: the mean of its prompts' embeddings (Radford et al. 2021, section 3.1.4).

        Kept for the next call with the same labels and templates, until weights change.
        """
        prompts = label_prompts(labels, templates)
        weights = [*self.text_encoder.parameters(), *self.bridge.text.parameters()]
        key = (tuple(prompts.items()), sum(w._version for w in weights if not w.is_inference()))
        if key not in self._classifiers:
            counts = torch.tensor([len(own) for own in prompts.values()], device=self.device)
            owner = torch.arange(len(counts), device=self.device).repeat_interleave(counts)  # [P]
            every = [prompt for own in prompts.values() for prompt in own]
            sums = torch.zeros(len(counts), self.bridge.width, device=self.device)
            for start in range(0, len(every), TEXT_CHUNK):
                rows = slice(start, start + TEXT_CHUNK)
                sums.index_add_(0, owner[rows], self.encode_text(every[rows]))
            while len(self._classifiers) >= _CLASSIFIERS:
                self._classifiers.pop(next(iter(self._classifiers)))
            self._classifiers[key] = F.normalize(sums, dim=-1)
        return self._classifiers[key].to(self.device)


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _in_chunks(embed: Callable[[Sequence[Any]], Tensor], inputs: list[Any], size: int) -> Tensor:
    return torch.cat([embed(inputs[start : start + size]) for start in range(0, len(inputs), size)])
