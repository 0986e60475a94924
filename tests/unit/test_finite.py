"""A number that is infinite or none at all is named where it came up, and kept."""

from __future__ import annotations

import logging
import math

import lightning as L
import pytest
import torch
from local_coin import local_data, make_agent, make_trainer
from omegaconf import OmegaConf
from runs import toy_config, toy_overrides
from tiny_play import make_policy

from aem_lightning.algorithms import GRPO, PPO, RLOO, ClippedLoss, GiGPO, Modulated, ReinforcePP
from aem_lightning.analysis.batch import batch as compute_again
from aem_lightning.functional import grpo_advantages
from aem_lightning.rollout import NotFiniteError
from aem_lightning.runner import train


class Rewards:
    """The rewards of a run, counted from 1."""

    def __init__(self, reward):
        self.reward, self.count = reward, 0

    def __call__(self, step, *, malformed):
        self.count += 1
        return self.reward(self.count)


class At(L.Callback):
    """Does something to the agent before an iteration."""

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.iteration == self.iteration:
            self.act(pl_module)


class BrokenAlpha:
    """A modulation whose seventh coefficient is no number."""

    keeps_zeros = True

    def __call__(self, batch):
        alpha = torch.ones_like(batch.entropy)
        alpha[6] = math.nan
        return Modulated(alpha, 0.0)


def varied(count):
    return (count * 7 % 5) / 5


def broken(iterations=3, callbacks=(), **parts):
    """The error that a run ends with."""
    agent = make_agent(**{"rewards": Rewards(varied), **parts})
    trainer = make_trainer(callbacks=list(callbacks), epochs=iterations, limit_val_batches=0)
    with pytest.raises(NotFiniteError) as caught:
        trainer.fit(agent, datamodule=local_data())
    assert "ckpt_path=last" not in str(caught.value)  # there is no checkpoint
    return caught.value


def poison_adapters(agent):
    with torch.no_grad():
        next(iter(agent.policy.trainable().values())).view(-1)[0] = math.nan


def poison_base(agent):
    with torch.no_grad():
        agent.policy.causal_lm.get_output_embeddings().weight.view(-1)[5] = math.inf


def adamw(**changes):
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-3, **changes})


@pytest.mark.parametrize(
    ("parts", "stage", "tensor", "told"),
    [
        ({"rewards": Rewards(lambda n: math.nan if n == 20 else n % 3)}, "reward", "reward", "env"),
        ({"rewards": Rewards(lambda n: 1e39 * (n % 2))}, "reward", "reward", "stage=check"),
        (
            {"rewards": Rewards(lambda n: 1e38 * (n % 2)), "estimator": RLOO()},
            "update",
            "loss or gradient norm",  # whichever sum is too large first
            "smaller rewards",
        ),
        ({"modulation": BrokenAlpha()}, "modulation", "alpha", "modulation=none"),
        ({"loss": ClippedLoss(entropy_coef=3e38)}, "update", "loss", "loss.entropy_coef=3e+38"),
        (
            {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e30)},
            "update",
            "loss",
            "lower optimizer.lr",
        ),
    ],
)
def test_a_number_reaches_the_weights_or_is_not_named(parts, stage, tensor, told):
    error = broken(**parts)
    assert error.stage == stage
    assert error.tensor in tensor.split(" or ")
    assert error.place.startswith("episode ")
    assert "(task 'train/" in error.place
    assert ", turn " in error.place
    assert told in error.advice
    assert ("optimizer.lr" in error.advice) == (told == "lower optimizer.lr")
    assert {"input_ids", "returns", "episodes"} <= set(error.kept)


@pytest.mark.parametrize(
    ("parts", "stage", "tensor", "told"),
    [
        ({"callbacks": [At(2, poison_adapters)]}, "start", "weight ", "none did it"),
        ({"optimizer": adamw(eps=0.0)}, "update", "weight ", "optimizer.eps=1e-8"),
        ({"optimizer": adamw(lr=math.inf)}, "update", "weight ", "optimizer.lr=inf is too high"),
        ({"callbacks": [At(1, poison_base)]}, "rollout", "logits", "policy.dtype=float32"),
    ],
)
def test_weights_that_are_no_numbers_are_played_or_saved(parts, stage, tensor, told):
    error = broken(policy=make_policy(), **parts)  # of new adapters many gradients are 0
    assert error.stage == stage
    assert error.tensor.startswith(tensor)
    assert told in str(error)
    assert ("task" in error.place) == (stage == "rollout")


