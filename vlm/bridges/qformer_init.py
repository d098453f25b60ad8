"""A Q-Former that starts as a BERT: sizes, weights and tokeniser of a checkpoint in transformers' layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.backbones.blip2_checkpoint import KINDS, Blip2Checkpoint, read_blip2
from vlm.backbones.hf_loading import load_config, load_strictly
from vlm.backbones.known_configs import find_config
from vlm.backbones.names import parse_part_name
from vlm.backbones.starter import STARTER_TEXT, minilm_folder
from vlm.bridges.qformer import INIT_STD, QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import from_lavis
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.records import IMAGE_PLACEHOLDER
from vlm.data.text_batch import TextBatch
from vlm.errors import VlmError, did_you_mean
from vlm.model_spec import QFormerBridgeSpec, QFormerParts

_TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_POSITIONS = "bert.embeddings.position_embeddings.weight"
_WORDS, _BIAS = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
# What no BERT has: these parts start fresh.
_FRESH = (
    "bridge.query_tokens",
    "bridge.image_norm.",
    "bridge.language_projection.",
    "heads.vision_",
    "heads.text_",
    "heads.match.",
    "heads.temp",
)


@dataclass(frozen=True)
class QFormerTokenizer:
    """Texts as `[CLS] ... [SEP]`. start: id of [DEC], which opens a text that is to be said."""

    tokenizer: Any
    start: int

    def __call__(self, texts: list[str], limit: int, device: torch.device | str | None = None) -> TextBatch:
        """Texts of at most `limit` tokens, [CLS] and [SEP] among them; longer ones are cut before [SEP]."""
        return TextBatch.of(self.ids(texts, limit), self.pad, device)

    def ids(self, texts: list[str], limit: int) -> list[list[int]]:
        """The same as lists."""
        found: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return found

    @property
    def end(self) -> int:
        """Id of [SEP]."""
        return int(self.tokenizer.sep_token_id)

    @property
    def pad(self) -> int:
        """Id of [PAD]."""
        return int(self.tokenizer.pad_token_id)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        words = [i for i in ids if i != self.start]
        return str(self.tokenizer.decode(words, skip_special_tokens=True)).strip()


def bert_reference(name: str) -> str:
    """The hub id or folder behind `hf:ID_OR_FOLDER` or `starter:minilm-l6`. Raises VlmError for other names."""
    part = parse_part_name(name, ("hf", "starter"))
    if part.source == "hf":
        return part.reference
    if part.reference not in STARTER_TEXT:
        raise VlmError(f"no starter text encoder {part.reference!r}{did_you_mean(part.reference, STARTER_TEXT)}")
    return str(minilm_folder())


def qformer_sizes(spec: QFormerParts, image_width: int, text: bool = True) -> QFormerSizes:
    """Sizes of the Q-Former that `spec` describes, by configurations alone.

    text: whether it has a text side (stage 2 has none, unless its queries read instructions).
    Raises VlmError for what is neither BERT nor Q-Former, and where a published Q-Former has other sizes than `spec`.
    """
    config = find_config(bert_reference(spec.init))
    published = config.model_type in KINDS
    if config.model_type != "bert" and not published:
        raise VlmError(
            f"bridge.init: {spec.init}: a Q-Former starts from a BERT, this is a {config.model_type!r} model"
        )
    if published:
        _check_published(spec, config, image_width)
        config = config.qformer_config
    layers = spec.layers or config.num_hidden_layers
    if layers > config.num_hidden_layers:
        raise VlmError(f"bridge.layers: {layers}: {spec.init} has {config.num_hidden_layers}")
    return QFormerSizes(
        width=config.hidden_size,
        layers=layers,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        num_queries=spec.num_queries,
        image_width=image_width,
        vocabulary=(config.vocab_size + (0 if published else 1)) if text else 0,  # with [DEC]
        positions=config.max_position_embeddings,
        cross_attention_every=spec.cross_attention_every,
        dropout=spec.dropout,
    )


def _check_published(spec: QFormerParts, config: Any, image_width: int) -> None:
    qformer = config.qformer_config
    for key, asked, there in (
        ("num_queries", spec.num_queries, config.num_query_tokens),
        ("cross_attention_every", spec.cross_attention_every, qformer.cross_attention_frequency),
        ("layers", spec.layers or qformer.num_hidden_layers, qformer.num_hidden_layers),
    ):
        if asked != there:
            raise VlmError(f"bridge.{key}: {asked}: the Q-Former of {spec.init} has {there}")
    if image_width != qformer.encoder_hidden_size:
        raise VlmError(
            f"bridge.init: the Q-Former of {spec.init} reads image tokens of width {qformer.encoder_hidden_size}, "
            f"those of this image encoder have {image_width}"
        )


def qformer_tokenizer(spec: QFormerParts) -> QFormerTokenizer:
    """The checkpoint's tokeniser; [DEC] is the id behind its vocabulary, as in LAVIS."""
    from transformers import AutoTokenizer

    reference = bert_reference(spec.init)
    config = load_config(reference)
    # InstructBLIP keeps it beside the language model's.
    folder = {"subfolder": "qformer_tokenizer"} if config.model_type == "instructblip" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(reference, trust_remote_code=False, **folder)
    except (OSError, ValueError) as error:
        raise VlmError(f"{spec.init}: its tokeniser cannot be read: {str(error).splitlines()[0]}") from error
    published = config.model_type in KINDS  # its vocabulary counts [DEC]; its tokeniser may know it, and `<image>`
    size = int(config.qformer_config.vocab_size) if published else int(config.vocab_size) + 1
    start = size - 1
    known = [number for token, number in tokenizer.get_vocab().items() if token != IMAGE_PLACEHOLDER]
    if max(known) > start - (not published):
        raise VlmError(f"{spec.init}: the tokeniser knows {max(known) + 1} tokens, the model {size}")
    return QFormerTokenizer(tokenizer, start)


