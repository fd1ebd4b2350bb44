"""What the Triton kernels promise beyond right values: they write all of their outputs and nothing else,
call no library product, and
address tensors of more than 2³¹ elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import check_budget
from conftest import GPU, TRITON_DEVICE, on_device
from kernel_plans import PLANS, pin_by_name
from memory_beds import far_rows
from torch.utils._python_dispatch import TorchDispatchMode

from lorafa_kernels import lorafa_linear
from lorafa_kernels.checks.budget import draw_operands, plain_formula
from lorafa_kernels.linear import ops, reference

pytest.importorskip("triton")
pytestmark = pytest.mark.numerics
pytest.importorskip("lorafa_kernels.linear.fused")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 512
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "mv", "dot")

kernel_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


class RecordOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def run_layer(impl, device):
    inputs = draw_operands(20, 24, 32, 4, torch.float32, device)
    x, lora_B = inputs.x.requires_grad_(), inputs.lora_B.requires_grad_()
    with RecordOperators() as record:
        y = lorafa_linear(x, inputs.weight, inputs.lora_A, lora_B, inputs.bias, impl=impl)
        torch.autograd.grad(y, (x, lora_B), inputs.dy)
    return record.names


def test_triton_calls_no_library_product(triton_device, monkeypatch):
    # As where nothing watches: everything is called without its operator.
    monkeypatch.setattr("lorafa_kernels.dispatch.watching_modes", lambda: 0)
    names = run_layer("triton", triton_device)
    assert "empty" in names, "the launchers' own outputs were seen"
    assert not set(names) & set(PRODUCTS), names
    # The same recorder does see the products of the library plan.
    assert set(run_layer("torch", triton_device)) & set(PRODUCTS)


@pytest.fixture
def guarded(monkeypatch):
    """Make torch.empty return NaN-filled tensors between canary rows, and list (buffer, tensor) pairs."""
    made = []
    empty = torch.empty

    def guarded_empty(*shape, dtype=None, device=None, **_):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = torch.Size(shape).numel()
        buffer = empty(count + 2 * GUARD, dtype=dtype, device=device).fill_(float("nan"))
        tensor = buffer[GUARD : GUARD + count].view(shape)
        made.append((buffer, tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", guarded_empty)
    return made


SHAPES = {"ragged": (70, 40, 200, 9), "ones": (1, 1, 1, 1), "two-rank-blocks": (70, 72, 136, 129)}


@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(
            shape,
            dtype,
            id=f"{name}-{dtype}".replace("torch.", ""),
        )
        for name, shape in SHAPES.items()
        for dtype in DTYPES
        # The interpreter takes fp16 the way of fp32.
        if GPU or (name, dtype) != ("two-rank-blocks", torch.float16)
    ],
)
def test_outputs_are_written_whole_and_nothing_else(monkeypatch, triton_device, guarded, dtype, shape, plan):
    pin_by_name(monkeypatch, plan)
    M, K, N, R = shape
    inputs = draw_operands(M, K, N, R, dtype, triton_device, factor_dtype=torch.float32)
    guarded.clear()
    args = inputs.weight, inputs.lora_A, inputs.lora_B
    y, z = ops.forward(inputs.x, *args, inputs.bias, inputs.scaling, "triton")
    dx, dB = ops.backward(inputs.dy, z, *args, inputs.scaling, "triton")
    dB_alone = ops.backward_lora_B(inputs.dy, z, inputs.lora_B, "triton")
    made = {tensor.data_ptr() for _, tensor in guarded}
    assert {tensor.data_ptr() for tensor in (y, z, dx, dB, dB_alone)} <= made
    for buffer, tensor in guarded:
        assert torch.isfinite(tensor).all(), f"part of {tuple(tensor.shape)} was not written"
        assert buffer[:GUARD].isnan().all(), f"written before the start of {tuple(tensor.shape)}"
        assert buffer[GUARD + tensor.numel() :].isnan().all(), (
            f"written past the end of {tuple(tensor.shape)}"
        )


@pytest.mark.memory
@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "dy", "z"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets_past_32_bits(triton_device, operand, layout):
    inputs = draw_operands(5, 6, 7, 4, torch.float16, triton_device)
    tensors = {name: getattr(inputs, name) for name in ("x", "weight", "lora_A", "lora_B", "dy")}
    tensors["z"] = reference.forward(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, None, 0.7)[1]

    def results(t):
        y, z = ops.forward(t["x"], t["weight"], t["lora_A"], t["lora_B"], inputs.bias, 0.7, "triton")
        dx, dB = ops.backward(t["dy"], t["z"], t["weight"], t["lora_A"], t["lora_B"], 0.7, "triton")
        return y, z, dx, dB

    want = results(tensors)
    near = tensors[operand] if layout == "rows" else tensors[operand].t()
    far = far_rows(near)
    got = results({**tensors, operand: far if layout == "rows" else far.t()})
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.memory
def test_results_of_more_than_32_bits():
    """y, dx and dy of more than 2³¹ elements, checked at rows from both ends."""
    M, K, N, R = (1 << 31) // 4096 + 300, 64, 4096, 8
    inputs = draw_operands(256, K, N, R, torch.bfloat16, "cuda", bias=False)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    y, z = ops.forward(x, inputs.weight, inputs.lora_A, inputs.lora_B, None, 0.7, "triton")
    assert y.numel() > 1 << 31
    for rows in (slice(0, 256), slice(M - 256, M)):
        check_rows(replace(inputs, x=x[rows]), "y", y[rows])
    dx, _ = ops.backward(y, z, inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, "triton")
    check_rows(replace(inputs, dy=y[-256:]), "dx", dx[-256:])


def check_rows(inputs, name, got):
    """The budget for one result of these rows: `inputs` has no others."""
    exact, plain = plain_formula(inputs, torch.float64), plain_formula(inputs)
    check_budget({name: got}, {name: exact[name]}, {name: plain[name]})


@pytest.mark.gpu
def test_cuda_graph_replays():
    inputs = draw_operands(256, 128, 192, 16, torch.bfloat16, "cuda")

    def step():
        y, z = ops.forward(
            inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.bias, inputs.scaling, "triton"
        )
        return y, *ops.backward(
            inputs.dy, z, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.scaling, "triton"
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs.x.normal_()
    inputs.dy.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
def test_streams_do_not_share_state():
    """Two layers at work on two streams give what each gives alone."""
    inputs = [draw_operands(512, 256, 384, 16, torch.bfloat16, "cuda", seed=seed) for seed in (1, 2)]

    def step(i):
        y, z = ops.forward(i.x, i.weight, i.lora_A, i.lora_B, i.bias, i.scaling, "triton")
        return y, *ops.backward(i.dy, z, i.weight, i.lora_A, i.lora_B, i.scaling, "triton")

    alone = [step(i) for i in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    together = [None, None]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[index] = step(inputs[index])
    torch.cuda.synchronize()
    for got, want in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("triton_only", [on_device(TRITON_DEVICE)])
@kernel_dtypes
def test_dB_is_not_rounded_to_the_dtype_of_x(triton_only, dtype):
    """dB is accumulated in fp32 and stored in lora_B's dtype: with fp32 lora_B it has bits that a 16-bit dB
    could not have.
    """
    inputs = draw_operands(64, 32, 48, 6, dtype, triton_only, factor_dtype=torch.float32)
    z = reference.forward(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, None, 1.0)[1]
    dB = ops.backward_lora_B(inputs.dy, z, inputs.lora_B, "triton")
    exact, plain = (inputs.dy.to(wide).T @ z.to(wide) for wide in (torch.float64, torch.float32))
    check_budget({"dB": dB}, {"dB": exact}, {"dB": plain})
