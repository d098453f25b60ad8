"""BLIP-2's first stage written plainly on transformers' `Blip2QFormerModel`, which has no losses and no cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

# LAVIS' name -> transformers', for what differs within a layer.
_RENAMED = {"attention.self.": "attention.attention.", "crossattention.self.": "crossattention.attention."}


class PlainStage1(nn.Module):
    """ITC, ITM and LM as the paper describes them: a pass each for queries, texts, pairs, and texts behind queries."""

    def __init__(self, sizes: Any, state: dict[str, Tensor], embed_width: int) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn,
            max_position_embeddings=sizes.positions,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            encoder_hidden_size=sizes.image_width,
            cross_attention_frequency=sizes.cross_attention_every,
            use_qformer_text_input=True,
            attn_implementation="sdpa",
        )
        self.qformer, self.embeddings = Blip2QFormerModel(config), Blip2TextEmbeddings(config)
        self.ln_vision = nn.LayerNorm(sizes.image_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, sizes.num_queries, sizes.width))
        self.vision_proj, self.text_proj = (nn.Linear(sizes.width, embed_width) for _ in range(2))
        self.itm_head = nn.Linear(sizes.width, 2)
        self.dense, self.norm = nn.Linear(sizes.width, sizes.width), nn.LayerNorm(sizes.width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(sizes.vocabulary))
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.load_state_dict(dict(_translated(state)))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, start: int) -> tuple[dict[str, Tensor], Tensor]:
        """The three losses, and the negatives drawn [2,B]: a wrong image for each text, a wrong text for each image."""
        count, device = len(images), images.device
        tokens = self.ln_vision(images)
        queries = self.query_tokens.expand(count, -1, -1)
        length = queries.shape[1]
        seen = self.qformer(queries, encoder_hidden_states=tokens).last_hidden_state
        image = F.normalize(self.vision_proj(seen), dim=-1)
        alone = self.qformer(self.embeddings(ids), query_length=0, attention_mask=mask).last_hidden_state[:, 0]
        text = F.normalize(self.text_proj(alone), dim=-1)
        logits = torch.einsum("iqe,te->itq", image, text).amax(-1) / self.temp
        target = torch.arange(count, device=device)
        itc = sum(F.cross_entropy(table, target, label_smoothing=0.1) for table in (logits, logits.T)) / 2

        own = torch.eye(count, dtype=torch.bool, device=device)
        with torch.no_grad():
            odds = [table.masked_fill(own, -torch.inf).softmax(1) for table in (logits.T, logits)]
            wrong_image, wrong_text = (torch.multinomial(table, 1)[:, 0] for table in odds)
        texts = torch.cat([ids, ids, ids[wrong_text]])
        masks = torch.cat([mask, mask, mask[wrong_text]])
        both = self.qformer(
            self.embeddings(texts, query_embeds=queries.repeat(3, 1, 1)),
            query_length=length,
            attention_mask=F.pad(masks, (length, 0), value=1),
            encoder_hidden_states=torch.cat([tokens, tokens[wrong_image], tokens]),
        ).last_hidden_state[:, :length]
        labels = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long().to(device)
        itm = F.cross_entropy(self.itm_head(both).mean(1), labels)

        said = ids.clone()
        said[:, 0] = start
        width = length + ids.shape[1]
        block = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        block[:length, :length] = True
        states = self.qformer(
            self.embeddings(said, query_embeds=queries),
            query_length=length,
            attention_mask=block[None, None].expand(count, -1, -1, -1),
            encoder_hidden_states=tokens,
        ).last_hidden_state[:, length:-1]
        words = F.linear(self.norm(F.gelu(self.dense(states))), self.embeddings.word_embeddings.weight, self.bias)
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        lm = F.cross_entropy(words.flatten(0, 1), wanted.flatten(), label_smoothing=0.1)
        return {"itc": itc, "itm": itm, "lm": lm}, torch.stack([wrong_image, wrong_text])


def _translated(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """A LAVIS state by the names here; tied copies and the buffer of positions are left out."""
    names = {
        "Qformer.bert.embeddings.LayerNorm.": "qformer.layernorm.",
        "Qformer.bert.embeddings.": "embeddings.",
        "Qformer.bert.encoder.": "qformer.encoder.",
        "Qformer.cls.predictions.transform.dense.": "dense.",
        "Qformer.cls.predictions.transform.LayerNorm.": "norm.",
        "Qformer.cls.predictions.bias": "bias",
    }
    result = []
    for key, value in state.items():
        if key.endswith("position_ids") or ".decoder." in key:
            continue
        for theirs, here in [*names.items(), *((f".{a}", f".{b}") for a, b in _RENAMED.items())]:
            key = key.replace(theirs, here)
        result.append((key, value))
    return result
