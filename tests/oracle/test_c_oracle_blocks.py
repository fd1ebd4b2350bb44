"""Dropout, groups of layers, the gated MLP and the RMS norm against the C oracle: the same masks bit for bit,
the same roundings, and results within the error budget, exact being what the oracle computes in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import c_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import check_budget
from conftest import implementation_cases
from kernel_plans import grid, implementation_and_plan_cases, pin_by_name
from torch import Tensor

from lorafa_kernels import philox
from lorafa_kernels.checks.budget import allowed_error, relative_error, unit_roundoff
from lorafa_kernels.group import ops as group_ops
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.linear import ops
from lorafa_kernels.mlp import ops as gated_ops
from lorafa_kernels.mlp.activation import ACTIVATIONS
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.norm import rms_norm

pytestmark = pytest.mark.numerics
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
with_plans = pytest.mark.parametrize(("device", "impl", "plan"), implementation_and_plan_cases())
# Those that round exactly where the oracle does; "torch" rounds the rank-R term and act(g) once more.
exactly_rounding = pytest.mark.parametrize(
    ("device", "impl"), [case for case in implementation_cases() if case.values[1] != "torch"]
)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def wide(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().cpu().numpy()


def seed_tensor(device: str, *seeds: int) -> Tensor:
    return torch.tensor(seeds, dtype=torch.int64, device=device)


class Draw:
    """Normal numbers, the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return numbers.mul_(scale).to(self.device, dtype or self.dtype)

    def layer(self, N: int, K: int, R: int, scaling: float = 1.0, dropout_p: float = 0.0) -> LinearOperands:
        """lora_A and lora_B in fp32, which the operators round; R = 0: without them."""
        weight, bias = self(N, K, scale=K**-0.5), self(N)
        if not R:
            return LinearOperands(weight, bias)
        lora_A = self(R, K, scale=K**-0.5, dtype=torch.float32)
        lora_B = self(N, R, scale=R**-0.5, dtype=torch.float32)
        return LinearOperands(weight, bias, lora_A, lora_B, scaling, dropout_p)


def oracle_layer(layer: LinearOperands, seed: int, factors: str | None = None) -> c_oracle.Linear:
    """factors: the dtype that lora_A and lora_B are rounded to here already."""
    lora_A, lora_B = wide(layer.lora_A), wide(layer.lora_B)
    if factors and lora_A is not None:
        lora_A, lora_B = c_oracle.round_to(lora_A, factors), c_oracle.round_to(lora_B, factors)
    numbers = (layer.scaling, layer.dropout_p, seed, "fp64" if factors else "fp32")
    return c_oracle.Linear(wide(layer.weight), lora_A, lora_B, wide(layer.bias), *numbers)


def plain_layer(x: Tensor, layer: LinearOperands, lora_B: Tensor | None, seed: int) -> Tensor:
    """The formula that people write, in the dtype of x."""
    y = F.linear(x, layer.weight, layer.bias)
    if lora_B is None:
        return y
    keep = c_oracle.keep_mask(seed, layer.dropout_p, *x.shape)
    mask = torch.from_numpy(keep).to(x.device, x.dtype) / (1 - layer.dropout_p)
    return y + layer.scaling * F.linear(F.linear(x * mask, layer.lora_A.to(x.dtype)), lora_B)


def trained(layers: Sequence[LinearOperands], dtype: torch.dtype) -> list[Tensor | None]:
    """Each lora_B in `dtype`, requiring a gradient."""
    return [
        None if layer.lora_B is None else layer.lora_B.to(dtype).detach().requires_grad_() for layer in layers
    ]


def check_rounding(got: Tensor, want: np.ndarray) -> None:
    """Assert that two independent writings differ by the order of their sums, and by the last bits of an
    activation, only: few elements round apart, and those no further than a z or dz that did carries them.
    """
    step = 2 * unit_roundoff(got.dtype)
    got, want = got.detach().double().cpu(), torch.from_numpy(want)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= step * want.abs().max()
    assert (got == want).float().mean() > 0.99


