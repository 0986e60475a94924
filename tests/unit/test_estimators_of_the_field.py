"""Estimators and modulations on whole rollout batches."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_play import word_tokenizer

from aem_lightning.algorithms import (
    AEM,
    EMPG,
    GRPO,
    PPO,
    RLOO,
    GiGPO,
    GraphGPO,
    NoModulation,
    Overlong,
    ReinforcePP,
    Stacked,
    response_means,
)
from aem_lightning.functional import aem_coefficients, empg_bonus, empg_gain, whiten
from aem_lightning.rollout import action_mask, anchor_states, hidden_states, pack
from aem_lightning.rollout.actions import action_span
from aem_lightning.types import Task, Trajectory, Turn


def make_turn(row, entropies, reward=0.0, seen="o", start=1):
    return Turn(seen, (), "r", "a", row, start, [-1.0] * len(entropies), entropies, reward=reward)


def make_trajectories(specs, copies=2):
    """A trajectory for each list of (token entropies, reward, observation), a row a turn."""
    made = []
    for n, turns in enumerate(specs):
        rows = [[1] + [2] * len(entropies) for entropies, _, _ in turns]
        played = [make_turn(i, *turn) for i, turn in enumerate(turns)]
        made.append(Trajectory(Task("t"), n // copies, n % copies, played, rows))
    return made


PLAYED = make_trajectories(
    [
        [([0.2], 0.0, "hall"), ([0.5, 0.9], 10.0, "kitchen")],
        [([0.4], 0.0, "hall"), ([0.8], 0.0, "hall"), ([0.1, 0.3], -0.1, "kitchen")],
        [([1.0, 1.0, 1.0], 0.0, "hall")],
        [([0.3], 10.0, "hall")],
    ]
)
OF = [0, 0, 1, 1, 1, 2, 3]


@pytest.fixture
def batch():
    return pack(PLAYED)


def test_leave_one_out_includes_the_one(batch):
    expected = torch.tensor([10.1, -10.1, -10.0, 10.0])[OF]
    torch.testing.assert_close(RLOO()(batch), expected)


def test_reinforcepp_compares_within_groups(batch):
    torch.testing.assert_close(ReinforcePP()(batch), whiten(batch.returns)[OF])


def test_gigpo_adds_another_step_advantage_than_that_of_its_anchor(batch):
    settings = GiGPO(normalize_std=False, step_weight=0.5, gamma=0.9)
    episode = GRPO(normalize_std=False)(batch)
    # Discounted returns 9, 10 | -0.081, -0.09, -0.1 | 0 | 10; the halls of a group are an anchor.
    halls = [9.0, -0.081, -0.09]
    mean = sum(halls) / 3
    step = [9.0 - mean, 5.05, halls[1] - mean, halls[2] - mean, -5.05, -5.0, 5.0]
    torch.testing.assert_close(settings(batch), episode + 0.5 * torch.tensor(step))
    torch.testing.assert_close(replace(settings, step_weight=0.0)(batch), episode)


@pytest.mark.parametrize("kind", [GRPO, RLOO, GiGPO])
def test_step_statistics_do_not_count_a_long_trajectory_by_its_responses(batch, kind):
    settings = {} if kind is RLOO else {"normalize_std": False}
    if kind is GiGPO:
        settings["step_weight"] = 0.0
    found = kind(**settings, statistics="step")(batch)
    for group in batch.group.unique():
        inside = batch.response_group == group
        returns = batch.returns[batch.trajectory[inside]]
        count = len(returns)
        scale = count / (count - 1) if kind is RLOO else 1.0
        torch.testing.assert_close(found[inside], scale * (returns - returns.mean()))
    assert not torch.allclose(found, kind(**settings)(batch))
    with pytest.raises(ValueError, match="allowed: advantage"):
        kind(statistics="turn")


def test_overlong_responses_lose_nothing(batch):
    shaped = GRPO(normalize_std=False, overlong=Overlong(max_length=3, share=0.67, scale=2.0))
    # Of three tokens, punished over the last two: 0, -0.5 and -1 of the scale.
    returns = torch.tensor([10 - 1.0, -0.1 - 1.0, -2.0, 10.0])
    expected = GRPO(normalize_std=False)(replace(batch, returns=returns))
    torch.testing.assert_close(shaped(batch), expected)
    with pytest.raises(ValueError, match=r"overlong\.share=0"):
        Overlong(max_length=3, share=0.0)


def test_compact_filtering_forgets_the_return_or_trains_on_the_trajectory():
    cut = [replace(trajectory) for trajectory in PLAYED]
    cut[1].truncated = True
    batch = pack(cut, compact_filtering=True)
    assert batch.loss_mask.tolist() == [True, False, True, True]
    advantages = RLOO()(batch)
    assert advantages[0] == pytest.approx(10.1)
    weights = NoModulation()(batch).apply(advantages, batch)
    assert weights.tolist() == pytest.approx([10.1, 10.1, 0, 0, 0, -10, 10])
    kept = [0, 1, 5, 6]  # and its entropies leave the statistics of modulation
    expected = aem_coefficients(batch.entropy[kept], torch.tensor([0, 0, 1, 1]))
    alpha = AEM()(batch).alpha
    torch.testing.assert_close(alpha[kept], expected)
    assert alpha[[2, 3, 4]].tolist() == [1.0] * 3
    cut[1].infra_error = "died"  # such a return is no return
    assert RLOO()(pack(cut, compact_filtering=True))[0] == 0


def test_ppo_is_not_the_whitened_return_minus_the_value(batch):
    values = torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    batch.values = torch.where(batch.response_index >= 0, values, 0.0)
    ppo = PPO()
    batch.value_targets = ppo.targets(batch)
    inside = batch.response_index >= 0
    ahead = torch.tensor([10.0, 10.0, -0.1, -0.1, -0.1, 0.0, 10.0])  # rewards from a response on
    torch.testing.assert_close(batch.value_targets[inside], ahead[batch.response_index[inside]])
    found = ppo(batch)
    expected = whiten(batch.value_targets[inside] - batch.values[inside])
    torch.testing.assert_close(found[inside], expected)
    assert not found[~inside].any()
    means = response_means(found, batch)
    assert means[1].item() == pytest.approx(found[batch.response_index == 1].mean().item())
    alpha = AEM(scope="batch")(batch)
    scaled = alpha.apply(found, batch)
    torch.testing.assert_close(
        scaled[inside], alpha.alpha[batch.response_index[inside]] * found[inside]
    )
    with pytest.raises(ValueError, match="type modulation=aem"):
        EMPG()(batch).apply(found, batch)


def test_ppo_without_values_says_nothing(batch):
    with pytest.raises(ValueError, match="values"):
        PPO()(batch)
    with pytest.raises(ValueError, match=r"advantage\.gamma=0.*advantage\.value_clip=-1"):
        PPO(gamma=0.0, value_clip=-1.0)


@pytest.mark.parametrize(
    ("scope", "group"),
    [
        ("task", [0, 0, 0, 0, 0, 1, 1]),
        ("trajectory", OF),
        ("batch", [0] * 7),
        ("anchor_state", [0, 1, 0, 0, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("mean", ["response", "token"])
def test_a_scope_compares_other_responses_or_averages_otherwise(scope, group, mean, batch):
    alpha = AEM(scope=scope, mean=mean)(batch).alpha
    lengths = batch.length.double()
    expected = aem_coefficients(
        batch.entropy, torch.tensor(group), weight=lengths if mean == "token" else None
    )
    torch.testing.assert_close(alpha, expected)
    weights = lengths if mean == "token" else torch.ones(7)
    for g in set(group):
        inside = torch.tensor(group) == g
        average = (alpha * weights)[inside].sum() / weights[inside].sum()
        assert average.item() == pytest.approx(1.0, rel=1e-5)


def test_the_shuffle_is_the_same_for_every_batch_or_changes_for_one(batch):
    plain, shuffled = AEM()(batch).alpha, AEM(direction="shuffled", seed=1)
    other = replace(batch, input_ids=batch.input_ids + 1)
    drawn = {tuple(shuffled(b).alpha.tolist()) for b in (batch, batch)}
    assert len(drawn) == 1
    seeds = [AEM(direction="shuffled", seed=seed) for seed in range(20)]
    assert len({tuple(s(batch).alpha.tolist()) for s in seeds}) > 1
    assert any(not torch.equal(s(batch).alpha, s(other).alpha) for s in seeds)
    for inside in (slice(0, 5), slice(5, 7)):
        assert torch.equal(plain[inside].sort().values, shuffled(batch).alpha[inside].sort().values)


def test_empg_is_not_the_centred_gain_and_bonus(batch):
    advantages = GRPO()(batch)
    changed = EMPG(zeta=0.3)(batch).apply(advantages, batch)
    bonus = empg_bonus(batch.entropy, batch.trajectory, batch.turn)
    plain = empg_gain(batch.entropy) * advantages + 0.3 * bonus
    torch.testing.assert_close(changed, plain - plain.mean())
    assert bonus[[1, 4, 5, 6]].tolist() == [0.0] * 4
    both = Stacked(EMPG(zeta=0.3), AEM())(batch)
    torch.testing.assert_close(both.apply(advantages, batch), AEM()(batch).alpha * changed)


def test_action_entropy_counts_other_tokens(batch):
    mask = torch.zeros_like(batch.response_index, dtype=torch.bool)
    mask[:, 1] = True  # the first token of every response
    batch.action_mask = mask
    alpha = AEM(tokens="action")(batch).alpha
    first = torch.tensor([turn.entropies[0] for t in PLAYED for turn in t.turns])
    torch.testing.assert_close(alpha, aem_coefficients(first, batch.response_group))
    batch.action_mask = None
    with pytest.raises(ValueError, match=r"modulation\.tokens=all"):
        AEM(tokens="action")(batch)


def test_the_span_of_an_action_holds_too_much_or_too_little():
    tokenizer = word_tokenizer()
    text = "<think> open red box </think> <action> open red box </action>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    turn = Turn("", (), text, "open red box", 0, 2, [-1.0] * len(ids), None)

    def decode(tokens):
        return tokenizer.decode(tokens)

    start, end = action_span(turn, ids, decode)
    assert decode(ids[start:end]).strip() == "open red box"
    assert start > ids.index(tokenizer.convert_tokens_to_ids("</think>"))
    assert action_span(replace(turn, action=None), ids, decode) == (0, len(ids))
    played = Trajectory(Task("t"), 0, 0, [turn], [[0, 0, *ids]])
    mask = action_mask(pack([played]), [played], decode)
    assert mask[0].nonzero()[:, 0].tolist() == [2 + start, 3 + start, 4 + start]


def test_observations_that_are_alike_enough_do_not_share_an_anchor():
    texts = ["a cup on the table", "a cup on the table.", "nothing", "a cup on the table"]
    turns = [[([0.1], 0.0, text)] for text in texts]
    same_group = make_trajectories(turns, copies=4)
    assert anchor_states(same_group).tolist() == [0, 1, 2, 0]
    assert anchor_states(same_group, 0.9).tolist() == [0, 0, 1, 0]
    assert anchor_states(same_group, 0.01).tolist() == [0, 0, 0, 0]
    assert anchor_states(make_trajectories(turns, copies=1), 0.9).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"anchor_similarity=0"):
        anchor_states(same_group, 0.0)
    assert math.isclose(pack(same_group, anchor_similarity=0.9).anchor.sum().item(), 1)


SHELF = "On the shelf 1, you see nothing."


def walk(won, *steps):
    """An episode of what is seen and can be done, turn by turn."""
    (trajectory,) = make_trajectories([[([0.1], float(won), seen) for seen, _ in steps]], copies=1)
    for turn, (_, actions) in zip(trajectory.turns, steps, strict=True):
        turn.admissible_actions = actions
    return replace(trajectory, won=won, group=0)


def test_who_stands_at_the_shelf_without_the_mug_is_taken_for_who_holds_it():
    """GraphGPO by observations rewards the way to the shelf with empty hands."""
    room = ("a room", ("go to desk 1", "go to shelf 1"))
    at_desk = ("a mug 1", ("take mug 1 from desk 1", "go to shelf 1"))
    holding = ("You take the mug 1.", ("put mug 1 in desk 1", "go to shelf 1"))
    shelf, empty = (SHELF, ("put mug 1 in shelf 1", "go to desk 1")), (SHELF, ("go to desk 1",))
    played = [walk(True, room, at_desk, holding, shelf), walk(False, room, empty)]
    by_sight = GraphGPO().step_advantages(pack(played))
    by_state = GraphGPO().step_advantages(pack(played, anchor_by="admissible_actions"))
    assert hidden_states(played) == (2, 6)  # the shelf, seen twice
    # The first turn of each, in the same room: to the desk, and to the shelf.
    assert by_sight[0] < 0 < by_sight[4]
    assert by_state[0] > 0 > by_state[4]
    # Without actions to tell states apart, what is seen does.
    assert hidden_states([walk(True, ("a room", ()))]) == (0, 0)
    bare = [walk(True, *((seen, ()) for seen, _ in (room, at_desk, holding, shelf)))]
    assert anchor_states(bare, by="admissible_actions").tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="allowed: observation, admissible_actions"):
        anchor_states(bare, by="state")
