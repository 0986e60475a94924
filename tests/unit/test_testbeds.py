"""The corridor and the bait: their contract, and who is imitated there."""

from __future__ import annotations

from collections import Counter

import pytest

from aem_lightning.datamodules import BaitDataModule, CorridorDataModule
from aem_lightning.datamodules.testbeds import CODE, RIGHT, ROOMS, VERBS, signs_of
from aem_lightning.envs.check import check_env


def play(data, task, actions):
    """The last answer, and the sum of rewards, of an episode."""
    env = data.env_factory()()
    env.reset(options={"task_id": task})
    total = 0.0
    for action in actions:
        observation, reward, terminated, _, info = env.step(action)
        total += reward
        if terminated:
            return observation, total, info
    raise AssertionError("the episode goes on")


@pytest.mark.parametrize("data", [CorridorDataModule(), BaitDataModule(bait=0.5)])
def test_a_testbed_keeps_the_contract(data):
    check_env(data, resets=0)


def test_every_corridor_has_eight_turns_and_its_signs_decide():
    task = "1-push-6-lift"
    right = [signs_of(task).get(room, "slide") for room in range(ROOMS)]
    assert play(CorridorDataModule(), task, right)[2]["won"]
    for room, won in ((1, False), (2, True), (6, False)):
        actions = [*right]
        actions[room] = "pull"
        assert play(CorridorDataModule(), task, actions)[2]["won"] is won
    assert not play(CorridorDataModule(), task, [*right[:-1], "sing"])[2]["won"]


def test_the_bait_pays_less_than_the_code():
    data = BaitDataModule(bait=0.4)
    assert play(data, "red-blue", ["leave"])[1:][0] == 0.4
    assert play(data, "red-blue", CODE)[1] == 1.0
    assert play(data, "red-blue", CODE[:1] + CODE[:1])[1] == 0.0
    assert play(data, "red-blue", ["push"])[1] == 0.0


@pytest.mark.parametrize("variant", ["confident", "uncertain"])
def test_the_player_is_sure_where_its_variant_says(variant):
    player = CorridorDataModule(variant=variant).make_expert(None, seed=0)
    said = {
        text: Counter(player.act(text, VERBS) for _ in range(2000))
        for text in ("the sign says lift .", "there is no sign .")
    }
    sign, free = said.values()
    assert sign["lift"] / 2000 == pytest.approx(RIGHT[variant], abs=0.04)
    assert len(sign) == (2 if variant == "confident" else 4)
    assert len(free) == (4 if variant == "confident" else 1)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: CorridorDataModule(variant="sure"), r"datamodule\.variant=sure"),
        (lambda: BaitDataModule(bait=1.0), r"datamodule\.bait=1\.0"),
        (lambda: BaitDataModule(variant="confident"), r"datamodule\.variant=confident"),
    ],
)
def test_what_is_no_testbed_is_refused(make, key):
    with pytest.raises(ValueError, match=key):
        make()
