"""How long something takes: clocks for the CPU and for a GPU, cold caches, contenders taking turns.

A ratio is formed within each round, of two times taken moments apart, so that a machine that slows down
slows both; its median and spread are over the rounds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator

import torch

Step = Callable[[], object]
SAMPLE_SECONDS = 0.02
WARM_UP = 3
# Read before each sample: no dirty line is left in the cache whose write-back would fall into the sample.
FLUSH_BYTES = {"cuda": 2**28, "cpu": 2**26}
# The GPU waits this long before each sample, about 1 ms, so that the host has queued the step's kernels by
# the time they start, and launch gaps are not timed.
SLEEP_CYCLES = 2_000_000


def summary(samples: list[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, p20, p80 and min of the samples, times `scale`, to five digits."""
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    numbers = {"median": median.item(), "p20": p20.item(), "p80": p80.item(), "min": min(samples)}
    return {name: digits(number * scale) for name, number in numbers.items()}


def digits(number: float) -> float:
    """Return the number to five digits."""
    return float(f"{number:.5g}")


def ratios(key: str, samples: dict[str, list[float]], against: Iterable[str]) -> dict[str, dict]:
    """Return the summary of the samples of `key` over those of each baseline that has some."""
    return {
        baseline: summary([a / b for a, b in zip(samples[key], samples[baseline], strict=True)])
        for baseline in against
        if baseline in samples and baseline != key
    }


class EventTimer:
    """Seconds that the device takes for a step, starting with a cold L2 and everything queued."""

    def __init__(self):
        self.flush = torch.ones(FLUSH_BYTES["cuda"] // 4, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, step: Step) -> float:
        self.flush.sum()
        torch.cuda._sleep(SLEEP_CYCLES)
        self.start.record()
        step()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3


class CallTimer:
    """Seconds of one call by the host's clock, the mean of so many that a sample is long against the clock's
    resolution. On a GPU a call ends when its work is queued, and not when it is done.

    cold: the first call of a sample starts with cold caches of the CPU. waits: a sample ends when the work of
    its last call is done, so that nothing is hidden in a queue: the time that a program sees.
    """

    def __init__(self, cold: bool = False, waits: bool = False):
        self.flush = torch.ones(FLUSH_BYTES["cpu"] // 4 if cold else 1)
        self.waits = waits
        self.calls: dict[Step, int] = {}

    def __call__(self, step: Step) -> float:
        if step not in self.calls:
            self.calls[step] = max(1, math.ceil(SAMPLE_SECONDS / self.seconds(step, 1)))
        self.flush.sum()
        return self.seconds(step, self.calls[step])

    def seconds(self, step: Step, calls: int) -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        if self.waits:
            synchronize()
        return (time.perf_counter() - begin) / calls


def synchronize() -> None:
    """Wait for the GPU, where there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleave(
    steps: dict[str, Step],
    rounds: int,
    seconds: Callable[[Step], float],
    advance: Callable[[], object],
    seed: int = 0,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time every step once a round, each round in an order of its own, the same in every run.

    Return the samples in seconds, and what those raised that have none because of it.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    raised: dict[str, Exception] = {}
    shuffled = random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in shuffled.sample(sorted(samples), len(samples)):
                try:
                    samples[name].append(seconds(steps[name]))
                except Exception as error:
                    raised[name] = error
                    del samples[name]
            advance()
    finally:
        if collecting:
            gc.enable()
    return {name: samples[name] for name in steps if name in samples}, raised


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


def captured(step: Step, stream: torch.cuda.Stream) -> Step:
    """Capture a step in a CUDA graph on the stream that it was warmed up on, and return its replay, which
    returns the captured results. Raises what the capture raises.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
