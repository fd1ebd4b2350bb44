"""Blocks are recognised by what a forward computes, however it is written, and nothing more than that is
fused.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from accuracy import check_budget
from torch import nn

from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.merge import unload_adapter
from lorafa_kernels.model.placing.projections import shared_inputs
from lorafa_kernels.model.placing.recognise import identify_activation, recognise_mlp, recognise_norm
from lorafa_kernels.model.placing.symbolic import Untraceable
from lorafa_kernels.model.saved import lorafa_parameters

WIDTH, INNER = 6, 10


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)
        self.act, self.dropout, self.none = nn.SiLU(), nn.Dropout(0.0), nn.Identity()
        self.relu, self.limit, self.factor, self.activation = nn.ReLU(), 5.0, 0.5, F.silu
        self.tanh = functools.partial(F.gelu, approximate="tanh")
        self.half_dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swapped(Gated):
    def forward(self, hidden_states):
        up = self.up(hidden_states)
        gate = self.act(self.gate(hidden_states))
        return self.down(torch.mul(up, gate))


class Functional(Gated):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attribute(Gated):
    def forward(self, x):
        return self.down(self.activation(self.gate(x)).mul(self.up(x)))


class Partial(Gated):
    def forward(self, x):
        return self.down(self.tanh(self.gate(x)) * self.up(x))


class Helper(Gated):
    @property
    def gating(self):
        return self.gate

    def inner(self, x, scale=None):
        y = self.act(self.gating(x)) * self.up(x)
        return y if scale is None else y * scale

    def forward(self, x, scale=None):
        return self.down(self.inner(x, scale))


class NoDropout(Gated):
    def forward(self, x):
        return self.none(self.down(self.dropout(self.act(self.gate(x)) * self.up(x))))


def nodes(y):
    """Names of the autograd nodes that y comes from, without its leaves."""
    found, waiting = {}, [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = node.name()
            waiting += [before for before, _ in node.next_functions]
    return [name for name in found.values() if "AccumulateGrad" not in name]


MLPS = {
    Gated: ("silu", ("act",)),
    Swapped: ("silu", ("act",)),
    Functional: ("silu", ()),
    Attribute: ("silu", ()),
    Partial: ("gelu_tanh", ()),
    Helper: ("silu", ("act",)),
    NoDropout: ("silu", ("act", "dropout", "none")),
}


@pytest.mark.parametrize("kind", MLPS, ids=lambda kind: kind.__name__)
def test_a_gated_mlp_is_recognised_however_it_is_written(kind):
    roles = recognise_mlp(kind())
    activation, others = MLPS[kind]
    assert (roles.gate, roles.up, roles.down) == ("gate", "up", "down")
    assert roles.activation == activation and tuple(name for name, _ in roles.others) == others
    assert roles.input == ("hidden_states" if kind is Swapped else "x")


@pytest.mark.numerics
@pytest.mark.parametrize("kind", MLPS, ids=lambda kind: kind.__name__)
def test_a_recognised_mlp_computes_the_same_when_fused(kind):
    # Enough ranks and rows for outputs of 256 elements.
    config = LoRAFAConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    plain = apply_lorafa(nn.Sequential(kind()), config, fuse=False, norm=False)
    fused = apply_lorafa(nn.Sequential(kind()), config)
    fused.load_state_dict(plain.state_dict())
    exact = copy.deepcopy(plain).double()
    assert [block.kind for block in fused.lorafa_report.blocks if block.fused] == ["MLP"]
    x, dy = torch.randn(7, 9, WIDTH), torch.randn(7, 9, WIDTH)
    found, names = [], []
    for model in (plain, fused, exact):
        of_model = x.to(next(model.parameters()).dtype).requires_grad_()
        y = model(of_model)
        wanted = (of_model, *lorafa_parameters(model))
        dx, *dBs = torch.autograd.grad(y, wanted, dy.to(y.dtype))
        found.append({"y": y.detach(), "dx": dx, "dB": torch.cat([dB.flatten() for dB in dBs])})
        names.append(nodes(y))
    check_budget(got=found[1], exact=found[2], plain=found[0])
    assert names[1].count("LoRAFAGatedMLPFunctionBackward") == 1 and len(names[1]) < len(names[0])


@pytest.mark.numerics
def test_a_dropout_that_is_turned_on_later_acts():
    model = apply_lorafa(nn.Sequential(NoDropout()), LoRAFAConfig(target_modules=["gate"]))
    x = torch.randn(4, WIDTH)
    assert "LoRAFAGatedMLPFunctionBackward" in nodes(model(x))
    model[0].dropout.p = 1.0
    assert torch.equal(model(x), model[0].down.bias.expand(4, WIDTH))


class Clamped(Gated):
    def forward(self, x):
        gate = self.gate(x).clamp(max=self.limit)
        return self.down(self.act(gate) * self.up(x))


class Scaled(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) * self.factor


class Shifted(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * (self.up(x) + 1))


class Residual(Gated):
    def forward(self, x):
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class Dropping(Gated):
    def forward(self, x):
        return self.half_dropout(self.down(self.act(self.gate(x)) * self.up(x)))


class FunctionalDropping(Gated):
    def forward(self, x):
        return self.down(F.dropout(self.act(self.gate(x)) * self.up(x), 0.1, True))


class Twice(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.gate(x))


class Crossed(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(self.gate(x)))


class TwoActivations(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


class Rectified(Gated):
    def forward(self, x):
        return self.down(self.relu(self.gate(x)) * self.up(x))


class InPlace(Gated):
    def forward(self, x):
        y = self.act(self.gate(x))
        y *= self.up(x)
        return self.down(y)


class InPlaceMethod(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)).mul_(self.up(x)))


class Training(Gated):
    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return self.down(F.dropout(y) if self.training else y)


class Branch(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) if x.sum() > 0 else x


class Shape(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) if x.shape[0] > 1 else x


class Noting(Gated):
    def forward(self, x):
        self.last = x
        return self.down(self.act(self.gate(x)) * self.up(x))


class Unused(Gated):
    def forward(self, x):
        self.relu(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class Inside(Gated):
    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return self.down(y.to(self.down.weight.dtype))


class TwoInputs(Gated):
    def forward(self, x, residual):
        return self.down(self.act(self.gate(x)) * self.up(x)) + residual


class Chunked(Gated):
    def forward(self, x):
        gate, up = self.gate(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Tuple(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)), None


class Checking(Gated):
    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return self.down(y) if isinstance(y, torch.Tensor) else y


class Power(Gated):
    """torch.pow reads the memory of what passes for a tensor and has no __torch_function__ of one."""

    def forward(self, x):
        return self.down(torch.pow(self.act(self.gate(x)), -0.5) * self.up(x))


class Concatenating(Gated):
    def forward(self, x):
        return self.down(torch.cat([self.gate(x), self.up(x)], -1))


class Super(Gated):
    def forward(self, x):
        return super().forward(x)


NO_MLP = {
    Clamped: r"it also computes clamp",
    Scaled: r"it also computes mul \(0\.5\)",
    Shifted: r"it also computes add \(1\)",
    Residual: r"it also computes add",
    Dropping: r"it also computes half_dropout \(Dropout with p=0\.5\)",
    FunctionalDropping: r"it also computes dropout",
    Twice: r"not that of a gated MLP",
    Crossed: r"not that of a gated MLP",
    TwoActivations: r"not that of a gated MLP",
    Rectified: r"uses the activation relu \(ReLU\), which is none of silu, ",
    InPlace: r"in place",
    InPlaceMethod: r"in place \(mul_\)",
    Training: r"reads self\.training",
    Branch: r"decides by",
    Shape: r"decides by",
    Noting: r"sets self\.last",
    Unused: r"also computes relu \(ReLU\), which it does not return",
    Inside: r"reads down\.weight",
    TwoInputs: r"takes 2 inputs",
    Chunked: r"unpacks the result of chunk",
    Tuple: r"does not return one tensor",
    Checking: r"asks for the type of its input",
    Power: r"asks for the type of its input|it also computes pow \(-0\.5\)",
    Concatenating: r"passes a list of tensors to cat",
    Super: r"cannot be followed",
}


@pytest.mark.parametrize("kind", NO_MLP, ids=lambda kind: kind.__name__)
def test_what_does_more_is_left_alone_and_the_reason_names_it(kind):
    with pytest.raises(Untraceable, match=NO_MLP[kind]):
        recognise_mlp(kind())


@pytest.mark.parametrize("kind", [Clamped, Scaled, Dropping, Rectified], ids=lambda kind: kind.__name__)
def test_the_report_says_why_a_block_was_left_alone(kind):
    model = apply_lorafa(nn.Sequential(kind()), LoRAFAConfig(target_modules=["gate", "down"]))
    (block,) = model.lorafa_report.blocks
    assert (block.name, block.kind, block.module, block.fused) == ("0", "MLP", kind.__name__, False)
    with pytest.raises(Untraceable) as error:
        recognise_mlp(kind())
    assert block.reason == f"its forward {error.value}"
    assert f"not fused, computed as before:\n     1 x {kind.__name__}, MLP: {block.reason}" in str(
        model.lorafa_report
    )
    assert type(model[0]) is kind


def test_other_layers_in_the_roles_are_left_alone():
    class Other(nn.Linear):
        pass

    mlp = Gated()
    mlp.up = Other(WIDTH, INNER)
    with pytest.raises(Untraceable, match=r"a layer of another class, up \(Other\)"):
        recognise_mlp(mlp)


def test_tracing_leaves_no_mark():
    for kind in (Gated, Noting, InPlace):
        mlp = kind()
        before = {name: id(value) for name, value in vars(mlp).items()}
        try:
            recognise_mlp(mlp)
        except Untraceable:
            assert kind is not Gated
        assert {name: id(value) for name, value in vars(mlp).items()} == before


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.epsilon, self.bias = nn.Parameter(torch.rand(WIDTH)), 1e-5, None

    def forward(self, hidden):
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.epsilon)).to(dtype)


class NormOtherwise(Norm):
    def forward(self, x):
        wide = x.float()
        scale = (self.epsilon + wide.square().mean(dim=(-1,), keepdim=True)).rsqrt()
        return (scale * wide).type_as(x) * self.weight


class NormPlusOne(Norm):
    def normal(self, x):
        return x * torch.rsqrt(torch.mean(x**2, -1, True) + self.epsilon)

    def forward(self, x):
        return (self.normal(x.float()) * (self.weight.float() + 1.0)).type_as(x)


class NormByWeight(Norm):
    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


NORMS = {Norm: "llama", NormOtherwise: "llama", NormPlusOne: "gemma", NormByWeight: "t5"}


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_an_rms_norm_is_recognised_however_it_is_written(kind):
    roles = recognise_norm(kind())
    assert (roles.form, roles.weight, roles.eps) == (NORMS[kind], "weight", "epsilon")


@pytest.mark.numerics
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_a_recognised_norm_computes_the_same_when_fused(kind, weight_dtype):
    model = nn.ModuleDict({"norm": kind().to(weight_dtype), "linear": nn.Linear(WIDTH, WIDTH)})
    x = torch.randn(3, 5, WIDTH).bfloat16().requires_grad_()
    wanted = model["norm"](x)
    apply_lorafa(model, LoRAFAConfig(target_modules=["linear"]))
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "norm")
    assert block.fused
    got = model["norm"](x)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    assert nodes(got) == ["RMSNormFunctionBackward"]
    model["norm"].epsilon = 1.0
    assert not torch.equal(model["norm"](x), wanted)


class NormWithBias(Norm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype) + 1


class NormCentred(Norm):
    def forward(self, x):
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)).to(
            x.dtype
        )


class NormRoundedOnce(Norm):
    def forward(self, x):
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon))).to(
            x.dtype
        )


class NormOfRows(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + self.epsilon)).to(
            x.dtype
        )


class NormLiteral(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class NormAsking(Norm):
    """Another one once its weight is bf16."""

    def forward(self, x):
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        y = self.weight * (wide * rstd).to(x.dtype)
        return y * 2 if self.weight.dtype == torch.bfloat16 else y


NO_NORM = {
    NormAsking: r"it also computes mul \(2\)",
    NormWithBias: r"it also computes add \(1\)",
    NormCentred: "it also computes",
    NormRoundedOnce: "not that of a known RMS norm",
    NormOfRows: "not that of a known RMS norm",
    NormLiteral: "eps from outside",
}


@pytest.mark.parametrize("kind", NO_NORM, ids=lambda kind: kind.__name__)
def test_other_norms_are_left_alone(kind):
    with pytest.raises(Untraceable, match=NO_NORM[kind]):
        recognise_norm(kind())


def test_a_norm_that_is_trained_is_left_alone():
    model = nn.ModuleDict({"norm": Norm(), "linear": nn.Linear(WIDTH, WIDTH)})
    apply_lorafa(model, LoRAFAConfig(target_modules=["linear"], modules_to_save=["norm"]))
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "norm")
    assert block.reason == "its weight is trained" and type(model["norm"]) is Norm


class Thawed(nn.Module):
    """A norm and an MLP in a row."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = Norm(), Gated()

    def forward(self, x):
        return self.mlp(self.norm(x))


