"""Builders of tiny random models, saved to disk in the layout their library reads: no test downloads anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
CORPUS = [
    "a photo of a cat sitting on a red chair",
    "what color is the shape in the picture? blue. is there a circle? yes, there is a green circle.",
    "a drawing of a yellow triangle and a black rectangle. no, there is not a brown square in this image.",
    "describe the image briefly. user assistant system question answer:",
]


def tiny_tokenizer(
    folder: Path, chat_template: str | None = None, bos: bool = True, eos: bool = False, eos_token: str = "</s>"
) -> Any:
    """A byte-level BPE tokeniser of 384 entries, saved to `folder`: pad 0, bos 1, eos 2, ChatML marks 3 and 4.

    bos, eos: whether plain encoding puts them around a text, as LLaMA (bos) and T5 (eos) do.
    eos_token: `<|endoftext|>` (5) for CLIP, where transformers reads an end of 2 as a historical mistake.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [*SPECIAL_TOKENS.values(), "<|im_start|>", "<|im_end|>", "<|endoftext|>"]  # the last: Qwen adds it
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> " * bos + "$A" + f" {eos_token}" * eos,
            pair="<s> " * bos + "$A $B:1" + f" {eos_token}:1" * eos,
            special_tokens=[("<s>", 1), (eos_token, tokenizer.token_to_id(eos_token))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{**SPECIAL_TOKENS, "eos_token": eos_token},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def tiny_sentencepiece_tokenizer(folder: Path, legacy: bool = True) -> Any:
    """A tokeniser built as LLaMA's: spaces are `▁`, one is put in front of the text, other letters fall back to bytes.

    legacy: the space is put in front of each piece between special tokens too, as Vicuna's tokeniser does.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learned.train_from_iterator(CORPUS, trainer)
    content = json.loads(learned.to_str())["model"]
    vocabulary = dict(content["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in content["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    fast.save_pretrained(folder)
    return fast


def tiny_vicuna_tokenizer(folder: Path) -> None:
    """A tokeniser published as Vicuna's is: a sentencepiece model and its settings, no tokenizer.json."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=written,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def randomize(model: nn.Module, std: float = 0.25, seed: int = 0) -> nn.Module:
    """Weights of visible size: library defaults (.02) leave a tiny model's outputs too alike to catch mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, std, generator=generator)
            else:
                base = 1.0 if name.endswith("weight") else 0.0  # a vector called weight scales a norm
                parameter.normal_(base, 0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


# --- language models -------------------------------------------------------------------------------------------------


def _language_config(kind: str, ids: dict[str, Any]) -> Any:
    import transformers as t

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rotary = {**size, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
    builders: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaConfig(**rotary, **ids),
        "qwen2": lambda: t.Qwen2Config(**rotary, tie_word_embeddings=True, **ids),
        "glm": lambda: t.GlmConfig(**rotary, head_dim=8, attention_bias=True, **ids),
        "opt": lambda: t.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=512, **ids),
        "bloom": lambda: t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ids),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **ids),
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
    }
    return builders[kind]()


LANGUAGE_KINDS = ("llama", "opt", "bloom", "gpt2", "glm", "qwen2", "t5")


def tiny_language_model(kind: str, folder: Path, chat_template: str | None = None, seed: int = 0) -> Path:
    """A language model of width 32 with 2 layers, 4 heads and the vocabulary of `tiny_tokenizer`; returns `folder`.

    kind: one of LANGUAGE_KINDS; `t5` is Flan-T5's gated-GELU encoder-decoder, whose tokeniser appends eos.
    """
    import transformers as t

    tokenizer = tiny_tokenizer(folder, chat_template, bos=kind in ("llama", "opt"), eos=kind == "t5")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    auto = t.AutoModelForSeq2SeqLM if kind == "t5" else t.AutoModelForCausalLM
    model = randomize(auto.from_config(_language_config(kind, ids)), seed=seed)
    model.save_pretrained(folder)
    return Path(folder)


# --- image encoders --------------------------------------------------------------------------------------------------

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PROCESSOR = {"do_resize": True, "do_rescale": True, "do_normalize": True}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _save_vision(model: Any, folder: Path, processor: dict[str, Any], seed: int) -> Path:
    """Save weights and `preprocessor_config.json` as the hub holds them."""
    randomize(model, seed=seed).save_pretrained(folder)
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps({**_PROCESSOR, **processor}))
    return Path(folder)


def _clip_processor(size: int = 32) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "resample": 3,
        "do_convert_rgb": True,
    }


def _square_processor(kind: str, resample: int, mean: float = 0.5, size: int = 32) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "size": {"height": size, "width": size},
        "image_mean": [mean] * 3,
        "image_std": [0.5] * 3,
        "resample": resample,
    }


def _save_clip(folder: Path, full: bool, seed: int) -> Path:
    import transformers as t

    vision = t.CLIPVisionConfig(**_VISION, projection_dim=24)
    if not full:
        return _save_vision(t.CLIPVisionModel(vision), folder, _clip_processor(), seed)
    tokenizer = tiny_tokenizer(folder, bos=True, eos=True, eos_token="<|endoftext|>")
    text = t.CLIPTextConfig(
        **_TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
        projection_dim=24,
    )
    config = t.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return _save_vision(t.CLIPModel(config), folder, _clip_processor(), seed)


def _save_siglip(folder: Path, full: bool, seed: int) -> Path:
    import transformers as t

    vision = t.SiglipVisionConfig(**_VISION)
    processor = _square_processor("SiglipImageProcessor", 3)
    if not full:
        return _save_vision(t.SiglipVisionModel(vision), folder, processor, seed)
    tokenizer = tiny_tokenizer(folder, bos=False, eos=True)
    text = t.SiglipTextConfig(
        **_TEXT,
        vocab_size=len(tokenizer),
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        projection_size=32,
    )
    config = t.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    return _save_vision(t.SiglipModel(config), folder, processor, seed)


def _save_vit(folder: Path, seed: int) -> Path:
    import transformers as t

    return _save_vision(
        t.ViTModel(t.ViTConfig(**_VISION)), folder, _square_processor("ViTImageProcessor", 2), seed=seed
    )


def _save_dinov2(folder: Path, seed: int) -> Path:
    import transformers as t

    config = {k: v for k, v in _VISION.items() if k != "intermediate_size"}
    processor = {**_clip_processor(), "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}}
    return _save_vision(t.Dinov2Model(t.Dinov2Config(**config, mlp_ratio=2)), folder, processor, seed)


def _save_convnext(folder: Path, seed: int) -> Path:
    import transformers as t

    config = t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64, patch_size=4)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_pct": 0.875,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    return _save_vision(t.ConvNextModel(config), folder, processor, seed)


HF_IMAGE_KINDS: dict[str, Callable[[Path, int], Path]] = {
    "clip": lambda folder, seed: _save_clip(folder, True, seed),
    "clip_vision": lambda folder, seed: _save_clip(folder, False, seed),
    "siglip": lambda folder, seed: _save_siglip(folder, True, seed),
    "siglip_vision": lambda folder, seed: _save_siglip(folder, False, seed),
    "vit": _save_vit,
    "dinov2": _save_dinov2,
    "convnext": _save_convnext,
}


def tiny_hf_image_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """A transformers vision model of width 32 with its `preprocessor_config.json`; name it `hf:FOLDER`.

    kind: a key of HF_IMAGE_KINDS. ViTs read 32 x 32 pixels in patches of 8 (ConvNeXt: 64 x 64, a 2 x 2 map); `clip`
    and `siglip` hold both towers and a tokeniser.
    """
    return HF_IMAGE_KINDS[kind](Path(folder), seed)


TIMM_IMAGE_MODELS = {"vit": "test_vit", "convnext": "test_convnext", "efficientnet": "test_efficientnet"}


def tiny_timm_image_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """A timm test model as a local folder (`config.json` + safetensors); name it `timm:FOLDER`.

    kind: a key of TIMM_IMAGE_MODELS; they read 160 x 160 pixels.
    """
    import timm
    from timm.models import save_for_hf

    model = randomize(timm.create_model(TIMM_IMAGE_MODELS[kind], pretrained=False), std=0.1, seed=seed)
    save_for_hf(model, str(folder), safe_serialization=True)
    return Path(folder)


OPEN_CLIP_ARCH = "vlm-test-ViT"


def tiny_open_clip_model(folder: Path, seed: int = 0) -> str:
    """An open_clip dual encoder (32 x 32 pixels, width 32, embedding 24); returns its name `open_clip:ARCH/CHECKPOINT`.

    Registers the architecture OPEN_CLIP_ARCH in this process.
    """
    import open_clip

    Path(folder).mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    path = Path(folder) / f"{OPEN_CLIP_ARCH}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    model = randomize(open_clip.create_model(OPEN_CLIP_ARCH), std=0.1, seed=seed)
    checkpoint = Path(folder) / "open_clip.pt"
    torch.save(model.state_dict(), checkpoint)
    return f"open_clip:{OPEN_CLIP_ARCH}/{checkpoint}"


# --- text encoders ---------------------------------------------------------------------------------------------------


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of width 32 with 2 layers and a WordPiece tokeniser over the corpus; name it `hf:FOLDER`."""
    import transformers as t
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), specials))
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.save_pretrained(folder)
    config = t.BertConfig(**_TEXT, vocab_size=len(fast), max_position_embeddings=64)
    randomize(t.BertModel(config), seed=seed).save_pretrained(folder)
    return Path(folder)
