"""Language models without padding, adapters as one step of autograd: the same numbers with less work."""

import pytest
import torch
from generative_parts import generative_model, pictures
from tiny_models import LANGUAGE_KINDS, tiny_language_model

from vlm.backbones.language import build_language_model
from vlm.backbones.row_attention import make_rows
from vlm.data.packing import IGNORE, build_row, collate, pack
from vlm.errors import VlmError
from vlm.model_spec import LanguageModelSpec

PADLESS = [kind for kind in LANGUAGE_KINDS if kind not in ("t5", "bloom")]
ANSWERS = ["red", "a circle of some kind", "yes", "no, it is a blue square"]


def _batches(model, folder):
    """Right-padded rows of one text each, and rows that hold several."""
    paths = pictures(folder, 4)
    texts = [model.tokenize(model.question_messages("what is it?", answer)) for answer in ANSWERS]
    rows = [build_row([text], (path,)) for text, path in zip(texts, paths)]
    shared = [build_row(texts[:3], paths[:1]), rows[3]]
    for chosen in (rows, pack(rows, 60), shared):
        yield collate(chosen).with_images(model._pixels)


@pytest.mark.parametrize("kind", PADLESS)
def test_states_and_gradients_without_padding_are_those_with_it(tiny_folder, tmp_path, kind):
    model = generative_model(tiny_folder, kind, language={"lora": {"rank": 2}})
    lm = model.language_model
    for batch in _batches(model, tmp_path):
        chosen = batch.labels != IGNORE
        results = []
        for lengths in ((), batch.lengths):
            embeddings = model._spliced(batch).detach().requires_grad_()
            states = lm.hidden_states(embeddings, batch.mask, batch.positions, lengths=lengths)[chosen]
            (gradient,) = torch.autograd.grad(states.square().sum(), embeddings)
            results.append((states.detach(), gradient))
        assert lm._rows_pay(batch.lengths, batch.mask)
        for padded, packed in zip(*results):
            torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_no_padding_reaches_a_linear_layer(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    seen = []
    model.language_model.network.model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[:-1]))
    for batch in _batches(model, tmp_path):
        model.label_states(batch)
        assert seen.pop() == (1, batch.num_tokens)
        assert batch.num_tokens < batch.ids.numel()


def test_a_sliding_window_keeps_its_own_mask(tiny_folder, tmp_path):
    model = generative_model(tiny_folder, "llama")
    batch = next(iter(_batches(model, tmp_path)))
    lm = model.language_model
    assert lm._rows_pay(batch.lengths, batch.mask)
    lm.network.config.sliding_window = 4
    assert not lm._rows_pay(batch.lengths, batch.mask)


def test_rows_that_are_packed_and_unpacked_are_the_same_and_so_are_gradients():
    torch.manual_seed(0)
    lengths = (3, 1, 5)
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    rows = make_rows(lengths, mask)
    padded = torch.randn(3, 5, 2, dtype=torch.double, requires_grad=True)
    again = rows.unpack(rows.pack(padded))
    torch.testing.assert_close(again, padded * mask[..., None])
    assert torch.autograd.gradcheck(rows.pack, (padded,))
    packed = torch.randn(1, 9, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(rows.unpack, (packed,))


def _with_lora(folder, **lora):
    spec = LanguageModelSpec(name=f"hf:{folder}", lora={"rank": 3, "alpha": 5, **lora})
    network = build_language_model(spec, "fp32").network
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
            parameter.requires_grad_()
    return network


def _run(network, ids, plain=False, dtype=None):
    """Logits and the adapters' gradients; plain: by peft's own forward."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in network.modules() if isinstance(m, LoraLayer)]
    kept = [layer.__dict__.get("forward") for layer in layers]
    if plain:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = network(input_ids=ids).logits
    network.zero_grad()
    logits.float().square().mean().backward()
    for layer, forward in zip(layers, kept):
        if forward is not None:
            layer.forward = forward
    return logits.detach(), {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt2"])  # GPT-2's layers are transposed: left to peft
def test_adapters_in_one_step_are_pefts(tiny_folder, kind):
    network = _with_lora(tiny_folder(tiny_language_model, kind))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    (fast, grads), (plain, expected) = (_run(network, ids, plain) for plain in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name in grads:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grads[name] / scale, expected[name] / scale, rtol=0, atol=1e-5)


def test_in_half_precision_adapters_in_one_step_are_as_near_to_the_truth_as_pefts(tiny_folder):
    network = _with_lora(tiny_folder(tiny_language_model, "qwen2"))
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    truth, exact = _run(network, ids)
    (fast, grads), (plain, others) = (_run(network, ids, plain, torch.bfloat16) for plain in (False, True))
    assert fast.dtype == plain.dtype == torch.bfloat16
    pairs = [(fast, plain, truth), *((grads[name], others[name], exact[name]) for name in exact)]
    off = [
        sum(float((side - true).norm() / true.norm()) for *sides, true in pairs for side in sides[i : i + 1])
        for i in (0, 1)
    ]
    assert off[0] < 1.5 * off[1]


def test_dropout_and_a_weight_that_learns_beside_its_adapter_are_kept(tiny_folder):
    network = _with_lora(tiny_folder(tiny_language_model, "qwen2"), dropout=0.5)
    network.requires_grad_(True)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        network.train(training)
        (fast, grads), (plain, expected) = (_run(network, ids, plain) for plain in (False, True))
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
        assert any(name.endswith("base_layer.weight") for name in grads)
        assert any(name.endswith("base_layer.bias") for name in grads)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)


def test_adapters_lie_in_the_language_model_alone_and_never_on_its_head(tiny_folder):
    model = generative_model(tiny_folder, "llama", language={"lora": {"rank": 2, "targets": "all-linear"}})
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted
    assert all(name.startswith("language_model.network.model.layers.") for name in adapted)
    only = generative_model(tiny_folder, "llama", language={"lora": {"rank": 2, "targets": ["q_proj"]}})
    assert {name.split(".")[-2] for name, _ in only.named_modules() if name.endswith("lora_A")} == {"q_proj"}


def test_targets_that_match_nothing_name_those_that_would(tiny_folder):
    with pytest.raises(VlmError, match=r"lora\.targets: no linear layer ends in .*'query_proj'.*q_proj") as raised:
        generative_model(tiny_folder, "llama", language={"lora": {"targets": ["query_proj"]}})
    assert "\n" not in str(raised.value)
