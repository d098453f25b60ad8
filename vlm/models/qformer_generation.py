"""Captions from a Q-Former alone: transformers' generation drives its text layers behind the cached queries."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import WordHead
from vlm.bridges.qformer_states import QueryStates


class _Config(PretrainedConfig):
    model_type = "qformer_words"


class _Words(PreTrainedModel, GenerationMixin):
    """The text side as a decoder of next tokens, in the shape `generate` asks for; owns no weights.

    The queries' keys and values come as tensors [B,layers,heads,Q,d], which `generate` repeats for beams.
    """

    config_class = _Config
    main_input_name = "input_ids"

    def __init__(self, config: _Config, bridge: QFormer, head: WordHead) -> None:
        super().__init__(config)
        self.parts = (bridge, head)  # a tuple, so that their weights do not become this module's

    @property
    def device(self) -> torch.device:
        return self.parts[0].query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].query_tokens.dtype

    def forward(
        self,
        input_ids: Tensor,
        query_keys: Tensor,
        query_values: Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        bridge, head = self.parts
        assert bridge.embeddings is not None
        text = cache if cache is not None else past_key_values  # its name before and since transformers 5.20
        past = text.get_seq_length()
        states = None
        for position in range(past, past + input_ids.shape[1]):
            prefixes = []
            for layer in range(len(bridge.layers)):
                keys, values = query_keys[:, layer], query_values[:, layer]
                if position:
                    cached = text.layers[layer]
                    keys, values = torch.cat([keys, cached.keys], 2), torch.cat([values, cached.values], 2)
                prefixes.append((keys, values))
            states, new = bridge.next_states(input_ids[:, position - past], position, prefixes)
            for layer, (keys, values) in enumerate(new):
                text.update(keys, values, layer)
        assert states is not None
        logits = head(states, bridge.embeddings.words.weight)[:, None]
        return CausalLMOutputWithPast(logits=logits)


@torch.inference_mode()
def generate_ids(
    bridge: QFormer,
    head: WordHead,
    queries: QueryStates,
    prompt: Tensor,
    end: int,
    pad: int,
    **generation: Any,
) -> Tensor:
    """Token ids [B,T] that go on from `prompt` [B,P] (its first token is [DEC]), the prompt included.

    generation: arguments of transformers' `generate`; greedy by default. Beam scores are divided by the generated
    tokens with the end token, as in transformers 5.
    """
    sizes = bridge.sizes
    config = _Config(
        num_hidden_layers=sizes.layers,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        vocab_size=sizes.vocabulary,
        is_encoder_decoder=False,
    )
    model = _Words(config, bridge, head).eval()
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, bos_token_id=None)
    count = len(prompt)
    keys, values = (
        torch.stack([pair[side].expand(count, -1, -1, -1) for pair in queries.keys_values], 1) for side in (0, 1)
    )
    settings = {"do_sample": False, "num_beams": 1, **generation}
    ids: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        query_keys=keys,
        query_values=values,
        **settings,
    )
    ended = (ids[:, prompt.shape[1] :] == end).cumsum(1)
    behind = F.pad(ended - (ids[:, prompt.shape[1] :] == end).long(), (prompt.shape[1], 0)) > 0
    return ids.masked_fill(behind, pad)  # beam search fills with the end token where the padding's id is 0
