"""Between the command line and a run: errors that a person can act on, and a tidy log."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from aem_lightning.envs import EnvContractError
from aem_lightning.rollout import EndpointError

log = logging.getLogger(__name__)

# What people can mend: bad values, missing files and packages, too little memory, an environment of
# their own, endpoints that do not answer. Anything else keeps its traceback.
MENDABLE = (
    ValueError,
    FileNotFoundError,
    ImportError,
    MemoryError,
    PermissionError,
    EndpointError,
    EnvContractError,
    HydraException,
)
API = "policy=api"
NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with the message alone where a person can mend the cause.

    The traceback goes to ``error.log``.
    """
    try:
        yield
    except Exception as error:
        message = _mendable(error)
        if message is None:
            raise
        log.error("%s\n(%s)", message, _keep_traceback())
        sys.exit(1)


def _mendable(error: Exception) -> str | None:
    """What to tell a person who can mend the cause of ``error``; ``None`` where nobody can."""
    if _is_full_disk(error):
        return (
            f"The disk is full: {error}. Free some room, or write to another disk: type "
            "paths.root_dir=/other/disk. ckpt_path=last continues from the last completed epoch."
        )
    cause: BaseException = error
    while isinstance(cause, HydraException) and isinstance(cause.__cause__, MENDABLE):
        cause = cause.__cause__  # hydra wraps what a constructor raised
    return str(cause) if isinstance(cause, MENDABLE) else None


def _is_full_disk(error: BaseException) -> bool:
    """Whether ``error``, or what led to it, is a write that found no room.

    Told by its words: libraries that write through C++ or Rust raise errors of their own.
    """
    found: BaseException | None = error
    while found is not None:
        if any(words in str(found) for words in NO_ROOM):
            return True
        found = found.__cause__ or found.__context__
    return False


def _keep_traceback() -> str:
    """Write the traceback under way to ``error.log``; says where, or why not."""
    where = Path(HydraConfig.get().runtime.output_dir) / "error.log"
    try:
        where.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError as error:  # the disk is full, as may be what is being reported
        return f"no traceback: {error}"
    return f"traceback: {where}"


def accept_plus(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``profile=true`` for ``+profile=true``, ``logger=[]`` for ``logger=null``.

    Hydra takes a plus for keys that a config lacks, and no other; and for a group no null.
    """
    none = {f"{group}=null": f"{group}=[]" for group in ("callbacks", "logger")}
    return [a.removeprefix("+") if a.startswith("+profile=") else none.get(a, a) for a in arguments]


def check_overrides(
    config_dir: Path, config_name: str, arguments: Sequence[str], command: str | None = None
) -> None:
    """End with a hint where an override names a key or an option that does not exist.

    ``command`` is what a person types before the overrides, where that is not
    ``python <config_name>.py``.
    """
    if any(argument.startswith("-") for argument in arguments):
        return  # --help, --multirun and the like are Hydra's own affair
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        try:
            composed = compose(config_name, overrides=list(arguments), return_hydra_config=True)
            if config_name == "train" and (stray := _stray_key(composed, arguments)):
                sys.exit(stray)
        except MissingConfigException as error:
            sys.exit(_unknown_option(error, arguments))
        except ConfigCompositionException as error:
            sys.exit(_unknown_key(error, config_name, arguments, command))
        except HydraException as error:
            sys.exit(f"{error}\nGiven: {' '.join(arguments)}")


def _unknown_option(error: MissingConfigException, arguments: Sequence[str]) -> str:
    """What to type instead of ``group=option``."""
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    given = next((a for a in arguments if a.endswith(f"{group}={option}")), f"{group}={option}")
    if not error.options:
        return f"{error}"
    return f"{given}: there is no such option. Allowed: {', '.join(error.options)}."


def _unknown_key(
    error: ConfigCompositionException,
    config_name: str,
    arguments: Sequence[str],
    command: str | None,
) -> str:
    """What to type instead of ``key=value``, where that is what is wrong."""
    message = f"{error}" if error.__cause__ is None else f"{error}\n{error.__cause__}"
    if API in arguments and config_name != "eval":
        return (
            f"{API}: such a model can be played, not trained. Type python eval.py {API} model=..."
        )
    known = _keys_of(config_name, [a for a in arguments if a == API])
    others = _keys_of(config_name, [API]) if config_name == "eval" else []
    for argument in arguments:
        key = argument.lstrip("+~").split("=")[0]
        if key in message and key not in known:
            if key in others:
                return (
                    f"{argument}: an option of {API}. A checkpoint has its training run's own; "
                    f"change those by 'overrides=[{argument}]'"
                )
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"Did you mean {' or '.join(close)}? " if close else ""
            all_keys = f"All keys: {command or f'python {config_name}.py'} --cfg job"
            return f"{argument}: the config has no such key. {hint}{all_keys}"
    return message


def _stray_key(composed: DictConfig, arguments: Sequence[str]) -> str | None:
    """What to say of a key that nothing reads: in a file, Hydra takes any.

    One that was added with a plus was meant, and so was one that another key refers to.
    """
    known = [str(key) for key in compose("train")]
    added = [argument.lstrip("+").split("=")[0].split(".")[0] for argument in arguments]
    written = OmegaConf.to_yaml(composed)
    for key in map(str, composed):
        is_read = key in known or re.search(rf"\${{{re.escape(key)}\b", written)
        if not is_read and key != "hydra" and key not in added:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "Remove it."
            return f"{key}: a file of this config sets it, and nothing reads such a key. {hint}"
    return None


def _keys_of(config_name: str, groups: Sequence[str]) -> list[str]:
    return _known_keys(OmegaConf.to_container(compose(config_name, overrides=list(groups))))


def _known_keys(node: object, prefix: str = "") -> list[str]:
    """The dotted keys of a plain container."""
    if not isinstance(node, dict):
        return []
    keys: list[str] = []
    for name, value in node.items():
        keys += [f"{prefix}{name}", *_known_keys(value, f"{prefix}{name}.")]
    return keys


def quiet_libraries() -> None:
    """Silence messages that a user of this project can do nothing about."""
    for message in (
        # Lightning counts loader workers for us; tasks are plain strings, loading takes no time.
        ".*does not have many workers.*",
        # Training batches are tasks; their number is the user's choice.
        ".*number of training batches.*smaller than the log.*",
        # A skipped update, or a resumed run: the schedule counts iterations, not updates.
        ".*Detected call of `lr_scheduler.step.*",
        # Base models come in eval mode; adapters need no other, and checkpointed layers leave it.
        ".*Found .* module.*in eval mode.*",
        # Tasks need no transfer, whoever offers one.
        ".*You have overridden `transfer_batch_to_device`.*",
        # Inside Lightning and transformers, of their own older names.
        ".*isinstance.treespec, LeafSpec.*",
        ".*gradient_checkpointing.* is deprecated.*",
        # A continued run has its own folder, and a test its checkpoints.
        ".*The dirpath has changed from.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Devices found, tips of the day, and that training stopped at its last epoch.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading and writing weights: seconds
    enable_progress_bars()  # of downloads: minutes, and the line above stops them too
