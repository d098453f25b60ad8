"""Text encoders by name: token ids in, token features and one pooled embedding out; one side of a dual tower."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.backbones.hf_loading import load_config, load_strictly
from vlm.backbones.image_encoder import fingerprint_of
from vlm.backbones.image_open_clip import create_open_clip
from vlm.backbones.names import parse_part_name
from vlm.backbones.starter import STARTER_TEXT, minilm_folder
from vlm.errors import VlmError, did_you_mean

# tokens [B, T, D], ids [B, T], mask [B, T] -> [B, D]
Pooling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Tokenize = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]  # texts -> ids and mask, each [B, T]


@dataclass
class TextFeatures:
    """tokens: [B, T, D], after the model's final norm; rows of padding mean nothing. pooled: [B, P]."""

    tokens: torch.Tensor
    pooled: torch.Tensor


class TextTower(nn.Module):
    """One library's text model: forward(ids [B, T], mask [B, T]) -> (tokens [B, T, D], pooled [B, P]).

    layers: those whose means are the embedding, where that is made of several.
    """

    layers: tuple[int, ...] | None = None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class TextEncoder(nn.Module):
    """A text model behind one protocol; frozen when built (no gradient, eval mode).

    name: the part's name. width: D. pooled_width: P. context_length: tokens a text may have, special ones included.
    has_cls: whether the first token stands for the whole text, as in BERT.
    """

    def __init__(
        self,
        name: str,
        tower: TextTower,
        tokenizer: Tokenize,
        context_length: int,
        has_cls: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.has_cls = has_cls
        self.tower = tower
        self.context_length = context_length
        self._tokenizer = tokenizer
        self.requires_grad_(False).eval()
        with torch.no_grad():
            features = self(**self.tokenize(["a"]))
        self.width: int = features.tokens.shape[-1]
        self.pooled_width: int = features.pooled.shape[-1]

    def with_tower(self, tower: TextTower) -> "TextEncoder":
        """The same tokens through another tower."""
        return TextEncoder(self.name, tower, self._tokenizer, self.context_length, self.has_cls)

    def tokenize(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """`ids` and `mask`, int64 [B, T] on the encoder's device, padded to one length, cut at `context_length`."""
        ids, mask = self._tokenizer(list(texts))
        device = next(self.parameters()).device
        return {"ids": ids.to(device), "mask": mask.to(device)}

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> TextFeatures:
        """Token ids [B, T] and mask [B, T] (1: a token, 0: padding) to features."""
        return TextFeatures(*self.tower(ids, mask))

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode only where something learns, as for image encoders."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, the context length or the weights."""
        options = {"name": self.name, "context_length": self.context_length, "layers": self.tower.layers}
        return fingerprint_of(self.tower, options)


def pool_mean(tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are no padding."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)  # [B, T, 1]
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def pool_cls(tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The first token (BERT's CLS)."""
    return tokens[:, 0]


def pool_max(tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum over the tokens that are no padding."""
    return tokens.masked_fill(~mask.bool().unsqueeze(-1), torch.finfo(tokens.dtype).min).amax(1)


class HfTextTower(TextTower):
    """A bidirectional transformers encoder (BERT and its kin), pooled as its checkpoint says."""

    def __init__(self, model: Any, pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return tokens, self.pooling(tokens, ids, mask)


class HfDualTextTower(TextTower):
    """The text tower of CLIP (projected end-of-text token) or SigLIP (last token, sees its padding)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.masked = hasattr(model, "text_projection")

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids=ids, attention_mask=mask if self.masked else None)
        return output.last_hidden_state, output.text_embeds if self.masked else output.pooler_output


class OpenClipTextTower(TextTower):
    """open_clip's text tower with its projection. It knows its padding from the ids."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        text.output_tokens = True
        self.text = text

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if reads_padding(self.text):
            pooled, tokens = self.text(ids)
            return tokens, pooled
        from open_clip.transformer import text_global_pool

        text, length = self.text, ids.shape[1]  # open_clip's own forward takes texts of the whole context alone
        hidden = text.token_embedding(ids) + text.positional_embedding[:length]  # [B, T, D]
        tokens = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
        pooled = text_global_pool(tokens, ids, pool_type=text.pool_type, eos_token_id=text.eos_id)
        projection = text.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return tokens, pooled


def reads_padding(text: Any) -> bool:
    """Whether an open_clip text tower's embedding depends on what is behind the end-of-text token.

    CLIP's does not: it is causal and pools that token, so texts need no padding to the whole context.
    """
    causal = getattr(text, "attn_mask", None) is not None and text.cls_emb is None
    return not (causal and not text.use_pad_mask and text.pool_type in ("argmax", "eos"))


_HEADS = (r"(.*\.)?pooler\..*", r"cls\..*", r"lm_head\..*", r"vocab_(transform|layer_norm|projector)\..*")
_OTHER_TOWER = (r"(clip\.|siglip\.)?(vision_model|visual_projection)\b.*", r"(clip\.|siglip\.)?logit_(scale|bias)")
# What `model_type` means -> class in transformers, keys that may be left over.
DUAL = {
    "clip": ("CLIPTextModelWithProjection", _OTHER_TOWER),
    "clip_text_model": ("CLIPTextModelWithProjection", _OTHER_TOWER),
    "siglip": ("SiglipTextModel", _OTHER_TOWER),
    "siglip_text_model": ("SiglipTextModel", _OTHER_TOWER),
}
BIDIRECTIONAL = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "mpnet": "MPNetModel",
    "distilbert": "DistilBertModel",
}


def build_text_encoder(name: str) -> TextEncoder:
    """The frozen text encoder of that name: `hf:ID_OR_FOLDER`, `open_clip:ARCH/TAG_OR_FILE`, `starter:minilm-l6`.

    Pooling is the checkpoint's own: sentence-transformers' `1_Pooling/config.json`, else CLS for BERT and its kin, the
    projected end-of-text token for CLIP, the last token for SigLIP. Raises VlmError on an unknown name or keys that
    are missing or left over.
    """
    part = parse_part_name(name, ("hf", "open_clip", "starter"))
    if part.source == "open_clip":
        model = create_open_clip(part.reference, force_custom_text=True, pretrained_text=False)
        return open_clip_text(model, part.reference)
    if part.source == "starter":
        if part.reference not in STARTER_TEXT:
            raise VlmError(f"no starter text encoder {part.reference!r}{did_you_mean(part.reference, STARTER_TEXT)}")
        return _build_hf(name, str(minilm_folder()))
    return _build_hf(name, part.reference)


def _build_hf(name: str, reference: str) -> TextEncoder:
    import transformers

    config = load_config(reference)
    kind = config.model_type
    if kind not in DUAL and kind not in BIDIRECTIONAL:
        hint = did_you_mean(kind, [*DUAL, *BIDIRECTIONAL])
        raise VlmError(f"hf:{reference}: no text encoder can be made of a {kind!r} model{hint}")
    tower: TextTower
    if kind in DUAL:
        cls, unused = DUAL[kind]
        model, _ = load_strictly(getattr(transformers, cls), reference, unused)
        tower = HfDualTextTower(model)
    else:
        options: dict[str, Any] = {} if kind == "distilbert" else {"add_pooling_layer": False}
        model, _ = load_strictly(getattr(transformers, BIDIRECTIONAL[kind]), reference, _HEADS, **options)
        tower = HfTextTower(model, _sentence_pooling(reference))
    tokenize, context = hf_tokenizer(reference, kind, model.config.max_position_embeddings)
    return TextEncoder(name, tower, tokenize, context, has_cls=kind not in DUAL)


def hf_tokenizer(reference: str, kind: str, max_positions: int) -> tuple[Tokenize, int]:
    """The tokeniser of a hub id or folder as a function of texts, and its context length. kind: the `model_type`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise VlmError(f"hf:{reference}: its tokeniser cannot be read: {str(error).splitlines()[0]}") from error
    # RoBERTa counts positions from padding_idx + 1, so two of its positions hold no token.
    positions = max_positions - (2 if kind in ("roberta", "xlm-roberta", "mpnet") else 0)
    limit = _sidecar(reference, "sentence_bert_config.json").get("max_seq_length") or positions
    context = min(tokenizer.model_max_length, positions, limit)
    siglip = kind.startswith("siglip")
    padding = "max_length" if siglip else "longest"
    # SigLIP 2 was trained on lower-case text, but published with the tokeniser of Gemma, which keeps the case.
    lower = siglip and "Gemma" in type(tokenizer).__name__

    def tokenize(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        cased = [text.lower() for text in texts] if lower else texts
        batch = tokenizer(cased, padding=padding, truncation=True, max_length=context, return_tensors="pt")
        mask = batch.get("attention_mask")
        return batch["input_ids"], mask if mask is not None else torch.ones_like(batch["input_ids"])

    return tokenize, context


def _sidecar(reference: str, file: str) -> dict[str, Any]:
    """A small JSON file beside the weights, in the folder or on the hub; {} where there is none."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        path: str | Path | None = folder / file
    else:
        from transformers.utils import cached_file

        path = cached_file(
            reference,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None or not Path(path).is_file():
        return {}
    return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _sentence_pooling(reference: str) -> Pooling:
    config = _sidecar(reference, "1_Pooling/config.json")
    modes = {key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on}
    known: dict[str, Pooling] = {"mean_tokens": pool_mean, "cls_token": pool_cls, "max_tokens": pool_max}
    if not modes:
        return pool_cls
    if len(modes) != 1 or not modes <= known.keys():
        raise VlmError(f"hf:{reference}: pooling {sorted(modes)} is not supported; known: {', '.join(known)}")
    return known[modes.pop()]


def open_clip_text(model: Any, reference: str) -> TextEncoder:
    """The text encoder of an open_clip model `ARCH/TAG` made with `force_custom_text`."""
    tokenize, context = open_clip_tokenizer(reference, model.text)
    return TextEncoder(f"open_clip:{reference}", OpenClipTextTower(model.text), tokenize, context)


def open_clip_tokenizer(reference: str, text: Any) -> tuple[Tokenize, int]:
    """The tokeniser of the architecture in `ARCH/TAG` as a function of texts, and its context length."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(reference.partition("/")[0])
    pad = text.config.pad_token_id if hasattr(text, "config") else text.pad_id

    whole = reads_padding(text)

    def tokenize(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(texts)
        places = torch.arange(1, ids.shape[1] + 1)
        # To the last token that is none: CLIP pads with 0, which is also the id of a "!" within a text.
        lengths = ((ids != pad) * places).amax(1)  # [B]
        length = ids.shape[1] if whole or not len(ids) else int(lengths.max())
        return ids[:, :length], (places <= lengths[:, None])[:, :length].long()

    return tokenize, int(tokenizer.context_length)
