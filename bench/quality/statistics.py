"""Means with 95 % intervals, and differences of runs that share a seed (Student's t, scipy)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """half: half the width of the 95 % interval of the mean; None for fewer than two values."""

    value: float
    half: float | None
    count: int

    def holds(self, value: float) -> bool | None:
        """Whether the interval has `value` in it; None where there is no interval."""
        return None if self.half is None else abs(value - self.value) <= self.half


@dataclass(frozen=True)
class Difference:
    """Mean of the differences of runs with equal seeds. p: of the paired t test; None where it has none."""

    mean: Mean
    p: float | None


def mean_of(values: Sequence[float]) -> Mean:
    """Return mean and interval of values of different seeds. Raises ValueError for none."""
    if not values:
        raise ValueError("there is no value")
    count = len(values)
    half = None
    if count > 1:
        error = statistics.stdev(values) / math.sqrt(count)
        half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Mean(statistics.fmean(values), half, count)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Return one minus other over the seeds that both have; None where they share no seed."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    values = [one[seed] - other[seed] for seed in seeds]
    p = None
    if len(set(values)) > 1:
        p = float(stats.ttest_rel([one[seed] for seed in seeds], [other[seed] for seed in seeds]).pvalue)
    return Difference(mean_of(values), p)


def adjusted(ps: Sequence[float | None]) -> list[float | None]:
    """Return the p values with Benjamini and Hochberg's correction for how many there are."""
    there = [p for p in ps if p is not None]
    corrected = iter(stats.false_discovery_control(there)) if there else iter(())
    return [None if p is None else float(next(corrected)) for p in ps]
