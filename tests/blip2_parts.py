"""Tiny random BLIP-2 and InstructBLIP models as transformers saves them, and what transformers answers with them."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_models import (
    CLIP_MEAN,
    CLIP_STD,
    randomize,
    tiny_bert,
    tiny_sentencepiece_tokenizer,
    tiny_tokenizer,
)

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}
QFORMER = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
QFORMER |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUERIES = 5


def tiny_blip2(kind: str, folder: Path) -> Path:
    """kind: `opt`, `t5`, `itm`, `instruct-llama` or `instruct-t5`."""
    import transformers as t

    folder = Path(folder)
    images = t.BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    tiny_bert(folder / "qformer_tokenizer")  # the model beside it is left over: only its tokeniser is named there
    words = t.AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")
    for file in ("config.json", "model.safetensors"):
        (folder / "qformer_tokenizer" / file).unlink()
    qformer = {**QFORMER, "vocab_size": len(words) + 1}  # with [DEC]
    if kind == "itm":
        config = t.Blip2Config(
            vision_config=VISION,
            qformer_config={**qformer, "use_qformer_text_input": True},
            num_query_tokens=QUERIES,
            image_text_hidden_size=8,
        )
        randomize(t.Blip2ForImageTextRetrieval(config)).save_pretrained(folder)
        words.save_pretrained(folder)
        images.save_pretrained(folder)
        return folder
    text = kind.rpartition("-")[2]
    tokenizer = tiny_sentencepiece_tokenizer(folder) if text == "llama" else _bytes(folder, text)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
    ids = {"vocab_size": 640, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text_config: Any = {
        "opt": lambda: t.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **ids),
        "llama": lambda: t.LlamaConfig(**size, intermediate_size=64, **ids),
        "t5": lambda: t.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            dropout_rate=0.0,
            **ids,
        ),
    }[text]()
    instruct = kind.startswith("instruct")
    options = {"qformer_config": qformer, "vision_config": VISION, "text_config": text_config}
    options |= {"num_query_tokens": QUERIES, "image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    if instruct:
        model: Any = t.InstructBlipForConditionalGeneration(t.InstructBlipConfig(**options))
        processor: Any = t.InstructBlipProcessor(images, tokenizer, words, num_query_tokens=QUERIES)
    else:
        model = t.Blip2ForConditionalGeneration(t.Blip2Config(**options))
        processor = t.Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)
    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _bytes(folder: Path, text: str) -> Any:
    return tiny_tokenizer(folder, bos=text == "opt", eos=text == "t5")


class Theirs:
    """transformers' model and processor of a folder."""

    def __init__(self, folder: Path) -> None:
        import transformers as t

        self.instruct = "InstructBlip" in (folder / "config.json").read_text()
        kind: Any = t.InstructBlipForConditionalGeneration if self.instruct else t.Blip2ForConditionalGeneration
        self.model = kind.from_pretrained(folder).eval()
        self.processor = (t.InstructBlipProcessor if self.instruct else t.Blip2Processor).from_pretrained(folder)
        self.is_t5 = self.model.language_model.config.is_encoder_decoder

    def inputs(self, image: str, text: str) -> Any:
        return self.processor(images=Image.open(image), text=text, return_tensors="pt")

    def answer(self, image: str, prompt: str, **generation: Any) -> str:
        inputs = self.inputs(image, prompt)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2, **generation}
        ids = self.model.generate(**inputs, **options)[0]
        skip = 0 if self.is_t5 or len(ids) <= inputs.input_ids.shape[1] else inputs.input_ids.shape[1]
        return self.processor.tokenizer.decode(ids[skip:], skip_special_tokens=True).strip()

    @torch.no_grad()
    def score(self, image: str, prompt: str, text: str) -> torch.Tensor:
        """Sum of log-probabilities of `text` behind `prompt`; of an encoder-decoder with the end token."""
        before = self.inputs(image, prompt)
        tokenizer = self.processor.tokenizer
        if self.is_t5:
            labels = [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], 2]
            decoder = torch.tensor([[0, *labels[:-1]]])
            logits = self.model(**before, decoder_input_ids=decoder).logits[0].log_softmax(-1)
            return logits.gather(1, torch.tensor(labels)[:, None]).sum()
        whole = self.inputs(image, f"{prompt} {text}")
        if self.instruct:  # the queries read the prompt alone
            whole["qformer_input_ids"] = before["qformer_input_ids"]
            whole["qformer_attention_mask"] = before["qformer_attention_mask"]
        count = whole.input_ids.shape[1] - before.input_ids.shape[1]
        logits = self.model(**whole).logits[0].log_softmax(-1)
        return logits[-count - 1 : -1].gather(1, whole.input_ids[0, -count:, None]).sum()
