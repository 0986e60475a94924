"""What two minutes of play say of a run: shares, hours, and a verdict in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.types import Trajectory, malformed_kinds

ENOUGH = 16  # whole episodes, under which none won says little
MOST = 0.9


@dataclass
class Played:
    """Episodes of the start policy.

    Attributes:
        max_turns: Turns after which an episode is cut.
        tokens: Most tokens of a response.
        trajectories: The episodes, group by group.
        out_of_time: ``id`` of those that time ended.
        seconds: Wall time.
    """

    max_turns: int
    tokens: int
    trajectories: list[Trajectory] = field(default_factory=list)
    out_of_time: set[int] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, wave: Played) -> None:
        """Take the episodes of another wave in, whose groups are then others."""
        first = 1 + max((t.group for t in self.trajectories), default=-1)
        for trajectory in wave.trajectories:
            trajectory.group += first
        self.trajectories += wave.trajectories
        self.out_of_time |= wave.out_of_time
        self.seconds += wave.seconds

    @property
    def whole(self) -> list[Trajectory]:
        """Those that neither time nor the environment's machinery ended."""
        return [
            t
            for t in self.trajectories
            if t.turns and t.infra_error is None and id(t) not in self.out_of_time
        ]

    @property
    def turns_per_episode(self) -> float:
        """Of whole episodes; where there is none, as many as there may be."""
        whole = self.whole
        return sum(len(t.turns) for t in whole) / len(whole) if whole else float(self.max_turns)

    def report(self) -> dict[str, Any]:
        """Counts and shares, for JSON; a share of nothing is ``None``."""
        whole = self.whole
        turns = [turn for t in self.trajectories for turn in t.turns]
        groups: dict[int, list[float]] = {}
        for trajectory in whole:
            groups.setdefault(trajectory.group, []).append(trajectory.total_reward)
        compared = [returns for returns in groups.values() if len(returns) > 1]
        over = [t for t in whole if t.truncated]
        by_turns = sum(len(t.turns) >= self.max_turns for t in over)
        return {
            "episodes": len(self.trajectories),
            "groups": len({t.group for t in self.trajectories}),
            "whole": len(whole),
            "broken": sum(t.infra_error is not None for t in self.trajectories),
            "success": _share(sum(t.won for t in whole), len(whole)),
            "score": _share(sum(t.score for t in whole), len(whole)),
            "mixed_groups": _share(sum(len(set(r)) > 1 for r in compared), len(compared)),
            "malformed": _share(sum(t.action is None for t in turns), len(turns)),
            "malformed_kinds": dict(malformed_kinds(turns).most_common()),
            "inadmissible": _share(
                sum(t.action is not None and not t.is_valid for t in turns), len(turns)
            ),
            "turns": self.turns_per_episode,
            "response_tokens": _share(sum(t.length for t in turns), len(turns)),
            "cut_by": {
                "max_new_tokens": _share(
                    sum(t.finish_reason == "length" for t in turns), len(turns)
                ),
                "max_turns": _share(by_turns, len(whole)),
                "max_context": _share(len(over) - by_turns, len(whole)),
            },
        }


def advice(
    cfg: DictConfig, played: Played, batch: dict[str, Any], *, compares: bool = True
) -> dict[str, Any]:
    """Will this run learn, and if not, what to change: ``name``, ``text`` and ``bad``.

    ``compares`` says whether the estimator compares the copies of a group, as PPO does not.
    """
    found = played.report()
    name, text = _judged(cfg, found)
    if name == "uniform_groups" and not compares:
        name, text = "learns", f"this can learn: {share(found['success'])} of the episodes are won"
    if batch["fits"] is False:
        text += (
            f". Memory does not hold micro_batch_tokens={cfg.micro_batch_tokens}: it will halve by "
            f"itself; type micro_batch_tokens={cfg.micro_batch_tokens // 2}"
        )
    if played.tokens < cfg.max_new_tokens:
        text += f". To stay in time, replies were cut at {played.tokens} tokens here"
    return {"name": name, "text": text, "bad": name not in ("learns", "unclear")}


