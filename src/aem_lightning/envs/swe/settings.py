"""How SWE episodes are played and graded, and where their commands run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from aem_lightning.envs.base import EnvPoolError
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import (
    BubblewrapSandbox,
    DockerSandbox,
    Limits,
    LocalSandbox,
    Sandbox,
    SessionSpec,
    remote_sandbox,
)
from aem_lightning.types import Count, Positive

Dialect = Literal["functions", "bash", "words"]
DIALECTS = get_args(Dialect)
SANDBOXES = ("auto", "bubblewrap", "docker", "local", "remote")


@dataclass(frozen=True)
class SweSettings:
    """How episodes are played and graded.

    Attributes:
        sandbox: ``auto``, ``bubblewrap``, ``docker``, ``local`` or ``remote``.
        allow_unsafe: Commands may run without isolation, where nothing isolates here.
        repositories: The folder of clones, for instances without an image.
        dialect: ``functions``: calls in XML; ``bash``: blocks of it, see `parse_block`; ``words``:
            the few words of `WordsDialect`.
        max_turns: The turn after which the work is graded as it is, and the episode cut; None
            leaves that to the caller, who then grades nothing.
        episode_s: Seconds after which an episode is cut.
        grade_s: Seconds for the tests.
        image: The container image for instances that have none, where they are to be in containers.
        images_gb: GB on disk of the images that our runs pulled, before the least recently used are
            removed; None keeps all.
        limits: Of a command; of the tests too, but for their time and their output.
        variables: Of the environment of commands and tests, beside the sandbox's own.
        cached: Answer from memory what was asked before; only where answers do not depend on time.
        records: A folder for patch, log, report and prediction of every graded episode:
            `keep_record`.
        model_name: What predictions call the policy.
        shell: Whether commands begin where the last one ended, ``persistent``: see `keep_state`.
        hosts: With ``remote``, the machines that run the sandboxes: `RemoteSandbox`.
    """

    sandbox: Literal["auto", "bubblewrap", "docker", "local", "remote"] = "auto"
    allow_unsafe: bool = False
    repositories: str | None = None
    dialect: Dialect = "functions"
    max_turns: Count | None = None
    episode_s: Positive = 5400.0
    grade_s: Positive = 300.0
    image: str | None = None
    images_gb: Positive | None = None
    limits: Limits = field(default_factory=Limits)
    variables: Mapping[str, str] = field(default_factory=dict)
    cached: bool = False
    records: str | None = None
    model_name: str = "aem_lightning"
    shell: Literal["fresh", "persistent"] = "fresh"
    hosts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.cached and self.records is not None:
            raise ValueError(
                f"datamodule.environment.records={self.records}: what is answered from memory "
                "leaves no record; type datamodule.environment.cached=false too"
            )
        if self.shell not in ("fresh", "persistent"):
            raise ValueError(
                f"datamodule.environment.shell={self.shell!r}; allowed: fresh, persistent"
            )
        if self.hosts and self.sandbox != "remote":
            raise ValueError(
                f"datamodule.environment.hosts: sandbox={self.sandbox} runs on this machine; type "
                "datamodule.environment.sandbox=remote"
            )
        if self.images_gb is not None and self.sandbox == "remote":
            raise ValueError(
                f"datamodule.environment.images_gb={self.images_gb:g}: with sandbox=remote the "
                "images are on the hosts; start each of them with --images-gb, and type "
                "datamodule.environment.images_gb=null"
            )
        if self.dialect not in DIALECTS:
            raise ValueError(
                f"datamodule.environment.dialect={self.dialect!r}; allowed: {', '.join(DIALECTS)}"
            )


def choose_sandbox(settings: SweSettings, *, has_images: bool = False) -> Sandbox:
    """Where commands run: for ``auto``, what isolates best and works here.

    Instances that are images run in containers; others only where an image is named, as a plain
    one lacks the pytest of the machine's own Python.

    Raises:
        ValueError: There is none of that name, ``local`` without ``allow_unsafe``, or instances
            that are images (or not) and a sandbox that has none (or needs one).
        EnvPoolError: It does not work here; the message says why.
    """
    name, image = settings.sandbox, settings.image
    if name not in SANDBOXES:
        raise ValueError(
            f"datamodule.environment.sandbox={name}: allowed are {', '.join(SANDBOXES)}"
        )
    if name == "remote":
        return _usable_remote(settings, has_images)
    if has_images and name not in ("auto", "docker"):
        raise ValueError(
            f"datamodule.environment.sandbox={name}: these instances are container images; type "
            "datamodule.environment.sandbox=docker"
        )
    if has_images:  # of which the repository is part
        return DockerSandbox(writable_root=True, images_gb=settings.images_gb)
    if name == "docker" and image is None:
        raise ValueError(
            "datamodule.environment.sandbox=docker: these instances are no images; type "
            "datamodule.environment.image=<one with git, python3 and pytest>"
        )
    if name == "local":
        return LocalSandbox(settings.allow_unsafe)
    containers = [DockerSandbox(images_gb=settings.images_gb)] if image else []
    known: list[Sandbox] = [BubblewrapSandbox(), *containers]
    asked = [sandbox for sandbox in known if name in ("auto", sandbox.name)]
    found = [(sandbox, sandbox.probe()) for sandbox in asked]
    usable = [(isolation.level, sandbox) for sandbox, isolation in found if isolation.usable]
    if usable:
        return max(usable, key=lambda pair: pair[0])[1]
    if name == "auto" and settings.allow_unsafe:
        return LocalSandbox(allow_unsafe=True)
    reasons = "; ".join(f"{sandbox.name}: {isolation.reason}" for sandbox, isolation in found)
    raise EnvPoolError(
        f"datamodule.environment.sandbox={name}: nothing here isolates commands ({reasons}). Where "
        "their harm would not matter, type datamodule.environment.sandbox=local "
        "datamodule.environment.allow_unsafe=true, or for a command --sandbox local --allow-unsafe"
    )


def _usable_remote(settings: SweSettings, has_images: bool) -> Sandbox:
    sandbox = remote_sandbox(tuple(settings.hosts), has_images)
    found = sandbox.probe()
    if found.usable:
        return sandbox
    raise EnvPoolError(
        f"datamodule.environment.sandbox=remote: no host can be used ({found.reason}). Start one "
        "with: python -m aem_lightning.envs.swe.serve --address 0.0.0.0"
    )


def session_spec(settings: SweSettings, instance: Instance, limits: Limits) -> SessionSpec:
    """What to open for an instance."""
    image = instance.image or settings.image
    return SessionSpec(instance.workdir, limits, image, settings.variables)
