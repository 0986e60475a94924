import math
from dataclasses import replace
from functools import cache, partial

import pytest
from coin import CoinEnv, CoinExpert, SlowCoin
from tiny_play import PLAIN, TAGGED, LocalPool, Script, coin_task, make_policy, word_tokenizer

from aem_lightning.envs import EnvPool
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    Episode,
    ExpertResponder,
    PromptEncoder,
    RewardShaping,
    Sampling,
    SlotEngine,
    make_groups,
    stable_seed,
)
from aem_lightning.types import EnvStep

LIMITS = {"max_turns": 4, "max_context": 128, "max_new_tokens": 6}


def make_encoder(prompt=PLAIN, memory="transcript"):
    return PromptEncoder(word_tokenizer(), prompt, memory)


def make_collector(encoder, responder, pool=None, rewards=None, **limits):
    pool = pool or LocalPool()
    return Collector(pool, encoder, responder, rewards or RewardShaping(), **{**LIMITS, **limits})


def scripted(*lines, prompt=PLAIN, memory="transcript", task=3, **options):
    """One episode of task 3, whose coin is in the white box."""
    encoder = make_encoder(prompt, memory)
    collector = make_collector(encoder, Script(encoder, *lines), **options)
    return collector.collect([Episode(coin_task(task), 0, 0)])[0]


@pytest.fixture(scope="module")
def sampled():
    """What a random policy plays: tasks 0 to 2 in groups of three, by memory and concurrency."""
    policy = make_policy(awake=True)

    @cache
    def play(memory="transcript", concurrency=64, share=1.0, pool=LocalPool):
        engine, pool = SlotEngine(slots=4, max_length=128, bucket=16), pool()
        engine.sync(policy, 1)
        encoder = PromptEncoder(policy.tokenizer, PLAIN, memory)
        sampling = Sampling(1.0, 4, encoder.stop_ids)
        responder = EngineResponder(engine, sampling, ("test", 0), share)
        limits = {"max_turns": 3, "concurrency": concurrency}
        collector = make_collector(encoder, responder, pool, **limits)
        episodes = make_groups([coin_task(i) for i in range(3)], 3)
        return collector.collect(episodes, seed=5), pool

    return play


def test_a_transcript_is_one_row_and_a_window_one_row_a_turn():
    transcript = scripted("open red box", "open white box")
    assert [len(transcript.rows), len(transcript.turns)] == [1, 2]
    assert [turn.row for turn in transcript.turns] == [0, 0]
    window = scripted("open red box", "open white box", memory="window")
    assert [turn.row for turn in window.turns] == [0, 1]
    assert len(window.rows) == 2


@pytest.mark.parametrize("memory", ["transcript", "window"])
def test_a_turn_points_at_its_own_sampled_ids(memory, sampled):
    encoder = make_encoder()
    for trajectory in sampled(memory)[0]:
        for turn in trajectory.turns:
            ids = trajectory.rows[turn.row][turn.start : turn.start + turn.length]
            assert len(ids) == turn.length == len(turn.entropies)
            assert encoder.decode(ids) == turn.response
            assert (ids[-1] in encoder.stop_ids) == (turn.finish_reason == "stop")


