"""The kernel that multiplies by the codes of a quantised weight: values, what it writes, who takes it, and
what is left to the weight made in memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from accuracy import assert_same, check_budget
from conftest import GPU, TRITON_DEVICE

from lorafa_kernels import explain
from lorafa_kernels.base.frozen import base_of, quantised
from lorafa_kernels.base.kinds import KINDS, bits
from lorafa_kernels.base.reading import product_of_codes, readable, reading_config
from lorafa_kernels.checks.budget import Operands, draw_operands, plain_formula
from lorafa_kernels.linear.quantised import frozen_linear, quantised_linear
from lorafa_kernels.nn.quantised import LoRAFAQuantisedLinear, QuantisedLinear
from lorafa_kernels.plan.choice import planned_device
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelConfig, KernelPlan
from lorafa_kernels.plan.defaults import CODES_ROWS, codes_config
from lorafa_kernels.plan.make import candidates, config_of_frozen, make_plan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, describe, obstacle

expand_codes = pytest.importorskip("lorafa_kernels.kernels.expand_codes")
kinds = pytest.mark.parametrize("kind", KINDS)
BF16, FP16 = torch.bfloat16, torch.float16
# Several blocks of N, of K and of rank, and a rest of each: of NF4 K = 192 is one block of 128 and a half.
SMALL = KernelConfig(16, 32, 128, 16, 1, 4, 2, "codes")
READS = {"forward": Recipe("fused", KernelPlan(expand=SMALL))}
WIDE = {"forward": Recipe("fused", KernelPlan(expand=replace(SMALL, BLOCK_M=128)))}
MAKES = {"forward": Recipe("fused", KernelPlan())}
H100 = Device("NVIDIA H100 80GB HBM3", KNOWN_DEVICES["sm_90"], "3.7.1")


def drawn(M, N, K, R, kind, dtype, own=None, **options) -> tuple[Operands, object]:
    """Operands whose weight is the one that the base beside them stands for."""
    inputs = draw_operands(M, K, N, R, dtype, TRITON_DEVICE, factor_dtype=torch.float32, **options)
    base = quantised(inputs.weight.to(own or dtype), kind)
    return replace(inputs, weight=base.dense(dtype)), base


def y_of(inputs: Operands, base, impl: str = "triton") -> torch.Tensor:
    how = {"scaling": inputs.scaling, "dropout_p": inputs.dropout_p, "impl": impl}
    # As of a layer of bitsandbytes, whose weight may have another dtype.
    how["compute_dtype"] = inputs.x.dtype
    torch.manual_seed(inputs.torch_seed)
    return quantised_linear(inputs.x, base, inputs.lora_A, inputs.lora_B, inputs.bias, **how)


@pytest.mark.numerics
@kinds
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "dtype", "own"),
    [
        (19, 45, 192, 20, BF16, None),
        (16, 64, 128, 16, FP16, BF16),
        (1, 256, 64, 3, BF16, torch.float32),
        (40, 33, 320, 33, FP16, None),
    ],
    ids=["ragged", "even", "one-row", "odd-N"],
)
def test_within_the_budget_of_the_weight_that_the_codes_stand_for(kind, M, N, K, R, dtype, own):
    """Rows, columns, contraction and rank that fill no block, and a weight of another dtype than x."""
    inputs, base = drawn(M, N, K, R, kind, dtype, own)
    with pin_plan(READS):
        y = y_of(inputs, base)
    want = {
        name: plain_formula(inputs, wide)["y"] for name, wide in (("exact", torch.float64), ("own", None))
    }
    check_budget({"y": y}, {"y": want["exact"]}, {"y": want["own"]})


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_channels_take_any_contraction(kind):
    """Rows of codes that begin at any byte."""
    inputs, base = drawn(17, 33, 131, 5, kind, BF16)
    with pin_plan(READS):
        y = y_of(inputs, base)
    check_budget(
        {"y": y}, {"y": plain_formula(inputs, torch.float64)["y"]}, {"y": plain_formula(inputs)["y"]}
    )


@pytest.mark.numerics
@kinds
def test_every_step_of_a_layer(kind):
    """With dropout and without bias; dx and dB come from the weight made in memory."""
    inputs, base = drawn(24, 48, 128, 8, kind, BF16, bias=False, dropout_p=0.25)
    x, lora_B = inputs.x.clone().requires_grad_(), inputs.lora_B.clone().requires_grad_()
    with pin_plan(READS):
        y = y_of(replace(inputs, x=x, lora_B=lora_B), base)
        dx, dB = torch.autograd.grad(y, (x, lora_B), inputs.dy)
    got = {"y": y, "dx": dx, "dB": dB}
    check_budget(got, plain_formula(inputs, torch.float64), plain_formula(inputs))


@pytest.mark.numerics
@kinds
def test_frozen_layers_read_codes_too(kind):
    inputs, base = drawn(20, 45, 192, 4, kind, BF16)
    x = inputs.x.requires_grad_()
    with pin_plan(READS):
        assert reading_config(x, base, True) == SMALL
        y = frozen_linear(x, base, inputs.bias)
    (dx,) = torch.autograd.grad(y, x, inputs.dy)
    exact, plain = {}, {}
    for found, wide in ((exact, torch.float64), (plain, BF16)):
        weight, rows, dy = base.dense().to(wide), x.detach().to(wide), inputs.dy.to(wide)
        found.update(y=rows @ weight.T + inputs.bias.to(wide), dx=dy @ weight)
    check_budget({"y": y, "dx": dx}, exact, plain)


@pytest.mark.numerics
@kinds
def test_the_weight_in_the_product_has_the_bits_of_the_dense_one(kind):
    """Of rows of the identity the product is W, whose elements are then neither rounded nor added to."""
    K = 128
    generator = torch.Generator().manual_seed(0)
    for own, dtype in ((BF16, BF16), (torch.float32, FP16), (FP16, BF16)):
        # In the interpreter a block takes its time whatever its size.
        config = SMALL if GPU else replace(SMALL, BLOCK_M=128, BLOCK_N=64)
        weight = torch.randn(70, K, generator=generator).to(TRITON_DEVICE, own)
        base = quantised(weight, kind)
        x = torch.eye(K, dtype=dtype, device=TRITON_DEVICE)
        got = product_of_codes(x, base, None, config=config)
        assert_same(got, base.dense(dtype, "torch").t().contiguous())


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_code_of_a_byte(kind):
    """All 256 of them; of e4m3 the denormal numbers, and two rows of which each has one of its NaN."""
    codes = torch.arange(256, dtype=torch.uint8, device=TRITON_DEVICE).view(4, 64)
    stored = codes.view(torch.int8) if kind == "int8" else codes
    scale = bits(torch.tensor([0.37, 2.0, 3e-3, 1e-6], device=TRITON_DEVICE))
    base = base_of(kind, [stored, scale], (4, 64), BF16)
    got = product_of_codes(torch.eye(64, dtype=BF16, device=TRITON_DEVICE), base, None, config=SMALL).t()
    want, odd = base.dense(), (codes & 0x7F) == 0x7F
    if kind == "fp8":
        assert bool(got[[1, 3]].isnan().all()) and int(want.isnan().sum()) == 2
        stored[odd] = 0
        got = product_of_codes(torch.eye(64, dtype=BF16, device=TRITON_DEVICE), base, None, config=SMALL).t()
        want = base.dense()
    assert_same(got.contiguous(), want)


def test_writes_every_element_and_no_other(monkeypatch):
    """The result is poisoned, with canaries around it."""
    M, N = 19, 45
    inputs, base = drawn(M, N, 192, 4, "nf4", BF16)
    room = torch.full((M + 2, N), float("nan"), dtype=BF16, device=TRITON_DEVICE)
    monkeypatch.setattr(expand_codes.torch, "empty", lambda *args, **kwargs: room[1:-1])
    got = product_of_codes(inputs.x, base, inputs.bias, config=SMALL)
    monkeypatch.undo()
    assert got.data_ptr() == room[1].data_ptr()
    assert bool(got.isfinite().all()) and bool(room[0].isnan().all()) and bool(room[-1].isnan().all())


@pytest.mark.numerics
def test_reads_no_scale_beyond_the_weight():
    """K is a block and a half; behind the last scale there is NaN."""
    inputs, base = drawn(16, 32, 192, 4, "nf4", BF16)
    codes, absmax = base.tensors
    room = torch.full((absmax.numel() + 16,), float("nan"), device=TRITON_DEVICE)
    room[: absmax.numel()] = absmax.view(torch.float32).view(-1)
    near = bits(room[: absmax.numel()].view(absmax.shape))
    again = base_of("nf4", [codes, near], base.shape, base.dtype)
    got = product_of_codes(inputs.x, again, None, config=SMALL)
    assert_same(got, product_of_codes(inputs.x, base, None, config=SMALL))


def test_explain_says_what_is_read_and_what_is_made():
    frozen = QuantisedLinear.from_linear(torch.nn.Linear(128, 40, device=TRITON_DEVICE).to(BF16), "nf4")
    layer = LoRAFAQuantisedLinear.from_linear(frozen, r=4)
    layer.impl = "triton"
    with pin_plan(READS):
        few = explain(layer, M=16)
    assert [step.call for step in few.forward][-1] == "expand_codes"
    assert "weight from nf4 in the product" in str(few) and "codes read in the product" in str(few)
    assert few.backward[0].call == "dequantise" and "dequantise" not in [step.call for step in few.forward]
    for plan, M in ((MAKES, 16), (None, CODES_ROWS + 1)):
        with pin_plan(plan) if plan else contextlib.nullcontext():
            made = explain(layer, M=M)
        assert made.forward[0].call == "dequantise" and "expand_codes" not in str(made)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)], ids=str)
def test_of_nothing(shape):
    """No rows of x, or no columns of y: nothing is launched."""
    M, N = (shape[0], 64) if shape[0] == 0 else (3, 0)
    base = quantised(torch.randn(N, 64, device=TRITON_DEVICE).to(BF16), "nf4")
    y = product_of_codes(torch.randn(M, 64, device=TRITON_DEVICE).to(BF16), base, None, config=SMALL)
    assert y.shape == (M, N)


@pytest.mark.numerics
def test_rows_of_x_that_are_parts_of_longer_ones():
    inputs, base = drawn(18, 40, 128, 4, "nf4", BF16)
    longer = torch.zeros(18, 131, dtype=BF16, device=TRITON_DEVICE)
    longer[:, 3:] = inputs.x
    with pin_plan(READS):
        assert_same(y_of(replace(inputs, x=longer[:, 3:]), base), y_of(inputs, base))


@pytest.fixture
def made(monkeypatch):
    """How many weights are made in memory."""
    from lorafa_kernels.base.frozen import QuantisedBase

    count = []
    dense = QuantisedBase.dense
    monkeypatch.setattr(QuantisedBase, "dense", lambda *args: count.append(1) or dense(*args))
    return count


@pytest.mark.parametrize(
    ("kind", "K", "dtype", "own"),
    [
        ("nf4", 66, BF16, BF16),
        ("nf4-nested", 96, BF16, BF16),
        ("nf4", 64, torch.float32, torch.float32),
        ("nf4", 64, BF16, torch.float64),
    ],
    ids=["flat", "flat-nested", "fp32", "of-fp64"],
)
def test_what_it_does_not_serve_is_made_in_memory(made, kind, K, dtype, own):
    inputs = draw_operands(12, K, 40, 4, dtype, TRITON_DEVICE, factor_dtype=torch.float32)
    base = quantised(inputs.weight.to(own), kind)
    assert readable(base, dtype) == ""
    inputs = replace(inputs, weight=base.dense(dtype))
    made.clear()
    y = y_of(inputs, base)
    assert len(made) == 1
    check_budget(
        {"y": y}, {"y": plain_formula(inputs, torch.float64)["y"]}, {"y": plain_formula(inputs)["y"]}
    )


def test_rows_and_plans_decide(made):
    """Few rows make no weight; many do, other implementations, and a plan of another kernel."""
    inputs, base = drawn(20, 40, 128, 4, "nf4", BF16)
    many, _ = drawn(CODES_ROWS + 1, 40, 128, 4, "nf4", BF16)
    made.clear()

    def weights(inputs, impl="triton", plan=None) -> int:
        made.clear()
        if plan is None:
            y_of(inputs, base, impl)
        else:
            with pin_plan(plan):
                y_of(inputs, base, impl)
        return len(made)

    assert weights(inputs, "torch") == weights(inputs, "reference") == 1
    assert weights(inputs, plan=READS) == weights(many, plan=WIDE) == 0
    assert weights(inputs, plan=MAKES) == 1
    if not GPU:
        # Without a model of the cost it is the first plan.
        assert weights(inputs) == 0
    assert weights(many) == 1


def test_a_pinned_plan_that_reads_codes_raises_on_a_dense_weight():
    from lorafa_kernels import lorafa_linear

    inputs, _ = drawn(20, 40, 128, 4, "nf4", BF16)
    with (
        pin_plan(READS),
        pytest.raises(RuntimeError, match="variant 'codes' computes y of 16-bit x on a quant"),
    ):
        lorafa_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, impl="triton")


def problem(M, N=4096, K=4096, codes="nf4", R=16) -> Problem:
    return Problem("forward", BF16, M, N, K, R, codes=codes)


def test_candidates():
    """Of few rows on a base that the kernel reads; a layer with the same numbers on a dense one has none."""

    def reads(found) -> bool:
        return any(
            "codes read in the product" in describe(recipe, "forward") for recipe in candidates(found, H100)
        )

    assert all(reads(problem(M, codes=kind)) for M in (1, CODES_ROWS) for kind in KINDS)
    assert not reads(problem(CODES_ROWS + 1)) and not reads(problem(1, codes=""))
    assert not reads(replace(problem(1), dtype=torch.float32))
    recipe = Recipe("fused", KernelPlan(expand=codes_config(H100.limits, 2, 1, 16)))
    assert obstacle(recipe, problem(1), H100.limits) is None
    assert "quantised" in obstacle(recipe, problem(1, codes=""), H100.limits)


def test_the_model_of_the_cost_counts_the_weight_that_is_made():
    """Reading codes wins where the weight is large, and not where launches are all of the time."""
    large, small = make_plan(problem(16, 14336), H100), make_plan(problem(16, 1024, 1024), H100)
    assert "codes read" in large.predicted[0][0] and "codes read" not in small.predicted[0][0]
    assert large.kernels.expand.reads_codes and not small.kernels.expand.reads_codes
    # As docs/quantised.md says.
    assert not make_plan(problem(16), H100).kernels.expand.reads_codes
    times = dict(large.predicted)
    assert times["library"] > dict(make_plan(problem(16, 14336, codes=""), H100).predicted)["library"]
    # One launch beside two: a layer without an adapter takes the kernel sooner.
    assert config_of_frozen(problem(16, R=0), H100) is not None
    assert config_of_frozen(problem(16, R=0, codes=""), H100) is None
    assert config_of_frozen(problem(CODES_ROWS + 1, R=0), H100) is None


def test_reading_codes_needs_whole_blocks_of_scales():
    with (
        pytest.raises(ValueError, match="BLOCK_K=32"),
        pin_plan({"forward": Recipe("fused", KernelPlan(expand=replace(SMALL, BLOCK_K=32)))}),
    ):
        pass


def test_every_device_has_a_configuration_for_16_bits():
    for limits in (*KNOWN_DEVICES.values(), planned_device(torch.device(TRITON_DEVICE)).limits):
        for M in (1, 16, 17, 64, 128, 4096):
            assert codes_config(limits, 2, M, 300).reads_codes
        assert codes_config(limits, 4, 1, 16) is None
