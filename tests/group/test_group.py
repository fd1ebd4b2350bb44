"""Linear layers that share an input, as one node: the numbers of separate layers within the error budget,
what is kept, what is launched, and the contract of a layer for the group as well.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import SMALL_OUTPUT, Budget, assert_same, check_budget, whole
from conftest import TRITON_DEVICE, implementation_cases, on_device
from kernel_plans import grid, slow_reference
from saved import Saved
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFALinear, LoRAFALinearGroup, lorafa_linear
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.nn.group import operands_of
from lorafa_kernels.philox import keep_mask
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelConfig
from lorafa_kernels.plan.defaults import shrink_group_config

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
triton_only = pytest.mark.parametrize("device", [on_device(TRITON_DEVICE)])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


@dataclass
class Group:
    """A group and the gradients of its outputs; None for one that is not used."""

    x: Tensor
    members: list[LinearOperands]
    dys: list[Tensor | None]
    share_A: bool = False


def draw_group(
    M: int,
    K: int,
    shapes: list[tuple[int, int | None]],
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = True,
    factor_dtype: torch.dtype | None = None,
    scalings: tuple[float, ...] = (0.7, 1.5, 0.4),
    dropout_ps: tuple[float, ...] = (0.0, 0.0, 0.0),
    share_A: bool = False,
    seed: int = 0,
) -> Group:
    """Draw a group of layers with these (N, R), R None for one without an adapter; with share_A all have the
    first scaling and dropout.
    """
    layers = [
        draw_operands(
            M, K, N, R or 1, dtype, device, bias=bias, factor_dtype=factor_dtype, seed=1000 * seed + i
        )
        for i, (N, R) in enumerate(shapes)
    ]
    members = [
        LinearOperands(
            layer.weight,
            layer.bias,
            *((layers[0 if share_A else i].lora_A, layer.lora_B) if shapes[i][1] else (None, None)),
            scaling=scalings[0 if share_A else i],
            dropout_p=dropout_ps[0 if share_A else i],
        )
        for i, layer in enumerate(layers)
    ]
    return Group(layers[0].x, members, [layer.dy for layer in layers], share_A)


def outputs_of(group: Group, impl: str, needs: str = "all") -> tuple[Tensor, list[Tensor | None], tuple]:
    """Run the group on leaves; needs: "all", or "dx" or "dB" for one of the two alone."""
    x = group.x.detach().requires_grad_(needs != "dB")
    lora_Bs = [
        None if member.lora_B is None else member.lora_B.detach().requires_grad_(needs != "dx")
        for member in group.members
    ]
    members = [member._replace(lora_B=B) for member, B in zip(group.members, lora_Bs, strict=True)]
    return x, lora_Bs, lorafa_linear_group(x, members, share_A=group.share_A, impl=impl)


def gradients(group: Group, x: Tensor, lora_Bs: list[Tensor | None], ys: tuple, **options) -> dict:
    """dx and the dB of the group, by their names, of outputs that are used."""
    used = [i for i, dy in enumerate(group.dys) if dy is not None]
    leaves = {"dx": x} | {f"dB{i}": B for i, B in enumerate(lora_Bs) if B is not None}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(
        [ys[i] for i in used],
        list(leaves.values()),
        [group.dys[i] for i in used],
        allow_unused=True,
        **options,
    )
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def results(group: Group, impl: str, needs: str = "all") -> dict[str, Tensor]:
    x, lora_Bs, ys = outputs_of(group, impl, needs)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | gradients(group, x, lora_Bs, ys)
    assert all(found[f"y{i}"].dtype == group.x.dtype for i in range(len(ys)))
    for name, tensor in found.items():
        if name.startswith("dB"):
            assert tensor.dtype == group.members[int(name[2:])].lora_B.dtype
    return found


def plain(group: Group, dtype: torch.dtype | None = None, masks: list[Tensor | None] | None = None) -> dict:
    """The same by the formula that people write for separate layers, with autograd, in `dtype`. masks: what
    is kept of x for each member.
    """
    own = group.x.dtype
    to = dtype or own
    x = group.x.to(to).detach().requires_grad_()
    lora_Bs, ys = [], []
    for i, member in enumerate(group.members):
        y = F.linear(x, member.weight.to(to), None if member.bias is None else member.bias.to(to))
        lora_B = None
        if member.lora_B is not None:
            lora_B = member.lora_B.to(own).to(to).detach().requires_grad_()
            p = member.dropout_p
            dropped = x if masks is None else x * (masks[i].to(to) / (1 - p))
            y = y + member.scaling * F.linear(F.linear(dropped, member.lora_A.to(own).to(to)), lora_B)
        lora_Bs.append(lora_B)
        ys.append(y)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | gradients(
        Group(x, group.members, [None if dy is None else dy.to(to) for dy in group.dys]), x, lora_Bs, ys
    )


def check_accuracy(impl: str, M: int, K: int, shapes: list, change=lambda group: group, **options) -> None:
    """Assert that a group stays within the budget, pooled over seeds where an output is small."""
    smallest = min(min(M * N, M * K, N * (R or N)) for N, R in shapes)
    budget = Budget()
    for seed in range(16 if smallest < SMALL_OUTPUT else 1):
        group = change(draw_group(M, K, shapes, seed=seed, **options))
        got, exact = results(group, impl), plain(group, torch.float64)
        assert got.keys() == exact.keys()
        budget.compare(got, exact, plain(group))
    budget.check()


def check_part(impl: str, group: Group, part: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Assert that results which are asked for alone are those of the whole backward: the same bits, or where
    other kernels make them (one may read dy once for dz and dB) values within the budget.
    """
    exact, plainly = plain(group, torch.float64), plain(group)
    check_budget(part, *({name: found[name] for name in part} for found in (exact, plainly)))
    if impl != "triton":
        assert_same(part, {name: whole[name] for name in part})


