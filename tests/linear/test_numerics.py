"""Section by section, the mathematics: every implementation computes y, dx and dB within the error budget
of the contract.
"""

from __future__ import annotations

import importlib

import c_oracle
import pytest
import torch
from accuracy import SMALL_OUTPUT, Budget, assert_same, check_accuracy, check_budget
from conftest import TRITON_DEVICE, on_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_plans import PLANS, grid, implementation_and_plan_cases, pin, pin_by_name

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import Operands, draw_operands, lorafa_results, plain_formula, unit_roundoff
from lorafa_kernels.plan.config import KernelConfig, KernelPlan

pytestmark = pytest.mark.numerics

SHAPES = [
    pytest.param(dict(M=17, K=31, N=37, R=7), id="primes"),
    pytest.param(dict(M=130, K=72, N=264, R=16), id="ragged-aligned"),
    pytest.param(dict(M=1, K=390, N=300, R=8), id="one-row"),
    pytest.param(dict(M=130, K=70, N=258, R=16), id="ragged"),
    pytest.param(dict(M=128, K=256, N=128, R=64), id="even"),
    pytest.param(dict(M=65, K=48, N=80, R=24), id="rank-not-a-power-of-2"),
    pytest.param(dict(M=24, K=32, N=48, R=150), id="rank-above-K-and-block"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def implementations(test):
    """Run a test with every implementation, and with the Triton kernels that small shapes do not choose."""
    cases = pytest.mark.parametrize(
        ("device", "impl", "plan"), implementation_and_plan_cases(), indirect=["plan"]
    )
    return pytest.mark.usefixtures("plan")(cases(test))


def implementations_with(*axes, **options):
    """The same with the cases of further axes, of which interpreted kernels take a quick core."""

    def decorate(test):
        first = ("device,impl,plan", implementation_and_plan_cases())
        return pytest.mark.usefixtures("plan")(grid(first, *axes, indirect=["plan"], **options)(test))

    return decorate


@pytest.fixture
def plan(request, monkeypatch) -> str | None:
    pin_by_name(monkeypatch, request.param)
    return request.param


def layer(impl: str):
    """y, dx and dB through the public function and autograd."""

    def compute(inputs: Operands) -> dict[str, torch.Tensor]:
        found = lorafa_results(inputs, impl)
        assert found["y"].dtype == found["dx"].dtype == inputs.x.dtype
        assert found["dB"].dtype == inputs.lora_B.dtype
        return found

    return compute


def oracle(inputs: Operands) -> dict[str, torch.Tensor]:
    """y, dx and dB by the C library, which shares no code with torch."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    dtype, factor = names[inputs.x.dtype], names[inputs.lora_B.dtype]

    def wide(tensor):
        return None if tensor is None else tensor.double().numpy()

    x, weight, A, B = (wide(t) for t in (inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B))
    z, y = c_oracle.forward(x, weight, A, B, wide(inputs.bias), inputs.scaling, dtype)
    _, dx, dB = c_oracle.backward(wide(inputs.dy), z, weight, A, B, inputs.scaling, dtype, factor)
    to = inputs.x.dtype
    return {
        "y": torch.from_numpy(y).to(to),
        "dx": torch.from_numpy(dx).to(to),
        "dB": torch.from_numpy(dB).to(inputs.lora_B.dtype),
    }


@implementations_with(("dtype", DTYPES), ("shape", SHAPES), core_alone=True)
def test_accuracy(device, impl, dtype, shape):
    check_accuracy(layer(impl), **shape, dtype=dtype, device=device)


# 64 draws, of which each takes the interpreter as long as one of a large shape.
@pytest.mark.slow
@implementations_with(("dtype", DTYPES), each_once=True, core_alone=True)
def test_accuracy_of_a_single_number(device, impl, dtype):
    check_accuracy(layer(impl), M=1, K=1, N=1, R=1, dtype=dtype, device=device)


DROPOUTS = [
    pytest.param(dict(M=65, K=48, N=80, R=24), 0.1, id="rank-not-a-power-of-2"),
    # One of 1,000 is kept, and makes nearly all of the result: so many that an error means something.
    pytest.param(dict(M=512, K=500, N=32, R=8), 0.999, id="nearly-all-dropped"),
    pytest.param(dict(M=130, K=70, N=258, R=16), 0.1, id="ragged"),
    pytest.param(dict(M=130, K=72, N=264, R=16), 0.5, id="ragged-aligned"),
]


@implementations_with(("dtype", DTYPES), ("shape,dropout_p", DROPOUTS), each_once=True, core_alone=True)
def test_accuracy_with_dropout(device, impl, dtype, shape, dropout_p):
    """Of the same mask in the operators and in the formula that people write."""
    factor = None if dtype == torch.float32 else torch.float32
    options = dict(dtype=dtype, device=device, factor_dtype=factor, dropout_p=dropout_p)
    check_accuracy(layer(impl), **shape, **options)


@implementations
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
def test_accuracy_with_fp32_lora_B(device, impl, dtype):
    shape = dict(M=70, K=48, N=96, R=12)
    check_accuracy(layer(impl), **shape, dtype=dtype, device=device, factor_dtype=torch.float32, bias=False)


HOPPER_PLANS = [on_device(TRITON_DEVICE, "triton", name, id=name) for name in PLANS if name.startswith("tma")]


@grid(
    ("device,impl,name", HOPPER_PLANS),
    ("dtype", DTYPES[1:]),
    ("R", [8, 256, 1, 4, 12, 16, 64, 128]),
    ("fp32_lora_B", [False, True]),
    core_alone=True,
)
def test_accuracy_of_the_hopper_kernel(monkeypatch, device, impl, name, dtype, R, fp32_lora_B):
    """At every rank, with more tiles than programs, a ragged last tile in every direction, with fp32 lora_B
    and without; the kernel does run: no operand here is one that TMA cannot address.
    """
    expand = importlib.import_module("lorafa_kernels.kernels.expand")
    forget_launches = importlib.import_module("lorafa_kernels.kernels.launch").forget_launches
    make, made = expand.expand_tma_launch, []
    monkeypatch.setattr(expand, "expand_tma_launch", lambda *args: made.append(args) or make(*args))
    pin_by_name(monkeypatch, name)
    factor_dtype = torch.float32 if fp32_lora_B else dtype
    budget = Budget()
    # Of rank 1 two draws, which have elements enough.
    for seed in range(-(-SMALL_OUTPUT // (200 * R))):
        inputs = draw_operands(150, 72, 200, R, dtype, device, factor_dtype=factor_dtype, seed=seed)
        forget_launches()
        made.clear()
        budget.add(inputs, layer(impl)(inputs))
        assert [call[5].shape for call in made] == [(150, 200), (150, 72)]
    budget.check()


@pytest.mark.parametrize("triton_only", [on_device(TRITON_DEVICE)])
def test_accuracy_of_every_arrangement(monkeypatch, triton_only):
    """Split contractions, one and two passes over dy, a dB of several chunks."""
    inputs = draw_operands(300, 136, 264, 24, torch.float32, triton_only)
    split = KernelConfig(64, 0, 16, 32, 1, 4, 2, SPLIT_K=64)
    for plan in (KernelPlan(shrink=split, one_pass=False), KernelPlan(one_pass=True)):
        with monkeypatch.context() as patch:
            pin(patch, plan)
            budget = Budget()
            budget.add(inputs, layer("triton")(inputs))
            budget.check()


@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param(dict(M=1, K=1, N=1, R=1), id="all-1")])
def test_accuracy_of_the_c_oracle(dtype, shape):
    check_accuracy(oracle, **shape, dtype=dtype, device="cpu")


@dtypes
@pytest.mark.parametrize("factor_dtype", [None, torch.float32], ids=["same", "fp32-factors"])
def test_reference_rounds_as_the_c_oracle(dtype, factor_dtype):
    """Two independent writings of section 2 differ by the order of their sums only, so few elements round
    apart.
    """
    inputs = draw_operands(64, 96, 80, 12, dtype, "cpu", factor_dtype=factor_dtype)
    ours, theirs = layer("reference")(inputs), oracle(inputs)
    for name, want in theirs.items():
        got = ours[name]
        # One unit in the last place of the output, and a sum of up to 96 fp32 products.
        spacing = 2 * unit_roundoff(got.dtype) * want.double().abs()
        summation = 96 * unit_roundoff(torch.float32) * want.double().abs().max()
        assert ((got.double() - want.double()).abs() <= spacing + summation).all(), name
        if got.dtype != torch.float32:
            assert (got == want).float().mean() > 0.99, f"{name}: most elements round alike"


@implementations
@pytest.mark.parametrize("scaling", [1 / 128, 0.7, 16.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 9000.0])
def test_accuracy_in_fp16_at_any_scale(device, impl, scaling, size):
    """s is applied to the accumulator: applied later, large gradients overflow and small ones lose bits.

    Of every result that fp16 has numbers for: dx and dB of the largest scaling and dy are beyond them.
    """
    inputs = draw_operands(64, 48, 64, 8, torch.float16, device, scaling=scaling)
    inputs.dy = (inputs.dy.clamp(-4, 4) * size).half()
    got, plain, exact = (
        lorafa_results(inputs, impl),
        plain_formula(inputs),
        plain_formula(inputs, torch.float64),
    )
    largest = torch.finfo(torch.float16).max
    fitting = [name for name in got if exact[name].abs().max() < largest]
    wanted = ["y", "dx", "dB"] if size < 9000 or scaling < 0.7 else ["y", "dx"] if scaling < 1 else ["y"]
    assert fitting == wanted
    check_budget(*({name: found[name] for name in fitting} for found in (got, exact, plain)))


@implementations
@dtypes
def test_strided_operands(device, impl, plan, dtype):
    """Transposed, sliced and stepped operands give the bits that their contiguous copies give, if it is the
    same kernel that reads them: TMA reads contiguous rows alone.
    """
    M, K, N, R = 66, 40, 56, 5

    def transposed(t):
        return t.t().contiguous().t()

    def stepped(t):
        wide = torch.full((t.shape[0], 2 * t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
        view = wide[:, 3::2]
        view.copy_(t)
        return view

    inputs = draw_operands(M, K, N, R, dtype, device)
    want = layer(impl)(inputs)
    for change in (transposed, stepped):
        changed = Operands(
            x=change(inputs.x),
            weight=change(inputs.weight),
            lora_A=change(inputs.lora_A),
            lora_B=change(inputs.lora_B),
            bias=stepped(inputs.bias[None])[0],
            dy=change(inputs.dy),
            scaling=inputs.scaling,
        )
        assert not changed.x.is_contiguous() and not changed.dy.is_contiguous()
        got = layer(impl)(changed)
        for name, tensor in want.items():
            if impl == "triton" and plan != "tma":
                assert torch.equal(got[name], tensor), name
        check_accuracy(lambda _, got=got: got, M=M, K=K, N=N, R=R, dtype=dtype, device=device)


@implementations
def test_expanded_gradient_and_input(device, impl):
    """sum().backward() sends a dy of stride 0; a broadcast input has one as well."""
    budget = Budget()
    # All rows are one, hence few elements that tell anything: of several draws.
    for seed in range(4):
        inputs = draw_operands(33, 24, 40, 7, torch.float32, device, bias=False, seed=seed)
        x = inputs.x[:1].expand(33, 24).detach().requires_grad_()
        lora_B = inputs.lora_B.detach().requires_grad_()
        y = lorafa_linear(x, inputs.weight, inputs.lora_A, lora_B, scaling=inputs.scaling, impl=impl)
        dx, dB = torch.autograd.grad(y.sum(), (x, lora_B))
        inputs.x, inputs.dy = x.detach().contiguous(), torch.ones_like(y)
        got = {"y": y.detach(), "dx": dx, "dB": dB}
        budget.add(inputs, got)
        if impl == "triton":
            assert_same(got, layer(impl)(inputs))
    budget.check()


@implementations
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (5,), (2, 3, 4, 5)], ids=str)
def test_shapes_of_x(device, impl, shape):
    """Any number of leading dimensions, none, and empty ones."""
    inputs = draw_operands(1, 5, 7, 2, torch.float32, device)
    x = torch.randn(shape, device=device, requires_grad=True)
    lora_B = inputs.lora_B.detach().requires_grad_()
    y = lorafa_linear(x, inputs.weight, inputs.lora_A, lora_B, inputs.bias, impl=impl)
    assert y.shape == (*shape[:-1], 7)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel() == 0:
        assert lora_B.grad.count_nonzero() == 0
    flat = lorafa_linear(x.reshape(-1, 5), inputs.weight, inputs.lora_A, lora_B, inputs.bias, impl=impl)
    assert_same(y.reshape(-1, 7), flat)


@implementations
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_propagate(device, impl, bad):
    """A NaN or Inf in x or dy reaches what the plain formula lets it reach, and no other row."""
    inputs = draw_operands(20, 16, 24, 3, torch.float32, device)
    inputs.x[4, 3] = bad
    inputs.dy[9, 5] = bad
    got, want = layer(impl)(inputs), layer("reference")(inputs)
    for name in ("y", "dx", "dB"):
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(want[name])), name
    assert torch.isfinite(got["y"][[0, 5, 19]]).all() and not torch.isfinite(got["y"][4]).any()


@implementations
@dtypes
def test_same_bits_from_run_to_run(device, impl, dtype):
    # The interpreter takes one program after the other.
    shape = (70, 40, 72) if device == "cpu" and impl == "triton" else (150, 72, 200)
    inputs = draw_operands(*shape, 10, dtype, device)
    first, second = layer(impl)(inputs), layer(impl)(inputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@implementations
def test_inputs_are_not_written(device, impl):
    inputs = draw_operands(20, 16, 24, 3, torch.float32, device)
    before = {k: v.clone() for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    layer(impl)(inputs)
    for name, tensor in before.items():
        assert torch.equal(getattr(inputs, name), tensor), name


@implementations
def test_single_gradients_equal_those_of_the_full_backward(device, impl):
    """Asking for dx alone or dB alone: of the library and the reference the same bits, of the kernels, which
    may read dy once for both, values within the budget.
    """
    inputs = draw_operands(50, 40, 60, 6, torch.float32, device)
    both = layer(impl)(inputs)
    args = (inputs.weight, inputs.lora_A)
    options = dict(scaling=inputs.scaling, impl=impl)
    x = inputs.x.detach().requires_grad_()
    y = lorafa_linear(x, *args, inputs.lora_B, inputs.bias, **options)
    (dx,) = torch.autograd.grad(y, x, inputs.dy)
    lora_B = inputs.lora_B.detach().requires_grad_()
    y = lorafa_linear(inputs.x, *args, lora_B, inputs.bias, **options)
    (dB,) = torch.autograd.grad(y, lora_B, inputs.dy)
    alone = {"dx": dx, "dB": dB}
    exact, plain = plain_formula(inputs, torch.float64), plain_formula(inputs)
    check_budget(alone, *({name: found[name] for name in alone} for found in (exact, plain)))
    if impl != "triton":
        assert_same(alone, {name: both[name] for name in alone})


@implementations
def test_retain_graph_twice(device, impl):
    inputs = draw_operands(12, 8, 10, 2, torch.float32, device)
    x, lora_B = inputs.x.detach().requires_grad_(), inputs.lora_B.detach().requires_grad_()
    y = lorafa_linear(x, inputs.weight, inputs.lora_A, lora_B, impl=impl)
    first = torch.autograd.grad(y, (x, lora_B), inputs.dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, lora_B), inputs.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(impl, bias):
    inputs = draw_operands(5, 4, 6, 3, torch.float64, "cpu", bias=bias)

    def function(x, lora_B):
        return lorafa_linear(
            x, inputs.weight, inputs.lora_A, lora_B, inputs.bias, scaling=inputs.scaling, impl=impl
        )

    operands = inputs.x.requires_grad_(), inputs.lora_B.requires_grad_()
    assert torch.autograd.gradcheck(function, operands)


def quick_at_first_plan() -> list:
    """Cases (device, impl, plan), of which interpreted kernels are quick with the plan of their own alone."""
    cases = implementation_and_plan_cases()
    slow = [pytest.param(*c.values, marks=[*c.marks, pytest.mark.slow], id=c.id) for c in cases]
    return [s if c.values[0] == "cpu" and c.values[2] else c for c, s in zip(cases, slow, strict=True)]


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize(("device", "impl", "plan"), quick_at_first_plan(), indirect=["plan"])
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    M=st.integers(1, 150),
    K=st.integers(1, 150),
    N=st.integers(1, 150),
    R=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    fp32_factors=st.booleans(),
    aligned=st.booleans(),
)
def test_accuracy_at_random_shapes(device, impl, M, K, N, R, bias, dtype, fp32_factors, aligned):
    """Large enough outputs only: small ones are pooled in test_accuracy."""
    if device == "cpu" and impl == "triton":
        M, K, N = M // 2, K // 2, N // 2
    M, K, N = (max(size, 16) for size in (M, K, N))
    if aligned:
        K, N = K // 8 * 8, N // 8 * 8
    factor = torch.float32 if fp32_factors else None
    R = max(R, -(-256 // N))
    check_accuracy(
        layer(impl), M=M, K=K, N=N, R=R, dtype=dtype, device=device, bias=bias, factor_dtype=factor
    )


def test_kernel_module_names_match():
    """The three implementations offer the same four operations, so that one can stand for another."""
    pytest.importorskip("triton")
    names = ("forward", "backward", "backward_input", "backward_lora_B")
    for module in ("linear.reference", "linear.library", "linear.fused"):
        loaded = importlib.import_module(f"lorafa_kernels.{module}")
        assert all(callable(getattr(loaded, name)) for name in names), module
