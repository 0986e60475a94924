"""One decode step of all slots as a CUDA graph: its many small kernels are launched at once.

A decode step of a model with adapters is two thousand kernels of a few microseconds each; launching
them one by one takes longer than running them. A graph is captured for each number of rows and each
bucketed read length that comes up, and replayed over input buffers that stay where they are. Rows
of the graph that have nothing to decode look at what is there and write into the cache's bin. A
cache that grows moves, and graphs of where it was are dropped: it doubles, so that happens seldom.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from aem_lightning.rollout.padding import halved

if TYPE_CHECKING:
    from aem_lightning.rollout.slot_model import SlotModel

logger = logging.getLogger(__name__)

WARM_UP_RUNS = 2

Step = Callable[[], Tensor]


@dataclass(slots=True)
class _Graph:
    """A captured step: its inputs [b], and how to run it."""

    tokens: Tensor
    positions: Tensor
    run: Step


class DecodeGraphs:
    """Captured decode steps of one model.

    Args:
        slots: Rows of the cache.
        bin_position: Where rows without a token write, or at the end of a cache that is shorter.
        capture: Turns a step into one that repeats it on the same buffers; by default a CUDA graph.
    """

    def __init__(
        self, slots: int, bin_position: int, capture: Callable[[Step], Step] | None = None
    ) -> None:
        self._slots = slots
        self._bin = bin_position
        self._capture = capture or CudaCapture()
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._moves = 0  # of the cache, when they were captured
        self._logits: Tensor | None = None  # [slots, V], of all graphs: each would keep its own
        self.is_broken = False

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget what was captured."""
        self._graphs.clear()

    def step(
        self,
        model: SlotModel,
        rows: Sequence[int],
        starts: Sequence[int],
        tokens: Sequence[int],
        read: int,
    ) -> Tensor | None:
        """Next-token logits of ``rows``, [b, V] float32; ``None`` where a graph cannot be had.

        The ``rows`` of the cache ascend and hold ``starts`` tokens; ``tokens`` are appended, and
        queries may look at the first ``read`` positions. The model is always the same.
        """
        if self.is_broken:
            return None
        if self._moves != model.cache.moves:
            self._graphs.clear()
            self._moves = model.cache.moves
        count = halved(rows[-1] + 1, self._slots)
        trash = min(self._bin, model.cache.tokens - 1)
        graph = self._graphs.get((count, read))
        if graph is None:
            graph = self._captured(model, count, read, trash)
            if graph is None:
                return None
            self._graphs[count, read] = graph
        table = torch.tensor([[0] * count, [trash] * count])
        table[0, list(rows)] = torch.tensor(tokens)
        table[1, list(rows)] = torch.tensor(starts)
        graph.tokens.copy_(table[0])
        graph.positions.copy_(table[1])
        logits = graph.run()
        # A copy: the next replay writes to the same place.
        return logits[torch.tensor(rows, device=logits.device)]

    def _captured(self, model: SlotModel, count: int, read: int, trash: int) -> _Graph | None:
        tokens = torch.zeros(count, dtype=torch.long, device=model.device)
        positions = torch.full_like(tokens, trash)

        def step() -> Tensor:
            logits = model.decode(tokens, positions, read)
            if self._logits is None:  # in the first warm-up, outside of any graph's memory
                self._logits = logits.new_empty(self._slots, logits.shape[-1])
            return self._logits[:count].copy_(logits)

        try:
            run = self._capture(step)
        except Exception as error:  # whatever a model does that a graph cannot hold
            if model.kernel is not None:
                model.drop_kernel(error)
                return self._captured(model, count, read, trash)
            self.is_broken = True
            logger.warning(
                "engine.cuda_graphs: the decode step cannot be captured and runs without (%s)",
                str(error).partition("\n")[0],
            )
            return None
        return _Graph(tokens, positions, run)


class CudaCapture:
    """Captures steps as CUDA graphs that share one pool of memory, on one stream.

    The stream is its own, and the same for warm-up and capture: each has a workspace of cuBLAS. On
    torch's default stream for captures, the end of one engine's graphs would clear the workspaces
    of another's (pytorch issue 193402).
    """

    def __init__(self) -> None:
        # Those that are in use: when the last one goes, so does their pool.
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._stream: Any = None  # made at the first capture, on the device in use

    def __call__(self, step: Step) -> Step:
        """Warm ``step`` up, capture it, and return its replay."""
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with _uncached_autocast():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool: Any = next((other.pool() for other in self._graphs), None)  # torch's handle
            # The outer context leads back to this stream: where the end of a capture fails, the
            # inner one stays on its own.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, stream=stream),
            ):
                output = step()
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _uncached_autocast() -> torch.autocast:
    """The autocast in force, without its cache: a cached weight would be freed after the capture.

    The casts become part of the graph, so that it follows the adapters as they are trained.
    """
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )
