"""The one place that decides where a model runs."""

import pytest
import torch

from vlm.devices import pick_device, pick_precision
from vlm.errors import VlmError


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "cpu:3", "", "cuda:x"])
def test_a_device_that_is_not_there_is_one_line_that_names_it(device: str) -> None:
    with pytest.raises(VlmError) as error:
        pick_device(device)
    assert repr(device) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cpu_is_asked_for_by_name_or_object_and_gets_fp32() -> None:
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert pick_precision("auto", torch.device("cpu")) == "fp32"


def test_an_unknown_precision_names_those_there_are() -> None:
    with pytest.raises(VlmError, match="auto, fp32, bf16, fp16"):
        pick_precision("fp8")
