import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from local_coin import local_data, make_agent, make_trainer
from runs import Keep
from tiny_play import LocalPool, make_policy

from aem_lightning.algorithms import (
    AEM,
    EMPG,
    PPO,
    AdaptiveEntropy,
    ClipCov,
    ClippedLoss,
    GiGPO,
    ReinforcePP,
)
from aem_lightning.callbacks import AEMMonitor, Progress
from aem_lightning.modules import Lora, Policy, RolloutSettings, UpdateSettings, reporting
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.reporting import environment_metrics, rollout_metrics
from aem_lightning.modules.scoring import score_rows
from aem_lightning.modules.timing import STAGES, Stopwatch
from aem_lightning.rollout import RewardShaping, SlotEngine, pack
from aem_lightning.types import EnvStep, Iteration, Task, Trajectory, Turn

ALWAYS_EQUAL = RewardShaping(success=0.0, malformed=0.0, inadmissible=0.0)


class Recorder(Keep):
    """Keeps what steps return and what metrics are logged."""

    def __init__(self):
        super().__init__()
        self.logged, self.validated = [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.validated += outputs["trajectories"]


class ListLogger:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, metrics))


class BlindEngine(SlotEngine):
    """An engine that cannot see entropies."""

    def poll(self, wait_all=False, at_least=1):
        return [replace(result, entropies=None) for result in super().poll(wait_all, at_least)]


class VariedRewards:
    """A random policy hardly ever wins: rewards that differ between the copies of a group."""

    def __call__(self, step, *, malformed):
        self.count = getattr(self, "count", 0) + 1
        return (self.count * 7 % 5) / 5


def fit(agent, **options):
    recorder, logger = Recorder(), ListLogger()
    type(agent).loggers = property(lambda self: [logger])
    try:
        data, trainer = local_data(), make_trainer(callbacks=[recorder], **options)
        trainer.fit(agent, datamodule=data)
    finally:
        del type(agent).loggers
    recorder.logged = logger.lines
    recorder.trainer = trainer
    return recorder


def test_validation_and_training_share_one_cache_inside_autocast(monkeypatch):
    models = []
    sync = SlotEngine.sync

    def keeps(engine, policy, version):
        sync(engine, policy, version)
        models.append(engine._model)

    monkeypatch.setattr(SlotEngine, "sync", keeps)
    fit(make_agent(), epochs=2, precision="bf16-mixed")
    assert len(models) == 4
    assert len({id(model.cache) for model in models}) == 1


def weights(agent):
    return {name: value.detach().clone() for name, value in agent.policy.trainable().items()}


@pytest.fixture(scope="module")
def trained():
    """Two iterations, with everything that happened."""
    agent = make_agent(rewards=VariedRewards())
    before = weights(agent)
    return agent, before, fit(agent, epochs=2)


def test_an_iteration_plays_whole_groups_and_moves_the_adapters(trained):
    agent, before, recorder = trained
    first, second = recorder.iterations
    assert [first.index, second.index] == [0, 1]
    assert agent.iteration == 2
    assert len(first.trajectories) == 8
    assert [t.group for t in first.trajectories] == [0] * 4 + [1] * 4
    after = weights(agent)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    frozen = dict(make_policy(awake=True).named_parameters())
    for name, parameter in agent.policy.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])


def test_an_iteration_says_what_it_did(trained):
    _, _, recorder = trained
    done = recorder.iterations[0]
    assert isinstance(done, Iteration)
    assert done.skipped is None
    assert done.advantages.shape == done.alpha.shape == (done.batch.num_responses,)
    assert done.entropy_source == "engine"
    assert done.batch.ref_logprobs is not None
    assert done.seconds["rollout"] >= done.seconds["environment"] > 0
    assert all(done.seconds[name] > 0 for name in ("old_logprobs", "ref_logprobs", "update"))
    assert {"policy/surrogate", "policy/grad_norm", "policy/ref_kl"} <= set(done.metrics)


def test_metrics_are_logged_against_iterations_and_not_optimizer_steps(trained):
    _, _, recorder = trained
    assert [step for step, _ in recorder.logged] == [0, 1]
    assert recorder.trainer.global_step == 4
    _, metrics = recorder.logged[0]
    assert metrics["policy/lr"] == 1.0
    assert metrics["rollout/turns"] == 2.0
    assert 0 <= metrics["train/success_rate"] <= 1


def test_validation_plays_its_tasks_and_logs_their_success(trained):
    _, _, recorder = trained
    assert len(recorder.validated) == 4
    assert {t.task.split for t in recorder.validated} == {"valid_seen", "valid_unseen"}
    assert float(recorder.trainer.callback_metrics["val/episodes"]) == 2


def test_the_scored_log_probabilities_are_those_of_the_engine(trained):
    _, _, recorder = trained
    done = recorder.iterations[0]
    turns = [turn for trajectory in done.trajectories for turn in trajectory.turns]
    for r, turn in enumerate(turns):
        scored = done.batch.old_logprobs[done.batch.response_index == r]
        torch.testing.assert_close(scored, torch.tensor(turn.logprobs), atol=1e-4, rtol=0)


def test_a_batch_of_uniform_groups_is_skipped_knowingly():
    agent = make_agent(rewards=ALWAYS_EQUAL)
    before = weights(agent)
    recorder = fit(agent)
    done = recorder.iterations[0]
    assert "uniform" in done.skipped
    assert done.metrics == {}
    assert recorder.logged[0][1]["rollout/skipped_update"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in weights(agent).items())


def test_an_entropy_bonus_is_reason_enough_for_an_update():
    agent = make_agent(rewards=ALWAYS_EQUAL, loss=ClippedLoss(entropy_coef=0.1, kl_coef=0.0))
    done = fit(agent).iterations[0]
    assert done.skipped is None
    assert done.batch.ref_logprobs is None


def test_one_optimizer_step_needs_no_second_pass():
    agent = make_agent(rewards=VariedRewards(), update=UpdateSettings(num_minibatches=1))
    done = fit(agent).iterations[0]
    assert done.seconds["old_logprobs"] == 0
    assert done.metrics["policy/approx_kl"] == 0
    assert done.metrics["policy/clip_fraction"] == 0


def test_entropies_that_the_engine_cannot_see_come_from_the_trainer():
    agents = []
    for engine in (SlotEngine, BlindEngine):
        made = engine(slots=8, max_length=96, bucket=32)
        agents.append(fit(make_agent(engine=made, rewards=VariedRewards())).iterations[0])
    seen, blind = agents
    assert [seen.entropy_source, blind.entropy_source] == ["engine", "trainer"]
    torch.testing.assert_close(seen.batch.entropy, blind.batch.entropy, atol=1e-4, rtol=0)
    # α is a function of entropies over their range in the group, and groups under 0.1 are gated.
    torch.testing.assert_close(seen.alpha, blind.alpha, atol=2e-4 / 0.1, rtol=0)


def test_a_scheduler_moves_once_an_iteration():
    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    agent = make_agent(rewards=VariedRewards(), scheduler=halve)
    recorder = fit(agent, epochs=3)
    assert [metrics["policy/lr"] for _, metrics in recorder.logged] == [1.0, 0.5, 0.25]


def test_a_group_too_small_to_compare_says_what_to_type():
    with pytest.raises(ValueError, match=r"group_size=1 is too small for GRPO.*group_size=8"):
        make_agent(rollout=RolloutSettings(group_size=1))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    agent = make_agent(rewards=VariedRewards())
    before = weights(agent)
    adapter = next(iter(agent.policy.trainable().values()))
    adapter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match=r"gradient norm of iteration 0 is nan.*optimizer\.lr"):
        fit(agent, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in weights(agent).items())


