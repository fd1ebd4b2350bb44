"""bitsandbytes' Linear4bit taken over and given back: the same codes and scales, in the same memory."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_same
from torch import nn

from lorafa_kernels.base import bnb
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def linear4bit(K=128, N=24, *, nested=False, dtype=torch.float32, quant_type="nf4", **options) -> nn.Module:
    """A quantised Linear4bit on the CPU."""
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        K, N, compress_statistics=nested, quant_type=quant_type, compute_dtype=dtype, **options
    )
    weight = torch.randn(N, K).mul_(0.1).to(dtype)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        module=layer,
        quant_storage=options.get("quant_storage", torch.uint8),
    )
    layer.bias = nn.Parameter(torch.randn(N, dtype=dtype), requires_grad=False)
    return layer.to("cpu")


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that bitsandbytes saves of a layer; codes as bytes, whatever they are stored as."""
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    return state | {"weight": state["weight"].view(torch.uint8)}


@pytest.mark.numerics
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("K", "N"), [(128, 24), (66, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(K, N, nested, dtype):
    layer = linear4bit(K, N, nested=nested, dtype=dtype)
    before = state_of(layer)
    state = layer.weight.quant_state
    base = bnb.from_linear4bit(layer)
    assert base.kind.name == ("nf4-nested" if nested else "nf4") and base.dtype == dtype
    assert base.tensors[0].data_ptr() == layer.weight.data_ptr()
    assert base.tensors[1].data_ptr() == state.absmax.data_ptr()
    adapted = LoRAFAQuantisedLinear.from_linear(layer, r=4)
    assert adapted.weight.data_ptr() == layer.weight.data_ptr(), "no copy"
    back = adapted.to_linear(merge=False)
    assert type(back) is bitsandbytes.nn.Linear4bit and back.weight.data_ptr() == layer.weight.data_ptr()
    assert_same(state_of(back), before)


@pytest.mark.numerics
@pytest.mark.parametrize("nested", [False, True])
def test_computes_what_linear4bit_computes(nested):
    layer = linear4bit(nested=nested)
    x = torch.randn(7, 128, requires_grad=True)
    want = layer(x)
    (dx,) = torch.autograd.grad(want.sum(), x)
    for made in (LoRAFAQuantisedLinear.from_linear(layer, r=4), QuantisedLinear.from_linear4bit(layer)):
        y = made(x)
        assert_same(y, want)
        assert_same(torch.autograd.grad(y.sum(), x)[0], dx)


@pytest.mark.numerics
def test_computes_in_its_compute_dtype():
    layer = linear4bit(dtype=torch.bfloat16)
    layer.compute_dtype = torch.float32
    adapted = LoRAFAQuantisedLinear.from_linear(layer, r=4, init_lora_weights=False)
    assert adapted.lora_A.dtype == torch.float32
    x = torch.randn(7, 128).bfloat16().requires_grad_()
    y = adapted(x)
    want = layer(x).float() + adapted.scaling * (x.float() @ adapted.lora_A.T @ adapted.lora_B.T)
    assert y.dtype == torch.bfloat16
    # The sum is rounded once here and twice there.
    assert bool(((y.float() - want).abs() <= want.abs() * 2**-7 + 2**-7).all())
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and adapted.lora_B.grad is not None


def test_another_storage_is_the_same_bytes():
    layer = linear4bit(quant_storage=torch.bfloat16, dtype=torch.bfloat16)
    before = state_of(layer)
    assert layer.weight.dtype == torch.bfloat16
    base = bnb.from_linear4bit(layer)
    assert_same(base.tensors[0].reshape(-1), layer.weight.data.view(torch.uint8).reshape(-1))
    back = LoRAFAQuantisedLinear.from_linear(layer, r=4).to_linear(merge=False)
    assert_same(state_of(back), before)


def test_merged_and_quantised_again():
    adapted = LoRAFAQuantisedLinear.from_linear(linear4bit(), r=4, init_lora_weights=False)
    merged = adapted.merged_weight()
    again = adapted.to_linear(requantize=True)
    assert type(again) is bitsandbytes.nn.Linear4bit
    assert_same(bnb.from_linear4bit(again).tensors, quantised(merged, "nf4").tensors)


def test_what_cannot_be_taken_over_says_why():
    with pytest.raises(ValueError, match="holds fp4"):
        bnb.from_linear4bit(linear4bit(quant_type="fp4"))
    with pytest.raises(ValueError, match="not been quantised yet"):
        bnb.from_linear4bit(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4"))
    packed = linear4bit()
    packed.weight.quant_state.original_qshape = packed.weight.shape
    with pytest.raises(ValueError, match="packed this Linear4bit for CPU inference"):
        LoRAFAQuantisedLinear.from_linear(packed)
    other = linear4bit()
    other.weight.quant_state.blocksize = 128
    with pytest.raises(ValueError, match="blocks of 128"):
        bnb.from_linear4bit(other)
    with pytest.raises(ValueError, match="this base is int8"):
        bnb.to_params4bit(quantised(torch.randn(4, 64), "int8"), other)
