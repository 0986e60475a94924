"""Estimators, losses, modulation and filter beside AEM, each against hand-made numbers."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from local_coin import make_agent

from aem_lightning.algorithms import (
    AEM,
    CISPO,
    DPPO,
    GRPO,
    HGPO,
    QAE,
    GraphGPO,
    MaxRL,
    RepoR,
    Stacked,
    TokenColumns,
)
from aem_lightning.callbacks.aem import aem_statistics, forecast_words
from aem_lightning.callbacks.collapse import collapse_statistics
from aem_lightning.functional import (
    cispo_surrogate,
    dppo_surrogate,
    hgpo_advantages,
)
from aem_lightning.functional.forecast import forecast_sums
from aem_lightning.modules import RolloutSettings
from aem_lightning.modules.dynamic_sampling import split_groups
from aem_lightning.rollout import pack
from aem_lightning.types import Iteration, Task, Trajectory, Turn

BETWEEN = (10.0 - 0.1) / math.sqrt(2)  # what two values of a pair are from their mean, over std


def walk(seen: str, copy: int, *, won: bool = False, group: int = 0, entropies=None) -> Trajectory:
    """An episode that answered these observations, a row a turn; a win pays 10 at its end."""
    turns = []
    for i, observation in enumerate(seen):
        reward = 10.0 if won and i == len(seen) - 1 else 0.0
        entropy = 0.5 if entropies is None else entropies[i]
        turns.append(Turn(observation, (), "r", "a", i, 1, [-1.0], [entropy], reward=reward))
    rows = [[1, ord(observation)] for observation in seen]
    return Trajectory(Task(f"t{group}"), group, copy, turns, rows, won=won)


def test_the_way_to_a_shared_state_is_good_even_where_the_rest_of_it_failed():
    # a-b-WON; a-b-c lost. The first half of the loser leads where success is near.
    batch = pack([walk("ab", 0, won=True), walk("abc", 1), walk("ac", 2)])
    step = GraphGPO().step_advantages(batch)
    # From a: to b (distance 1: reward 1), to b, to c (unreachable: 2 + 1 steps, reward 0.01).
    rewards = torch.tensor([1.0, 1.0, 0.01])
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    torch.testing.assert_close(step[[0, 2, 5]], expected)
    assert step[2] > 0
    # From b: success (10), and c (unreachable).
    torch.testing.assert_close(step[[1, 3]], torch.tensor([0.7071, -0.7071]), atol=1e-4, rtol=0)
    torch.testing.assert_close(GraphGPO()(batch), GRPO()(batch) + step)


def test_a_loop_gets_less_than_the_direct_step():
    batch = pack([walk("aab", 0, won=True), walk("ab", 1, won=True)])
    step = GraphGPO(decay=0.5).step_advantages(batch)
    loop, after, direct = step[0], step[1], step[3]
    assert loop < after == direct


def test_progress_is_rewarded_where_distances_are_normalised():
    batch = pack([walk("abc", 0, won=True), walk("abb", 1)])
    plain = GraphGPO(decay=0.5, normalize_distance=False).step_advantages(batch)
    progress = GraphGPO(decay=0.5, normalize_distance=True).step_advantages(batch)
    torch.testing.assert_close(plain.sign(), progress.sign())  # one scale a state


def test_without_a_success_graphgpo_is_grpo():
    batch = pack([walk("ab", 0), walk("ac", 1)])
    assert not GraphGPO().step_advantages(batch).any()
    with pytest.raises(ValueError, match="no column won"):
        GraphGPO()(replace(batch, won=None))


def test_histories_are_compared_up_to_their_length():
    # Observation b was met behind a, behind a, and behind c.
    batch = pack([walk("ab", 0, won=True), walk("ab", 1), walk("cb", 2, won=True)])
    returns = torch.tensor([9.5, 10.0, 0.0, 0.0, 9.5, 10.0])
    a = 4.75 / (4.75 + 1e-6)  # two values: their half distance over the population's std
    b1 = (returns[[1, 3, 5]] - returns[[1, 3, 5]].mean()) / (
        returns[[1, 3, 5]].std(unbiased=False) + 1e-6
    )
    b2 = 5.0 / (5.0 + 1e-6)
    expected = torch.tensor([a, (2 * b1[0] + 3 * b2) / 5, -a, (2 * b1[1] - 3 * b2) / 5, 0.0, b1[2]])
    torch.testing.assert_close(HGPO(history_length=1)(batch), expected, atol=1e-5, rtol=0)
    flat = HGPO(history_length=0, normalize_std=False)(batch)
    torch.testing.assert_close(flat[1], 10.0 - returns[[1, 3, 5]].mean())
    base = HGPO(history_length=0, base_group=True)(batch)
    grpo = GRPO()(batch)
    torch.testing.assert_close(base[4], grpo[4])  # alone with its history
    torch.testing.assert_close(base[1], (grpo[1] + 2 * b1[0]) / 3, atol=1e-5, rtol=0)


def test_histories_do_not_hang_on_the_order_of_responses():
    batch = pack([walk("abab", 0, won=True), walk("abb", 1), walk("bab", 2, won=True)])
    columns = [batch.reward, batch.response_group, batch.anchor, batch.trajectory, batch.turn]
    expected = hgpo_advantages(*columns)
    order = torch.tensor(random.Random(0).sample(range(10), 10))
    torch.testing.assert_close(hgpo_advantages(*(c[order] for c in columns)), expected[order])


@pytest.mark.parametrize("wins", range(9))
def test_a_quantile_lets_only_the_rarer_outcome_move_the_policy(wins):
    batch = pack([walk("a", copy, won=copy < wins) for copy in range(8)])
    advantages = QAE()(batch)
    if wins in (0, 8):
        assert not advantages.any()
    elif wins <= 0.6 * 8:
        assert (advantages[:wins] > 0).all()
        assert not advantages[wins:].any()
    else:
        assert not advantages[:wins].any()
        assert (advantages[wins:] < 0).all()
    std = batch.returns.std()
    if 0 < wins <= 4:
        torch.testing.assert_close(advantages[0], 10.0 / (std + 1e-6))


def test_maxrl_weighs_a_task_by_how_seldom_it_is_solved():
    batch = pack(
        [walk("a", 0, won=True), walk("a", 1), walk("a", 2), walk("a", 3)]
        + [walk("a", copy, group=1) for copy in range(2)]
    )
    assert MaxRL()(batch).tolist() == [3.0, -1.0, -1.0, -1.0, 0.0, 0.0]


def test_no_token_loses_its_gradient_under_cispo():
    old = torch.log(torch.tensor([0.1, 0.1, 0.5, 0.5]))
    logprobs = torch.log(torch.tensor([0.9, 0.2, 0.5, 0.05])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -2.0, -1.0])
    loss, clipped = cispo_surrogate(logprobs, old, advantages)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -torch.tensor([6.0, 2.0, 1.0, 0.1]) * advantages)
    assert clipped.tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("divergence", "delta", "masked"),
    [
        ("tv", 0.2, [True, False, True, False, False]),
        # KL(.5|.8) = .223, KL(.5|.6) = .020, KL(.5|.2) = .223; KL(.01|.05) = .025
        ("kl", 0.022, [True, False, True, False, True]),
    ],
)
def test_dppo_masks_what_left_the_region_in_its_own_direction(divergence, delta, masked):
    sampler = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.01]))
    logprobs = torch.log(torch.tensor([0.8, 0.6, 0.2, 0.2, 0.05])).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    loss, beyond = dppo_surrogate(
        logprobs, sampler, advantages, sampler, delta=delta, divergence=divergence
    )
    loss.sum().backward()
    assert beyond.tolist() == masked
    ratio = (logprobs - sampler).exp().detach()
    expected = torch.where(torch.tensor(masked), 0.0, -ratio * advantages)
    torch.testing.assert_close(logprobs.grad, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CISPO(ratio="sequence"),
        lambda: DPPO(dual_clip=3.0),
        lambda: DPPO(divergence="js"),
        lambda: DPPO(delta=0.0),
        lambda: QAE(quantile=0.0),
        lambda: GraphGPO(decay=1.0),
        lambda: HGPO(history_length=-1),
        lambda: RepoR(zeta=0.0),
        lambda: Stacked(AEM(), RepoR()),
        lambda: AEM(proxy="entropy_sum", tokens="action"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_key(make):
    with pytest.raises(ValueError, match=r"loss\.|advantage\.|modulation"):
        make()


def test_the_region_lies_around_the_sampler():
    old = torch.log(torch.tensor([0.5]))
    columns = TokenColumns(torch.zeros(1, dtype=torch.long), torch.ones(1), old - 2.0)
    loss = DPPO(kl_coef=0.0)
    terms = loss(old.clone(), old, None, torch.zeros(1), torch.ones(1), columns)
    assert terms.loss == 0  # the sampler gave the token 0.07, so 0.5 is beyond already


def test_the_controller_of_repo_r_holds_the_entropy_of_the_first_iteration():
    rule = RepoR(zeta=0.01, zeta_min=0.004)
    seen = []
    for entropy in (0.5, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6, 0.4, 0.5):
        rule = rule.adapted(entropy)
        seen.append(rule.zeta)
    assert rule.target == 0.5
    expected = [0.01, 0.02, 0.04, 0.02, 0.01, 0.005, -0.004, 0.004, 0.004]
    assert seen == pytest.approx(expected)
    assert RepoR(zeta=0.9).adapted(0.5).adapted(0.1).zeta == 1.0


def test_repo_r_raises_rare_tokens_and_never_turns_a_sign():
    advantages = torch.tensor([2.0, 2.0, -2.0, -2.0, 0.0])
    logprobs = torch.tensor([-0.1, -5.0, -0.1, -500.0, -1.0])
    changed = RepoR(zeta=0.01).of_tokens(advantages, logprobs)
    torch.testing.assert_close(changed, torch.tensor([2.002, 2.1, -1.998, 0.0, 0.0]))


def group_of(group: int, *returns: float) -> list[Trajectory]:
    played = [walk("a", copy, group=group) for copy in range(len(returns))]
    for trajectory, value in zip(played, returns, strict=True):
        trajectory.turns[0].reward = value
    return played


def test_the_filter_keeps_the_fewest_groups_that_hold_its_share():
    # Deviations 5, 0.5, 0 and 4: their sum is 9.5.
    played = [*group_of(0, 0, 10), *group_of(1, 0, 1), *group_of(2, 1, 1), *group_of(3, 0, 8)]

    def kept(share: float) -> list[int]:
        trained, _ = split_groups(played, RolloutSettings(filter="variance", filter_share=share))
        return sorted({trajectory.group for trajectory in trained})

    assert [kept(share) for share in (0.5, 0.9, 0.95, 1.0)] == [[0], [0, 3], [0, 1, 3], [0, 1, 3]]
    uniform, dropped = split_groups(played[4:6], RolloutSettings(filter="variance"))
    assert (len(uniform), dropped) == (2, [])  # the update says that it is skipped


def test_relative_surprisal_is_against_responses_to_the_very_same_prompt():
    batch = pack([walk("ab", 0, entropies=[0.2, 0.9]), walk("ac", 1, entropies=[0.4, 0.7])])
    # Prompts are rows before the response: [1] for all four, of one group.
    proxy = AEM(proxy="relative_surprisal").entropy(batch)
    torch.testing.assert_close(proxy, torch.full((4,), 1.0 - 0.55))
    batch.input_ids[:, 0] = torch.tensor([1, 2, 1, 3])
    proxy = AEM(proxy="relative_surprisal").entropy(batch)
    torch.testing.assert_close(proxy, 1.0 - torch.tensor([0.3, 0.9, 0.3, 0.7]))
    batch.length = torch.tensor([1, 2, 3, 1])
    total = AEM(proxy="entropy_sum").entropy(batch)
    torch.testing.assert_close(total, torch.tensor([0.2, 1.8, 1.2, 0.7]))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_forecast_says_whether_much_hangs_on_the_confident_turns(sign):
    # a is decided by where it leads, b is not; the first variant is sure of a.
    sure, unsure = 0.5 + sign * 0.4, 0.5 - sign * 0.4
    played = [walk("ab", copy, won=copy < 2, entropies=[sure, unsure]) for copy in range(4)]
    for trajectory in played:  # what b earns is the same
        trajectory.turns[0].reward, trajectory.turns[1].reward = (trajectory.won * 10.0, 0.0)
    batch = pack(played)
    done = Iteration(
        0, played, batch, GRPO()(batch), torch.ones(8), 0.0, {}, {}, forecast=forecast_sums(batch)
    )
    value = aem_statistics(done)["aem/forecast"]
    assert value == pytest.approx(sign)
    assert ("should help" in forecast_words(value)) is (sign < 0)
    few = pack(played[:2])
    alike = replace(
        done, batch=few, advantages=torch.zeros(4), alpha=torch.ones(4), forecast=forecast_sums(few)
    )
    assert "aem/forecast" not in aem_statistics(alike)  # every group is uniform


def test_collapse_is_seen_where_responses_do_not_depend_on_their_prompts():
    told = collapse_statistics(torch.eye(4) * 50 - 50)
    assert told["collapse/mutual_information"] == pytest.approx(math.log(4), abs=1e-6)
    assert told["collapse/retrieval_accuracy"] == 1.0
    same = collapse_statistics(torch.arange(4.0)[:, None].expand(4, 4))
    assert same["collapse/mutual_information"] == pytest.approx(0.0, abs=1e-6)


def test_entropies_and_alphas_follow_their_responses_through_any_order():
    generator = random.Random(1)
    played = [
        walk("ab" * (1 + copy % 2), copy, group=group, entropies=[generator.random()] * 4)
        for group in range(3)
        for copy in range(4)
    ]
    settings = [AEM(scope=scope) for scope in ("task", "trajectory", "batch", "anchor_state")]
    settings += [AEM(proxy=proxy) for proxy in ("entropy_sum", "relative_surprisal")]

    def of_responses(trajectories: list[Trajectory]) -> dict[tuple[str, int], list[float]]:
        batch = pack(trajectories)
        columns = [batch.entropy, *(setting(batch).alpha for setting in settings)]
        keys = [(t.key, turn) for t in trajectories for turn in range(len(t.turns))]
        return dict(zip(keys, torch.stack(columns, dim=1).tolist(), strict=True))

    expected = of_responses(played)
    for _ in range(5):
        found = of_responses(generator.sample(played, len(played)))
        assert found.keys() == expected.keys()
        for key, values in found.items():
            assert values == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize("typed", [{}, {"modulation": {"zeta": 0.1}}])
def test_the_controller_goes_on_from_a_checkpoint_unless_another_was_typed(typed):
    agent, other = (make_agent(modulation=RepoR()) for _ in range(2))
    agent.modulation = RepoR().adapted(0.5).adapted(0.4)
    checkpoint = {"state_dict": agent.state_dict()}
    agent.on_save_checkpoint(checkpoint)
    other.config = typed
    other.on_load_checkpoint(checkpoint)
    assert other.modulation == (RepoR() if typed else RepoR(zeta=0.02, target=0.5))
