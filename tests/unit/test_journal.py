"""The journal of a rollout: what is played again after an interruption, and what changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from coin import CoinEnv
from tiny_play import PLAIN, LocalPool, coin_task, make_policy

from aem_lightning.modules.journal import remove
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    PromptEncoder,
    RewardShaping,
    Sampling,
    SlotEngine,
    make_groups,
)
from aem_lightning.rollout import journal as journal_module
from aem_lightning.rollout.journal import read_records, recorded
from aem_lightning.types import EnvStep, Trajectory

EPISODES = make_groups([coin_task(number) for number in range(3)], 3)


class KilledError(Exception):
    """Where a process would have ended."""


class Pool(LocalPool):
    """Counts the steps of its environments."""

    steps = 0

    def step(self, actions: Mapping[str, str]) -> dict[str, EnvStep]:
        self.steps += len(actions)
        return super().step(actions)


class Engine(SlotEngine):
    """Counts what it sampled."""

    sampled = 0

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Any]:
        results = super().poll(wait_all, at_least)
        self.sampled += len(results)
        return results


class Stranger:
    """An engine whose state is out of sight, as a server's."""

    def __init__(self, engine: Engine) -> None:
        for name in ("submit", "poll", "close", "sync"):
            setattr(self, name, getattr(engine, name))


@pytest.fixture(scope="module")
def policy() -> Any:
    return make_policy(awake=True)


