import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import toy_text_env
from lightning import LightningDataModule
from toy_text_env import MissesPackage, ToyEnv, loaded_by

from aem_lightning.envs import EnvPool, EnvPoolError, ResetRequest

PATIENCE_S = 2.0  # with a worker that hangs; a busy machine holds up the others too


def _requests(groups, copies, task="task"):
    return {
        f"{group}/{copy}": ResetRequest(f"{task} {group}", seed=group, affinity=group)
        for group in range(groups)
        for copy in range(copies)
    }


def _told(step):
    """What a policy would see; the toy also tells about its process."""
    return step.observation, step.reward, step.terminated, step.admissible_actions


def _play(pool, turns=5, *, harm=None):
    """Transcripts of 2 groups of 2; ``harm(turn)`` may break a worker before that turn."""
    steps = pool.reset(_requests(2, 2))
    transcripts = {key: [_told(step)] for key, step in steps.items()}
    for turn in range(turns):
        if harm is not None:
            harm(turn)
        steps = pool.step({key: f"say {turn} {key}" for key in steps})
        for key, step in steps.items():
            assert step.infra_error is None
            transcripts[key].append(_told(step))
    return transcripts


@pytest.fixture(scope="module")
def undisturbed():
    with EnvPool(ToyEnv, workers=2) as pool:
        return _play(pool)


def test_environments_play_between_send_and_receive(undisturbed):
    with EnvPool(ToyEnv, workers=2) as pool:
        assert pool.receive() == {}
        pool.send({}, {})
        pool.send(_requests(1, 1))
        with pytest.raises(EnvPoolError, match=r"call receive\(\) first"):
            pool.send(actions={"0/0": "look"})
        with pytest.raises(EnvPoolError, match=r"'0/0'.*still playing"):
            pool.release(["0/0"])
        assert list(pool.receive()) == ["0/0"]
        pool.send(_requests(2, 1) | {}, {})  # 0/0 starts anew
        told = {key: _told(step) for key, step in pool.receive().items()}
        assert told == {key: undisturbed[key][0] for key in ("0/0", "1/0")}
        pool.send({"1/1": _requests(2, 2)["1/1"]}, {"0/0": "say 0 0/0"})
        both = pool.receive()
        assert _told(both["1/1"]) == undisturbed["1/1"][0]
        assert _told(both["0/0"]) == undisturbed["0/0"][1]


def test_a_worker_that_dies_between_send_and_receive_is_replaced(undisturbed):
    with EnvPool(ToyEnv, workers=2) as pool:
        pool.reset(_requests(2, 2))
        pool.send(actions={key: f"say 0 {key}" for key in _requests(2, 2)})
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        told = {key: _told(step) for key, step in pool.receive().items()}
    assert told == {key: turns[1] for key, turns in undisturbed.items()}


def test_counters_are_summed_over_workers_and_start_anew():
    with EnvPool(ToyEnv, workers=2) as pool:
        assert pool.counters() == {}
        pool.reset(_requests(2, 2))
        pool.step({"0/0": "look", "1/0": "look", "1/1": "look"})
        assert pool.counters() == {"toy_steps": 3}
        assert pool.counters() == {"toy_steps": 0}
        pool.send(actions={"1/0": "look"})
        with pytest.raises(EnvPoolError, match=r"call receive\(\) first"):
            pool.counters()
        pool.receive()
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        _wait_gone(pool.worker_pids()[:1])
        assert pool.counters() == {"toy_steps": 1}  # the dead worker counts nothing


