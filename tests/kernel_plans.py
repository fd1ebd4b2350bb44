"""Plans that make impl="triton" run its other kernels: those for Hopper and for few rows, at any shape."""

from __future__ import annotations

import importlib

import pytest
from conftest import GPU, TRITON_DEVICE, implementation_cases, on_device

from lorafa_kernels.tuning.config import KernelConfig, KernelPlan

OPERATIONS = ("forward", "backward", "backward_input", "backward_lora_B")
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


def pin(monkeypatch: pytest.MonkeyPatch, plan: KernelPlan) -> None:
    """Make the kernels' four operations run with `plan`, whatever plan they are given."""
    linear = importlib.import_module("lorafa_kernels.kernels.linear")

    def pinned(operation):
        def run(*args, plan=None, **options):
            return operation(*args, **options, plan=pinned_plan)

        return run

    pinned_plan = plan
    for name in OPERATIONS:
        monkeypatch.setattr(linear, name, pinned(getattr(linear, name)))


def pin_by_name(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Pin the plan of that name, or none; skip where the GPU cannot run it."""
    if name is None:
        return
    if GPU and name.startswith("tma"):
        import torch

        if torch.version.hip is not None or torch.cuda.get_device_capability()[0] != 9:
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
