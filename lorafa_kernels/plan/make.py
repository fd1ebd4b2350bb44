"""Which plan an operation runs with: the fused kernels or the library's products, and with which blocks.

A pure function of the problem, the device, what is pinned, and the tables. It looks, in this order, for what
is pinned; the problem's bucket in the user's own table, then in the shipped one; and else asks the model of
the cost. Every device gets an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .config import KernelConfig, KernelPlan
from .cost import BESIDE_GAIN, ceilings, frozen, frozen_of_codes, main_loop_share, predict
from .defaults import CODES_ROWS, codes_config
from .kernels import KernelConfigs, all_configs
from .pin import Pin
from .recipe import NAMES, Device, Problem, Recipe, describe, heuristic_config, obstacle, runs_beside
from .tables import Measured, Table, key_of, measured_main_loop, shipped_table, user_table

SOURCES = ("pinned", "user cache", "table", "heuristic")


@dataclass(frozen=True)
class Plan:
    """A recipe for an operation, where it comes from (one of SOURCES), and why in words.

    kernels: the configuration of every kernel that it may launch. predicted: what the model of the cost says
    of this recipe and of those it was preferred to, by their descriptions, in microseconds; this one first.
    Empty under Triton's interpreter. main_loop: what they take for the rate of expand's main loop over that
    of the library's product, and where that is from; None where nothing is predicted or no expand could run.
    """

    op: str
    recipe: Recipe
    source: str
    reason: str
    kernels: KernelConfigs
    predicted: tuple[tuple[str, float], ...] = ()
    main_loop: tuple[float, str] | None = None

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def takes_grad_kernel(self) -> bool:
        """Whether dz and dB of a plan of the library's products come from the kernel that reads dy once."""
        return self.name == "library" and self.op == "backward" and self.kernels.one_pass

    @property
    def predicted_us(self) -> float | None:
        return self.predicted[0][1] if self.predicted else None


def make_plan(
    problem: Problem, device: Device, *, pin: Pin | None = None, names: tuple[str, ...] = NAMES
) -> Plan:
    """Choose the plan for `problem` among those named in `names`: NAMES, or ("fused",).

    A pinned name that is not in `names` is not looked at. Raises RuntimeError, saying what is missing, for a
    pinned recipe that cannot run on this device.
    """
    problem = replace(problem, M=max(1, problem.M))
    if pin is not None and pin.name_for(problem.op) in names:
        return _pinned(problem, device, pin)
    return _measured(problem, device, names) or _heuristic(problem, device, names)


def candidates(problem: Problem, device: Device, names: Iterable[str] = NAMES) -> list[Recipe]:
    """Return the recipes for `problem` on a device, with the heuristics' configurations."""
    found: list[Recipe] = []
    passes = (True, False) if problem.op == "backward" else (True,)
    for name in names:
        if name == "library":
            found += [Recipe(name, KernelPlan(one_pass=one_pass)) for one_pass in passes]
            continue
        if config := codes_of(problem, device):
            pdl = (True, False) if device.limits.dependent_launch else (False,)
            found += [Recipe(name, KernelPlan(expand=config, one_pass=True, pdl=one)) for one in pdl]
        base, overlap = KernelPlan(), False
        if problem.op != "backward_lora_B":
            overlap = device.limits.dependent_launch
            expand = heuristic_config("expand", problem, device.limits)
            if expand.variant == "recompute":
                found.append(Recipe(name, KernelPlan(expand=expand, one_pass=False, pdl=False)))
                base = KernelPlan(expand=heuristic_config("expand", problem, device.limits, recompute=False))
        found += [
            Recipe(name, replace(base, one_pass=one_pass, pdl=pdl))
            for one_pass in passes
            for pdl in ((True, False) if overlap else (False,))
        ]
        if overlap and problem.op == "backward":
            found.append(Recipe(name, replace(base, one_pass=False, pdl=True, beside=True)))
    return found


def codes_of(problem: Problem, device: Device) -> KernelConfig | None:
    """Return the configuration of the kernel that reads codes for `problem`, or None where that is no
    candidate: of a dense weight, of many rows.
    """
    if not problem.codes or problem.M > CODES_ROWS:
        return None
    return codes_config(device.limits, problem.dtype.itemsize, problem.M, problem.R, problem.aligned)


def config_of_frozen(problem: Problem, device: Device, pin: Pin | None = None) -> KernelConfig | None:
    """Return the configuration with which the kernel that reads codes computes y of a layer without an
    adapter, or None where the weight is made and the library multiplies: what the model of the cost says, or
    a pinned recipe of forward.
    """
    recipe = pin.recipe(problem.op) if pin else None
    if recipe is not None:
        expand = recipe.kernels.expand if recipe.name == "fused" else None
        return expand if expand and expand.reads_codes else None
    config, reached = codes_of(problem, device), ceilings(device.name, device.limits)
    if config is None or reached is None:
        return None
    by_codes = frozen_of_codes(config, problem, device.limits, reached)
    return config if by_codes.us < frozen(problem, device.limits, reached).us else None