def build_qformer(spec: QFormerBridgeSpec, image_width: int, text: bool = True) -> tuple[QFormer, QFormerHeads | None]:
    """A Q-Former with the weights of `spec.init`, and stage 1's heads where it has a text side.

    Self-attention, feed-forward nets and embeddings are BERT's, the queries' feed-forward nets copies of the texts',
    cross-attention, queries and projections fresh. BERT's head becomes the word head where the checkpoint has one.
    The embedding of BERT's first segment is added to the positions, so that texts alone get exactly BERT's states
    (LAVIS leaves it out). Every key is accounted for. Raises VlmError that names those that are not.
    """
    sizes = qformer_sizes(spec, image_width, text)
    bridge = QFormer(sizes)
    heads = QFormerHeads(sizes.width, sizes.vocabulary, spec.embed_width) if text else None
    start_qformer(spec, bridge, heads)
    return bridge, heads


def start_qformer(spec: QFormerParts, bridge: QFormer, heads: QFormerHeads | None) -> None:
    """Fill a Q-Former and its heads with the weights of `spec.init`, a BERT or a published Q-Former."""
    reference = bert_reference(spec.init)
    if load_config(reference).model_type in KINDS:
        start_from_published(bridge, heads, read_blip2(reference))
    else:
        start_from_bert(bridge, heads, bert_state(spec, bridge.sizes), spec.init)


@torch.no_grad()
def start_from_published(bridge: QFormer, heads: QFormerHeads | None, checkpoint: Blip2Checkpoint) -> None:
    """Fill a Q-Former with a published one; the projection to a language model stays as it is, for it fits but one.

    A text side that is not wanted is left out, and so is stage 1's. Heads that nobody publishes (temperature, word
    head) stay as they are. Raises VlmError that names other keys that are missing, left over or of another shape.
    """
    where = checkpoint.reference
    parts = nn.ModuleDict({"bridge": bridge} if heads is None else {"bridge": bridge, "heads": heads})
    own, given = parts.state_dict(), from_lavis(checkpoint.state("bridge"), where)
    text = bridge.sizes.vocabulary > 0
    given = {
        key: value
        for key, value in given.items()
        if not key.startswith("bridge.language_projection.")
        and (text or not _of_text(key))
        and (heads is not None or not key.startswith("heads."))
    }
    fresh = ("bridge.language_projection.", "heads.temperature", "heads.words.")
    account(own, given, lambda key: key.startswith(fresh), where)
    for key, value in given.items():
        own[key].copy_(value)


