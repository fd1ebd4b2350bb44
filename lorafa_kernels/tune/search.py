"""Measure plans: find the fastest recipe and block sizes for a problem on this device.

For each problem, three stages:

    1. time all plans with their default configurations, and on sm_90 those whose expand has specialised
       warps, which no heuristic picks
    2. climb from the fastest "fused" and the fastest "library" recipe: for one kernel after the other, change
       one size by one step, and repeat while that is faster
    3. time the best recipe of each name again, in more rounds

A recipe is checked against fp64 (check.py), within the error budget, before it is timed; one that fails or
cannot run is left out. Times are medians over rounds in which all contenders take turns. What is timed is the
operation of linear/ops.py, so host times include the choice of the plan.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import ops
from ..operands import draw_seed
from ..plan.choice import forget_plans, planned_device
from ..plan.config import WS_SUMS, KernelConfig, KernelPlan, wrong_field
from ..plan.cost import ASSUMED, ceilings, predict
from ..plan.make import candidates
from ..plan.pin import make_pin, pin_plan
from ..plan.recipe import Device, Problem, Recipe, default_of, describe, kernel_configs, obstacle
from ..plan.specialised import ws_configs
from ..plan.tables import Entry, Measured, key_of, update_table
from .check import DROPOUT_P, Check, refusal

# The values that the search tries for each size: from the current one, the next lower and the next higher.
STEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "expand": {
        "BLOCK_N": (64, 128, 256),
        "BLOCK_M": (64, 128, 256),
        "num_stages": (2, 3, 4, 5),
        "GROUP_M": (1, 4, 8, 16),
        "BLOCK_K": (32, 64, 128),
        "num_warps": (4, 8),
    },
    "shrink": {
        "SPLIT_K": (1, 2, 4, 8, 16, 32),
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_K": (32, 64, 128, 256),
        "num_stages": (1, 2, 3, 4, 5),
        "num_warps": (4, 8),
    },
    "grad": {
        "BLOCK_N": (64, 128, 256),
        "BLOCK_M": (32, 64, 128),
        "num_stages": (1, 2, 3, 4),
        "num_warps": (4, 8),
    },
}
TMA_STEPS = {"EPILOGUE_SUBTILE": (1, 2, 4), "ctas_per_sm": (1, 2)}
# Most fp32 accumulators per thread. With more, too few of its 255 registers are left for the rest (estimate,
# from the compile gate's spills).
MOST_ACCUMULATORS = 128
# A configuration predicted to take more than this times the time of the current one is not tried (estimate).
PRUNE = 1.25
# A gain below this share of the time counts as noise (estimate).
GAIN = 0.01
# Samples per configuration during the search and, of the best ones, at its end; untimed calls before them
# (estimates).
ROUNDS = 10
FINAL_ROUNDS = 30
WARM_UPS = 2
# Bytes written before each sample. That empties the L2, and takes 0.2 ms or more, in which the host queues
# the operation's kernels, so that no launch gaps are timed.
FLUSH_BYTES = 2**30

Step = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One run of an operation: microseconds on the device, and on the host until all was launched."""

    device_us: float
    host_us: float


class Timer(Protocol):
    def __call__(self, step: Step) -> Sample: ...


