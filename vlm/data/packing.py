"""Token rows: texts that share a prefix stored once, rows packed together, rows collated into tensors.

Several questions about one picture form a tree: the common prefix (template, picture, first words) is one node, and
each continuation is a child. A token attends to the tokens before it in its own node and in the node's ancestors, and
its position is its depth in the tree; so every text sees exactly what it would see alone. A row without sharing is a
tree of one node, and packing puts several trees into one row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlm.data.conversation import IMAGE_SLOT, TokenizedText
from vlm.data.text_batch import TextBatch
from vlm.data.tiling import TiledPictures
from vlm.errors import VlmError

IGNORE = -100  # label of a position that carries no loss


@dataclass(frozen=True)
class Row:
    """One sequence before collation.

    ids: token ids, `IMAGE_SLOT` once for every image token. labels: the token to predict after each position, or
    IGNORE. positions: depth in the tree. nodes: tree node of each position. parents: parent of each node, -1 for a
    root. images: the pictures that fill the slots, in order. instructions: what a Q-Former reads beside each of them,
    if it follows instructions.
    """

    ids: list[int]
    labels: list[int]
    positions: list[int]
    nodes: list[int]
    parents: list[int]
    images: list[str]
    instructions: list[tuple[int, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def expand_slots(text: TokenizedText, counts: Sequence[int]) -> TokenizedText:
    """`text` with each picture's slot repeated once for every image token; counts: how many each picture has."""
    ids: list[int] = []
    trained: list[bool] = []
    tokens_of = iter(counts)
    for token, flag in zip(text.ids, text.trained):
        repeat = next(tokens_of) if token == IMAGE_SLOT else 1
        ids += [token] * repeat
        trained += [flag] * repeat
    return replace(text, ids=tuple(ids), trained=tuple(trained))


def truncate(text: TokenizedText, limit: int) -> TokenizedText:
    """The first `limit` ids of an expanded text.

    Raises VlmError if that would cut a picture or leave nothing to train on.
    """
    if len(text.ids) <= limit:
        return text
    if IMAGE_SLOT in text.ids[limit:]:
        raise VlmError(f"a sample's pictures do not fit into {limit} tokens: raise data.max_length")
    if not any(text.trained[:limit]):
        raise VlmError(f"a sample's prompt alone is longer than {limit} tokens: nothing is left to train on")
    return replace(text, ids=text.ids[:limit], trained=text.trained[:limit])


@dataclass(frozen=True)
class _Branch:
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    shareable: int  # positions before the first label; a position with a label belongs to one text alone


def build_row(texts: Sequence[TokenizedText], images: Sequence[str]) -> Row:
    """One row that holds `texts` (slots expanded), all about the same `images`, with common prefixes stored once.

    Raises VlmError if a text has nothing to train on.
    """
    branches = []
    for text in texts:
        labels = tuple(t if flag else IGNORE for t, flag in zip(text.ids[1:], text.trained[1:]))
        first = next((i for i, label in enumerate(labels) if label != IGNORE), None)
        if first is None:
            raise VlmError("a sample has no token to train on: its answer is empty or was cut off")
        branches.append(_Branch(text.ids[:-1], labels, first))
    if len(texts) > 1 and any(branch.ids[branch.shareable] == IMAGE_SLOT for branch in branches):
        # A picture's last token predicts (the start token, in BLIP-2), so no two texts can have it in common.
        return concatenate([build_row([text], images) for text in texts])
    row = Row([], [], [], [], [], list(images), _instructions([texts[0]], [images]))
    _emit(row, branches, 0, -1)
    return row


def _emit(row: Row, group: list[_Branch], depth: int, parent: int) -> None:
    """Append the subtree of texts that agree on their first `depth` ids."""
    first = group[0]
    end = len(first.ids) if len(group) == 1 else _common_prefix(group, depth)
    if end > depth:
        row.parents.append(parent)
        parent = len(row.parents) - 1
        row.ids.extend(first.ids[depth:end])
        row.labels.extend(first.labels[depth:end])
        row.positions.extend(range(depth, end))
        row.nodes.extend([parent] * (end - depth))
    if len(group) == 1:
        return
    children: dict[object, list[_Branch]] = {}
    for index, branch in enumerate(group):
        # Past its shareable part a text goes its own way, even beside an equal one.
        key = branch.ids[end] if end < branch.shareable else ("own", index)
        children.setdefault(key, []).append(branch)
    for members in children.values():
        _emit(row, members, end, parent)


def _common_prefix(group: list[_Branch], depth: int) -> int:
    limit = min(branch.shareable for branch in group)
    end = depth
    while end < limit and all(branch.ids[end] == group[0].ids[end] for branch in group):
        end += 1
    return end


def concatenate(rows: Sequence[Row]) -> Row:
    """Rows one behind the other in one row; none sees another."""
    merged = Row([], [], [], [], [], [])
    for row in rows:
        offset = len(merged.parents)
        merged.ids.extend(row.ids)
        merged.labels.extend(row.labels)
        merged.positions.extend(row.positions)
        merged.nodes.extend(node + offset for node in row.nodes)
        merged.parents.extend(parent + offset if parent >= 0 else -1 for parent in row.parents)
        merged.images.extend(row.images)
        merged.instructions.extend(row.instructions)
    return merged


