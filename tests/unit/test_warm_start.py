import json
from dataclasses import replace

import pytest
import torch
from coin import ACTIONS, CoinExpert
from local_coin import LocalCoin
from tiny_play import PLAIN, SMALL, TAGGED, byte_tokenizer, coin_task, make_policy

from aem_lightning.modules import (
    DemonstrationSampler,
    Policy,
    WarmStartModule,
    collate_demonstrations,
    demonstrations_dataset,
)
from aem_lightning.modules.warm_start import PROMPT, RESPONSE, SLIP
from aem_lightning.rollout import PromptEncoder, RewardShaping
from aem_lightning.runner.warm_start import (
    RESULT,
    WarmStartSettings,
    play_demonstrations,
    run_warm_start,
    tiny_base,
    warm_start_key,
)
from aem_lightning.types import Trajectory, Turn

LIMITS = {"max_turns": 4, "max_context": 96, "max_new_tokens": 6}
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SETTINGS = WarmStartSettings(demonstrations=12, epochs=2, lr=3e-3, batch_tokens=64)


def run(folder, data=None, settings=SETTINGS):
    data = data or LocalCoin()
    base = tiny_base(data, SMALL, settings.seed)
    encoder = PromptEncoder(base.tokenizer, PLAIN, "transcript")
    options = {"rewards": RewardShaping(), "limits": LIMITS, "folder": folder, "trainer": TRAINER}
    return run_warm_start(base, data, encoder, settings, **options)


class LostExpert(LocalCoin):
    """An expert that opens wrong boxes for ever."""

    def make_expert(self, task, seed):
        return CoinExpert(99)


class NoPlay(LocalCoin):
    """Nobody may play."""

    pool = property(lambda self: pytest.fail("the cached model was not used"))


def test_a_second_run_takes_the_folder_of_the_first(tmp_path):
    first = run(tmp_path / "model")
    assert not first.cached
    assert first.seconds > 0
    second = run(tmp_path / "model", NoPlay())
    assert second.cached
    assert second.seconds == 0
    assert second.report == json.loads((tmp_path / "model" / RESULT).read_text())
    assert second.report["demonstrations"] == 12
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_its_result_file_is_not_taken_for_a_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("half of one")
    assert not run(folder).cached
    assert Policy.from_pretrained(str(folder)).tokenizer.eos_token == "<|end|>"


def test_a_model_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(self, folder):
        (folder / "config.json").write_text("half of one")
        raise OSError("No space left on device")

    monkeypatch.setattr(Policy, "save_model", fails)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_supervision_lowers_the_loss_on_expert_play(tmp_path):
    settings = replace(SETTINGS, epochs=20, lr=2e-2, batch_tokens=512)
    untrained = replace(settings, epochs=1, lr=1e-6)
    before, after = (
        run(tmp_path / str(given.epochs), settings=given).report["loss"]
        for given in (untrained, settings)
    )
    assert after < 0.6 * before


def test_an_expert_that_never_wins_says_what_to_type(tmp_path):
    with pytest.raises(ValueError, match=r"none of 12 episodes within max_turns=4"):
        run(tmp_path / "model", LostExpert())
    assert not list(tmp_path.iterdir())


def demonstrations(settings):
    data = LocalCoin({"train": 3, "valid_seen": 1, "valid_unseen": 1})
    encoder = PromptEncoder(make_policy().tokenizer, PLAIN, "transcript")
    return play_demonstrations(data, encoder, settings, RewardShaping(), LIMITS)


def test_demonstrations_take_few_tasks_again_and_differ():
    played, slips = demonstrations(SETTINGS)
    assert len(played) == 12
    assert {trajectory.task.id for trajectory in played} == {f"train/{i}" for i in range(3)}
    assert all(trajectory.won for trajectory in played)
    assert len({len(trajectory.turns) for trajectory in played}) == 2
    assert slips == set()


def test_slips_are_the_turns_that_were_not_the_experts_choice():
    settings = replace(SETTINGS, demonstrations=40, slip=0.5)
    played, slips = demonstrations(settings)
    straight = {trajectory.key: trajectory for trajectory in demonstrations(SETTINGS)[0]}
    differ = 0
    for trajectory in played:
        for t, turn in enumerate(trajectory.turns):
            if (trajectory.key, t) in slips:
                assert turn.action in ACTIONS
            elif t == 0 and trajectory.key in straight:
                assert turn.action == straight[trajectory.key].turns[0].action
                differ += 1
    assert differ > 0
    assert 20 < len(slips) < sum(len(trajectory.turns) for trajectory in played)
    assert demonstrations(settings)[1] == slips


class ThoughtfulExpert(CoinExpert):
    """Says what it does, and how often it has been asked."""

    thought = ""

    def act(self, observation, admissible):
        action = super().act(observation, admissible)
        self.thought = f"I {action}"
        return action


class Thoughtful(LocalCoin):
    def make_expert(self, task, seed):
        return ThoughtfulExpert(seed % 3)


