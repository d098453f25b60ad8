"""What LAVIS 1.0.2 computed on random weights (the bundles `$VLM_ORACLES/lavis/*`), and our Q-Former with the same.

A bundle notes which of its values a test reads, and `COMPARED` names the test of each: `reading` fails a test that did
not read what it is named for, and `not_compared` finds values that no test is named for.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from oracles import ORACLES
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_init import QFormerTokenizer
from vlm.bridges.qformer_keys import from_lavis
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.text_batch import TextBatch
from vlm.model_spec import QFormerSpec
from vlm.models.qformer_model import QFormerModel


def bundles(kind: str) -> list[Any]:
    """The folders `lavis/KIND_*` of VLM_ORACLES or one parameter that skips."""
    found = sorted((ORACLES / "lavis").glob(f"{kind}_*"))
    if not found:
        why = pytest.mark.skip(reason=f"set VLM_ORACLES to the folder that holds lavis/{kind}_*")
        return [pytest.param(None, marks=why, id="none")]
    return [pytest.param(folder, id=folder.name) for folder in found]


# Test -> the values it compares, as patterns of keys; those of `expected_beam_hf5.json` begin with `hf5/`.
COMPARED: dict[str, dict[str, tuple[str, ...]]] = {
    "stage1": {
        "test_queries_alone": (
            *("ln_vision_out", "query_hidden_states", "query_output", "image_feats"),
            *("past_key_last_layer", "past_value_last_layer"),
        ),
        "test_texts_alone": ("text_hidden", "text_feat"),
        "test_queries_and_texts_that_see_each_other": ("itm_hidden", "itm_logits"),
        "test_texts_behind_the_queries": ("lm_hidden", "lm_logits"),
        "test_features_and_matches_of_whole_texts": ("extract_*", "blip2itm_*", "itm_grid_*"),
        "test_similarities_and_what_negatives_are_drawn_from": (
            *("sim_i2t", "sim_t2i", "neg_weights_*_head", "head_neg_weights_*"),
        ),
        "test_losses_and_gradients": (
            *("loss", "loss_itc", "loss_itm", "loss_lm", "grad_full/*", "grad_norms_full", "no_grad_params"),
        ),
        "test_gradients_of_each_loss_alone": ("grad_norms_by_loss_full",),
        "test_contrast_that_knows_which_pictures_are_the_same": ("head_loss_itc_with_image_id",),
        "test_generated_ids": ("greedy_ids", "greedy_minlen*_ids", "hf5/beam*"),
        "test_reranked_retrieval": ("rerank_sims", "rerank_i2t", "rerank_t2i", "rerank_k"),
        "test_texts_and_captions_as_words": ("caption_*",),
        "test_lavis_own_gradients": (
            *("grad_lavis/*", "grad_norms_lavis", "grad_norms_by_loss_lavis", "cross_attention_key_param"),
        ),
        "test_lavis_own_weights_of_negatives": ("neg_weights_*_v102",),
        "test_lavis_own_beams": ("beam*_ids", "beam*_scores", "hf5/beam*"),
    },
    "stage2": {
        "test_prefix": ("prefix", "query_output", "ln_vision_out"),
        "test_logits_loss_and_gradients": (
            *("logits", "logits_prompt", "targets", "targets_prompt", "loss", "loss_prompt"),
            *("grad/*", "grad_norms", "grad_norms_prompt", "trained_params"),
        ),
        "test_greedy_captions": ("greedy_*", "caption_greedy", "caption_greedy_prompt"),
        "test_beams": ("beam*", "caption_beam*", "hf5/beam*"),
    },
}
# What describes a bundle and is no value of a model.
DESCRIBED = ("versions",)


def not_compared(kind: str, keys: Iterable[str]) -> list[str]:
    """Keys of a bundle that no test of `COMPARED` is named for."""
    patterns = [*DESCRIBED, *(pattern for named in COMPARED[kind].values() for pattern in named)]
    return [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in patterns)]


class Noted(dict[str, Any]):
    """A mapping that notes which keys are asked for."""

    def __init__(self, values: Mapping[str, Any], read: set[str], prefix: str = "") -> None:
        super().__init__(values)
        self.read, self.prefix = read, prefix

    def __getitem__(self, key: str) -> Any:
        self.read.add(self.prefix + key)
        return super().__getitem__(key)


def lavis_sizes(config: dict[str, Any], vocabulary: int, positions: int) -> QFormerSizes:
    """Our sizes of the Q-Former that LAVIS' configuration describes."""
    return QFormerSizes(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        num_queries=config["num_query_tokens"],
        image_width=config["encoder_width"],
        vocabulary=vocabulary,
        positions=positions,
        cross_attention_every=config["cross_attention_freq"],
    )


