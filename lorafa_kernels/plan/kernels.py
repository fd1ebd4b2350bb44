"""The configuration of every kernel that an operation launches: a recipe's own, and the heuristics' where it
names none. Made once a plan, so that a call looks nothing up.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import DeviceLimits, KernelConfig, KernelPlan
from .defaults import (
    default_config,
    expand_total_config,
    mixed_config,
    shrink_group_config,
    shrink_total_config,
)
from .recipe import Problem, Recipe, default_of, heuristic_config, runs_beside


@dataclass(frozen=True)
class GroupConfigs:
    """Configurations of the kernels that serve several members of a group at once.

    shrink: all z from one pass over x, which takes so many `members`. shrink_total: the one dz of members
    that share lora_A. expand_total: dx; expand_unaligned: the same of operands that TMA cannot address.
    """

    shrink: KernelConfig
    members: int
    shrink_total: KernelConfig
    expand_total: KernelConfig
    expand_unaligned: KernelConfig


@dataclass(frozen=True)
class MixedConfigs:
    """Configurations of the kernels of a mixed batch.

    shrink: of z in forward, of dz in backward. expand: of y or dx. grad: of all dB.
    """

    shrink: KernelConfig
    expand: KernelConfig
    grad: KernelConfig


@dataclass(frozen=True)
class KernelConfigs:
    """Configurations of the kernels of one operation, and in which way they are called.

    shrink: of z in forward, of dz in backward. expand: of y or dx; of variant "recompute" or "ws_z" it
    makes z or dz itself. expand_after: that of an expand to which shrink or grad hands z or dz.
    expand_unaligned: the same of operands that TMA cannot address. one_pass, pdl, beside: as in KernelPlan.
    group: None for a layer.
    """

    shrink: KernelConfig
    expand: KernelConfig
    expand_after: KernelConfig
    expand_unaligned: KernelConfig
    grad: KernelConfig
    one_pass: bool
    pdl: bool
    beside: bool
    group: GroupConfigs | None = None

    @property
    def recomputes(self) -> bool:
        """Whether z or dz is made beside y or dx, in one launch."""
        return self.expand.makes_low_rank


def all_configs(plan: KernelPlan, problem: Problem, limits: DeviceLimits) -> KernelConfigs:
    """Return the configuration of every kernel that `problem` may launch on a device: the plan's, and the
    heuristics' where it has none. A pure function.
    """
    after = heuristic_config("expand", problem, limits, recompute=False)
    given = plan.expand
    expand = given or heuristic_config("expand", problem, limits)
    size, drops = problem.dtype.itemsize, problem.dropout and problem.op != "forward"
    return KernelConfigs(
        shrink=plan.shrink or heuristic_config("shrink", problem, limits),
        expand=expand,
        expand_after=after if expand.makes_low_rank else expand,
        expand_unaligned=default_config(
            "expand", limits, size, problem.M, problem.R, aligned=False, recompute=False, dropout=drops
        ),
        grad=plan.grad or default_of("grad", Recipe("fused", plan), problem, limits),
        one_pass=plan.one_pass,
        pdl=plan.pdl,
        beside=runs_beside(Recipe("fused", plan), problem.op) and not expand.makes_low_rank,
        group=_group_configs(expand, after, problem, limits) if problem.widths else None,
    )


def mixed_configs(problem: Problem, limits: DeviceLimits) -> MixedConfigs:
    """Return the configuration of every kernel that a mixed batch may launch on a device, problem.R being the
    largest rank. A pure function.
    """
    shapes = limits, problem.dtype.itemsize, problem.R
    forward = problem.op == "forward"
    return MixedConfigs(
        shrink=mixed_config("shrink", *shapes, dropout=problem.dropout and forward),
        expand=mixed_config("expand", *shapes, problem.aligned, problem.dropout and not forward),
        grad=mixed_config("grad", *shapes),
    )


def _group_configs(
    expand: KernelConfig, after: KernelConfig, problem: Problem, limits: DeviceLimits
) -> GroupConfigs:
    shapes = limits, problem.dtype.itemsize, problem.M, problem.R
    dropout = problem.dropout
    shrink, members = shrink_group_config(*shapes, max(1, problem.makers), dropout)
    # With the masks of several members, and where nobody chose another, it takes other blocks than a layer.
    of_layer = dropout or expand.makes_low_rank or expand.variant == "ws" or expand == after
    return GroupConfigs(
        shrink=shrink,
        members=members,
        shrink_total=shrink_total_config(*shapes),
        expand_total=expand_total_config(*shapes, problem.aligned, dropout) if of_layer else expand,
        expand_unaligned=expand_total_config(*shapes, False, dropout),
    )
