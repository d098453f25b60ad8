"""The projection bridge: shapes, reductions, published parameter counts, initial scale."""

import pytest
import torch

from vlm.bridges.projection import Projection, pixel_shuffle
from vlm.errors import VlmError
from vlm.model_spec import ProjectionSpec


def _parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts_to_the_unit():
    with torch.device("meta"):
        llava = Projection(ProjectionSpec(type="linear"), 1024, 4096, 256)
        llava15 = Projection(ProjectionSpec(type="mlp"), 1024, 4096, 576)
    assert _parameters(llava) == 1024 * 4096 + 4096
    assert _parameters(llava15) == 20_979_712


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 36),
        ({"reduce": "pool", "tokens": 9}, 9),
        ({"reduce": "pixel_shuffle", "factor": 3}, 4),
        ({"type": "linear", "input_norm": True}, 36),
        ({"depth": 3}, 36),
    ],
)
def test_tokens_come_out_in_the_announced_number_and_width(options, tokens):
    bridge = Projection(ProjectionSpec(**options), 8, 12, 36, (6, 6))
    assert bridge.num_tokens == tokens
    assert bridge(torch.randn(2, 36, 8)).shape == (2, tokens, 12)


def test_pixel_shuffle_puts_neighbours_side_by_side():
    grid = torch.arange(16.0).view(1, 16, 1)
    assert pixel_shuffle(grid, (4, 4), 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pooling_averages_the_cells_of_the_grid():
    bridge = Projection(ProjectionSpec(type="linear", reduce="pool", tokens=4), 1, 1, 16, (4, 4))
    with torch.no_grad():
        bridge.layers[0].weight.fill_(1.0)
        bridge.layers[0].bias.zero_()
    assert bridge(torch.arange(16.0).view(1, 16, 1)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_initial_output_has_the_scale_of_token_embeddings():
    torch.manual_seed(0)
    embeddings = torch.randn(1000, 32) * 0.02
    bridge = Projection(ProjectionSpec(input_norm=True), 16, 32, 10)
    bridge.match_scale(embeddings)
    output = bridge(torch.randn(4, 10, 16) * 7)
    assert output.pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({"reduce": "pool", "tokens": 5}, (6, 6)),
        ({"reduce": "pool", "tokens": 49}, (6, 6)),
        ({"reduce": "pixel_shuffle", "factor": 4}, (6, 6)),
        ({"reduce": "pool", "tokens": 4}, None),
    ],
)
def test_reductions_that_do_not_fit_the_grid_are_errors(options, grid):
    with pytest.raises(VlmError, match="bridge"):
        Projection(ProjectionSpec(**options), 8, 8, 36, grid)
