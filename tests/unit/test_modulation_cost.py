"""AEM at the paper's scale, 128 episodes of 50 turns: no loop over responses."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from aem_lightning.functional import aem_coefficients, response_entropy

EPISODES, TURNS, GROUP_SIZE = 128, 50, 8


class CountOperators(TorchFunctionMode):
    """Counts the calls of torch inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def responses(episodes, turns):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(episodes).div(GROUP_SIZE, rounding_mode="floor").repeat_interleave(turns)
    return torch.rand(episodes * turns, generator=generator), group


def operators(work, *args, **options):
    with CountOperators() as counter:
        work(*args, **options)
    return counter.count


@pytest.mark.parametrize("direction", ["paper", "shuffled"])
def test_modulation_takes_more_operators_for_more_responses(direction):
    few, many = (
        operators(aem_coefficients, *responses(*size), direction=direction)
        for size in ((GROUP_SIZE, 2), (EPISODES, TURNS))
    )
    assert few == many < 100


def test_response_entropies_take_more_operators_for_more_responses():
    counts = []
    for number in (2, EPISODES * TURNS):
        index = torch.arange(number).repeat_interleave(3)[None]
        counts.append(operators(response_entropy, torch.rand(index.shape), index, number))
    assert counts[0] == counts[1] < 50
