"""Plans that make impl="triton" run its other kernels, those for Hopper and for few rows, at any shape; and
the cases of a test, of which the interpreted ones are quick or slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from conftest import GPU, TRITON_DEVICE, implementation_cases, on_device

from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.kernels import KernelConfigs, all_configs
from lorafa_kernels.plan.pin import make_pin
from lorafa_kernels.plan.recipe import DEFAULT_KERNELS, OPERATIONS, Problem, Recipe

# Small blocks: several tiles a program, several rank blocks, several parts of a contraction.
TMA = KernelConfig(64, 64, 64, 32, 2, 4, 2, "tma", EPILOGUE_SUBTILE=2)
GRAD_TMA = KernelConfig(64, 64, 0, 64, 1, 4, 2, "tma")
SPLIT = KernelConfig(64, 0, 16, 64, 1, 4, 2, SPLIT_K=3)
RECOMPUTE = KernelConfig(32, 64, 64, 256, 1, 4, 2, "recompute")
PLANS = {
    "tma": KernelPlan(expand=TMA, shrink=SPLIT, one_pass=False),
    "tma-one-pass": KernelPlan(expand=TMA, grad=GRAD_TMA, one_pass=True),
    # A block for ranks up to 256 needs more registers than a GPU has.
    **({} if GPU else {"recompute": KernelPlan(expand=RECOMPUTE)}),
}


def configs(
    op: str,
    rows: torch.Tensor,
    weight: torch.Tensor,
    R: int,
    plan: KernelPlan = DEFAULT_KERNELS,
    **problem,
) -> KernelConfigs:
    """The configurations of an operation on x (M, K) or dy (M, N), weight (N, K) and rank R; problem: more
    fields of plan.recipe.Problem.
    """
    found = Problem(op, rows.dtype, max(1, rows.shape[0]), *weight.shape, R, **problem)
    return all_configs(plan, found, planned_device(rows.device).limits)


def pin(monkeypatch: pytest.MonkeyPatch, plan: KernelPlan) -> None:
    """Make all operations run with `plan` while the test runs, wherever they run with the kernels."""
    pinned = make_pin({op: Recipe("fused", plan) for op in OPERATIONS})
    monkeypatch.setattr("lorafa_kernels.plan.pin._by_code", pinned)


def pin_by_name(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Pin the plan of that name, or none; skip where the GPU cannot run it."""
    if name is None:
        return
    hopper = GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    if GPU and name.startswith("tma") and not hopper:
        pytest.skip("the TMA kernel is for sm_90")
    pin(monkeypatch, PLANS[name])


def implementation_and_plan_cases(plans: tuple[str, ...] = ("tma", "recompute")) -> list:
    """Cases (device, impl, plan): every implementation on every device, and impl="triton" with each plan."""
    cases = [
        pytest.param(*case.values, None, marks=case.marks, id=case.id) for case in implementation_cases()
    ]
    return cases + [
        on_device(TRITON_DEVICE, "triton", name, id=f"{TRITON_DEVICE}-triton-{name}")
        for name in plans
        if name in PLANS
    ]


def grid(
    *axes: tuple[str, Sequence],
    indirect: Sequence[str] = (),
    each_once: bool = False,
    core_alone: bool = False,
) -> pytest.MarkDecorator:
    """Parametrise over the product of axes (argument names, cases), of which the first has the device and the
    implementation. A case is a value or a pytest.param.

    Interpreted kernels take seconds a case. Of those only a pairwise core is quick, in which any two cases of
    two axes meet, but fp16 only the first two cases of further axes: the interpreter computes it as fp32.
    With each_once there is each case in it, and no more. The rest is marked slow, and with core_alone left
    out. Where kernels are compiled nothing is.
    """
    products = list(itertools.product(*([_param(case) for case in cases] for _, cases in axes)))
    core = _core([product for product in products if _interpreted(product)], 1 if each_once else 2)
    params = []
    for product in products:
        marks = [mark for param in product for mark in param.marks]
        if _interpreted(product) and product not in core:
            if core_alone:
                continue
            marks.append(pytest.mark.slow)
        values = [value for param in product for value in param.values]
        params.append(pytest.param(*values, marks=marks, id="-".join(param.id for param in product)))
    return pytest.mark.parametrize(",".join(name for name, _ in axes), params, indirect=list(indirect))


def _core(products: list[tuple], strength: int) -> list[tuple]:
    """Some of the products of pytest.params in which all cases are (strength 1), or the pairs of cases that
    `grid` names (2); each chosen because it has most of what those before it have not.
    """
    axes = [list(dict.fromkeys(param.id for param in cases)) for cases in zip(*products, strict=True)]

    def needed(one: tuple[int, str], other: tuple[int, str]) -> bool:
        # The first axis is that of implementations.
        beyond = [axis and axes[axis].index(case) > 1 for axis, case in (one, other)]
        return not ((one[1] == "fp16" and beyond[1]) or (other[1] == "fp16" and beyond[0]))

    def pairs(product: tuple) -> set[tuple]:
        cases = [(axis, param.id) for axis, param in enumerate(product)]
        found = itertools.combinations(cases, strength)
        return {some for some in found if strength == 1 or needed(*some)}

    missing = set().union(*map(pairs, products))
    core = []
    while missing:
        core.append(max(products, key=lambda product: len(pairs(product) & missing)))
        missing -= pairs(core[-1])
    return core


def _param(case):
    if isinstance(case, torch.dtype):
        return pytest.param(case, id={"float32": "fp32", "float16": "fp16"}.get(str(case)[6:], "bf16"))
    return case if hasattr(case, "marks") else pytest.param(case, id=str(case))


def _interpreted(product: tuple) -> bool:
    return tuple(product[0].values[:2]) == ("cpu", "triton")


def slow_reference() -> list:
    """Cases (device, impl) for what takes long and says the same of the reference as of the library: the
    first is slow.
    """
    return [
        pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
        if case.values[1] == "reference"
        else case
        for case in implementation_cases()
    ]
