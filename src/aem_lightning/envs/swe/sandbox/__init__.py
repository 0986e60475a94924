"""Places where commands of a policy are run, and cannot do harm."""

from __future__ import annotations

from aem_lightning.envs.swe.sandbox.base import (
    WORKDIR,
    CommandResult,
    Isolation,
    Level,
    Limits,
    Sandbox,
    Session,
    SessionSpec,
)
from aem_lightning.envs.swe.sandbox.bubblewrap import BubblewrapSandbox
from aem_lightning.envs.swe.sandbox.docker import DockerSandbox
from aem_lightning.envs.swe.sandbox.local import LocalSandbox
from aem_lightning.envs.swe.sandbox.remote import RemoteSandbox, remote_sandbox
from aem_lightning.envs.swe.sandbox.session import tar_of

__all__ = [
    "WORKDIR",
    "BubblewrapSandbox",
    "CommandResult",
    "DockerSandbox",
    "Isolation",
    "Level",
    "Limits",
    "LocalSandbox",
    "RemoteSandbox",
    "Sandbox",
    "Session",
    "SessionSpec",
    "remote_sandbox",
    "tar_of",
]
