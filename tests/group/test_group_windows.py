"""Layers that share an input are computed together only where nothing can change that input, or a layer,
between their calls without a trace: a write through `.data` changes no version.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters
from lorafa_kernels.model.placing import members as members_module

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings("ignore:.*reads the weight in one place:UserWarning"),
]

WIDTH, INNER = 6, 8


def double(x):
    x.data.mul_(2)


def double_and_return(x):
    x.data.mul_(2)
    return x


class Doubling(nn.Module):
    def forward(self, x):
        double(x)
        return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.norm, self.doubling, self.identity = nn.LayerNorm(INNER), Doubling(), nn.Identity()
        self.functions, self.heads, self.last = [double], 2, None

    def double_key(self):
        self.k.weight.data.mul_(2)

    def double_kept(self):
        self.last.data.mul_(2)

    def double_given(self, unused, x):
        y = x.view(-1)
        y.data.mul_(2)

    def split(self, y, rows):
        return y.view(*rows, self.heads, -1).transpose(-2, -3).contiguous()

    def splitting(self, x):
        return self.split(x, x.shape[:-1])

    @property
    def doubled(self):
        self.k.weight.data.mul_(2)
        return 1


class Data(Attention):
    def forward(self, x):
        q = self.q(x)
        x.data.mul_(2)
        return q * self.k(x)


class DataOfAView(Attention):
    def forward(self, x):
        y = x.view(-1)
        q = self.q(x)
        y.data.mul_(2)
        return q * self.k(x)


class DataOfALaterView(Attention):
    def forward(self, x):
        q, y = self.q(x), x.detach()
        y.data.mul_(2)
        return q * self.k(x)


class DataHeld(Attention):
    def forward(self, x):
        data = x.data
        q = self.q(x)
        data.mul_(2)
        return q * self.k(x)


class InAFunction(Attention):
    def forward(self, x):
        q = self.q(x)
        double(x)
        return q * self.k(x)


class InAFunctionByName(Attention):
    def forward(self, x):
        q = self.q(x)
        double(x=x)
        return q * self.k(x)


class InAList(Attention):
    def forward(self, x):
        held = [x]
        q = self.q(x)
        double(*held)
        return q * self.k(x)


class InAnExpression(Attention):
    def forward(self, x):
        return self.q(x) * double_and_return(x)[..., :1] * self.k(x)


class InAFunctionOfItsOwn(Attention):
    def forward(self, x):
        q = self.q(x)
        self.functions[0](x)
        return q * self.k(x)


class InAChild(Attention):
    def forward(self, x):
        q = self.q(x)
        self.doubling(x)
        return q * self.k(x)


class InAMethod(Attention):
    def forward(self, x):
        q = self.q(x)
        self.double_given(None, x)
        return q * self.k(x)


class OfAWeightInAMethod(Attention):
    def forward(self, x):
        q = self.q(x)
        self.double_key()
        return q * self.k(x)


class OfAWeightInAProperty(Attention):
    def forward(self, x):
        q = self.q(x) * self.doubled
        return q * self.k(x)


class OfAWeightInAFunction(Attention):
    def forward(self, x):
        q = self.q(x)
        Attention.double_key(self)
        return q * self.k(x)


class Kept(Attention):
    def forward(self, x):
        self.last = x
        q = self.q(x)
        self.double_kept()
        return q * self.k(x)


class InABranch(Attention):
    def forward(self, x):
        q = self.q(x)
        if self.heads:
            for _ in range(1):
                x.data.mul_(2)
        return q * self.k(x)


class ThroughAClosure(Attention):
    def forward(self, x):
        def change():
            x.data.mul_(2)

        q = self.q(x)
        change()
        return q * self.k(x)


class ThroughAnIdentity(Attention):
    def forward(self, x):
        y = self.identity(x)
        q = self.q(x)
        y.data.mul_(2)
        return q * self.k(x)


class ThroughAPartial(Attention):
    def forward(self, x):
        change = functools.partial(double, x)
        q = self.q(x)
        change()
        return q * self.k(x)


class ThroughALambda(Attention):
    def forward(self, x):
        change = lambda: x.data.mul_(2) + 1  # noqa: E731
        q = self.q(x)
        change()
        return q * self.k(x)


class ThroughMemory(Attention):
    def forward(self, x):
        q = self.q(x)
        x.detach().numpy()[:] *= 2
        return q * self.k(x)


class ByExec(Attention):
    def forward(self, x):
        q = self.q(x)
        exec("x.data.mul_(2)")
        return q * self.k(x)


UNSAFE = [
    *(Data, DataOfAView, DataOfALaterView, DataHeld, InAFunction, InAFunctionByName, InAList, InAnExpression),
    *(
        InAFunctionOfItsOwn,
        InAChild,
        InAMethod,
        OfAWeightInAMethod,
        OfAWeightInAProperty,
        OfAWeightInAFunction,
    ),
    *(
        Kept,
        InABranch,
        ThroughAClosure,
        ThroughAnIdentity,
        ThroughAPartial,
        ThroughALambda,
        ThroughMemory,
        ByExec,
    ),
]


def adapted(kind, fuse=True):
    torch.manual_seed(1)
    config = LoRAFAConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    return apply_lorafa(nn.Sequential(kind()).double(), config, fuse=fuse)


def inputs():
    return torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def calls(monkeypatch):
    made, function = [], members_module.lorafa_linear_group
    monkeypatch.setattr(
        members_module, "lorafa_linear_group", lambda *a, **k: (made.append(1), function(*a, **k))[1]
    )
    return made


@pytest.mark.parametrize("kind", UNSAFE, ids=lambda kind: kind.__name__)
def test_layers_are_not_grouped_where_their_input_may_change(kind, calls):
    model = adapted(kind)
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "shared input")
    assert not block.fused and block.reason
    # By themselves, in the same order: bit by bit.
    assert torch.equal(model(inputs()), adapted(kind, fuse=False)(inputs()))
    assert calls == []


class Plain(Attention):
    def forward(self, x):
        return self.q(x) * self.k(x)


class Views(Attention):
    def forward(self, x):
        shape = x.shape[:-1]
        q = self.q(x).view(*shape, self.heads, -1).transpose(-2, -3)
        rows = x.reshape(-1, WIDTH).size(0)
        k = self.k(x).view(*shape, self.heads, -1).transpose(-2, -3)
        return q * k + rows


class OtherNumbers(Attention):
    def forward(self, x):
        q = self.q(x)
        q *= 2
        q[0] = 1
        q.data.add_(1)
        assert isinstance(x, torch.Tensor) and x.dtype == q.dtype and len(x) == 3
        return q * self.k(x)


class ChildrenOfResults(Attention):
    def forward(self, x):
        q = self.norm(self.q(x))
        q = self.identity(q) + torch.cat([x, x], -1)[..., :INNER] + F.silu(x)[..., :1]
        return q * self.norm(self.k(x))


class OtherLinears(Attention):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, INNER)

    def forward(self, x):
        q = self.q(x) + self.other(x)
        return q * self.k(x)


class Methods(Attention):
    def forward(self, x):
        shape = x.shape[:-1]
        q = self.split(self.q(x), shape)
        return q * self.split(self.k(x), shape)


class MethodOfTheInput(Attention):
    def forward(self, x):
        q = self.q(x)
        rows = self.splitting(x).shape[0]
        return q * self.k(x) + rows


class Afterwards(Attention):
    def forward(self, x):
        q = self.q(x)
        k = self.k(x)
        double(x)
        return q * k + x[..., :1]


class Before(Attention):
    def forward(self, x):
        double(x)
        return self.q(x) * self.k(x)


SAFE = [
    Plain,
    Views,
    OtherNumbers,
    ChildrenOfResults,
    OtherLinears,
    Methods,
    MethodOfTheInput,
    Afterwards,
    Before,
]


@pytest.mark.parametrize("kind", SAFE, ids=lambda kind: kind.__name__)
def test_layers_are_grouped_where_forward_only_looks_at_their_input(kind, calls):
    model, plain = adapted(kind), adapted(kind, fuse=False)
    (block,) = (block for block in model.lorafa_report.blocks if block.kind == "shared input")
    assert block.fused and block.layers == ("q", "k")
    model(inputs())
    assert calls == [1]
    assert model[0].q._lorafa_group._local.waiting is None
    assert plain(inputs()).shape == model(inputs()).shape


def test_outputs_do_not_wait_for_whoever_calls_a_layer_from_elsewhere(calls):
    """Nobody has read what happens between two of those calls."""
    layers = [adapted(Plain, fuse)[0] for fuse in (True, False)]
    found = []
    for attention in layers:
        x = inputs()
        found.append(attention.q(x))
        x.data.mul_(2)
        found.append(attention.k(x))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert calls == []


class Failing(Attention):
    fails = False

    def forward(self, x):
        q = self.q(x)
        if self.fails:
            raise KeyError
        return q * self.k(x)


def test_outputs_that_an_exception_left_behind_are_not_taken(calls):
    found = []
    for fuse in (True, False):
        model, x = adapted(Failing, fuse), inputs()
        model[0].fails = True
        with pytest.raises(KeyError):
            model(x)
        model[0].fails = False
        x.data.mul_(2)
        found.append([model[0].k(x).detach(), model(x).detach()])
    assert torch.equal(found[0][0], found[1][0])
    changed = inputs().mul_(2)
    assert torch.equal(found[0][1], adapted(Failing)(changed))


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: model], ids=["deepcopy", "itself"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_is_known_in_copies_and_checkpoints(copying, reentrant, calls):
    model = copying(adapted(Views))
    x = inputs().requires_grad_()
    wanted = torch.autograd.grad(model(x).sum(), lorafa_parameters(model))
    del calls[:]
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    # Reentrant checkpointing runs forward without gradients first.
    assert calls == [1] * (1 if reentrant else 2)
    assert all(map(torch.equal, (p.grad for p in lorafa_parameters(model)), wanted))
