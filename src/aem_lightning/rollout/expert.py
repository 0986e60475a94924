"""Expert play through the collector: prompts, rows and environments are those of the policy."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aem_lightning.rollout.collector import Episode, Live, stable_seed
from aem_lightning.rollout.encoder import PromptEncoder
from aem_lightning.rollout.engine import Result


class Expert(Protocol):
    """A player that reads what the environment shows.

    It may also have a ``thought``: in a few words, why it chose its last action.
    """

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next action."""
        ...


@dataclass(slots=True)
class ExpertResponder:
    """Answers prompts with an expert's actions, written as responses; log-probabilities are 0.

    With ``slip`` > 0 some actions are not the expert's but a random one: an admissible action, or
    one that was admissible at an earlier turn and mostly fails now. The expert then has to recover,
    which is what a policy that makes mistakes must learn. ``slips`` says which turns they are, so
    that a caller can leave them out. Source: DART, arXiv 1703.09327.

    Args:
        encoder: Messages to token ids.
        make_expert: An expert for an episode.
        slip: Probability of a random action.
        seed: Key of the slips.
    """

    encoder: PromptEncoder
    make_expert: Callable[[Episode], Expert]
    slip: float = 0.0
    seed: int = 0
    slips: set[tuple[str, int]] = field(default_factory=set)
    _experts: dict[str, Expert] = field(default_factory=dict)
    _answers: list[Result] = field(default_factory=list)

    def ask(self, live: Mapping[str, Live]) -> None:
        """Think of one response for every key of ``live``."""
        self._answers += [self._answer(key, item) for key, item in live.items()]

    def answers(self) -> Sequence[Result]:
        """All that were asked for."""
        answers, self._answers = self._answers, []
        return answers

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the experts of finished episodes."""
        for key in keys:
            self._experts.pop(key, None)

    def _answer(self, key: str, item: Live) -> Result:
        if key not in self._experts:
            self._experts[key] = self.make_expert(item.episode)
        admissible = item.step.admissible_actions
        action = self._experts[key].act(item.step.observation, admissible)
        turns = item.trajectory.turns
        rng = random.Random(stable_seed(self.seed, "slip", key, len(turns)))
        if rng.random() < self.slip:
            earlier = turns[rng.randrange(len(turns))].admissible_actions if turns else admissible
            action = rng.choice(sorted(rng.choice((admissible, earlier)))) if admissible else action
            self.slips.add((key, len(turns)))
        # A slip comes after the expert's own thought: careless hands, not careless thinking.
        tokens = self.encoder.demonstrate(action, getattr(self._experts[key], "thought", ""))
        check_round_trip(self.encoder, action, tokens)
        return Result(
            key=key,
            tokens=tokens,
            logprobs=[0.0] * len(tokens),
            entropies=None,
            finish_reason="stop",
            version=0,
            reused=0,
        )


def check_round_trip(encoder: PromptEncoder, action: str, tokens: Sequence[int]) -> None:
    """Prove that the environment reads ``action`` out of ``tokens``, which were made of it.

    A run of blanks inside a line may come back as one: to environments of words they are the same.

    Raises:
        ValueError: The tokenizer changes the action, or the prompt does not find it again.
    """
    prompt = encoder.prompt
    written = str(prompt.demonstrated(action))
    meant, read = prompt.parse(written), prompt.parse(encoder.decode(tokens))
    if meant is None or not (
        _with_single_blanks(meant) == _with_single_blanks(action)
        # The same call may be said in several ways.
        or (prompt.action == "tool_call" and str(prompt.demonstrated(meant)) == written)
    ):
        raise ValueError(
            f"The expert's action {action!r} cannot be said in this prompt: in {written!r} "
            f"prompt.action={prompt.action} reads {meant!r}. Type another prompt=..., or another "
            "prompt.demonstration=..."
        )
    if read != meant:
        name = encoder.tokenizer.name_or_path or type(encoder.tokenizer).__name__
        raise ValueError(
            f"The tokenizer of {name!r} loses a part of the expert's action {action!r}: it comes "
            f"back as {read!r}, so the policy could never say it. Type policy.model=<folder> of a "
            "model whose tokenizer keeps every text (a byte-level one), or policy=tiny "
            "policy.model=null, whose own one does."
        )


def _with_single_blanks(text: str) -> str:
    return re.sub(" +", " ", text.strip())
