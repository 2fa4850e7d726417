"""The Grams of a sweep looked at: on matrices whose answer is known."""

import pytest
import torch

from lighten.compress.quantize.quantized_layers import relative_error
from lighten.doctor.examination import dead_channels, gptq_4, rank, spread
from lighten.model.grams import Gram
from lighten.observe.gram import accumulate


def gram(inputs: torch.Tensor) -> torch.Tensor:
    made = Gram.empty(inputs.shape[1], "cpu")
    accumulate(made, inputs)
    return made.matrix()


@pytest.mark.parametrize("tokens", [1, 10, 63, 64, 500])
def test_the_rank_is_that_of_the_inputs(tokens: int) -> None:
    torch.manual_seed(tokens)
    scales = torch.logspace(-4, 4, 64)  # channels as different as those of a real model
    assert rank(gram(torch.randn(tokens, 64) * scales)) == min(tokens, 64)


def test_channels_that_follow_from_others_and_dead_ones_add_no_rank() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 48)
    inputs[:, 40:44] = inputs[:, :4] * 3 - inputs[:, 4:8]
    inputs[:, 44:] = 0
    assert rank(gram(inputs)) == 40
    assert rank(torch.zeros(8, 8)) == 0


def test_dead_channels() -> None:
    assert dead_channels(torch.tensor([0.0, 1.0, 4.0, 1e-7, 0.0])) == (2, 1)
    assert dead_channels(torch.ones(5)) == (0, 0)


def test_more_samples_lose_less_on_other_text() -> None:
    """Correlated inputs: GPTQ that has seen few of them follows their noise."""
    torch.manual_seed(3)
    mix = torch.randn(64, 64) / 8 + torch.eye(64)
    weight = torch.randn(32, 64)
    unseen = gram(torch.randn(4000, 64) @ mix)
    losses = [
        relative_error(weight, gptq_4(weight, gram(torch.randn(tokens, 64) @ mix)), unseen)
        for tokens in (70, 300, 4000)
    ]
    assert losses[0] > losses[1] > losses[2] > 0


def test_layers_are_spread() -> None:
    assert [spread(layers) for layers in (1, 2, 3, 30)] == [[0], [0, 1], [0, 1, 2], [0, 15, 29]]