def test_what_is_thawed_later_is_trained_by_its_own_forward():
    model = apply_lorafa(Thawed(), LoRAFAConfig(target_modules=["gate"]))
    assert all(block.fused for block in model.lorafa_report.blocks)
    model.norm.weight.requires_grad_(True)
    model.mlp.down.weight.requires_grad_(True)
    x = torch.randn(4, WIDTH, requires_grad=True)
    model(x).sum().backward()
    assert model.norm.weight.grad is not None and model.mlp.down.weight.grad is not None
    model.mlp.gate.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="weight requires grad"):
        model(x)


def test_mlps_are_fused_where_none_of_their_layers_is_adapted():
    model = nn.ModuleDict({"mlp": Gated(), "linear": nn.Linear(WIDTH, WIDTH)})
    apply_lorafa(model, LoRAFAConfig(target_modules=["linear"]))
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "MLP")
    assert block.fused and block.layers == ("gate", "up", "down") and type(model["mlp"]) is not Gated
    unload_adapter(model)
    assert type(model["mlp"]) is Gated and not [n for n in vars(model["mlp"]) if "lorafa" in n]


def test_an_mlp_that_is_trained_is_left_alone():
    model = nn.ModuleDict({"mlp": Gated(), "linear": nn.Linear(WIDTH, WIDTH)})
    apply_lorafa(model, LoRAFAConfig(target_modules=["linear"], modules_to_save=["mlp"]))
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "MLP")
    assert block.reason == "gate.weight is trained" and type(model["mlp"]) is Gated


