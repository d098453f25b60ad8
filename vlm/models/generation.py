"""Batched generation in which prompts about the same pictures share the encoder, the prefix and its KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm.backbones.language import LanguageModel
from vlm.data.conversation import IMAGE_SLOT, TokenizedText
from vlm.data.packing import expand_slots


@dataclass(frozen=True)
class Prompt:
    """Token ids with a slot for each picture, and the pictures (paths, PIL images or arrays) in order."""

    text: TokenizedText
    images: tuple[Any, ...]


class _Model(Protocol):
    language_model: LanguageModel

    def count_tokens(self, images: Sequence[Any]) -> list[int]: ...
    def encode_pictures(
        self, images: Sequence[Any], instructions: Sequence[tuple[int, ...]] = ()
    ) -> Sequence[Tensor] | Tensor: ...


def picture_key(image: Any) -> Any:
    """What makes two pictures the same one within a call: the path, or being the same object."""
    return str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else id(image)


@torch.inference_mode()
def generate_texts(model: _Model, prompts: Sequence[Prompt], chunk: int = 64, **generation: Any) -> list[str]:
    """The model's continuation of each prompt, in order; at most about `chunk` prompts at a time."""
    answers = [""] * len(prompts)
    for groups in _chunks(prompts, chunk):
        members = [i for group in groups for i in group]
        for i, text in zip(members, _generate_chunk(model, prompts, groups, generation)):
            answers[i] = text
    return answers


def _chunks(prompts: Sequence[Prompt], chunk: int) -> Iterator[list[list[int]]]:
    """Lists of groups; a group holds the numbers of prompts about the same pictures."""
    by_pictures: dict[tuple[Any, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_pictures.setdefault(tuple(_keys(prompt)), []).append(i)
    ready: list[list[int]] = []
    for group in by_pictures.values():
        for start in range(0, len(group), chunk):
            part = group[start : start + chunk]
            if ready and sum(map(len, ready)) + len(part) > chunk:
                yield ready
                ready = []
            ready.append(part)
    if ready:
        yield ready


def _keys(prompt: Prompt) -> list[tuple[Any, ...]]:
    """What makes the tokens of a prompt's pictures: each picture, and the instruction that is read beside it."""
    return [(picture_key(image), prompt.text.instruction) for image in prompt.images]


def _generate_chunk(
    model: _Model, prompts: Sequence[Prompt], groups: list[list[int]], generation: dict[str, Any]
) -> list[str]:
    lm = model.language_model
    members = [i for group in groups for i in group]
    shown = {
        key: (image, prompts[i].text.instruction)
        for i in members
        for key, image in zip(_keys(prompts[i]), prompts[i].images)
    }
    tokens = dict(zip(shown, model.encode_pictures(*map(list, zip(*shown.values()))))) if shown else {}
    ids = {i: expand_slots(prompts[i].text, model.count_tokens(prompts[i].images)).ids + lm.prompt_end for i in members}
    embedded = {i: _embed(lm, ids[i], [tokens[key] for key in _keys(prompts[i])]) for i in members}

    # Beam search copies its inputs but not a cache given to it, so it takes the whole prompts.
    shares = any(len(group) > 1 for group in groups) and not lm.is_encoder_decoder
    lengths = [_prefix_length([ids[i] for i in group]) for group in groups]
    many = max(generation.get("num_beams") or 1, generation.get("num_return_sequences") or 1) > 1
    if not shares or many or not all(lengths):
        embeddings, mask = _left_padded([embedded[i] for i in members])
        return lm.generate(embeddings, mask, **generation)

    prefixes, prefix_mask = _left_padded([embedded[group[0]][:n] for group, n in zip(groups, lengths)])
    cache = lm.prefix_cache(prefixes, prefix_mask)
    owner = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=prefixes.device)
    cache.batch_select_indices(owner)
    rests, rest_mask = _left_padded([embedded[i][n:] for group, n in zip(groups, lengths) for i in group])
    embeddings = torch.cat([prefixes[owner], rests], dim=1)
    return lm.generate(embeddings, torch.cat([prefix_mask[owner], rest_mask], dim=1), cache=cache, **generation)


def _embed(lm: LanguageModel, ids: tuple[int, ...], pictures: list[Tensor]) -> Tensor:
    """Prompt embeddings [T,D] with the pictures' tokens [n,D] in their slots."""
    tensor = torch.tensor(ids, device=lm.device)
    embeddings = lm.embed(tensor)
    if pictures:
        embeddings = embeddings.clone()
        embeddings[tensor == IMAGE_SLOT] = torch.cat(pictures).to(embeddings.dtype)
    return embeddings


def _prefix_length(group: list[tuple[int, ...]]) -> int:
    """How many first ids all of a group share, leaving each at least one of its own."""
    limit = min(map(len, group)) - 1
    length = 0
    while length < limit and all(ids[length] == group[0][length] for ids in group):
        length += 1
    return length


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows [T_i,D] as [B,T,D] with zeros in front, and their mask [B,T]."""
    length = max(row.shape[0] for row in rows)
    batch = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=rows[0].device)
    for i, row in enumerate(rows):
        if row.shape[0]:
            batch[i, -row.shape[0] :] = row
            mask[i, -row.shape[0] :] = 1
    return batch, mask
