"""The ``vllm`` engine: responses from vLLM servers, over HTTP, token ids in and token ids out.

A server runs in an environment of its own (vLLM pins its torch exactly) and keeps the base model;
each version of the policy is sent as a LoRA adapter, written to shared memory and loaded under a
new name. The name matters: vLLM keeps prefixes by adapter name, and would go on with the keys and
values of the old weights under a name that it knows. Start it with `serve_command`.

Several servers share the episodes: one stays with its server, whose cache knows its prefix. A
server that is lost is left out, and what it owes is asked of the others with the same seeds. Of
several ranks the first writes and loads an adapter, and the others use its name; each has its share
of the servers.

What is different from ``engine=hf``: entropies are not known (the pass for old log-probabilities
brings them), and a draw depends on the server's batching in its last bits, so that two runs may
part. With ``action=constrained`` the server's log-probabilities may be those of what it was allowed
to draw; the old ones, of the policy alone, come from that pass too.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import queue
import shutil
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from aem_lightning.collectives import barrier, number_of_ranks, on_first_rank, this_rank
from aem_lightning.rollout.engine import Request, Result, SyncablePolicy
from aem_lightning.rollout.vllm_server import (
    RANKS,
    LostServerError,
    Needs,
    VllmError,
    VllmServer,
    completion_request,
    completion_result,
)
from aem_lightning.types import Count, Places, Positive

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")

T = TypeVar("T")


class VllmEngine:
    """Responses from one vLLM server or several; a ``RolloutEngine``.

    Args:
        url: Where the server listens.
        model: The base model, by the name that the servers serve it under.
        concurrency: Requests in flight at once; the servers do the batching.
        timeout_s: Patience with one response.
        adapter_dir: Where adapters are handed over, a folder that all servers can read; by default
            shared memory, where there is such a thing.
        max_lora_rank: The adapters' rank.
        urls: Where several servers listen, in place of ``url``.
        max_context: Tokens of the longest prompt with its response.
        dtype: In which the policy's frozen weights are kept; part of the help in errors.

    Raises:
        ValueError: A URL that is not ``http://host:port`` or comes twice, or a number out of range.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        model: str | None = None,
        concurrency: Places = 128,
        timeout_s: Positive = 600.0,
        adapter_dir: str | None = None,
        max_lora_rank: Count = 64,
        urls: Sequence[str] | None = None,
        max_context: Count | None = None,
        dtype: str | None = None,
    ) -> None:
        if concurrency < 1 or timeout_s <= 0:
            raise ValueError(
                f"engine.concurrency={concurrency}, engine.timeout_s={timeout_s}: "
                "at least 1 request at once, and more than 0 seconds"
            )
        if max_lora_rank > RANKS[-1]:
            raise ValueError(
                f"engine.max_lora_rank={max_lora_rank}: vLLM takes adapters of rank {RANKS[-1]} at "
                f"most: type policy.lora.r={RANKS[-1]}, or engine=hf"
            )
        places = [url] if urls is None else list(urls)
        if not places or len({place.rstrip("/") for place in places}) < len(places):
            raise ValueError(
                f"engine.urls={places}: different servers, e.g. "
                "engine.urls=[http://a:8000,http://b:8000], or null for the one of engine.url"
            )
        self.needs = Needs(model, max_lora_rank, max_context, dtype)
        self.servers = [VllmServer(place, self.needs, timeout_s) for place in places]
        self.version = -1
        self._handover = adapter_dir or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        self._run = f"aem-{uuid.uuid4().hex[:8]}"  # runs may share a server
        self._adapter: tuple[str, Path | None] | None = None  # its name; on rank 0 its folder too
        self._is_checked = False
        self._lost: dict[VllmServer, LostServerError] = {}
        self._seats: dict[str, VllmServer] = {}  # where an episode's prefix is known
        self._lock = threading.Lock()  # of the two above
        self._room = asyncio.Semaphore(concurrency)
        self._finished: queue.SimpleQueue[tuple[str, int, Result | Exception]] = queue.SimpleQueue()
        self._under_way: dict[str, int] = {}
        self._orders = 0

    def serve_command(self) -> str:
        """What starts a server that fits, in place of the first."""
        return self.servers[0].serve_command()

    def check_server(self) -> None:
        """Raise unless the servers can do all that the run needs.

        Raises:
            VllmError: No server is there, or one does not fit; with the command to type.
        """
        for server in self._present():
            with self._folder("aem-check") as folder:
                try:
                    self._wait(server.check(folder))
                except LostServerError as error:
                    self._leave_out(server, error)
        self._present()
        self._is_checked = True

    def sync(self, policy: SyncablePolicy, version: int) -> None:
        """Load the policy's present adapters under a new name, and unload the old ones.

        Every rank calls it.

        Raises:
            RuntimeError: Requests are unfinished; they would be drawn from two policies.
            TypeError: The policy cannot write its adapters.
            VllmError: No server is there, or one cannot load them.
        """
        if self._under_way:
            raise RuntimeError(
                f"sync to version {version} with {len(self._under_way)} unfinished requests: "
                "call poll(wait_all=True) or close() them first"
            )
        save = getattr(policy, "save_adapter", None)
        if save is None:
            raise TypeError(
                f"engine=vllm needs a policy with save_adapter(folder), not {type(policy).__name__}"
            )
        old = self._adapter
        name, folder = on_first_rank(lambda: self._load(save, version))
        self._adapter = name, None if this_rank() else folder
        self.version = version
        self._seats.clear()
        barrier()  # the others have come from their last request to the old one
        if old is not None:
            self._unload(*old)

    def submit(self, requests: Iterable[Request]) -> None:
        """Send requests; at most one unfinished request a key.

        Raises:
            RuntimeError: ``sync`` was never called.
            ValueError: An empty prompt, or a key with an unfinished request. Nothing of the call is
                sent then.
        """
        if self._adapter is None:
            raise RuntimeError("the engine has no policy yet: call sync(policy, version) first")
        requests = list(requests)
        busy = set(self._under_way)
        for request in requests:
            if request.key in busy:
                raise ValueError(
                    f"{request.key}: submitted again before its last request has finished"
                )
            if not request.prompt:
                raise ValueError(f"{request.key}: the prompt is empty; it needs at least 1 token")
            busy.add(request.key)
        for request in requests:
            self._orders += 1
            self._under_way[request.key] = self._orders
            self._start(self._draw(request, self._orders, self._adapter[0], self.version))

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Result]:
        """Wait until ``at_least`` requests (all with ``wait_all``) have finished; return them.

        Raises:
            VllmError: A request failed.
        """
        results: list[tuple[int, Result]] = []
        while self._under_way and (
            wait_all or len(results) < at_least or not self._finished.empty()
        ):
            key, order, result = self._finished.get()
            if self._under_way.get(key) != order:  # closed meanwhile
                continue
            del self._under_way[key]
            if isinstance(result, Exception):
                raise result
            results.append((order, result))
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def close(self, key: str) -> None:
        """End an episode: what is under way for it will be thrown away."""
        self._under_way.pop(key, None)
        with self._lock:
            self._seats.pop(key, None)

    def release(self) -> bool:
        """Throw away what is under way; there is no GPU memory of this process to give back."""
        self._under_way.clear()
        return False

    def shutdown(self) -> None:
        """Unload the adapters; the servers go on. It comes by itself at the end of the process."""
        self._under_way.clear()
        atexit.unregister(self.shutdown)
        if self._adapter is not None:
            adapter, self._adapter = self._adapter, None
            self._unload(*adapter)

    # -------------------------------------------------------------------------------------- servers

    def _present(self) -> list[VllmServer]:
        """The servers that are not lost.

        Raises:
            VllmError: None is left.
        """
        with self._lock:
            present = [server for server in self.servers if server not in self._lost]
            if not present:
                raise VllmError("\n".join(map(str, self._lost.values())))
        return present

    def _leave_out(self, server: VllmServer, error: LostServerError) -> None:
        """Ask ``server`` no more, and say so once."""
        with self._lock:
            is_new = server not in self._lost
            self._lost[server] = error
            left = len(self.servers) - len(self._lost)
        if is_new and left:
            logger.warning("%d of %d servers go on: %s", left, len(self.servers), error)

    def _seat(self, key: str) -> VllmServer:
        """Where an episode is asked: where it was before, else where the fewest are.

        Each of several ranks has servers of its own, or ranks share one, so that a group's copies
        meet the prefix that they share; another's is asked once these are lost.
        """
        present = self._present()
        with self._lock:
            if self._seats.get(key) not in present:
                taken = Counter(self._seats.values())
                near = [server for server in own_share(self.servers) if server in present]
                self._seats[key] = min(near or present, key=taken.__getitem__)
            return self._seats[key]

    def _load(self, save: Callable[[Path], None], version: int) -> tuple[str, Path | None]:
        """Write an adapter and load it into every server; its name and folder."""
        if not self._is_checked:
            self.check_server()
        self._orders += 1
        # A version may come twice (training, then validation): the count makes the name new.
        name = f"{self._run}-v{version}-{self._orders}"
        with self._folder("aem-adapter", keep=True) as folder:
            save(folder)
            for server in self._present():
                try:
                    self._wait(server.load(name, folder))
                except LostServerError as error:
                    self._leave_out(server, error)
            self._present()
        atexit.register(self.shutdown)
        return name, folder

    def _unload(self, name: str, folder: Path | None) -> None:
        if folder is None:  # the first rank's business
            return
        for server in self.servers:
            if server not in self._lost:
                # A server that has lost it, or is lost: the next request shows.
                with contextlib.suppress(VllmError):
                    self._wait(server.unload(name))
        shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _folder(self, kind: str, *, keep: bool = False) -> Iterator[Path]:
        """A new folder where adapters are handed over; gone again after an error, or at the end."""
        # Not by mkdtemp, whose folders a server of another account cannot read.
        folder = Path(self._handover or tempfile.gettempdir(), f"{kind}-{uuid.uuid4().hex}")
        folder.mkdir()
        try:
            yield folder
        except BaseException:
            keep = False
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------- requests

    async def _draw(self, request: Request, order: int, adapter: str, version: int) -> None:
        """Ask for one response and queue it, or what went wrong."""
        answer: Result | Exception | None = None
        async with self._room:
            while answer is None and self._under_way.get(request.key) == order:
                try:
                    server = self._seat(request.key)
                    text = await server.complete(completion_request(request, adapter))
                    answer = completion_result(request, text, version)
                except LostServerError as error:
                    self._leave_out(server, error)
                except Exception as error:  # raised where the caller is, by poll
                    answer = error
        if answer is not None:
            self._finished.put((request.key, order, answer))

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Where all requests are waited for; its thread ends with the process."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="vllm", daemon=True).start()
        return loop

    def _start(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        result: T = self._start(work).result()
        return result


def own_share(items: Sequence[T]) -> Sequence[T]:
    """This rank's part of ``items``, in order; where there are fewer than ranks, the one it shares.

    Without other ranks it is all of them.
    """
    ranks, rank = number_of_ranks(), this_rank()
    start, end = (number * len(items) // ranks for number in (rank, rank + 1))
    return items[start : max(end, start + 1)]
