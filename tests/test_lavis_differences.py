"""What LAVIS 1.0.2 does otherwise than the library, as its bundles' README says: its own values, from our parts.

Every value of a bundle is compared by some test, which `lavis_bundles.COMPARED` names.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from beam_rules import Ids, beam_search
from lavis_bundles import COMPARED, DESCRIBED, FirstStage, bundles, not_compared, reading
from test_lavis_stage1 import GRADIENTS, close, losses_of, pairs_of
from test_lavis_stage2 import Stage2
from torch import Tensor

from vlm.bridges.qformer import QFormer
from vlm.bridges.qformer_heads import QFormerHeads
from vlm.bridges.qformer_keys import to_lavis
from vlm.data.text_batch import TextBatch
from vlm.objectives.query_itc import query_similarity


@pytest.fixture(params=bundles("stage1"))
def bundle(request: pytest.FixtureRequest) -> Iterator[FirstStage]:
    with reading(FirstStage(request.param), request.node.originalname) as bundle:
        yield bundle


# --- every value has its test -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [*bundles("stage1"), *bundles("stage2")])
def test_every_value_of_a_bundle_has_a_test(folder: Path) -> None:
    bundle = {"stage1": FirstStage, "stage2": Stage2}[folder.name.partition("_")[0]](folder)
    assert not_compared(bundle.kind, bundle.names()) == []
    assert not_compared(bundle.kind, ["grad_unheard/of", "loss_new", *DESCRIBED]) == ["grad_unheard/of", "loss_new"]


def test_the_tests_that_are_named_are_there() -> None:
    files = Path(__file__).parent.glob("test_lavis_*.py")
    there = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert {test for named in COMPARED.values() for test in named} <= there


def test_a_value_that_its_test_leaves_out_is_found(tmp_path: Path) -> None:
    class Small(FirstStage):
        expected, told, beams = {"text_hidden": 1, "text_feat": 2}, {}, {}  # type: ignore[assignment]

    def compared(*keys: str) -> None:
        with reading(Small(tmp_path), "test_texts_alone") as bundle:
            bundle.read.update(keys)

    compared("text_hidden", "text_feat")
    with pytest.raises(AssertionError, match=r"test_texts_alone compares no .'text_feat'."):
        compared("text_hidden")


# --- LAVIS' own ways --------------------------------------------------------------------------------------------------


def lavis_itc(bundle: FirstStage, bridge: QFormer, heads: QFormerHeads) -> Tensor:
    """ITC where each direction takes the other side's features as constants, as LAVIS gathers them."""
    points, texts, _, _ = pairs_of(bundle, bridge, heads)
    target, smoothing = torch.arange(len(texts)), bundle.config["label_smoothing"]
    tables = query_similarity(points, texts.detach()), query_similarity(points.detach(), texts).T
    return sum(F.cross_entropy(x / heads.temperature, target, label_smoothing=smoothing) for x in tables) / 2  # type: ignore[return-value]


def test_lavis_own_gradients(bundle: FirstStage) -> None:
    """Its losses are ours; its gradients are ours but for those that contrast does not send to the other side."""
    bridge, heads = bundle.qformer()
    parameters = {f"bridge.{n}": p for n, p in bridge.named_parameters()}
    parameters |= {f"heads.{n}": p for n, p in heads.named_parameters()}
    losses = losses_of(bundle, bridge, heads)
    contrast = lavis_itc(bundle, bridge, heads)
    assert contrast.item() == pytest.approx(losses["loss_itc"].item(), abs=1e-6)
    losses |= {"loss_itc": contrast, "loss": contrast + losses["loss_itm"] + losses["loss_lm"]}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        return to_lavis({key: g for key, g in zip(parameters, found) if g is not None})

    for name, norms in bundle.told["grad_norms_by_loss_lavis"].items():
        found = gradients(losses[name])
        for key, norm in norms.items():
            assert (found[key].norm().item() if key in found else 0.0) == pytest.approx(norm, rel=GRADIENTS), key
    found = gradients(losses["loss"])
    for key, norm in bundle.told["grad_norms_lavis"].items():
        if not key.endswith(".key.bias"):  # zero up to rounding
            assert found[key].norm().item() == pytest.approx(norm, rel=GRADIENTS), key
    whole = [key for key in bundle.expected if key.startswith("grad_lavis/")]
    assert f"grad_lavis/{bundle.told['cross_attention_key_param']}" in whole
    for key in whole:
        wanted = bundle.expected[key]
        assert (found[key.removeprefix("grad_lavis/")] - wanted).norm() <= GRADIENTS * wanted.norm(), key


@torch.no_grad()
def test_lavis_own_weights_of_negatives(bundle: FirstStage) -> None:
    """Version 1.0.2 draws from the softmax over all, 1e-4 added to each, the diagonal then set to zero."""
    bridge, heads = bundle.qformer()
    points, texts, _, _ = pairs_of(bundle, bridge, heads)
    logits = query_similarity(points, texts) / heads.temperature
    for name, rows in (("i2t", logits), ("t2i", logits.T)):
        close(rows.softmax(1).add(1e-4).fill_diagonal_(0), bundle.expected[f"neg_weights_{name}_v102"], 1e-5)


@torch.no_grad()
def test_lavis_own_beams(bundle: FirstStage) -> None:
    """Beam search by the rule of transformers 4.26 over our logits, and by that of version 5: ids and scores."""
    bridge, heads = bundle.qformer()
    assert bridge.embeddings is not None
    words = bridge.embeddings.words.weight
    settings, ids = bundle.config["generate"], bundle.config["token_ids"]
    queries = bridge.queries(bridge.image(bundle.inputs["image_tokens"]))

    def logits(image: int, rows: list[Ids]) -> Tensor:
        texts = TextBatch.of(rows)
        states = bridge.causal(queries.select([image] * len(rows)), texts)
        return heads.words(texts.unpack(states)[:, -1], words)

    for beams in (count for count in settings["num_beams"] if count > 1):
        for minimum in settings["min_length"]:
            name = f"beam{beams}" if minimum <= 1 else f"beam{beams}_minlen{minimum}"
            rows = [[i for i in row if i != ids["pad"]] for row in bundle.expected[f"{name}_ids"].tolist()]
            four = [*zip(rows, bundle.expected[f"{name}_scores"].tolist())]
            five = [*zip(bundle.beams[name]["ids"], bundle.beams[name]["scores"])]
            for version, wanted in ((4, four), (5, five)):
                for image, (told, score) in enumerate(wanted):
                    found, value = beam_search(
                        version,
                        partial(logits, image),
                        (ids["dec_bos"],),
                        beams,
                        settings["max_length"],
                        ids[settings["eos"]],
                        settings["length_penalty"],
                        minimum,
                    )
                    assert list(found) == told
                    assert value == pytest.approx(score, abs=1e-4)
