"""A batch whose rows have adapters of their own computes what each adapter computes on its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import c_oracle
import numpy as np
import pytest
import torch
from accuracy import Budget, assert_same
from conftest import implementation_cases
from saved import Saved
from torch import Tensor

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import Operands, draw_operands, plain_formula
from lorafa_kernels.correction import correct, gram_inverse
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.mixed import ops
from lorafa_kernels.mixed.api import lorafa_linear_mixed
from lorafa_kernels.mixed.rows import Rows, rows_of
from lorafa_kernels.operands import draw_seed
from lorafa_kernels.philox import keep_chunks_of, keep_mask

pytestmark = pytest.mark.numerics
IMPLS = implementation_cases()
implementations = pytest.mark.parametrize(("device", "impl"), IMPLS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
B, S, K, N = 10, 13, 48, 80
# Rows that follow each other, rows that do not, an adapter without rows (3), samples without an adapter.
PLACES = (0, 0, 1, -1, 2, 1, 2, -1, 1, 2)
CASES = {
    "shared": dict(ranks=(6, 6, 6, 6), shared=True, scalings=(0.7,) * 4, ps=(0.0,) * 4),
    "own": dict(ranks=(6, 4, 11, 6), shared=False, scalings=(0.7, 1.4, 0.3, 1.0), ps=(0.0,) * 4),
    "shared-dropout": dict(ranks=(6, 6, 6, 6), shared=True, scalings=(0.7,) * 4, ps=(0.2,) * 4),
    "own-dropout": dict(
        ranks=(6, 4, 11, 6), shared=False, scalings=(0.7, 1.4, 0.3, 1.0), ps=(0.2, 0.5, 0.0, 0.1)
    ),
    "rank-above-K": dict(ranks=(50, 7), shared=False, scalings=(0.7, 1.4), ps=(0.0,) * 2),
}
cases = pytest.mark.parametrize("case", CASES)


def draw(case: str, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Operands, list[Operands]]:
    """Operands of the batch, and of each adapter on all of its rows."""
    kind = CASES[case]
    first = draw_operands(B * S, K, N, kind["ranks"][0], dtype, device, seed=seed, factor_dtype=torch.float32)
    found = []
    for i, (R, s, p) in enumerate(zip(kind["ranks"], kind["scalings"], kind["ps"], strict=True)):
        other = draw_operands(1, K, N, R, dtype, device, seed=seed + 100 + i, factor_dtype=torch.float32)
        lora_A = first.lora_A if kind["shared"] else other.lora_A
        found.append(replace(first, lora_A=lora_A, lora_B=other.lora_B, scaling=s, dropout_p=p))
    return first, found


def members_of(adapters: Sequence[Operands], train: bool = False) -> dict[int, LinearOperands]:
    """What the function takes, by number, with each lora_B trained or none."""
    return {
        i: LinearOperands(
            a.weight, a.bias, a.lora_A, a.lora_B.detach().requires_grad_(train), a.scaling, a.dropout_p
        )
        for i, a in enumerate(adapters)
    }


def places_of(adapters: Sequence[Operands]) -> tuple[int, ...]:
    return tuple(min(place, len(adapters) - 1) for place in PLACES)


def own_rows(places: Sequence[int], number: int) -> Tensor:
    return torch.tensor([place == number for place in places]).repeat_interleave(S)


def compute(
    batch: Operands, adapters: Sequence[Operands], places: Sequence[int], impl: str, correction: bool = False
) -> dict[str, Tensor]:
    """y (M, N), dx (M, K) and the dB_i of a mixed batch."""
    x = batch.x.view(len(places), -1, K).detach().requires_grad_()
    lora_Bs = [a.lora_B.detach().requires_grad_() for a in adapters]
    members = {
        i: LinearOperands(a.weight, a.bias, a.lora_A, lora_B, a.scaling, a.dropout_p, correction)
        for i, (a, lora_B) in enumerate(zip(adapters, lora_Bs, strict=True))
    }
    rows = Rows.of(torch.tensor(places, device=x.device), len(members))
    with batch.seeded():
        y = lorafa_linear_mixed(x, members, rows, impl=impl)
    dx, *dBs = torch.autograd.grad(y, (x, *lora_Bs), batch.dy.view_as(y))
    found = {"y": y.detach().flatten(0, 1), "dx": dx.flatten(0, 1)}
    return found | {f"dB{i}": dB for i, dB in enumerate(dBs)}


def by_formula(
    batch: Operands, adapters: Sequence[Operands], places: Sequence[int], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The same by the plain formula, an adapter at a time, on the rows that it has."""
    base = replace(batch, lora_B=torch.zeros_like(batch.lora_B), dropout_p=0.0)
    want = plain_formula(base, dtype)
    want.pop("dB")
    for i, adapter in enumerate(adapters):
        own = own_rows(places, i).to(batch.x.device)
        alone = replace(adapter, dy=adapter.dy * own[:, None])
        found = plain_formula(alone, dtype)
        want["y"][own], want["dx"][own] = found["y"][own], found["dx"][own]
        want[f"dB{i}"] = found["dB"]
    return want


