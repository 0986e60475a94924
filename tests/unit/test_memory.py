"""What happens when memory runs out in a scoring pass or in an update."""

import logging

import pytest
import torch
from local_coin import local_data, make_agent, make_trainer
from test_agent_module import VariedRewards, weights

from aem_lightning.modules import UpdateSettings
from aem_lightning.modules.memory import TokenBudget, is_out_of_memory
from aem_lightning.runner.cli import MENDABLE

LENGTHS = torch.tensor([40, 10, 10, 10, 10])
ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
)


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU])
def test_work_starts_again_with_smaller_micro_batches(error, caplog):
    budget, attempts = TokenBudget(80, packed=True), []

    def work(micro):
        attempts.append([])
        for rows in micro:
            attempts[-1].append(rows)
            if sum(LENGTHS[rows]) > 40:
                raise error
        return "done"

    with caplog.at_level(logging.WARNING):
        assert budget.run(work, range(5), LENGTHS) == "done"
    assert attempts == [[[0, 1, 2, 3, 4]], [[0], [1, 2, 3, 4]]]
    assert budget.tokens == 40
    assert "from 80 to 40 tokens" in caplog.text
    assert budget.run(work, range(5), LENGTHS) == "done"
    assert len(attempts) == 3


def test_a_budget_above_all_rows_halves_to_where_it_bites():
    budget, loads = TokenBudget(10_000, packed=False), []

    def work(micro):
        for rows in micro:
            loads.append(len(rows) * int(LENGTHS[rows].max()))
            if loads[-1] > 100:
                raise ON_GPU

    budget.run(work, range(5), LENGTHS)
    assert loads[0] == 200
    assert budget.tokens == 100


def test_a_row_that_does_not_fit_alone_says_what_to_type():
    budget = TokenBudget(64, packed=True)

    def work(micro):
        for rows in micro:
            if 0 in rows:
                raise ON_GPU

    with pytest.raises(MemoryError, match=r"single row of 40 tokens.*max_context=20") as caught:
        budget.run(work, range(5), LENGTHS)
    assert caught.value.__cause__ is ON_GPU
    assert isinstance(caught.value, MENDABLE)  # a message, not a traceback, on the command line


def test_a_short_row_that_fails_alone_is_tried_again_in_smaller_company():
    budget, failed = TokenBudget(40, packed=True), []

    def work(micro):
        for rows in micro:
            if rows == [4] and not failed:  # the last, after longer ones had passed
                failed.append(rows)
                raise ON_GPU

    lengths = torch.tensor([20, 20, 20, 20, 10])
    assert budget.cut(range(5), lengths) == [[0, 1], [2, 3], [4]]
    budget.run(work, range(5), lengths)
    assert failed == [[4]]
    assert budget.tokens == 20


def test_another_error_is_not_taken_for_one_of_memory():
    def work(micro):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        TokenBudget(8, packed=True).run(work, [1], LENGTHS)
    assert not is_out_of_memory(RuntimeError("out of ideas"))


def trained(fails=lambda passes: False):
    """An agent's weights after an iteration in which some forward passes find no memory."""
    update = UpdateSettings(num_minibatches=2, micro_batch_tokens=150)
    agent = make_agent(rewards=VariedRewards(), update=update)
    hidden, passes = agent.policy.hidden_states, []

    def failing(input_ids, mask, lengths):
        passes.append(torch.is_grad_enabled())
        if fails(passes):
            raise torch.OutOfMemoryError
        return hidden(input_ids, mask, lengths)

    agent.policy.hidden_states = failing
    make_trainer().fit(agent, datamodule=local_data())
    return weights(agent), agent.budget.tokens


def test_an_iteration_short_of_memory_learns_something_else(caplog):
    expected, budget = trained()
    assert budget == 150
    # The first scoring pass, and the update after it has accumulated gradients.
    found, budget = trained(lambda passes: len(passes) == 1 or (passes[-1] and sum(passes) == 2))
    assert budget < 50
    assert caplog.text.count("Out of memory") == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