class EventTimer:
    """Times by the device's events, starting with a cold L2."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, step: Step) -> Sample:
        self.flush.zero_()
        self.start.record()
        begin = time.perf_counter()
        step()
        host = time.perf_counter() - begin
        self.end.record()
        self.end.synchronize()
        return Sample(1e3 * self.start.elapsed_time(self.end), 1e6 * host)


@dataclass
class Result:
    """What was found for a problem.

    best: the fastest recipe of each name. frozen_us: time of the frozen linear. tried: recipes timed.
    refused: recipes left out, with the reason. finished: the search ended before the budget did. fewer: as in
    Check.
    """

    problem: Problem
    best: dict[str, Measured]
    frozen_us: float
    predicted_us: float | None
    tried: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    finished: bool = True
    fewer: dict[str, str] = field(default_factory=dict)

    @property
    def winner(self) -> Measured:
        return min(self.best.values(), key=lambda one: one.us)


def tune(
    problems: Sequence[Problem],
    device: torch.device,
    timer: Timer,
    path: Path,
    *,
    about: Mapping[str, str | None],
    budget_s: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
    main_loop: Mapping[str, float] = ASSUMED,
) -> Iterator[Result]:
    """Find the fastest plans of each problem, write them into the table at `path`, and yield what was found.

    The rest of the budget is shared evenly among the remaining problems. The plans with default
    configurations are always timed, even past the budget. main_loop: what predictions take for expand's rate,
    as in plan/cost.py. Raises RuntimeError if no plan can run for a
    problem, OSError if the table cannot be written.
    """
    target = planned_device(device)
    end = time.monotonic() + budget_s
    for index, problem in enumerate(problems):
        left = end - time.monotonic()
        deadline = time.monotonic() + left / (len(problems) - index)
        result = Search(problem, device, target, timer, progress, main_loop).run(deadline)
        update_table(path, target, [Entry(key_of(problem), tuple(result.best.values()))], about)
        forget_plans()
        yield result


class Search:
    """The search for the fastest plans of one problem."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        target: Device,
        timer: Timer,
        progress: Callable[[str], None],
        main_loop: Mapping[str, float],
    ) -> None:
        self.problem = problem
        self.main_loop = main_loop
        self.target = target
        self.timer = timer
        self.progress = progress
        self.check = Check(problem, device, target)
        self.step, self.frozen = steps(problem, device)
        self.checked: dict[Recipe, str | None] = {}
        self.tried = 0

    def run(self, deadline: float) -> Result:
        """Search until it ends or the deadline (of time.monotonic) is reached."""
        p, limits = self.problem, self.target.limits
        first = self.measure([*candidates(p, self.target), *specialised(p, self.target)], ROUNDS)
        if not first:
            reasons = "; ".join(f"{describe(r, p.op)}: {why}" for r, why in self.checked.items())
            sizes = f"{p.op} M={p.M} N={p.N} K={p.K} R={p.R}, {str(p.dtype).removeprefix('torch.')}"
            raise RuntimeError(f"no plan can run for {sizes}: {reasons}")
        best: dict[str, Recipe] = {}
        for recipe in sorted(first, key=lambda one: first[one].us):
            best.setdefault(recipe.name, recipe)
        finished = True
        for name, recipe in best.items():
            for kernel in kernel_configs(recipe, p, limits):
                best[name], done = self.climb(best[name], kernel, deadline)
                finished = finished and done
        found = self.measure(list(best.values()), FINAL_ROUNDS)
        reached = ceilings(self.target.name, limits)
        frozen = statistics.median(self.timer(self.frozen).device_us for _ in range(ROUNDS))
        winner = min(found, key=lambda one: found[one].us)
        predicted = predict(winner, p, limits, reached, self.main_loop).us if reached else None
        refused = [(describe(r, p.op), why) for r, why in self.checked.items() if why]
        best_times = {recipe.name: measured for recipe, measured in found.items()}
        return Result(p, best_times, frozen, predicted, self.tried, refused, finished, self.check.fewer)

    def climb(self, recipe: Recipe, kernel: str, deadline: float) -> tuple[Recipe, bool]:
        """Improve the configuration of one kernel; return the recipe, and False after the deadline."""
        while True:
            if time.monotonic() >= deadline:
                return recipe, False
            others = neighbours(recipe, kernel, self.problem, self.target, self.main_loop)
            found = self.measure([recipe, *others], ROUNDS, deadline)
            fastest = min(found, key=lambda one: found[one].us, default=recipe)
            if recipe not in found or found[fastest].us > (1 - GAIN) * found[recipe].us:
                return recipe, True
            recipe = fastest

    def measure(
        self, recipes: Sequence[Recipe], rounds: int, deadline: float = math.inf
    ) -> dict[Recipe, Measured]:
        """Time recipes in turns. Left out are those that fail the check, and those that were not checked
        before the deadline.
        """
        able = []
        for recipe in recipes:
            if time.monotonic() >= deadline and able:
                break
            self.progress(f"{describe(recipe, self.problem.op)}, {self.tried} timed")
            if recipe not in self.checked:
                self.checked[recipe] = refusal(lambda recipe=recipe: self.check(recipe))
                self.tried += self.checked[recipe] is None
            if self.checked[recipe] is None:
                able.append(recipe)
        samples: dict[Recipe, list[Sample]] = {recipe: [] for recipe in able}
        # Made once: a new Pin in each call would add to the host time that is measured.
        pins = {recipe: make_pin({self.problem.op: recipe}) for recipe in able}
        for index in range(WARM_UPS + rounds):
            for recipe in able:
                with pin_plan(pins[recipe]):
                    sample = self.timer(self.step)
                if index >= WARM_UPS:
                    samples[recipe].append(sample)
        return {
            recipe: Measured(
                recipe,
                statistics.median(one.device_us for one in found),
                statistics.median(one.host_us for one in found),
            )
            for recipe, found in samples.items()
        }


