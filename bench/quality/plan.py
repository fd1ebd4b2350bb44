"""Which runs the study has, in which order, and the learning rate that a method gets on a task."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from .settings import (
    ATTENTION_ONLY,
    CHOOSING_SEED,
    DROPOUT,
    EXTENSIONS,
    HEAD_LEARNING_RATE,
    HIGH_RANKS,
    LLAMA,
    METHODS,
    RANK,
    RANKS,
    SCALING,
    SCALINGS,
    SEEDS,
    SIZES,
    SLOWER,
    SWEEP_SEEDS,
    SWEEP_TASK,
    T5,
    TARGETS,
    TASKS,
    TRAIN,
    VALIDATION,
    WARM_UP,
)

# The methods whose rank, scaling and targets are varied.
SWEPT = ("lora", "lorafa")
LAST = ("lorafa-corrected",)
# Nats of a run that is missing, where runs are only counted: more than any run has.
UNKNOWN = 100.0


@dataclass(frozen=True)
class Run:
    """One training: a task, a method, a seed, and what is set. rank 0: no adapter."""

    task: str
    method: str
    rate: float
    seed: int
    rank: int = RANK
    scaling: float = SCALING
    targets: str = TARGETS

    @property
    def key(self) -> str:
        """The same for the same run in every call; another one where a size of the study changed."""
        parts = [self.task, self.method, f"lr{self.rate:g}", f"seed{self.seed}"]
        if self.method != "full":
            parts += [f"r{self.rank}", f"s{self.scaling:g}", self.targets.replace(" ", "")]
        return "/".join([*parts, sizes_hash(self.task)])


def sizes_hash(task: str) -> str:
    """Everything else that a run of this task depends on, as a short hash."""
    model = TASKS[task].model
    own = {"llama": LLAMA, "t5": T5}.get(model)
    common = [TRAIN, VALIDATION, WARM_UP, HEAD_LEARNING_RATE, DROPOUT]
    about = [asdict(TASKS[task]), asdict(SIZES[model]), own, common]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def choosing_task(task: str) -> str:
    """The task on which a model's learning rates are chosen: its first one."""
    model = TASKS[task].model
    return next(key for key, other in TASKS.items() if other.model == model)


def grid(task: str, method: str, done: Mapping[str, dict]) -> list[Run]:
    """Return the runs among which the learning rate of a method on a task is chosen, lowest rate first.

    Three rates; while the best of them is the lowest or highest, one more on that side by the same factor, at
    most EXTENSIONS times. Which it is shows only when all have been run.
    """
    rates = list(METHODS[method].rates)
    for _ in range(EXTENSIONS):
        losses = {rate: _validation(task, method, rate, done) for rate in rates}
        if None in losses.values():
            break
        best = min(losses, key=losses.get)
        if best == rates[0]:
            rates.insert(0, _rounded(rates[0] * rates[0] / rates[1]))
        elif best == rates[-1]:
            rates.append(_rounded(rates[-1] * rates[-1] / rates[-2]))
        else:
            break
    return [Run(choosing_task(task), method, rate, CHOOSING_SEED) for rate in rates]


def _validation(task: str, method: str, rate: float, done: Mapping[str, dict]) -> float | None:
    """The validation loss in nats; infinite for a run that broke, None for one that is missing."""
    record = done.get(Run(choosing_task(task), method, rate, CHOOSING_SEED).key)
    if record is None:
        return None
    return record["validation"]["nats"] if record["validation"] else math.inf


def _rounded(rate: float) -> float:
    """To two digits, so that a rate reads well."""
    return float(f"{rate:.1e}")


def chosen_rate(task: str, method: str, done: Mapping[str, dict]) -> float | None:
    """Return the rate of the grid with the lowest validation loss; None while one of its runs is missing."""
    losses = {run.rate: _validation(task, method, run.rate, done) for run in grid(task, method, done)}
    return None if None in losses.values() else min(losses, key=losses.get)


def runs(done: Mapping[str, dict], methods: tuple[str, ...]) -> Iterator[Run]:
    """Yield the runs in their order, those done too; `done` is read again at each, so that what was learnt
    of learning rates counts. Three seeds come first, then rank, scaling and targets, then the methods of
    LAST, then the other seeds. Seeds are the outer loop: cut anywhere, the cells that were begun have had
    the same number.
    """
    first = [method for method in methods if method not in LAST]
    last = [method for method in methods if method in LAST]
    yield from _begun(done, first)
    yield from sweep(done, [method for method in SWEPT if method in first])
    yield from _begun(done, last)
    yield from _seeds(done, methods, [seed for seed in SEEDS if seed not in SWEEP_SEEDS])


def _begun(done: Mapping[str, dict], methods: Sequence[str]) -> Iterator[Run]:
    for method in methods:
        for task in _choosing_tasks():
            yield from _choosing(task, method, done)
    yield from _seeds(done, methods, SWEEP_SEEDS)


def _choosing(task: str, method: str, done: Mapping[str, dict]) -> Iterator[Run]:
    for _ in range(EXTENSIONS + 1):
        yield from grid(task, method, done)


def _choosing_tasks() -> list[str]:
    return list(dict.fromkeys(choosing_task(task) for task in reversed(TASKS)))


def _seeds(done: Mapping[str, dict], methods: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    for seed in seeds:
        # Quick ones first.
        for task in reversed(TASKS):
            for method in methods:
                rate = chosen_rate(task, method, done)
                if rate is not None:
                    yield Run(task, method, rate, seed)


def sweep(done: Mapping[str, dict], methods: Sequence[str]) -> Iterator[Run]:
    """Rank, scaling and targets on one task, one varied at a time, at the learning rate of the rest; high
    ranks at a lower one as well.
    """
    variants: list[dict] = [{"rank": rank} for rank in RANKS]
    variants += [{"scaling": scaling} for scaling in SCALINGS]
    variants += [{"targets": ATTENTION_ONLY}]
    variants += [{"rank": rank, "slower": SLOWER} for rank in HIGH_RANKS]
    for seed in SWEEP_SEEDS:
        for variant in variants:
            for method in methods:
                rate = chosen_rate(SWEEP_TASK, method, done)
                if rate is not None:
                    yield varied(method, rate, seed, **variant)


def varied(method: str, rate: float, seed: int, slower: float = 1, **variant) -> Run:
    """Return a run of the sweep: `variant` is what differs, the rate is divided by `slower`."""
    return Run(SWEEP_TASK, method, _rounded(rate / slower), seed, **variant)


def whole(done: Mapping[str, dict], methods: tuple[str, ...] = tuple(METHODS)) -> int:
    """Return how many runs the study has in all, as far as is known: learning rates that have not been run
    are taken to need no wider grid.
    """
    rates = dict(done)
    for method in methods:
        middle = METHODS[method].rates[1]
        for task in _choosing_tasks():
            for _ in range(EXTENSIONS + 1):
                for run in grid(task, method, rates):
                    worse = UNKNOWN if run.rate == middle else 2 * UNKNOWN
                    rates.setdefault(run.key, {"validation": {"nats": worse}})
    return len({run.key for run in runs(rates, methods)})
