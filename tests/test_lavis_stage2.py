"""Stage 2 gives LAVIS' numbers on LAVIS' weights (Blip2OPT), for every bundle `$VLM_ORACLES/lavis/stage2_*`."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from beam_rules import Ids, beam_search
from lavis_bundles import Bundle, bundles, lavis_sizes, reading
from safetensors.torch import load_file
from torch import Tensor, nn

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


class Numbers(Words):
    """Decodes to the ids themselves, up to the end token."""

    def decode(self, ids: Any, **options: Any) -> str:
        told = [int(i) for i in ids]
        return " ".join(map(str, told[: told.index(5) + 1] if 5 in told else told))


class Stage2(Bundle):
    """A folder `stage2_*`."""

    kind = "stage2"

    @cached_property
    def bridge(self) -> QFormerProjection:
        """Trained as in stage 2, with LAVIS' weights, every key used."""
        sizes = lavis_sizes(self.config["qformer"], vocabulary=0, positions=0)
        bridge = QFormerProjection(sizes, self.config["opt"]["hidden_size"])
        nn.ModuleDict({"bridge": bridge}).load_state_dict(
            from_lavis(load_file(self.folder / "stage2_lavis.safetensors"))
        )
        return bridge

    @cached_property
    def language(self) -> LanguageModel:
        from transformers import AutoModelForCausalLM

        return LanguageModel("opt", AutoModelForCausalLM.from_pretrained(self.folder / "opt"), Words())

    @cached_property
    def model(self) -> GenerativeModel:
        model = GenerativeModel(None, nn.Identity(), self.bridge, self.language)  # type: ignore[arg-type]
        model.requires_grad_(False).eval()
        self.bridge.requires_grad_(True)
        return model

    @cached_property
    def newline(self) -> int:
        """The end token."""
        return int(self.config["token_ids"]["eos_newline"])

    def asked(self, prompt: bool) -> tuple[list[int], Tensor]:
        """What the model goes on from: token ids, and image and ids as embeddings [B,T,D]."""
        prefix = self.model.project(self.inputs["image_tokens"])
        rows = (
            self.inputs["gen_prompt_ids"] if prompt else torch.full((len(prefix), 1), self.config["token_ids"]["bos"])
        )
        return rows[0].tolist(), torch.cat([prefix, self.language.embed(rows)], 1).detach()

    @torch.no_grad()
    def next_logits(self, asked: Tensor, skip: int, rows: list[Ids]) -> Tensor:
        """Of the token [N,V] behind embeddings [T,D] and rows of ids of one length, their first `skip` left out."""
        said = self.language.embed(torch.tensor([row[skip:] for row in rows], dtype=torch.long))
        embedded = torch.cat([asked.expand(len(rows), -1, -1), said], 1)
        return self.language.logits(self.language.hidden_states(embedded, torch.ones(embedded.shape[:2]))[:, -1])

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
def stage2(request: pytest.FixtureRequest) -> Iterator[Stage2]:
    with reading(Stage2(request.param), request.node.originalname) as bundle:
        yield bundle


def test_prefix(stage2: Stage2) -> None:
    normed: list[torch.Tensor] = []
    key = stage2.bridge.layers[0].cross_attention.key
    key.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0]))
    found = stage2.model.project(stage2.inputs["image_tokens"].requires_grad_())
    torch.testing.assert_close(found, stage2.expected["prefix"], atol=1e-4, rtol=0)
    queries = stage2.bridge.queries(stage2.bridge.image(stage2.inputs["image_tokens"])).states
    torch.testing.assert_close(queries, stage2.expected["query_output"], atol=1e-4, rtol=0)
    torch.testing.assert_close(normed[0], stage2.expected["ln_vision_out"], atol=1e-4, rtol=0)


