"""A fused block holds as long as all that its forward read is what it was when it was recognised; a forward
that does more than to compute its result is not fused; and recognising runs nothing of the user's on live
objects.
"""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from saved import copied, pickled
from torch import nn

from lorafa_kernels import LoRAFAConfig, apply_lorafa, lorafa_parameters, unload_adapter
from lorafa_kernels.model.placing import fused as fused_module
from lorafa_kernels.model.placing.recognise import recognise_mlp
from lorafa_kernels.model.placing.shield import Untraceable
from lorafa_kernels.nn.linear import LoRAFALinear

pytestmark = pytest.mark.numerics

WIDTH, INNER = 6, 10
DOUBLE = False
FACTORS = types.SimpleNamespace(double=False)
LOG: list = []


def twice(x):
    return x * 2 if DOUBLE else x


class Gated(nn.Module):
    """An MLP whose down-projection may be doubled, by something that forward reads."""

    double = False

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.act, self.activation, self.shift = nn.SiLU(), F.silu, None
        self.config = types.SimpleNamespace(double=False)
        self.partial = functools.partial(F.gelu, approximate="none")

    def compute(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))

    def forward(self, x):
        return self.compute(x)


class OwnFlag(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y * 2 if self.double else y


class ConfigFlag(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y * 2 if self.config.double else y


class GlobalFlag(Gated):
    def forward(self, x):
        return twice(self.compute(x))


class GlobalObject(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y * 2 if FACTORS.double else y


class OptionalTensor(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y if self.shift is None else y + self.shift


class MissingAttribute(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y * 2 if getattr(self, "more", False) else y


class OwnFunction(Gated):
    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class OwnPartial(Gated):
    def forward(self, x):
        return self.down(self.partial(self.gate(x)) * self.up(x))


class ModuleFunction(Gated):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Default(Gated):
    def forward(self, x, double=False):
        y = self.compute(x)
        return y * 2 if double else y


class ScaledSiLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return F.silu(x) * self.scale


class OwnActivation(Gated):
    def __init__(self):
        super().__init__()
        self.act = ScaledSiLU()


class GELU(Gated):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()


def adapted(mlp, fuse=True):
    torch.manual_seed(2)
    model = nn.Sequential(mlp).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    config = LoRAFAConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    return apply_lorafa(model, config, fuse=fuse)


def results(model):
    x = torch.randn(
        3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y.sum(), (x, *lorafa_parameters(model)), allow_unused=True)
    return y, *(torch.zeros(0) if grad is None else grad for grad in found)


@pytest.fixture
def fused_calls(monkeypatch):
    made, function = [], fused_module.lorafa_gated_mlp
    monkeypatch.setattr(
        fused_module, "lorafa_gated_mlp", lambda *a, **k: (made.append(1), function(*a, **k))[1]
    )
    return made


def set_global(model, monkeypatch):
    monkeypatch.setitem(globals(), "DOUBLE", True)


CHANGES = {
    "own flag": (OwnFlag, lambda m, patch: setattr(m, "double", True)),
    "own flag, an equal value of another type": (OwnFlag, lambda m, patch: setattr(m, "double", 0)),
    "class flag": (OwnFlag, lambda m, patch: patch.setattr(OwnFlag, "double", True)),
    "flag of a configuration": (ConfigFlag, lambda m, patch: setattr(m.config, "double", True)),
    "another configuration": (
        ConfigFlag,
        lambda m, patch: setattr(m, "config", types.SimpleNamespace(double=True)),
    ),
    "global": (GlobalFlag, set_global),
    "attribute of a global": (GlobalObject, lambda m, patch: patch.setattr(FACTORS, "double", True)),
    "helper function": (GlobalFlag, lambda m, patch: patch.setitem(globals(), "twice", lambda x: 2 * x)),
    "code of a helper": (
        GlobalFlag,
        lambda m, patch: patch.setattr(twice, "__code__", (lambda x: 2 * x).__code__),
    ),
    "tensor that was None": (
        OptionalTensor,
        lambda m, patch: setattr(m, "shift", torch.ones(WIDTH, dtype=torch.float64)),
    ),
    "attribute that was missing": (MissingAttribute, lambda m, patch: setattr(m, "more", True)),
    "helper method": (OwnFlag, lambda m, patch: patch.setattr(Gated, "compute", lambda self, x: x)),
    "helper on the instance": (OwnFlag, lambda m, patch: setattr(m, "compute", lambda x: x)),
    "function of its own": (OwnFunction, lambda m, patch: setattr(m, "activation", F.relu)),
    "partial": (
        OwnPartial,
        lambda m, patch: setattr(m, "partial", functools.partial(F.gelu, approximate="tanh")),
    ),
    "function of torch": (ModuleFunction, lambda m, patch: patch.setattr(F, "silu", torch.relu)),
    "default of forward": (
        Default,
        lambda m, patch: patch.setattr(Default.forward, "__defaults__", (True,)),
    ),
    "attribute of the activation": (OwnActivation, lambda m, patch: setattr(m.act, "scale", 3.0)),
    "form of the activation": (GELU, lambda m, patch: setattr(m.act, "approximate", "tanh")),
    "forward of the activation's class": (
        OwnFlag,
        lambda m, patch: patch.setattr(nn.SiLU, "forward", lambda self, x: x),
    ),
    "forward of the layers' class": (
        OwnFlag,
        lambda m, patch: patch.setattr(type(m.up), "forward", lambda self, x: x @ self.weight.mT),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
def test_what_forward_reads_acts_when_it_is_changed_later(change, gradients, monkeypatch, fused_calls):
    kind, apply = CHANGES[change]
    fused, plain = adapted(kind()), adapted(kind(), fuse=False)
    before = results(fused)
    assert fused_calls == [1]
    for model in (fused, plain):
        apply(model[0], monkeypatch)
    if gradients:
        # The same operations in the same order: bit by bit.
        assert all(map(torch.equal, results(fused), results(plain)))
    else:
        with torch.no_grad():
            x = torch.ones(2, WIDTH, dtype=torch.float64)
            assert torch.equal(fused(x), plain(x))
    assert fused_calls == [1]
    monkeypatch.undo()
    assert len(before) == 5


def test_a_cell_that_forward_reads_acts_when_it_is_changed_later(fused_calls):
    double = False

    class Closure(Gated):
        def forward(self, x):
            y = self.compute(x)
            return y * 2 if double else y

    fused, plain = adapted(Closure()), adapted(Closure(), fuse=False)
    results(fused)
    assert fused_calls == [1]
    double = True
    assert all(map(torch.equal, results(fused), results(plain)))
    assert fused_calls == [1]


def test_a_flag_that_is_set_back_fuses_again(fused_calls):
    model = adapted(OwnFlag())
    results(model)
    model[0].double = True
    results(model)
    model[0].double = False
    results(model)
    assert fused_calls == [1, 1]


@pytest.mark.parametrize("copying", [copied, pickled], ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", [OwnFlag, ConfigFlag, GlobalFlag, OwnFunction, OwnPartial, OwnActivation])
def test_copies_are_fused_and_guarded(kind, copying, fused_calls, monkeypatch):
    model = adapted(kind())
    wanted = results(model)
    other = copying(model)
    del fused_calls[:]
    assert all(map(torch.equal, results(other), wanted))
    assert fused_calls == [1]
    other[0].double = other[0].config.double = True
    other[0].activation = other[0].partial = F.relu
    other[0].act.scale = 3.0
    set_global(other, monkeypatch)
    plain = adapted(kind(), fuse=False)
    plain[0].__dict__.update(double=True, activation=F.relu, partial=F.relu, config=other[0].config)
    plain[0].act.scale = 3.0
    assert all(map(torch.equal, results(other), results(plain)))
    assert fused_calls == [1]


def test_what_is_pickled_in_another_state_is_recognised_anew():
    model = adapted(OwnFlag())
    model[0].double = True
    other = pickled(model)
    assert all(map(torch.equal, results(other), results(model)))


class Appending(Gated):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.compute(x)


class AppendingToGlobal(Gated):
    def forward(self, x):
        LOG.append(x)
        return self.compute(x)


class AppendingInDefault(Gated):
    def forward(self, x, log=LOG):
        log.append(x)
        return self.compute(x)


class AppendingByBoundMethod(Gated):
    def __init__(self):
        super().__init__()
        self.note = LOG.append

    def forward(self, x):
        self.note(x)
        return self.compute(x)


class Counting(Gated):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.compute(x)


class CountingInConfig(Gated):
    def forward(self, x):
        self.config.double = 2
        return self.compute(x)


class SettingItem(Gated):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, x):
        self.seen["x"] = x
        return self.compute(x)


class SettingGlobal(Gated):
    def forward(self, x):
        global DOUBLE
        DOUBLE = False
        return self.compute(x)


class WithoutGradient(Gated):
    def forward(self, x):
        with torch.no_grad():
            return self.compute(x)


class Decorated(Gated):
    @torch.no_grad()
    def forward(self, x):
        return self.compute(x)


class Catching(Gated):
    def forward(self, x):
        try:
            self.config.double = 2
        except AttributeError:
            return x
        return self.compute(x)


class Seeding(Gated):
    def forward(self, x):
        torch.manual_seed(7)
        return self.compute(x)


class Printing(Gated):
    def forward(self, x):
        print("computing")
        return self.compute(x)


class Importing(Gated):
    def forward(self, x):
        import math  # noqa: F401

        return self.compute(x)


class Recorder:
    made = 0

    def __init__(self, x):
        Recorder.made += 1


class Making(Gated):
    def forward(self, x):
        Recorder(x)
        return self.compute(x)


class Hooking(Gated):
    def forward(self, x):
        x.register_hook(print)
        return self.compute(x)


class AskingTorch(Gated):
    def forward(self, x):
        y = self.compute(x)
        return y * 2 if torch.is_grad_enabled() else y


class Computed(Gated):
    @functools.cached_property
    def factor(self):
        LOG.append(self)
        return 1

    def forward(self, x):
        return self.compute(x) if self.factor == 1 else x


class NotingActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return F.silu(x)


class OtherActivation(Gated):
    def __init__(self):
        super().__init__()
        self.act = NotingActivation()


EFFECTS = {
    Appending: r"reads append of seen",
    AppendingToGlobal: r"reads append of LOG",
    AppendingInDefault: r"reads append of a default",
    AppendingByBoundMethod: r"calls note",
    Counting: r"sets self\.calls",
    CountingInConfig: r"sets double of config",
    SettingItem: r"changes seen",
    SettingGlobal: r"sets the global DOUBLE",
    WithoutGradient: r"has a with",
    Decorated: r"has a (try or )?with|calls|reads",
    Catching: r"has a try",
    Seeding: r"calls torch\.manual_seed",
    Printing: r"calls print",
    Importing: r"imports",
    Making: r"calls Recorder",
    Hooking: r"also computes register_hook, which it does not return",
    AskingTorch: r"calls torch\.is_grad_enabled",
    Computed: r"reads factor, a cached_property",
    OtherActivation: r"uses the activation act \(NotingActivation\)",
}


def live(mlp):
    """What a forward could have left behind."""
    seen = {name: repr(value) for name, value in vars(mlp).items() if not name.startswith("_")}
    return seen, list(LOG), Recorder.made, DOUBLE, torch.get_rng_state().tolist(), repr(vars(mlp.act))


@pytest.mark.parametrize("kind", EFFECTS, ids=lambda kind: kind.__name__)
def test_a_forward_that_does_more_is_left_alone_and_nothing_of_it_happens(kind, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(kind())
    before = live(model[0])
    copied = copy.deepcopy(model)
    state = torch.get_rng_state()
    apply_lorafa(model, LoRAFAConfig(target_modules=["gate"], init_lora_weights=True))
    torch.set_rng_state(state)
    assert not any(block.fused for block in model.lorafa_report.blocks if block.kind == "MLP")
    with pytest.raises(Untraceable, match=EFFECTS[kind]):
        recognise_mlp(model[0])
    assert live(model[0]) == before and capsys.readouterr().out == ""
    copy.deepcopy(model)
    assert type(copied[0]) is kind


@pytest.mark.parametrize("context", ["meta device", "fake tensors"])
def test_a_model_is_adapted_within_a_context_of_devices(context):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta") if context == "meta device" else FakeTensorMode():
        model = nn.Sequential(GELU())
        apply_lorafa(model, LoRAFAConfig(target_modules=["gate"]))
    assert [block.fused for block in model.lorafa_report.blocks] == [True]
    if context == "meta device":
        model = nn.Sequential(GELU())
        with torch.device("meta"):
            apply_lorafa(model, LoRAFAConfig(target_modules=["gate"]))
        assert model[0].gate.lora_A.device.type == "cpu"
        assert [block.fused for block in model.lorafa_report.blocks] == [True]


@pytest.mark.parametrize("merge", [True, False])
def test_a_forward_kept_while_fused_computes_after_unloading(merge):
    model = adapted(OwnFlag())
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    kept = model[0].forward
    unload_adapter(model, merge=merge)
    assert type(model[0]) is OwnFlag
    assert torch.equal(kept(x), model(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)

    def forward(self, x):
        q = self.q(x)
        k = self.k(x)
        return q + k


def test_a_members_forward_kept_while_grouped_computes_after_unloading():
    model = nn.Sequential(Attention()).double()
    apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["q", "k"], init_lora_weights=False))
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    kept, layer = model[0].q.forward, model[0].q
    wanted = LoRAFALinear.forward(layer, x)
    unload_adapter(model)
    assert torch.equal(kept(x), wanted) and torch.equal(type(layer).forward(layer, x), wanted)
