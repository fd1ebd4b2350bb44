"""Every plan that can be picked computes every option of a layer, of a group and of an MLP within the error
budget: the fused kernels with each of their variants, the library's products with and without the kernel that
reads dy once, and the implementations that have no plan.

Plans are not listed here: they are what plan/make.py offers for the known devices.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from accuracy import Budget
from conftest import GPU, TRITON_DEVICE
from pairwise import pairwise
from torch import Tensor

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import draw_operands, plain_formula
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.philox import keep_mask
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES
from lorafa_kernels.plan.make import candidates
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import OPERATIONS, Device, Problem, Recipe, kernel_configs, obstacle

pytestmark = pytest.mark.numerics
pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows at multiples of 16 bytes, which TMA asks for, and others.
WIDTHS = {"aligned": (40, 48), "odd": (37, 45)}
ROWS = 20
RANKS = (8, 17)


def devices() -> list[Device]:
    if GPU:
        return [planned_device(torch.device(TRITON_DEVICE))]
    return [Device(name, limits, "") for name, limits in {**KNOWN_DEVICES, "cpu": INTERPRETER}.items()]


def kind(recipe: Recipe, problem: Problem, device: Device) -> str:
    """The words for what differs in the code that runs: block sizes are the compile gate's."""
    configs = kernel_configs(recipe, problem, device.limits)
    variants = (f"{kernel}-{config.variant}" for kernel, config in sorted(configs.items()))
    passes = ("one-pass" if recipe.kernels.one_pass else "two-pass",) if problem.op == "backward" else ()
    return "-".join((recipe.name, *passes, *variants))


def recipes(dtype: torch.dtype) -> dict[str, dict[str, Recipe]]:
    """What can be picked for each operation by the words for it, configurations filled in."""
    found: dict[str, dict[str, Recipe]] = {op: {} for op in OPERATIONS}
    for op, device in ((op, device) for op in OPERATIONS for device in devices()):
        for M, (N, K) in ((M, widths) for M in (ROWS, 4096) for widths in WIDTHS.values()):
            problem = Problem(op, dtype, M, N, 0 if op == "backward_lora_B" else K, max(RANKS))
            for recipe in candidates(problem, device):
                if obstacle(recipe, problem, device.limits) is None:
                    configs = kernel_configs(recipe, problem, device.limits)
                    filled = replace(recipe, kernels=replace(recipe.kernels, **configs))
                    found[op].setdefault(kind(recipe, problem, device), filled)
    return found


def plans(dtype: torch.dtype) -> dict[str, dict[str, Recipe] | None]:
    """Plans for a whole step by their names: each recipe of each operation is in one of them. None: the
    implementation of that name, which has no plan.
    """
    of_op = recipes(dtype)
    found: dict[str, dict[str, Recipe] | None] = {"reference": None, "torch": None}
    for index in range(max(map(len, of_op.values()))):
        step = {op: list(by_kind.items())[index % len(by_kind)] for op, by_kind in of_op.items()}
        found[step["backward"][0] + f"-{index}"] = {op: recipe for op, (_, recipe) in step.items()}
    return found


def pinned(plan: dict[str, Recipe] | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if plan is None else pin_plan(plan)


def masks(x: Tensor, members: list[LinearOperands], share_A: bool) -> list[Tensor | None]:
    """What a group multiplies the input of each low-rank term with: 0 or 1/(1 − p)."""
    torch.manual_seed(0)
    count = 1 if share_A else len(members)
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=x.device)
    return [
        keep_mask(seeds if share_A else seeds[i : i + 1], m.dropout_p, *x.shape).double() / (1 - m.dropout_p)
        for i, m in enumerate(members)
    ]


