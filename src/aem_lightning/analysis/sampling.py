"""States that a policy meets, and many responses drawn at each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from aem_lightning.analysis.inputs import ProxySettings
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.functional import aem_coefficients
from aem_lightning.modules import AgentModule
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    Request,
    Sampling,
    make_groups,
    pack,
    stable_seed,
)
from aem_lightning.types import Trajectory


@dataclass(frozen=True)
class PlayedState:
    """A prompt that was met in play, and what became of the response to it.

    Attributes:
        prompt: The whole model input, token ids.
        surprisal: S of the response that was played there, in nats.
        alpha: Its coefficient within the group of its task.
    """

    prompt: list[int]
    surprisal: float
    alpha: float


def met_states(
    module: AgentModule, datamodule: AgentDataModule, settings: ProxySettings
) -> list[PlayedState]:
    """As many different prompts as ``settings`` asks for, chosen at random from what was played.

    Raises:
        ValueError: The split is unknown, the engine gives no entropies, or fewer prompts were met.
    """
    trajectories = _play(module, datamodule, settings)
    batch = pack(trajectories)
    if not bool((batch.entropies != 0).any()):
        raise ValueError(
            f"The engine {type(module.engine).__name__} gives no token entropies, which this "
            "analysis is about. Use a checkpoint of a run with engine=auto."
        )
    alpha = aem_coefficients(  # as training has them: compared within a task's group, [R]
        batch.entropy,
        batch.response_group,
        sharpness=settings.sharpness,
        min_range=settings.min_range,
        mask=batch.response_mask & (batch.length > 0),
    )
    turns = [(trajectory, turn) for trajectory in trajectories for turn in trajectory.turns]
    different = {
        tuple(trajectory.rows[turn.row][: turn.start]): r
        for r, (trajectory, turn) in enumerate(turns)
        if trajectory.infra_error is None
    }
    if len(different) < settings.states:
        raise ValueError(
            f"states={settings.states}: only {len(different)} different prompts were met "
            f"in {len(trajectories)} episodes. Type states={len(different)}, or "
            f"tasks={2 * settings.tasks}"
        )
    chosen = random.Random(settings.seed).sample(sorted(different), settings.states)
    return [
        PlayedState(
            list(prompt), float(batch.surprisal[different[prompt]]), float(alpha[different[prompt]])
        )
        for prompt in chosen
    ]


def _play(
    module: AgentModule, datamodule: AgentDataModule, settings: ProxySettings
) -> list[Trajectory]:
    """``group_size`` episodes of each of the tasks, at the training temperature."""
    splits = (datamodule.train_split, *datamodule.evaluation_splits)
    if settings.split not in splits:
        raise ValueError(f"split={settings.split}: allowed are {', '.join(splits)}")
    tasks = datamodule.tasks(settings.split)
    tasks = random.Random(settings.seed).sample(tasks, min(settings.tasks, len(tasks)))
    play = module.rollout
    collector = Collector(
        pool=datamodule.pool,
        encoder=module.encoder,
        responder=EngineResponder(module.engine, _sampling(module), ("proxy", settings.seed)),
        rewards=module.rewards,
        max_turns=play.max_turns,
        max_context=play.max_context,
        max_new_tokens=play.max_new_tokens,
        concurrency=play.concurrency,
    )
    return collector.collect(make_groups(tasks, play.group_size), seed=settings.seed)


def draw_responses(
    module: AgentModule, prompts: Sequence[Sequence[int]], settings: ProxySettings
) -> list[list[tuple[int, float, float]]]:
    """Independent responses to each prompt: length, surprisal S, sum of token entropies Λ.

    ``settings.samples`` of them at the training temperature, whatever was drawn so far.
    """
    engine, sampling = module.engine, _sampling(module)
    wanted = [(k, i) for k in range(len(prompts)) for i in range(settings.samples)]
    drawn: list[list[tuple[int, float, float]]] = [[] for _ in prompts]
    at_once = module.rollout.concurrency
    for part in (wanted[i : i + at_once] for i in range(0, len(wanted), at_once)):
        requests = {
            f"{k}/{i}": Request(
                f"{k}/{i}",
                prompts[k],
                sampling,
                stable_seed("proxy", settings.seed, "sample", k, i),
            )
            for k, i in part
        }
        engine.submit(requests.values())
        results = sorted(engine.poll(wait_all=True), key=lambda result: result.key)
        for result in results:
            row = (len(result.tokens), -sum(result.logprobs), sum(result.entropies or ()))
            drawn[int(result.key.partition("/")[0])].append(row)
        for key in requests:
            engine.close(key)
    return drawn


def _sampling(module: AgentModule) -> Sampling:
    play = module.rollout
    return Sampling(play.temperature, play.max_new_tokens, module.encoder.stop_ids)
