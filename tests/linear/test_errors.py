"""Wrong input gets the answer of the error table: the right exception, naming the argument, its shape or
dtype and what would be right.
"""

from __future__ import annotations

import inspect
import math
import sys
import types

import pytest
import torch
from conftest import implementation_cases

from lorafa_kernels import LoRAFALinear, lorafa_linear
from lorafa_kernels.checks.budget import draw_operands
from lorafa_kernels.linear import ops
from lorafa_kernels.plan.choice import choose

M, K, N, R = 4, 6, 8, 2


def call(**changes):
    i = draw_operands(M, K, N, R, torch.float32, "cpu")
    arguments = dict(x=i.x, weight=i.weight, lora_A=i.lora_A, lora_B=i.lora_B, bias=i.bias)
    return lorafa_linear(**{**arguments, **changes})


SHAPES = {
    "x-last-dimension": (dict(x=torch.zeros(3, 5)), r"x has shape \(3, 5\), expected \(\.\.\., 6\)"),
    "x-scalar": (dict(x=torch.zeros(())), r"x has shape \(\), expected \(\.\.\., 6\)"),
    "weight-1d": (dict(weight=torch.zeros(6)), r"weight has shape \(6,\), expected \(N, K\)"),
    "lora_A-K": (dict(lora_A=torch.zeros(2, 7)), r"lora_A has shape \(2, 7\), expected \(R, 6\)"),
    "lora_A-1d": (dict(lora_A=torch.zeros(6)), r"lora_A has shape \(6,\)"),
    "lora_A-no-rank": (dict(lora_A=torch.zeros(0, 6)), "R at least 1"),
    "no-rank": (dict(lora_A=torch.zeros(0, 6), lora_B=torch.zeros(8, 0)), "R at least 1"),
    "lora_B-R": (dict(lora_B=torch.zeros(8, 3)), r"lora_B has shape \(8, 3\), expected \(8, 2\)"),
    "lora_B-N": (dict(lora_B=torch.zeros(7, 2)), r"lora_B has shape \(7, 2\), expected \(8, 2\)"),
    "bias": (dict(bias=torch.zeros(1)), r"bias has shape \(1,\), expected \(8,\)"),
}


@pytest.mark.parametrize(("changes", "words"), SHAPES.values(), ids=SHAPES)
def test_shapes(changes, words):
    with pytest.raises(ValueError, match=words):
        call(**changes)


DTYPES = {
    "integer-x": (dict(x=torch.zeros(4, 6, dtype=torch.int64)), "x has dtype torch.int64"),
    "complex-x": (dict(x=torch.zeros(4, 6, dtype=torch.complex64)), "x has dtype torch.complex64"),
    "bf16-x": (dict(x=torch.zeros(4, 6).bfloat16()), "weight has dtype torch.float32, x torch.bfloat16"),
    "bf16-weight": (dict(weight=torch.zeros(8, 6).bfloat16()), "weight has dtype torch.bfloat16"),
    "bf16-lora_A": (dict(lora_A=torch.zeros(2, 6).bfloat16()), "lora_A has dtype torch.bfloat16"),
    "fp16-lora_B": (dict(lora_B=torch.zeros(8, 2).half()), "lora_B has dtype torch.float16"),
    "fp64-bias": (dict(bias=torch.zeros(8).double()), "bias has dtype torch.float64"),
    "integer-weight": (dict(weight=torch.zeros(8, 6, dtype=torch.int8)), "weight has dtype torch.int8"),
}


@pytest.mark.parametrize(("changes", "words"), DTYPES.values(), ids=DTYPES)
def test_dtypes(changes, words):
    with pytest.raises(TypeError, match=words):
        call(**changes)


def test_operands_of_one_dtype_that_is_none_to_compute_in():
    shapes = dict(x=(4, 6), weight=(8, 6), lora_A=(2, 6), lora_B=(8, 2), bias=(8,))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        call(**{name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()})


def test_dtypes_under_autocast():
    """Autocast casts floating-point operands, and nothing else."""
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
        assert call(bias=torch.zeros(8).bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"weight has dtype torch\.int8"):
            call(weight=torch.zeros(8, 6, dtype=torch.int8))
        # fp64 is left alone, as by torch's own linear.
        wide = dict(x=(4, 6), weight=(8, 6), lora_A=(2, 6), lora_B=(8, 2), bias=(8,))
        assert (
            call(**{k: torch.zeros(v, dtype=torch.float64) for k, v in wide.items()}).dtype == torch.float64
        )


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "bias"])
def test_mixed_devices(name):
    shapes = dict(weight=(8, 6), lora_A=(2, 6), lora_B=(8, 2), bias=(8,))
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        call(**{name: torch.empty(shapes[name], device="meta")})