def test_the_place_is_that_of_another_response():
    rewards = Rewards(lambda count: math.nan if count == 20 else count % 3)
    agent = make_agent(rewards=rewards)
    seen = {}
    observe = rewards.reward

    def watched(count):
        seen[count] = observe(count)
        return seen[count]

    rewards.reward = watched
    trainer = make_trainer(epochs=3, limit_val_batches=0)
    with pytest.raises(NotFiniteError) as caught:
        trainer.fit(agent, datamodule=local_data())
    kept = caught.value.kept
    (response,) = kept["reward"].isnan().nonzero()[:, 0].tolist()
    task, group, copy = kept["episodes"][int(kept["trajectory"][response])]
    turn = int(kept["turn"][response])
    assert f"episode {group}/{copy} (task {task!r}), turn {turn}" in str(caught.value)


@pytest.mark.parametrize("estimator", [GRPO(), GiGPO(), ReinforcePP()])
def test_huge_rewards_are_called_uniform(estimator):
    agent = make_agent(rewards=Rewards(lambda count: 1e37 * (count * 7 % 5)), estimator=estimator)
    make_trainer(limit_val_batches=0).fit(agent, datamodule=local_data())
    assert agent.iteration == 1


def test_advantages_of_huge_returns_are_those_of_small_ones():
    small, group = torch.tensor([1.0, 0.0, 0.0, 3.0]), torch.zeros(4, dtype=torch.long)
    for scale in (1e16, 1e38):
        torch.testing.assert_close(
            grpo_advantages(scale * small, group), grpo_advantages(small, group, eps=0.0)
        )


def test_a_value_head_that_is_no_number_is_trained():
    def poison(agent):
        with torch.no_grad():
            next(agent.policy.value_head.parameters()).fill_(math.nan)

    error = broken(estimator=PPO(), callbacks=[At(1, poison)])
    assert "value_head" in error.tensor


LOCAL = ("datamodule._target_=local_coin.LocalCoin", "evaluate=false", "preflight=false")


def test_a_broken_batch_is_lost_or_shows_something_else(toy_model, tmp_path, caplog):
    wishes = ("optimizer.lr=1e30", "rewards.malformed=-0.3", "rollout_journal=false")
    cfg = toy_config(tmp_path, toy_model, *LOCAL, *wishes)
    with pytest.raises(NotFiniteError) as caught:
        train(cfg)
    (file,) = tmp_path.glob("not_finite_0_0.pt")
    assert torch.load(file, weights_only=True)["said"] == str(caught.value)
    notes = "\n".join(caught.value.__notes__)
    assert f"aem_lightning.analysis batch file={file}" in notes
    assert "no checkpoint yet" in notes
    assert not list(tmp_path.glob("checkpoints/*"))
    with pytest.raises(NotFiniteError) as again, caplog.at_level(logging.INFO):
        compute_again(OmegaConf.create({"file": str(file)}))
    assert again.value.tensor == caught.value.tensor
    assert again.value.place == caught.value.place


def test_strict_ends_with_status_0(command, toy_model, tmp_path):
    toy = [*toy_overrides(tmp_path, toy_model), *LOCAL, "optimizer.lr=0"]
    ended = command("train.py", *toy, "strict=true")
    assert ended.status == 4, ended.said
    assert ended.said.count("verdict learning_rate_zero") == 1
    (summary,) = tmp_path.glob("logs/*/*/summary.json")
    found = OmegaConf.load(summary)
    assert found.verdict.name == "learning_rate_zero"
    assert found.iterations == 1
    refused = command("train.py", *toy, "strict=true", "callbacks=null")
    refused.assert_clear("strict=true", "callbacks=default")
