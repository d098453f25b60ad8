"""Language models of transformers: embeddings in, hidden states and next-token logits out."""

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm.backbones.adapted_linear import fuse_adapters
from vlm.backbones.hf_loading import load_strictly, needs_code, read_config
from vlm.backbones.names import PartName, parse_part_name
from vlm.backbones.quantization import quantization_options
from vlm.backbones.row_attention import make_rows, use_row_attention
from vlm.backbones.whole_checkpoint import WholeCheckpoint, read_whole
from vlm.data.records import IMAGE_PLACEHOLDER
from vlm.devices import storage_dtype
from vlm.errors import VlmError
from vlm.model_spec import LanguageModelSpec, LoraSpec


class Tokenizer(Protocol):
    """The part of a fast transformers tokeniser that is used here."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None

    def __call__(self, text: Any, **options: Any) -> Any: ...
    def decode(self, ids: Any, **options: Any) -> str: ...
    def convert_tokens_to_ids(self, token: str) -> int: ...


class LanguageModel(nn.Module):
    """A decoder-only or encoder-decoder language model behind one interface.

    name: part name. width: D of embeddings and hidden states. context_length: positions it was made for.
    is_encoder_decoder: the prompt goes into the encoder and the answer into the decoder.
    takes_tree_masks: accepts position ids and a [B,1,T,T] attention mask, so that texts can share a prefix
    in one sequence (BLOOM's ALiBi cannot).
    """

    def __init__(self, name: str, network: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.tokenizer = tokenizer
        config: Any = network.config
        self.is_encoder_decoder: bool = bool(config.is_encoder_decoder)
        self.width: int = int(network.get_input_embeddings().embedding_dim)
        self.context_length: int = _context_length(config)
        self._takes_rows = not self.is_encoder_decoder and self.takes_tree_masks and use_row_attention(network)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)

    @property
    def embeddings(self) -> nn.Embedding:
        """The token embedding table [V, D]."""
        return self.network.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the token embeddings lie."""
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the frozen weights are stored in."""
        return self.embeddings.weight.dtype

    @cached_property
    def takes_tree_masks(self) -> bool:
        """Whether one sequence may hold several texts behind one prefix."""
        import inspect

        base = self._base
        return not self.is_encoder_decoder and "position_ids" in inspect.signature(base.forward).parameters

    @property
    def _base(self) -> nn.Module:
        """The network without its vocabulary projection (LoRA is injected in place, so there is no wrapper)."""
        return self.network.base_model

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., D] of ids [...]; negative ids (image slots) are embedded as token 0."""
        return self.embeddings(ids.clamp(min=0))

    def hidden_states(
        self,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        lengths: tuple[int, ...] = (),
    ) -> Tensor:
        """Final hidden states [B,T,D], ready for `logits`.

        embeddings: [B,T,D]. mask: [B,T] (1 = token) or [B,1,T,T] boolean (true = may attend).
        positions: [B,T]. decoder_ids: [B,U] decoder input of an encoder-decoder, whose states [B,U,D] are returned.
        lengths: tokens of each row, the rest of it being padding on the right; padding is then not computed where the
        network allows, and its states are zero.
        """
        if self.is_encoder_decoder:
            encoded = self.network.get_encoder()(inputs_embeds=embeddings, attention_mask=mask)
            decoder: Any = self.network.get_decoder()
            return decoder(
                input_ids=decoder_ids,
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
        if positions is not None and self._rows_pay(lengths, mask):
            rows = make_rows(lengths, mask)
            packed = self._base(
                inputs_embeds=rows.pack(embeddings),
                attention_mask=mask.new_ones(1, 1, 1, 1, dtype=torch.bool),  # taken as it is; `rows` holds the real one
                position_ids=rows.pack(positions),
                use_cache=False,
                rows=rows,
            )
            return rows.unpack(packed.last_hidden_state)
        options = {"position_ids": positions} if self.takes_tree_masks and positions is not None else {}
        return self._base(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **options).last_hidden_state

    def _rows_pay(self, lengths: tuple[int, ...], mask: Tensor) -> bool:
        """Whether rows hold padding that can be left out; a sliding window shorter than them needs its own mask."""
        window = getattr(self.network.config, "sliding_window", None)
        padded = sum(lengths) < len(lengths) * mask.shape[-1]
        return self._takes_rows and padded and (mask.ndim == 4 or window is None or window >= mask.shape[-1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., D], with the scalings some families apply."""
        config: Any = self.network.config
        if self.is_encoder_decoder and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
            hidden = hidden * config.d_model**-0.5
        logits = self.network.get_output_embeddings()(hidden)
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def plain_head(self) -> Tensor | None:
        """The vocabulary projection [V,D], if logits are hidden states times it and nothing else."""
        config: Any = self.network.config
        head = self.network.get_output_embeddings()
        scalings = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        scaled = self.is_encoder_decoder or any(getattr(config, key, None) for key in scalings)
        return None if scaled or type(head) is not nn.Linear or head.bias is not None else head.weight

    @torch.no_grad()
    def prefix_cache(self, embeddings: Tensor, mask: Tensor) -> Any:
        """Keys and values of left-padded prefixes, embeddings [B,T,D] and mask [B,T], for `generate`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.network.config)
        options = {"position_ids": _positions(mask)} if self.takes_tree_masks else {}
        self._base(inputs_embeds=embeddings, attention_mask=mask, use_cache=True, **{self._cache_key: cache}, **options)
        return cache

    @torch.no_grad()
    def generate(self, embeddings: Tensor, mask: Tensor, cache: Any = None, **generation: Any) -> list[str]:
        """Continuations of left-padded prompts, embeddings [B,T,D] and mask [B,T], as B stripped strings.

        cache: keys and values of the first columns (from `prefix_cache`, one row a prompt).
        generation: arguments of transformers' `generate`; greedy, at most 64 new tokens unless given.
        """
        options: dict[str, Any] = {
            "max_new_tokens": 64,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": _pad_id(self.tokenizer),
            "eos_token_id": self.stop_ids,
            "synced_gpus": False,  # each process writes its own texts, however long: a sharded model is gathered first
        }
        options |= generation
        if cache is not None:
            options[self._cache_key] = cache
        stops = options.get("stop_strings") or []
        if stops:
            options["tokenizer"] = self.tokenizer
        ids = self.network.generate(inputs_embeds=embeddings, attention_mask=mask, **options)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        for stop in stops:
            texts = [text.lstrip().partition(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    @cached_property
    def _cache_key(self) -> str:
        """What transformers calls keys and values of earlier positions: `cache`, before 5.24 `past_key_values`."""
        import inspect

        return "cache" if "cache" in inspect.signature(self._base.forward).parameters else "past_key_values"

    @property
    def prompt_end(self) -> tuple[int, ...]:
        """What ends a prompt: the end token in an encoder, nothing where the answer follows in the same sequence."""
        return (int(self.network.config.eos_token_id),) if self.is_encoder_decoder else ()

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the checkpoint's generation setting and the tokeniser's end token."""
        configured = getattr(getattr(self.network, "generation_config", None), "eos_token_id", None)
        ids = set(configured if isinstance(configured, list) else [] if configured is None else [configured])
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)


def _positions(mask: Tensor) -> Tensor:
    """Position ids [B,T] of left-padded sequences."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _pad_id(tokenizer: Tokenizer) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def _context_length(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length"):
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    return 2048  # T5 and BLOOM have relative positions; this is what they were trained with


def build_language_model(spec: LanguageModelSpec, precision: str = "auto") -> LanguageModel:
    """The language model a recipe names, frozen, with LoRA layers injected if it asks for them.

    Raises VlmError for an unknown source, a missing folder, a checkpoint whose keys do not all fit, or quantization
    where it cannot be.
    """
    part = parse_part_name(spec.name, allowed=tuple(_FOLDERS))
    folder = _FOLDERS[part.source](part)
    dtype = storage_dtype(spec.precision if spec.precision != "auto" else precision)
    options = {"dtype": dtype, **quantization_options(spec.quantization, spec.name, dtype)}
    if spec.trust_remote_code:
        warnings.warn(f"{spec.name}: Python that lies beside these weights is run (trust_remote_code)", stacklevel=2)
    network, tokenizer = _load(folder, spec.name, options, spec.trust_remote_code)
    network.requires_grad_(False)
    network.eval()
    if spec.lora is not None:
        inject_lora(network, spec.lora)
    return LanguageModel(spec.name, network, tokenizer)


def inject_lora(network: nn.Module, lora: LoraSpec) -> None:
    """Put low-rank adapters into the linear layers of a language model, in place (peft).

    Only layers of this network can match, whatever names other parts of a model have. The vocabulary projection
    never gets an adapter. Raises VlmError if no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = network.get_output_embeddings()
    linear = (nn.Linear, *_conv1d())
    ends = None if lora.targets == "all-linear" else tuple(lora.targets)
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, linear) and module is not head and (ends is None or name.endswith(ends))
    ]
    if not names:
        kinds = sorted({n.rsplit(".", 1)[-1] for n, m in network.named_modules() if isinstance(m, linear)})
        raise VlmError(f"language_model.lora.targets: no linear layer ends in {lora.targets}; there are {kinds}")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",
        fan_in_fan_out=any(isinstance(network.get_submodule(name), _conv1d()) for name in names),
    )
    inject_adapter_in_model(config, network)
    fuse_adapters(network)
    network.eval()


def _conv1d() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    return (Conv1D,)


def _hf_folder(part: PartName) -> str:
    return str(Path(part.reference).expanduser()) if Path(part.reference).expanduser().is_dir() else part.reference


def _gguf_folder(part: PartName) -> str:
    from vlm.backbones.starter import gguf_folder

    return str(gguf_folder(Path(part.reference).expanduser()))


def _starter_folder(part: PartName) -> str:
    from vlm.backbones.starter import smollm2_folder

    if part.reference != "smollm2-135m":
        raise VlmError(f"no starter language model {part.reference!r}; known: smollm2-135m")
    return str(smollm2_folder())


# Source -> the folder or hub id that transformers loads.
_FOLDERS: dict[str, Callable[[PartName], str]] = {
    "hf": _hf_folder,
    "gguf": _gguf_folder,
    "starter": _starter_folder,
}


def _load(folder: str, name: str, options: dict[str, Any], code: bool) -> tuple[nn.Module, Tokenizer]:
    """Network and tokeniser from a folder or hub id; every key of the checkpoint is accounted for.

    options: of `from_pretrained`. code: whether Python beside the weights may run.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING as SEQUENCE
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per part hides what the command itself has to say
    if checkpoint := _whole(folder):
        state = checkpoint.state("language")
        if not state:
            raise VlmError(f"language model {name!r}: this checkpoint holds none")
        kinds = SEQUENCE if checkpoint.text_config.is_encoder_decoder else CAUSAL
        options = {**options, "config": checkpoint.text_config, "state_dict": state}
        network, _ = load_strictly(kinds[type(checkpoint.text_config)], folder, **options)
        return network, load_tokenizer(checkpoint.base or folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    except (OSError, ValueError) as error:
        if needs_code(error):
            raise VlmError(
                f"language model {name!r} needs Python code that lies beside its weights; read it, and if you trust "
                "it, set model.language_model.trust_remote_code=true"
            ) from error
        reason = str(error).splitlines()[0]
        raise VlmError(f"language model {name!r} cannot be loaded: {reason}") from error
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        network, report = factory.from_pretrained(folder, output_loading_info=True, trust_remote_code=code, **options)
    except (OSError, ValueError) as error:
        raise VlmError(f"language model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise VlmError(f"language model {name!r}: {kind.replace('_', ' ')}: {_some(report[kind])}")
    return network, load_tokenizer(folder, name, code)


def _whole(folder: str) -> WholeCheckpoint | None:
    """The whole vision-language model that the language model is to be taken out of; None where it lies alone."""
    try:
        read_config(folder)
    except VlmError:  # the error that names the part comes from where it is loaded
        return None
    return read_whole(folder)


def load_tokenizer(folder: str, name: str, code: bool = False) -> Tokenizer:
    """The tokeniser beside a language model, with `<image>` as a token of its own.

    The placeholder's id may lie outside the embedding table: it is replaced by image tokens before anything is
    embedded. code: whether Python beside it may run. Raises VlmError if there is no fast tokeniser (character offsets
    are needed for exact loss masks).
    """
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
    except (OSError, ValueError) as error:
        raise VlmError(f"tokeniser of {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise VlmError(f"tokeniser of {name!r} has no fast version (tokenizer.json), which loss masks need")
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _some(keys: Any) -> str:
    names = [str(k) for k in keys]
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
