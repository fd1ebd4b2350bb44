"""What a layer keeps for backward: z, and the weight, lora_A and lora_B objects themselves. Never x, never
a copy or a cast.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import implementation_cases
from saved import Saved
from torch import nn

from lorafa_kernels import LoRAFALinear, lorafa_linear
from lorafa_kernels.checks.budget import draw_operands

implementations = pytest.mark.parametrize(("device", "impl"), implementation_cases())
M, K, N, R = 12, 20, 28, 4


def make_layer(device, impl, *, dtype=torch.float32, bias=True, adapter_dtype=torch.float32) -> LoRAFALinear:
    layer = LoRAFALinear(
        K, N, bias, r=R, init_lora_weights=False, device=device, dtype=dtype, adapter_dtype=adapter_dtype
    )
    layer.impl = impl
    return layer


def assert_keeps_z_and_objects(saved: Saved, layer: LoRAFALinear, z_dtype: torch.dtype, rows: int = M):
    assert len(saved.tensors) == 4
    z, *objects = saved.tensors
    assert z.shape == (rows, R) and z.dtype == z_dtype
    assert z.untyped_storage().nbytes() == rows * R * z_dtype.itemsize, "z has a storage of its own"
    for got, want in zip(objects, (layer.weight, layer.lora_A, layer.lora_B), strict=True):
        assert got is want, "the Parameter object itself"


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(M,), (3, 4)], ids=["2d", "3d"])
def test_keeps_z_and_the_three_objects(device, impl, dtype, shape):
    layer = make_layer(device, impl, dtype=dtype)
    x = torch.randn(*shape, K, device=device, dtype=dtype, requires_grad=True)
    with Saved() as saved:
        y = layer(x)
    assert_keeps_z_and_objects(saved, layer, dtype)
    y.sum().backward()
    assert x.grad is not None and layer.lora_B.grad.dtype == torch.float32


@pytest.mark.numerics
@implementations
@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-layer", "bf16-layer"])
def test_autocast_keeps_no_cast(device, impl, backward_inside, dtype):
    """Under autocast z is in autocast's dtype, and the fp32 weight is kept as the object it is, not as a
    16-bit copy.
    """
    layer = make_layer(device, impl, dtype=dtype)
    x = torch.randn(M, K, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        with Saved() as saved:
            y = layer(x)
        assert y.dtype == torch.bfloat16
        if backward_inside:
            y.float().sum().backward()
    if not backward_inside:
        y.float().sum().backward()
    assert_keeps_z_and_objects(saved, layer, torch.bfloat16)
    assert x.grad.dtype == torch.float32 and layer.lora_B.grad.dtype == torch.float32
    # The operator computes what the same layer computes on operands cast by hand.
    by_hand = lorafa_linear(
        x.detach().bfloat16(),
        layer.weight.bfloat16(),
        layer.lora_A,
        layer.lora_B.detach(),
        layer.bias.bfloat16(),
        scaling=layer.scaling,
        impl=impl,
    )
    assert torch.equal(y, by_hand)


@pytest.mark.numerics
@implementations
def test_backward_is_the_same_inside_and_outside_of_autocast(device, impl):
    """Autocast must not leak into the products of backward, where it would change their dtypes."""
    layer = make_layer(device, impl)
    x = torch.randn(M, K, device=device, requires_grad=True)
    dy = torch.randn(M, N, device=device)

    def gradients(inside):
        y = layer(x)
        with torch.autocast(device, torch.bfloat16, enabled=inside):
            return torch.autograd.grad(y, (x, layer.lora_B), dy)

    for inside, outside in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(inside, outside)


@implementations
def test_x_is_freed(device, impl):
    """In a stack of layers, the activations between them die before backward."""
    first, second = (make_layer(device, impl) for _ in range(2))
    second = LoRAFALinear(N, K, r=R, device=device)
    second.impl = impl
    x = torch.randn(M, K, device=device)
    with Saved() as saved:
        hidden = first(x)
        middle = hidden + 1
        y = second(middle)
    alive = weakref.ref(middle.untyped_storage()), middle.untyped_storage().data_ptr()
    reference = weakref.ref(middle)
    assert alive[1] not in saved.storages()
    assert x.untyped_storage().data_ptr() not in saved.storages()
    del hidden, middle
    gc.collect()
    assert reference() is None
    y.sum().backward()
    assert first.lora_B.grad is not None and second.lora_B.grad is not None


@implementations
def test_first_layer_keeps_z_alone(device, impl):
    """x needs no gradient: nothing for dx is kept, and lora_B only as the object whose dtype dB takes."""
    layer = make_layer(device, impl)
    with Saved() as saved:
        y = layer(torch.randn(M, K, device=device))
    z, lora_B = saved.tensors
    assert z.shape == (M, R) and lora_B is layer.lora_B
    y.sum().backward()
    assert layer.lora_B.grad is not None


@implementations
def test_frozen_lora_B_keeps_no_z(device, impl):
    layer = make_layer(device, impl)
    layer.lora_B.requires_grad_(False)
    x = torch.randn(M, K, device=device, requires_grad=True)
    with Saved() as saved:
        y = layer(x)
    assert [id(t) for t in saved.tensors] == [id(layer.weight), id(layer.lora_A), id(layer.lora_B)]
    y.sum().backward()
    assert x.grad is not None and layer.lora_B.grad is None


@implementations
def test_nothing_is_kept_without_gradients(device, impl):
    layer = make_layer(device, impl)
    x = torch.randn(M, K, device=device, requires_grad=True)
    with Saved() as saved:
        with torch.no_grad():
            assert layer(x).grad_fn is None
        with torch.inference_mode():
            layer(x)
        layer.lora_B.requires_grad_(False)
        assert layer(x.detach()).grad_fn is None
    assert saved.tensors == []


@implementations
def test_kept_bytes_of_a_model(device, impl):
    """A stack of three layers keeps three z and not one M × K tensor more."""
    layers = [make_layer(device, impl, bias=False) for _ in range(3)]
    back = [LoRAFALinear(N, K, False, r=R, device=device) for _ in range(3)]
    for layer in back:
        layer.impl = impl
    model = nn.Sequential(*(layer for pair in zip(layers, back, strict=True) for layer in pair))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Saved() as saved:
        y = model(torch.randn(M, K, device=device, requires_grad=True))
    kept = [t for t in saved.tensors if t.untyped_storage().data_ptr() not in own]
    assert sum(t.numel() for t in kept) == 6 * M * R
    y.sum().backward()


@pytest.mark.numerics
@implementations
def test_saved_objects_survive_a_storage_swap(device, impl):
    """An engine that shards parameters frees their storage after forward and fills it again before
    backward.
    """
    inputs = draw_operands(M, K, N, R, torch.float32, device)
    weight = nn.Parameter(inputs.weight, requires_grad=False)
    x = inputs.x.requires_grad_()
    y = lorafa_linear(x, weight, inputs.lora_A, inputs.lora_B, impl=impl)
    values, size = 2 * weight.detach(), weight.untyped_storage().nbytes()
    # Other values than before, so that a copy made in forward would show.
    (want,) = torch.autograd.grad(
        lorafa_linear(x, values, inputs.lora_A, inputs.lora_B, impl=impl), x, inputs.dy
    )
    weight.untyped_storage().resize_(0)
    weight.untyped_storage().resize_(size)
    with torch.autograd._unsafe_preserve_version_counter(weight), torch.no_grad():
        weight.copy_(values)
    (got,) = torch.autograd.grad(y, x, inputs.dy)
    assert torch.equal(got, want)