def test_logits_loss_and_gradients(stage2: Stage2) -> None:
    """Logits before each target, the loss without smoothing, every trained tensor's gradient."""
    for suffix in ("", "_prompt"):
        stage2.bridge.zero_grad()
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
        found = to_lavis({f"bridge.{key}": p.grad for key, p in stage2.bridge.named_parameters() if p.grad is not None})
        told = stage2.told[f"grad_norms{suffix}"]
        assert found.keys() == told.keys() == set(stage2.told["trained_params"])
        for key, gradient in found.items():
            if not key.endswith("key.bias"):  # zero up to rounding
                assert gradient.norm().item() == pytest.approx(told[key], rel=1e-3), key
        whole = [] if suffix else [key for key in stage2.expected if key.startswith("grad/")]
        assert suffix or whole
        for key in whole:
            gradient, value = found[key.removeprefix("grad/")], stage2.expected[key]
            assert (gradient - value).norm() <= 1e-3 * value.norm(), key


def test_greedy_captions(stage2: Stage2) -> None:
    """Words, ids with and without the prompt, and by how much each row's nearest choice was decided."""
    end, new = stage2.newline, stage2.config["generate"]["max_new_tokens"]
    for suffix in ("", "_prompt"):
        prompt, embedded = stage2.asked(bool(suffix))
        options = {"eos_token_id": end, "max_new_tokens": new}
        stage2.language.tokenizer = Words()
        told = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), **options)
        assert told == stage2.told[f"caption_greedy{suffix}"]
        stage2.language.tokenizer = Numbers()
        told = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), **options)
        rows = [until(row, end) for row in stage2.expected[f"greedy_new_ids{suffix}"].tolist()]
        assert told == [" ".join(map(str, row)) for row in rows]
        whole = stage2.expected[f"greedy_ids{suffix}"].tolist()
        assert [row[: len(prompt) + len(new_ids)] for row, new_ids in zip(whole, rows)] == [prompt + r for r in rows]
        for row, (ids, margin) in enumerate(zip(rows, stage2.told[f"greedy_min_logit_margin{suffix}"])):
            nearest = []
            for length in range(len(ids)):
                best = stage2.next_logits(embedded[row], 0, [tuple(ids[:length])])[0].topk(2)
                assert best.indices[0] == ids[length]
                nearest.append((best.values[0] - best.values[1]).item())
            assert min(nearest) == pytest.approx(margin, abs=2e-4)


def test_beams(stage2: Stage2) -> None:
    """Ours are those of transformers 5; LAVIS' ids, scores and words are those of our logits by version 4.26's rule."""
    config, end = stage2.config["generate"], stage2.newline
    for beams in (count for count in config["num_beams"] if count > 1):
        for suffix in ("", "_prompt"):
            prompt, embedded = stage2.asked(bool(suffix))
            five = [(row["new_ids"], row["score"]) for row in stage2.beams[f"beam{beams}{suffix}"]]
            stage2.language.tokenizer = Numbers()
            options = {"eos_token_id": end, "max_new_tokens": config["max_new_tokens"], "num_beams": beams}
            found = stage2.language.generate(embedded, torch.ones(embedded.shape[:2]), **options)
            assert found == [" ".join(map(str, ids)) for ids, _ in five]

            rows = [until(row, end) for row in stage2.expected[f"beam{beams}_new_ids{suffix}"].tolist()]
            whole = stage2.expected[f"beam{beams}_ids{suffix}"].tolist()
            assert [row[: len(prompt) + len(ids)] for row, ids in zip(whole, rows)] == [prompt + ids for ids in rows]
            assert [Words().decode(row) for row in rows] == stage2.told[f"caption_beam{beams}{suffix}"]
            four = [*zip(rows, stage2.expected[f"beam{beams}_scores{suffix}"].tolist())]
            for version, wanted in ((4, four), (5, five)):
                for row, (told, score) in enumerate(wanted):
                    ids, value = beam_search(
                        version,
                        partial(stage2.next_logits, embedded[row], len(prompt)),
                        tuple(prompt),
                        beams,
                        len(prompt) + config["max_new_tokens"],
                        end,
                        config["length_penalty"],
                        config["min_length"],
                    )
                    assert list(ids[len(prompt) :]) == told
                    assert value == pytest.approx(score, abs=1e-4)


def until(ids: list[int], end: int) -> list[int]:
    """Ids up to the end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids
