"""Contrastive losses: streamed, shared by processes or accumulated, they are the plain loss and its gradient."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm.errors import VlmError
from vlm.objectives.itc import itc_loss, sigmoid_itc_loss
from vlm.objectives.micro_batches import plan_replay
from vlm.objectives.processes import gather_with_gradient


def naive_itc(image, text, scale, image_ids, text_ids, smoothing):
    logits = scale * image @ text.T
    match = (image_ids[:, None] == text_ids[None]).to(logits.dtype)
    loss = 0.0
    for scores, positive in ((logits, match), (logits.T, match.T)):
        target = (1 - smoothing) * positive / positive.sum(1, keepdim=True) + smoothing / len(text)
        loss = loss + F.cross_entropy(scores, target, reduction="sum") / 2
    return loss


def naive_sigmoid(image, text, scale, bias, image_ids, text_ids):
    logits = scale * image @ text.T + bias
    return -F.logsigmoid((2 * (image_ids[:, None] == text_ids[None]).to(logits.dtype) - 1) * logits).sum()


def unit(count, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=dtype), dim=-1)


def with_gradients(function, *inputs):
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_same(results, expected, tolerance=1e-6):
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 23),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 1 / 0.07, 100.0]),
    bias=st.sampled_from([-10.0, 0.0, 3.0]),
    groups=st.integers(1, 30),
    given_ids=st.booleans(),
    ties=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    block=st.integers(1, 30),
)
def test_streamed_losses_are_the_naive_ones(count, width, seed, scale, bias, groups, given_ids, ties, smoothing, block):
    image, text = unit(count, width, seed), unit(count, width, seed + 1)
    if ties:
        image, text = image[torch.arange(count) // 2], text[torch.arange(count) // 3]
    ids = torch.arange(count)
    if given_ids:
        ids = torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(seed)) * 7 - 3
    options = {"image_ids": ids, "text_ids": ids} if given_ids else {}
    factor, offset = torch.tensor(scale, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    assert_same(
        with_gradients(
            lambda i, t, s: itc_loss(i, t, s, **options, smoothing=smoothing, block=block), image, text, factor
        ),
        with_gradients(lambda i, t, s: naive_itc(i, t, s, ids, ids, smoothing), image, text, factor),
    )
    assert_same(
        with_gradients(
            lambda i, t, s, b: sigmoid_itc_loss(i, t, s, b, **options, block=block), image, text, factor, offset
        ),
        with_gradients(lambda i, t, s, b: naive_sigmoid(i, t, s, b, ids, ids), image, text, factor, offset),
    )


def test_images_and_texts_may_be_numbered_apart():
    image, text, scale = unit(6, 4, 0), unit(6, 4, 1), torch.tensor(5.0, dtype=torch.float64)
    image_ids, text_ids = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([2, 1, 0, 1, 2, 0])
    assert_same(
        with_gradients(lambda i, t, s: itc_loss(i, t, s, image_ids, text_ids, block=2), image, text, scale),
        with_gradients(lambda i, t, s: naive_itc(i, t, s, image_ids, text_ids, 0.0), image, text, scale),
    )


def test_the_losses_are_those_of_open_clip():
    from open_clip.loss import ClipLoss, SigLipLoss

    image, text = unit(9, 5, 0, torch.float32), unit(9, 5, 1, torch.float32)
    scale, bias = torch.tensor(20.0), torch.tensor(-3.0)
    torch.testing.assert_close(itc_loss(image, text, scale, block=4) / 9, ClipLoss()(image, text, scale))
    theirs = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(sigmoid_itc_loss(image, text, scale, bias, block=4) / 9, theirs)


@pytest.mark.parametrize("learning", [(0, 1), (1, 0), (1, 1), (0, 0)])
def test_only_what_learns_gets_a_gradient(learning):
    image, text = (unit(5, 3, seed).requires_grad_(bool(on)) for seed, on in zip((0, 1), learning))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, -1.0))
    ids = torch.arange(5)
    wanted = [t for t in (image, text, scale) if t.requires_grad]
    assert_same(
        torch.autograd.grad(itc_loss(image, text, scale, block=2), wanted),
        torch.autograd.grad(naive_itc(image, text, scale, ids, ids, 0.0), wanted),
    )
    assert_same(
        torch.autograd.grad(sigmoid_itc_loss(image, text, scale, bias, block=2), [*wanted, bias]),
        torch.autograd.grad(naive_sigmoid(image, text, scale, bias, ids, ids), [*wanted, bias]),
    )
    only_bias = torch.autograd.grad(sigmoid_itc_loss(image.detach(), text.detach(), 3.0, bias, block=2), [bias])
    assert_same(only_bias, torch.autograd.grad(naive_sigmoid(image, text, 3.0, bias, ids, ids), [bias]))


def test_half_precision_embeddings_are_compared_in_single_precision():
    image, text = unit(8, 16, 0).bfloat16(), unit(8, 16, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = itc_loss(image, text, 50.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive_itc(image.float(), text.float(), 50.0, *[torch.arange(8)] * 2, 0.0))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_grows_with_the_batch_and_not_with_its_square(grouped):
    def largest(count: int) -> list[int]:
        found = []
        ids = torch.arange(count) // 2 if grouped else None
        for loss in (
            lambda i, t: itc_loss(i, t, 5.0, ids, smoothing=0.1, block=8),
            lambda i, t: sigmoid_itc_loss(i, t, 5.0, -1.0, ids, block=8),
        ):
            with LargestTensor() as seen:
                with_gradients(loss, unit(count, 4, 0), unit(count, 4, 1))
            found.append(seen.elements)
        return found

    assert largest(128) == [128 * 4] * 2
    assert largest(256) == [256 * 4] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 2), torch.ones(3, 4)), r"got \[3, 2\] and \[3, 4\]"),
        ((torch.ones(3, 2), torch.ones(4, 2)), r"got \[3, 2\] and \[4, 2\]"),
        ((torch.ones(2, 2), torch.ones(2, 2), 1.0, torch.tensor([1, 2]), torch.tensor([1, 1])), "the image with id 2"),
        ((torch.ones(2, 2), torch.ones(2, 2), 1.0, torch.tensor([1, 1]), torch.tensor([1, 5])), "the text with id 5"),
        ((torch.ones(2, 2), torch.ones(2, 2), 1.0, torch.tensor([1, 1, 1])), r"integers \[2\]"),
    ],
)
def test_what_does_not_fit_is_an_error_in_words(arguments, message):
    with pytest.raises(VlmError, match=message):
        itc_loss(*arguments, *([1.0] if len(arguments) == 2 else []))


# ---- several processes ---------------------------------------------------------------------------------------------

WORKER = """
import json, sys
import torch
import torch.distributed as dist
from test_itc import shared_case, shared_losses

rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
image, text, ids, scale, bias = shared_case()
own = slice(0, 5) if rank == 0 else slice(5, 5) if rank == 1 and world == 3 else slice(5, 8)
report = [
    [value.tolist() for value in values]
    for values in shared_losses(image[own], text[own], ids[own], scale, bias, across_processes=True)
]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(report, file)
dist.destroy_process_group()
"""


def shared_case():
    scale, bias = (torch.tensor(value, dtype=torch.float64) for value in (4.0, -2.0))
    return unit(8, 3, 5), unit(8, 3, 6), torch.tensor([0, 1, 0, 2, 3, 1, 1, 4]), scale, bias


def shared_losses(image, text, ids, scale, bias, **options):
    """Value and gradients of four losses. The embeddings go through a layer first, as in a model."""
    cases = [
        lambda i, t, s, b: itc_loss(i, t, s, block=2, **options) + 0 * b,
        lambda i, t, s, b: itc_loss(i, t, s, ids, smoothing=0.1, block=2, **options) + 0 * b,
        lambda i, t, s, b: sigmoid_itc_loss(i, t, s, b, block=2, **options),
        lambda i, t, s, b: sigmoid_itc_loss(i, t, s, b, ids, block=2, **options),
    ]
    if options:  # and one whose shares the processes weight differently
        cases.append(lambda i, t, s, b: (gather_with_gradient(t).pow(3).sum() + i.sum()) * len(i) + 0 * (s + b))
    return [with_gradients(case, image, text, scale, bias) for case in cases]


@pytest.mark.parametrize("world", [2, 3], ids=["two", "three, one without rows"])
def test_shares_of_processes_add_up_to_the_loss_and_gradient_of_one(tmp_path: Path, world: int):
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(world), "0", str(tmp_path)], cwd=Path(__file__).parent)
        for rank in range(world)
    ]
    assert [worker.wait(120) for worker in workers] == [0] * world
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    image, text, ids, scale, bias = shared_case()
    for number, expected in enumerate(shared_losses(image, text, ids, scale, bias)):
        shares = [[torch.tensor(v, dtype=torch.float64) for v in report[number]] for report in reports]
        loss, of_image, of_text, of_scale, of_bias = zip(*shares)
        rows = [[g.reshape(-1, 3) for g in of] for of in (of_image, of_text)]
        assert_same([sum(loss), *map(torch.cat, rows), sum(of_scale), sum(of_bias)], expected, 1e-9)
    # d/dt of sum over processes of (weight * sum of cubes of everyone's rows): 3 t^2 times the sum of weights.
    cubes = torch.cat([torch.tensor(report[4][2], dtype=torch.float64).reshape(-1, 3) for report in reports])
    torch.testing.assert_close(cubes, 3 * text.pow(2) * 8)


# ---- micro-batches -------------------------------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """Two layers with dropout between them for each side, and a logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.4), nn.Linear(12, 5)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(batch[0]), dim=-1), F.normalize(self.text(batch[1]), dim=-1)