@pytest.mark.parametrize("concurrency", [1, 4])
def test_fewer_episodes_at_once_are_the_same_trajectories(sampled, concurrency):
    everything, _ = sampled()
    few, pool = sampled(concurrency=concurrency)
    assert pool.most_at_once <= concurrency
    for one, other in zip(everything, few, strict=True):
        assert one.rows == other.rows
        # Another batch shape rounds the logits otherwise.
        for turn, same in zip(one.turns, other.turns, strict=True):
            assert turn.logprobs == pytest.approx(same.logprobs, abs=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_turns_without_a_barrier_are_the_same_trajectories(sampled, share):
    barrier, _ = sampled()
    flowing, _ = sampled(share=share)
    assert [one.rows for one in flowing] == [one.rows for one in barrier]


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_delays_of_the_environments_do_not_move_a_bit(sampled, share):
    undisturbed, _ = sampled(share=share)
    pool = partial(EnvPool, SlowCoin, workers=2)
    for _ in range(2):
        trajectories, pool_used = sampled.__wrapped__(share=share, pool=pool)
        pool_used.close()
        assert trajectories == undisturbed


class LateEngine(SlotEngine):
    """Notes, at every look at it, which episodes are in the middle of a response."""

    def submit(self, requests):
        super().submit(requests)
        self.notes.append({self._slots[row].key for row in self._running})


def test_an_episode_goes_on_while_others_are_in_the_middle_of_a_response(sampled, monkeypatch):
    monkeypatch.setattr(LateEngine, "notes", [], raising=False)
    monkeypatch.setattr("test_collector.SlotEngine", LateEngine)
    sampled.__wrapped__(share=0.0)
    assert any(LateEngine.notes)
    LateEngine.notes.clear()
    sampled.__wrapped__(share=1.0)
    assert not any(LateEngine.notes)


class WatchedPool(LocalPool):
    """Counts the decode steps between orders and answers."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.overlaps = engine, []

    def send(self, requests=None, actions=None):
        super().send(requests, actions)
        self.sent_at = self.engine.stats["decode_steps"]

    def receive(self):
        if self.answers:
            self.overlaps.append(self.engine.stats["decode_steps"] - self.sent_at)
        return super().receive()


def test_the_engine_decodes_while_environments_play():
    policy = make_policy(awake=True)
    engine = SlotEngine(slots=8, max_length=128, bucket=16)
    engine.sync(policy, 1)
    encoder, pool = PromptEncoder(policy.tokenizer, PLAIN, "transcript"), WatchedPool(engine)
    ragged = Sampling(1.0, 6, tuple(range(0, len(policy.tokenizer), 3)))
    responder = EngineResponder(engine, ragged, (), share=0.3)
    collector = make_collector(encoder, responder, pool)
    collector.collect(make_groups([coin_task(i) for i in range(2)], 4))
    assert max(pool.overlaps) > 0


def test_the_copies_of_a_group_share_the_environment_seed_and_the_worker(sampled):
    _, pool = sampled()
    requests = {key: (r.task_id, r.seed, r.affinity) for key, r in pool.requests.items()}
    assert len(requests) == 9
    assert len(set(requests.values())) == 3
    assert len({seed for _, seed, _ in requests.values()}) == 3


def test_the_copies_of_a_group_are_sampled_apart(sampled):
    trajectories, _ = sampled()
    assert len({str(trajectory.rows) for trajectory in trajectories[:3]}) > 1


def test_trajectories_come_in_the_order_of_their_episodes(sampled):
    trajectories, _ = sampled(concurrency=4)
    places = [(trajectory.group, trajectory.copy) for trajectory in trajectories]
    assert places == [(group, copy) for group in range(3) for copy in range(3)]


def test_a_win_ends_the_episode_and_frees_its_place():
    encoder, pool = make_encoder(), LocalPool()
    script = Script(encoder, "open white box")
    episode = Episode(coin_task(3), 0, 0)
    trajectory = make_collector(encoder, script, pool).collect([episode])[0]
    assert (trajectory.won, trajectory.score, trajectory.truncated) == (True, 1.0, False)
    assert script.over == ["0/0"]
    assert not pool.envs


def test_max_turns_cuts_an_episode():
    trajectory = scripted("open red box", max_turns=3)
    assert len(trajectory.turns) == 3
    assert trajectory.truncated
    assert not trajectory.won


def test_an_episode_that_outgrows_the_context_is_cut_between_turns():
    whole = scripted("open red box")
    third = whole.turns[2].start
    trajectory = scripted("open red box", max_context=third + LIMITS["max_new_tokens"] - 1)
    assert trajectory.truncated
    assert len(trajectory.turns) == 2
    assert trajectory.rows[0] == whole.rows[0][: len(trajectory.rows[0])]
    enough = scripted("open red box", max_context=third + LIMITS["max_new_tokens"])
    assert len(enough.turns) == 3


def test_an_opening_prompt_that_is_too_long_names_the_task_and_what_to_type():
    with pytest.raises(ValueError, match=r"'train/3' has 10 tokens.*Type max_context=58"):
        scripted("open red box", max_context=12)


def test_malformed_and_inadmissible_responses_are_told_apart():
    lines = ("open red box", "<action>open nothing</action>", "<action>open red box</action>")
    shaping = RewardShaping(success=10, malformed=-1, inadmissible=-2, step=-0.5)
    trajectory = scripted(*lines, prompt=TAGGED, rewards=shaping)
    malformed, inadmissible, valid, _ = trajectory.turns
    assert (malformed.action, malformed.is_valid, malformed.reward) == (None, False, -1.5)
    assert lines[0] in malformed.admissible_actions, "its words are an action, and yet"
    assert (inadmissible.action, inadmissible.is_valid) == ("open nothing", False)
    assert inadmissible.reward == -2.5
    assert (valid.action, valid.is_valid, valid.reward) == ("open red box", True, -0.5)


def test_a_malformed_response_reaches_the_environment_as_its_last_words():
    encoder, pool = make_encoder(TAGGED), LocalPool()
    script = Script(encoder, "find " * 60 + "coin")
    collector = make_collector(encoder, script, pool, max_turns=1, max_context=512)
    collector.collect([Episode(coin_task(3), 0, 0)])
    (sent,) = pool.sent["0/0"]
    assert sent.endswith("find coin")
    assert len(sent) == 200


class BreakingEnv(CoinEnv):
    """Breaks at the second action."""

    def reset(self, **options):
        self.actions = 0
        return super().reset(**options)

    def step(self, action):
        self.actions += 1
        if self.actions < 2:
            return super().step(action)
        return "", 0.0, False, True, {"infra_error": "the worker died"}


class Long(CoinEnv):
    """The first text of one task is too long for any context."""

    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation + " box" * (
            300 if options["options"]["task_id"] == "train/1" else 0
        ), info


@pytest.mark.parametrize("must_fit", [True, False])
def test_a_task_that_does_not_fit_costs_more_than_its_group(must_fit, caplog):
    encoder, pool = make_encoder(), LocalPool(Long)
    script = Script(encoder, "open red box")
    collector = make_collector(encoder, script, pool, must_fit=must_fit)
    played = collector.collect(make_groups([coin_task(i) for i in range(3)], 2))
    assert [len(trajectory.turns) for trajectory in played] == [1, 1, 0, 0, 4, 4]
    assert all("of task 'train/1' has 310 tokens" in t.infra_error for t in played[2:4])
    assert caplog.text.count("Its group is left out") == 1
    assert not pool.envs
    alone = make_groups([coin_task(1)], 2)
    if must_fit:
        with pytest.raises(ValueError, match="Type max_context="):
            collector.collect(alone)
    else:
        assert [t.turns for t in collector.collect(alone)] == [[], []]


class Odd(CoinEnv):
    """Its reward is no number, and it gives one more word with a reason why it is broken."""

    reward = math.nan

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, self.reward, *rest


@pytest.mark.parametrize("reward", [math.nan, -math.inf, None, "1.0"])
def test_a_reward_that_is_no_number_masks_where_it_counts_and_is_not_looked_at_elsewhere(
    reward, monkeypatch
):
    monkeypatch.setattr(Odd, "reward", reward)
    lines = ("open red box", "open white box")
    unused = scripted(*lines, pool=LocalPool(Odd))
    assert (unused.won, unused.total_reward, unused.infra_error) == (True, 10.0, None)
    used = scripted(*lines, pool=LocalPool(Odd), rewards=RewardShaping(environment=1.0))
    assert (
        used.infra_error == f"task 'train/3', turn 0: reward={reward!r}; expected a finite number"
    )
    assert (used.total_reward, len(used.turns)) == (0.0, 1)


def test_an_environment_is_told_whether_its_reward_counts(sampled):
    encoder, pool = make_encoder(), LocalPool()
    for weight in (0.0, 0.5):
        rewards = RewardShaping(environment=weight)
        make_collector(encoder, Script(encoder, "open red box"), pool, rewards).collect(
            make_groups([coin_task(0)], 1)
        )
        assert {r.uses_reward for r in pool.requests.values()} == {bool(weight)}


class BrokenStart(CoinEnv):
    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation, info | {"infra_error": "no sandbox"}


def test_an_episode_that_breaks_as_it_starts_goes_on():
    trajectory = scripted("open red box", pool=LocalPool(BrokenStart))
    assert (trajectory.infra_error, trajectory.turns) == ("no sandbox", [])


def test_what_breaks_an_environment_is_kept_and_ends_the_episode():
    trajectory = scripted("open red box", pool=LocalPool(BreakingEnv))
    assert trajectory.infra_error == "the worker died"
    assert trajectory.truncated
    assert len(trajectory.turns) == 2


class BrokenPool(LocalPool):
    """No episode starts."""

    def reset(self, requests):
        self.envs = dict.fromkeys(requests)
        return {key: EnvStep("", truncated=True, info={"infra_error": "no"}) for key in requests}


def test_an_episode_that_never_starts_has_no_turns():
    trajectory = scripted("open red box", pool=BrokenPool())
    assert trajectory.turns == []
    assert trajectory.infra_error == "no"


@pytest.mark.parametrize("memory", ["transcript", "window"])
def test_an_expert_plays_through_the_prompts_of_the_policy(memory):
    encoder = make_encoder(TAGGED, memory)
    experts = ExpertResponder(encoder, lambda episode: CoinExpert(episode.copy))
    collector = make_collector(encoder, experts)
    straight, detour = collector.collect(make_groups([coin_task(2)], 2))
    assert (straight.won, len(straight.turns)) == (True, 1)
    assert (detour.won, len(detour.turns)) == (True, 2)
    turn = detour.turns[-1]
    assert turn.action == "open green box"
    assert turn.response == "<think></think><action>open green box</action>"
    assert turn.logprobs == [0.0] * turn.length
    assert turn.entropies is None
    again = collector.collect(make_groups([coin_task(2)], 2))
    assert again[1].rows == detour.rows  # finished experts are forgotten


def test_time_with_the_environments_is_counted():
    encoder = make_encoder()
    collector = make_collector(encoder, Script(encoder, "open red box"))
    collector.collect([Episode(coin_task(3), 0, 0)])
    once = collector.environment_seconds
    collector.collect([Episode(coin_task(3), 0, 0)])
    assert collector.environment_seconds > once > 0


def test_a_stable_seed_tells_its_parts_apart():
    assert stable_seed("train", 0, 3) == 6668180174492574407, "the same on every machine"
    seeds = {stable_seed("a", 1), stable_seed("a1"), stable_seed("a", 2), stable_seed(1, "a")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("step", "malformed", "reward"),
    [
        (EnvStep("", info={"won": True}), False, 10.0),
        (EnvStep("", info={"won": False}), False, 0.0),
        (EnvStep("", info={"is_action_valid": False}), False, -0.1),
        (EnvStep("", info={"is_action_valid": False}), True, -0.1),
        (EnvStep("", reward=5.0), False, 0.0),
    ],
)
def test_the_default_rewards_are_the_papers(step, malformed, reward):
    assert RewardShaping()(step, malformed=malformed) == reward


def test_reward_terms_add_up_and_a_malformed_response_is_not_punished_twice():
    shaping = RewardShaping(success=1, environment=2, malformed=-3, inadmissible=-5, step=-0.25)
    won = EnvStep("", reward=0.5, info={"won": True})
    assert shaping(won, malformed=False) == 1.75
    lost = replace(won, info={"is_action_valid": False})
    assert shaping(lost, malformed=True) == -2.25
    assert shaping(lost, malformed=False) == -4.25