# N·R of each at least 256, so that its dB need not be pooled.
QKV = [(64, 8), (32, 8), (32, 8)]
SHAPES = {
    "qkv-gqa": (34, 40, QKV),
    "gate-up": (70, 31, [(37, 7), (37, 7)]),
    "ranks": (33, 40, [(96, 3), (40, 17), (16, 16)]),
    "plain-member": (20, 40, [(64, 4), (40, None), (24, 12)]),
    "all-plain": (20, 24, [(24, None), (16, None)]),
    "one": (20, 24, [(64, 4)]),
    "rank-above-block": (17, 24, [(32, 140), (32, 9)]),
    "one-row": (1, 24, [(40, 2), (24, 1)]),
}
shapes_of_groups = [pytest.param(*shape, id=name) for name, shape in SHAPES.items()]


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", DTYPES),
    ("M,K,shapes", shapes_of_groups),
    each_once=True,
)
def test_accuracy(device, impl, dtype, M, K, shapes):
    check_accuracy(impl, M, K, shapes, dtype=dtype, device=device)


@grid(
    ("device,impl", implementation_cases()),
    ("dtype", DTYPES),
    (
        "shapes",
        [pytest.param(QKV, id="qkv"), pytest.param([(64, 5), (40, None), (56, 5)], id="plain-member")],
    ),
    each_once=True,
)
def test_accuracy_with_one_A(device, impl, dtype, shapes):
    check_accuracy(impl, 34, 40, shapes, dtype=dtype, device=device, share_A=True)