def _judged(cfg: DictConfig, found: dict[str, Any]) -> tuple[str, str]:
    whole, cut = found["whole"], found["cut_by"]["max_new_tokens"] or 0.0
    if found["broken"] and not whole:
        return "environment_broken", "no episode was whole: look at the environment, stage=check"
    if (found["malformed"] or 0) >= MOST:
        more = (
            f"{share(cut)} of the replies end at max_new_tokens={cfg.max_new_tokens}: type a "
            "larger one, or"
            if cut >= 0.5
            else "type"
        )
        return "malformed_replies", (
            f"this will not learn: {share(found['malformed'])} of the replies hold no action "
            f"(mostly: {next(iter(found['malformed_kinds']), '')}). {more} another prompt=..., or "
            "warm-start the policy (stage=warm_start)"
        )
    if (found["inadmissible"] or 0) >= MOST:
        return "inadmissible_actions", (
            f"this will hardly learn: {share(found['inadmissible'])} of the actions are refused. "
            "Does the prompt show what is admissible? Type another prompt=..., or "
            "action=constrained"
        )
    if (found["cut_by"]["max_context"] or 0) >= MOST:
        return "cut_episodes", (
            f"this will hardly learn: {share(found['cut_by']['max_context'])} of the episodes end "
            f"at max_context={cfg.max_context}. Type a larger one, or memory=window"
        )
    if whole < ENOUGH:
        return "unclear", (
            f"{whole} whole episodes are too few to tell, of which {share(found['success'])} were "
            "won. Faster replies show more: engine=vllm, or a smaller max_new_tokens"
        )
    if found["success"] == 0 and not found["score"]:
        return "never_wins", (
            f"this will not learn the task: none of {whole} episodes was won, so at best the "
            "penalties teach. Warm-start the policy (stage=warm_start), or type easier tasks, more "
            f"turns than max_turns={cfg.max_turns}, or a larger group_size"
        )
    if found["success"] == 1 and not found["mixed_groups"]:
        return "always_wins", f"nothing to learn: all of {whole} episodes were won. Harder tasks do"
    if found["mixed_groups"] == 0:
        return "uniform_groups", (
            "this will not learn: in no group did one copy earn more than another. Type a larger "
            f"group_size than {cfg.group_size}, or a higher temperature than {cfg.temperature}"
        )
    return "learns", (
        f"this can learn: {share(found['success'])} of {whole} episodes are won, and "
        f"{share(found['mixed_groups'])} of the groups are mixed"
    )


def expected_hours(
    cfg: DictConfig, played: Played, batch: dict[str, Any], datamodule: AgentDataModule
) -> float | None:
    """The run's hours at the speed that was measured, evaluations included; ``None``: no turn."""
    turns = sum(len(t.turns) for t in played.trajectories)
    if not turns:
        return None
    episodes = cfg.tasks_per_iteration * cfg.group_size
    each = played.seconds / turns * played.turns_per_episode  # seconds of an episode's play
    tokens = sum(len(row) for t in played.trajectories for row in t.rows) / turns
    tokens *= played.turns_per_episode  # of an episode's rows
    scores = ((cfg.update_epochs * cfg.num_minibatches > 1) + 1) / 3  # a forward pass is a third
    update = episodes * tokens * batch["seconds_per_token"] * (cfg.update_epochs + scores)
    evaluations = cfg.iterations // cfg.iterations_per_epoch * datamodule.validation_tasks
    if cfg.evaluate:
        splits = datamodule.evaluation_splits
        evaluations += 2 * sum(len(datamodule.tasks(split)) for split in splits)
    return float(cfg.iterations * (episodes * each + update) + evaluations * each) / 3600


def share(value: float | None) -> str:
    """A share for people."""
    return "?" if value is None else f"{100 * value:.0f} %"


def _share(count: float, total: int) -> float | None:
    return count / total if total else None
