"""Anyone's data with a checker: questions with one answer, and with calls of tools before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Any

from annotated_types import Gt, Lt

from aem_lightning.datamodules.function_tools import tool_of
from aem_lightning.datamodules.rows import asker, named_function, read_splits, row_file
from aem_lightning.datamodules.seeded import SeededDataModule
from aem_lightning.envs.own_agent import AgentEnv
from aem_lightning.envs.questions import ANSWER, QuestionEnv, ToolsEnv, task_number
from aem_lightning.types import Task, Tool, function_tool

Function = str | Callable[..., Any]
"""A function, or its path ``my_module.my_function``."""


class DatasetDataModule(SeededDataModule):
    """Single-turn data: a row is asked, the answer is scored, and the episode ends.

    The reward runs in worker processes, which import neither torch nor Lightning.

    Args:
        dataset: A list of dictionaries, a `datasets.Dataset`, a function that returns either, or
            its path, a file (.jsonl, .csv, .parquet), a name of the Hugging Face hub, or a mapping
            of splits to these. All splits but ``train`` are evaluated on.
        prompt: The question of a row: a column, a format ``"{a} + {b} ="``, or a function.
        reward: From row and answer to a number.
        subset: Of a name on the hub.
        validation: Where there is one split, the share of it to evaluate on: always the same rows.
        win_at: The reward of a success.
        expert: From row and a `random.Random` to an answer, for a warm start.
        evaluation_splits: Splits that an evaluation plays; ``None``: all but ``train``.
        settings: Arguments of `AgentDataModule`.

    Raises:
        ValueError: Data that cannot be read, or a function that a worker cannot import.
    """

    def __init__(
        self,
        dataset: Any,
        prompt: Function,
        reward: Function,
        *,
        subset: str | None = None,
        validation: Annotated[float, Gt(0), Lt(1)] = 0.1,
        win_at: float = 1.0,
        expert: Function | None = None,
        evaluation_splits: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        splits = read_splits(dataset, subset, validation)
        ask = asker(prompt, next(iter(splits["train"])))
        score = named_function("reward", reward)
        self.rows = row_file(chain.from_iterable(splits.values()), ask, score)
        self.checker, self.win_at = getattr(score, "__name__", "reward"), win_at
        self.expert = None if expert is None else named_function("expert", expert)
        if evaluation_splits is not None:
            settings["evaluation_splits"] = evaluation_splits
        if unknown := set(evaluation_splits or ()) - splits.keys():
            raise ValueError(
                f"datamodule.evaluation_splits={list(evaluation_splits or ())}: the data has no "
                f"{', '.join(sorted(unknown))}. Its splits: {', '.join(splits)}"
            )
        sizes = {name: len(rows) for name, rows in splits.items()}
        super().__init__(self.make_factory(), sizes=sizes, **settings)

    def make_factory(self) -> Callable[[], Any]:
        """The environment of these rows."""
        return partial(QuestionEnv, self.rows, self.checker, self.win_at)

    def make_expert(self, task: Task, seed: int) -> Any:
        """Who answers as ``expert`` does."""
        if self.expert is None:
            return super().make_expert(task, seed)
        entry = self.rows[task_number({"task_id": task.id})]
        return _Answering(partial(self.expert, entry["row"], random.Random(seed)))

    def vocabulary(self) -> list[str]:
        """Every question, and what an expert answers."""
        entries = map(self.rows.__getitem__, range(len(self.rows.offsets)))
        expert = self.expert
        texts = (
            (entry["question"], expert(entry["row"], random.Random(number)) if expert else "")
            for number, entry in enumerate(entries)
        )
        return sorted({*chain.from_iterable(texts)})


class ToolsDataModule(DatasetDataModule):
    """Questions that are answered with the help of functions, for ``prompt=tools``.

    A function becomes a tool by its signature and docstring; the policy calls them in turn, and
    answers by a call of ``final_answer``. What a function raises, it reads. Functions run in worker
    processes, many episodes in each, so they keep nothing of an episode.

    Args:
        dataset: As for `DatasetDataModule`, like those that follow.
        prompt: The question of a row.
        reward: From row, answer and calls to a number. A call is ``{"name": ..., "arguments": ...,
            "result": ...}``.
        tools: The functions.
        settings: Arguments of `DatasetDataModule`.

    Raises:
        ValueError: A function without type hints or a docstring, or two of one name.
    """

    def __init__(
        self,
        dataset: Any,
        prompt: Function,
        reward: Function,
        *,
        tools: Sequence[Function],
        **settings: Any,
    ) -> None:
        self.functions = [named_function("tools", tool) for tool in tools]
        self._tools = [tool_of(function) for function in self.functions]
        names = [*(function.__name__ for function in self.functions), ANSWER]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"datamodule.tools: several are called {', '.join(twice)}")
        if len(names) == 1:
            raise ValueError("datamodule.tools=[]: give a function, or use DatasetDataModule")
        super().__init__(dataset, prompt, reward, **settings)

    def make_factory(self) -> Callable[[], Any]:
        """The environment of these rows and functions."""
        return partial(ToolsEnv, self.rows, self.checker, self.functions, self.win_at)

    def tools(self) -> list[Tool]:
        """The functions, and the call that answers."""
        says = {"answer": "the answer, and nothing else"}
        return [*self._tools, function_tool(ANSWER, "Answer the question and end.", says)]


class OwnAgentDataModule(DatasetDataModule):
    """An agent written against an OpenAI client, trained as it is, for ``prompt=chat``.

    Every ``client.chat.completions.create`` of the function is a turn: the policy reads the
    messages and tools as they were sent, and what it says is the reply. Functions run in threads of
    worker processes. What the run decides, such as the temperature, is ignored where a call gives
    it, and named under ``ignored`` in the reply.

    Args:
        dataset: As for `DatasetDataModule`; a row is a task.
        agent: From a client (or, where its first argument is called ``base_url``, the address of
            the endpoint) and a row to the episode's reward; a coroutine gets an `AsyncOpenAI`.
        settings: Arguments of `DatasetDataModule` but ``reward``; ``expert``, which answers every
            call, and ``prompt``, whose words it knows, are for ``policy=tiny`` alone.

    Raises:
        ValueError: Data that cannot be read, or a function that a worker cannot import.
    """

    def __init__(self, dataset: Any, agent: Function, **settings: Any) -> None:
        agent = named_function("agent", agent)
        super().__init__(dataset, reward=agent, **{"prompt": _unasked, **settings})

    def make_factory(self) -> Callable[[], Any]:
        """The environment of this agent."""
        return partial(AgentEnv, self.rows, self.win_at)


def _unasked(row: Any) -> str:
    """No question: the agent asks."""
    return ""


class _Answering:
    """An expert whose only word is an answer."""

    def __init__(self, answer: Callable[[], str]) -> None:
        self._answer = answer

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        return self._answer()