def check_group(case: dict, dtype: torch.dtype, plan: dict[str, Recipe] | None, impl: str) -> None:
    """Compare a group with the formula that people write for separate layers, in fp64 and in `dtype`."""
    budget = Budget()
    N, K = WIDTHS[case["widths"]]
    shapes = [(N, K), (2 * N, K), (N, K), (N, K)][: case["members"]]
    layers = [
        draw_operands(
            ROWS,
            K,
            N,
            RANKS[0] if case["share_A"] or i % 2 == 0 else RANKS[1],
            dtype,
            TRITON_DEVICE,
            bias=case["bias"],
            factor_dtype=torch.float32 if case["fp32_lora_B"] else dtype,
            seed=i,
        )
        for i, (N, K) in enumerate(shapes)
    ]
    x = layers[0].x
    members, dys, trained = [], [], []
    for i, layer in enumerate(layers):
        plain = case["plain_member"] and i == 1
        p = (0.0, 0.3, 0.9)[case["dropout"] if case["share_A"] or i != 2 else 0]
        members.append(
            LinearOperands(
                layer.weight,
                layer.bias,
                None if plain else layers[0 if case["share_A"] else i].lora_A,
                None if plain else layer.lora_B,
                0.7 if case["share_A"] else (0.7, 1.5, -0.4, 2.0)[i],
                p,
            )
        )
        # The last member, or all but the first, are not used; the first has a frozen lora_B.
        unused = (case["unused"] == "last" and i and i == len(layers) - 1) or (
            case["unused"] == "all-but-first" and i
        )
        dys.append(None if unused else layer.dy)
        frozen = case["needs"] == "dx" or (case["frozen"] and i == 0 and len(layers) > 1)
        trained.append(not plain and not frozen)

    def run(to: torch.dtype | None):
        """By the library, or, in the dtype `to`, by the plain formula."""
        own = x.dtype
        leaf = x.detach().to(to or own).requires_grad_(case["needs"] != "dB")
        lora_Bs = [
            None
            if m.lora_B is None
            else (m.lora_B if to is None else m.lora_B.to(own).to(to)).detach().requires_grad_(wanted)
            for m, wanted in zip(members, trained, strict=True)
        ]
        if to is None:
            torch.manual_seed(0)
            group = [m._replace(lora_B=B) for m, B in zip(members, lora_Bs, strict=True)]
            ys = lorafa_linear_group(leaf, group, share_A=case["share_A"], impl=impl)
        else:
            ys = []
            of_member = masks(x, members, case["share_A"])
            for m, B, mask in zip(members, lora_Bs, of_member, strict=True):
                y = leaf @ m.weight.to(to).T + (0 if m.bias is None else m.bias.to(to))
                if B is not None:
                    wide = torch.promote_types(to, torch.float32)
                    dropped = (leaf.to(wide) * mask.to(wide)).to(to) if m.dropout_p else leaf
                    y = y + m.scaling * (dropped @ m.lora_A.to(to).T @ B.T)
                ys.append(y)
        used = [i for i, dy in enumerate(dys) if dy is not None and ys[i].requires_grad]
        leaves = {"dx": leaf} | {f"dB{i}": B for i, B in enumerate(lora_Bs) if B is not None}
        leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
        found = torch.autograd.grad(
            [ys[i] for i in used],
            list(leaves.values()),
            [dys[i] if to is None else dys[i].to(to) for i in used],
            allow_unused=True,
        )
        grads = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | grads

    with pinned(plan):
        got = run(None)
    exact = run(torch.float64)
    assert got.keys() == exact.keys()
    assert case["needs"] == "dB" or "dx" in got
    budget.compare(got, exact, run(dtype))
    budget.check()


OPTIONS = {
    "members": (1, 2, 3, 4),
    "share_A": (False, True),
    "dropout": (0, 1, 2),
    "bias": (False, True),
    "needs": ("both", "dx", "dB"),
    "frozen": (False, True),
    "unused": ("none", "last", "all-but-first"),
    "plain_member": (False, True),
    "fp32_lora_B": (False, True),
    "widths": tuple(WIDTHS),
}
PLANS = {(name, plan): found for name, dtype in DTYPES.items() for plan, found in plans(dtype).items()}
# Quick, and most of what could differ: bf16 has every plan. The interpreter computes fp16 as it does fp32.
QUICK = tuple((name, plan) for name, plan in PLANS if name == "bf16" or plan in ("torch", "reference"))
CASES = pairwise({"plan": QUICK, **OPTIONS})