@implementations
@dtypes
@cases
@pytest.mark.parametrize("order", ["mixed", "sorted"])
def test_accuracy(device, impl, dtype, case, order):
    """sorted: all rows of an adapter follow each other, behind those without one."""
    batch, adapters = draw(case, dtype, device)
    places = places_of(adapters)
    places = tuple(sorted(places)) if order == "sorted" else places
    budget = Budget()
    exact = by_formula(batch, adapters, places, torch.float64)
    budget.compare(compute(batch, adapters, places, impl), exact, by_formula(batch, adapters, places))
    budget.check()


@implementations
@dtypes
def test_accuracy_without_a_bias(device, impl, dtype):
    batch, adapters = draw("own", dtype, device)
    batch = replace(batch, bias=None)
    adapters = [replace(adapter, bias=None) for adapter in adapters]
    budget = Budget()
    exact = by_formula(batch, adapters, PLACES, torch.float64)
    budget.compare(compute(batch, adapters, PLACES, impl), exact, by_formula(batch, adapters, PLACES))
    budget.check()


@implementations
@cases
def test_each_adapter_as_alone(device, impl, case):
    """The rows of an adapter get what a batch of the same rows gets from it alone; no other row counts."""
    batch, adapters = draw(case, torch.float32, device)
    places = places_of(adapters)
    found = compute(batch, adapters, places, impl)
    others = [replace(a, lora_B=a.lora_B + 1, lora_A=a.lora_A) for a in adapters]
    for i in range(len(adapters)):
        own = own_rows(places, i)
        mixed = [adapters[i] if j == i else other for j, other in enumerate(others)]
        again = compute(batch, mixed, places, impl)
        for name in ("y", "dx"):
            assert_same(again[name][own], found[name][own], name=name)
        assert_same(again[f"dB{i}"], found[f"dB{i}"], name=f"dB{i}")


@implementations
@pytest.mark.parametrize("case", ["shared", "own-dropout"])
def test_what_is_not_finite_stays_with_its_adapter(device, impl, case):
    batch, adapters = draw(case, torch.float32, device)
    places = places_of(adapters)
    found = compute(batch, adapters, places, impl)
    broken = [replace(a, lora_B=a.lora_B * float("nan")) if i == 1 else a for i, a in enumerate(adapters)]
    again = compute(batch, broken, places, impl)
    own = own_rows(places, 1)
    assert again["y"][own].isnan().all() and again["dx"][own].isnan().any()
    for name in ("y", "dx"):
        assert_same(again[name][~own], found[name][~own], name=name)
    for i in (0, 2, 3):
        assert_same(again[f"dB{i}"], found[f"dB{i}"], name=f"dB{i}")


