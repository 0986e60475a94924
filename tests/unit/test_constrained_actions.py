"""Constrained decoding: what is drawn is admissible, what is recorded is the policy's own."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
import torch
from tiny_play import (
    PLAIN,
    TAGGED,
    LocalPool,
    byte_tokenizer,
    coin_task,
    make_policy,
    word_tokenizer,
)

from aem_lightning.metrics import EpisodeMetrics
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    PromptEncoder,
    Request,
    RewardShaping,
    Sampling,
    SlotEngine,
    make_groups,
)
from aem_lightning.rollout.constraint import PlainActions, TaggedActions
from aem_lightning.rollout.sampling import allowed_tokens, draw
from aem_lightning.rollout.vllm_engine import completion_request
from aem_lightning.types import EnvStep

ACTIONS = ("open red box", "open blue box", "find the coin")
STEP = EnvStep("", info={"admissible_actions": ACTIONS})


@pytest.fixture(scope="module")
def policy():
    return make_policy(awake=True)


def play(policy, action, temperature=1.0):
    encoder = PromptEncoder(policy.tokenizer, PLAIN, "transcript", action=action)
    engine = SlotEngine(slots=8, max_length=128, bucket=32)
    engine.sync(policy, 0)
    sampling = Sampling(temperature, 6, encoder.stop_ids)
    responder = EngineResponder(engine, sampling, ("test",))
    collector = Collector(LocalPool(), encoder, responder, RewardShaping(), 3, 128, 6)
    return collector.collect(make_groups([coin_task(number) for number in range(3)], 4))


def rates(trajectories):
    metric = EpisodeMetrics()
    metric.update(trajectories)
    values = metric.compute()
    return values["malformed_rate"].item(), values["inadmissible_rate"].item()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_constrained_policy_plays_admissible_actions_alone(policy, temperature):
    trajectories = play(policy, "constrained", temperature)
    assert rates(trajectories) == (0.0, 0.0)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    assert {turn.finish_reason for turn in turns} == {"stop"}
    assert all(turn.action in turn.admissible_actions for turn in turns)
    if temperature:
        assert len({turn.action for turn in turns}) == 4


def test_both_rates_are_logged_of_a_free_policy(policy):
    assert sum(rates(play(policy, "free"))) > 0.9


def test_what_a_constrained_engine_records_is_what_the_update_will_score(policy):
    """So the importance ratio is 1 before the first step, as with free actions."""
    turns = 0
    for trajectory in play(policy, "constrained"):
        for turn in trajectory.turns:
            row = torch.tensor([trajectory.rows[turn.row]])
            mask = torch.zeros_like(row, dtype=torch.bool)
            mask[0, turn.start : turn.start + turn.length] = True
            with torch.no_grad():
                logprobs, entropies = policy.score(row, mask)
            torch.testing.assert_close(torch.tensor(turn.logprobs), logprobs, rtol=0, atol=2e-5)
            torch.testing.assert_close(torch.tensor(turn.entropies), entropies, rtol=0, atol=2e-5)
            assert sum(turn.logprobs) < -1  # a forced token is not certain to the policy
            turns += 1
    assert turns > 12


def test_a_free_request_draws_the_same_beside_a_constrained_one(policy):
    encoder = PromptEncoder(policy.tokenizer, PLAIN, action="constrained")
    prompt = encoder.first(EnvStep("A coin glints near the red box ."))
    sampling = Sampling(1.0, 6, encoder.stop_ids)
    free = Request("free", prompt, sampling, 3)
    bound = Request("bound", prompt, sampling, 3, encoder.constraint(STEP))
    engine = SlotEngine(slots=2, max_length=64, bucket=32)
    engine.sync(policy, 0)
    engine.submit([free])
    (alone,) = engine.poll(wait_all=True)
    engine.close("free")
    engine.submit([free, bound])
    beside = {result.key: result for result in engine.poll(wait_all=True)}
    assert beside["free"].tokens == alone.tokens
    assert beside["bound"].tokens != alone.tokens


def test_draws_follow_the_policy_given_what_is_allowed():
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]]).expand(4000, 4)
    allowed = allowed_tokens([[0, 2]] * 4000, logits)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs, entropies = draw(logits, torch.ones(4000), uniforms, allowed)
    share = torch.bincount(tokens, minlength=4) / 4000
    expected = torch.tensor([2.0, 0.0]).softmax(0)
    torch.testing.assert_close(share[[0, 2]], expected, rtol=0, atol=1e-3)
    everything = torch.distributions.Categorical(logits=logits[0])
    torch.testing.assert_close(logprobs, everything.log_prob(tokens))
    torch.testing.assert_close(entropies[0], everything.entropy())


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_an_allowed_token_of_no_probability_is_drawn_all_the_same(temperature):
    logits = torch.tensor([[0.0, 300.0, -50.0]])
    allowed = allowed_tokens([[0, 2]], logits)
    uniform = torch.tensor([0.5], dtype=torch.float64)
    tokens, logprobs, _ = draw(logits, torch.tensor([temperature]), uniform, allowed)
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(-300)


def spell(encoder, constraint, beginning, seed):
    """A response that begins with given words and goes on with allowed tokens, or with noise."""
    rng, cursor = random.Random(seed), constraint.begin()
    tokens = list(encoder.tokenizer(beginning, add_special_tokens=False).input_ids)
    for token in tokens:
        assert cursor.allowed() is None or token in cursor.allowed()
        cursor.take(token)
    while tokens[-1] not in encoder.stop_ids and len(tokens) < 200:
        choices = cursor.allowed()
        if choices is None:
            return tokens, False
        tokens.append(rng.choice(choices))
        cursor.take(tokens[-1])
    return tokens, True


def tagged_encoder(tokenizer):
    return PromptEncoder(tokenizer, TAGGED, action="constrained")


BYTES, WORDS = tagged_encoder(byte_tokenizer()), tagged_encoder(word_tokenizer())


@pytest.mark.parametrize(
    ("encoder", "beginning"),
    [
        (BYTES, "<think>find the coin</think><action>"),
        (WORDS, "<think>find the coin</think><action>"),
        (BYTES, "<think><action>find</action></think><action>"),
        (WORDS, "<think><action>find</action></think><action>"),
        (BYTES, "<action>open"),
        (WORDS, "<action>open"),
    ],
)
def test_behind_an_action_tag_only_admissible_actions_can_be_spelt(encoder, beginning):
    constraint = encoder.constraint(STEP)
    spelt = set()
    for seed in range(12):
        tokens, is_bound = spell(encoder, constraint, beginning, seed)
        assert is_bound
        spelt.add(encoder.prompt.parse(encoder.decode(tokens)))
    begun = beginning.rpartition("<action>")[2].strip()
    assert spelt == {action for action in ACTIONS if action.startswith(begun)}


@pytest.mark.parametrize("encoder", [BYTES, WORDS])
@pytest.mark.parametrize("beginning", ["<think>find", "<think><action>"])
def test_thoughts_stay_free(encoder, beginning):
    _, is_bound = spell(encoder, encoder.constraint(STEP), beginning, 0)
    assert not is_bound


@pytest.mark.parametrize(
    ("token", "rest"),
    [(">op", "en red box</action>"), (">fly", None), ("> ", "open red box</action>")],
)
def test_a_token_that_reaches_over_the_tag_is_gone_on_from(token, rest):
    """Merges know no tags: what a token spells of an action already is not spelt again."""
    words = ["<think></think><action", token, "end"]
    actions = TaggedActions(
        ("open red box",),
        encode=lambda text: [words.append(text) or len(words) - 1],
        decode=lambda tokens: "".join(words[token] for token in tokens),
        stop_ids=(2,),
    )
    cursor = actions.begin()
    for token_id in (0, 1):
        assert cursor.allowed() is None
        cursor.take(token_id)
    if rest is None:
        assert cursor.allowed() is None
    else:
        assert cursor.allowed() == [3]
        assert words[3] == rest
        cursor.take(3)
        assert cursor.allowed() == [2]


def test_an_environment_that_lists_no_actions_stays_free(policy):
    encoder = PromptEncoder(policy.tokenizer, PLAIN, action="constrained")
    assert encoder.constraint(EnvStep("")) is None
    assert PromptEncoder(policy.tokenizer, PLAIN).constraint(STEP) is None


@pytest.mark.parametrize(
    ("action", "is_free"),
    [("search[<your query>]", True), ("click[< prev]", False), ("click[next >]", False)],
)
def test_an_action_with_a_blank_to_fill_in_leaves_its_turn_free(policy, action, is_free):
    encoder = PromptEncoder(policy.tokenizer, PLAIN, action="constrained")
    step = EnvStep("", info={"admissible_actions": (*ACTIONS, action)})
    assert (encoder.constraint(step) is None) == is_free


def test_a_mode_of_actions_that_does_not_exist_is_refused(policy):
    with pytest.raises(ValueError, match="allowed: action=free, action=constrained"):
        PromptEncoder(policy.tokenizer, PLAIN, action="bound")


def test_a_vllm_server_is_asked_for_the_same_limits(policy):
    plain = PlainActions(ACTIONS, ((1,), (2,), (3,)))
    tagged = TaggedActions(ACTIONS, list, str, (0,))
    sampling = Sampling(1.0, 6, (7,))
    bodies = [
        completion_request(Request("a", [1], sampling, 0, constraint), "model")
        for constraint in (None, plain, tagged)
    ]
    assert "structured_outputs" not in bodies[0]
    assert bodies[1]["structured_outputs"] == {"choice": list(ACTIONS)}
    pattern = bodies[2]["structured_outputs"]["regex"]
    assert re.fullmatch(pattern, "<think>a\nb</think><action>open red box</action>")
    assert not re.fullmatch(pattern, "<think></think><action>open the box</action>")


def test_a_penalty_that_rewards_is_refused():
    with pytest.raises(ValueError, match=r"rewards\.malformed=0\.1 would reward .*malformed=-0\.1"):
        RewardShaping(malformed=0.1)
    with pytest.raises(ValueError, match=r"rewards\.success=nan: a finite number"):
        RewardShaping(success=float("nan"))


@pytest.mark.parametrize(
    ("name", "won", "malformed", "idle"),
    [
        ("paper", 10.0, -0.1, 0.0),
        ("passthrough", 0.5, 0.0, 0.0),
        ("success_only", 1.0, 0.0, 0.0),
        ("passthrough rewards.malformed=-0.1 rewards.step=-0.01", 0.49, -0.11, -0.01),
    ],
)
def test_every_preset_of_rewards_gives_what_its_comment_says(name, won, malformed, idle):
    from runs import composed

    from aem_lightning.runner.build import instantiate

    rewards = instantiate(composed([*f"rewards={name}".split()]).rewards)
    assert rewards(EnvStep("", 0.5, info={"won": True}), malformed=False) == pytest.approx(won)
    refused = EnvStep("", 0.0, info={"is_action_valid": False})
    assert rewards(refused, malformed=True) == pytest.approx(malformed)
    assert rewards(EnvStep(""), malformed=False) == pytest.approx(idle)


@pytest.mark.parametrize(
    ("words", "earns"),
    [
        ("datamodule=alfworld", "paper"),
        ("datamodule=webshop_generated", "paper"),
        ("datamodule=swe_json", "success_only"),
        ("datamodule=custom", "passthrough"),
        ("experiment=quickstart datamodule=textarena", "passthrough"),
        ("experiment=swe rewards=paper", "paper"),
        ("experiment=corridor", "success_only"),
    ],
)
def test_what_is_earned_follows_the_datamodule_and_what_is_typed(words, earns):
    from runs import composed

    given = composed(words.split()).rewards
    preset = composed([f"rewards={earns}"]).rewards
    assert given.environment == preset.environment
    assert given.success == preset.success


def test_a_format_whose_actions_cannot_be_found_says_what_to_type(policy):
    react = dataclasses.replace(TAGGED, action="react", require_thinking=True)
    with pytest.raises(ValueError, match=r"prompt\.action=react is given\. Type action=free"):
        PromptEncoder(policy.tokenizer, react, action="constrained")
