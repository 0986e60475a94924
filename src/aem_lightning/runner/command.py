"""A command as a person types it, and what it answers before torch is imported.

That is help, mistakes in words and in values, and files that are not there.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.runner import overrides
from aem_lightning.runner.checks import NO_FOLDER_YET, refuse
from aem_lightning.runner.cli import clear_errors
from aem_lightning.runner.ranks import meet
from aem_lightning.runner.secrets import scrub, secrets_in, typed_secrets, without_secrets
from aem_lightning.runner.shipped import as_typed, shipped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One of the project's commands.

    Attributes:
        configs: The folder whose files come first: ``configs``, or one of a person's own.
        name: Its config, e.g. ``train`` or ``analysis/proxy``.
        typed: What is typed before the overrides in a checkout, e.g. ``python train.py``.
        about: What it is, for its help.
        check: Raises `ValueError` or `FileNotFoundError` where a config cannot run.
    """

    configs: Path
    name: str
    typed: str
    about: str
    check: Callable[[DictConfig], object]

    def run(self, arguments: Sequence[str], job: Callable[[DictConfig], object]) -> None:
        """Answer ``arguments``, or do ``job`` with the config that they make."""
        self.answer(arguments)
        meet()
        sys.argv[1:] = arguments

        def checked(cfg: DictConfig) -> object:  # Hydra's sweepers compare what jobs return
            with clear_errors():
                self.check_job(cfg)
                return job(cfg)

        start = hydra.main(str(self.configs), self.name, version_base="1.3")
        start(checked)()

    def file(self, name: str) -> Path:
        """The file ``name`` of a person's own folder, or else of the project's."""
        own = self.configs / name
        return own if own.is_file() else shipped("configs") / name

    def answer(self, arguments: Sequence[str]) -> None:
        """End with help where it is asked for, and with what to type where that was wrong.

        What is left to Hydra: ``--cfg`` and ``--info`` of a config that can be composed, and the
        jobs of ``--multirun``, once each of their values has been tried.
        """
        try:
            self._answer(arguments)
        except SystemExit as end:
            told = as_typed(end.code) if isinstance(end.code, str) else end.code
            raise SystemExit(told) from None

    def _answer(self, arguments: Sequence[str]) -> None:
        parser = get_args_parser()
        flags, unknown = parser.parse_known_args(list(arguments))
        if unknown:
            known = re.findall(r"--[a-z-]+", parser.format_usage())
            sys.exit(overrides.wrong_flag(unknown[0], known, self.typed))
        with initialize_config_dir(str(self.configs), version_base="1.3"):
            if told := overrides.without_equals(flags.overrides):
                sys.exit(told)
            if secrets := typed_secrets(flags.overrides):
                sys.exit("\n".join(without_secrets(secrets)))
            for job in _jobs(flags.overrides) if flags.multirun else [flags.overrides]:
                composed = self._compose(job)
                if flags.help:
                    from aem_lightning.runner.help_page import show_help

                    show_help(self, composed)
                    sys.exit(0)
                if not (flags.cfg or flags.info):  # which show what would be refused, too
                    self._check_early(composed)

    def _compose(self, given: Sequence[str]) -> DictConfig:
        try:
            composed = compose(self.name, overrides=list(given), return_hydra_config=True)
        # Others than Hydra's: a number, a list or a text of pages in a group's place.
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
            sys.exit(overrides.explained(error, self.name, given, self.typed))
        file = self.file("train.yaml")
        if self.name == "train" and (stray := overrides.stray_key(composed, file, given)):
            sys.exit(stray)
        return composed

    def _check_early(self, composed: DictConfig) -> None:
        try:
            self._check(composed)
        except (OmegaConfBaseException, ValueError, FileNotFoundError) as error:
            if NO_FOLDER_YET in str(error):
                return
            sys.exit(str(error))

    def check_job(self, cfg: DictConfig) -> None:
        """The same checks inside a job, and a word on overrides that are given twice.

        Raises:
            ValueError: As ``check`` does.
            FileNotFoundError: As ``check`` does.
        """
        for key, values in overrides.given_twice(HydraConfig.get().overrides.task).items():
            log.warning("%s is given more than once (%s): the last counts", key, ", ".join(values))
        if secrets := secrets_in(cfg):
            scrub(Path(HydraConfig.get().runtime.output_dir), secrets)
        self._check(cfg)

    def _check(self, cfg: DictConfig) -> None:
        refuse(without_secrets(secrets_in(cfg)))
        self.check(cfg)


def configs_of(arguments: Sequence[str]) -> Path:
    """The folder whose files come first: that of ``--config-dir``, or else the project's.

    Hydra itself would take a folder of ``--config-dir`` for files that the project lacks alone.
    """
    flags, _ = get_args_parser().parse_known_args(list(arguments))
    if flags.config_path is not None:
        typed = f"--config-dir {flags.config_path}"
        sys.exit(f"--config-path: type {typed}, whose files come before the project's own")
    if flags.config_dir is None:
        return shipped("configs")
    folder = Path(flags.config_dir).absolute()
    if not folder.is_dir():
        sys.exit(f"--config-dir {folder}: there is no such folder. `aem-configs` makes one")
    return folder


def _jobs(given: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of jobs in which each value of a sweep stands at least once."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(given))
    except HydraException:
        yield list(given)  # composing says what is wrong with it
        return
    values = [
        [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
        if each.is_sweep_override()
        else [word]
        for each, word in zip(parsed, given, strict=True)
    ]
    for number in range(max(map(len, values), default=1)):
        yield [words[min(number, len(words) - 1)] for words in values]