def pack(rows: Sequence[Row], capacity: int | None = None) -> list[Row]:
    """Rows packed first-fit, longest first, into as few rows of at most `capacity` ids (default: the longest row)."""
    capacity = capacity or max(map(len, rows))
    bins: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        for members in bins:
            if sum(map(len, members)) + len(row) <= capacity:
                members.append(row)
                break
        else:
            bins.append([row])
    return [concatenate(members) for members in bins]


@dataclass(frozen=True)
class RowBatch:
    """Rows as tensors, right-padded.

    ids, labels, positions: [B,T]. mask: [B,T] long (1 = token) where every row is one text, else [B,1,T,T] boolean.
    images: unique pictures of the batch. image_index: [S] which of them fills each picture's place, row by row.
    image_inputs: pixels [U,3,H,W], tiles, or cached tokens [U,N,D] of the unique pictures, once `with_images` has run.
    num_tokens: positions that are no padding. lengths: of each row; () for an encoder-decoder.
    instructions: for each picture's place the text that a Q-Former reads beside it, [S]; None where it reads none.
    decoder_ids: [B,U], for an encoder-decoder; `labels` is then [B,U].
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor
    images: list[str]
    image_index: Tensor
    num_tokens: int
    lengths: tuple[int, ...] = ()
    image_inputs: Tensor | TiledPictures | None = None
    decoder_ids: Tensor | None = None
    instructions: TextBatch | None = None

    @property
    def num_labels(self) -> int:
        """Positions that carry loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted."""
        return self.num_labels

    def with_images(self, load: Callable[[list[str]], Tensor | TiledPictures]) -> "RowBatch":
        """This batch with the tensors of its pictures, loaded by `load(images)`."""
        return self if not self.images else replace(self, image_inputs=load(self.images))

    def to(self, device: torch.device | str) -> "RowBatch":
        """This batch on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor | TiledPictures)
        }
        asked = self.instructions and self.instructions.to(device)
        return replace(self, **moved, instructions=asked)


def collate(rows: Sequence[Row]) -> RowBatch:
    """Rows as one batch, padded to the longest."""
    length = max(map(len, rows))
    ids = _padded([row.ids for row in rows], length, 0)
    images, image_index = _unique_images([row.images for row in rows])
    if all(len(row.parents) == 1 for row in rows):
        mask = _padded([[1] * len(row) for row in rows], length, 0)
    else:
        mask = torch.stack([_tree_mask(row, length) for row in rows])[:, None]  # [B,1,T,T]
    return RowBatch(
        ids=ids,
        labels=_padded([row.labels for row in rows], length, IGNORE),
        positions=_padded([row.positions for row in rows], length, 0),
        mask=mask,
        images=images,
        image_index=image_index,
        num_tokens=sum(map(len, rows)),
        instructions=_batch([instruction for row in rows for instruction in row.instructions]),
        lengths=tuple(map(len, rows)),
    )


def collate_encoder_decoder(
    texts: Sequence[TokenizedText], images: Sequence[Sequence[str]], start_id: int, end_id: int
) -> RowBatch:
    """Single-answer texts as a batch for an encoder-decoder: what comes before the answer goes into the encoder.

    Raises VlmError if a text has nothing to train on.
    """
    prompts, answers = [], []
    for text in texts:
        if not any(text.trained):
            raise VlmError("a sample has no token to train on: its answer is empty or was cut off")
        prompt_end = text.trained.index(True)
        answer = [token for token, flag in zip(text.ids, text.trained) if flag]
        prompts.append([*text.ids[:prompt_end], end_id])
        answers.append(answer if answer[-1] == end_id else [*answer, end_id])
    length, width = max(map(len, prompts)), max(map(len, answers))
    unique, image_index = _unique_images(images)
    return RowBatch(
        ids=_padded(prompts, length, 0),
        labels=_padded(answers, width, IGNORE),
        positions=_padded([list(range(len(p))) for p in prompts], length, 0),
        mask=_padded([[1] * len(p) for p in prompts], length, 0),
        images=unique,
        image_index=image_index,
        num_tokens=sum(map(len, prompts)) + sum(map(len, answers)),
        instructions=_batch(_instructions(texts, images)),
        decoder_ids=_padded([[start_id, *answer[:-1]] for answer in answers], width, 0),
    )


def _instructions(texts: Sequence[TokenizedText], images: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    return [text.instruction for text, paths in zip(texts, images) for _ in paths if text.instruction]


def _batch(instructions: Sequence[tuple[int, ...]]) -> TextBatch | None:
    return TextBatch.of(instructions) if instructions else None


def _padded(lists: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*values, *[fill] * (length - len(values))] for values in lists], dtype=torch.long)


def _unique_images(images: Sequence[Sequence[str]]) -> tuple[list[str], Tensor]:
    flat = [image for row in images for image in row]
    unique = list(dict.fromkeys(flat))
    number = {image: i for i, image in enumerate(unique)}
    return unique, torch.tensor([number[image] for image in flat], dtype=torch.long)


def _tree_mask(row: Row, length: int) -> Tensor:
    """Who may attend to whom, [T,T]: earlier positions of the own node and of its ancestors."""
    count = len(row.parents)
    sees = torch.eye(count, dtype=torch.bool)
    for node, parent in enumerate(row.parents):  # parents come before their children
        if parent >= 0:
            sees[node] |= sees[parent]
    nodes = torch.tensor(row.nodes)
    mask = torch.eye(length, dtype=torch.bool)  # padding sees itself: an empty softmax would be NaN
    mask[: len(row), : len(row)] = sees[nodes][:, nodes].tril()
    return mask
