"""The Q-Former model (BLIP-2, stage 1): a frozen image encoder, and a Q-Former that contrasts, matches and writes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.backbones.image import ImageEncoder
from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_init import QFormerTokenizer
from vlm.bridges.qformer_states import BegunTexts, ImageKeysValues, QueryStates
from vlm.data.feature_cache import PictureFeatures, frozen_features
from vlm.data.images import as_list, load_image
from vlm.data.pairs import PairBatch, pair_batch
from vlm.data.prompts import Labels, label_prompts
from vlm.data.records import Record
from vlm.data.samples import Sample, caption_samples, only_caption
from vlm.data.text_batch import TextBatch
from vlm.errors import UnsupportedTask, VlmError
from vlm.model_spec import QFormerSpec
from vlm.models.freezing import set_mode
from vlm.models.generation_arguments import check_generation
from vlm.models.qformer_operations import stage1_operations
from vlm.models.tasks import TaskModel
from vlm.objectives.itm import NONE
from vlm.objectives.matching import HardNegatives
from vlm.objectives.objective import ReadOuts
from vlm.objectives.query_itc import query_similarity
from vlm.recipe import DataSpec

IMAGE_CHUNK, TEXT_CHUNK, PAIR_CHUNK = 32, 256, 64  # pictures, texts and pairs that go through the model at once
CAPTION = {"num_beams": 5, "min_length": 8, "max_length": 30}  # LAVIS' defaults: BLIP-2's captions


class QFormerModel(TaskModel):
    """Li et al. 2023 (BLIP-2), section 3.1."""

    family = "Q-Former"
    has_word_head = True  # a published one may have none

    def __init__(
        self,
        spec: QFormerSpec,
        image_encoder: ImageEncoder,
        bridge: QFormer,
        heads: QFormerHeads,
        tokenizer: QFormerTokenizer,
    ) -> None:
        super().__init__()
        if max(spec.text_length, spec.match_length) > bridge.sizes.positions:
            raise VlmError(f"text_length, match_length: {spec.bridge.init} takes {bridge.sizes.positions} tokens")
        self.spec = spec
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.heads = heads
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.bridge.query_tokens.device

    @property
    def scale(self) -> Tensor:
        """The factor on the cosine: one over the temperature."""
        return 1 / self.heads.temperature.float()

    def train(self, mode: bool = True) -> "QFormerModel":
        """Train mode for what trains; frozen parts stay in eval mode."""
        set_mode(self, mode)
        return self

    # ---- training: captions to pairs -------------------------------------------------------------------------------

    def samples(self, records: Sequence[Record], spec: DataSpec) -> list[Sample]:
        """Training samples of records: one for each caption of a picture."""
        return caption_samples(records, spec)

    def prepare_texts(self, sample: Sample, limit: int | None = None) -> list[int]:
        """A sample's caption as token ids. Raises VlmError for one that is empty, or without exactly one picture."""
        length = min(limit or self.spec.text_length, self.spec.text_length)
        return self.tokenizer.ids([only_caption(sample)], length)[0]

    def collate(self, samples: Sequence[tuple[list[int], Sequence[str]]], places: Sequence[int] = ()) -> PairBatch:
        """Captions' token ids, each with the path of its picture, as one batch."""
        texts = TextBatch.of([ids for ids, _ in samples], self.tokenizer.pad)
        return pair_batch(texts.ids, texts.mask.long(), [paths[0] for _, paths in samples], places)

    def empty_batch(self) -> PairBatch:
        """A batch of no pairs, for a process that has none while others do."""
        none = torch.zeros(0, 0, dtype=torch.long)
        return pair_batch(none, none, [], []).to(self.device)

    def say_sample(self, sample: Sample, **generation: Any) -> tuple[str, str, str]:
        """(what was asked, what the model says, what was wanted) of a training sample."""
        return "", self.caption(sample.images[0], **generation)[0], sample.texts[0]

    # ---- training: read-outs, each computed once a batch however many objectives ask -------------------------------

    def read_image(self, read: ReadOuts) -> ImageKeysValues:
        """Keys and values of the batch's unique pictures [U]."""
        return self.image_keys_values(read.batch.image_inputs)

    def read_texts(self, read: ReadOuts) -> TextBatch:
        """The batch's texts [b]."""
        return TextBatch.from_mask(read.batch.ids, read.batch.mask)

    def read_queries(self, read: ReadOuts) -> QueryStates:
        """The queries alone, about each unique picture [U]."""
        return read("apart")[0] if self._in_one(read) else self.bridge.queries(read("image"))

    def read_apart(self, read: ReadOuts) -> tuple[QueryStates, Tensor, Tensor]:
        """Queries alone, texts' [CLS] states [b,D] and label states [n,D], in one pass."""
        texts: TextBatch = read("texts")
        said, slots = texts.with_first(self.tokenizer.start).without_last(), read.batch.image_index.tolist()
        return self.bridge.apart(read("image"), texts, said, slots)

    def _in_one(self, read: ReadOuts) -> bool:
        return {"pairs", "label_states"} <= read.expected

    def read_pairs(self, read: ReadOuts) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings, image [b,Q,E] and text [b,E]."""
        if not len(read.batch):
            # Through the heads, so that gradients of all processes meet here as well.
            none = torch.zeros(0, self.bridge.num_queries, self.bridge.width, device=self.device)
            return self.heads.embed_queries(none), self.heads.embed_text(none[:, 0])
        image = self.heads.embed_queries(read("queries").states).index_select(0, read.batch.image_index)
        first = read("apart")[1] if self._in_one(read) else self.bridge.first_text_state(read("texts"))
        return image, self.heads.embed_text(first)

    def read_label_states(self, read: ReadOuts) -> tuple[Tensor, Tensor]:
        """States [n,D] of texts behind their picture's queries, and the token that follows each [n]."""
        texts: TextBatch = read("texts")
        if self._in_one(read):
            return read("apart")[2], texts.next_tokens()
        queries: QueryStates = read("queries")
        index = read.batch.image_index.tolist()
        if index != list(range(len(queries.states))):
            queries = queries.select(index)
        said = texts.with_first(self.tokenizer.start).without_last()
        return self.bridge.causal(queries, said), texts.next_tokens()

    @property
    def plain_head(self) -> None:
        """BERT's word head is no plain linear layer."""

    def word_logits(self, states: Tensor) -> Tensor:
        """Logits [n,V] of the next token of states [n,D]."""
        assert self.bridge.embeddings is not None
        return self.heads.words(states, self.bridge.embeddings.words.weight)

    def match_logits(self, read: ReadOuts, negatives: HardNegatives) -> tuple[Tensor, Tensor]:
        """Logits (no match, match) of the batch's right pairs [b,2] and of the wrong ones drawn for them [w,2].

        What lies outside the batch is computed here from its inputs; the rest shares the batch's keys and values.
        """
        texts, image = read("texts"), read("image")
        index: list[int] = read.batch.image_index.tolist()
        count = len(texts)
        first = read.rows.start or 0
        rows = range(first, first + count)
        start = negatives.start + first  # place of the batch's first pair
        outside = {p for row in rows for p in (negatives.images[row], negatives.texts[row]) if p != NONE}
        outside -= set(range(start, start + count))
        wrong_images = [(row - first, negatives.images[row]) for row in rows if negatives.images[row] != NONE]
        wrong_texts = [(row - first, negatives.texts[row]) for row in rows if negatives.texts[row] != NONE]

        slot = {start + row: number for row, number in enumerate(index)}
        if foreign := sorted({p for _, p in wrong_images} & outside):
            slot |= {place: len(image) + number for number, place in enumerate(foreign)}
            inputs = torch.stack([negatives.known_images[place] for place in foreign])
            image = image.joined(self.image_keys_values(inputs.to(self.device)))
        own = [ids[:length] for ids, length in zip(texts.ids.tolist(), texts.lengths)]
        others = [
            own[place - start] if start <= place < start + count else negatives.known_texts[place]
            for _, place in wrong_texts
        ]
        pad, device = self.tokenizer.pad, self.device
        # One pass over all pairs, so that each weight's gradient is made of one large product.
        slots = [*index, *(index[row] for row, _ in wrong_texts), *(slot[place] for _, place in wrong_images)]
        asked = TextBatch.of([*own, *others, *(own[row] for row, _ in wrong_images)], pad, device)
        logits = self.heads.match_logits(self.bridge.pairs(image, slots, asked))
        return logits[:count], logits[count:]

    def comparison_parameters(self) -> list[nn.Parameter]:
        """The temperature."""
        return [self.heads.temperature]

    def after_step(self) -> None:
        """Keep the temperature within its bounds."""
        self.heads.clamp_temperature()

    def operations(self, batch: PairBatch) -> float:
        """Matrix operations of a training step of all three objectives; a frozen image encoder counts as nothing."""
        images = 0 if batch.image_inputs is None else len(batch.image_inputs)
        return stage1_operations(
            self.bridge.sizes, self.image_encoder.num_tokens, images, len(batch), batch.num_tokens, self._encoder_learns
        )

    # ---- pictures to keys and values -------------------------------------------------------------------------------

    def picture_features(self) -> PictureFeatures | None:
        """What the feature cache keeps of a picture: its tokens; nothing while the encoder learns."""
        return frozen_features(self.image_encoder, "tokens", lambda features: features.tokens)

    def image_keys_values(self, inputs: Tensor) -> ImageKeysValues:
        """Keys and values of pixels [U,3,H,W] or of image tokens [U,N,D]; the encoder without gradient where frozen."""
        return self.bridge.image(self._tokens(inputs) if inputs.ndim == 4 else inputs)

    @property
    def _encoder_learns(self) -> bool:
        return any(p.requires_grad for p in self.image_encoder.parameters())

    def _tokens(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._encoder_learns and torch.is_grad_enabled()):
            return self.image_encoder(pixels).tokens

    def see(self, images: Sequence[Any]) -> ImageKeysValues:
        """Keys and values of pictures (paths, PIL images or arrays).

        Raises BrokenImage for one that cannot be read, VlmError where the encoder's features are not finite.
        """
        pixels = torch.stack([self.image_encoder.transform.eval(load_image(image)) for image in images])
        tokens = self._tokens(pixels.to(self.device))
        bad = ~tokens.isfinite().flatten(1).all(1)
        if bad.any():
            raise VlmError(
                f"image {int(bad.nonzero()[0])}: features of {self.image_encoder.name} in {self.image_encoder.dtype} "
                "are not finite; load the model with dtype bf16 or fp32"
            )
        return self.bridge.image(tokens)

    # ---- tasks -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_image(self, images: Any) -> Tensor:
        """Unit-length embeddings [B,Q,E], one a query, of one or more PIL images, paths or uint8 arrays [H,W,3]."""
        pictures = as_list(images)
        return torch.cat([self._embed(self.see(part)) for part in _chunks(pictures, IMAGE_CHUNK)])

    def _embed(self, image: ImageKeysValues) -> Tensor:
        return self.heads.embed_queries(self.bridge.queries(image).states)

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit-length embeddings [B,E] of one or more texts, cut at `match_length` tokens."""
        wanted = _texts(texts, "encode_text")
        parts = [self.tokenize(part) for part in _chunks(wanted, TEXT_CHUNK)]
        return torch.cat([self.heads.embed_text(self.bridge.first_text_state(part)) for part in parts])

    def tokenize(self, texts: Sequence[str]) -> TextBatch:
        """Texts as a batch, cut at `match_length` tokens."""
        return self.tokenizer(list(texts), self.spec.match_length, self.device)

    @torch.inference_mode()
    def match(self, images: Any, texts: str | Sequence[str]) -> Tensor:
        """Probability [B] that image i and text i match; one image serves all texts. Each picture is seen once."""
        wanted, pictures = _texts(texts, "match"), as_list(images)
        if len(pictures) == 1:
            return self.match_logits_of(self.see(pictures), self.tokenize(wanted)).softmax(-1)[:, 1]
        if len(pictures) != len(wanted):
            raise VlmError(f"match: {len(pictures)} images for {len(wanted)} texts")
        rows = []
        for part in _chunks(list(range(len(wanted))), IMAGE_CHUNK):
            image, asked = self.see([pictures[i] for i in part]), self.tokenize([wanted[i] for i in part])
            rows.append(self.heads.match_logits(self.bridge.joint(image, asked)))
        return torch.cat(rows).softmax(-1)[:, 1]

    @torch.inference_mode()
    def match_each(self, images: Any, texts: Sequence[str], wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits (no match, match) [P_i,2] of image i with each of its texts: those of the numbers `wanted[i]`.

        Each picture is seen once, and its keys and values serve all its texts.
        """
        pictures, numbers = as_list(images), sorted({number for row in wanted for number in row})
        place = {number: i for i, number in enumerate(numbers)}
        batch = self.tokenize(_texts([texts[number] for number in numbers], "match_each"))
        found: list[Tensor] = []
        for part in _chunks(list(range(len(pictures))), IMAGE_CHUNK):
            asked = [[place[number] for number in wanted[i]] for i in part]
            found += self.match_logits_each(self.see([pictures[i] for i in part]), batch, asked)
        return found

    def match_logits_each(
        self, image: ImageKeysValues, texts: TextBatch, wanted: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Logits (no match, match) [P_i,2] of image i with the texts of the numbers `wanted[i]`, for inference.

        Images take turns in groups whose texts are begun once for all of the group.
        """
        alone = image.split([1] * len(image))
        found = []
        for group in _sharing(wanted, TEXT_CHUNK):
            numbers = sorted({number for i in group for number in wanted[i]})
            place = {number: row for row, number in enumerate(numbers)}
            some = texts.select(numbers)
            shared = self.bridge.begin(some) if sum(len(wanted[i]) for i in group) > len(numbers) else some
            for i in group:
                found.append(self.match_logits_of(alone[i], shared.select([place[number] for number in wanted[i]])))
        return found

    def match_logits_of(self, image: ImageKeysValues, texts: TextBatch | BegunTexts, chunk: int = PAIR_CHUNK) -> Tensor:
        """Logits (no match, match) [P,2] of one image with each of P texts."""
        # Texts of a length go together, so that little padding is attended to.
        order = sorted(range(len(texts)), key=lambda i: texts.lengths[i])
        logits = torch.cat(
            [self.heads.match_logits(self.bridge.joint(image, texts.select(part))) for part in _chunks(order, chunk)]
        ).float()
        result = torch.empty_like(logits)
        result[torch.tensor(order, device=logits.device)] = logits
        return result

    @torch.inference_mode()
    def classify(self, images: Any, labels: Labels, templates: str | Sequence[str] | None = None) -> Tensor:
        """Probabilities [B,C] of labels: softmax over the similarity of the best query (Li et al. 2023, section 3.1).

        labels, templates: as for dual encoders; a label's prompts are averaged.
        """
        rows = [F.normalize(self.encode_text(own).mean(0), dim=0) for own in label_prompts(labels, templates).values()]
        return (query_similarity(self.encode_image(images), torch.stack(rows)) * self.scale).softmax(-1)

    @torch.inference_mode()
    def caption(self, images: Any, prompt: str | None = None, **generation: Any) -> list[str]:
        """A caption for each image, which goes on from `prompt`.

        generation: arguments of transformers' `generate`; by default 5 beams and 8 to 30 tokens, [DEC] and prompt
        included. `max_new_tokens` counts without them.
        """
        from vlm.models.qformer_generation import generate_ids

        if not self.has_word_head:
            raise UnsupportedTask(f"{self.spec.bridge.init} has no head that says words: it cannot `caption`")
        check_generation(generation)
        opening = [self.tokenizer.start]
        if prompt:
            opening += self.tokenizer.ids([prompt], self.spec.text_length)[0][1:-1]  # without [CLS] and [SEP]
        defaults: dict[str, Any] = dict(CAPTION)
        if "max_new_tokens" in generation or "max_length" in generation:
            defaults = {"num_beams": CAPTION["num_beams"]}
        if generation.get("do_sample"):
            defaults["num_beams"] = 1
        captions: list[str] = []
        for part in _chunks(as_list(images), IMAGE_CHUNK):
            queries = self.bridge.queries(self.see(part))
            ids = generate_ids(
                self.bridge,
                self.heads.words,
                queries,
                torch.tensor([opening] * len(part), device=self.device),
                self.tokenizer.end,
                self.tokenizer.pad,
                **{**defaults, **generation},
            )
            captions += [self.tokenizer.decode(row) for row in ids.tolist()]
        return captions


def _chunks(items: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _sharing(wanted: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Images in turn, in groups that want no more than so many texts together, or of one image."""
    groups: list[list[int]] = []
    texts: set[int] = set()
    for image, numbers in enumerate(wanted):
        if not groups or len(texts | set(numbers)) > most:
            groups.append([])
            texts = set()
        groups[-1].append(image)
        texts |= set(numbers)
    return groups


def _texts(texts: str | Sequence[str], task: str) -> list[str]:
    wanted = [texts] if isinstance(texts, str) else list(texts)
    if not wanted:
        raise VlmError(f"{task}: no texts were given")
    if strange := next((text for text in wanted if not isinstance(text, str)), None):
        raise VlmError(f"{task}: expected text, got {type(strange).__name__}")
    return wanted
