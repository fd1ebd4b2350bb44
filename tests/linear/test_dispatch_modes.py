"""What a TorchDispatchMode sees: selective activation checkpointing saves any product and leaves the numbers
as they are, and FlopCounterMode counts what it counts for the plain formula.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import implementation_cases
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.group import ops as group_ops
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.linear import ops
from lorafa_kernels.mlp import ops as mlp_ops
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.norm import FORMS, rms_norm

implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
M, K, N, R = 12, 20, 24, 3


def layers(shapes: list[tuple[int, int]], device: str, **options) -> list[LinearOperands]:
    found = []
    for seed, (n, k) in enumerate(shapes):
        i = draw_operands(1, k, n, R, torch.float32, device, seed=seed)
        found.append(
            LinearOperands(i.weight, i.bias, i.lora_A, i.lora_B.requires_grad_(), i.scaling, **options)
        )
    return found


def plain_linear(x: Tensor, layer: LinearOperands, z: Tensor | None = None) -> Tensor:
    y = F.linear(x, layer.weight, layer.bias)
    if layer.lora_B is None:
        return y
    return y + layer.scaling * F.linear(F.linear(x, layer.lora_A) if z is None else z, layer.lora_B)


# Each: the layers, and what is computed with them by this library and by the plain formula.
def layer_case(device: str, dropout_p: float = 0.0):
    (layer,) = layers([(N, K)], device, dropout_p=dropout_p)

    def ours(x, impl):
        weight, bias, lora_A, lora_B, scaling, p, _ = layer
        return lorafa_linear(x, weight, lora_A, lora_B, bias, scaling=scaling, dropout_p=p, impl=impl)

    return [layer], ours, lambda x: plain_linear(x, layer)


def group_case(device: str, share_A: bool = False, dropout_p: float = 0.0):
    members = layers([(N, K), (16, K), (8, K)], device, dropout_p=dropout_p)
    if share_A:
        members = [member._replace(lora_A=members[0].lora_A) for member in members]
    members[2] = members[2]._replace(lora_A=None, lora_B=None)

    def ours(x, impl):
        return torch.cat(lorafa_linear_group(x, members, share_A=share_A, impl=impl), dim=1)

    def plain(x):
        z = F.linear(x, members[0].lora_A) if share_A else None
        return torch.cat([plain_linear(x, member, z) for member in members], dim=1)

    return members[:2], ours, plain


def mlp_case(device: str, dropout_p: float = 0.0):
    gate, up, down = parts = layers([(N, K), (N, K), (16, N)], device, dropout_p=dropout_p)

    def ours(x, impl):
        return lorafa_gated_mlp(x, gate, up, down, impl=impl)

    def plain(x):
        return plain_linear(F.silu(plain_linear(x, gate)) * plain_linear(x, up), down)

    return parts, ours, plain


CASES = {
    "layer": layer_case,
    "layer-dropout": partial(layer_case, dropout_p=0.3),
    "group": group_case,
    "group-one-A": partial(group_case, share_A=True),
    "group-dropout": partial(group_case, dropout_p=0.3),
    "mlp": mlp_case,
    "mlp-dropout": partial(mlp_case, dropout_p=0.3),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def step(compute, x: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    y = compute(x)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


aten = torch.ops.aten
# What is saved, and whether what was saved may be written to.
POLICIES = {
    "products": (lambda op: op in (aten.mm.default, aten.addmm.default), False),
    "products-written-to": (lambda op: op in (aten.mm.default, aten.addmm.default), True),
    "everything": (lambda op: True, False),
}


@pytest.mark.numerics
@implementations
@cases
@pytest.mark.parametrize(("saved", "mutation"), POLICIES.values(), ids=POLICIES)
def test_selective_checkpointing(device, impl, case, saved, mutation):
    """The same bits as without, whatever a policy saves; nothing that it saved is written to."""
    parts, ours, _ = case(device)
    x = torch.randn(M, K, device=device, requires_grad=True)
    leaves = [x, *(part.lora_B for part in parts)]
    dy = torch.randn_like(ours(x, impl))
    expected = step(lambda x: ours(x, impl), x, leaves, dy)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saved(op) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=mutation)
    got = step(lambda x: checkpoint(ours, x, impl, use_reentrant=False, context_fn=contexts), x, leaves, dy)
    assert all(map(torch.equal, got, expected))


@pytest.mark.numerics
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selective_checkpointing_of_norms(form, dtype):
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    weight, dy = torch.randn(K, dtype=dtype), torch.randn(M, K, dtype=dtype)
    expected = step(lambda x: rms_norm(x, weight, 1e-6, form), x, [x], dy)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    got = step(
        lambda x: checkpoint(rms_norm, x, weight, 1e-6, form, use_reentrant=False, context_fn=contexts),
        x,
        [x],
        dy,
    )
    assert all(map(torch.equal, got, expected))


def count(compute, x: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[int, int]:
    """FLOPs of forward and of backward."""
    with FlopCounterMode(display=False) as forward:
        y = compute(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, leaves, dy)
    return forward.get_total_flops(), backward.get_total_flops()


@implementations
@cases
@pytest.mark.parametrize("needs", ["both", "dB"])
def test_flops_are_those_of_the_plain_formula(device, impl, case, needs):
    parts, ours, plain = case(device)
    x = torch.randn(M, K, device=device, requires_grad=needs != "dB")
    for part in parts:
        part.lora_B.requires_grad_(needs != "dx")
    leaves = [leaf for leaf in (x, *(part.lora_B for part in parts)) if leaf.requires_grad]
    dy = torch.randn_like(plain(x))
    got = count(lambda x: ours(x, impl), x, leaves, dy)
    assert min(got) > 0 and got == count(plain, x, leaves, dy)


def test_flops_of_unused_outputs_are_none():
    members = layers([(N, K), (16, K)], "cpu")
    x = torch.randn(M, K, requires_grad=True)
    ys = lorafa_linear_group(x, members, impl="torch")
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(ys[0], x, torch.ones_like(ys[0]))
    # dx, and dB of the output that is used.
    assert counter.get_total_flops() == 2 * M * (N * K + N * R + K * R + N * R)


def test_flop_formulas_of_the_caller_stay():
    i = draw_operands(M, K, N, R, torch.float32, "cpu")
    mine = {torch.ops.lorafa_kernels.forward: lambda *args, out_shape, **kwargs: 7}
    with FlopCounterMode(display=False, custom_mapping=mine) as counter:
        lorafa_linear(i.x, i.weight, i.lora_A, i.lora_B, impl="torch")
    assert counter.get_total_flops() == 7


def test_every_operator_with_a_product_has_a_formula():
    from lorafa_kernels.flops import FORMULAS

    elementwise = {"gated", "gated_backward_"}
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lorafa_kernels::")
    }
    assert set(FORMULAS) == defined - elementwise


@implementations
@cases
def test_hot_path_is_direct_where_nothing_watches(monkeypatch, device, impl, case):
    """Only what watches, casts or compiles sends a call through its operators, forward or backward."""
    operators = [(of, name) for of in (ops, group_ops, mlp_ops) for name in vars(of) if name.endswith("_op")]
    assert len(operators) == 8
    for of, name in operators:
        monkeypatch.setattr(of, name, lambda *args, name=name: pytest.fail(f"{name} was called"))
    parts, ours, _ = case(device)
    x = torch.randn(M, K, device=device, requires_grad=True)
    leaves = [x, *(part.lora_B for part in parts)]
    y = ours(x, impl)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=["both", "dx", "dB"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["", "dropout"])
@implementations
def test_a_group_of_one_is_a_layer(device, impl, p, needs):
    """The same bits, whichever gradients are wanted: it takes the way of a layer."""
    (layer,), _, _ = layer_case(device, p)
    x = torch.randn(M, K, device=device, requires_grad=needs[0])
    layer = layer._replace(lora_B=layer.lora_B.detach().requires_grad_(needs[1]))
    weight, bias, lora_A, lora_B, scaling, *_ = layer
    leaves = [leaf for leaf in (x, lora_B) if leaf.requires_grad]
    how = {"scaling": scaling, "dropout_p": p, "impl": impl}
    dy = torch.randn(M, N, device=device)
    expected = step(lambda x: lorafa_linear(x, weight, lora_A, lora_B, bias, **how), x, leaves, dy)
    got = step(lambda x: lorafa_linear_group(x, [layer], impl=impl)[0], x, leaves, dy)
    assert all(map(torch.equal, got, expected))
