"""Every operation of a call is decided once: which implementation runs, and by which plan."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import GPU, TRITON_DEVICE
from torch import Tensor

from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.base.reading import Decisions
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.group.quantised import quantised_linear_group
from lorafa_kernels.linear.api import lorafa_linear
from lorafa_kernels.linear.quantised import frozen_linear, quantised_linear
from lorafa_kernels.mixed.api import lorafa_linear_mixed
from lorafa_kernels.mixed.rows import Rows
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.mlp.quantised import quantised_gated_mlp
from lorafa_kernels.plan import choice
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.defaults import CODES_ROWS
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

pytest.importorskip("triton")
M, K, R = 16, 64, 4
SIZES = {"q": (32, K), "k": (16, K), "v": (16, K), "gate": (128, K), "up": (128, K), "down": (K, 128)}
QKV, MLP = ("q", "k", "v"), ("gate", "up", "down")
READS = {"forward": Recipe("fused", KernelPlan(expand=KernelConfig(16, 32, 128, 16, 1, 4, 2, "codes")))}
MAKES = {"forward": Recipe("fused", KernelPlan())}
# What chooses an implementation, and what looks up a plan.
IMPLEMENTATIONS = ("choose", "choose_mixed")
PLANS = ("choose_plan", "choose_frozen", "plan_mixed")


@pytest.fixture
def asked(monkeypatch) -> Counter:
    """How often an implementation was chosen for an operation ("impl"), or for making a dense weight
    ("weight"), and how often a plan was looked up ("plan").
    """
    count: Counter = Counter()

    def counting(label: str, function: Callable) -> Callable:
        def ask(*args, **kwargs):
            count[label] += 1
            return function(*args, **kwargs)

        return ask

    for names, label in ((IMPLEMENTATIONS, "impl"), (PLANS, "plan")):
        for name in names:
            function = getattr(choice, name)
            for path, module in list(sys.modules.items()):
                held = path.startswith("lorafa_kernels.") and module is not choice
                if held and vars(module).get(name) is function:
                    of_weights = path == "lorafa_kernels.base.frozen"
                    monkeypatch.setattr(module, name, counting("weight" if of_weights else label, function))
    monkeypatch.setattr(Decisions, "find", counting("plan", Decisions.find))
    return count


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=TRITON_DEVICE)


def layers(names: tuple[str, ...], kind: str | None, trained: bool = True) -> list[LinearOperands]:
    """Layers of SIZES, on bases of a kind or dense, with adapters."""
    found = []
    for name in names:
        N, width = SIZES[name]
        weight = drawn(N, width) / width
        found.append(
            LinearOperands(
                quantised(weight, kind) if kind else weight,
                drawn(N),
                drawn(R, width),
                drawn(N, R).requires_grad_(trained),
            )
        )
    return found


def layer(x: Tensor, impl: str, kind: str | None = None, **options) -> Tensor:
    (one,) = layers(("q",), kind, **options)
    compute = quantised_linear if kind else lorafa_linear
    return compute(x, one.weight, one.lora_A, one.lora_B, one.bias, impl=impl)


def group(x: Tensor, impl: str, kind: str | None = None, names=QKV, share_A: bool = False) -> Tensor:
    members = layers(names, kind)
    if share_A:
        members = [member._replace(lora_A=members[0].lora_A) for member in members]
    compute = quantised_linear_group if kind else lorafa_linear_group
    return torch.cat(compute(x, members, share_A=share_A, impl=impl), dim=-1)


def mlp(x: Tensor, impl: str, kind: str | None = None) -> Tensor:
    return (quantised_gated_mlp if kind else lorafa_gated_mlp)(x, *layers(MLP, kind), impl=impl)


def mixed(x: Tensor, impl: str) -> Tensor:
    (one,) = layers(("q",), None)
    other = one._replace(lora_A=drawn(R, K), lora_B=drawn(32, R).requires_grad_())
    return lorafa_linear_mixed(
        x[:, None], {0: one, 1: other}, Rows((0, 1, -1, 0) * (x.shape[0] // 4)), impl=impl
    )


def frozen(x: Tensor, impl: str) -> Tensor:
    """It has no impl of its own."""
    return frozen_linear(x, quantised(drawn(*SIZES["q"]), "nf4"))


# What is computed, which plans are pinned, and how often "impl", "plan" and "weight" are asked for in forward
# and in backward. Of a gated MLP gate and up are one operation, down is one, and between them is the
# activation, which has no plan. A weight is made of NF4 wherever its codes are not read.
ONCE = (1, 1, 0)
CASES = {
    "layer": (layer, {}, None, ONCE, ONCE),
    "layer, lora_B frozen": (layer, {"trained": False}, None, ONCE, ONCE),
    "group": (group, {}, None, ONCE, ONCE),
    "group, one A": (group, {"share_A": True}, None, ONCE, ONCE),
    "group of one": (group, {"names": ("q",)}, None, ONCE, ONCE),
    "gated MLP": (mlp, {}, None, (3, 2, 0), (3, 2, 0)),
    "mixed batch": (mixed, {}, None, ONCE, ONCE),
    "layer, codes read": (layer, {"kind": "nf4"}, READS, ONCE, (1, 1, 1)),
    "layer, weight made": (layer, {"kind": "nf4"}, MAKES, (1, 1, 1), (1, 1, 1)),
    "group, codes read": (group, {"kind": "nf4"}, READS, ONCE, (1, 1, 3)),
    "group, one A, codes read": (group, {"kind": "nf4", "share_A": True}, READS, ONCE, (1, 1, 3)),
    "group, weights made": (group, {"kind": "nf4"}, MAKES, (1, 1, 3), (1, 1, 3)),
    "group of one, codes read": (group, {"kind": "nf4", "names": ("q",)}, READS, ONCE, (1, 1, 1)),
    "gated MLP, codes read": (mlp, {"kind": "nf4"}, READS, (3, 2, 0), (3, 2, 3)),
    "gated MLP, weights made": (mlp, {"kind": "nf4"}, MAKES, (3, 2, 3), (3, 2, 3)),
    "frozen layer, codes read": (frozen, {}, READS, (0, 1, 0), (0, 0, 1)),
}
# The same where no kernel runs, so that there is no plan to look up.
WITHOUT_PLANS = {
    "layer": (1, 0, 0),
    "group": (1, 0, 0),
    "group, one A": (1, 0, 0),
    "group of one": (1, 0, 0),
    "gated MLP": (3, 0, 0),
    "mixed batch": (1, 0, 0),
    "layer, weight made": (1, 0, 1),
    "group, weights made": (1, 0, 3),
    "gated MLP, weights made": (3, 0, 3),
}


def counts(
    asked: Counter,
    name: str,
    impl: str,
    *,
    pin: dict | str | None = None,
    rows: int = M,
    autocast: bool = False,
) -> tuple:
    """What is asked for in forward and in backward, after the first call of a size has made its plans."""
    compute, options, *_ = CASES[name]
    found = ()
    with (
        pin_plan(pin) if pin else contextlib.nullcontext(),
        torch.autocast(torch.device(TRITON_DEVICE).type, torch.bfloat16, enabled=autocast),
    ):
        for _ in range(2):
            x = drawn(rows, K).requires_grad_()
            asked.clear()
            y = compute(x, impl, **options)
            forward = asked.copy()
            asked.clear()
            torch.autograd.grad(y, x, torch.ones_like(y))
            found = tuple(
                tuple(one[label] for label in ("impl", "plan", "weight")) for one in (forward, asked)
            )
    return found


@pytest.mark.parametrize("name", CASES)
def test_by_the_kernels(asked, name):
    *_, pin, forward, backward = CASES[name]
    assert counts(asked, name, "triton", pin=pin) == (forward, backward)


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("name", WITHOUT_PLANS)
def test_without_kernels(asked, name, impl):
    if GPU and impl == "auto":
        pytest.skip("the kernels run here")
    assert counts(asked, name, impl) == (WITHOUT_PLANS[name],) * 2


@pytest.mark.parametrize("name", ["layer", "group of one"])
def test_pinned_kernels_are_taken_where_auto_would_take_none(asked, name):
    assert counts(asked, name, "auto", pin="fused") == (ONCE, ONCE)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_gradients(asked, impl):
    (one,) = layers(("q",), None)
    with torch.no_grad():
        for _ in range(2):
            asked.clear()
            lorafa_linear(drawn(M, K), one.weight, one.lora_A, one.lora_B, one.bias, impl=impl)
    assert (asked["impl"], asked["plan"]) == (1, int(impl == "triton"))


@pytest.mark.parametrize("name", CASES)
def test_in_an_operator(asked, name):
    """Under autocast, where the operators are called: they decide."""
    *_, pin, forward, backward = CASES[name]
    assert counts(asked, name, "triton", pin=pin, autocast=True) == (forward, backward)


@pytest.mark.parametrize("name", ["layer, weight made", "group, weights made", "gated MLP, weights made"])
def test_more_rows_than_codes_are_read_for(asked, name):
    *_, forward, backward = CASES[name]
    assert counts(asked, name, "triton", rows=CODES_ROWS + 1) == (forward, backward)


def test_what_was_decided_holds_until_plans_are_forgotten(asked):
    """A plan of another table is not passed over for one that was kept."""

    def plans_looked_up() -> int:
        asked.clear()
        with pin_plan(MAKES):
            group(drawn(M, K), "triton", "nf4")
        return asked["plan"]

    choice.forget_plans()
    made, kept = plans_looked_up(), plans_looked_up()
    choice.forget_plans()
    assert (kept, plans_looked_up()) == (1, made) and made > 1
