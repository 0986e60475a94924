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

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.runner import overrides
from aem_lightning.runner.checks import NO_FOLDER_YET, refuse
from aem_lightning.runner.secrets import scrub, secrets_in, typed_secrets, without_secrets

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One of the project's commands.

    Attributes:
        configs: The folder ``configs``.
        name: Its config, e.g. ``train`` or ``analysis/proxy``.
        typed: What is typed before the overrides, e.g. ``python train.py``.
        about: What it is, for its help.
        check: Raises `ValueError` or `FileNotFoundError` where a config cannot run.
    """

    configs: Path
    name: str
    typed: str
    about: str
    check: Callable[[DictConfig], object]

    def answer(self, arguments: Sequence[str]) -> None:
        """End with help where it is asked for, and with what to type where that was wrong.

        What is left to Hydra: ``--cfg`` and ``--info`` of a config that can be composed, and the
        jobs of ``--multirun``, once each of their values has been tried.
        """
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
        if self.name == "train" and (stray := overrides.stray_key(composed, self.configs, given)):
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
