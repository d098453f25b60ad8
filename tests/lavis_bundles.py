"""What LAVIS 1.0.2 computed on random weights (the bundles `$VLM_ORACLES/lavis/*`), and our Q-Former with the same."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ORACLES
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import from_lavis
from vlm.bridges.qformer_layers import QFormerSizes
from vlm.data.text_batch import TextBatch


def bundles(kind: str) -> list[Any]:
    """The folders `lavis/KIND_*` of VLM_ORACLES or one parameter that skips."""
    found = sorted((ORACLES / "lavis").glob(f"{kind}_*"))
    if not found:
        why = pytest.mark.skip(reason=f"set VLM_ORACLES to the folder that holds lavis/{kind}_*")
        return [pytest.param(None, marks=why, id="none")]
    return [pytest.param(folder, id=folder.name) for folder in found]


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
    """One folder of layout `stage1_*`."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def expected_json(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "qformer_lavis.safetensors")

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.folder / "expected.safetensors")

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