@implementations
def test_an_adapter_without_rows_gets_a_zero_gradient(device, impl):
    batch, adapters = draw("own", torch.bfloat16, device)
    found = compute(batch, adapters, PLACES, impl)
    assert_same(found["dB3"], torch.zeros_like(adapters[3].lora_B))
    found = compute(batch, adapters, (-1,) * B, impl)
    plain = torch.nn.functional.linear(batch.x, batch.weight, batch.bias)
    assert not any(found[f"dB{i}"].any() for i in range(4))
    # Of no adapter, y is that of the base layer.
    budget = Budget()
    exact = torch.nn.functional.linear(batch.x.double(), batch.weight.double(), batch.bias.double())
    budget.compare({"y": found["y"]}, {"y": exact}, {"y": plain})
    budget.check()


@implementations
@pytest.mark.parametrize("case", ["shared-dropout", "own-dropout"])
def test_deterministic_bits(device, impl, case):
    batch, adapters = draw(case, torch.float32, device)
    first = compute(batch, adapters, PLACES, impl)
    for _ in range(5):
        assert_same(compute(batch, adapters, PLACES, impl), first)


@implementations
@dtypes
def test_one_adapter_on_all_rows_is_the_layer_itself(device, impl, dtype):
    batch, adapters = draw("shared-dropout", dtype, device)
    found = compute(batch, adapters, (2,) * B, impl)
    x, lora_B = batch.x.detach().requires_grad_(), adapters[2].lora_B.detach().requires_grad_()
    operands = batch.weight, batch.lora_A, lora_B, batch.bias
    with batch.seeded():
        y = lorafa_linear(x, *operands, scaling=0.7, dropout_p=0.2, impl=impl)
    dx, dB = torch.autograd.grad(y, (x, lora_B), batch.dy)
    assert_same([found[name] for name in ("y", "dx", "dB2")], [y.detach(), dx, dB])


@implementations
def test_corrected_gradients(device, impl):
    batch, adapters = draw("own", torch.float32, device)
    plain = compute(batch, adapters, PLACES, impl)
    corrected = compute(batch, adapters, PLACES, impl, correction=True)
    for i, adapter in enumerate(adapters):
        want = correct(plain[f"dB{i}"], gram_inverse(adapter.lora_A), adapter.scaling)
        assert_same(corrected[f"dB{i}"], want)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@dtypes
def test_agrees_with_the_c_oracle(impl, dtype):
    """Block by block of rows: the oracle has a layer of one adapter, which each block of rows is given."""
    batch, adapters = draw("own", dtype, "cpu")
    # Its numbers in C are in the order of the rows; no dropout, whose mask begins at row 0 there.
    got, want = compute(batch, adapters, PLACES, impl), oracle(batch, adapters)
    budget = Budget()
    names = [name for name in got if name != "dB3"]
    exact = by_formula(batch, adapters, PLACES, torch.float64)
    plain = by_formula(batch, adapters, PLACES)
    for found in (got, want):
        budget.compare(*({name: values[name] for name in names} for values in (found, exact, plain)))
    budget.check()


def oracle(batch: Operands, adapters: Sequence[Operands]) -> dict[str, Tensor]:
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[batch.x.dtype]

    def wide(tensor):
        return tensor.double().numpy()

    found = {"y": np.empty((B * S, N)), "dx": np.empty((B * S, K))}
    zero = torch.zeros_like(batch.lora_B)
    for i in (-1, 0, 1, 2):
        own = own_rows(PLACES, i).numpy()
        adapter = adapters[i] if i >= 0 else replace(batch, lora_B=zero)
        weight, A, lora_B, bias = (
            wide(t) for t in (batch.weight, adapter.lora_A, adapter.lora_B, batch.bias)
        )
        z, y = c_oracle.forward(wide(batch.x)[own], weight, A, lora_B, bias, adapter.scaling, name)
        _, dx, dB = c_oracle.backward(
            wide(batch.dy)[own], z, weight, A, lora_B, adapter.scaling, name, "fp32"
        )
        found["y"][own], found["dx"][own] = y, dx
        found[f"dB{i}"] = dB
    return {
        key: torch.from_numpy(value).to(torch.float32 if key.startswith("dB") else batch.x.dtype)
        for key, value in found.items()
        if key != "dB-1"
    }


