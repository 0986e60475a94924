"""Workers that go astray on the wire, hang together, eat memory or return what is no answer."""

import os
import signal
import time
from pathlib import Path

import pytest
from astray_envs import ANSWERS, SENTENCE, Answers, Astray, Numpyish, Raises, RaisesOurs
from toy_text_env import ToyEnv

from aem_lightning.envs import EnvContractError, EnvPool, EnvPoolError, ResetRequest
from aem_lightning.envs.answers import STEP, BadAnswerError, checked_answer
from aem_lightning.envs.orders import read_answer
from aem_lightning.envs.quarantine import PASSED_OVER, Quarantine

PATIENCE_S = 2.0


def requests(count, **more):
    return {str(i): ResetRequest(f"task {i}", seed=i, affinity=i, **more) for i in range(count)}


@pytest.fixture(scope="module")
def undisturbed():
    """What three episodes answer to "look"."""
    with EnvPool(ToyEnv, workers=1) as pool:
        pool.reset(requests(3))
        return {key: step.observation for key, step in pool.step(looks(3)).items()}


def looks(count):
    return {str(i): "look" for i in range(count)}


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("garbage", "no answer: b'.x80"),
        ("half", "no answer within"),
        ("twice", "no answer: b'.*twice"),
        ("other", "no answer: b'.*mapping"),
        ("beats", "no answer: b'.*Beat"),
        ("endless", "an answer of over 67,108,864 bytes"),
    ],
)
def test_what_is_no_answer_costs_its_episode_and_no_other(harm, told, undisturbed):
    with EnvPool(Astray, workers=1, timeout_s=PATIENCE_S) as pool:
        pool.reset(requests(3))
        steps = pool.step(looks(3) | {"1": harm})
        assert_matches(steps["1"].infra_error, told)
        assert {key: steps[key].observation for key in "02"} == {
            key: undisturbed[key] for key in "02"
        }


def assert_matches(text, pattern):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_worker_that_is_stopped_in_the_middle_of_a_long_answer_is_replaced(undisturbed):
    with EnvPool(Astray, workers=2, timeout_s=PATIENCE_S) as pool:
        pool.reset(requests(3))
        pool.send(actions=looks(3) | {"0": "long"})
        time.sleep(0.5)  # more than the socket holds is said by then, and not read
        os.kill(pool.worker_pids()[pool.worker_of("0")], signal.SIGSTOP)
        steps = pool.receive()
        assert steps["0"].observation == SENTENCE
        assert steps["1"].observation == undisturbed["1"]
        assert pool.restarts == 1


def test_episodes_that_hang_are_waited_for_one_after_the_other(undisturbed):
    with EnvPool(ToyEnv, workers=2, timeout_s=PATIENCE_S) as pool:
        pool.reset(requests(14))
        begin = time.monotonic()
        actions = {str(i): "look" if i < 2 else "harm hang" for i in range(14)}
        steps = pool.step(actions)
        took = time.monotonic() - begin
        assert [bool(step.infra_error) for step in steps.values()] == 2 * [False] + 12 * [True]
        assert all(steps[key].observation == undisturbed[key] for key in "01")
        assert took < 5 * PATIENCE_S, "twelve would take 13 times as long as one"


def test_a_task_that_breaks_again_and_again_is_played_for_ever(caplog):
    with EnvPool(ToyEnv, workers=1) as pool:
        for occasion in range(4):
            steps = pool.reset({"a": ResetRequest("harm raise"), "b": ResetRequest("fine")})
            assert steps["a"].infra_error
            assert steps["b"].infra_error is None
            assert (occasion < 2) != steps["a"].infra_error.startswith("its task is in quarantine")
        assert list(pool.quarantine) == ["harm raise"]
    assert caplog.text.count("is in quarantine") == 1


def test_copies_that_break_together_are_one_occasion_and_a_passing_cause_passes():
    quarantine = Quarantine()
    quarantine.start({"a"})
    for _ in range(3):
        quarantine.blame("a", "the server is down")
    assert not quarantine
    quarantine.start({"a"})
    quarantine.blame("a", "the server is down")
    for _ in range(PASSED_OVER):
        quarantine.start({"a"})
        assert quarantine == {"a": "the server is down"}
    quarantine.start({"a"})
    assert not quarantine
    quarantine.blame("a", "still down")
    assert quarantine == {"a": "still down"}


def test_an_environment_that_leaks_is_replaced_and_told_by_its_limit(undisturbed):
    with EnvPool(Astray, workers=1, memory_gb=0.15) as pool:
        pool.reset(requests(3))
        for _ in range(30):
            steps = pool.step({"1": "leak"})
            if steps["1"].infra_error:
                break
        assert "no memory left; its limit is datamodule.memory_gb=0.15" in steps["1"].infra_error
        assert pool.step({"0": "look"})["0"].observation == undisturbed["0"]
        assert pool.restarts