def usable(case: dict) -> bool:
    """Whether a gradient is wanted of an output that is used."""
    if case["needs"] == "dB" and case["members"] > 1:
        used = {"none": range(4), "last": range(case["members"] - 1), "all-but-first": range(1)}
        trained = set(used[case["unused"]]) & set(range(case["members"]))
        return bool(trained - ({0} if case["frozen"] else set()) - ({1} if case["plain_member"] else set()))
    return True


def case_id(case: dict) -> str:
    dtype, plan = case["plan"]
    options = [f"{name}={value}" for name, value in case.items() if name != "plan" and value]
    return "-".join((dtype, plan, *options))


def run_case(case: dict) -> None:
    dtype, plan = case["plan"]
    impl = plan if PLANS[case["plan"]] is None else "auto"
    check_group(case, DTYPES[dtype], PLANS[case["plan"]], impl)


@pytest.mark.parametrize("case", [case for case in CASES if usable(case)], ids=case_id)
def test_group(case):
    run_case(case)


MORE = [case for seed in (1, 2) for case in pairwise({"plan": tuple(PLANS), **OPTIONS}, seed)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MORE if usable(case)], ids=case_id)
def test_group_in_more_cases(case):
    run_case(case)


LAYER_OPTIONS = {
    "dropout": (0.0, 0.3, 0.9),
    "bias": (False, True),
    "needs": ("both", "dx", "dB"),
    "fp32_lora_B": (False, True),
    "widths": tuple(WIDTHS),
    "R": RANKS,
}
LAYER_CASES = pairwise({"plan": QUICK, **LAYER_OPTIONS})


@pytest.mark.parametrize("case", LAYER_CASES, ids=case_id)
def test_layer(case):
    name, plan = case["plan"]
    dtype, recipe = DTYPES[name], PLANS[case["plan"]]
    N, K = WIDTHS[case["widths"]]
    budget = Budget()
    i = draw_operands(
        ROWS,
        K,
        N,
        case["R"],
        dtype,
        TRITON_DEVICE,
        bias=case["bias"],
        factor_dtype=torch.float32 if case["fp32_lora_B"] else dtype,
        dropout_p=case["dropout"],
    )
    x = i.x.detach().requires_grad_(case["needs"] != "dB")
    lora_B = i.lora_B.detach().requires_grad_(case["needs"] != "dx")
    options = {"scaling": i.scaling, "dropout_p": i.dropout_p}
    with i.seeded(), pinned(recipe):
        impl = plan if recipe is None else "auto"
        y = lorafa_linear(x, i.weight, i.lora_A, lora_B, i.bias, **options, impl=impl)
        leaves = {"dx": x, "dB": lora_B}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(y, tuple(leaves.values()), i.dy)
    got = {"y": y.detach()} | dict(zip(leaves, found, strict=True))
    exact, plain = plain_formula(i, torch.float64), plain_formula(i)
    budget.compare(got, {name: exact[name] for name in got}, {name: plain[name] for name in got})
    budget.check()


def test_plans_are_those_that_can_be_picked():
    """What the cost model ranks for a device is among the plans above, by the words for it."""
    for dtype in DTYPES.values():
        known = recipes(dtype)
        for device in devices():
            for op in OPERATIONS:
                for M in (1, 17, 128, 129, 700, 1 << 14):
                    for R in (1, 16, 64, 200):
                        problem = Problem(op, dtype, M, 64, 0 if op == "backward_lora_B" else 64, R)
                        for recipe in candidates(problem, device):
                            assert kind(recipe, problem, device) in known[op]