@implementations
@pytest.mark.parametrize("case", ["shared-dropout", "own"])
@pytest.mark.parametrize("first", [False, True], ids=["x-needs-a-gradient", "first-layer"])
def test_what_is_kept(device, impl, case, first):
    """z and the index, and the parameter objects themselves: nothing else, of any size."""
    batch, adapters = draw(case, torch.bfloat16, device)
    lora_Bs = [a.lora_B.detach().requires_grad_() for a in adapters]
    members = {
        i: LinearOperands(a.weight, a.bias, a.lora_A, lora_B, a.scaling, a.dropout_p)
        for i, (a, lora_B) in enumerate(zip(adapters, lora_Bs, strict=True))
    }
    rows = Rows.of(torch.tensor(PLACES, device=device), 4)
    x = batch.x.view(B, S, K).detach().requires_grad_(not first)
    with Saved() as saved:
        y = lorafa_linear_mixed(x, members, rows, impl=impl)
    own = {id(t) for a in adapters for t in (a.weight, a.lora_A)} | set(map(id, lora_Bs))
    kept = [t for t in saved.tensors if id(t) not in own]
    R = max(a.lora_A.shape[0] for a in adapters)
    z, index, *seed = kept
    assert z.shape == (B * S, R) and z.untyped_storage().nbytes() == B * S * R * 2
    assert index is rows.on(index.device) and index.dtype == torch.int32 and index.shape == (B,)
    assert [t.shape for t in seed] == ([(1,)] if "dropout" in case and not first else [])
    assert not first or not any(t is a.weight for a in adapters for t in saved.tensors)
    y.sum().backward()
    assert all(lora_B.grad is not None for lora_B in lora_Bs)


@implementations
def test_frozen_factors_keep_no_z_and_cost_nothing(device, impl):
    batch, adapters = draw("own", torch.float32, device)
    members = members_of(adapters)
    rows = Rows.of(PLACES, 4)
    x = batch.x.view(B, S, K).detach()
    with Saved() as saved:
        assert lorafa_linear_mixed(x, members, rows, impl=impl).grad_fn is None
    assert not saved.tensors
    x.requires_grad_()
    with Saved() as saved:
        y = lorafa_linear_mixed(x, members, rows, impl=impl)
    assert not any(t.shape[0] == B * S for t in saved.tensors)
    (dx,) = torch.autograd.grad(y, x, batch.dy.view_as(y))
    assert_same(dx.flatten(0, 1), compute(batch, adapters, PLACES, impl)["dx"])


@implementations
def test_some_lora_B_trained(device, impl):
    batch, adapters = draw("own", torch.float32, device)
    whole = compute(batch, adapters, PLACES, impl)
    lora_Bs = [a.lora_B.detach().requires_grad_(i != 1) for i, a in enumerate(adapters)]
    members = {
        i: LinearOperands(a.weight, a.bias, a.lora_A, lora_B, a.scaling)
        for i, (a, lora_B) in enumerate(zip(adapters, lora_Bs, strict=True))
    }
    x = batch.x.view(B, S, K)
    lorafa_linear_mixed(x, members, Rows.of(PLACES, 4), impl=impl).backward(batch.dy.view(B, S, N))
    assert lora_Bs[1].grad is None
    for i in (0, 2, 3):
        assert_same(lora_Bs[i].grad, whole[f"dB{i}"])