def _is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _wait_gone(pids, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while any(map(_is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(_is_running, pids))


def test_a_group_lives_on_one_worker_and_groups_spread_over_workers():
    with EnvPool(ToyEnv, workers=2) as pool:
        steps = pool.reset(_requests(4, 3))
        pids = {}
        for key, step in steps.items():
            pids.setdefault(key.partition("/")[0], set()).add(step.info["pid"])
        assert all(len(group) == 1 for group in pids.values())
        homes = [next(iter(group)) for group in pids.values()]
        assert sorted(homes.count(pid) for pid in set(homes)) == [2, 2]
        late = pool.reset({"2/late": ResetRequest("task 2", seed=2, affinity=2)})
        assert late["2/late"].info["pid"] in pids["2"]


def test_equal_seeds_give_equal_starts_and_the_keys_do_not_mix(undisturbed):
    assert undisturbed["0/0"][0] == undisturbed["0/1"][0]
    assert undisturbed["0/0"][0] != undisturbed["1/0"][0]
    assert len({tuple(t) for t in undisturbed.values()}) == 4


@pytest.mark.parametrize(
    ("blow", "at", "worker", "options"),
    [(signal.SIGKILL, 3, 0, {}), (signal.SIGSTOP, 2, 1, {"timeout_s": PATIENCE_S})],
)
def test_a_worker_that_dies_or_hangs_is_replaced_and_changes_no_transcript(
    blow, at, worker, options, undisturbed
):
    with EnvPool(ToyEnv, workers=2, **options) as pool:

        def harm(turn):
            if turn == at:
                os.kill(pool.worker_pids()[worker], blow)

        assert _play(pool, harm=harm) == undisturbed
        assert pool.restarts == 1


@pytest.mark.parametrize("harm", ["die", "hang", "raise"])
def test_action_that_breaks_the_engine_once_is_repeated_on_a_replayed_episode(harm, tmp_path):
    action = f"harm {harm} once"
    with EnvPool(partial(ToyEnv, tmp_path), workers=1, timeout_s=PATIENCE_S) as pool:
        pool.reset(_requests(1, 2))
        pool.step({"0/0": "look", "0/1": "win"})
        broken = pool.step({"0/0": action})
        after = pool.step({"0/0": "look"})
        assert len(list(tmp_path.iterdir())) == 1  # it did break
        pool.reset(_requests(1, 1))
        pool.step({"0/0": "look"})
        assert _told(pool.step({"0/0": action})["0/0"]) == _told(broken["0/0"])
        assert _told(pool.step({"0/0": "look"})["0/0"]) == _told(after["0/0"])
        assert pool.restarts == (0 if harm == "raise" else 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("die", "the toy dies"),
        ("hang", f"no answer within {PATIENCE_S:g} s"),
        ("raise", "ZeroDivisionError: the toy raises"),
    ],
)
def test_episode_that_breaks_twice_ends_with_infra_error_and_the_others_go_on(
    harm, message, undisturbed
):
    with EnvPool(ToyEnv, workers=1, timeout_s=PATIENCE_S) as pool:
        pool.reset(_requests(2, 2))
        pool.step({key: f"say 0 {key}" for key in _requests(2, 2)})
        actions = {key: f"say 1 {key}" for key in _requests(2, 2)} | {"0/1": f"harm {harm}"}
        steps = pool.step(actions)
        assert message in steps["0/1"].infra_error
        assert steps["0/1"].truncated
        assert not steps["0/1"].terminated
        for key in ("0/0", "1/0", "1/1"):
            assert _told(steps[key]) == undisturbed[key][2]
        rest = pool.step({key: f"say 2 {key}" for key in ("0/0", "1/0", "1/1")})
        assert all(_told(step) == undisturbed[key][3] for key, step in rest.items())
        assert pool.step({"0/1": "look"})["0/1"].infra_error  # still, and nothing is played


def test_reset_that_always_kills_its_worker_leaves_the_live_episodes_alone(undisturbed):
    with EnvPool(ToyEnv, workers=1) as pool:
        pool.reset(_requests(2, 2))
        steps = pool.reset(
            {"bad": ResetRequest("harm die", affinity=9), "good": ResetRequest("task 7", 7, 9)}
        )
        assert steps["bad"].infra_error
        assert steps["good"].infra_error is None
        told = pool.step({"0/0": "say 0 0/0"})
        assert _told(told["0/0"]) == undisturbed["0/0"][1]


def test_environment_that_cannot_be_made_raises_its_own_message_at_once():
    pool = EnvPool(toy_text_env.fail_to_make, workers=2)
    with pytest.raises(LookupError, match="the toy box is empty"):
        pool.reset(_requests(1, 1))
    assert pool.worker_pids() == ()


@pytest.mark.parametrize("make_env", [MissesPackage, ToyEnv])
def test_missing_package_raises_at_once_and_not_as_a_broken_episode(make_env):
    pool = EnvPool(make_env, workers=1)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        pool.reset({"a": ResetRequest("harm miss")})
    assert pool.worker_pids() == ()


def test_factory_that_cannot_be_pickled_is_refused_with_what_to_give():
    with pytest.raises(EnvPoolError, match=r"functools\.partial"):
        EnvPool(lambda: ToyEnv()).reset(_requests(1, 1))


def test_slots_are_used_again_so_that_engines_do_not_pile_up():
    with EnvPool(ToyEnv, workers=1) as pool:
        for _ in range(3):
            steps = pool.reset(_requests(2, 2))
            assert {s.info["env_number"] for s in steps.values()} <= {1, 2, 3, 4}
            pool.release(steps)


def test_more_episodes_than_slots_is_refused_and_released_ones_make_room():
    with EnvPool(ToyEnv, workers=2, slots_per_worker=2) as pool:
        pool.reset(_requests(2, 2))
        with pytest.raises(EnvPoolError, match="slots_per_worker=2"):
            pool.reset({"x": ResetRequest("task", affinity=5)})
        pool.release(["0/0"])
        assert pool.reset({"x": ResetRequest("task", affinity=0)})["x"].infra_error is None


def test_a_group_spreads_over_the_workers_where_it_may_or_shares_one_where_it_may_not():
    for keep_groups, workers in ((True, 1), (False, 2)):
        with EnvPool(ToyEnv, workers=2, keep_groups=keep_groups) as pool:
            steps = pool.reset(_requests(1, 4))
            assert len({pool.worker_of(key) for key in steps}) == workers


def test_step_of_unknown_or_ended_episode_is_refused():
    with EnvPool(ToyEnv, workers=1) as pool:
        pool.reset(_requests(1, 1))
        with pytest.raises(EnvPoolError, match="'7/7'"):
            pool.step({"7/7": "look"})
        assert pool.step({"0/0": "win"})["0/0"].terminated
        with pytest.raises(EnvPoolError, match="is over"):
            pool.step({"0/0": "look"})


@pytest.mark.parametrize(
    "bad",
    [
        {"workers": 0},
        {"slots_per_worker": 0},
        {"timeout_s": 0.0},
        {"timeout_s": "60"},
        {"memory_gb": -1},
        {"memory_gb": True},
        {"pass_environment": "MY_TOKEN"},
        {"on_bad_answer": "ignore"},
    ],
    ids=str,
)
def test_pool_argument_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EnvPool(ToyEnv, **bad)


def test_pool_starts_with_its_first_reset_and_a_pickled_one_is_its_arguments():
    pool = EnvPool(ToyEnv, workers=1, timeout_s=5.0)
    assert pool.worker_pids() == ()
    pool.reset(_requests(1, 1))
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.worker_pids() == ()
    assert (copy.make_env, copy.workers, copy.timeout_s) == (ToyEnv, 1, 5.0)
    pool.close()


TRAINERS = {"datasets", "lightning", "torch", "transformers"}
ONE_FILE = """
from aem_lightning.datamodules import AlfworldDataModule, SeededDataModule, WebShopDataModule
from aem_lightning.datamodules import SweDataModule
from toy_text_env import ToyEnv
class Env(ToyEnv): pass
class Data(SeededDataModule): pass
class Shop(WebShopDataModule): pass
"""


def test_a_datamodule_in_the_environments_file_loads_nothing_heavy_into_a_worker(
    tmp_path, monkeypatch
):
    (tmp_path / "one_file.py").write_text(ONE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    import one_file

    assert issubclass(one_file.Data, LightningDataModule)  # here, in the trainer's process
    loaded = loaded_by(one_file.Env)
    assert {"one_file", "aem_lightning.datamodules.webshop"} <= loaded
    assert not loaded & TRAINERS


def test_the_example_loads_into_a_worker_no_engine_of_ours_either(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "key_and_door")
    import key_and_door

    loaded = loaded_by(key_and_door.KeyEnv)
    assert {"key_and_door", "aem_lightning.datamodules.agent"} <= loaded
    engines = {f"aem_lightning.envs.{name}" for name in ("alfworld", "swe", "webshop")}
    assert not loaded & (TRAINERS | engines)


def test_a_start_that_is_left_waiting_for_a_processor_may_take_longer_than_timeout_s(monkeypatch):
    monkeypatch.setattr("aem_lightning.envs.process.LEAST_START_S", 0.0)
    late = partial(toy_text_env.start_late, seconds=4.0, share=0.1)
    with EnvPool(late, workers=1, timeout_s=3.0) as pool:
        assert pool.reset(_requests(1, 1))["0/0"].infra_error is None


@pytest.mark.parametrize(("share", "told"), [(0, "no answer within 3 s"), (1, "after computing")])
def test_a_start_that_hangs_or_computes_without_end_says_what_to_type(share, told, monkeypatch):
    monkeypatch.setattr("aem_lightning.envs.process.LEAST_START_S", 0.0)
    late = partial(toy_text_env.start_late, seconds=60, share=share)
    pool = EnvPool(late, workers=1, timeout_s=3.0)
    with pytest.raises(EnvPoolError, match=rf"{told}.*type datamodule\.timeout_s=6"):
        pool.reset(_requests(1, 1))
    assert pool.worker_pids() == ()


def test_close_leaves_no_process_behind_and_a_later_reset_starts_anew():
    pool = EnvPool(ToyEnv, workers=2)
    pool.reset(_requests(1, 1))
    pids = pool.worker_pids()
    pool.close()
    assert not any(map(_is_running, pids))
    assert pool.reset(_requests(1, 1))["0/0"].infra_error is None
    pool.close()


def test_a_worker_closes_its_environments_when_the_pool_ends_or_one_breaks(tmp_path):
    with EnvPool(partial(ToyEnv, closed=tmp_path), workers=1) as pool:
        pool.reset(_requests(1, 3))
        (pid,) = pool.worker_pids()
        pool.step({"0/0": "harm raise"})
        broken = {f"{number} by {pid}" for number in (1, 4)}  # the second on the replay
        assert {path.name for path in tmp_path.iterdir()} == broken
    others = {f"{number} by {pid}" for number in (2, 3)}
    assert {path.name for path in tmp_path.iterdir()} == broken | others


def test_a_process_that_tries_episodes_of_a_worker_that_hung_closes_its_environments(tmp_path):
    with EnvPool(partial(ToyEnv, closed=tmp_path), workers=1, timeout_s=3.0) as pool:
        pool.reset(_requests(1, 2))
        hung = pool.worker_pids()
        steps = pool.step({"0/0": "harm hang", "0/1": "look"})
        assert [steps[key].infra_error is None for key in ("0/0", "0/1")] == [False, True]
        (closed,) = tmp_path.iterdir()
        assert int(closed.name.split()[-1]) not in {*hung, *pool.worker_pids()}


@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "os.kill(os.getpid(), 9)",
        "pass",
        "del pool",
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start(); pool.step({'a': 'harm hang'})",
    ],
)
def test_no_worker_outlives_its_pool(end):
    script = f"""
        import os, threading
        from toy_text_env import ToyEnv
        from aem_lightning.envs import EnvPool, ResetRequest
        pool = EnvPool(ToyEnv, workers=2)
        pool.reset({{"a": ResetRequest("task")}})
        print(*pool.worker_pids(), flush=True)
        {end}
    """
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        timeout=60,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert _wait_gone(pids)
