"""The generative model (LLaVA, BLIP-2's second stage): image encoder -> bridge -> language model."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlm.backbones.image import ImageEncoder
from vlm.backbones.language import LanguageModel
from vlm.bridges.projection import Projection
from vlm.bridges.qformer_init import QFormerTokenizer
from vlm.bridges.qformer_projection import QFormerProjection
from vlm.data.chat_messages import read_message
from vlm.data.conversation import IMAGE_SLOT, TokenizedText, tokenize_conversation
from vlm.data.feature_cache import PictureFeatures, frozen_features
from vlm.data.images import as_list, load_image
from vlm.data.packing import (
    IGNORE,
    Row,
    RowBatch,
    build_row,
    collate,
    collate_encoder_decoder,
    expand_slots,
    pack,
    truncate,
)
from vlm.data.records import IMAGE_PLACEHOLDER, QUOTED_PLACEHOLDER, Message, Record
from vlm.data.samples import Sample, make_samples
from vlm.data.splitting import split_text
from vlm.data.stored_features import encode_pictures
from vlm.data.text_batch import TextBatch
from vlm.data.tiling import TiledPictures, Tiling, build_tiling, stack_pictures
from vlm.errors import VlmError
from vlm.model_spec import GenerativeSpec
from vlm.models.counting import operations_per_token
from vlm.models.freezing import set_mode
from vlm.models.generation import Prompt, generate_texts, picture_key
from vlm.models.generation_arguments import check_generation
from vlm.models.prompts import PromptWriter, check_places
from vlm.models.tasks import TaskModel
from vlm.objectives.lm import token_log_probs
from vlm.objectives.objective import ReadOuts
from vlm.recipe import DataSpec

ENCODER_CHUNK = 64  # pictures that go through the image encoder at once


class GenerativeModel(TaskModel):
    """Image tokens spliced into a language model's prompt (Liu et al. 2023).

    image_tokens: how many tokens a picture takes in the prompt; where `tiling` cuts it into tiles, each of these.
    instruction_tokenizer: of a bridge whose queries read the instruction as well (InstructBLIP).
    """

    family = "generative"

    def __init__(
        self,
        spec: GenerativeSpec,
        image_encoder: ImageEncoder,
        bridge: Projection | QFormerProjection,
        language_model: LanguageModel,
        instruction_tokenizer: QFormerTokenizer | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.language_model = language_model
        self.image_tokens = bridge.num_tokens
        self.instruction_tokenizer = instruction_tokenizer
        self.prompts = PromptWriter(self)
        self.tiling: Tiling | None = None
        if isinstance(bridge, Projection) and spec.image_encoder.resize == "anyres":
            self.tiling = build_tiling(image_encoder.transform, spec.image_encoder.grid_pinpoints, bridge.grid_out)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.language_model.device

    @property
    def tokenizer(self) -> Any:
        """The language model's tokeniser."""
        return self.language_model.tokenizer

    def train(self, mode: bool = True) -> "GenerativeModel":
        """Train mode for what trains; frozen parts stay in eval mode."""
        set_mode(self, mode)
        return self

    # ---- training: text to rows, rows to hidden states at the labels -------------------------------------------

    def samples(self, records: Sequence[Record], spec: DataSpec) -> list[Sample]:
        """Training samples of a data source's records."""
        return make_samples(records, spec, self)

    def prepare_texts(self, sample: Sample, limit: int | None = None) -> list[TokenizedText]:
        """A sample's conversations as training tokens. Raises VlmError if one cannot be trained on."""
        counts = self.count_tokens(sample.images)
        return [self.tokenize(turns, limit, counts) for turns in sample.conversations]

    def say_sample(self, sample: Sample, **generation: Any) -> tuple[str, str, str]:
        """(what was asked, what the model says, what was wanted) of a sample's first conversation."""
        turns = sample.conversations[0]
        last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
        return turns[last - 1].text, self.say(turns[:last], sample.images, **generation), turns[last].text

    def operations(self, batch: RowBatch) -> float:
        """Matrix operations of a training step on a batch: the language model's; frozen features count as cached."""
        head = self.language_model.network.get_output_embeddings().weight
        per_label = head.numel() * (6 if head.requires_grad else 4)
        return batch.num_tokens * self._operations_per_token + batch.num_labels * per_label

    @cached_property
    def _operations_per_token(self) -> float:
        return operations_per_token(self.language_model.network, self.language_model.embeddings)

    def tokenize(
        self, messages: Sequence[Message], limit: int | None = None, counts: Sequence[int] | None = None
    ) -> TokenizedText:
        """A conversation as training tokens with slots expanded, at most `limit` (default: the context length).

        counts: tokens of each picture, `count_tokens`; by default `image_tokens` wherever `<image>` stands.
        Raises VlmError if cutting would hurt a picture or leave nothing to train on, or if there are other pictures
        than places for them.
        """
        text = self.prompts.instructed(tokenize_conversation(messages, self.spec.template, self.tokenizer), messages)
        counts = [self.image_tokens] * text.num_images if counts is None else counts
        check_places(text, len(counts))
        limit = min(limit or self.language_model.context_length, self.language_model.context_length)
        return truncate(expand_slots(text, counts), limit)

    def count_tokens(self, images: Sequence[Any]) -> list[int]:
        """How many tokens each picture takes in the prompt; where it is cut into tiles, its size decides."""
        tiling = self.tiling
        return [self.image_tokens if tiling is None else tiling.count(image) for image in images]

    def question_messages(self, question: str, answer: str | None = None) -> list[Message]:
        """A question about a picture (and its answer) as a conversation; `<image>` in them is a word."""
        asked, said = (text and text.replace(IMAGE_PLACEHOLDER, QUOTED_PLACEHOLDER) for text in (question, answer))
        messages = [Message("user", self.spec.question_prompt.replace("{question}", asked or ""))]
        return messages if said is None else [*messages, Message("assistant", said)]

    def caption_messages(self, caption: str | None = None) -> list[Message]:
        """The request for a caption (and the caption) as a conversation."""
        messages = [Message("user", self.spec.caption_prompt)]
        return messages if caption is None else [*messages, Message("assistant", caption)]

    def collate(
        self, samples: Sequence[tuple[Sequence[TokenizedText], Sequence[str]]], places: Sequence[int] = ()
    ) -> RowBatch:
        """Samples, each the texts about some pictures and the pictures' paths, as one batch, wherever they stand.

        Texts of a sample share their prefix, and samples share rows, where the language model can mask that way.
        """
        lm = self.language_model
        if lm.is_encoder_decoder:
            texts = [text for sample, _ in samples for text in sample]
            images = [paths for sample, paths in samples for _ in sample]
            if self.spec is not None and self.spec.split_captions and places:
                parts = ((place, n) for (sample, _), place in zip(samples, places) for n in range(len(sample)))
                texts = [split_text(text, self.tokenizer, draw) for text, draw in zip(texts, parts)]
            config = lm.network.config
            return collate_encoder_decoder(texts, images, config.decoder_start_token_id, config.eos_token_id)
        if lm.takes_tree_masks and self.instruction_tokenizer is not None:  # a picture's tokens differ by instruction
            return collate(pack([build_row([text], paths) for texts, paths in samples for text in texts]))
        if lm.takes_tree_masks:
            return collate(pack([build_row(texts, paths) for texts, paths in samples]))
        return collate([build_row([text], paths) for texts, paths in samples for text in texts])

    def read_label_states(self, read: ReadOuts) -> tuple[Tensor, Tensor]:
        """`label_states` of the batch."""
        return self.label_states(read.batch)

    @property
    def plain_head(self) -> Any:
        """The language model's `plain_head`."""
        return self.language_model.plain_head

    def word_logits(self, states: Tensor) -> Tensor:
        """Logits [n,V] of the next token of hidden states [n,D]."""
        return self.language_model.logits(states)

    def label_states(self, batch: RowBatch) -> tuple[Tensor, Tensor]:
        """Hidden states [n,D] at the n labelled positions of a batch, and the labels [n]."""
        hidden = self.language_model.hidden_states(
            self._spliced(batch), batch.mask, batch.positions, batch.decoder_ids, batch.lengths
        )
        chosen = batch.labels != IGNORE
        return hidden[chosen], batch.labels[chosen]

    def _spliced(self, batch: RowBatch) -> Tensor:
        """Embeddings [B,T,D] with projected image tokens in their slots."""
        embeddings = self.language_model.embed(batch.ids)
        if batch.image_inputs is None:
            return embeddings
        if batch.instructions is None:
            tokens = self.project(batch.image_inputs)
            if isinstance(tokens, Tensor):
                filled = tokens[batch.image_index].flatten(0, 1)  # [S*n, D]
            else:
                filled = torch.cat([tokens[i] for i in batch.image_index.tolist()])
        else:
            assert isinstance(batch.image_inputs, Tensor)
            filled = self.project_each(batch.image_inputs, batch.image_index.tolist(), batch.instructions).flatten(0, 1)
        return embeddings.masked_scatter((batch.ids == IMAGE_SLOT)[..., None], filled.to(embeddings.dtype))

    def project(self, inputs: Tensor | TiledPictures) -> Tensor | list[Tensor]:
        """Projected tokens [U,n,D] of pixels [U,3,H,W] or of cached image tokens [U,N,D]; of tiles, a list of [n,D]."""
        if isinstance(inputs, TiledPictures):
            assert self.tiling is not None
            return self.tiling.split(self.bridge(self.encode_pixels(inputs.pixels)), inputs.sizes, self.bridge.newline)
        return self.bridge(self._features(inputs))

    def project_each(self, inputs: Tensor, slots: Sequence[int], instructions: TextBatch) -> Tensor:
        """As `project`, [S,n,D]: instruction i is read beside the picture of number `slots[i]`."""
        assert isinstance(self.bridge, QFormerProjection)
        return self.bridge.read(self._features(inputs), slots, instructions)

    def _features(self, inputs: Tensor) -> Tensor:
        return self.encode_pixels(inputs) if inputs.ndim == 4 else inputs

    def picture_features(self) -> PictureFeatures | None:
        """What the feature cache keeps of a picture: its tokens [N,D]; nothing while the encoder learns, or of tiles,
        whose number changes from picture to picture."""
        if self.tiling is not None:
            return None
        return frozen_features(self.image_encoder, "tokens", lambda features: features.tokens)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Image tokens [U,N,D] of pixels [U,3,H,W]; without gradient where the encoder is frozen."""
        learns = any(p.requires_grad for p in self.image_encoder.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.image_encoder(pixels).tokens

    # ---- tasks -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode_pictures(
        self, images: Sequence[Any], instructions: Sequence[tuple[int, ...]] = ()
    ) -> Tensor | list[Tensor]:
        """Projected tokens [B,n,D] of pictures (paths, PIL images or arrays), in chunks; of tiles, a list of [n,D].

        instructions: token ids that a bridge which follows instructions reads, one for each picture. A picture that is
        given several times is encoded once.
        """
        if (tiling := self.tiling) is not None:
            cut = (stack_pictures([tiling.cut(image)]).to(self.device) for image in images)
            return [tokens for picture in cut for tokens in self.project(picture)]
        features = self.picture_features()
        unique = {picture_key(image): image for image in images}
        number = {key: i for i, key in enumerate(unique)}
        owners = [number[picture_key(image)] for image in images]
        order: list[int] = []
        pieces: list[Any] = []
        for start in range(0, len(unique), ENCODER_CHUNK):
            chunk = list(unique.values())[start : start + ENCODER_CHUNK]
            inputs: Any = self._pixels(chunk) if features is None else encode_pictures(features, chunk)
            rows = [i for i, owner in enumerate(owners) if start <= owner < start + ENCODER_CHUNK]
            slots = [owners[i] - start for i in rows]
            if self.instruction_tokenizer is None:
                projected: Any = self.project(inputs.to(self.device))
                pieces.append(projected[slots])
            else:
                asked = TextBatch.of([instructions[i] for i in rows], self.instruction_tokenizer.pad, self.device)
                pieces.append(self.project_each(inputs.to(self.device), slots, asked))
            order += rows
        return torch.cat(pieces)[torch.tensor(order).argsort()]

    def answer(self, images: Any, questions: str | Sequence[str], **generation: Any) -> list[str]:
        """An answer to each question about its image.

        images: one or a list of PIL images, paths or uint8 arrays [H,W,3]; one image serves all questions.
        generation: arguments of transformers' `generate` (greedy by default). Questions about one picture share its
        encoding and its prefix; `<image>` in a question is a word. Raises VlmError for empty questions or unequal
        numbers, BrokenImage for a bad picture.
        """
        check_generation(generation)
        asked = [questions] if isinstance(questions, str) else list(questions)
        if any(not question.strip() for question in asked):
            raise VlmError("answer: a question is empty")
        pictures = as_list(images)
        if len(pictures) == 1:
            pictures = pictures * len(asked)
        if len(pictures) != len(asked):
            raise VlmError(f"answer: {len(pictures)} images for {len(asked)} questions")
        prompts = [
            self.prompts.asking(self.question_messages(question), (picture,), generation)
            for picture, question in zip(pictures, asked)
        ]
        return self._generate(prompts, generation)

    def caption(self, images: Any, prompt: str | None = None, **generation: Any) -> list[str]:
        """A caption for each image. `prompt` is taken verbatim: `<image>` marks the picture, in front where absent.

        Without one, the model's own request for a caption (`caption_prompt` in its template) is used.
        """
        check_generation(generation)
        pictures = as_list(images)
        if prompt is None:
            prompts = [self.prompts.asking(self.caption_messages(), (picture,), generation) for picture in pictures]
        else:
            text = self.prompts.verbatim(prompt, "")
            check_places(text, 1)
            prompts = [
                Prompt(self.prompts.fitted(text, (picture,), generation, tail=0), (picture,)) for picture in pictures
            ]
        return self._generate(prompts, generation)

    def chat(self, messages: Iterable[dict[str, Any]], **generation: Any) -> str:
        """The next turn of a conversation.

        messages: `[{role, content: [{type: image, image: ...}, {type: text, text: ...}]}]`, or text as content.
        """
        turns: list[Message] = []
        pictures: list[Any] = []
        for message in messages:
            turn, shown = read_message(message)
            turns.append(turn)
            pictures += shown
        return self.say(turns, pictures, **generation)

    @torch.inference_mode()
    def score(self, images: Any, texts: str | Sequence[str], prompts: Any = None, chunk: int = 32) -> Tensor:
        """Sum of log-probabilities [B] of each text after its prompt.

        Prompts are taken verbatim, no template is added: `<image>` marks the picture's place (in front where absent);
        a space joins prompt and text unless the prompt ends in white space; special tokens are the tokeniser's own.
        """
        wanted = [texts] if isinstance(texts, str) else list(texts)
        pictures = as_list(images)
        pictures = pictures * len(wanted) if len(pictures) == 1 else pictures
        openings = [prompts or ""] * len(wanted) if prompts is None or isinstance(prompts, str) else list(prompts)
        if not len(pictures) == len(wanted) == len(openings):
            raise VlmError(f"score: {len(pictures)} images, {len(wanted)} texts and {len(openings)} prompts")
        if any(not text.strip() for text in wanted):
            raise VlmError("score: a text is empty")
        sums = [
            self._score_chunk(pictures[i : i + chunk], wanted[i : i + chunk], openings[i : i + chunk])
            for i in range(0, len(wanted), chunk)
        ]
        return torch.cat(sums)

    def _score_chunk(self, pictures: list[Any], texts: list[str], prompts: list[str]) -> Tensor:
        by_key = {str(picture_key(picture)): picture for picture in pictures}
        keys = [[str(picture_key(picture))] for picture in pictures]
        lm = self.language_model
        bare = [self.prompts.verbatim(prompt, text) for prompt, text in zip(prompts, texts)]
        if any(row.num_images != 1 for row in bare):
            raise VlmError("score: a prompt must show its picture once")
        counts = [[count] for count in self.count_tokens(pictures)]
        rows = [truncate(expand_slots(row, count), lm.context_length) for row, count in zip(bare, counts)]
        batch = self.collate_unshared(rows, keys)
        batch = batch.with_images(lambda names: self._pixels([by_key[name] for name in names])).to(self.device)
        states, targets = self.label_states(batch)
        values = token_log_probs(states, targets, lm.logits)
        chosen = batch.labels != IGNORE
        owner = torch.arange(len(texts), device=values.device).repeat_interleave(chosen.sum(-1))
        return values.new_zeros(len(texts)).index_add_(0, owner, values)

    def collate_unshared(self, texts: Sequence[TokenizedText], images: Sequence[Sequence[str]]) -> RowBatch:
        """Texts as one batch, a row each."""
        if self.language_model.is_encoder_decoder:
            return self.collate([([text], paths) for text, paths in zip(texts, images)])
        rows: list[Row] = [build_row([text], paths) for text, paths in zip(texts, images)]
        return collate(rows)

    def _pixels(self, pictures: list[Any]) -> Tensor | TiledPictures:
        if self.tiling is not None:
            return stack_pictures([self.tiling.cut(picture) for picture in pictures])
        return torch.stack([self.image_encoder.transform.eval(load_image(p)) for p in pictures])

    def say(self, turns: Sequence[Message], pictures: Sequence[Any], **generation: Any) -> str:
        """The assistant's next turn in a conversation whose text marks each picture with `<image>`."""
        check_generation(generation)
        return self._generate([self.prompts.asking(turns, tuple(pictures), generation)], generation)[0]

    def _generate(self, prompts: list[Prompt], generation: dict[str, Any]) -> list[str]:
        return generate_texts(self, prompts, **{**self.prompts.stops, **generation})

    @property
    def answer_stops(self) -> list[str]:
        """Texts that end an answer, where the template has no end token."""
        return list(self.prompts.stops.get("stop_strings", []))