@implementations
@pytest.mark.parametrize("share_A", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_accuracy_with_fp32_factors_and_no_bias(device, impl, dtype, share_A):
    options = dict(dtype=dtype, device=device, factor_dtype=torch.float32, bias=False, share_A=share_A)
    check_accuracy(impl, 34, 40, QKV, **options)


@implementations
def test_accuracy_with_equal_scalings(device, impl):
    """The library makes all z in one product then."""
    check_accuracy(impl, 34, 40, QKV, dtype=torch.bfloat16, device=device, scalings=(0.7, 0.7, 0.7))


@implementations
@pytest.mark.parametrize("unused", [(0,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("share_A", [False, True])
def test_unused_outputs(device, impl, unused, share_A):
    """They get no gradient and add none to dx."""

    def forget(group):
        return replace(group, dys=[None if i in unused else dy for i, dy in enumerate(group.dys)])

    options = dict(dtype=torch.float32, device=device, share_A=share_A)
    check_accuracy(impl, 20, 40, [(64, 4), (72, 4), (64, 4)], change=forget, **options)
    if not share_A:
        check_accuracy(impl, 20, 40, [(64, 4), (40, None), (72, 4)], change=forget, **options)


@implementations
@dtypes
def test_strided_operands(device, impl, dtype):
    def strided(group):
        def transposed(tensor):
            return None if tensor is None else tensor.t().contiguous().t()

        def stepped(tensor):
            wide = torch.full((tensor.shape[0], 2 * tensor.shape[1] + 3), float("nan"), device=device).to(
                dtype
            )
            wide[:, 3::2] = tensor
            return wide[:, 3::2]

        members = [
            member._replace(
                weight=transposed(member.weight),
                lora_A=transposed(member.lora_A),
                lora_B=transposed(member.lora_B),
            )
            for member in group.members
        ]
        dys = [change(dy) for change, dy in zip((transposed, stepped, stepped), group.dys, strict=True)]
        return replace(group, x=stepped(group.x), members=members, dys=dys)

    check_accuracy(impl, 34, 40, QKV, change=strided, dtype=dtype, device=device)


@implementations
def test_expanded_gradients(device, impl):
    """sum().backward() sends dys of stride 0."""
    shapes = [(64, 4), (72, 4)]
    group = draw_group(20, 24, shapes, torch.float32, device)
    group.dys = [dy[:1, :1].expand_as(dy) for dy in group.dys]
    check_accuracy(impl, 20, 24, shapes, lambda _: group, dtype=torch.float32, device=device)


@implementations
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (24,), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("share_A", [False, True])
def test_shapes_of_x(device, impl, shape, share_A):
    group = draw_group(1, 24, [(24, 4), (16, 4)], torch.float32, device, share_A=share_A)
    group.x = torch.randn(shape, device=device)
    x, lora_Bs, ys = outputs_of(group, impl)
    assert [y.shape for y in ys] == [(*shape[:-1], 24), (*shape[:-1], 16)]
    sum(y.square().sum() for y in ys).backward()
    assert x.grad.shape == shape and all(B.grad.shape == B.shape for B in lora_Bs)
    flat = replace(group, x=group.x.reshape(-1, 24))
    flat_x, flat_Bs, flat_ys = outputs_of(flat, impl)
    sum(y.square().sum() for y in flat_ys).backward()
    assert_same(x.grad.reshape(-1, 24), flat_x.grad)
    for B, flat_B in zip(lora_Bs, flat_Bs, strict=True):
        assert_same(B.grad, flat_B.grad)
        assert x.numel() or not B.grad.count_nonzero()


@implementations
def test_single_gradients_equal_those_of_the_full_backward(device, impl):
    """Of the library and the reference the same bits, of the kernels values within the budget."""
    for share_A in (False, True):
        group = draw_group(34, 40, QKV, torch.float32, device, share_A=share_A)
        both = results(group, impl)
        for needs in ("dx", "dB"):
            alone = results(group, impl, needs)
            assert alone.keys() == {name for name in both if name[:2] not in {"dx", "dB"} - {needs}}
            check_part(impl, group, alone, both)


@implementations
@pytest.mark.parametrize("need_dx", [True, False])
def test_one_frozen_lora_B(device, impl, need_dx):
    """The others find their columns of z."""
    group = draw_group(34, 40, [(64, 8), (96, 3), (32, 8)], torch.float32, device)
    want = results(group, impl)
    x = group.x.detach().requires_grad_(need_dx)
    lora_Bs = [member.lora_B.detach().requires_grad_(i != 0) for i, member in enumerate(group.members)]
    members = [member._replace(lora_B=B) for member, B in zip(group.members, lora_Bs, strict=True)]
    ys = lorafa_linear_group(x, members, impl=impl)
    got = gradients(group, x, lora_Bs, ys)
    assert got.keys() == ({"dx"} if need_dx else set()) | {"dB1", "dB2"}
    check_part(impl, group, got, want)


@implementations
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_propagate(device, impl, bad):
    group = draw_group(20, 24, [(24, 4), (16, 4)], torch.float32, device)
    group.x[4, 3] = bad
    group.dys[1][9, 5] = bad
    got, want = results(group, impl), results(group, "reference")
    for name, tensor in want.items():
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(tensor)), name
    assert not torch.isfinite(got["y0"][4]).any() and torch.isfinite(got["y0"][5]).all()


@implementations
@dtypes
def test_same_bits_from_run_to_run(device, impl, dtype):
    # The interpreter takes one program after the other.
    M, K, N = (70, 40, 72) if device == "cpu" and impl == "triton" else (150, 72, 130)
    group = draw_group(M, K, [(N, 8), (40, 12)], dtype, device)
    first, second = results(group, impl), results(group, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@implementations
@pytest.mark.parametrize("share_A", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_inputs_are_not_written_nor_new_memory_read(device, impl, share_A, p):
    """Fresh memory holds NaN here, and inputs lie within it; no byte of them or around them changes."""

    def bedded(tensor):
        if tensor is None:
            return None
        bed = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype, device=device)
        inside = bed[64:-64].view(tensor.shape)
        inside.copy_(tensor)
        beds.append((bed, bed.clone(), bed._version))
        return inside

    beds: list[tuple[Tensor, Tensor, int]] = []
    group = draw_group(34, 40, QKV, torch.bfloat16, device, share_A=share_A, dropout_ps=(p, p, p))
    shared = bedded(group.members[0].lora_A)
    group.members = [
        LinearOperands(
            bedded(m.weight),
            bedded(m.bias),
            shared if share_A else bedded(m.lora_A),
            bedded(m.lora_B),
            *m[4:],
        )
        for m in group.members
    ]
    group.x, group.dys = bedded(group.x), [bedded(dy) for dy in group.dys]
    with fresh_memory_of_nan():
        found = results(group, impl)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    for bed, before, version in beds:
        assert torch.equal(bed.view(torch.int16), before.view(torch.int16)) and bed._version == version


class fresh_memory_of_nan:
    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.utils.deterministic.fill_uninitialized_memory

    def __exit__(self, *exc):
        torch.use_deterministic_algorithms(False)


@implementations
def test_retain_graph_twice(device, impl):
    group = draw_group(12, 16, [(24, 4), (16, 4)], torch.float32, device)
    leaves = outputs_of(group, impl)
    first = gradients(group, *leaves, retain_graph=True)
    second = gradients(group, *leaves)
    assert all(torch.equal(first[name], second[name]) for name in first)


@implementations
def test_double_backward_is_refused(device, impl):
    group = draw_group(12, 16, [(24, 4), (16, 4)], torch.float32, device)
    x, lora_Bs, ys = outputs_of(group, impl)
    found = gradients(group, x, lora_Bs, ys, create_graph=True)
    for grad in found.values():
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward(retain_graph=True)


@implementations
@pytest.mark.parametrize("shape", [(12, 16), (3, 4, 16)], ids=["2d", "3d"])
def test_outputs_may_be_changed_in_place(device, impl, shape):
    """They are tensors of their own, and nothing that backward needs."""
    group = draw_group(12, 16, [(24, 4), (16, 4)], torch.float32, device)
    group.x = group.x.view(shape)
    x, lora_Bs, ys = outputs_of(group, impl)
    assert len({y.untyped_storage().data_ptr() for y in ys}) == 2
    assert all(y.untyped_storage().nbytes() == y.numel() * y.element_size() for y in ys)
    (ys[0].square().sum() + (ys[1] * 3).sum()).backward()
    wanted = [x.grad, *(B.grad for B in lora_Bs)]

    x, lora_Bs, ys = outputs_of(group, impl)
    untouched = ys[0].detach().clone()
    ys[1].mul_(3)
    assert torch.equal(ys[0], untouched)
    (ys[0].square().sum() + ys[1].sum()).backward()
    assert_same([x.grad, *(B.grad for B in lora_Bs)], wanted)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("share_A", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(impl, share_A, p):
    shapes = [(6, 3), (5, 3)] if share_A else [(6, 3), (4, None), (5, 2)]
    options = dict(share_A=share_A, dropout_ps=(p, p, p))
    group = draw_group(5, 4, shapes, torch.float64, "cpu", **options)
    adapted = [i for i, (_, R) in enumerate(shapes) if R]

    def function(x, *lora_Bs):
        torch.manual_seed(3)
        members = list(group.members)
        for i, lora_B in zip(adapted, lora_Bs, strict=True):
            members[i] = members[i]._replace(lora_B=lora_B)
        return lorafa_linear_group(x, members, share_A=share_A, impl=impl)

    lora_Bs = [group.members[i].lora_B.requires_grad_() for i in adapted]
    assert torch.autograd.gradcheck(function, (group.x.requires_grad_(), *lora_Bs))


# Dropout.


def masks_of(saved: Saved, group: Group) -> list[Tensor | None]:
    """What the group kept of x for each member, from the seeds that it saved."""
    (seeds,) = (t for t in saved.tensors if t.dtype == torch.int64)
    assert seeds.shape == ((1,) if group.share_A else (len(group.members),))
    return [
        keep_mask(seeds if group.share_A else seeds[i : i + 1], member.dropout_p, *group.x.shape)
        for i, member in enumerate(group.members)
    ]


DROPOUTS = [
    pytest.param(False, (0.3, 0.5, 0.1), QKV, id="own"),
    pytest.param(False, (0.3, 0.0, 0.4), [(64, 4), (40, 12), (16, None)], id="some"),
    pytest.param(True, (0.3,) * 3, QKV, id="one-A"),
]


@grid(("device,impl", implementation_cases()), ("dtype", DTYPES), ("share_A,ps,shapes", DROPOUTS))
def test_dropout(device, impl, dtype, share_A, ps, shapes):
    """Each member has its own mask, or with share_A all have one; dx carries it."""
    budget = Budget()
    group = draw_group(34, 40, shapes, dtype, device, share_A=share_A, dropout_ps=ps)
    with Saved() as saved:
        x, lora_Bs, ys = outputs_of(group, impl)
    got = {f"y{i}": y.detach() for i, y in enumerate(ys)} | gradients(group, x, lora_Bs, ys)
    masks = masks_of(saved, group)
    budget.compare(got, plain(group, torch.float64, masks), plain(group, None, masks))
    budget.check()
    dropped = [mask for mask, p in zip(masks, ps, strict=True) if p]
    assert torch.equal(dropped[0], dropped[1]) == share_A


@implementations
def test_dropout_is_drawn_from_the_generator(device, impl):
    group = draw_group(34, 40, QKV, torch.float32, device, dropout_ps=(0.5, 0.5, 0.5))

    def run(seed):
        torch.manual_seed(seed)
        return results(group, impl)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@implementations
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_under_checkpointing(device, impl, reentrant):
    group = draw_group(34, 40, QKV, torch.float32, device, dropout_ps=(0.5, 0.5, 0.5))
    found = []
    for recompute in (False, True):
        x = group.x.detach().requires_grad_()
        lora_B = group.members[0].lora_B.detach().requires_grad_()
        members = [group.members[0]._replace(lora_B=lora_B), *group.members[1:]]

        def run(x, members=members):
            return torch.cat(lorafa_linear_group(x, members, impl=impl), dim=1)

        torch.manual_seed(5)
        y = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        found.append(
            torch.autograd.grad(y.square().sum(), (x, lora_B)) if not reentrant else _grads(y, x, lora_B)
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _grads(y: Tensor, *leaves: Tensor) -> list[Tensor]:
    y.square().sum().backward()
    return [leaf.grad for leaf in leaves]


# What is kept.


def make_module(
    device, impl, share_A=False, p=0.0, adapt=None, dtype=torch.float32, r=4
) -> LoRAFALinearGroup:
    torch.manual_seed(0)
    linears = {
        name: nn.Linear(24, N, bias=name == "q_proj", device=device, dtype=dtype)
        for name, N in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))
    }
    options = dict(r=r, lora_dropout=p, init_lora_weights=False, share_A=share_A, adapt=adapt)
    module = LoRAFALinearGroup.from_linears(linears, **options)
    module.impl = impl
    return module


def names_of(saved: Saved, module: nn.Module) -> dict[str, int]:
    """What was saved, by name, and the bytes of what is no parameter."""
    names = {id(parameter): name for name, parameter in module.named_parameters(remove_duplicate=False)}
    found = {}
    for tensor in saved.tensors:
        if id(tensor) in names:
            assert names[id(tensor)] not in found, "once"
            found[names[id(tensor)]] = 0
        else:
            kind = {torch.int64: "seeds"}.get(tensor.dtype, "z")
            assert kind not in found
            found[kind] = tensor.untyped_storage().nbytes()
    return found


ALL = [f"{name}_proj.{what}" for name in "qkv" for what in ("weight", "lora_A", "lora_B")]


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["2d", "3d"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_one_z_and_the_parameters(device, impl, dtype, shape, p):
    module = make_module(device, impl, dtype=dtype, p=p)
    x = torch.randn(*shape, 24, device=device, dtype=dtype, requires_grad=True)
    with Saved() as saved:
        ys = module(x)
    seeds = {"seeds": 3 * 8} if p else {}
    assert names_of(saved, module) == dict.fromkeys(ALL, 0) | {"z": 12 * 12 * dtype.itemsize} | seeds
    sum(y.sum() for y in ys).backward()
    assert x.grad is not None and module.k_proj.lora_B.grad.dtype == torch.float32


@implementations
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keeps_one_z_of_one_A(device, impl, p):
    module = make_module(device, impl, share_A=True, p=p)
    with Saved() as saved:
        ys = module(torch.randn(12, 24, device=device, requires_grad=True))
    found = names_of(saved, module)
    shared = {name for name in found if name.endswith("lora_A")}
    assert len(shared) == 1
    wanted = {name: 0 for name in ALL if not name.endswith("lora_A")} | {"z": 12 * 4 * 4}
    assert {name: size for name, size in found.items() if name not in shared} == wanted | (
        {"seeds": 8} if p else {}
    )
    sum(y.sum() for y in ys).backward()


@implementations
def test_keeps_nothing_that_is_not_needed(device, impl):
    x = torch.randn(12, 24, device=device)
    lora_Bs = [name for name in ALL if name.endswith("lora_B")]
    z = {"z": 12 * 12 * 4}

    module = make_module(device, impl, p=0.3)
    with Saved() as saved:
        module(x)
    assert names_of(saved, module) == dict.fromkeys(lora_Bs, 0) | z, "a first layer"

    module = make_module(device, impl, adapt=["k_proj"])
    with Saved() as saved:
        module(x.requires_grad_())
    weights = [name for name in ALL if name.endswith("weight")]
    assert names_of(saved, module) == dict.fromkeys([*weights, "k_proj.lora_A", "k_proj.lora_B"], 0) | {
        "z": 12 * 4 * 4
    }, "one adapter"

    module = make_module(device, impl)
    for member in module.members:
        member.lora_B.requires_grad_(False)
    with Saved() as saved:
        module(x)
    assert names_of(saved, module) == dict.fromkeys(ALL, 0), "frozen lora_B"

    with Saved() as saved:
        with torch.no_grad():
            module(x)
        with torch.inference_mode():
            module(x)
        assert all(y.grad_fn is None for y in module(x.detach()))
    assert saved.tensors == []


@implementations
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_keeps_no_cast(device, impl, backward_inside):
    module = make_module(device, impl, p=0.0)
    x = torch.randn(12, 24, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        with Saved() as saved:
            ys = module(x)
        assert all(y.dtype == torch.bfloat16 for y in ys)
        loss = sum(y.float().square().sum() for y in ys)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert names_of(saved, module) == dict.fromkeys(ALL, 0) | {"z": 12 * 12 * 2}
    assert x.grad.dtype == torch.float32 and module.q_proj.lora_B.grad.dtype == torch.float32
    by_hand = [
        LinearOperands(
            m.weight.bfloat16(),
            None if m.bias is None else m.bias.bfloat16(),
            m.lora_A,
            m.lora_B.detach(),
            m.scaling,
        )
        for m in module.members
    ]
    for got, want in zip(ys, lorafa_linear_group(x.detach().bfloat16(), by_hand, impl=impl), strict=True):
        assert torch.equal(got, want)


# What is launched.


def launches_of(monkeypatch, run) -> list[str]:
    """Names of the Triton kernels that `run` launches."""
    found: list[str] = []
    kinds = {
        type(value)
        for name in ("shrink", "expand", "expand_tma", "grad", "recompute", "group", "group_tma")
        for key, value in vars(importlib.import_module(f"lorafa_kernels.kernels.{name}")).items()
        if key.endswith("_kernel")
    }
    with monkeypatch.context() as patch:
        for kind in kinds:
            launch = kind.run

            def counted(self, *args, launch=launch, **kwargs):
                found.append(getattr(self, "fn", self).__name__.strip("_"))
                return launch(self, *args, **kwargs)

            patch.setattr(kind, "run", counted)
        run()
    return found


@triton_only
def test_fewer_launches(monkeypatch, device):
    pytest.importorskip("triton")
    group = draw_group(260, 64, QKV, torch.float32, device)
    backward = lambda leaves: gradients(group, *leaves)  # noqa: E731
    separate = launches_of(monkeypatch, lambda: _separate(group, "triton"))
    whole = launches_of(monkeypatch, lambda: results(group, "triton"))
    assert len(whole) < len(separate)
    assert whole.count("shrink_group_kernel") == 1 and separate.count("shrink_kernel") == 3
    totals = [name for name in whole if name.startswith("total")]
    assert len(totals) == 1, "one launch writes dx"
    leaves = outputs_of(group, "triton")
    assert launches_of(monkeypatch, lambda: backward(leaves)).count(totals[0]) == 1


def _separate(group: Group, impl: str) -> None:
    x = group.x.detach().requires_grad_()
    lora_Bs = [member.lora_B.detach().requires_grad_() for member in group.members]
    ys = [
        lorafa_linear(x, m.weight, m.lora_A, B, m.bias, scaling=m.scaling, impl=impl)
        for m, B in zip(group.members, lora_Bs, strict=True)
    ]
    gradients(group, x, lora_Bs, ys)


class Calls(TorchDispatchMode):
    """Names of the PyTorch operators that compute something."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("detach", "t", "view", "alias", "slice", "empty", "new_empty", "expand", "transpose"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [on_device("cpu"), on_device("cuda")])
@pytest.mark.parametrize("share_A", [False, True])
def test_fewer_library_calls(device, share_A, monkeypatch):
    # As where nothing watches.
    monkeypatch.setattr("lorafa_kernels.dispatch.watching_modes", lambda: 0)
    group = draw_group(64, 32, QKV, torch.float32, device, share_A=share_A, scalings=(0.5, 0.5, 0.5))
    with Calls() as separate:
        _separate(group, "torch")
    with Calls() as whole:
        results(group, "torch")
    products = ("mm", "addmm", "addmm_")
    counts = [sum(name in products for name in calls.names) for calls in (separate, whole)]
    # Of three members: z, y twice each, dz, dB, dx twice each; and one z, one rank-R product of dx.
    assert counts == [21, 17]
    assert "add" in separate.names and "add" not in whole.names, "no sum of several dx"
    assert len(whole.names) < len(separate.names)


# The kernels by themselves.


@grid(
    ("device,impl", [on_device(TRITON_DEVICE, "triton", id="triton")]),
    ("dtype", DTYPES[1:]),
    ("p", [0.0, 0.4]),
    ("R", [pytest.param(8, id="addressable"), pytest.param(5, id="by-pointers")]),
    ("subtile", [1, 2, 4]),
)
def test_hopper_kernel_of_dx(device, impl, dtype, p, R, subtile):
    """Several tiles a program, rank blocks, ragged ends in every direction."""
    kernels = pytest.importorskip("lorafa_kernels.kernels.group")
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the TMA kernel is for sm_90")
    group = draw_group(150, 72, [(104, R), (40, R), (24, R)], dtype, device)
    dzs = [torch.randn(150, R, device=device).to(dtype) for _ in range(2)]
    factors = [member.lora_A for member in group.members[:2]]
    seeds = torch.tensor([5, 6], device=device)
    dropout = kernels.Dropout(seeds, (0, 1), (p, p / 2)) if p else None
    config = KernelConfig(64, 64, 64, 32, 2, 4, 2, "tma", EPILOGUE_SUBTILE=subtile)
    operands = group.dys, [member.weight for member in group.members], dzs, factors

    def formula(to):
        found = sum(dy.to(to) @ weight.to(to) for dy, weight in zip(*operands[:2], strict=True))
        for j, (dz, factor) in enumerate(zip(*operands[2:], strict=True)):
            term = dz.to(to) @ factor.to(to)
            if dropout:
                term = term * keep_mask(seeds[j : j + 1], dropout.ps[j], 150, 72) / (1 - dropout.ps[j])
            found = found + term
        return found

    portable = replace(config, variant="portable")
    got = {
        "dx": kernels.expand_total(*operands, dropout=dropout, config=config, unaligned=portable),
        "portable": kernels.expand_total(*operands, dropout=dropout, config=portable),
    }
    budget = Budget()
    exact, plainly = formula(torch.float64), formula(dtype)
    budget.compare(got, dict.fromkeys(got, exact), dict.fromkeys(got, plainly))
    budget.check()


@triton_only
@pytest.mark.parametrize("split", [True, False], ids=["split", "own"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_kernel_of_all_z(device, split, p):
    """Split contractions, several passes over x, and a rank above the block."""
    kernels = pytest.importorskip("lorafa_kernels.kernels.group")
    ranks = (8, 20, 3)
    group = draw_group(70, 100, [(16, R) for R in ranks], torch.float32, device)
    seeds = torch.tensor([5, 6, 7], device=device)
    dropout = kernels.Dropout(seeds, (0, 1, 2), (p, 0.0, p)) if p else None
    factors = [member.lora_A.t() for member in group.members]
    config, members = shrink_group_config(planned_device(group.x.device).limits, 4, 70, max(ranks), 3, p > 0)
    if split:
        config, members = KernelConfig(32, 0, 16, 16, 1, 4, 2, SPLIT_K=3), 1
    of_kernel = {"config": config, "members": members, "dropout": dropout}
    got = kernels.shrink_group(group.x, factors, [0.5, 2.0, 1.0], **of_kernel)

    def formula(to):
        parts = []
        for i, (factor, s) in enumerate(zip(factors, (0.5, 2.0, 1.0), strict=True)):
            kept = group.x * keep_mask(seeds[i : i + 1], dropout.ps[i], 70, 100) if dropout else group.x
            parts.append(s * (kept.to(to) @ factor.to(to)))
        return torch.cat(parts, dim=1)

    budget = Budget()
    budget.compare({"z": got}, {"z": formula(torch.float64)}, {"z": formula(torch.float32)})
    budget.check()


@pytest.mark.parametrize("arch", KNOWN_DEVICES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_configuration_of_all_z(arch, itemsize):
    """All members of a pass fit one block, and every member is in a pass, whatever its rank."""
    for R in (1, 16, 17, 64, 128, 300):
        for members in (1, 2, 3, 4, 9):
            config, of_pass = shrink_group_config(KNOWN_DEVICES[arch], itemsize, 8192, R, members)
            assert 1 <= of_pass <= members
            assert config.BLOCK_R >= 16 and config.BLOCK_R * of_pass <= 192
            assert of_pass == 1 or R <= config.BLOCK_R
    # Three members of rank 16 are one pass everywhere.
    assert shrink_group_config(KNOWN_DEVICES[arch], 2, 8192, 16, 3)[1] == 3


# Operators and compilers.


def operator_arguments(name: str, device: str, impl: str, dtype, share_A=False, p=0.0) -> tuple:
    shapes = [(14, 3), (10, 3)] if share_A else [(14, 3), (12, None), (10, 2)]
    group = draw_group(
        10, 12, shapes, dtype, device, share_A=share_A, factor_dtype=torch.float32, dropout_ps=(p, p, p)
    )
    weights, biases, lora_As, lora_Bs, scalings, ps, _ = map(list, zip(*group.members, strict=True))
    seeds = torch.arange(1 if share_A else len(shapes), device=device) if p else None
    if name == "group_forward":
        return (group.x, weights, lora_As, lora_Bs, biases, scalings, ps, seeds, share_A, impl)
    z = torch.randn(10, 3 if share_A else 5, device=device).to(dtype)
    group.dys[1] = None if not share_A else group.dys[1]
    needs = [lora_B is not None for lora_B in lora_Bs]
    rest = (scalings, ps, seeds, share_A, True, needs, impl)
    return (group.dys, z, weights, lora_As, lora_Bs, *rest)


@implementations
@pytest.mark.parametrize("name", ["group_forward", "group_backward"])
@pytest.mark.parametrize(
    ("share_A", "p"),
    [
        pytest.param(share_A, p, marks=[] if share_A == bool(p) else pytest.mark.slow)
        for share_A in (False, True)
        for p in (0.0, 0.3)
    ],
)
def test_opcheck(device, impl, name, share_A, p):
    operator = getattr(torch.ops.lorafa_kernels, name).default
    assert torch.Tag.pt2_compliant_tag in operator.tags and not operator._schema.is_mutable
    arguments = operator_arguments(name, device, impl, torch.bfloat16, share_A, p)
    torch.library.opcheck(operator, arguments)
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    for got, shape in zip(real, fake, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (shape.shape, shape.stride(), shape.dtype)


@pytest.mark.parametrize(("device", "impl"), slow_reference())
@pytest.mark.parametrize("share_A", [False, True])
def test_compile_fullgraph_with_dynamic_rows(device, impl, share_A):
    torch._dynamo.reset()
    module = make_module(device, impl, share_A=share_A, adapt=None if share_A else ["q_proj", "v_proj"])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    frames = torch._dynamo.utils.counters["stats"]
    leaves = [member.lora_B for member in module.members if isinstance(member, LoRAFALinear)]
    for rows in (5, 9, 30):
        x = torch.randn(rows, 24, device=device)
        found = []
        for run in (module, compiled):
            leaf = x.clone().requires_grad_()
            ys = run(leaf)
            loss = ys[0].square().sum() + ys[2].sum()
            found.append((*ys, *torch.autograd.grad(loss, (leaf, *leaves), allow_unused=True)))
        eager, got = found
        # A compiled backward makes the gradient zero where the output is not used: that of k_proj.
        unused = [index for index, want in enumerate(eager) if want is None]
        assert len(unused) == (1 if share_A else 0)
        assert_same(got, [torch.zeros_like(g) if w is None else w for g, w in zip(got, eager, strict=True)])
        if rows == 5:
            unique = frames["unique_graphs"]
    assert frames["unique_graphs"] == unique, "one graph serves every number of rows"


@pytest.mark.parametrize("training", [True, False])
def test_compile_with_inductor(training):
    torch._dynamo.reset()
    module = make_module("cpu", "auto", r=16).train(training)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 6, 24)
    check_module(module, compiled, x)


def test_compile_with_dropout():
    torch._dynamo.reset()
    module = make_module("cpu", "torch", p=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 24)
    first, second = compiled(x), compiled(x)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    module.eval()
    assert_same(compiled(x), module(x))


def test_export_and_meta_device():
    module = make_module("cpu", "torch").eval()
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(module, (torch.randn(8, 24),), dynamic_shapes=({0: rows},))
    x = torch.randn(33, 24)
    assert_same(program.module()(x), module(x))
    ys = make_module("meta", "torch")(torch.empty(3, 24, device="meta", requires_grad=True))
    assert [y.shape for y in ys] == [(3, 32), (3, 16), (3, 16)] and ys[0].device.type == "meta"


# The module.


def check_module(module: LoRAFALinearGroup, forward, x: Tensor) -> None:
    """Assert that outputs and gradients by `forward` are within the budget of the formula that people write
    for the layers of `module`, each in the state that it is in.
    """
    dys = [torch.randn(*x.shape[:-1], m.out_features, device=x.device) for m in module.members]

    def results_of(forward, x, lora_Bs):
        x = x.detach().requires_grad_()
        ys = forward(x)
        grads = torch.autograd.grad(ys, (x, *lora_Bs), [dy.to(x.dtype) for dy in dys], allow_unused=True)
        names = ["dx", *(f"dB{i}" for i in range(len(lora_Bs)))]
        return {f"y{i}": y for i, y in enumerate(ys)} | dict(zip(names, grads, strict=True))

    def formula(to):
        lora_Bs = [member.lora_B.detach().to(to).requires_grad_() for member in module.members]

        def forward(x):
            ys = []
            for member, lora_B in zip(module.members, lora_Bs, strict=True):
                y = F.linear(x, member.weight.to(to), None if member.bias is None else member.bias.to(to))
                if member.adapter_enabled and not member.merged:
                    y = y + member.scaling * F.linear(F.linear(x, member.lora_A.to(to)), lora_B)
                ys.append(y)
            return ys

        return results_of(forward, x.to(to), lora_Bs)

    got = results_of(forward, x, [member.lora_B for member in module.members])
    exact, plainly = formula(torch.float64), formula(x.dtype)
    missing = {name for name, tensor in exact.items() if tensor is None}
    assert missing == {name for name, tensor in got.items() if tensor is None}
    check_budget(
        *({n: tensor for n, tensor in of.items() if n not in missing} for of in (got, exact, plainly))
    )


@implementations
@pytest.mark.parametrize("state", ["train", "eval", "disabled", "merged", "one merged", "one disabled"])
def test_module_acts_as_its_layers_do(device, impl, state):
    for share_A in (False, True):
        module = make_module(device, impl, share_A=share_A, r=16).train(state == "train")
        chosen = module.members[:1] if state.startswith("one") else module.members
        before = module.q_proj.weight.detach().clone()
        for member in chosen:
            if "merged" in state:
                member.merge()
            if "disabled" in state:
                member.adapter_enabled = False
        assert torch.equal(module.q_proj.weight, before) == ("merged" not in state)
        check_module(module, module, torch.randn(4, 5, 24, device=device))


def test_names_and_objects_stay():
    linears = {name: nn.Linear(24, 16) for name in ("q_proj", "k_proj")}
    weights = [linear.weight for linear in linears.values()]
    module = LoRAFALinearGroup.from_linears(linears, r=4, adapt=["q_proj"])
    assert [name for name, _ in module.named_children()] == ["q_proj", "k_proj"]
    assert list(module.state_dict()) == [
        "q_proj.weight",
        "q_proj.bias",
        "q_proj.lora_A",
        "q_proj.lora_B",
        "k_proj.weight",
        "k_proj.bias",
    ]
    assert all(member.weight is weight for member, weight in zip(module.members, weights, strict=True))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["q_proj.lora_B"]
    assert module.k_proj is linears["k_proj"]
    assert "q_proj" in repr(module)
    listed = LoRAFALinearGroup([nn.Linear(24, 16), nn.Linear(24, 8)])
    assert list(listed.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_share_A_among_themselves(duplicate):
    module = make_module("cpu", "torch", share_A=True)
    other = duplicate(module)
    assert other.q_proj.lora_A is other.v_proj.lora_A is not module.q_proj.lora_A
    x = torch.randn(5, 24)
    assert all(torch.equal(a, b) for a, b in zip(module(x), other(x), strict=True))


def test_moving_keeps_one_A():
    module = make_module("meta", "torch", share_A=True).to_empty(device="cpu")
    assert module.q_proj.lora_A is module.k_proj.lora_A is module.v_proj.lora_A
    assert not module.q_proj.lora_A.requires_grad
    source = make_module("cpu", "torch", share_A=True)
    module.load_state_dict(source.state_dict())
    x = torch.randn(5, 24)
    assert all(torch.equal(a, b) for a, b in zip(module(x), source(x), strict=True))
    module.double()
    assert module.q_proj.lora_A is module.v_proj.lora_A and module(x.double())[0].dtype == torch.float64


def test_trained_while_merged():
    module = make_module("cpu", "torch")
    module.k_proj.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        module(torch.randn(5, 24))


def test_threads_share_a_group():
    module = make_module("cpu", "torch")
    inputs = [torch.randn(8, 24) for _ in range(4)]
    whole(*module.parameters(), *inputs)

    def gradient(x):
        return torch.autograd.grad(sum(y.square().sum() for y in module(x)), module.k_proj.lora_B)[0]

    alone = [gradient(x) for x in inputs]
    found: dict[int, list[Tensor]] = {}

    def work(index):
        found[index] = [gradient(inputs[index]) for _ in range(30)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, want in enumerate(alone):
        assert all(torch.equal(got, want) for got in found[index])


# Errors.


def member(N=8, K=6, R=2, **changes) -> LinearOperands:
    found = LinearOperands(torch.zeros(N, K), torch.zeros(N), torch.zeros(R, K), torch.zeros(N, R))
    return found._replace(**changes)


BAD = {
    "K": (dict(second=member(K=7)), r"member 1: weight has 7 columns .*that of member 0 has 6"),
    "dtype": (dict(second=member(weight=torch.zeros(8, 6).bfloat16())), r"member 1: .*torch\.bfloat16"),
    "device": (dict(second=member(weight=torch.zeros(8, 6, device="meta"))), r"member 1: .*meta"),
    "x": (dict(x=torch.zeros(3, 5)), r"member 0: x has shape \(3, 5\), expected \(\.\.\., 6\)"),
    "x-of-plain": (
        dict(x=torch.zeros(3, 5), first=member(lora_A=None, lora_B=None)),
        r"member 0: x has shape \(3, 5\), expected \(\.\.\., 6\)",
    ),
    "lora_B": (dict(second=member(lora_B=torch.zeros(8, 3))), r"member 1: lora_B has shape \(8, 3\)"),
    "bias": (dict(second=member(bias=torch.zeros(7))), r"member 1: bias has shape \(7,\)"),
    "bias-of-plain": (
        dict(second=member(lora_A=None, lora_B=None, bias=torch.zeros(7))),
        r"member 1: bias has shape \(7,\), expected \(8,\)",
    ),
    "half-an-adapter": (dict(second=member(lora_A=None)), "member 1: lora_A is None: pass both"),
    "thawed": (
        dict(second=member(weight=torch.zeros(8, 6, requires_grad=True))),
        "member 1: weight requires",
    ),
    "thawed-plain": (
        dict(second=member(lora_A=None, lora_B=None, bias=torch.zeros(8, requires_grad=True))),
        "member 1: bias requires grad",
    ),
    "scaling": (dict(second=member(scaling=float("nan"))), "member 1: scaling must be a finite number"),
    "dropout": (dict(second=member(dropout_p=1.0)), r"member 1: dropout_p must be in \[0, 1\)"),
    "other-A": (dict(share_A=True), "member 1: share_A=True needs the same lora_A tensor object"),
    "impl": (dict(impl="cuda"), "impl='cuda' is not known"),
    "empty": (dict(members=[]), "at least one linear layer"),
}


def call(x=None, first=None, second=None, members=None, **options):
    members = [first or member(), second or member()] if members is None else members
    return lorafa_linear_group(torch.zeros(3, 6) if x is None else x, members, **options)


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_input(changes, words):
    call()
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_one_A_with_different_scalings():
    first = member()
    for change, words in ((dict(scaling=2.0), "scaling is 2.0"), (dict(dropout_p=0.5), "dropout_p is 0.5")):
        with pytest.raises(ValueError, match=words):
            call(first=first, second=first._replace(**change), share_A=True)


def test_bad_dtypes():
    with pytest.raises(TypeError, match=r"member 0: x has dtype torch\.int64"):
        call(x=torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight has dtype torch\.float32, x torch\.bfloat16"):
        call(x=torch.zeros(3, 6).bfloat16(), first=member(lora_A=None, lora_B=None))
    with pytest.raises(TypeError, match=r"member 1: lora_A has dtype torch\.float16"):
        call(second=member(lora_A=torch.zeros(2, 6).half()))


def test_bad_modules():
    linear = nn.Linear(6, 8)
    good = {"q": linear, "k": nn.Linear(6, 4)}
    for changed, words in (
        ({}, "at least one"),
        ({"q": linear, "k": nn.Linear(7, 4)}, "'k' has in_features 7, 'q' has 6"),
        ({"q": linear, "k": nn.Linear(6, 4, dtype=torch.bfloat16)}, "'k' has dtype"),
        ({"q": linear, "k": nn.Linear(6, 4, device="meta")}, "'k' has device meta"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRAFALinearGroup(changed)
    with pytest.raises(TypeError, match="'k': Conv1d is not"):
        LoRAFALinearGroup({"q": linear, "k": nn.Conv1d(6, 8, 1)})
    with pytest.raises(ValueError, match=r"adapt names \['v'\]"):
        LoRAFALinearGroup.from_linears(good, adapt=["q", "v"])
    with pytest.raises(ValueError, match="different lora_A objects"):
        LoRAFALinearGroup({n: LoRAFALinear(6, 8) for n in ("q", "k")}, share_A=True)
    with pytest.raises(ValueError, match="'k' has r 4, 'q' has 8"):
        LoRAFALinearGroup({"q": LoRAFALinear(6, 8), "k": LoRAFALinear(6, 8, r=4)}, share_A=True)
    assert linear.weight.requires_grad, "a refused member is not frozen"
    with pytest.raises(TypeError, match="Bilinear is neither"):
        operands_of(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize("share_A", [False, True])
def test_thawing_a_member(share_A):
    module = make_module("cpu", "torch", share_A=share_A)
    module.v_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="member 2: weight requires grad"):
        module(torch.randn(5, 24))