def test_an_evaluation_collects_every_episode():
    agent = make_agent()
    make_trainer().test(agent, datamodule=local_data(), verbose=False)
    ids = [trajectory.task.id for trajectory in agent.tested]
    assert sorted(ids) == sorted(
        f"{split}/{i}" for split in ("valid_seen", "valid_unseen") for i in range(4)
    )


def test_a_checkpoint_holds_the_adapters_alone_and_fits_only_the_same_ones():
    agent = make_agent()
    agent.iteration, agent.config = 7, {"seed": 1}
    checkpoint = {"state_dict": dict(agent.state_dict())}
    agent.on_save_checkpoint(checkpoint)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    same = make_agent()
    same.on_load_checkpoint(checkpoint)
    assert same.iteration == 7
    policy = make_policy(lora=False)
    other = make_agent(Policy(policy.causal_lm, policy.tokenizer, Lora(r=3, alpha=4)))
    with pytest.raises(ValueError, match=r"adapters do not fit.*policy\.lora"):
        other.on_load_checkpoint(checkpoint)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token():
    agent = make_agent()
    assert agent.encoder.pad_id == agent.policy.tokenizer.pad_token_id
    agent.policy.tokenizer.pad_token = None
    assert agent.encoder.pad_id == agent.policy.tokenizer.eos_token_id


def test_rows_are_scored_the_same_in_any_micro_batches(trained):
    agent, _, recorder = trained
    batch = recorder.iterations[0].batch
    rows = range(len(batch.input_ids))
    together, apart = (
        score_rows(agent.policy, batch, [rows], 1.0, TokenBudget(tokens, packed=False))
        for tokens in (100_000, 1)
    )
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        assert not one[batch.response_index < 0].any()


def test_the_iterations_scalars_are_rates_over_episodes_and_turns(trained):
    _, _, recorder = trained
    done = recorder.iterations[0]
    turns = [turn for t in done.trajectories for turn in t.turns]
    malformed = sum(turn.action is None for turn in turns[1:]) + 1
    turns[0].action, turns[0].malformed = None, "missing argument 'action'"
    metrics = rollout_metrics(done)
    assert metrics["rollout/malformed_rate/missing_argument"] == 1 / len(turns)
    assert metrics["rollout/malformed_rate"] == malformed / len(turns)
    assert metrics["rollout/infra_errors"] == 0.0
    assert metrics["rollout/truncated_rate"] == sum(t.truncated for t in done.trajectories) / 8
    tokens = sum(turn.length for turn in turns)
    assert metrics["rollout/response_tokens"] == tokens / len(turns)
    mean = sum(sum(turn.entropies) for turn in turns) / tokens
    assert metrics["rollout/entropy"] == pytest.approx(mean, rel=1e-5)


def test_a_rank_without_a_kind_of_malformed_response_has_none_of_it(monkeypatch):
    kind = "rollout/malformed_rate/no_call"
    one = {kind: (1, 2), reporting.MALFORMED: (1, 2), "train/return": (4.0, 2)}
    found = [(one, {"rollout/groups_played": 1.0}), ({reporting.MALFORMED: (0, 6)}, {})]
    monkeypatch.setattr(reporting, "of_each_rank", lambda mine: found)
    assert reporting.over_ranks({}, {}) == {
        kind: 0.125,
        reporting.MALFORMED: 0.125,
        "train/return": 2.0,
        "rollout/groups_played": 1.0,
    }