@implementations
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_autocast(device, impl, inside):
    """fp32 parameters are cast within the operator: z is in autocast's dtype, no cast is kept."""
    batch, adapters = draw("own", torch.float32, device)
    lora_Bs = [a.lora_B.detach().requires_grad_() for a in adapters]
    members = {
        i: LinearOperands(a.weight, a.bias, a.lora_A, lora_B, a.scaling)
        for i, (a, lora_B) in enumerate(zip(adapters, lora_Bs, strict=True))
    }
    x = batch.x.view(B, S, K).detach().requires_grad_()
    dy = batch.dy.view(B, S, N).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        with Saved() as saved:
            y = lorafa_linear_mixed(x, members, Rows.of(PLACES, 4), impl=impl)
        if inside:
            gradients = torch.autograd.grad(y, (x, *lora_Bs), dy)
    if not inside:
        gradients = torch.autograd.grad(y, (x, *lora_Bs), dy)
    assert [t.dtype for t in saved.tensors if t.dim() == 2 and t.shape[0] == B * S] == [torch.bfloat16]
    narrow = [
        replace(a, x=a.x.bfloat16(), weight=a.weight.bfloat16(), bias=a.bias.bfloat16(), dy=a.dy.bfloat16())
        for a in adapters
    ]
    want = compute(replace(narrow[0], lora_B=batch.lora_B), narrow, PLACES, impl)
    assert_same(y.detach().flatten(0, 1), want["y"])
    assert_same(gradients[0].flatten(0, 1), want["dx"].float())
    assert_same(list(gradients[1:]), [want[f"dB{i}"] for i in range(4)])


@pytest.mark.parametrize("shape", [(B, K), (B, 3, 2, K), (B, 0, K)], ids=["2d", "4d", "no-rows"])
def test_shapes_of_x(shape):
    members = members_of(draw("own", torch.float32, "cpu")[1])
    x = torch.randn(*shape)
    y = lorafa_linear_mixed(x, members, Rows.of(PLACES, 4))
    assert y.shape == (*shape[:-1], N)
    if x.numel():
        flat = lorafa_linear_mixed(x.reshape(B, -1, K), members, Rows.of(PLACES, 4))
        assert_same(y.reshape(B, -1, N), flat)
    none = lorafa_linear_mixed(torch.randn(0, 4, K), members, Rows.of([], 4))
    assert none.shape == (0, 4, N)


def test_transposed_and_expanded_operands():
    batch, adapters = draw("own", torch.float32, "cpu")
    want = compute(batch, adapters, PLACES, "torch")
    turned = [
        replace(a, weight=a.weight.t().contiguous().t(), lora_B=a.lora_B.t().contiguous().t())
        for a in adapters
    ]
    strided = replace(batch, x=batch.x.t().contiguous().t().contiguous(), dy=batch.dy.t().contiguous().t())
    got = compute(strided, turned, PLACES, "torch")
    budget = Budget()
    exact, plain = (by_formula(batch, adapters, PLACES, dtype) for dtype in (torch.float64, None))
    budget.compare(got, exact, plain)
    budget.check()
    assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in want.items()}


@pytest.mark.parametrize("name", ["mixed_forward", "mixed_backward"])
def test_opcheck(name):
    batch, adapters = draw("own", torch.bfloat16, "cpu")
    index, numbers = torch.tensor(PLACES, dtype=torch.int32), (0, 1, 2, 3)
    lora_As, lora_Bs = [a.lora_A for a in adapters], [a.lora_B for a in adapters]
    rest = index, PLACES, numbers, [a.scaling for a in adapters], [0.0] * 4, None
    arguments = (batch.x, batch.weight, lora_As, lora_Bs, batch.bias, *rest, "torch")
    if name == "mixed_backward":
        z = torch.randn(B * S, 11, dtype=torch.bfloat16)
        needs = True, [True, False, True, True]
        arguments = (batch.dy, z, batch.weight, lora_As, lora_Bs, *rest, *needs, "torch")
    torch.library.opcheck(getattr(torch.ops.lorafa_kernels, name).default, arguments)