def test_x_on_another_device_than_all_else():
    with pytest.raises(ValueError, match="weight is on cpu, x on meta"):
        call(x=torch.empty(4, 6, device="meta"), bias=None)


@pytest.mark.parametrize("name", ["weight", "lora_A", "bias"])
def test_frozen_operands_that_require_grad(name):
    shapes = dict(weight=(8, 6), lora_A=(2, 6), bias=(8,))
    thawed = torch.zeros(shapes[name], requires_grad=True)
    with pytest.raises(ValueError, match=rf"{name} requires grad.*requires_grad_\(False\)"):
        call(**{name: thawed})


@pytest.mark.parametrize("scaling", [math.nan, math.inf, -math.inf])
def test_non_finite_scaling(scaling):
    with pytest.raises(ValueError, match="scaling must be a finite number"):
        call(scaling=scaling)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, math.nan])
def test_dropout_out_of_range(dropout_p):
    with pytest.raises(ValueError, match="dropout_p must be in"):
        call(dropout_p=dropout_p)
    with pytest.raises(ValueError, match="lora_dropout must be in"):
        LoRAFALinear(4, 4, lora_dropout=dropout_p)


@pytest.mark.parametrize("name", ["forward", "backward", "backward_input"])
def test_operator_with_dropout_and_no_seed(name):
    operands = {
        "x": torch.zeros(4, 6),
        "dy": torch.zeros(4, 8),
        "z": torch.zeros(4, 2),
        "weight": torch.zeros(8, 6),
        "lora_A": torch.zeros(2, 6),
        "lora_B": torch.zeros(8, 2),
        "bias": None,
    }
    operator = getattr(ops, name)
    names = [name for name in inspect.signature(operator).parameters if name in operands]
    with pytest.raises(ValueError, match=r"dropout of 0\.5 needs a seed"):
        operator(*(operands[name] for name in names), 1.0, "torch", 0.5)


@pytest.mark.parametrize("impl", ["cuda", "", "Triton"])
def test_unknown_implementation(impl):
    with pytest.raises(ValueError, match="expected one of 'auto', 'triton', 'torch', 'reference'"):
        call(impl=impl)


def test_triton_does_not_take_fp64():
    """By name it raises; auto takes the library plan, and says so through explain."""
    wide = {
        name: torch.zeros(shape, dtype=torch.float64)
        for name, shape in dict(x=(4, 6), weight=(8, 6), lora_A=(2, 6), lora_B=(8, 2), bias=(8,)).items()
    }
    with pytest.raises(RuntimeError, match='impl="triton" cannot run'):
        call(**wide, impl="triton")
    assert call(**wide, impl="auto").dtype == torch.float64


def test_triton_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    # Not through the cached choice of another test.
    with pytest.raises(RuntimeError, match=r"is too old, the kernels need 3\.6"):
        choose.__wrapped__("triton", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("r", [0, -1, 1.5, True])
def test_rank(r):
    with pytest.raises(ValueError, match="r must be an integer of at least 1"):
        LoRAFALinear(4, 4, r=r)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(lora_alpha=math.inf), "lora_alpha must be a finite number"),
        (dict(lora_alpha="16"), "lora_alpha must be a finite number"),
        (dict(lora_dropout=None), "lora_dropout must be"),
        (dict(init_lora_weights="pissa"), "init_lora_weights must be"),
        (dict(init_lora_weights=1), "init_lora_weights must be"),
        (dict(adapter_dtype=torch.int8), "adapter_dtype"),
    ],
)
def test_layer_options(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAFALinear(4, 4, **options)


@pytest.mark.parametrize(("device", "impl"), implementation_cases())
@pytest.mark.parametrize("wanted", ["x", "lora_B"])
def test_double_backward_is_refused(device, impl, wanted):
    """Also where dy needs no gradient, and the first gradient would pass for a constant."""
    i = draw_operands(M, K, N, R, torch.float32, device)
    operands = dict(x=i.x.requires_grad_(), lora_B=i.lora_B.requires_grad_())
    y = lorafa_linear(i.x, i.weight, i.lora_A, i.lora_B, impl=impl)
    (gradient,) = torch.autograd.grad(y.sum(), operands[wanted], create_graph=True)
    loss = gradient.square().sum() + i.x.sum()
    with pytest.raises(RuntimeError, match="double backward through a LoRA-FA layer is not supported"):
        loss.backward()
