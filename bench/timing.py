"""How long something takes: clocks for the CPU and for a GPU, cold caches, contenders taking turns.

A ratio is formed within each round, of two times taken moments apart, so that a machine that slows down
slows both; its median and spread are over the rounds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator

import torch

Step = Callable[[], object]
SAMPLE_SECONDS = 0.02
WARM_UP = 3
# Written before each sample. On a GPU it empties the L2, and takes so long (0.2 ms and more) that the host
# has queued the step's kernels by the time they start: launch gaps of up to that long are not timed.
FLUSH_BYTES = {"cuda": 2**30, "cpu": 2**26}


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, p20, p80 and min of the samples, times `scale`, to five digits."""
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    numbers = {"median": median.item(), "p20": p20.item(), "p80": p80.item(), "min": min(samples)}
    return {name: float(f"{number * scale:.5g}") for name, number in numbers.items()}


class EventTimer:
    """Seconds that the device takes for a step, starting with a cold L2."""

    def __init__(self, steps: list[Step]):
        self.flush = torch.empty(FLUSH_BYTES["cuda"], dtype=torch.int8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, step: Step) -> float:
        self.flush.zero_()
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


class CPUTimer:
    """Seconds of one call on the CPU, the mean of so many that a sample is long against the clock's
    resolution; the first of them starts with cold caches.
    """

    def __init__(self, steps: list[Step]):
        self.flush = torch.empty(FLUSH_BYTES["cpu"], dtype=torch.int8)
        self.calls = calls_per_sample(steps)

    def __call__(self, step: Step) -> float:
        self.flush.zero_()
        return host_seconds(step, self.calls)


class HostTimer:
    """Seconds that the host takes for one call: on a GPU, until the work is queued and not until it is
    done.
    """

    def __init__(self, steps: list[Step]):
        self.calls = calls_per_sample(steps)

    def __call__(self, step: Step) -> float:
        synchronize()
        return host_seconds(step, self.calls)


def synchronize() -> None:
    """Wait for the GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def host_seconds(step: Step, calls: int) -> float:
    """Return the seconds of one call by the host's clock, as the mean of `calls`."""
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls


def calls_per_sample(steps: list[Step]) -> int:
    """Choose so many calls, the same for all steps, that a sample takes SAMPLE_SECONDS."""
    return max(1, math.ceil(SAMPLE_SECONDS / min(host_seconds(step, 1) for step in steps)))


def interleave(
    steps: dict[str, Step], rounds: int, seconds: Callable[[Step], float], advance: Callable[[], object]
) -> dict[str, list[float]]:
    """Time every step once a round, each round starting with the next one; return the samples in seconds."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                samples[name].append(seconds(steps[name]))
            order.append(order.pop(0))
            advance()
    finally:
        if collecting:
            gc.enable()
    return samples


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's CPU work on one thread inside: small operations gain nothing from more, and wait for each
    other where the machine is busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def captured(step: Step) -> Step:
    """Capture a step in a CUDA graph and return its replay. Raises what the capture raises."""
    # Warm-up beside the capture's stream, so that what is built at the first call is built outside it.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