@pytest.mark.parametrize(("fuse", "norm"), [(True, True), (True, False), (False, True), (False, False)])
def test_fuse_and_norm_turn_blocks_off(fuse, norm):
    model = apply_lorafa(Thawed(), LoRAFAConfig(target_modules=["gate"]), fuse=fuse, norm=norm)
    kinds = {block.kind for block in model.lorafa_report.blocks}
    assert kinds == ({"MLP"} if fuse else set()) | ({"norm"} if norm else set())
    assert (type(model.mlp) is Gated, type(model.norm) is Norm) == (not fuse, not norm)


class Capped(nn.Module):
    """silu, but for numbers that no test with small ones meets."""

    def forward(self, x):
        return F.silu(x).clamp(max=1e5)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.SiLU(), "silu"),
        (Capped(), None),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), None),
        (nn.Sigmoid(), None),
        (nn.Mish(), None),
        (nn.SiLU(inplace=True), None),
        (nn.PReLU(), None),
        (nn.Identity(), None),
    ],
    ids=str,
)
def test_activations_are_identified(module, name):
    assert identify_activation(module) == name


def test_activations_of_transformers_are_identified():
    activations = pytest.importorskip(
        "transformers.activations", reason="the classes are transformers'"
    ).ACT2FN
    found = {name: identify_activation(activations[name]) for name in activations if name != "xielu"}
    assert {name: known for name, known in found.items() if known} == {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_fast": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
    }


