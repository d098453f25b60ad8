"""The fused kernel gives the plain loss. It needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1) on a CPU."""

import os

import pytest
import torch
from generative_parts import generative_model
from tiny_models import LANGUAGE_KINDS

from vlm.objectives.frozen_head import frozen_head_cross_entropy_sum
from vlm.objectives.fused import can_fuse, fused_cross_entropy_sum
from vlm.objectives.lm import cross_entropy_sum

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not RUNS, reason="the kernel needs a CUDA device or TRITON_INTERPRET=1")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head_learns", [True, False])
def test_loss_gradients_and_right_predictions_are_the_plain_ones(smoothing, head_learns):
    pytest.importorskip("liger_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    states, head = (torch.randn(n, 32, generator=generator).to(device) for n in (60, 97))
    targets = (states @ head.T).argmax(-1)
    targets[::3] = 5
    states.requires_grad_(True)
    head.requires_grad_(head_learns)
    results = []
    for fused in (False, True):
        states.grad = head.grad = None
        if fused:
            loss, right = fused_cross_entropy_sum(states, targets, head, smoothing)
        else:
            loss, right = cross_entropy_sum(states, targets, lambda s: s @ head.T, smoothing=smoothing)
        (loss / 60).backward()
        results.append((loss.detach(), right, states.grad, head.grad))
    assert int(results[0][1]) >= 40
    for one, other in zip(*results):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [100, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_a_frozen_head_loss_and_gradient_are_the_plain_ones(chunk, dtype):
    torch.manual_seed(0)
    states, head = torch.randn(50, 16, requires_grad=True), torch.randn(40, 16).to(dtype)
    targets = (states.detach() @ head.float().T).argmax(-1)
    targets[::3] = 5
    results = []
    for run in (
        lambda: frozen_head_cross_entropy_sum(states, targets, head, chunk),
        lambda: cross_entropy_sum(states, targets, lambda s: s.to(dtype) @ head.T, chunk),
    ):
        states.grad = None
        loss, right = run()
        (loss * 3).backward()
        results.append((loss.detach(), right, states.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 3)


def test_a_frozen_head_takes_no_labels_and_passes_no_gradient_twice():
    head, states = torch.randn(9, 4), torch.zeros(0, 4, requires_grad=True)
    loss, right = frozen_head_cross_entropy_sum(states, torch.zeros(0, dtype=torch.long), head, 8)
    loss.backward()
    assert (float(loss.detach()), int(right), tuple(states.grad.shape)) == (0.0, 0, (0, 4))
    with torch.no_grad():
        assert not frozen_head_cross_entropy_sum(torch.ones(2, 4), torch.tensor([1, 2]), head, 8)[0].requires_grad


@pytest.mark.parametrize("kind", LANGUAGE_KINDS)
def test_a_plain_head_is_all_there_is_to_the_logits(tiny_folder, kind):
    lm = generative_model(tiny_folder, kind).language_model
    head = lm.plain_head
    assert (head is None) == (kind == "t5")
    if head is not None:
        states = torch.randn(3, 32)
        torch.testing.assert_close(lm.logits(states), states @ head.T, rtol=1e-5, atol=1e-5)


def test_a_head_with_scaling_or_no_gpu_is_not_fused(tiny_folder):
    lm = generative_model(tiny_folder, "llama").language_model
    assert not can_fuse(torch.zeros(2, 32), lm.plain_head)
    lm.network.config.final_logit_softcapping = 30.0
    assert lm.plain_head is None
