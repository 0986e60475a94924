"""Expert play through the collector: prompts, rows and environments are those of the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aem_lightning.rollout.collector import Episode, Live
from aem_lightning.rollout.encoder import PromptEncoder
from aem_lightning.rollout.engine import Result


class Expert(Protocol):
    """A player that reads what the environment shows."""

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next action."""
        ...


@dataclass(slots=True)
class ExpertResponder:
    """Answers prompts with an expert's actions, written as responses; log-probabilities are 0."""

    encoder: PromptEncoder
    make_expert: Callable[[Episode], Expert]
    _experts: dict[str, Expert] = field(default_factory=dict)

    def respond(self, live: Mapping[str, Live]) -> Sequence[Result]:
        """One expert response for every key of ``live``."""
        return [self._answer(key, item) for key, item in live.items()]

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the experts of finished episodes."""
        for key in keys:
            self._experts.pop(key, None)

    def _answer(self, key: str, item: Live) -> Result:
        if key not in self._experts:
            self._experts[key] = self.make_expert(item.episode)
        action = self._experts[key].act(item.step.observation, item.step.admissible_actions)
        tokens = self.encoder.demonstrate(action)
        return Result(
            key=key,
            tokens=tokens,
            logprobs=[0.0] * len(tokens),
            entropies=None,
            finish_reason="stop",
            version=0,
            reused=0,
        )
