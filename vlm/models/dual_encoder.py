"""The dual encoder (CLIP, SigLIP, LiT): images and texts as unit-length points in one space."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.backbones.image import ImageEncoder
from vlm.backbones.text import TextEncoder
from vlm.bridges.dual_tower import DualTower
from vlm.data.feature_cache import PictureFeatures, frozen_features
from vlm.data.images import load_image
from vlm.data.prompts import PLACE, prompt_templates
from vlm.errors import VlmError
from vlm.model_spec import DualEncoderSpec
from vlm.models.freezing import set_mode
from vlm.models.tasks import TaskModel

IMAGE_CHUNK, TEXT_CHUNK = 64, 256  # pictures and texts that go through an encoder at once
_CLASSIFIERS = 8  # kept

Labels = Sequence[str] | Mapping[str, str | Sequence[str]]


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

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.bridge.logit_scale.device

    def train(self, mode: bool = True) -> "DualEncoder":
        """Train mode for what trains; frozen parts stay in eval mode."""
        set_mode(self, mode)
        self._classifiers.clear()
        return self

    # ---- training: tensors to embeddings, in two steps so that the first can be cached -------------------------

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

        def embed(chunk: Sequence[Any]) -> Tensor:
            pixels = torch.stack([self.image_encoder.transform.eval(load_image(image)) for image in chunk])
            return self.embed_pixels(pixels.to(self.device))

        return _in_chunks(embed, _as_list(images), IMAGE_CHUNK)

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-length embeddings [B,E] of one or more texts, cut at the text encoder's context length."""
        wanted = [texts] if isinstance(texts, str) else list(texts)
        if not wanted:
            raise VlmError("encode_text: no texts were given")
        if strange := next((text for text in wanted if not isinstance(text, str)), None):
            raise VlmError(f"encode_text: expected text, got {type(strange).__name__}")
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
        prompts = _prompts(labels, templates)
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


def _as_list(images: Any) -> list[Any]:
    """One or a list of images as a list."""
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
    pictures = list(images) if several else [images]
    if not pictures:
        raise VlmError("no images were given")
    return pictures


def _prompts(labels: Labels, templates: str | Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Label -> its prompts. Raises VlmError for labels or prompts that make no classifier."""
    if isinstance(labels, str):
        raise VlmError(f"classify: labels are a list of class names; got the text {labels!r}")
    names = list(labels)
    if not names:
        raise VlmError("classify: no labels were given")
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise VlmError(f"classify: label {number} is {name!r}; expected a class name")
        if name in names[:number]:
            raise VlmError(f"classify: the label {name!r} is given twice; give every class once")
    if isinstance(labels, Mapping):
        if templates is not None:
            raise VlmError("classify: labels with prompts of their own take no templates")
        own = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in labels.items()}
        if lacking := next((name for name, prompts in own.items() if not prompts), None):
            raise VlmError(f"classify: no prompts for the label {lacking!r}")
        return own
    forms = prompt_templates("simple" if templates is None else templates)
    return {name: tuple(form.replace(PLACE, name) for form in forms) for name in names}
