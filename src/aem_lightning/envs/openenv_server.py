"""Environments of ours behind an OpenEnv server, for whoever trains or plays over one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aem_lightning.envs.base import RESERVED_INFO_KEYS, TextEnv, import_extra


def application(make_env: Callable[[], TextEnv], task_ids: Sequence[str], *, most: int = 64) -> Any:
    """The FastAPI application of an OpenEnv server; each session has an environment of its own.

    An action is ``{message}``. An observation has the ``text``, and the reserved keys of ``info``
    as fields, ``None`` where they are not known; reward and done are OpenEnv's. A reset's ``seed``
    is the number of a task.

    Args:
        make_env: Makes one environment.
        task_ids: The tasks; a seed beyond them begins again.
        most: Sessions at once.
    """
    server = import_extra("openenv.core.env_server", "adapters")
    types = import_extra("openenv.core.env_server.types", "adapters")
    fields = {name: (Any, None) for name in RESERVED_INFO_KEYS}
    action = import_extra("pydantic", "adapters").create_model(
        "Say", __base__=server.Action, message=(str, ...)
    )
    told = import_extra("pydantic", "adapters").create_model(
        "Told", __base__=server.Observation, text=(str, ...), truncated=(bool, False), **fields
    )

    def observation(text: str, info: Any, **more: Any) -> Any:
        known = {name: info[name] for name in RESERVED_INFO_KEYS if name in info}
        return told(text=text, **known, **more)

    class Served(server.Environment):  # type: ignore[misc, name-defined]
        """What the server plays in a session."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._env, self._turns = make_env(), 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Any:
            self._turns = 0
            task = task_ids[(seed or 0) % len(task_ids)]
            return observation(*self._env.reset(seed=seed, options={"task_id": task}))

        def step(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
            self._turns += 1
            text, reward, ended, cut, info = self._env.step(action.message)
            return observation(text, info, reward=reward, done=ended or cut, truncated=cut)

        @property
        def state(self) -> Any:
            return types.State(step_count=self._turns)

        def close(self) -> None:
            self._env.close()

    return server.create_fastapi_app(Served, action, told, max_concurrent_envs=most)