class Straight:
    def forward(self, x, mask=None):
        q = self.q(x).view(1)
        k, v = self.k(x), self.v(x).view(1)
        return self.o(q + k + v)

    names = (("q", "k", "v"),)


class Rebound:
    def forward(self, x):
        q = self.q(x)
        x = self.k(x)
        return q, self.v(x), self.w(x)

    names = (("q", "k"), ("v", "w"))


class TwoSources:
    def forward(self, x, other):
        q, k, v = self.q(x), self.k(other), self.v(other)
        return q, k, v, self.o(x)

    names = (("q", "o"), ("k", "v"))


class Cached:
    def forward(self, x, other, cache):
        q = self.q(x)
        current = other if other is not None else x
        if cache:
            k, v = cache
        else:
            k = self.k(current)
            v = self.v(current)
        return q, k, v

    names = (("k", "v"),)


class BothBranches:
    def forward(self, x, other):
        q = self.q(x)
        if other is None:
            k, v = self.k(x), self.v(x)
        else:
            k, v = self.k(other), self.v(other)
        return q, k, v

    names = ()


class Conditional:
    def forward(self, x, flag):
        q = self.q(x)
        k = self.k(x) if flag else q
        v = flag and self.v(x)
        return q, k, v

    names = ()


class Leaving:
    def forward(self, x, flag):
        q = self.q(x)
        if flag:
            return q
        return q, self.k(x), self.v(x)

    names = (("k", "v"),)