@dataclass(frozen=True)
class Bundle:
    """One folder: what both stages' bundles hold."""

    folder: Path
    read: set[str] = field(default_factory=set)
    kind: ClassVar[str]

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def told(self) -> Noted:
        return Noted(json.loads((self.folder / "expected.json").read_text()), self.read)

    @cached_property
    def beams(self) -> Noted:
        """Beam search by the rule of transformers 5."""
        return Noted(json.loads((self.folder / "expected_beam_hf5.json").read_text()), self.read, "hf5/")

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> Noted:
        return Noted(load_file(self.folder / "expected.safetensors"), self.read)

    def names(self) -> Iterator[str]:
        """Of all values."""
        yield from self.expected
        yield from self.told
        yield from (f"hf5/{key}" for key in self.beams)


BundleT = TypeVar("BundleT", bound=Bundle)


@contextmanager
def reading(bundle: BundleT, test: str) -> Iterator[BundleT]:
    """The bundle for a test; fails where that did not read all of what `COMPARED` says of it."""
    bundle.read.clear()
    yield bundle
    named = COMPARED[bundle.kind].get(test, ())
    wanted = {key for key in bundle.names() if any(fnmatchcase(key, pattern) for pattern in named)}
    assert wanted <= bundle.read, f"{test} compares no {sorted(wanted - bundle.read)}"


class FirstStage(Bundle):
    """A folder `stage1_*`."""

    kind = "stage1"

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "qformer_lavis.safetensors")

    @property
    def sizes(self) -> QFormerSizes:
        return lavis_sizes(self.config, self.config["vocab_size"], self.config["max_position_embeddings"])

    def qformer(self, dtype: torch.dtype = torch.float32) -> tuple[QFormer, QFormerHeads]:
        """Bridge and heads with LAVIS' weights, every key used."""
        sizes = self.sizes
        parts = nn.ModuleDict(
            {"bridge": QFormer(sizes), "heads": QFormerHeads(sizes.width, sizes.vocabulary, self.config["embed_dim"])}
        )
        parts.load_state_dict(from_lavis(self.weights))
        parts.to(dtype).eval()
        return parts["bridge"], parts["heads"]  # type: ignore[return-value]

    @property
    def texts(self) -> TextBatch:
        return TextBatch.from_mask(self.inputs["input_ids"], self.inputs["attention_mask"])


def stage_one(bundle: FirstStage, bridge: QFormer, heads: QFormerHeads) -> QFormerModel:
    """The whole model over the bundle's vocabulary. In place of pictures it takes numbers of the bundle's."""
    from transformers import BertTokenizer

    ids = bundle.config["token_ids"]
    words = {f"[{name.upper()}]": ids[name] for name in ("pad", "unk", "cls", "sep", "mask")}
    words |= {f"w{number}": number + len(words) for number in range(ids["dec_bos"] - len(words))}
    tokenizer = QFormerTokenizer(BertTokenizer(vocab=words), ids["dec_bos"])
    spec = QFormerSpec(image_encoder="timm:none", text_length=bundle.config["max_txt_len"])
    model = QFormerModel(spec, nn.Identity(), bridge, heads, tokenizer)  # type: ignore[arg-type]
    model.see = lambda images: bridge.image(bundle.inputs["image_tokens"][list(images)])  # type: ignore[method-assign]
    return model
