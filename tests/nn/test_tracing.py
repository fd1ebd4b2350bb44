"""What reads off the operations of a model: jit.trace, TensorBoard's graph, ONNX, torch.export."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFAGeGLU,
    LoRAFALinear,
    LoRAFALinearGroup,
    LoRAFASwiGLU,
    apply_lorafa,
    lorafa_parameters,
)
from lorafa_kernels.checks.budget import allowed_error

pytestmark = pytest.mark.numerics


class Norm(nn.Module):
    """Llama's."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(32)), 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return torch.tanh(self.q(x)) * self.k(x)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Pair(nn.Module):
    """A group, whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.group = LoRAFALinearGroup.from_linears(
            [nn.Linear(32, 32), nn.Linear(32, 32)], r=8, share_A=True, init_lora_weights=False
        )

    def forward(self, x):
        first, second = self.group(x)
        return first * second


def whole_model():
    parts = nn.Sequential(nn.Linear(32, 32), Norm(), Block(), Norm(), MLP())
    model = apply_lorafa(parts, LoRAFAConfig(target_modules="all-linear", r=8, init_lora_weights=False))
    assert sum(block.fused for block in model.lorafa_report.blocks) == 4
    return model


BUILDS = {
    "layer": lambda: LoRAFALinear(32, 32, r=8, init_lora_weights=False),
    "group": Pair,
    "SwiGLU": lambda: LoRAFASwiGLU(32, 48, r=8, init_lora_weights=False),
    "GeGLU": lambda: LoRAFAGeGLU(32, 48, r=8, approximate="tanh", init_lora_weights=False),
    "model": whole_model,
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[case]()


def outcome(function, model, x) -> dict[str, torch.Tensor]:
    """y, dx and the gradients of lora_B."""
    for parameter in lorafa_parameters(model):
        parameter.grad = None
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.square().sum().backward()
    gradients = {f"dB{i}": p.grad.clone() for i, p in enumerate(lorafa_parameters(model))}
    return {"y": y.detach(), "dx": leaf.grad} | gradients


def assert_alike(got, model, x) -> None:
    """Within the error budget of what the model itself computes."""
    want = outcome(model, model, x)
    exact = outcome(wide := build_wide(model), wide, x.double())
    assert got.keys() == want.keys() == exact.keys()
    for name, tensor in got.items():
        scale = exact[name].norm()
        error, plain = ((t.double() - exact[name]).norm() / scale for t in (tensor, want[name]))
        assert error <= allowed_error(plain.item(), tensor.dtype), name


def build_wide(model):
    return copy.deepcopy(model).double()


@torch.no_grad()
def assert_same_y(got, model, x) -> None:
    exact = build_wide(model)(x.double())
    error, plain = ((t.double() - exact).norm() / exact.norm() for t in (got, model(x)))
    assert error <= allowed_error(plain.item(), x.dtype)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", BUILDS)
def test_a_trace_computes_and_trains_as_the_model(case, training):
    model = build(case).train(training)
    x, other = torch.randn(64, 32), torch.randn(80, 32)
    traced = torch.jit.trace(model, (x,))
    for rows in (x, other):
        assert_alike(outcome(traced, model, rows), model, rows)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert torch.equal(loaded(other), traced(other))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert (
        kinds
        and all(kind.startswith(("aten::", "prim::")) for kind in kinds)
        and "prim::PythonOp" not in kinds
    )


@pytest.mark.filterwarnings("ignore")
def test_a_trace_in_training_mode_drops_as_the_layer_does():
    torch.manual_seed(0)
    layer = LoRAFALinear(6, 6, r=6, lora_dropout=0.5, init_lora_weights=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.lora_A.copy_(torch.eye(6))
        layer.lora_B.copy_(torch.eye(6) / layer.scaling)
    x = torch.ones(4000, 6)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    y = traced(x)
    # Each element is dropped or doubled: 24,000 draws, within five standard errors of a half.
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs(y.mean().item() - 1) < 5 / 24000**0.5
    assert not torch.equal(traced(x), y)
    traced.eval()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", ["layer", "model"])
def test_an_exported_program_computes_as_the_model(case, training):
    model = build(case).train(training)
    x = torch.randn(64, 32)
    rows = torch.export.Dim("rows", min=2, max=1024)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    other = torch.randn(80, 32)
    assert_same_y(program.module()(other), model, other)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", BUILDS)
def test_an_onnx_exporter_meets_known_operations_only(case, training, monkeypatch):
    """What torch.onnx.export(dynamo=True) does before it translates, with the flag that it sets."""
    model = build(case).train(training)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    x = torch.randn(64, 32)
    program = torch.export.export(model, (x,), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets), targets
    assert_same_y(program.module()(x), model, x)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["layer", "model"])
def test_onnx_end_to_end(case, tmp_path):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="which computes what was exported")
    model = build(case).eval()
    x = torch.randn(64, 32)
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same_y(torch.from_numpy(y), model, x)


def test_tensorboard_draws_the_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="the writer needs tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(build("model").train(), torch.randn(4, 32))
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("case", BUILDS)
def test_while_torch_compile_traces_nothing_breaks(case):
    model = build(case)
    x = torch.randn(64, 32)
    assert_same_y(torch.compile(model, backend="eager", fullgraph=True)(x), model, x)