def check_lora_B_gradient(got: Tensor, dy: Tensor, z: Tensor) -> None:
    """Assert that dB is within the budget of dyᵀ z for the z that was kept, products of fp32 sums."""
    exact, plain = (dy.to(to).T @ z.to(to) for to in (torch.float64, torch.float32))
    check_budget({"dB": got}, {"dB": exact}, {"dB": plain})


# Dropout.

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.mark.parametrize("row0", [0, 5, 2**32 - 2, 2**40 + 7], ids=["0", "5", "2^32-2", "2^40+7"])
@pytest.mark.parametrize("K", [1, 3, 4, 37, 256])
def test_masks_of_philox_are_the_oracles(device, K, row0):
    """The counter passes 2³² where the rows do, and earlier for a wide K."""
    for seed in SEEDS:
        for p in (0.0, 2.0**-33, 0.1, 0.5, 1 - 2.0**-40):
            got = philox.keep_mask(seed_tensor(device, seed), p, 6, K, row0=row0).cpu().numpy()
            np.testing.assert_array_equal(got, c_oracle.keep_mask(seed, p, 6, K, row0))


@with_plans
@pytest.mark.parametrize(("M", "K"), [(5, 7), (67, 72)], ids=str)
def test_masks_that_are_applied_are_the_oracles(device, impl, plan, M, K, monkeypatch):
    """With lora_A the identity and s = 1 − p, z of ones is the mask, and so is dx where dz is one."""
    pin_by_name(monkeypatch, plan)
    eye, one = torch.eye(K, device=device), torch.ones(1, 1, device=device)
    x, no_weight, rows = (
        torch.ones(M, K, device=device),
        torch.zeros(1, K, device=device),
        torch.ones(M, 1, device=device),
    )
    for seed in SEEDS[-2:]:
        drop = (0.5, impl, 0.5, seed_tensor(device, seed))
        want = c_oracle.keep_mask(seed, 0.5, M, K).astype(float)
        _, z = ops.forward(x, no_weight, eye, torch.ones(1, K, device=device), None, *drop)
        np.testing.assert_array_equal(wide(z), want)
        dx = ops.backward_input(rows, no_weight, torch.ones(1, K, device=device), one, *drop)
        np.testing.assert_array_equal(wide(dx), want)


def layer_results(operands, impl: str, seed: int) -> dict[str, Tensor]:
    layer, x, dy = operands
    drop = (layer.scaling, impl, layer.dropout_p, seed_tensor(x.device, seed))
    factors = (layer.weight, layer.lora_A, layer.lora_B)
    y, z = ops.forward(x, *factors, layer.bias, *drop)
    dx, dB = ops.backward(dy, z, *factors, *drop)
    return {"z": z, "y": y, "dx": dx, "dB": dB}


def draw_layer(dtype: torch.dtype, device: str) -> tuple[LinearOperands, Tensor, Tensor]:
    draw = Draw(device, dtype)
    return draw.layer(40, 72, 12, 0.7, 0.3), draw(66, 72), draw(66, 40)


def oracle_results(operands, seed: int, exact: bool) -> dict[str, np.ndarray]:
    layer, x, dy = operands
    name = NAMES[x.dtype]
    of = oracle_layer(layer, seed, name if exact else None)
    to = "fp64" if exact else name
    (z,), (y,) = c_oracle.group_forward(wide(x), [of], to)
    _, dx, (dB,) = c_oracle.group_backward([wide(dy)], [z], [of], to)
    return {"z": z, "y": y, "dx": dx, "dB": dB}


@grid(
    ("device,impl,plan", implementation_and_plan_cases()),
    ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    each_once=True,
)
def test_a_layer_with_dropout_stays_within_the_budget(device, impl, plan, dtype, monkeypatch):
    pin_by_name(monkeypatch, plan)
    operands = layer, x, dy = draw_layer(dtype, device)
    seed = -(2**35) - 1
    got, exact = layer_results(operands, impl, seed), oracle_results(operands, seed, exact=True)
    leaf, (lora_B,) = x.detach().requires_grad_(), trained([layer], dtype)
    y = plain_layer(leaf, layer, lora_B, seed)
    dx, dB = torch.autograd.grad(y, (leaf, lora_B), dy)
    del got["z"], exact["z"]
    check_budget(got, exact, {"y": y, "dx": dx, "dB": dB})


