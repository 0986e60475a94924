"""Transcripts: sampled episodes for people to read, as TensorBoard text and JSON lines."""

from __future__ import annotations

import html
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from aem_lightning.callbacks.loggers import log_text
from aem_lightning.callbacks.outputs import iteration_of, trajectories_of
from aem_lightning.callbacks.prompts import Read, kept_prompts, recorded_messages
from aem_lightning.collectives import from_all_ranks, several_ranks, this_rank
from aem_lightning.types import Iteration, Task, Trajectory, Turn

Scores = Mapping[tuple[int, int], Sequence[float]]
"""Entropy, advantage and alpha by (trajectory, turn)."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")


class Transcripts(Callback):
    """Sampled episodes of training, validation and test, or every one of them.

    Each goes as a text (``transcripts/train_0``, ``transcripts/validate_0``, …) to the loggers that
    show texts, and as one line to ``transcripts.jsonl``, which is appended to and complete after
    each episode. Which episodes are shown is a function of (seed, stage, iteration) through a
    generator of its own; the global random states are not touched. A resumed run appends:
    iterations after its checkpoint are played, and written, again. With several ranks the sampled
    episodes are those of rank zero.

    Args:
        every: Every episode of iterations 0, n, 2n, … and of each validation and test goes into
            ``transcripts.jsonl``, of all ranks, so that groups are whole; ``None`` for the sample
            alone, which is what loggers are shown.
        episodes: Episodes shown each time.
        every_n_iterations: Training episodes are shown at iterations 0, n, 2n, …
        validation_episodes: Episodes shown after a validation or test; ``episodes`` when ``None``.
        seed: Chooses other episodes.
        folder: Where ``transcripts.jsonl`` goes; the trainer's ``default_root_dir`` when ``None``.
        max_chars: Longest observation or response in a logger's text; JSON lines hold all of it.

    Raises:
        ValueError: A number is negative, or ``every_n_iterations`` or ``every`` is 0.
    """

    def __init__(
        self,
        episodes: int = 2,
        every_n_iterations: int = 10,
        validation_episodes: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        max_chars: int = 4000,
        every: int | None = None,
    ) -> None:
        shown_in_validation = episodes if validation_episodes is None else validation_episodes
        for name, value, least in (
            ("episodes", episodes, 0),
            ("every_n_iterations", every_n_iterations, 1),
            ("every", 1 if every is None else every, 1),
            ("validation_episodes", shown_in_validation, 0),
            ("max_chars", max_chars, 1),
        ):
            if value < least:
                raise ValueError(f"Transcripts: {name} is {value}; it must be {least} or more.")
        self._episodes = episodes
        self._every = every
        self._sample_every = every_n_iterations
        self._validation_episodes = shown_in_validation
        self._seed = seed
        self._folder = folder
        self._max_chars = max_chars
        self._iteration: int | None = None
        self._pending: list[Trajectory] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Show episodes of the iteration that ended, if it is one of every n."""
        iteration = iteration_of(outputs)
        if iteration is None:
            return
        self._iteration = iteration.index
        sample = 0 if iteration.index % self._sample_every else self._episodes
        whole = self._every is not None and iteration.index % self._every == 0
        if sample or whole:
            played, scores = iteration.trajectories, _scores(iteration)
            self._show(trainer, "train", played, sample, scores, pl_module, whole=whole)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget episodes of a validation, or a test, that did not end."""
        self._pending = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the episodes until all are played."""
        if not trainer.sanity_checking:
            self._pending.extend(trajectories_of(outputs))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show some of them."""
        pending, self._pending = self._pending, []
        if trainer.sanity_checking:
            return
        stage, whole = "test" if trainer.testing else "validate", self._every is not None
        self._show(trainer, stage, pending, self._validation_episodes, {}, pl_module, whole=whole)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def state_dict(self) -> dict[str, Any]:
        """The iteration that a validation's episodes are filed under."""
        return {"iteration": self._iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the numbering of an earlier run."""
        self._iteration = state_dict["iteration"]

    def _show(
        self,
        trainer: Trainer,
        stage: str,
        trajectories: Sequence[Trajectory],
        episodes: int,
        scores: Scores,
        agent: Any,
        *,
        whole: bool,
    ) -> None:
        generator = random.Random(f"{self._seed} {stage} {self._iteration}")
        sample = min(episodes, len(trajectories)) if trainer.is_global_zero else 0
        chosen = sorted(generator.sample(range(len(trajectories)), sample))
        read = getattr(getattr(agent, "encoder", None), "read", None)
        # Each rank counts its groups from 0 on.
        rank = {"rank": this_rank()} if whole and several_ranks() else {}
        label = {"stage": stage, "iteration": self._iteration, **rank}
        records = {
            index: {**label, **episode_record(trajectories[index], index, scores, read)}
            for index in (range(len(trajectories)) if whole else chosen)
        }
        kept = from_all_ranks([*records.values()]) if whole else [*records.values()]
        if not trainer.is_global_zero:
            return
        for record in kept:
            append_json_line(
                Path(self._folder or trainer.default_root_dir) / "transcripts.jsonl", record
            )
        for slot, index in enumerate(chosen):
            text = episode_markdown(records[index], self._max_chars)
            log_text(trainer, f"transcripts/{stage}_{slot}", text, step=self._iteration or 0)


def episode_record(
    trajectory: Trajectory,
    index: int = 0,
    scores: Scores | None = None,
    read: Read | None = None,
) -> dict[str, Any]:
    """One episode as plain data for JSON; a number that is not finite becomes ``None``.

    Where there was training, ``scores`` has the entropy, advantage and alpha of its turns, under
    its ``index`` in the rollout batch; else an entropy is the mean over the turn's own tokens.
    With ``read`` the prompts are kept, as ids and as what ``read`` makes of them, and the ids of
    each response; messages are kept without.
    """
    scores = scores or {}
    prompts = kept_prompts(trajectory, read)
    return {
        "task": trajectory.task.id,
        "task_type": trajectory.task.type,
        "split": trajectory.task.split,
        "group": trajectory.group,
        "copy": trajectory.copy,
        "won": bool(trajectory.won),
        "score": _finite(trajectory.score),
        "returns": _finite(trajectory.total_reward),
        "truncated": bool(trajectory.truncated),
        "infra_error": trajectory.infra_error,
        "reason": trajectory.reason,
        "turns": [
            {
                **_turn_record(turn, scores.get((index, number))),
                **({} if prompt is None else {"prompt": prompt}),
                **_response_ids(trajectory, turn if read is not None else None),
            }
            for number, (turn, prompt) in enumerate(zip(trajectory.turns, prompts, strict=True))
        ],
    }


def recorded_episode(record: Mapping[str, Any]) -> Trajectory:
    """The episode of a record. Rows and log-probabilities were not kept: none, and NaN."""
    task = Task(record["task"], record["task_type"], record["split"])
    return Trajectory(
        task,
        record["group"],
        record["copy"],
        turns=[
            Turn(
                observation=turn["observation"],
                admissible_actions=(),
                response=turn["response"],
                action=turn["action"],
                row=0,
                start=0,
                logprobs=[math.nan] * turn["tokens"],
                entropies=None,
                finish_reason=turn["finish_reason"],
                reward=turn["reward"] or 0.0,
                is_valid=turn["valid"],
                messages=messages,
                malformed=turn.get("malformed", ""),
            )
            for turn, messages in zip(
                record["turns"], recorded_messages(record["turns"]), strict=True
            )
        ],
        won=record["won"],
        score=record["score"] or 0.0,
        truncated=record["truncated"],
        infra_error=record["infra_error"],
        reason=record.get("reason") or "",  # which records of before have not
    )


def episode_markdown(record: Mapping[str, Any], max_chars: int = 4000) -> str:
    """What :func:`episode_record` gives as markdown in which nothing of it acts as markup.

    Of an observation or response longer than ``max_chars`` the rest is cut and counted.
    """
    outcome = "won" if record["won"] else "not won"
    turns = record["turns"]
    lines = [
        f"### {_escape(record['task_type'] or 'task')}: {outcome}, return "
        f"{_number(record['returns'])}, {len(turns)} turns",
        "",
        f"task {_escape(record['task'])}, split {_escape(record['split'])}, "
        f"group {record['group']}, copy {record['copy']}",
        "",
    ]
    if record["infra_error"]:
        lines += ["The environment broke:", "", _block(str(record["infra_error"]), max_chars), ""]
    if record.get("reason"):
        lines += ["Why it was not won:", "", _block(record["reason"], max_chars), ""]
    for number, turn in enumerate(turns):
        numbers = ", ".join(
            f"{name} {_number(turn[name])}"
            for name in ("reward", "entropy", "advantage", "alpha")
            if turn[name] is not None
        )
        lines += [f"**Turn {number}**: {numbers}", "", _block(turn["observation"], max_chars), ""]
        lines += ["response", "", _block(turn["response"], max_chars), "", _verdict(turn), ""]
    return "\n".join(lines)


def append_json_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append ``record`` as one line; a half line that a killed run left is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode("utf-8", errors="backslashreplace"))
        file.flush()


def _scores(iteration: Iteration) -> Scores:
    batch = iteration.batch
    scores = (batch.entropy, iteration.advantages, iteration.alpha)
    columns = (column.tolist() for column in (batch.trajectory, batch.turn, *scores))
    return {(n, t): tuple(found) for n, t, *found in zip(*columns, strict=True)}


def _turn_record(turn: Turn, scores: Sequence[float] | None) -> dict[str, Any]:
    entropy = sum(turn.entropies) / len(turn.entropies) if turn.entropies else None
    entropy, advantage, alpha = scores or (entropy, None, None)
    return {
        "observation": turn.observation,
        "response": turn.response,
        "action": turn.action,
        "malformed": turn.malformed,
        "valid": bool(turn.is_valid),
        "tokens": turn.length,
        "finish_reason": turn.finish_reason,
        "reward": _finite(turn.reward),
        "entropy": _finite(entropy),
        "advantage": _finite(advantage),
        "alpha": _finite(alpha),
    }


def _response_ids(trajectory: Trajectory, turn: Turn | None) -> dict[str, list[int]]:
    if turn is None or not trajectory.rows:
        return {}
    return {"ids": trajectory.rows[turn.row][turn.start : turn.start + turn.length]}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _verdict(turn: Mapping[str, Any]) -> str:
    if turn["action"] is None:
        return f"no action found: malformed, {_escape(turn['malformed'])}"
    return f"action {_escape(turn['action'])}" + ("" if turn["valid"] else " (not admissible)")


def _escape(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _block(text: str, max_chars: int) -> str:
    """An indented code block: unlike a fence, no text can end it."""
    if len(text) > max_chars:
        text = f"{text[:max_chars]}\n… {len(text) - max_chars} more characters"
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