def gradients_of(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def backward_in_micro_batches(model: TwoTowers, pieces: list, loss: Callable[..., Tensor]) -> Tensor:
    """Both passes; returns the whole batch's loss."""
    replay = plan_replay(model, pieces, loss, [model.logit_scale])
    for number, piece in enumerate(pieces):
        with replay.again(number):
            embeddings = model(piece)
        replay.surrogate(number, embeddings, [model.logit_scale]).backward()
    return replay.loss


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11])
@pytest.mark.parametrize("autocast", [False, True])
def test_micro_batches_have_the_gradient_of_the_whole_batch_with_dropout(sizes, autocast):
    torch.manual_seed(0)
    model = TwoTowers()
    pieces = list(zip(torch.randn(11, 6).split(sizes), torch.randn(11, 6).split(sizes)))

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return itc_loss(image, text, model.logit_scale.exp()) / len(image)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        whole = loss(*map(torch.cat, zip(*[model(piece) for piece in pieces])))
        whole.backward()
        after = torch.rand(1)
        expected = gradients_of(model)
        torch.manual_seed(1)
        value = backward_in_micro_batches(model, pieces, loss)
    torch.testing.assert_close(value, whole.detach())
    tolerance = 2e-2 if autocast else 1e-6  # bf16 gradients add up in another order
    assert_same(gradients_of(model), expected, tolerance)
    assert torch.equal(torch.rand(1), after), "the second pass must not use up random numbers"


def test_a_frozen_side_and_a_fixed_scale_are_left_alone():
    torch.manual_seed(0)
    model = TwoTowers()
    model.text.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    pieces = [(torch.randn(3, 6), torch.randn(3, 6)) for _ in range(2)]
    backward_in_micro_batches(model, pieces, lambda i, t: itc_loss(i, t, 3.0))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"image.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")
    }
