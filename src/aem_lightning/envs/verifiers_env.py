"""Environments of verifiers as `TextEnv`: its own rollout asks, and our policy answers.

An environment's rollout is a coroutine that waits for a model. Here the model is whoever calls
``step``; set-up, replies, stop conditions and the rubric are the library's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from aem_lightning.envs.base import Reset, Step, import_extra
from aem_lightning.envs.questions import task_number


class VerifiersEnv:
    """An environment that ``verifiers.load_environment`` finds, single- or multi-turn.

    A task ``train/<number>`` is a row of its data set, one of another split a row of its evaluation
    set; where it has none, numbers go on in its data set, so that no row is in two splits. The
    reward, and the score, is the rubric's sum at the end of an episode.

    Args:
        env_id: The name of an installed environment, e.g. ``gsm8k`` or ``owner/gsm8k``.
        win_at: The reward of a win.
        arguments: More for ``load_environment``.

    Raises:
        ValueError: There is no such environment, or it needs what this loop does not have: native
            calls of tools, or rewards that compare episodes.
    """

    def __init__(self, env_id: str, *, win_at: float = 1.0, **arguments: Any) -> None:
        self._library = import_extra("verifiers", "adapters")
        self._types = import_extra("verifiers.types", "adapters")
        try:
            self._env = self._library.load_environment(env_id, **arguments)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"env_id={env_id!r}: {error} An environment is a package: install it, e.g. "
                f"pip install {env_id.rpartition('/')[2]}, then datamodule.env.env_id={env_id}"
            ) from error
        if getattr(self._env, "tool_defs", None):
            raise ValueError(f"env_id={env_id!r} is played by native calls of tools, not by text")
        if getattr(self._env.rubric, "has_group_rewards", False):
            raise ValueError(f"env_id={env_id!r} rewards an episode by others of its group")
        self._win_at, self._id = win_at, env_id
        self._loop = asyncio.new_event_loop()
        self._env.get_model_response = self._respond  # what its rollout asks a model by
        self._client = self._library.Client.__new__(_stub_of(self._library.Client))
        self._rollout: asyncio.Task[Any] | None = None
        self._taken: dict[tuple[str, int], int] = {}

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the rollout of the task's row; what it asks first."""
        self._stop()
        self._known = {"task_id": str((options or {})["task_id"])}
        row = self._row(self._known["task_id"], task_number(options))
        self._seen: Sequence[Any] = ()
        rollout = self._env.rollout(row, self._client, "policy", {})
        self._rollout = self._loop.create_task(rollout)
        text, _ = self._go_on()
        if self._rollout.done():
            raise RuntimeError(
                f"task {self._known['task_id']}: the rollout of {self._id} ended before it asked "
                f"the policy anything: {self._rollout.result().get('error') or 'no error is told'}"
            )
        return text, dict(self._known)

    def step(self, action: str, /) -> Step:
        """Its answer to a reply; at the end the rubric's reward."""
        message = self._types.ResponseMessage(
            content=action, finish_reason="stop", is_truncated=False
        )
        self._reply.set_result(
            self._types.Response(id="policy", created=0, model="policy", message=message)
        )
        text, state = self._go_on()
        if state is None:
            return text, 0.0, False, False, dict(self._known)
        if state.get("error") is not None:
            return text, 0.0, False, True, self._known | {"infra_error": repr(state["error"])}
        self._run(self._env.rubric.score_rollout(state))
        reward = float(state["reward"])
        ended = {"won": reward >= self._win_at, "score": reward}
        return text, reward, True, False, self._known | ended

    def close(self) -> None:
        """End the rollout that is under way."""
        self._stop()
        self._loop.close()

    def _row(self, task_id: str, number: int) -> dict[str, Any]:
        own = self._env.eval_dataset is not None or self._env.eval_dataset_source is not None
        if own and not task_id.startswith("train/"):
            rows = self._env.get_eval_dataset()
            return dict(rows[self._evaluated(task_id, number, len(rows))])
        rows = self._env.get_dataset()
        if number >= len(rows):
            raise ValueError(
                f"task {task_id}: the data set of {self._id} has {len(rows)} rows. Type "
                f"datamodule.sizes.train={max(1, len(rows) * 9 // 10)}"
                + ("" if own else f" datamodule.sizes.valid={max(1, len(rows) // 10)}")
            )
        return dict(rows[number])

    def _evaluated(self, task_id: str, number: int, rows: int) -> int:
        """The row of the evaluation set, whose tasks have numbers that go on from the training's.

        Raises:
            ValueError: Another task of the split has it: there are more tasks than rows.
        """
        split, row = task_id.partition("/")[0], number % rows
        if self._taken.setdefault((split, row), number) != number:
            raise ValueError(
                f"task {task_id}: the evaluation set of {self._id} has {rows} rows, and another "
                f"task of {split} is the same one. Type datamodule.sizes.{split}={rows}"
            )
        return row

    def _go_on(self) -> tuple[str, Any]:
        """Let the rollout run until it asks again: what it says, and its state at the end."""
        self._asked = self._loop.create_future()
        assert self._rollout is not None
        waited = asyncio.wait({self._rollout, self._asked}, return_when=asyncio.FIRST_COMPLETED)
        self._run(waited)
        if not self._rollout.done():
            return self._text(self._asked.result()), None
        state = self._rollout.result()
        last = state.get("final_env_response")
        return self._text([*self._seen, *(last if isinstance(last, list) else ())]), state

    async def _respond(self, state: Any, prompt: Sequence[Any], *_: Any, **__: Any) -> Any:
        """Stands where the library's environments ask a model."""
        self._reply = self._loop.create_future()
        self._asked.set_result(prompt)
        return await self._reply

    def _text(self, messages: Sequence[Any]) -> str:
        """What is new in ``messages`` since they were last seen, replies left out."""
        new, self._seen = messages[len(self._seen) :], messages
        plain = (m if isinstance(m, Mapping) else m.model_dump() for m in new)
        return "\n\n".join(_words(m["content"]) for m in plain if m["role"] != "assistant")

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def _stop(self) -> None:
        if self._rollout is not None and not self._rollout.done():
            self._rollout.cancel()
            self._run(asyncio.wait({self._rollout}))
        self._rollout = None


def _words(content: Any) -> str:
    """A message's text; of parts those that are text."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(str(part.get("text", "")) for part in content)


def _stub_of(client: type) -> type:
    """A client that is never asked: the library wants one of its own class."""
    made = type("NoClient", (client,), {})
    made.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    return made
