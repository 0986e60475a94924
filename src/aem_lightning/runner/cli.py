"""Between the command line and a run: errors that a person can act on, and a tidy log."""

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
from omegaconf import OmegaConf

log = logging.getLogger(__name__)

# What people can mend: bad values, missing files and packages. Anything else keeps its traceback.
MENDABLE = (ValueError, FileNotFoundError, ImportError, HydraException)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with the message alone where a person can mend the cause.

    The traceback goes to ``error.log``.
    """
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
            message = f"{error}"
            if error.__cause__ is not None:
                message += f"\n{error.__cause__}"
            known = _known_keys(OmegaConf.to_container(compose(config_name)))
            close = _close_keys(message, arguments, known)
            if close:
                all_keys = f"python {config_name}.py --cfg job"
                message += f"\nDid you mean {' or '.join(close)}? All keys: {all_keys}"
            sys.exit(message)
        except HydraException as error:
            sys.exit(f"{error}")


def _known_keys(node: object, prefix: str = "") -> list[str]:
    """The dotted keys of a plain container."""
    if not isinstance(node, dict):
        return []
    keys: list[str] = []
    for name, value in node.items():
        keys += [f"{prefix}{name}", *_known_keys(value, f"{prefix}{name}.")]
    return keys


def _close_keys(message: str, arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """What the override that ``message`` complains about may have meant."""
    for argument in arguments:
        key = argument.lstrip("+~").split("=")[0]
        if key in message and key not in known:
            return difflib.get_close_matches(key, known, n=3)
    return []


def quiet_libraries() -> None:
    """Silence messages that a user of this project can do nothing about."""
    # Lightning counts loader workers for us; tasks are plain strings, loading them takes no time.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Training batches are tasks; their number is the user's choice.
    warnings.filterwarnings(
        "ignore", message=".*number of training batches.*smaller than the log.*"
    )
    # torch's own schedulers warn about Lightning's call order on resume.
    warnings.filterwarnings("ignore", message=".*Detected call of `lr_scheduler.step.*")
    # The LightningModule holds a policy in eval mode between rollouts on purpose.
    warnings.filterwarnings("ignore", message=".*Found .* module.*in eval mode.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
