"""Streams, graphs and memory for a test that runs on a GPU and, with what there is of them, on the CPU, so
that it is run where there is no GPU too.

GPU               CPU
a stream          nothing
a CUDA graph      the same computation again, into the results of the first
the allocator     the tensors that are alive
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from conftest import GPU
from torch import Tensor

# Triton's interpreter changes triton.language while it runs: one thread at a time.
_turn = threading.Lock()


@contextlib.contextmanager
def on_stream(own: bool) -> Iterator[None]:
    """Run a block on a stream of its own, or on the default one, after what is queued there; wait for it."""
    if not GPU:
        with _turn:
            yield
        return
    stream = torch.cuda.Stream() if own else torch.cuda.default_stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def in_threads(count: int, work: Callable[[int], object]) -> list:
    """Return work(i) for i < count, each in a thread. Raises what the first that failed has raised."""
    found: list = [None] * count
    raised: list[BaseException] = []

    def run(index: int) -> None:
        try:
            found[index] = work(index)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return found


class Captured:
    """A computation that is captured, after a first run of it, and replayed into the same `results`."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]]) -> None:
        self._compute = compute
        self._graph = None
        with on_stream(own=True):
            compute()
        if GPU:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.results = compute()
        else:
            self.results = [result.clone() for result in compute()]

    def replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            torch.cuda.synchronize()
            return
        for held, result in zip(self.results, self._compute(), strict=True):
            held.copy_(result)


def memory_held() -> tuple[int, int]:
    """Bytes that the allocator has given out, and that it has taken from the device."""
    if GPU:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return live_bytes(), 0


def live_bytes() -> int:
    """Bytes of the dense tensors that are alive, those that share memory once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is Tensor]
    # Other tests of the process leave sparse ones behind, which have no storage, and some on meta.
    storages = [one.untyped_storage() for one in tensors if torch._C._has_storage(one) and not one.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
