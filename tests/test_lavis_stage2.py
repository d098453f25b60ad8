"""Stage 2 gives LAVIS' numbers on LAVIS' weights (Blip2OPT), for every bundle `$VLM_ORACLES/lavis/stage2_*`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_bundles import bundles, lavis_sizes
from safetensors.torch import load_file
from torch import nn

from vlm.backbones.language import LanguageModel
from vlm.bridges.qformer_keys import from_lavis, to_lavis
from vlm.bridges.qformer_projection import QFormerProjection
from vlm.data.conversation import IMAGE_SLOT, TokenizedText
from vlm.data.packing import RowBatch
from vlm.models.generative import GenerativeModel
from vlm.objectives.lm import cross_entropy_sum


class Words:
    """The bundle's vocabulary as a tokeniser that can only decode."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = 2, 2, 1, None

    def convert_tokens_to_ids(self, token: str) -> int:
        return -1

    def decode(self, ids: Any, **options: Any) -> str:
        return " ".join(f"w{int(i) - 6}" for i in ids if i >= 6)


class Ids(Words):
    """Decodes to the ids themselves, up to the end token."""

    def decode(self, ids: Any, **options: Any) -> str:
        told = [int(i) for i in ids]
        return " ".join(map(str, told[: told.index(5) + 1] if 5 in told else told))


class Stage2:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.told = json.loads((folder / "expected.json").read_text())
        self.inputs, self.expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
        weights = load_file(folder / "stage2_lavis.safetensors")
        sizes = lavis_sizes(self.config["qformer"], vocabulary=0, positions=0)
        self.bridge = QFormerProjection(sizes, self.config["opt"]["hidden_size"])
        parts = nn.ModuleDict({"bridge": self.bridge})
        parts.load_state_dict(from_lavis(weights))
        self.language = LanguageModel("opt", AutoModelForCausalLM.from_pretrained(folder / "opt"), Words())
        self.model = GenerativeModel(None, nn.Identity(), self.bridge, self.language)  # type: ignore[arg-type]
        self.model.requires_grad_(False).eval()
        self.bridge.requires_grad_(True)

    def batch(self, prompt: bool) -> RowBatch:
        ids, mask = (self.inputs[f"prompt_text_{name}" if prompt else name] for name in ("input_ids", "attention_mask"))
        silent, queries = self.config["prompt_length"] if prompt else 0, self.bridge.num_tokens
        rows = []
        for row, shown in zip(ids.tolist(), mask.sum(-1).tolist()):
            trained = (False,) * (queries + silent) + (True,) * (shown - silent)
            rows.append(TokenizedText((IMAGE_SLOT,) * queries + tuple(row[:shown]), trained))
        batch = self.model.collate_unshared(rows, [[str(i)] for i in range(len(rows))])
        return batch.with_images(lambda names: self.inputs["image_tokens"][[int(name) for name in names]])


@pytest.fixture(params=bundles("stage2"))
def stage2(request: pytest.FixtureRequest) -> Stage2:
    return Stage2(request.param)


def test_prefix(stage2: Stage2) -> None:
    normed: list[torch.Tensor] = []
    key = stage2.bridge.layers[0].cross_attention.key
    key.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0]))
    found = stage2.model.project(stage2.inputs["image_tokens"].requires_grad_())
    torch.testing.assert_close(found, stage2.expected["prefix"], atol=1e-4, rtol=0)
    queries = stage2.bridge.queries(stage2.bridge.image(stage2.inputs["image_tokens"])).states
    torch.testing.assert_close(queries, stage2.expected["query_output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(normed[0], stage2.expected["ln_vision_out"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("suffix", ["", "_prompt"])
def test_logits_loss_and_gradients(stage2: Stage2, suffix: str) -> None:
    """Logits before each target, the loss without smoothing, every trained tensor's gradient norm."""
    states, labels = stage2.model.label_states(stage2.batch(bool(suffix)))
    targets = stage2.expected[f"targets{suffix}"]
    assert labels.tolist() == targets[targets != -100].tolist()
    logits = stage2.language.logits(states)
    wanted = stage2.expected[f"logits{suffix}"][:, :-1][targets[:, 1:] != -100]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(stage2.told[f"loss{suffix}"], abs=5e-6)
    ours = cross_entropy_sum(states, labels, stage2.language.logits)[0] / len(labels)
    assert ours.item() == pytest.approx(loss.item(), abs=5e-6)
    loss.backward()
    gradients = {f"bridge.{key}": p.grad for key, p in stage2.bridge.named_parameters() if p.grad is not None}
    found = to_lavis(gradients)
    whole = {key.removeprefix("grad/"): value for key, value in stage2.expected.items() if key.startswith("grad/")}
    assert suffix or whole
    for key, value in whole.items():
        assert suffix or (found[key] - value).norm() <= 1e-3 * value.norm(), key
    norms = {key: value.norm().item() for key, value in found.items()}
    told = stage2.told[f"grad_norms{suffix}"]
    assert norms.keys() == told.keys() == set(stage2.told["trained_params"])
    for key, norm in norms.items():
        if not key.endswith("key.bias"):
            assert norm == pytest.approx(told[key], rel=1e-3), key


@pytest.mark.parametrize("suffix", ["", "_prompt"])
def test_greedy_captions(stage2: Stage2, suffix: str) -> None:
    prefix = stage2.model.project(stage2.inputs["image_tokens"])
    ids = stage2.inputs["gen_prompt_ids"] if suffix else torch.full((len(prefix), 1), 2)
    embedded = torch.cat([prefix, stage2.language.embed(ids)], 1).detach()
    told = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), eos_token_id=5, max_new_tokens=8)
    assert told == stage2.told[f"caption_greedy{suffix}"]
    stage2.language.tokenizer = Ids()
    told = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), eos_token_id=5, max_new_tokens=8)
    rows = stage2.expected[f"greedy_new_ids{suffix}"].tolist()
    assert told == [" ".join(map(str, row[: row.index(5) + 1] if 5 in row else row)) for row in rows]


@pytest.mark.parametrize("suffix", ["", "_prompt"])
def test_beam_ids(stage2: Stage2, suffix: str) -> None:
    """By the convention of transformers 5: scores are divided by the generated tokens with the end token."""
    told = json.loads((stage2.folder / "expected_beam_hf5.json").read_text())[f"beam3{suffix}"]
    stage2.language.tokenizer = Ids()
    prefix = stage2.model.project(stage2.inputs["image_tokens"])
    ids = stage2.inputs["gen_prompt_ids"] if suffix else torch.full((len(prefix), 1), 2)
    embedded = torch.cat([prefix, stage2.language.embed(ids)], 1).detach()
    options = {"eos_token_id": 5, "max_new_tokens": 8, "num_beams": 3}
    found = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), **options)
    assert found == [" ".join(map(str, row["new_ids"])) for row in told]