class Looping:
    def forward(self, xs):
        for x in xs:
            y = self.q(x) + self.k(x)
        return y

    names = (("q", "k"),)


class InnerFunction:
    def forward(self, x):
        def inner(x):
            return self.q(x) + self.k(x)

        return inner(x) + self.v(x) + (lambda x: self.w(x))(x)

    names = ()


class OtherUse:
    def forward(self, x):
        return self.q(x), self.k(x), self.v(x).to(self.v.weight.dtype)

    names = (("q", "k"),)


class OtherArguments:
    def forward(self, x):
        return self.q(x), self.k(x, 1), self.v(x=x), self.w(x + 1), self.u(self.t(x)), self.k

    names = (("q", "t"),)


class ContextManager:
    def forward(this, x):
        q = this.q(x)
        with torch.no_grad():
            k, v = this.k(x), this.v(x)
        return q, k, v, this.w(x)

    names = (("q", "w"), ("k", "v"))


SOURCES = [
    Straight,
    Rebound,
    TwoSources,
    Cached,
    BothBranches,
    Conditional,
    Leaving,
    Looping,
    InnerFunction,
    OtherUse,
    OtherArguments,
    ContextManager,
]


@pytest.mark.parametrize("kind", SOURCES, ids=lambda kind: kind.__name__)
def test_layers_that_share_an_input_are_read_from_the_source(kind):
    assert set(shared_inputs(kind)) == set(kind.names)


def test_a_forward_without_source_shares_nothing():
    names = {}
    exec("class NoSource:\n def forward(self, x):\n  return self.q(x), self.k(x)", names)
    assert shared_inputs(names["NoSource"]) == ()