@torch.no_grad()
def start_from_bert(bridge: QFormer, heads: QFormerHeads | None, bert: dict[str, Tensor], where: str) -> None:
    """Fill a Q-Former and its heads with a BERT's tensors by our names; what only a Q-Former has stays as it is."""
    parts = nn.ModuleDict({"bridge": bridge} if heads is None else {"bridge": bridge, "heads": heads})
    own = parts.state_dict()
    copies = {key.replace(".text_ffn.", ".query_ffn."): value for key, value in bert.items() if ".text_ffn." in key}
    text = bridge.sizes.vocabulary > 0
    given = {key: value for key, value in {**bert, **copies}.items() if text or not _of_text(key)}
    given = {key: value for key, value in given.items() if heads is not None or not key.startswith("heads.")}

    def fresh(key: str) -> bool:
        without_words = key.startswith("heads.words.") and not _has_words(bert)
        return key.startswith(_FRESH) or ".cross_attention." in key or without_words

    account(own, given, fresh, where)
    for key, value in given.items():
        own[key].copy_(value)


def account(own: dict[str, Tensor], given: dict[str, Tensor], fresh: Callable[[str], bool], where: str) -> None:
    """Raise VlmError that names keys of `given` left over or of another shape, and missing ones not `fresh`."""
    unknown = sorted(given.keys() - own.keys())
    lacking = sorted(key for key in own.keys() - given.keys() if not fresh(key))
    wrong = sorted(key for key in given.keys() & own.keys() if given[key].shape != own[key].shape)
    for what, keys in (("left over", unknown), ("missing", lacking), ("of another shape", wrong)):
        if keys:
            raise VlmError(f"{where} does not fit this Q-Former: {len(keys)} keys {what}: {', '.join(keys[:4])}")


def bert_state(spec: QFormerParts, sizes: QFormerSizes) -> dict[str, Tensor]:
    """The checkpoint's tensors by our names, cut to the layers wanted, with a row for [DEC]."""
    from transformers import BertForMaskedLM

    unused = (r"(bert\.)?pooler\..*", r"cls\.seq_relationship\..*")
    model, absent = load_strictly(
        BertForMaskedLM, bert_reference(spec.init), unused, optional=(r"cls\..*",), dtype=torch.float32
    )
    state = {key: value for key, value in model.state_dict().items() if not (absent and key.startswith("cls."))}
    state[_POSITIONS] = state[_POSITIONS] + state.pop(_TOKEN_TYPES)[0]
    dec = torch.empty(1, sizes.width).normal_(std=INIT_STD)
    state[_WORDS] = torch.cat([state[_WORDS], dec])
    if _BIAS in state:
        state[_BIAS] = torch.cat([state[_BIAS], torch.zeros(1)])
    # Made anew from what they are tied to.
    kept = {key: value for key, value in state.items() if not key.startswith("cls.predictions.decoder.")}
    dropped = tuple(f"bert.encoder.layer.{n}." for n in range(sizes.layers, model.config.num_hidden_layers))
    return from_lavis({f"Qformer.{k}": v for k, v in kept.items() if not k.startswith(dropped)}, where=spec.init)


def _has_words(state: dict[str, Tensor]) -> bool:
    return any(key.startswith("heads.words.") for key in state)


def _of_text(key: str) -> bool:
    return key.startswith(("bridge.embeddings.", "heads.")) or ".text_ffn." in key