@pytest.fixture(autouse=True)
def states_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are saved after every pass."""
    monkeypatch.setattr(journal_module, "TIME_SHARE", float("inf"))


class Play:
    """One rollout, by a fresh engine and pool, with its journal at ``path`` where there is one."""

    def __init__(
        self,
        policy: Any,
        path: Path | None,
        *,
        memory: Any = "transcript",
        share: float = 1.0,
        key: str = "key",
        stranger: bool = False,
        concurrency: int = 7,
        make_env: Any = CoinEnv,
        cache: Any = "auto",
    ) -> None:
        self.pool = Pool(make_env)
        self.engine = Engine(slots=8, max_length=256, bucket=32, cache=cache)
        self.engine.sync(policy, 0)
        engine: Any = Stranger(self.engine) if stranger else self.engine
        encoder = PromptEncoder(policy.tokenizer, PLAIN, memory)
        responder = EngineResponder(engine, Sampling(1.0, 6, encoder.stop_ids), ("test",), share)
        self.collector = Collector(
            self.pool, encoder, responder, RewardShaping(), 5, 256, 6, concurrency
        )
        if path is not None:
            self.collector = recorded(self.collector, engine, path, key)

    def all(self) -> list[Trajectory]:
        return self.collector.collect(EPISODES)

    def killed_in(self, number: int) -> None:
        """Play up to pass ``number``, whose requests to the environments are not sent."""
        send, left = self.collector.pool.send, [number]

        def failing(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            send(*arguments)

        class Fragile:
            def __getattr__(_, name: str) -> Any:  # noqa: N805
                return failing if name == "send" else getattr(pool, name)

        pool, self.collector.pool = self.collector.pool, Fragile()  # type: ignore[assignment]
        with pytest.raises(KilledError):
            self.all()
        pool.tape._file.close()  # as the system does for a process that has ended


@pytest.mark.parametrize("memory", ["window", "transcript"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_interrupted_rollout_takes_another_course(
    policy: Any, tmp_path: Path, memory: str, share: float
) -> None:
    alone = Play(policy, None, memory=memory, share=share)
    whole = alone.all()
    for number in (1, 2, 5, 8, 13):
        path = tmp_path / f"{number}.jsonl"
        killed = Play(policy, path, memory=memory, share=share)
        killed.killed_in(number)
        again = Play(policy, path, memory=memory, share=share)
        assert again.all() == whole
        if share == 1.0:
            assert killed.engine.sampled + again.engine.sampled == alone.engine.sampled
    assert again.pool.steps < alone.pool.steps
    assert not list(tmp_path.glob("*.state"))


def test_an_interrupted_rollout_over_plain_caches_takes_another_course(
    policy: Any, tmp_path: Path
) -> None:
    alone = Play(policy, None, cache="plain")
    whole = alone.all()
    killed = Play(policy, tmp_path / "a.jsonl", cache="plain")
    killed.killed_in(6)
    again = Play(policy, tmp_path / "a.jsonl", cache="plain")
    assert again.all() == whole
    assert killed.engine.sampled + again.engine.sampled == alone.engine.sampled


def test_a_finished_rollout_is_played_again(policy: Any, tmp_path: Path) -> None:
    whole = Play(policy, tmp_path / "a.jsonl").all()
    again = Play(policy, tmp_path / "a.jsonl")
    assert again.all() == whole
    assert (again.engine.sampled, again.pool.steps, again.pool.envs) == (0, 0, {})


def test_many_interruptions_cost_more_than_their_turns(policy: Any, tmp_path: Path) -> None:
    alone = Play(policy, None)
    whole, sampled = alone.all(), 0
    for number in range(1, 9):
        killed = Play(policy, tmp_path / "a.jsonl")
        killed.killed_in(number)
        sampled += killed.engine.sampled
    last = Play(policy, tmp_path / "a.jsonl")
    assert last.all() == whole
    assert sampled + last.engine.sampled == alone.engine.sampled


@pytest.mark.parametrize("damage", ["cut", "flip", "junk"])
def test_a_damaged_line_is_believed(policy: Any, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.jsonl"
    whole = Play(policy, path).all()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-100:]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        data += b"\x00\xff half a line"
    path.write_bytes(data)
    kept, _ = read_records(bytes(data))
    assert Play(policy, path).all() == whole
    records, ends = read_records(path.read_bytes())
    assert records[-1] == "over"
    assert ends[-1] == path.stat().st_size
    assert len(kept) <= len(records)


def test_a_journal_of_other_weights_or_settings_is_believed(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Play(policy, path, key="before").killed_in(4)
    again = Play(policy, path, key="after")
    assert again.all() == Play(policy, None).all()
    assert read_records(path.read_bytes())[0][0] == "after"


def test_a_state_of_another_journal_is_believed(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Play(policy, path, key="before").killed_in(4)
    state = path.with_suffix(".state").read_bytes()
    Play(policy, path, key="after").killed_in(2)
    path.with_suffix(".state").write_bytes(state)
    assert Play(policy, path, key="after").all() == Play(policy, None).all()
    path.unlink()
    path.with_suffix(".state").write_bytes(state[:1000])
    Play(policy, path).killed_in(3)
    path.with_suffix(".state").write_bytes(b"no zip file")
    assert Play(policy, path).all() == Play(policy, None).all()


def test_an_engine_that_shows_no_state_answers_again(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Play(policy, path, stranger=True, share=0.5).killed_in(5)
    kept = sum(len(record["results"]) for record in read_records(path.read_bytes())[0][1:])
    again = Play(policy, path, stranger=True, share=0.5)
    played = again.all()
    assert again.engine.sampled == sum(len(t.turns) for t in played) - kept
    assert kept > 0


def test_two_processes_write_one_journal(
    policy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Play(policy, tmp_path / "a.jsonl")
    second = Play(policy, tmp_path / "a.jsonl")
    assert "no journal of this rollout is kept" in caplog.text
    assert first.all() == second.all()


class Moody(CoinEnv):
    """Says another thing in each process."""

    made = 0

    def __init__(self) -> None:
        Moody.made += 1
        self.number = Moody.made

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, *rest = super().step(action)
        return (f"{text} {self.number}", *rest)


def test_an_environment_that_replays_otherwise_is_played_on(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Play(policy, path, make_env=Moody).killed_in(4)
    played = Play(policy, path, make_env=Moody).all()
    broken = [t for t in played if t.infra_error is not None]
    assert broken
    assert all("not deterministic" in t.infra_error for t in broken)


class Objects(CoinEnv):
    """Its info holds what no file can."""

    def _info(self, valid: bool, won: bool = False) -> dict[str, Any]:
        return {**super()._info(valid, won), "engine": object()}


def test_an_info_that_is_not_plain_ends_the_run(
    policy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    played = Play(policy, tmp_path / "a.jsonl", make_env=Objects).all()
    assert played == Play(policy, None, make_env=Objects).all()
    assert caplog.text.count("the journal of this rollout ends here") == 1
    assert Play(policy, tmp_path / "a.jsonl", make_env=Objects).all() == played


def test_journals_of_ranks_that_are_no_more_are_left(tmp_path: Path) -> None:
    names = {"3-0", "3-1", "3-2", "3-3-round-1", "4-2"}
    (tmp_path / "journal").mkdir()
    for name in names:
        (tmp_path / "journal" / f"{name}.jsonl").touch()
    for rank in range(2):  # of a run that four have begun
        where = {"global_rank": rank, "world_size": 2}
        trainer: Any = SimpleNamespace(default_root_dir=tmp_path, ckpt_path=None, **where)
        remove(trainer, before=4)
    assert [path.stem for path in (tmp_path / "journal").iterdir()] == ["4-2"]
