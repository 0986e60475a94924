"""The command line without a process of its own: the scripts as they are, in this interpreter."""

from __future__ import annotations

import logging
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hydra.core.global_hydra import GlobalHydra
from runs import ROOT


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, and what it said on both streams."""

    status: int
    said: str

    def assert_clear(self, *parts: str) -> None:
        """Status 1 and every one of ``parts``: what was given, what is allowed, what to type."""
        assert self.status == 1, self.said
        for part in parts:
            assert part in self.said, f"{part!r} is not said in: {self.said}"
        assert "Traceback" not in self.said, self.said


Command = Callable[..., Ended]


def run_script(
    script: str, *overrides: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ended:
    """``python <script> <overrides>``."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [script, *overrides])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    status: object = 0
    try:
        with warnings.catch_warnings():
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        status = end.code
    finally:
        GlobalHydra.instance().clear()
        root.handlers[:] = handlers
        root.setLevel(level)
    said = "".join(capfd.readouterr())
    if isinstance(status, str):  # sys.exit with a text: the interpreter prints it and exits with 1
        said, status = said + status, 1
    return Ended(int(status or 0), said)