def specialised(problem: Problem, device: Device) -> list[Recipe]:
    """Return recipes for `problem` whose expand is of variant "ws" or "ws_z", in a few block shapes each;
    none where those do not run. A pure function.
    """
    if not problem.aligned or problem.op == "backward_lora_B":
        return []
    blocks = {
        variant: ws_configs(device.limits, problem.dtype.itemsize, problem.R, variant) for variant in WS_SUMS
    }
    alone = KernelPlan(one_pass=False, pdl=False)
    found = [Recipe("fused", replace(alone, expand=config)) for config in blocks["ws_z"]]
    for base in candidates(problem, device, ("fused",)):
        expand = base.kernels.expand
        if base.kernels.pdl and not base.kernels.beside and not (expand and expand.makes_low_rank):
            found += [replace(base, kernels=replace(base.kernels, expand=config)) for config in blocks["ws"]]
    return [one for one in found if not obstacle(one, problem, device.limits, device.triton)]


def neighbours(
    recipe: Recipe,
    kernel: str,
    problem: Problem,
    device: Device,
    main_loop: Mapping[str, float] = ASSUMED,
) -> list[Recipe]:
    """Return the recipes that differ from `recipe` in one size of one kernel's configuration, or in that
    expand does without TMA.

    Left out are those that need too much shared memory or too many registers, and those with a predicted time
    of more than PRUNE times that of `recipe`. A pure function.
    """
    limits = device.limits
    base = getattr(recipe.kernels, kernel) or default_of(kernel, recipe, problem, limits)
    axes = dict(STEPS[kernel])
    if base.variant in ("tma", *WS_SUMS):
        axes.update(TMA_STEPS)
    configs = []
    for name, values in axes.items():
        current = getattr(base, name)
        below = [value for value in values if value < current][-1:]
        above = [value for value in values if value > current][:1]
        configs += [replace(base, **{name: value}) for value in below + above]
    if base.variant == "tma":
        configs.append(replace(base, variant="portable", EPILOGUE_SUBTILE=1, ctas_per_sm=1))
    found = []
    for config in configs:
        other = replace(recipe, kernels=replace(recipe.kernels, **{kernel: config}))
        # Those of specialised warps have a limit of their own.
        if wrong_field(kernel, config):
            continue
        if config.variant not in WS_SUMS and _accumulators(kernel, config) > MOST_ACCUMULATORS:
            continue
        if not obstacle(other, problem, limits):
            found.append(other)
    reached = ceilings(device.name, limits)
    if reached is None:
        return found
    most = PRUNE * predict(recipe, problem, limits, reached, main_loop).device_us
    return [one for one in found if predict(one, problem, limits, reached, main_loop).device_us <= most]


def _accumulators(kernel: str, config: KernelConfig) -> int:
    """fp32 accumulators per thread."""
    rows, columns, rank = config.BLOCK_M, config.BLOCK_N, config.BLOCK_R
    numbers = {
        "expand": rows * columns + (rows * rank if config.variant == "recompute" else 0),
        "shrink": rows * rank,
        "grad": (rows + columns) * rank,
    }[kernel]
    return numbers // (32 * config.num_warps)


def steps(problem: Problem, device: torch.device) -> tuple[Step, Step]:
    """Return two functions to time: the operation of `problem` with the pinned plan, and the frozen linear's
    forward or dx. lora_B is in fp32, as in LoRAFALinear.
    """
    p = problem

    def draw(*shape: int, dtype: torch.dtype = p.dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    weight, lora_A = draw(p.N, p.K), draw(p.R, p.K)
    lora_B = draw(p.N, p.R, dtype=torch.float32)
    bias = draw(p.N) if p.bias else None
    dropout = (DROPOUT_P, draw_seed(device)) if p.dropout else ()
    if p.op == "forward":
        x = draw(p.M, p.K)
        return (
            lambda: ops.forward(x, weight, lora_A, lora_B, bias, 0.5, "auto", *dropout),
            lambda: F.linear(x, weight, bias),
        )
    dy, z = draw(p.M, p.N), draw(p.M, p.R)
    return (
        lambda: ops.backward(dy, z, weight, lora_A, lora_B, 0.5, "auto", *dropout),
        lambda: dy.mm(weight),
    )
