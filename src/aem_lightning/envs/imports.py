"""What an environment brings into its worker process that a worker does without, and from where."""

from __future__ import annotations

import pickle
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aem_lightning.envs.base import Reset, Step

HEAVY = ("lightning", "torch", "transformers")
LIBRARIES = ("<", sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))


class WatchedEnv:
    """An environment whose ``info["heavy_imports"]`` holds the lines that load heavy packages.

    It comes of a pickled factory, whose module is imported under watch.
    """

    def __init__(self, factory: bytes) -> None:
        self._watch = _Watch()
        sys.meta_path.insert(0, self._watch)
        self._env = pickle.loads(factory)()

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        observation, info = self._env.reset(seed=seed, options=options)
        return observation, self._watched(info)

    def step(self, action: str, /) -> Step:
        *results, info = self._env.step(action)
        return *results, self._watched(info)

    def close(self) -> None:
        self._env.close()

    def _watched(self, info: dict[str, Any]) -> dict[str, Any]:
        lines: dict[str, list[str]] = {}
        for package, line in self._watch.lines.items():
            if package in sys.modules:  # else it was only looked for
                lines.setdefault(line, []).append(package)
        return info | {"heavy_imports": lines}


class _Watch:
    """A finder of modules that finds none, and remembers who asked for a heavy package last."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in HEAVY:
            self.lines[name] = _asking_line()


def _asking_line() -> str:
    """The innermost line of the user's own that is being run, else of a library."""
    frames = [f for f in traceback.extract_stack()[:-2] if not f.filename.startswith("<")]
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(LIBRARIES) and "-packages" not in frame.filename
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
