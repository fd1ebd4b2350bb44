"""A layer that a block cannot stand in for is computed by its own forward, with everything that this says
about it: a parameter that was thawed, weights of several dtypes, another autocast than its neighbours saw.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same, check_budget
from torch import nn

from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.placing import fused as fused_module
from lorafa_kernels.model.placing import members as members_module

pytestmark = pytest.mark.numerics
WIDTH, INNER = 6, 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, INNER) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def adapted(kind, targets, fuse=True):
    """The same module each time, its layers in a block or each by itself."""
    torch.manual_seed(1)
    config = LoRAFAConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    return apply_lorafa(nn.Sequential(kind()), config, fuse=fuse)[0]


def gradients(module, x, autocast=None):
    """y, and the gradients of x and of what is trained."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = module(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), (x, *trained(module)))]


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@pytest.fixture
def x():
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def calls(monkeypatch):
    """Names of the blocks that were computed. Whoever calls a layer passes for its module's forward here:
    that only this one finds outputs waiting would hide what else they depend on.
    """
    monkeypatch.setattr(members_module, "is_called_by", lambda code: True)
    found = []
    for module, name in ((members_module, "lorafa_linear_group"), (fused_module, "lorafa_gated_mlp")):
        block = getattr(module, name)

        def counted(*args, block=block, name=name, **options):
            found.append(name)
            return block(*args, **options)

        monkeypatch.setattr(module, name, counted)
    return found


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A"])
def test_a_thawed_parameter_concerns_its_layer_alone(x, calls, name):
    module, alone = (adapted(Attention, ["q", "k", "v"], fuse) for fuse in (True, False))
    module(x)
    assert calls == ["lorafa_linear_group"]
    getattr(module.k, name).requires_grad_(True)
    assert_same([module.q(x), module.v(x)], [alone.q(x), alone.v(x)])
    with pytest.raises(ValueError, match=f"^{name} requires grad"):
        module.k(x)
    assert calls == ["lorafa_linear_group"]
    getattr(module.k, name).requires_grad_(False)
    module(x)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["gate", "up", "down"])
def test_a_thawed_parameter_of_a_plain_layer_is_trained(x, calls, layer, name):
    """That of a layer without an adapter in an MLP whose other layers have one."""
    targets = [other for other in ("gate", "up", "down") if other != layer]
    module, alone = (adapted(MLP, targets, fuse) for fuse in (True, False))
    gradients(module, x)
    assert calls == ["lorafa_gated_mlp"]
    for one in (module, alone):
        getattr(getattr(one, layer), name).requires_grad_(True)
    got, want = gradients(module, x), gradients(alone, x)
    assert len(got) == 2 + len(targets) + 1 and calls == ["lorafa_gated_mlp"]
    assert_same(got, want)


@pytest.mark.parametrize("layer", ["gate", "up", "down"])
def test_an_mlp_of_several_dtypes_runs_under_autocast(x, calls, layer):
    """As nn.Linear does there; a block takes weights of one dtype."""
    module, alone = (adapted(MLP, ["gate", "up", "down"], fuse) for fuse in (True, False))
    gradients(module, x, torch.bfloat16)
    assert calls == ["lorafa_gated_mlp"]
    for one in (module, alone):
        getattr(one, layer).to(torch.bfloat16)
    assert_same(gradients(module, x, torch.bfloat16), gradients(alone, x, torch.bfloat16))
    assert calls == ["lorafa_gated_mlp"]


@pytest.mark.parametrize("layer", ["q", "k", "v"])
def test_projections_of_several_dtypes_run_under_autocast(x, calls, layer):
    module, alone = (adapted(Attention, ["q", "k", "v"], fuse) for fuse in (True, False))
    gradients(module, x, torch.bfloat16)
    assert calls == ["lorafa_linear_group"]
    for one in (module, alone):
        getattr(one, layer).to(torch.bfloat16)
    assert_same(gradients(module, x, torch.bfloat16), gradients(alone, x, torch.bfloat16))
    assert calls == ["lorafa_linear_group"]


AUTOCASTS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("first", AUTOCASTS)
@pytest.mark.parametrize("then", AUTOCASTS)
def test_an_output_that_waits_is_for_the_autocast_it_was_computed_in(x, calls, first, then):
    """q computes k and v too; they take theirs in the same autocast only, of the same dtype."""
    module = adapted(Attention, ["q", "k", "v"])
    for layer, name in ((module.q, first), (module.k, then)):
        dtype = AUTOCASTS[name]
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = layer(x)
        dtype = dtype or torch.float32
        assert y.dtype == dtype
        exact, plain = (by_formula(layer, x, dtype, to) for to in (torch.float64, dtype))
        check_budget({"y": y}, {"y": exact}, {"y": plain})
    assert len(calls) == (1 if first == then else 2)


def by_formula(layer, x, own, to):
    """y of operands rounded to the dtype `own`, computed in `to`."""
    parameters = layer.weight, layer.bias, layer.lora_A, layer.lora_B
    rows, weight, bias, lora_A, lora_B = (t.detach().to(own).to(to) for t in (x, *parameters))
    return F.linear(rows, weight, bias) + layer.scaling * F.linear(F.linear(rows, lora_A), lora_B)
