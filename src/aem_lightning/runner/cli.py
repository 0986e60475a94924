"""What stands between the command line and a run: errors that a person can act on, and a tidy log."""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

# What people can mend: bad values, missing files and packages. Anything else keeps its traceback.
MENDABLE = (ValueError, FileNotFoundError, ImportError, HydraException)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with the message alone where a person can mend the cause; the traceback goes to ``error.log``."""
    try:
        yield
    except MENDABLE as error:
        cause = error
        while isinstance(cause, HydraException) and isinstance(cause.__cause__, MENDABLE):
            cause = cause.__cause__  # hydra wraps what a constructor raised
        where = Path(HydraConfig.get().runtime.output_dir) / "error.log"
        where.write_text(traceback.format_exc(), encoding="utf-8")
        log.error("%s\n(traceback: %s)", cause, where)
        sys.exit(1)


def check_overrides(config_dir: Path, config_name: str, arguments: Sequence[str]) -> None:
    """End with a hint where an override names a key or an option that does not exist."""
    if any(argument.startswith("-") for argument in arguments):
        return  # --help, --multirun and the like are Hydra's own affair
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        try:
            compose(config_name, overrides=list(arguments), return_hydra_config=True)
        except ConfigCompositionException as error:
            known = _known_keys(compose(config_name, overrides=_experiment(arguments)))
            message = f"{error}"
            if error.__cause__ is not None:
                message += f"\n{error.__cause__}"
            sys.exit(message + _suggestion(message, arguments, known))
        except HydraException as error:
            sys.exit(f"{error}")


def _experiment(arguments: Sequence[str]) -> list[str]:
    """No overrides: the keys of the default config are what suggestions are drawn from."""
    return []


def _known_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(cfg) and not OmegaConf.is_missing(cfg, key):
            value = OmegaConf.to_container(cfg, resolve=False)[key]  # type: ignore[call-overload, index]
            if isinstance(value, dict):
                keys += _known_keys(OmegaConf.create(value), f"{prefix}{key}.")
    return keys


def _suggestion(message: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    for argument in arguments:
        key = argument.lstrip("+~").split("=")[0]
        close = difflib.get_close_matches(key, known, n=3)
        if key in message and key not in known and close:
            return f"\nDid you mean {' or '.join(close)}? All keys: python train.py --cfg job"
    return ""


def quiet_libraries() -> None:
    """Silence messages that a user of this project can do nothing about."""
    # Lightning counts CPU cores and workers for us; tasks are plain strings, loading them takes no time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Training batches are tasks; their number is the user's choice.
    warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging.*")
    # torch's own schedulers warn about Lightning's call order on resume.
    warnings.filterwarnings("ignore", message=".*Detected call of `lr_scheduler.step.*")
    # The LightningModule holds a policy in eval mode between rollouts on purpose.
    warnings.filterwarnings("ignore", message=".*Found .* module.*in eval mode.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