def test_the_operator_computes_and_counts_what_a_direct_call_does():
    """Where a dispatch mode watches, the operators are called. FLOPs are those of each adapter's own rows."""
    from torch.utils.flop_counter import FlopCounterMode

    batch, adapters = draw("own-dropout", torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        watched = compute(batch, adapters, PLACES, "torch")
    assert_same(watched, compute(batch, adapters, PLACES, "torch"))
    base = 2 * B * S * N * K
    own = [2 * PLACES.count(i) * S * a.lora_A.shape[0] for i, a in enumerate(adapters)]
    # z and y, then dz, dB and dx.
    assert counter.get_total_flops() == 2 * base + sum(own) * (K + N + N + N + K)


def test_double_backward_raises():
    batch, adapters = draw("own", torch.float32, "cpu")
    x = batch.x.view(B, S, K).detach().requires_grad_()
    lora_B = adapters[0].lora_B.detach().requires_grad_()
    member = LinearOperands(batch.weight, None, adapters[0].lora_A, lora_B)
    y = lorafa_linear_mixed(x, {0: member}, Rows.of([0] * B, 1))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_masks_of_some_rows():
    seed = draw_seed(torch.device("cpu"))
    rows = torch.tensor([3, 4, 9, 200_001])
    keep = torch.cat([chunk for _, chunk in keep_chunks_of(seed, 0.3, rows, 7)])
    whole = torch.cat([keep_mask(seed, 0.3, 1, 7, row0=int(row)) for row in rows])
    assert torch.equal(keep, whole)


def test_rows_of_an_adapter():
    index = torch.tensor(PLACES, dtype=torch.int32)
    assert rows_of(index, PLACES, 0, B * S) == slice(0, 2 * S)
    assert rows_of(index, PLACES, 3, B * S) is None
    want = [m for m in range(B * S) if PLACES[m // S] == 1]
    assert rows_of(index, PLACES, 1, B * S).tolist() == want


WRONG: Mapping[str, tuple] = {
    "too-large": (torch.tensor([0, 4]), ValueError, r"index\[1\] is 4"),
    "too-small": ([0, -2], ValueError, r"index\[1\] is -2"),
    "floats": (torch.tensor([0.0, 1.0]), ValueError, "float32"),
    "bools": (torch.tensor([True, False]), ValueError, "bool"),
    "two-dimensional": (torch.zeros(2, 2, dtype=torch.int64), ValueError, "shape"),
    "a-fraction": ([0, 0.5], ValueError, "integers"),
    "a-string": ("01", TypeError, "str"),
    "a-number": (3, TypeError, "int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_indices(case):
    index, kind, text = WRONG[case]
    with pytest.raises(kind, match=text):
        Rows.of(index, 4)


def test_errors_come_before_any_product(monkeypatch):
    batch, adapters = draw("own", torch.float32, "cpu")
    members = members_of(adapters)
    monkeypatch.setattr(ops.library, "forward", lambda *_: pytest.fail("something was computed"))
    x = batch.x.view(B, S, K)
    rows = Rows.of(PLACES, 4)
    with pytest.raises(ValueError, match="10 entries"):
        lorafa_linear_mixed(x[:-1], members, rows)
    with pytest.raises(ValueError, match="10 entries"):
        lorafa_linear_mixed(x.flatten(0, 1), members, rows)
    with pytest.raises(ValueError, match="index is on meta"):
        lorafa_linear_mixed(x, members, Rows(PLACES, torch.device("meta")))
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        wide = {
            i: LinearOperands(*(None if t is None else t.double() for t in m[:4])) for i, m in members.items()
        }
        lorafa_linear_mixed(x.double(), wide, rows, impl="triton")
    with pytest.raises(ValueError, match="impl"):
        lorafa_linear_mixed(x, members, rows, impl="cuda")
    with pytest.raises(ValueError, match=r"adapter 2: lora_B has shape"):
        lorafa_linear_mixed(x, members | {2: members[2]._replace(lora_B=members[1].lora_B)}, rows)
    thawed = members[1].lora_A.clone().requires_grad_()
    with pytest.raises(ValueError, match="adapter 1: lora_A requires grad"):
        lorafa_linear_mixed(x, members | {1: members[1]._replace(lora_A=thawed)}, rows)
