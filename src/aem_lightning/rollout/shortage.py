"""Memory that runs out, told by the stage that it ran out in and by the setting to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from aem_lightning.types import TROUBLESHOOTING

# What a RuntimeError says where torch has no class of its own: on a CPU, and inside cuBLAS.
_SHORT = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


class ShortOfMemoryError(MemoryError):
    """Memory ran out; the message names the stage, and what to type."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the accelerator's, the CPU's or Python's way to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


@contextmanager
def in_stage(stage: str, advice: str = "", /, **settings: int) -> Iterator[None]:
    """A stage of a run: memory that runs out inside is told by its name.

    Args:
        stage: Its name; a stage inside another has the word.
        advice: What else to type, or what alone.
        **settings: The numbers that its memory goes by; half of each is advised. In a name, ``__``
            stands for a dot.

    Raises:
        ShortOfMemoryError: In the place of what torch or Python raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, ShortOfMemoryError) or not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or type(error).__name__
        said = said.removeprefix("Out of memory ")
        if "Type " not in said:  # else whoever raised it knows more
            halves = [
                f"{k.replace('__', '.')}={max(1, v // 2)} ({v} now)" for k, v in settings.items()
            ]
            said = f"{said}. Type {', or '.join([*halves, *filter(None, [advice])])}"
        see = f"{TROUBLESHOOTING}#out-of-memory"
        raise ShortOfMemoryError(f"Out of memory in {stage}: {said} (see {see})") from error