@exactly_rounding
@halves
def test_a_layer_with_dropout_rounds_as_the_oracle(device, impl, dtype):
    operands = draw_layer(dtype, device)
    got, want = layer_results(operands, impl, 9), oracle_results(operands, 9, exact=False)
    for name in ("z", "y", "dx"):
        check_rounding(got[name], want[name])
    check_lora_B_gradient(got["dB"], operands[2], got["z"])


# Groups.

M, K = 66, 72
GROUP_SEEDS = (3, -4, 2**50, 77)


def draw_group(name: str, dtype: torch.dtype, device: str) -> tuple[list[LinearOperands], bool]:
    draw = Draw(device, dtype)
    members = {
        "adapted": lambda: [
            draw.layer(40, K, 8, 0.7),
            draw.layer(24, K, 12, 1.5),
            draw.layer(33, K, 8, -0.5),
        ],
        "some plain": lambda: [draw.layer(40, K, 12, 0.7), draw.layer(24, K, 0), draw.layer(33, K, 9, 0.5)],
        "dropout": lambda: [
            draw.layer(40, K, 8, 0.7, 0.3),
            draw.layer(24, K, 12, 1.5, 0.0),
            draw.layer(33, K, 8, 0.5, 0.1),
        ],
        "shared": lambda: [
            draw.layer(40, K, 12, 0.7, 0.3),
            draw.layer(24, K, 0),
            draw.layer(33, K, 12, 0.7, 0.3),
        ],
    }[name]()
    share_A = name == "shared"
    if share_A:
        members[2] = members[2]._replace(lora_A=members[0].lora_A)
    return members, share_A


def group_seeds(members: Sequence[LinearOperands], share_A: bool) -> list[int]:
    """The seed of each member's mask."""
    return [GROUP_SEEDS[0 if share_A else i] for i in range(len(members))]


def columns(members: Sequence[LinearOperands], share_A: bool) -> list[slice]:
    """Where z (M, ΣR) has the z of each member, or with share_A of the first."""
    ranks = [0 if member.lora_B is None else member.lora_B.shape[1] for member in members]
    ends = np.cumsum(ranks[:1] if share_A else ranks)
    return [slice(end - rank, end) for end, rank in zip(ends.tolist(), ranks, strict=False)]


def group_results(members, x, dys, share_A: bool, impl: str) -> dict[str, Tensor]:
    weights, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*members, strict=True))
    seeds = group_seeds(members, share_A)
    seeds = seed_tensor(x.device, *seeds[: 1 if share_A else None]) if any(dropout_ps) else None
    ys, z = group_ops.group_forward(
        x, weights, lora_As, lora_Bs, biases, scalings, dropout_ps, seeds, share_A, impl
    )
    need_dBs = [lora_B is not None for lora_B in lora_Bs]
    dx, dBs = group_ops.group_backward(
        dys, z, weights, lora_As, lora_Bs, scalings, dropout_ps, seeds, share_A, True, need_dBs, impl
    )
    zs = {
        f"z{i}": z[:, where] for i, where in enumerate(columns(members, share_A)) if where.stop > where.start
    }
    dBs = {f"dB{i}": dB for i, dB in enumerate(dBs) if dB is not None}
    return zs | {f"y{i}": y for i, y in enumerate(ys)} | {"dx": dx} | dBs


def group_oracle(members, x, dys, share_A: bool, exact: bool) -> dict[str, np.ndarray]:
    name = NAMES[x.dtype]
    seeds = group_seeds(members, share_A)
    layers = [
        oracle_layer(member, seed, name if exact else None)
        for member, seed in zip(members, seeds, strict=True)
    ]
    to = "fp64" if exact else name
    zs, ys = c_oracle.group_forward(wide(x), layers, to, share_A)
    _, dx, dBs = c_oracle.group_backward([wide(dy) for dy in dys], zs, layers, to, share_A)
    found = {f"z{i}": z for i, z in enumerate(zs) if z.size}
    found |= {f"y{i}": y for i, y in enumerate(ys)} | {"dx": dx}
    return found | {f"dB{i}": dB for i, dB in enumerate(dBs) if dB.size}