def test_a_broken_copy_is_in_no_rate_and_mixes_no_group():
    def copy(number, won, broken=None):
        turn = Turn("o", (), "r", "r", 0, 1, [-0.5], [0.5], reward=10.0 * won)
        task = Task("t")
        return Trajectory(task, 0, number, [turn], [[1, 2]], won=won, infra_error=broken)

    def found(*trajectories):
        batch = pack(trajectories)
        zeros = torch.zeros(len(trajectories))
        return rollout_metrics(Iteration(0, trajectories, batch, zeros, zeros, 0.0, {}, {}))

    metrics = found(copy(0, True), copy(1, True), copy(2, False, "the server went away"))
    whole = found(copy(0, True), copy(1, True))
    assert metrics == whole | {"rollout/infra_errors": 1.0}
    assert (metrics["train/success_rate"], metrics["train/return"]) == (1.0, 10.0)
    assert metrics["rollout/mixed_groups"] == 0.0
    assert found(copy(0, True), copy(1, False), copy(2, True))["rollout/mixed_groups"] == 1.0
    nothing = found(copy(0, True, "gone"))
    assert "train/success_rate" not in nothing
    assert nothing["rollout/infra_errors"] == 1.0


class Down(LocalPool):
    """Everything breaks, as it starts or at the first action."""

    at_start = True

    def reset(self, requests):
        steps = super().reset(requests)
        return dict.fromkeys(steps, self.GONE) if self.at_start else steps

    def step(self, actions):
        return dict.fromkeys(actions, self.GONE)

    GONE = EnvStep("", truncated=True, info={"infra_error": "no docker"})


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"estimator": PPO()},
        {"estimator": GiGPO(), "modulation": AEM(scope="batch", direction="shuffled")},
        {"modulation": EMPG(), "estimator": ReinforcePP()},
        {"loss": ClippedLoss(adaptive_entropy=AdaptiveEntropy(1.0), covariance=ClipCov())},
    ],
    ids=["grpo", "ppo", "gigpo", "empg", "loss"],
)
def test_an_iteration_and_a_validation_in_which_all_broke_end_the_run(
    parts, at_start, caplog, monkeypatch
):
    monkeypatch.setattr(Down, "at_start", at_start)
    agent = make_agent(**parts)
    before = {name: p.clone() for name, p in agent.policy.trainable().items()}
    data, keep = local_data(), Keep()
    data.__dict__["_local"] = Down()
    progress = Progress()
    with caplog.at_level("INFO"):
        trainer = make_trainer(callbacks=[keep, progress, AEMMonitor()], epochs=2)
        trainer.fit(agent, datamodule=data)
    assert agent.iteration == 2
    assert [i.skipped for i in keep.iterations] == 2 * ["all 8 episodes broke, the last: no docker"]
    assert caplog.text.count("no update: all 8 episodes broke, the last: no docker") == 2
    assert "There is nothing to judge: all 2 episodes broke, the last: no docker" in caplog.text
    assert math.isnan(trainer.callback_metrics["val/success_rate"])
    for name, parameter in agent.policy.trainable().items():
        assert torch.equal(before[name], parameter), name


@pytest.mark.parametrize(
    ("counted", "told"),
    [
        ({"cache_hits": 3, "cache_misses": 1}, {"rollout/environment_cache_hits": 0.75}),
        ({"graded": 4, "tampered": 1}, {"rollout/tampered": 0.25}),
        ({"other": 3}, {}),
    ],
)
def test_shares_are_reported_of_what_environments_count(counted, told):
    assert environment_metrics(SimpleNamespace(counters=lambda: counted)) == told
    assert environment_metrics(SimpleNamespace()) == {}


def test_the_stopwatch_adds_up_by_stage():
    watch = Stopwatch(torch.device("cpu"))
    with watch("update"):
        sum(range(1000))
    once = watch.seconds["update"]
    with watch("update"):
        sum(range(1000))
    watch.add("environment", 2.0)
    assert watch.seconds["update"] > once > 0
    assert watch.seconds["environment"] == 2.0
    assert tuple(watch.seconds) == STAGES


def test_only_parameters_that_train_reach_the_optimizer():
    given = []
    agent = make_agent(optimizer=lambda parameters: given.extend(parameters) or SimpleNamespace())
    agent.configure_optimizers()
    assert {id(p) for p in given} == {id(p) for p in agent.policy.trainable().values()}
