"""Groups on quantised bases: the numbers of the dense group with the weights that the bases stand for, what
is kept and for how long, and errors.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from accuracy import Budget, assert_same, check_budget
from conftest import implementation_cases
from kernel_plans import grid
from saved import DenseWeights, Saved
from test_group import DTYPES, Group, draw_group, gradients, masks_of, plain
from test_group import results as dense_results
from torch import Tensor, nn

from lorafa_kernels import LoRAFALinear, LoRAFALinearGroup
from lorafa_kernels.base.frozen import QuantisedBase, quantised
from lorafa_kernels.base.kinds import KINDS
from lorafa_kernels.checks.budget import relative_error, unit_roundoff
from lorafa_kernels.dispatch import only_looked_on
from lorafa_kernels.group import quantised as group_ops
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.group.quantised import quantised_linear_group
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
M, K = 34, 64
QKV = [(64, 8), (40, 8), (32, 8)]
MIXED = ("nf4", "int8", "nf4-nested")
CASES = [
    pytest.param(QKV, {}, id="qkv"),
    pytest.param([(64, 4), (40, None), (24, 12)], {}, id="plain-member"),
    pytest.param(QKV, {"share_A": True}, id="one-A"),
    pytest.param(QKV, {"dropout_ps": (0.3, 0.0, 0.5), "bias": False}, id="dropout"),
    pytest.param(QKV, {"share_A": True, "dropout_ps": (0.3,) * 3}, id="dropout-one-A"),
    pytest.param(QKV, {"factor_dtype": torch.float32}, id="fp32-factors"),
    pytest.param([(64, 8)], {}, id="one"),
]
WIDE = torch.float64


def on_bases(group: Group, kinds: tuple[str, ...]) -> tuple[Group, list[QuantisedBase]]:
    """The group with the weights that bases stand for, which are its operands, and the bases."""
    bases = [quantised(m.weight, kinds[i % len(kinds)]) for i, m in enumerate(group.members)]
    members = [m._replace(weight=b.dense()) for m, b in zip(group.members, bases, strict=True)]
    return replace(group, members=members), bases


def run(group: Group, bases: list[QuantisedBase], impl: str, needs: str = "all", **options) -> dict:
    """y, dx and dB of the group on its bases."""
    x = group.x.detach().requires_grad_(needs != "dB")
    lora_Bs = [
        None if m.lora_B is None else m.lora_B.detach().requires_grad_(needs != "dx") for m in group.members
    ]
    members = [
        m._replace(weight=base, lora_B=B) for m, base, B in zip(group.members, bases, lora_Bs, strict=True)
    ]
    ys = quantised_linear_group(x, members, share_A=group.share_A, impl=impl, **options)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | gradients(group, x, lora_Bs, ys)


@grid(("device,impl", implementation_cases()), ("dtype", DTYPES[:2]), ("shapes,options", CASES))
def test_within_the_budget_of_the_dense_group(device, impl, dtype, shapes, options):
    budget = Budget()
    for seed in range(2):
        group = draw_group(M, K, shapes, dtype, device, seed=seed, **options)
        group, bases = on_bases(group, MIXED)
        with Saved() as saved:
            got = run(group, bases, impl)
        masks = masks_of(saved, group) if "dropout_ps" in options else None
        budget.compare(got, plain(group, torch.float64, masks), plain(group, None, masks))
    budget.check()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("shapes", "options"), CASES)
@pytest.mark.parametrize("columns", [64, 66])
def test_the_bits_of_the_dense_group(impl, shapes, options, columns):
    """Both multiply by weights of the same bits, by the same products, for all gradients and for a part."""
    group, bases = on_bases(draw_group(M, columns, shapes, torch.float32, "cpu", **options), tuple(KINDS))
    for needs in ("all", "dx", "dB"):
        torch.manual_seed(3)
        want = dense_results(group, impl, needs)
        torch.manual_seed(3)
        assert_same(run(group, bases, impl, needs), want)
    unused = replace(group, dys=[None, *group.dys[1:]] if len(shapes) > 1 else group.dys)
    torch.manual_seed(3)
    want = dense_results(unused, impl)
    torch.manual_seed(3)
    assert_same(run(unused, bases, impl), want)


@pytest.mark.parametrize("shape", [(0, K), (3, 0, K), (K,), (2, 3, K)], ids=str)
def test_shapes_of_x(shape):
    group, bases = on_bases(draw_group(1, K, QKV, torch.float32, "cpu"), ("fp8",))
    group.x = torch.randn(shape)
    group.dys = [torch.randn(*shape[:-1], N) for N, _ in QKV]
    assert_same(run(group, bases, "auto"), dense_results(group, "auto"))


@implementations
@pytest.mark.parametrize("share_A", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
def test_keeps_one_z_and_the_objects_themselves(device, impl, share_A, dtype):
    group, bases = on_bases(draw_group(M, K, QKV, dtype, device, share_A=share_A), MIXED)
    x = group.x.detach().requires_grad_()
    members = [
        m._replace(weight=base, lora_B=m.lora_B.detach().requires_grad_())
        for m, base in zip(group.members, bases, strict=True)
    ]
    with Saved() as saved:
        ys = quantised_linear_group(x, members, share_A=share_A, impl=impl)
    z, *objects = saved.tensors
    assert z.shape == (M, 8 if share_A else 24) and z.untyped_storage().nbytes() == z.nbytes
    own = [m.lora_B for m in members] + [m.lora_A for m in members][: 1 if share_A else None]
    own += [tensor for base in bases for tensor in base.tensors]
    assert sorted(map(id, objects)) == sorted(map(id, own))
    sum(y.float().sum() for y in ys).backward()
    # Where x needs no gradient, no weight is read.
    with Saved() as saved:
        quantised_linear_group(x.detach(), members, share_A=share_A, impl=impl)
    assert sorted(map(id, saved.tensors[1:])) == sorted(id(m.lora_B) for m in members)


@implementations
@pytest.mark.parametrize("options", [{}, {"share_A": True}, {"dropout_ps": (0.3, 0.2, 0.5)}], ids=str)
def test_one_dense_weight_at_a_time(device, impl, options):
    shapes = [(96, 8), (80, None), (72, 8)]
    # None of the shapes is that of the chunks which dequantise computes, (N·K/64, 64).
    group, bases = on_bases(draw_group(M, 2 * K, shapes, torch.float32, device, **options), ("nf4",))
    sizes = {(N, 2 * K) for N, _ in shapes}
    interpreted = impl == "triton" and device == "cpu"
    with DenseWeights(sizes, interpreted) as mode, only_looked_on(operators=False):
        found = run(group, bases, impl)
        assert mode.most == 1 and len(found) == 6
        gc.collect()
        torch.empty(1)
        assert not mode.alive
    # The dense group has all of its weights.
    with DenseWeights(sizes) as mode, only_looked_on(operators=False):
        held = [base.dense() for base in bases]
    assert mode.most == len(held)


@pytest.mark.parametrize("options", [{}, {"share_A": True}, {"dropout_ps": (0.3, 0.0, 0.5)}], ids=str)
def test_members_read_codes_where_their_plans_do(triton_device, options):
    """Then no dense weight is made for them in forward."""
    reads = KernelConfig(16, 32, 128, 16, 1, 4, 2, "codes")
    shapes = [(96, 8), (80, None), (72, 8)]
    group = draw_group(20, 2 * K, shapes, torch.bfloat16, triton_device, **options)
    group, bases = on_bases(group, ("nf4", "int8"))
    members = [m._replace(weight=base) for m, base in zip(group.members, bases, strict=True)]
    with pin_plan({"forward": Recipe("fused", KernelPlan(expand=reads))}):
        # The frozen member runs as "auto" says, which is not the interpreter.
        sizes = {(N, 2 * K) for N, R in shapes if R}
        with DenseWeights(sizes) as mode, only_looked_on(operators=False):
            quantised_linear_group(group.x, members, share_A=group.share_A, impl="triton")
            assert mode.most == 0
        with Saved() as saved:
            got = run(group, bases, "triton")
    masks = masks_of(saved, group) if "dropout_ps" in options else None
    check_budget(got, plain(group, torch.float64, masks), plain(group, None, masks))


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast(backward_inside):
    group, bases = on_bases(draw_group(M, K, QKV, torch.float32, "cpu"), MIXED)
    found = []
    for weights in (bases, [member.weight for member in group.members]):
        x = group.x.detach().requires_grad_()
        lora_Bs = [member.lora_B.detach().requires_grad_() for member in group.members]
        members = [
            m._replace(weight=w, lora_B=B) for m, w, B in zip(group.members, weights, lora_Bs, strict=True)
        ]
        compute = quantised_linear_group if weights is bases else lorafa_linear_group
        with torch.autocast("cpu", torch.bfloat16):
            ys = compute(x, members)
            loss = sum(y.float().square().sum() for y in ys)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append((*(y.detach() for y in ys), x.grad, *(B.grad for B in lora_Bs)))
    assert found[0][0].dtype == torch.bfloat16
    assert_same(*found)


def members_on(kind: str = "nf4", dtype: torch.dtype = torch.float32, **options) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [QuantisedLinear.from_linear(nn.Linear(K, N, dtype=dtype), kind) for N, _ in QKV]
    return [
        LoRAFAQuantisedLinear.from_linear(layer, r=4, init_lora_weights=False, **options) for layer in layers
    ]


def losses(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    ys = module(x)
    sum(y.float().square().sum() for y in ys).backward()
    found = [*(y.detach() for y in ys), x.grad, *(m.lora_B.grad for m in module.members)]
    for member in module.members:
        member.lora_B.grad = None
    return found


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float32])
def test_compute_dtype_is_that_of_the_layers(compute_dtype):
    """x is cast once, and every y comes back in its dtype, as from each layer."""
    members = members_on(dtype=torch.bfloat16)
    for member in members:
        member.compute_dtype = compute_dtype
    x = torch.randn(M, K, dtype=torch.bfloat16)
    group = LoRAFALinearGroup(members)
    ys = group(x)
    assert {type(y.grad_fn).__name__ for y in ys} != {"QuantisedLinearFunctionBackward"}
    assert_same(ys, tuple(member(x) for member in members))
    members[0].compute_dtype = torch.float64
    assert_same(group(x), tuple(member(x) for member in members))


def check_close(got, want) -> None:
    """The same in fp64 but for the order of sums, which a stack of lora_A may change: closer than fp32 could
    tell.
    """
    for one, exact in zip(got, want, strict=True):
        assert one.dtype == exact.dtype == WIDE
        assert relative_error(one, exact) <= unit_roundoff(torch.float32)


def test_the_module_is_one_node_and_gives_way():
    members = members_on(dtype=WIDE)
    group = LoRAFALinearGroup(members)
    x = torch.randn(M, K, dtype=WIDE)
    ys = group(x)
    assert ys[0].grad_fn is ys[2].grad_fn
    check_close(ys, [member(x) for member in members])
    members[1].adapter_enabled = False
    check_close(group(x), [member(x) for member in members])
    members[1].adapter_enabled = True
    group.eval()
    for options in ({}, {"requantize": True}):
        members[0].merge(**options)
        with torch.no_grad():
            assert_same(group(x), tuple(member(x) for member in members))
        members[0].unmerge()
    dense = LoRAFALinear(K, 8, r=4, dtype=WIDE)
    mixed = LoRAFALinearGroup([*members, dense])
    ys = mixed(x)
    assert ys[0].grad_fn is not ys[2].grad_fn
    assert_same(ys, tuple(member(x) for member in (*members, dense)))
    plain_member = QuantisedLinear.from_linear(nn.Linear(K, 8, dtype=WIDE), "int8")
    with_plain = LoRAFALinearGroup([*members, plain_member])
    ys = with_plain(x)
    assert ys[0].grad_fn is ys[3].grad_fn
    check_close(ys[3:], [plain_member(x)])


def test_one_A_is_shared():
    layers = [QuantisedLinear.from_linear(nn.Linear(K, N, dtype=WIDE), "nf4") for N, _ in QKV]
    group = LoRAFALinearGroup.from_linears(layers, r=4, share_A=True, init_lora_weights=False)
    q, k, v = group.members
    assert q.lora_A is k.lora_A is v.lora_A
    x = torch.randn(M, K, dtype=WIDE, requires_grad=True)
    with Saved() as saved:
        ys = group(x)
    assert saved.tensors[0].shape == (M, 4)
    check_close(ys, [member(x) for member in group.members])


@pytest.mark.slow
@pytest.mark.parametrize("share_A", [False, True])
def test_compiled_in_one_graph_that_keeps_no_dense_weight(share_A):
    layers = [QuantisedLinear.from_linear(nn.Linear(K, N), "nf4-nested") for N, _ in QKV]
    group = LoRAFALinearGroup.from_linears(layers, r=4, share_A=share_A, init_lora_weights=False)
    compiled = torch.compile(group, fullgraph=True)
    x = torch.randn(M, K, requires_grad=True)
    with Saved() as saved:
        ys = compiled(x)
    codes = [member.weight for member in group.members]
    assert all(t.numel() < 32 * K or any(t is code for code in codes) for t in saved.tensors)
    sum(y.float().square().sum() for y in ys).backward()
    got = [*(y.detach() for y in ys), x.grad, *(m.lora_B.grad.clone() for m in group.members)]
    for member in group.members:
        member.lora_B.grad = None
    assert_same(got, losses(group, x))


@implementations
@pytest.mark.parametrize("share_A", [False, True])
def test_operators(device, impl, share_A):
    group = draw_group(6, K, [(16, 4), (8, None)], torch.float32, device, share_A=share_A)
    group, bases = on_bases(group, MIXED)
    parts = [t for b in bases for t in b.tensors], ["nf4", "int8"], [16, K, 8, K], torch.float32
    factors = [m.lora_A for m in group.members], [m.lora_B for m in group.members]
    biases = [m.bias for m in group.members]
    how = [0.5, 0.5], [0.0, 0.0], None, share_A
    ours = torch.ops.lorafa_kernels
    test = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(
        ours.quantised_group_forward.default, (group.x, *parts, *factors, biases, *how, impl), **test
    )
    dys = [group.dys[0], group.dys[1]]
    z = torch.randn(6, 4, device=device)
    torch.library.opcheck(
        ours.quantised_group_backward.default, (dys, z, *parts, *factors, *how, [True, False], impl), **test
    )


def test_flops_are_those_of_the_dense_group():
    counting = pytest.importorskip("torch.utils.flop_counter")
    group, bases = on_bases(draw_group(M, K, [(64, 8), (40, None)], torch.float32, "cpu"), MIXED)
    counts = []
    on_its_bases = lambda needs: run(group, bases, "auto", needs)  # noqa: E731
    dense = lambda needs: dense_results(group, "auto", needs)  # noqa: E731
    for compute in (on_its_bases, dense):
        with counting.FlopCounterMode(display=False) as counter:
            for needs in ("all", "dx", "dB"):
                compute(needs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_wrong_calls_say_what_would_be_right():
    group, bases = on_bases(draw_group(M, K, QKV, torch.float32, "cpu"), MIXED)
    members = [m._replace(weight=b) for m, b in zip(group.members, bases, strict=True)]
    first, second, _ = members

    def refused(error, text, given, **options):
        with pytest.raises(error, match=text):
            quantised_linear_group(group.x, given, **options)

    refused(ValueError, "members is empty", [])
    refused(TypeError, "list of LinearOperands", iter(members))
    refused(TypeError, "member 1: weight is a Tensor, expected a QuantisedBase", [first, group.members[1]])
    refused(TypeError, "member 0: expected LinearOperands", [bases[0]])
    refused(TypeError, "share_A must be a bool", members, share_A=1)
    refused(ValueError, "member 1: share_A=True needs the same lora_A", members, share_A=True)
    refused(ValueError, "member 1: lora_A is None", [first, second._replace(lora_A=None)])
    other = quantised(torch.randn(8, 128), "nf4")
    refused(ValueError, "member 1: weight has 128 columns", [first, LinearOperands(other)])
    other = quantised(torch.randn(8, K, dtype=torch.float64), "nf4")
    refused(ValueError, "member 1: weight has dtype torch.float64", [first, LinearOperands(other)])
    wrong = replace(bases[0], tensors=(bases[0].tensors[0], bases[0].tensors[1][:1]))
    refused(ValueError, r"member 0: absmax has shape", [first._replace(weight=wrong)])
    thawed = first._replace(lora_A=first.lora_A.clone().requires_grad_())
    refused(ValueError, "lora_A requires grad", [thawed])
    with pytest.raises(TypeError, match=r"member 0: weight has dtype torch.float32, x torch.bfloat16"):
        quantised_linear_group(group.x.bfloat16(), members)
    x = group.x.requires_grad_()
    ys = quantised_linear_group(x, members)
    with pytest.raises(RuntimeError, match="double backward"):
        (dx,) = torch.autograd.grad(ys[0].sum(), x, create_graph=True)
        dx.sum().backward()


def test_dx_alone_of_one_output():
    group, bases = on_bases(draw_group(M, K, QKV, torch.float32, "cpu"), MIXED)
    arguments = [m.lora_A for m in group.members], [m.lora_B for m in group.members]
    how = [1.0] * 3, [0.0] * 3, None, False
    dys = [None, group.dys[1], None]
    dx, dBs = group_ops.backward(dys, None, bases, *arguments, *how, True, 3 * [False], "auto")
    assert dx.shape == (M, K) and dBs == [None] * 3