groups = pytest.mark.parametrize("name", ["adapted", "some plain", "dropout", "shared"])


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    ("name", ["adapted", "some plain", "dropout", "shared"]),
    each_once=True,
)
def test_a_group_stays_within_the_budget(device, impl, dtype, name):
    members, share_A = draw_group(name, dtype, device)
    draw = Draw(device, dtype, seed=1)
    x, dys = draw(M, K), [draw(M, member.weight.shape[0]) for member in members]
    got = group_results(members, x, dys, share_A, impl)
    exact = group_oracle(members, x, dys, share_A, exact=True)

    leaf, lora_Bs = x.detach().requires_grad_(), trained(members, dtype)
    ys = [
        plain_layer(leaf, *rest) for rest in zip(members, lora_Bs, group_seeds(members, share_A), strict=True)
    ]
    adapted = [i for i, lora_B in enumerate(lora_Bs) if lora_B is not None]
    dx, *dBs = torch.autograd.grad(ys, (leaf, *(lora_Bs[i] for i in adapted)), dys)
    plain = {f"y{i}": y for i, y in enumerate(ys)} | {"dx": dx}
    plain |= {f"dB{i}": dB for i, dB in zip(adapted, dBs, strict=True)}
    check_budget(*({k: found[k] for k in plain} for found in (got, exact, plain)))


@exactly_rounding
@halves
@groups
def test_a_group_rounds_as_the_oracle(device, impl, dtype, name):
    """dx once from the sum over the members, and one dz of a shared lora_A likewise."""
    members, share_A = draw_group(name, dtype, device)
    draw = Draw(device, dtype, seed=1)
    x, dys = draw(M, K), [draw(M, member.weight.shape[0]) for member in members]
    got = group_results(members, x, dys, share_A, impl)
    want = group_oracle(members, x, dys, share_A, exact=False)
    assert got.keys() == want.keys()
    for key in want:
        if key.startswith("dB"):
            index = int(key[2:])
            check_lora_B_gradient(got[key], dys[index], got["z0" if share_A else f"z{index}"])
        else:
            check_rounding(got[key], want[key])


@implementations
def test_a_group_whose_output_nobody_used_is_the_oracles(device, impl):
    members, share_A = draw_group("adapted", torch.float32, device)
    draw = Draw(device, torch.float32, seed=1)
    x, dys = draw(M, K), [draw(M, 40), None, draw(M, 33)]
    weights, biases, lora_As, lora_Bs, scalings, dropout_ps, _ = map(list, zip(*members, strict=True))
    numbers = (scalings, dropout_ps, None, share_A)
    _, z = group_ops.group_forward(x, weights, lora_As, lora_Bs, biases, *numbers, impl)
    dx, dBs = group_ops.group_backward(dys, z, weights, lora_As, lora_Bs, *numbers, True, [True] * 3, impl)
    layers = [oracle_layer(member, 0, "fp32") for member in members]
    zs, _ = c_oracle.group_forward(wide(x), layers, "fp64")
    _, want_dx, want_dBs = c_oracle.group_backward([wide(dy) for dy in dys], zs, layers, "fp64")
    exact = {"dx": want_dx, "dB0": want_dBs[0], "dB2": want_dBs[2]}

    leaf, own_Bs = x.detach().requires_grad_(), trained(members, torch.float32)
    ys = [plain_layer(leaf, members[i], own_Bs[i], 0) for i in (0, 2)]
    found = torch.autograd.grad(ys, (leaf, own_Bs[0], own_Bs[2]), [dys[0], dys[2]])
    plain = dict(zip(exact, found, strict=True))
    check_budget({"dx": dx, "dB0": dBs[0], "dB2": dBs[2]}, exact, plain)
    assert dBs[1] is None and not want_dBs[1].any()


# The gated MLP.

activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def gated_reference(activation: str) -> Callable[[Tensor], Tensor]:
    if activation == "silu":
        return F.silu
    return lambda g: F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def test_activations_are_the_oracles():
    assert set(ACTIVATIONS) == set(c_oracle.ACTIVATIONS)


