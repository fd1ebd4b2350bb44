"""The operators obey PyTorch's rules: schema, fakes, compile, export."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same
from conftest import implementation_cases
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafa_kernels import LoRAFALinear
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.linear import ops

pytestmark = pytest.mark.numerics
implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
OPERATORS = ("forward", "backward", "backward_input", "backward_lora_B")


def operator_arguments(name: str, device: str, impl: str, dtype=torch.float32, bias=True) -> tuple:
    i = draw_operands(10, 12, 14, 3, dtype, device, bias=bias, factor_dtype=torch.float32)
    z = torch.randn(10, 3, device=device, dtype=dtype)
    return {
        "forward": (i.x, i.weight, i.lora_A, i.lora_B, i.bias, 0.5, impl),
        "backward": (i.dy, z, i.weight, i.lora_A, i.lora_B, 0.5, impl),
        "backward_input": (i.dy, i.weight, i.lora_A, i.lora_B, 0.5, impl),
        "backward_lora_B": (i.dy, z, i.lora_B, impl),
    }[name]


@implementations
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(device, impl, name):
    """In bf16, where the factors have another dtype than the rest."""
    operator = getattr(torch.ops.lorafa_kernels, name).default
    torch.library.opcheck(operator, operator_arguments(name, device, impl, torch.bfloat16))


@implementations
@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_match_in_strides_and_dtype(device, impl, name):
    """Also for transposed operands, where an implementation might return another layout."""
    operator = getattr(torch.ops.lorafa_kernels, name).default
    arguments = tuple(
        a.t().contiguous().t() if isinstance(a, torch.Tensor) and a.dim() == 2 else a
        for a in operator_arguments(name, device, impl, torch.bfloat16)
    )
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for got, shape in pairs:
        assert (got.shape, got.stride(), got.dtype) == (shape.shape, shape.stride(), shape.dtype)


@implementations
def test_compile_fullgraph_with_dynamic_rows(device, impl):
    torch._dynamo.reset()
    layer = LoRAFALinear(16, 24, r=4, init_lora_weights=False, device=device)
    layer.impl = impl
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    frames = torch._dynamo.utils.counters["stats"]
    for rows in (5, 9, 30):
        x = torch.randn(rows, 16, device=device)
        results = []
        for module in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), (leaf, layer.lora_B))))
        assert_same(results[1], results[0])
        if rows == 5:
            unique = frames["unique_graphs"]
    assert frames["unique_graphs"] == unique, "one graph serves every number of rows"


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compile_with_inductor(training):
    torch._dynamo.reset()
    layer = LoRAFALinear(16, 24, r=4, init_lora_weights=False).train(training)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 6, 16, requires_grad=True)
    got, want = compiled(x), layer(x)
    assert_same(got, want)
    gradients = [torch.autograd.grad(y.sum(), (x, layer.lora_B)) for y in (got, want)]
    assert_same(*gradients)


def test_compile_under_autocast():
    torch._dynamo.reset()
    layer = LoRAFALinear(16, 24, r=4, init_lora_weights=False)

    def step(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    x = torch.randn(6, 16, requires_grad=True)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(layer, x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, step(layer, x))
    got.sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


def test_export_with_a_dynamic_dimension():
    layer = LoRAFALinear(16, 24, r=4, init_lora_weights=False).eval()
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(layer, (torch.randn(8, 16),), dynamic_shapes=({0: rows},))
    x = torch.randn(33, 16)
    assert_same(program.module()(x), layer(x))


def test_meta_device():
    layer = LoRAFALinear(16, 24, r=4, device="meta")
    y = layer(torch.empty(3, 16, device="meta", requires_grad=True))
    assert y.shape == (3, 24) and y.device.type == "meta"


def test_operators_are_where_compilers_look():
    for name in OPERATORS:
        operator = getattr(torch.ops.lorafa_kernels, name).default
        assert torch.Tag.pt2_compliant_tag in operator.tags
        assert not operator._schema.is_mutable
        assert callable(getattr(ops, name))
