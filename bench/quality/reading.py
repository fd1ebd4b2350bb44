"""The result file as the report needs it: scores by task, method and seed; what has not been run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .plan import SWEPT, Run, chosen_rate, grid, sweep, varied
from .settings import METHODS, SEEDS, SWEEP_TASK, TASKS

Done = Mapping[str, dict]


@dataclass(frozen=True)
class Measure:
    """What a task is judged by. better: +1 where more is better, -1 where less is."""

    title: str
    unit: str
    better: int
    places: int

    def of(self, score: dict) -> float:
        return 100 * score["right"] if self.better > 0 else score["nats"] / math.log(2)


ACCURACY = Measure("test accuracy, %", "%", +1, 1)
BITS = Measure("bits a byte", "bits a byte", -1, 3)


def measure_of(task: str) -> Measure:
    return ACCURACY if TASKS[task].model == "minilm" else BITS


def scores(done: Done, task: str, method: str, measure: Measure | None = None) -> dict[int, float]:
    """Return the test score of each seed, at the learning rate that was chosen; a run that broke has none."""
    rate = chosen_rate(task, method, done)
    if rate is None:
        return {}
    return _by_seed(
        done, {seed: Run(task, method, rate, seed) for seed in SEEDS}, measure or measure_of(task)
    )


def swept(done: Done, method: str, **variant) -> dict[int, float]:
    """Return the test score of each seed with one setting varied (plan.sweep)."""
    rate = chosen_rate(SWEEP_TASK, method, done)
    if rate is None:
        return {}
    runs = {seed: varied(method, rate, seed, **variant) for seed in SEEDS}
    return _by_seed(done, runs, measure_of(SWEEP_TASK))


def _by_seed(done: Done, runs: dict[int, Run], measure: Measure) -> dict[int, float]:
    found = {seed: done[run.key]["test"] for seed, run in runs.items() if run.key in done}
    return {seed: measure.of(score) for seed, score in found.items() if score is not None}


def missing(done: Done) -> list[str]:
    """Say for each task and method how many of its runs there are, where some are not."""
    found = []
    for task in TASKS:
        for method in METHODS:
            rate = chosen_rate(task, method, done)
            there = 0 if rate is None else sum(Run(task, method, rate, s).key in done for s in SEEDS)
            if there < len(SEEDS):
                found.append(f"{TASKS[task].title}, {METHODS[method].title}: {there} of {len(SEEDS)} seeds")
    wanted = {run.key for run in sweep(done, SWEPT)}
    left = len(wanted - done.keys())
    if left or not wanted:
        found.append(f"rank, scaling and targets: {len(wanted) - left} of {len(wanted) or 'all'} runs")
    return found


def rates(done: Done, task: str, method: str) -> dict[float, float | None]:
    """Return the validation loss in nats by learning rate, on the seed that chooses; None for a run that
    broke. Rates that have not been run are left out.
    """
    found = {}
    for run in grid(task, method, done):
        if run.key in done:
            validation = done[run.key]["validation"]
            found[run.rate] = validation["nats"] if validation else None
    return found