@exactly_rounding
@halves
@activations
def test_the_activated_product_rounds_as_the_oracle(device, impl, dtype, activation):
    """For g in the middle: far below 0 the fp32 of 1 + erf has few bits left, and torch's has no more."""
    draw = Draw(device, dtype)
    g, u, dh = draw(37, 70), draw(37, 70), draw(37, 70)
    operands = (wide(g), wide(u))
    h = gated_ops.gated(g, u, activation, impl)
    check_rounding(h, c_oracle.gated_product(*operands, activation, NAMES[dtype]))
    dg, du = gated_ops.gated_backward(dh.clone(), g, u, activation, impl)
    want = c_oracle.gated_product_backward(wide(dh), *operands, activation, NAMES[dtype])
    for got, expected in zip((dg, du), want, strict=True):
        check_rounding(got, expected)


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", [torch.float32, torch.bfloat16, torch.float16]),
    ("activation", list(ACTIVATIONS)),
    ("dropout_p", [0.0, 0.2]),
    each_once=True,
)
def test_the_mlp_stays_within_the_budget(device, impl, dtype, activation, dropout_p):
    draw = Draw(device, dtype)
    wide_N = 40
    layers = [
        draw.layer(wide_N, 32, 8, 0.7, dropout_p),
        draw.layer(wide_N, 32, 9, 1.5, dropout_p),
        draw.layer(36, wide_N, 10, 0.5, dropout_p),
    ]
    x, dy = draw(26, 32), draw(26, 36)
    torch.manual_seed(8)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), dtype=torch.int64, device=device).tolist()

    leaf, lora_Bs = x.detach().requires_grad_(), trained(layers, torch.float32)
    torch.manual_seed(8)
    members = [layer._replace(lora_B=lora_B) for layer, lora_B in zip(layers, lora_Bs, strict=True)]
    y = lorafa_gated_mlp(leaf, *members, activation=activation, impl=impl)
    found = torch.autograd.grad(y, (leaf, *lora_Bs), dy)
    keys = ("dx", "dB_gate", "dB_up", "dB_down")
    got = {"y": y} | dict(zip(keys, found, strict=True))

    lora_Bs = trained(layers, dtype)
    g, u = (plain_layer(leaf, layers[i], lora_Bs[i], seeds[i]) for i in (0, 1))
    y = plain_layer(gated_reference(activation)(g) * u, layers[2], lora_Bs[2], seeds[2])
    found = torch.autograd.grad(y, (leaf, *lora_Bs), dy)
    plain = {"y": y} | dict(zip(keys, found, strict=True))

    of = [oracle_layer(layer, seed, NAMES[dtype]) for layer, seed in zip(layers, seeds, strict=True)]
    kept = c_oracle.mlp_forward(wide(x), *of, activation, "fp64")
    gradients = c_oracle.mlp_backward(wide(dy), kept, *of, activation, "fp64")
    exact = {"y": kept.y} | dict(zip(keys, (gradients.dx, *gradients.dBs), strict=True))
    check_budget(got, exact, plain)


# The RMS norm. T5's form is Llama's where x and the weight have one dtype.

forms = pytest.mark.parametrize(
    ("form", "oracle_form"), [("llama", "llama"), ("t5", "llama"), ("gemma", "gemma")], ids=lambda f: f
)


@halves
@forms
def test_the_norm_rounds_as_the_oracle_and_its_gradient_stays_within_the_budget(
    device, dtype, form, oracle_form
):
    draw = Draw(device, dtype)
    x, weight, dy = draw(33, 64).requires_grad_(), draw(64), draw(33, 64)
    operands = (wide(x), wide(weight), 1e-5, oracle_form, NAMES[dtype])
    y = rms_norm(x, weight, 1e-5, form)
    check_rounding(y, c_oracle.rms_norm(*operands))
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = torch.from_numpy(c_oracle.rms_norm_backward(wide(dy), *operands[:-1], "fp64"))
    once = torch.from_numpy(c_oracle.rms_norm_backward(wide(dy), *operands))
    assert relative_error(dx.cpu(), exact) <= allowed_error(relative_error(once, exact), dtype)