REFUSED = {
    "short": r"expected a tuple \(observation, reward, terminated, truncated, info\)",
    "observation": r"returned observation=b'bytes'; expected str",
    "half a surrogate": r"observation='a box \\ud83d and more' .*half a surrogate pair",
    "reward": r"returned reward='1.0'; expected a number",
    "NaN": r"returned reward=nan; expected a finite number",
    "infinity": r"returned reward=-inf; expected a finite number",
    "too large": r"returned reward=1000.*000; expected a finite number",
    "none": r"returned reward=None; expected a number",
    "terminated": r"returned terminated=1; expected bool",
    "truncated": r"returned truncated=None; expected bool",
    "no info": r"returned info=None; expected dict",
    "won": r"returned info\['won'\]='no'; expected bool",
    "score": r"returned info\['score'\]=nan; expected a finite number",
    "valid": r"returned info\['is_action_valid'\]=0.0; expected bool",
    "goal": r"returned info\['goal'\]=\['a', 'goal'\]; expected str",
    "another task": r"returned info\['task_id'\]='another'; expected 'task \d+'",
    "one action": r"returned info\['admissible_actions'\]='look'; expected a tuple of str",
    "an action": r"returned info\['admissible_actions'\]=\('look', 7\); expected a tuple of str",
    "surrogate action": r"info\['admissible_actions'\]='look\\n\\udc00'.*half a surrogate pair",
    "reason": r"returned info\['infra_error'\]=ValueError\('no'\); expected str or None",
}
TAKEN = ("numpy", "fraction", "objects")


def test_an_answer_against_the_contract_reaches_the_policy_or_is_not_told_whose_it_is():
    names = [*REFUSED, *TAKEN]
    assert set(names) == {"short", *ANSWERS}
    with EnvPool(Answers, workers=1) as pool:
        pool.reset(requests(len(names)))
        pool.step(looks(len(names)))
        steps = pool.step({str(i): name for i, name in enumerate(names)})
        for i, (name, step) in enumerate(zip(names, steps.values(), strict=True)):
            if name in TAKEN:
                assert step.infra_error is None, name
                continue
            call = rf"^task 'task {i}', turn 1: step\('{name}'\) .*"
            assert_matches(step.infra_error, call + REFUSED[name])
            assert step.truncated
        numpy, fraction, objects = list(steps.values())[-3:]
        assert (numpy.reward, numpy.terminated, numpy.won) == (0.5, True, True)
        assert (fraction.reward, fraction.info["score"]) == (0.5, 3)
        # JSON has neither sets nor keys of two words, and its lists are no tuples.
        assert objects.info == {"deep": [{"a": [1, 2]}], "7": "number"}


@pytest.mark.parametrize("name", ["NaN", "infinity", "none", "reward", "too large"])
def test_a_reward_that_is_not_used_breaks_an_episode(name):
    row = list(({"observation": "", "reward": 0, "terminated": False, "truncated": False}).values())
    row[1] = ANSWERS[name]["reward"]
    assert checked_answer([*row, {}], STEP, uses_reward=False).reward == 0.0
    with pytest.raises(BadAnswerError, match="reward="):
        checked_answer([*row, {}], STEP)
    row[1] = Numpyish(2.5)
    assert checked_answer([*row, {}], STEP, uses_reward=False).reward == 2.5


def test_on_bad_answer_stop_ends_everything_with_what_to_type_instead():
    with EnvPool(Answers, workers=1, on_bad_answer="stop") as pool:
        pool.reset(requests(2, uses_reward=False))
        assert pool.step({"0": "NaN"})["0"].infra_error is None
        message = r"task 'task 1', turn 0: step\('won'\).*type datamodule\.on_bad_answer=mask"
        with pytest.raises(EnvContractError, match=message):
            pool.step({"1": "won"})
        assert pool.worker_pids() == ()


def test_the_exception_of_an_environment_runs_no_code_here():
    mark = Path("/tmp/astray_envs_was_unpickled")
    with pytest.raises(EnvPoolError, match=r"OwnError: its own"):
        EnvPool(Raises, workers=1).reset(requests(1))
    assert not mark.exists()
    with pytest.raises(FileNotFoundError) as raised:
        EnvPool(RaisesOurs, workers=1).reset(requests(1))
    assert raised.value.filename == "/data/games"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b"nonsense",
        b'["Order",1]',
        b'["Ready",1]',
        b'["Played",1,[]]',
        b'["Played","1",[["",0,false,false,{}]]]',
        b'["Played",1,[["",0,false,false,{}]],2]',
        b'["Played",1,[["",NaN,false,false,{}]]]',
        b'["Played",1,[["",0,0,false,{}]]]',
        b'["Played",1,[["",0,false,false,{"won":1}]]]',
        b'["Broken",1,"s","t",false,["ValueError",[{}]]]',
        b'["Counted",{"a":"b"}]',
        b'["Starting","soon"]',
        b"[" * 100_000,
        b'["Ready"]\xff',
    ],
)
def test_a_line_that_is_no_answer_is_taken_for_one(line):
    with pytest.raises(ValueError, match=r"^b[\"']"):
        read_answer(line)


def test_a_worker_reads_the_trainers_secrets_unless_they_are_passed_by_name(monkeypatch):
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "ALFWORLD_TOKEN", "AWS_SECRET_ACCESS_KEY", "ANYTHING")
    for name in (*secrets, "ALFWORLD_HOME", "LC_NUMERIC", "DOCKER_HOST", "MY_KEY"):
        monkeypatch.setenv(name, f"value of {name}")
    with EnvPool(Astray, workers=1, pass_environment=["MY_KEY", "NOT_SET"]) as pool:
        pool.reset(requests(1))

        def value(name):
            return pool.step({"0": f"variable {name}"})["0"].observation

        assert [value(name) for name in secrets] == ["none"] * len(secrets)
        for name in ("ALFWORLD_HOME", "LC_NUMERIC", "DOCKER_HOST", "MY_KEY", "PATH"):
            assert value(name) == os.environ[name]
