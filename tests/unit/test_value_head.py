"""The value head, and state of the update that a checkpoint must hold."""

from dataclasses import replace

import pytest
import torch
from local_coin import make_agent
from test_agent_module import VariedRewards
from test_agent_module import fit as recorded
from tiny_play import make_policy

from aem_lightning.algorithms import AEM, PPO, AdaptiveEntropy, ClipCov, ClippedLoss, KLCov
from aem_lightning.modules import RolloutSettings, UpdateSettings
from aem_lightning.modules.value import ValueHead


class Rewards(VariedRewards):
    def __call__(self, step, *, malformed):
        return 3.0 + super().__call__(step, malformed=malformed)


def fit(agent, epochs=1):
    return recorded(agent, epochs=epochs).iterations


def ppo_agent(**changes):
    settings = {
        "estimator": PPO(value_clip=100.0),
        "rewards": Rewards(),
        "loss": ClippedLoss(kl_coef=0.0),
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=3e-2),
        "update": UpdateSettings(update_epochs=4, num_minibatches=2, micro_batch_tokens=128),
    }
    return make_agent(**{**settings, **changes})


def test_the_value_head_computes_in_half_precision():
    head = ValueHead(4)
    torch.nn.init.ones_(head.linear.weight)
    hidden = torch.full((3, 4), 0.1001)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden.bfloat16())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, hidden.bfloat16().float().sum(1))


# An update without a policy gradient: the features that the head sees stand still.
STILL = {
    "modulation": lambda batch: replace(AEM()(batch), alpha=torch.zeros_like(batch.entropy)),
    "loss": ClippedLoss(kl_coef=0.0, entropy_coef=1e-30),
}


def test_the_value_head_does_not_learn_the_returns():
    done = fit(ppo_agent(**STILL), epochs=10)
    losses = [iteration.metrics["policy/value_loss"] for iteration in done]
    assert losses[-1] < 0.3 * losses[0]
    first, last = done[0].batch, done[-1].batch
    assert not first.values.any()
    mean = last.value_targets[last.response_index >= 0].mean().item()
    batches = [iteration.batch for iteration in done[-6:]]  # Adam swings about it
    values = torch.cat([batch.values[batch.response_index >= 0] for batch in batches])
    assert values.mean().item() == pytest.approx(mean, rel=0.1)
    assert done[0].advantages.abs().max() > 0


@pytest.mark.parametrize("train_trunk", [False, True])
def test_the_value_loss_reaches_the_adapters_only_when_it_should(train_trunk):
    agent = ppo_agent(
        estimator=PPO(train_trunk=train_trunk, value_clip=100.0),
        **STILL,
    )
    torch.nn.init.ones_(agent.policy.value_head.linear.weight)
    before = {n: p.detach().clone() for n, p in agent.policy.trainable().items()}
    agent._optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    fit(agent)
    moved = {n for n, p in agent.policy.trainable().items() if (p - before[n]).abs().max() > 1e-9}
    assert {"value_head.linear.weight", "value_head.linear.bias"} <= moved
    assert any("lora_" in name for name in moved) == train_trunk


def test_a_checkpoint_leaves_the_value_head_out():
    agent = ppo_agent()
    fit(agent)
    checkpoint = {"state_dict": dict(agent.state_dict())}
    agent.on_save_checkpoint(checkpoint)
    assert "policy.value_head.linear.weight" in checkpoint["state_dict"]
    other = ppo_agent()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=False)
    head, same = agent.policy.value_head, other.policy.value_head
    assert head.linear.weight.abs().max() > 0
    assert torch.equal(head.linear.weight, same.linear.weight)
    with pytest.raises(ValueError, match="do not fit this policy"):
        make_agent().on_load_checkpoint(checkpoint)


def test_other_estimators_get_a_value_head_and_ppo_needs_groups():
    assert make_agent().policy.value_head is None
    single = RolloutSettings(group_size=1, max_turns=2, max_new_tokens=4, max_context=96)
    assert ppo_agent(rollout=single).critic is not None
    assert make_policy().value_head is None


def test_the_adaptive_coefficient_stays_or_is_forgotten_by_a_checkpoint():
    rule = AdaptiveEntropy(target=50.0, step=0.01, maximum=0.1)
    agent = make_agent(rewards=Rewards(), loss=ClippedLoss(adaptive_entropy=rule))
    used = [done.metrics["policy/entropy_coef"] for done in fit(agent, epochs=3)]
    assert used == pytest.approx([0.0, 0.01, 0.02])
    checkpoint = {"state_dict": dict(agent.state_dict())}
    agent.on_save_checkpoint(checkpoint)
    other = make_agent(loss=ClippedLoss(adaptive_entropy=rule))
    other.on_load_checkpoint(checkpoint)
    assert other.entropy_coef == agent.entropy_coef == pytest.approx(0.03)
    typed = make_agent(loss=ClippedLoss(entropy_coef=0.05, adaptive_entropy=rule))
    typed.on_load_checkpoint(checkpoint)
    assert typed.entropy_coef == 0.05  # another start was typed
    del checkpoint["aem_lightning"]["entropy_coef"]  # of an earlier version
    make_agent().on_load_checkpoint(checkpoint)


def test_the_bonus_stays_on_over_the_target():
    rule = AdaptiveEntropy(target=1e-6, step=0.01)
    loss = ClippedLoss(entropy_coef=0.05, adaptive_entropy=rule)
    agent = make_agent(rewards=Rewards(), loss=loss)
    done = fit(agent)[0]
    assert done.metrics["policy/entropy_coef"] == 0.0
    assert agent.entropy_coef == pytest.approx(0.04)
    with pytest.raises(ValueError, match=r"adaptive_entropy\.target=0"):
        AdaptiveEntropy(target=0)


@pytest.mark.parametrize("control", [ClipCov(ratio=0.2, low=0.0), KLCov(ratio=0.2)])
def test_covariance_control_chooses_no_tokens_of_a_real_batch(control):
    agent = make_agent(rewards=Rewards(), loss=ClippedLoss(covariance=control))
    share = fit(agent)[0].metrics["policy/covariance_tokens"]
    assert 0.15 < share <= 0.21 if isinstance(control, KLCov) else 0 < share <= 0.21
