"""The parts of each family's training step, as its model runs them, on tensors of the right shapes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm.bridges.qformer_projection import QFormerProjection
from vlm.data.text_batch import TextBatch
from vlm.model_spec import QFormerProjectionSpec
from vlm.models.dual_encoder import DualEncoder
from vlm.models.generative import GenerativeModel
from vlm.models.qformer_model import QFormerModel
from vlm.objectives.frozen_head import frozen_head_cross_entropy_sum
from vlm.objectives.lm import CHUNK, cross_entropy_sum
from vlm.planning.step import Part
from vlm.planning.workload import Load

Chain = tuple[list[Part], dict[str, Tensor]]  # parts, and what goes in


def context_of(model: Any) -> int:
    """Tokens that every text is padded to, 0 where texts stay as long as they are (CLIP and SigLIP pad)."""
    text: Any = getattr(model, "text_encoder", None)
    if text is None or not (text.name.startswith("open_clip:") or "siglip" in text.name):
        return 0
    return int(text.context_length)


def step_parts(model: Any, load: Load, objectives: tuple[str, ...], cached: bool) -> Chain:
    """The chain of a micro-batch of `load` through `model`; where features are cached, without its image encoder."""
    device = next(model.parameters()).device
    with torch.device(device):
        parts, inputs = _chain(model, load, objectives, cached)

    def there(run: Any) -> Any:
        def on_device(*given: Tensor) -> tuple[Tensor, ...]:
            with torch.device(device):
                result: tuple[Tensor, ...] = run(*given)
            return result

        return on_device

    return [replace(part, run=there(part.run)) for part in parts], inputs


def _chain(model: Any, load: Load, objectives: tuple[str, ...], cached: bool) -> Chain:
    if isinstance(model, GenerativeModel):
        return _generative(model, load, cached)
    if isinstance(model, DualEncoder):
        return _dual_encoder(model, load, cached)
    assert isinstance(model, QFormerModel)
    return _qformer(model, load, objectives, cached)


def _generative(model: GenerativeModel, load: Load, cached: bool) -> Chain:
    lm, slots = model.language_model, model.image_tokens * load.pictures // max(load.rows, 1)
    length = load.text_tokens + slots
    decoder = lm.is_encoder_decoder
    length -= load.labels if decoder else 0

    def bridge(tokens: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(model.bridge, QFormerProjection) or model.instruction_tokenizer is None:
            return (model.bridge(tokens),)
        assert isinstance(model.spec.bridge, QFormerProjectionSpec)
        asked = max(min(load.text_tokens - load.labels, model.spec.bridge.instruction_length), 3)
        texts = TextBatch(torch.zeros(load.pictures, asked, dtype=torch.long), (asked,) * load.pictures)
        return (model.bridge.read(tokens, range(load.pictures), texts),)

    def language(image: Tensor) -> tuple[Tensor, ...]:
        ids = torch.zeros(load.rows, length, dtype=torch.long)
        embeddings = lm.embed(ids)
        if slots:
            picture = image.reshape(load.rows, slots, -1).to(embeddings.dtype)
            mask = torch.zeros(load.rows, length, 1, dtype=torch.bool)
            embeddings = embeddings.masked_scatter(mask, picture)
        if decoder:
            answers = torch.zeros(load.rows, load.labels, dtype=torch.long)
            return (lm.hidden_states(embeddings, torch.ones_like(ids)[:, None, None].bool(), decoder_ids=answers),)
        seen: Any = None
        positions = None
        if load.packed and lm.takes_tree_masks:
            seen = torch.ones(load.rows, 1, length, length, dtype=torch.bool)
            positions = torch.zeros(load.rows, length, dtype=torch.long)
        return (lm.hidden_states(embeddings, seen, positions),)

    def head(hidden: Tensor) -> tuple[Tensor, ...]:
        states = hidden[:, : load.labels].flatten(0, 1)
        targets = torch.zeros(len(states), dtype=torch.long)
        if (plain := model.plain_head) is not None and not plain.requires_grad:
            return (frozen_head_cross_entropy_sum(states, targets, plain, CHUNK)[0],)
        return (cross_entropy_sum(states, targets, model.word_logits)[0],)

    parts = [
        *_encoder(model, cached),
        Part("bridge", ("tokens",), ("image",), bridge),
        Part("language_model", ("image",), ("hidden",), language),
        Part("vocabulary", ("hidden",), ("loss",), head),
    ]
    return parts, _pictures(model, load, cached)


def _dual_encoder(model: DualEncoder, load: Load, cached: bool) -> Chain:
    from vlm.objectives.itc import itc_loss, sigmoid_itc_loss

    head = model.bridge.image
    width = (1, head.width_in) if head.attention is None else (model.image_encoder.num_tokens, head.width_in)
    bias = model.bridge.logit_bias
    known_texts = cached and not _learns(model.text_encoder) and model.bridge.text.attention is None

    def image_encoder(pixels: Tensor) -> tuple[Tensor, ...]:
        return (model.image_features(pixels),)

    def text_encoder(ids: Tensor) -> tuple[Tensor, ...]:
        return (model.text_features(ids, torch.ones_like(ids)),)

    def bridge(image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return model.embed_image_features(image), model.embed_text_features(text)

    def compare(image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        # Embeddings of the whole batch lie beside this micro-batch's.
        more = max(load.compared - len(image), 0)
        whole = [torch.cat([side, torch.zeros(more, side.shape[1])]) if more else side for side in (image, text)]
        scale = model.bridge.scale
        if bias is None:
            return (itc_loss(whole[0], whole[1], scale),)
        return (sigmoid_itc_loss(whole[0], whole[1], scale, bias),)

    ids = torch.zeros(load.samples, load.text_tokens, dtype=torch.long)
    inputs = {"ids": ids, **_pictures(model, load, cached)}
    if "tokens" in inputs:
        shape = (load.pictures, width[1]) if head.attention is None else (load.pictures, *width)
        inputs["image_features"] = torch.zeros(shape)
        del inputs["tokens"]
    parts = [] if cached else [Part("image_encoder", ("pixels",), ("image_features",), image_encoder)]
    if known_texts:
        inputs["text_features"] = torch.zeros(load.samples, model.bridge.text.width_in)
    else:
        parts.append(Part("text_encoder", ("ids",), ("text_features",), text_encoder))
    parts += [
        Part("bridge", ("image_features", "text_features"), ("image", "text"), bridge),
        Part("contrast", ("image", "text"), ("loss",), compare),
    ]
    return parts, inputs


def _qformer(model: QFormerModel, load: Load, objectives: tuple[str, ...], cached: bool) -> Chain:
    from vlm.objectives.query_itc import query_itc_loss

    def texts(count: int) -> TextBatch:
        return TextBatch(torch.zeros(count, load.text_tokens, dtype=torch.long), (load.text_tokens,) * count)

    def run(tokens: Tensor) -> tuple[Tensor, ...]:
        count = load.samples
        own = list(range(count))
        image = model.bridge.image(tokens)
        loss = torch.zeros(())
        queries = model.bridge.queries(image) if {"itc", "lm"} & set(objectives) else None
        if "itc" in objectives and queries is not None:
            points = model.heads.embed_queries(queries.states)
            words = model.heads.embed_text(model.bridge.first_text_state(texts(count)))
            more = max(load.compared - count, 0)
            if more:
                points, words = (torch.cat([p, p.new_zeros(more, *p.shape[1:])]) for p in (points, words))
            loss = loss + query_itc_loss(points, words, model.scale)
        if "itm" in objectives:
            states = model.bridge.pairs(image, own * 3, texts(3 * count))  # right, wrong text, wrong image
            loss = loss + model.heads.match_logits(states).float().sum()
        if "lm" in objectives and queries is not None:
            said = model.bridge.causal(queries, texts(count).without_last())
            loss = loss + cross_entropy_sum(said, torch.zeros(len(said), dtype=torch.long), model.word_logits)[0]
        return (loss,)

    parts = [*_encoder(model, cached), Part("bridge", ("tokens",), ("loss",), run)]
    return parts, _pictures(model, load, cached)


def _encoder(model: Any, cached: bool) -> list[Part]:
    def encode(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(_learns(model.image_encoder)):
            return (model.image_encoder(pixels).tokens,)

    return [] if cached else [Part("image_encoder", ("pixels",), ("tokens",), encode)]


def _pictures(model: Any, load: Load, cached: bool) -> dict[str, Tensor]:
    encoder = model.image_encoder
    if cached:
        return {"tokens": torch.zeros(load.pictures, encoder.num_tokens, encoder.width, dtype=encoder.dtype)}
    return {"pixels": torch.zeros(load.pictures, 3, *encoder.transform.size)}


def _learns(module: torch.nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