def _pinned(problem: Problem, device: Device, pin: Pin) -> Plan:
    recipe = pin.recipe(problem.op)
    if recipe is None:
        names = (pin.name,)
        plan = _measured(problem, device, names) or _heuristic(problem, device, names)
        reason = f"{pin.name!r} by {pin.origin}; its details from: {plan.source} ({plan.reason})"
        return replace(plan, source="pinned", reason=reason)
    if missing := obstacle(recipe, problem, device.limits, device.triton):
        raise RuntimeError(f"the plan pinned by {pin.origin} cannot run on {device.name}: {missing}")
    return _plan(
        recipe, "pinned", f"by {pin.origin}", problem, device, _predictions(recipe, (), problem, device)
    )


def _measured(problem: Problem, device: Device, names: tuple[str, ...]) -> Plan | None:
    if codes_of(problem, device):
        # Dense weights are what is measured.
        return None
    key = key_of(problem)
    for source, table in (("user cache", user_table(device)), ("table", shipped_table(device))):
        if table is None:
            continue
        entry = table.by_key.get(key)
        plans = [one for one in entry.plans if table.counts(one.recipe, device)] if entry else []
        if plan := _fastest(plans, problem, device, names):
            return replace(plan, source=source, reason=f"{plan.reason} at {key}{_when(table)}")
    return None


def _fastest(
    plans: Iterable[Measured], problem: Problem, device: Device, names: tuple[str, ...]
) -> Plan | None:
    able = [one for one in plans if one.recipe.name in names]
    able = [one for one in able if obstacle(one.recipe, problem, device.limits, device.triton) is None]
    if not able:
        return None
    able.sort(key=lambda one: one.us)
    times = ", ".join(f"{describe(one.recipe, problem.op)} {one.us:.1f} us" for one in able)
    recipe = able[0].recipe
    others = (one.recipe for one in able[1:])
    predicted = _predictions(recipe, others, problem, device)
    return _plan(recipe, "", f"measured {times}", problem, device, predicted)


def _heuristic(problem: Problem, device: Device, names: tuple[str, ...]) -> Plan:
    found = candidates(problem, device, names)
    reached = ceilings(device.name, device.limits)
    if reached is None:
        reason = "no model of the cost for the interpreter: the first plan"
        return _plan(found[0], "heuristic", reason, problem, device)
    able = [recipe for recipe in found if obstacle(recipe, problem, device.limits) is None]
    # A device with too little shared memory for any kernel is not one that a heuristic should refuse.
    shares = measured_shares(device)
    times = {recipe: predict(recipe, problem, device.limits, reached, shares).us for recipe in able or found}

    def worst(recipe: Recipe) -> float:
        untimed = runs_beside(recipe, problem.op)
        return times[recipe] / (1 - BESIDE_GAIN if untimed else 1.0)

    ranked = sorted(times, key=worst)
    predicted = tuple((describe(recipe, problem.op), times[recipe]) for recipe in ranked)
    reason = f"least predicted time, {reached.source}"
    if times[ranked[0]] > min(times.values()):
        reason += f"; dB beside dx gains less than {BESIDE_GAIN:.0%}, and was not timed"
    return _plan(ranked[0], "heuristic", reason, problem, device, predicted)


def _plan(
    recipe: Recipe,
    source: str,
    reason: str,
    problem: Problem,
    device: Device,
    predicted: tuple[tuple[str, float], ...] = (),
) -> Plan:
    kernels = all_configs(recipe.kernels, problem, device.limits)
    main_loop = None
    if predicted and problem.op != "backward_lora_B":
        main_loop = _main_loop(kernels.expand.variant, problem, device)
    return Plan(problem.op, recipe, source, reason, kernels, predicted, main_loop)


def measured_shares(device: Device) -> dict[str, float]:
    """Return what predict() takes as `main_loop` for a device."""
    return {variant: share for variant, (share, _) in measured_main_loop(device).items()}


def _main_loop(variant: str, problem: Problem, device: Device) -> tuple[float, str]:
    itemsize, measured = problem.dtype.itemsize, measured_main_loop(device)
    share = main_loop_share(variant, itemsize, device.limits, measured_shares(device))
    # Nothing but 16-bit operands was measured.
    words = measured[variant][1] if itemsize <= 2 and variant in measured else "assumed"
    return share, words


def _predictions(
    recipe: Recipe, others: Iterable[Recipe], problem: Problem, device: Device
) -> tuple[tuple[str, float], ...]:
    reached = ceilings(device.name, device.limits)
    if reached is None:
        return ()
    shares = measured_shares(device)
    return tuple(
        (describe(one, problem.op), predict(one, problem, device.limits, reached, shares).us)
        for one in (recipe, *others)
    )


def _when(table: Table) -> str:
    date = dict(table.about).get("date") or "no date"
    return f", Triton {table.triton}, {date[:10]}"