@pytest.mark.parametrize("slip", [0.0, 0.5])
def test_a_demonstration_does_not_tell_the_experts_own_thought(slip):
    """Also before a slip: the expert meant something else, and its hands were careless."""
    prompt = replace(
        TAGGED, demonstration="<think>{thought}</think><action>{action}</action>", action="tagged"
    )
    encoder = PromptEncoder(byte_tokenizer(), prompt, "transcript")
    limits = {"max_turns": 4, "max_context": 2048, "max_new_tokens": 128}
    settings = replace(SETTINGS, slip=slip)
    played, slips = play_demonstrations(Thoughtful(), encoder, settings, RewardShaping(), limits)
    told = {
        (trajectory.key, t): (turn.action, turn.response)
        for trajectory in played
        for t, turn in enumerate(trajectory.turns)
    }
    for key, (action, response) in told.items():
        thought = response.partition("</think>")[0].removeprefix("<think>I ")
        assert thought in ACTIONS
        assert thought == action or key in slips
    assert bool(slips) == bool(slip)


def test_the_key_changes_with_every_part_and_with_nothing_else():
    parts = ({"lr": 1e-3}, {"window": 2}, ["train"])
    assert warm_start_key(*parts) == warm_start_key(*parts)
    others = [
        ({"lr": 2e-3}, *parts[1:]),
        (parts[0], {"window": 3}, parts[2]),
        (*parts[:2], ["valid"]),
    ]
    assert len({warm_start_key(*parts), *(warm_start_key(*other) for other in others)}) == 4


def demonstration(rows, turns):
    made = [
        Turn("o", (), "r", "a", row, start, [0.0] * length, None) for row, start, length in turns
    ]
    return Trajectory(coin_task(0), 0, 0, turns=made, rows=rows)


def test_a_dataset_row_marks_prompts_responses_and_slips():
    transcript = demonstration([[1, 2, 3, 4, 5]], [(0, 1, 1), (0, 3, 2)])
    window = demonstration([[6, 7], [8, 9, 9]], [(0, 1, 1), (1, 1, 2)])
    dataset = demonstrations_dataset([transcript, window])
    assert dataset["input_ids"][:] == [[1, 2, 3, 4, 5], [6, 7], [8, 9, 9]]
    p, r, s = PROMPT, RESPONSE, SLIP
    assert dataset["kind"][:] == [[p, r, p, r, r], [p, r], [p, r, r]]
    slipped = demonstrations_dataset([transcript], {("0/0", 0)})
    assert slipped["kind"][:] == [[p, s, p, r, r]]


def test_a_row_with_nothing_but_a_slip_in_it_is_left_out():
    window = demonstration([[6, 7], [8, 9, 9]], [(0, 1, 1), (1, 1, 2)])
    dataset = demonstrations_dataset([window], {("0/0", 0)})
    assert dataset["input_ids"][:] == [[8, 9, 9]]


def test_collated_rows_are_padded_on_the_right_and_slips_are_in_no_mask():
    rows = [
        {"input_ids": [1, 2, 3, 4], "kind": [PROMPT, PROMPT, RESPONSE, SLIP]},
        {"input_ids": [4, 5], "kind": [PROMPT, RESPONSE]},
    ]
    batch = collate_demonstrations(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [4, 5, 0, 0]]
    no, yes = False, True
    assert batch["response"].tolist() == [[no, no, yes, no], [no, yes, no, no]]
    assert batch["prompt"].tolist() == [[no, yes, no, no], [no, no, no, no]]


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    sampler = DemonstrationSampler([5, 9, 3, 7, 8, 2, 4, 6], batch_tokens=16, seed=0)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(row for batch in epochs[-1] for row in batch) == list(range(8))
        assert len(epochs[-1]) == len(sampler)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]


@pytest.fixture
def batch():
    rows = [
        {"input_ids": [3, 4, 5, 6], "kind": [PROMPT, PROMPT, RESPONSE, RESPONSE]},
        {"input_ids": [7, 8, 9], "kind": [PROMPT, RESPONSE, RESPONSE]},
    ]
    return collate_demonstrations(rows)


def loss_of(batch, **settings):
    module = WarmStartModule(make_policy(lora=False), lr=1e-3, total_steps=4, **settings)
    module.log = lambda *args, **kwargs: None
    return module.training_step(batch, 0)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_the_loss_is_not_the_mean_surprisal_with_the_weight_of_prompt_tokens(batch, prompt_weight):
    policy = make_policy(lora=False)
    either = batch["prompt"] | batch["response"]
    logprobs, _ = policy.score(batch["input_ids"], either)
    weight = torch.where(batch["response"][either], 1.0, prompt_weight)
    expected = -(weight * logprobs).sum() / weight.sum()
    torch.testing.assert_close(loss_of(batch, prompt_weight=prompt_weight), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 20])
def test_some_number_of_batches_has_no_schedule(steps):
    module = WarmStartModule(make_policy(lora=False), lr=1e-3, total_steps=steps)
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps - 1):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert all(0 < rate <= 1e-3 for rate in rates)
