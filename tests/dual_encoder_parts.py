"""Tiny published dual encoders of many kinds, saved in the layout their library reads."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import CLIP_MEAN, CLIP_STD, CORPUS, randomize, tiny_tokenizer

TEXTS = ["a cat", "A photo of a RED cat, sitting on a chair.", "blue"]

# --- open_clip -------------------------------------------------------------------------------------------------------

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
_VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
_SIGLIP_TEXT = {
    **_TEXT,
    "vocab_size": 384,
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}

# Architectures as open_clip's own files describe them, a few sizes each.
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vlm-test-vit": {"embed_dim": 24, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "vlm-test-vit-wide": {
        "embed_dim": 48,
        "vision_cfg": {**_VIT, "image_size": 48, "patch_size": 16, "width": 64, "layers": 2, "head_width": 16},
        "text_cfg": {**_TEXT, "width": 48, "context_length": 24, "layers": 3},
    },
    "vlm-test-vit-quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "vlm-test-resnet": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "vlm-test-timm": {
        "embed_dim": 24,
        "vision_cfg": {
            "timm_model_name": "test_convnext",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": _TEXT,
    },
    "vlm-test-siglip": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "none",
        },
        "text_cfg": _SIGLIP_TEXT,
    },
    "vlm-test-siglip-map": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit3",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "linear",
        },
        "text_cfg": {**_SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}},
    },
}


def register_open_clip(arch: str, folder: Path) -> None:
    """Make an architecture of `OPEN_CLIP` known to open_clip in this process."""
    import open_clip

    config = copy.deepcopy(OPEN_CLIP[arch])
    if "siglip" in arch:  # its tokeniser is a folder of transformers' in real life, too
        tiny_tokenizer(Path(folder) / "tokenizer", bos=False, eos=True)
        config["text_cfg"]["hf_tokenizer_name"] = str(Path(folder) / "tokenizer")
    file = Path(folder) / f"{arch}.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)


def tiny_open_clip(arch: str, folder: Path) -> Path:
    """Random weights of an architecture of `OPEN_CLIP`: `open_clip:ARCH/FOLDER/open_clip.pt`."""
    import open_clip

    register_open_clip(arch, folder)
    model = randomize(open_clip.create_model(arch), std=0.4 if "resnet" in arch else 0.1)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-4.0)
    torch.save(model.state_dict(), Path(folder) / "open_clip.pt")
    return Path(folder)


# --- transformers ----------------------------------------------------------------------------------------------------

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_WORDS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HF_KINDS = ("clip", "clip-gelu", "clip-wide", "siglip", "siglip-wide", "siglip2")


def tiny_hf_dual(kind: str, folder: Path) -> Path:
    """A CLIP, SigLIP or SigLIP 2 with its tokeniser and preprocessor, as on the hub; kind: one of `HF_KINDS`."""
    folder = Path(folder)
    wide = kind.endswith("-wide")
    vision = {**_VISION, "image_size": 32, "patch_size": 8}
    words = dict(_WORDS)
    if wide:
        vision |= {"hidden_size": 48, "num_attention_heads": 6, "image_size": 48, "patch_size": 16}
        words |= {"num_hidden_layers": 3, "hidden_size": 40 if kind.startswith("clip") else 48}
    model = _clip(kind, folder, vision, words) if kind.startswith("clip") else _siglip(kind, folder, vision, words)
    randomize(model)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        if kind.startswith("siglip"):
            model.logit_bias.fill_(-4.0)
    model.save_pretrained(folder)
    return folder


def _clip(kind: str, folder: Path, vision: dict[str, Any], words: dict[str, Any]) -> Any:
    import transformers as t

    tokenizer = tiny_tokenizer(folder, bos=True, eos=True, eos_token="<|endoftext|>")
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    act = "gelu" if kind == "clip-gelu" else "quick_gelu"
    width = 20 if kind.endswith("-wide") else 24
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 5}
    text = t.CLIPTextConfig(**words, **ids, max_position_embeddings=24, projection_dim=width, hidden_act=act)
    tower = t.CLIPVisionConfig(**vision, projection_dim=width, hidden_act=act)
    size = vision["image_size"]
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    _save_preprocessor(folder, preprocessor)
    return t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=tower.to_dict(), projection_dim=width))


def _siglip(kind: str, folder: Path, vision: dict[str, Any], words: dict[str, Any]) -> Any:
    import transformers as t

    vocabulary = (_gemma_tokenizer if kind == "siglip2" else _sentencepiece_tokenizer)(folder)
    text = t.SiglipTextConfig(
        **words, vocab_size=vocabulary, max_position_embeddings=16, projection_size=vision["hidden_size"]
    )
    size = vision["image_size"]
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": size, "width": size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    _save_preprocessor(folder, preprocessor)
    config = t.SiglipConfig(text_config=text.to_dict(), vision_config=t.SiglipVisionConfig(**vision).to_dict())
    return t.SiglipModel(config)


def _save_preprocessor(folder: Path, content: dict[str, Any]) -> None:
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **content}))


def _sentencepiece_tokenizer(folder: Path) -> int:
    """A `spiece.model` and its configuration as SigLIP's repositories hold them; returns the vocabulary's size."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower().replace(",", "") for text in CORPUS]),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "SiglipTokenizer",
        "model_max_length": 16,
        "do_lower_case": True,
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return 60


def _gemma_tokenizer(folder: Path) -> int:
    """A `tokenizer.json` and its configuration as SigLIP 2's repositories hold them; returns the vocabulary's size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    letters = [chr(n) for n in range(ord("!"), ord("~") + 1)]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=220, special_tokens=specials, initial_alphabet=[*letters, "▁"], show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_max_length": 16,
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def hf_embeddings(folder: Path, images: list[Any], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What transformers itself makes of pictures and texts: both unit-length embeddings, and the logits."""
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = t.AutoModel.from_pretrained(folder).eval()
    siglip = model.config.model_type == "siglip"
    processor = (SiglipImageProcessorPil if siglip else CLIPImageProcessorPil).from_pretrained(folder)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding="max_length" if siglip else True, truncation=True, return_tensors="pt")
    if siglip:
        batch = {"input_ids": batch["input_ids"]}
    with torch.no_grad():
        output = model(pixel_values=pixels, **batch)
    normal = torch.nn.functional.normalize
    return normal(output.image_embeds, dim=-1), normal(output.text_embeds, dim=-1), output.logits_per_image


Folder = Callable[..., Path]


def published_name(tiny_folder: Folder, kind: str) -> str:
    """What `load_model` is given for a kind of `OPEN_CLIP` or `HF_KINDS`."""
    if kind in HF_KINDS:
        return str(tiny_folder(tiny_hf_dual, kind))
    return f"open_clip:{kind}/{tiny_folder(tiny_open_clip, kind) / 'open_clip.pt'}"
