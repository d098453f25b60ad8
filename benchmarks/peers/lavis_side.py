"""LAVIS 1.0.2's side of a benchmark: runs in LAVIS' own environment and does what it is told, line by line.

Each line of standard input is JSON {"do": NAME, ...}; each gets one line of JSON back. LAVIS' classes run as they are;
only what would be downloaded is replaced: the tokeniser's vocabulary, BERT's weights, and the visual encoder, which
passes image tokens through.
"""

import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.models.blip2_models import blip2, blip2_qformer
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertTokenizer


class Tokens(nn.Module):
    """A visual encoder whose pictures are image tokens already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


class Side:
    """One LAVIS model and the inputs it works on."""

    def build(self, weights: str, sizes: dict[str, Any], vocabulary: list[str], dropout: float) -> dict[str, Any]:
        """LAVIS' stage-1 model with the tensors of a safetensors file, every key used."""
        words = Path(tempfile.mkdtemp(), "vocab.txt")
        words.write_text("\n".join(vocabulary) + "\n")

        def init_tokenizer(cls: Any, *_: Any, **__: Any) -> BertTokenizer:
            tokenizer = BertTokenizer(str(words))
            tokenizer.add_special_tokens({"bos_token": "[DEC]"})
            return tokenizer

        def init_qformer(cls: Any, num_query_token: int, vision_width: int, cross_attention_freq: int = 2) -> Any:
            config = BertConfig(
                vocab_size=sizes["vocabulary"] - 1,
                hidden_size=sizes["width"],
                num_hidden_layers=sizes["layers"],
                num_attention_heads=sizes["heads"],
                intermediate_size=sizes["ffn"],
                max_position_embeddings=sizes["positions"],
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            config.encoder_width = vision_width
            config.add_cross_attention = True
            config.cross_attention_freq = cross_attention_freq
            config.query_length = num_query_token
            return BertLMHeadModel(config), nn.Parameter(torch.zeros(1, num_query_token, config.hidden_size))

        def init_vision_encoder(*_: Any, **__: Any) -> Any:
            return Tokens(sizes["image_width"]), blip2.LayerNorm(sizes["image_width"])

        blip2.Blip2Base.init_tokenizer = classmethod(init_tokenizer)
        blip2.Blip2Base.init_Qformer = classmethod(init_qformer)
        blip2.Blip2Base.init_vision_encoder = init_vision_encoder
        self.model = blip2_qformer.Blip2Qformer(
            num_query_token=sizes["num_queries"],
            cross_attention_freq=sizes["cross_attention_every"],
            embed_dim=sizes["embed_width"],
            max_txt_len=32,
        )
        shutil.rmtree(words.parent)
        self.model.load_state_dict(load_file(weights))
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def inputs(self, images: str, texts: list[str]) -> dict[str, Any]:
        """Image tokens [B,N,D] (`images` of a safetensors file) and texts."""
        self.images, self.texts = load_file(images)["images"], texts
        return {}

    # --- stage 1 ---

    def step(self) -> dict[str, Any]:
        """Forward and backward pass of the three losses in training mode; LAVIS draws the negatives."""
        self.model.train()
        self.model.zero_grad()
        self.model({"image": self.images, "text_input": self.texts}).loss.backward()
        return {}

    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """The losses without dropout, and the negatives: a wrong image for each text, a wrong text for each image."""
        self.model.eval()
        drawn: list[int] = []
        draw = torch.multinomial

        def noted(*arguments: Any) -> torch.Tensor:
            result = draw(*arguments)
            drawn.append(int(result))
            return result

        torch.multinomial = noted
        try:
            output = self.model({"image": self.images, "text_input": self.texts})
        finally:
            torch.multinomial = draw
        half = len(drawn) // 2
        losses = {name: float(output[f"loss_{name}"]) for name in ("itc", "itm", "lm")}
        return {"losses": losses, "images": drawn[:half], "texts": drawn[half:]}

    # --- re-ranking ---

    @torch.no_grad()
    def rerank(self, k: int, both: bool) -> dict[str, Any]:
        """LAVIS' retrieval evaluation: its own loop over both directions, or its loop over pictures alone.

        Its loop over both takes one k for both directions, which neither may fall short of: with more than that, each
        direction runs by itself with as many as it has.
        """
        self.model.eval()
        model, count = self.model, len(self.images)
        if both and k <= min(count, len(self.texts)):
            loader = Loader(self.images, self.texts)
            of_images, of_texts = model.compute_sim_matrix(loader, types.SimpleNamespace(k_test=k))
            return {"of_images": of_images.tolist(), "of_texts": of_texts.tolist()}
        asked = model.tokenizer(self.texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        texts = F.normalize(model.text_proj(model.forward_text(asked)))
        features, tokens = zip(*(model.forward_image(part) for part in self.images.split(4)))
        points = F.normalize(model.vision_proj(torch.cat(features)), dim=-1)
        similarity = torch.stack([(point @ texts.t()).max(0).values for point in points])
        seen = torch.cat(tokens)
        result = {}
        for name, table in (("of_images", similarity), ("of_texts", similarity.t()))[: 1 + both]:
            scores = torch.full(table.shape, -100.0)
            wanted = min(k, table.shape[1])
            for query, row in enumerate(table):
                near = row.topk(wanted)
                if name == "of_images":
                    image, text = seen[query].repeat(wanted, 1, 1), near.indices
                else:
                    image, text = seen[near.indices], torch.full((wanted,), query)
                logits = model.compute_itm(
                    image_inputs=image, text_ids=asked.input_ids[text], text_atts=asked.attention_mask[text]
                )
                scores[query, near.indices] = logits.float() + near.values
            result[name] = scores.tolist()
        return result


class Loader:
    """What LAVIS' evaluation expects of a data loader."""

    def __init__(self, images: torch.Tensor, texts: list[str]) -> None:
        self.dataset = types.SimpleNamespace(text=texts, image=list(range(len(images))))
        self.batches = images.split(4)

    def __iter__(self) -> Any:
        return ({"image": batch} for batch in self.batches)


def main() -> None:
    """Answer until the input ends. LAVIS prints as well, so answers have a descriptor of their own."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side()
    with tempfile.TemporaryDirectory() as folder:
        # LAVIS asks for its rank without looking whether there is a group.
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        for line in sys.stdin:
            asked = json.loads(line)
            answer = getattr(side, asked.pop("do"))(**asked)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
