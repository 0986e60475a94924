"""Between the command line and a run: errors that a person can act on, and a tidy log."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.runner import ranks
from aem_lightning.runner.shipped import as_typed
from aem_lightning.runner.signals import stoppable

log = logging.getLogger(__name__)

# What people can mend: bad values, missing files and packages, too little memory. Anything else
# keeps its traceback.
MENDABLE: tuple[type[Exception], ...] = (
    ValueError,
    FileNotFoundError,
    ImportError,
    MemoryError,
    PermissionError,
    HydraException,
    OmegaConfBaseException,
)
# And an environment of their own, workers that do not start, or a server that does not answer.
# Their rooms, of which one imports torch, are loaded wherever these are raised.
OURS = (
    ("aem_lightning.envs", "EnvContractError"),
    ("aem_lightning.envs", "EnvPoolError"),
    ("aem_lightning.rollout", "EndpointError"),
    ("aem_lightning.rollout", "VllmError"),
)
NO_ROOM = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End with the message alone where a person can mend the cause, or a signal is one.

    The traceback goes to ``error.log``. With several ranks rank 0 alone has the last word.
    """
    if ranks.rank():
        logging.disable(logging.INFO)  # rank 0 tells how the run goes
        ranks.watch_first(Path(HydraConfig.get().runtime.output_dir))
    try:
        with stoppable():
            yield
            ranks.wait_for_others()
    except Exception as error:
        message = _mendable(error)
        if ranks.several():
            told = as_typed(message or f"{type(error).__name__}: {error}")
            folder = Path(HydraConfig.get().runtime.output_dir)
            log.error("%s", ranks.last_word(error, told, folder))
        elif message is None:
            raise
        else:
            log.error("%s\n(%s)", as_typed(message), _keep_traceback())
        sys.exit(1)


def _mendable(error: Exception) -> str | None:
    """What to tell a person who can mend the cause of ``error``; ``None`` where nobody can."""
    if _is_full_disk(error):
        return (
            f"The disk is full: {error}. Free some room, or write to another disk: type "
            "paths.root_dir=/other/disk. ckpt_path=last goes on from the last checkpoint."
        )
    ours = [getattr(sys.modules[room], name) for room, name in OURS if room in sys.modules]
    mendable = (*MENDABLE, *ours)
    cause: BaseException = error
    while isinstance(cause, HydraException) and isinstance(cause.__cause__, mendable):
        cause = cause.__cause__  # hydra wraps what a constructor raised
    if not isinstance(cause, mendable):
        return None
    return "\n".join([str(cause), *getattr(cause, "__notes__", ())])


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


def quiet_libraries() -> None:
    """Silence messages that a user of this project can do nothing about.

    To be called once the libraries are imported: some bring filters of their own.
    """
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
        # Of several ranks: every metric is of all of them already.
        ".*It is recommended to use `self.log.*sync_dist=True.*",
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Devices found, tips of the day, and that training stopped at its last epoch.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading and writing weights: seconds
    enable_progress_bars()  # of downloads: minutes, and the line above stops them too
