"""Whatever is done to a model with fused blocks, it computes what the same model without them computes, and
keeps nothing longer.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_same, check_budget
from processes import group, start
from saved import copied, pickled
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafa_kernels.model.adapt import apply_lorafa
from lorafa_kernels.model.config import LoRAFAConfig
from lorafa_kernels.model.merge import disable_adapter, merge_adapter, unload_adapter, unmerge_adapter
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.model.placing import fused as fused_module
from lorafa_kernels.model.placing import members as members_module
from lorafa_kernels.model.saved import lorafa_parameters
from lorafa_kernels.nn.linear import LoRAFALinear

pytestmark = pytest.mark.numerics

# Outputs and gradients of 256 elements and more, so that an error of them means something.
WIDTH, INNER, RANK = 32, 48, 8
FUSED, PLAIN, EXACT = "fused", "plain", "exact"


def nothing(x):
    return None


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, False)
        self.v = nn.Linear(WIDTH, INNER)
        self.o = nn.Linear(INNER, WIDTH)

    def forward(self, x, mask=None):
        q = self.q(x)
        k = self.k(x)
        v = self.v(x)
        return self.o(torch.tanh(q) * k + v)


class Interrupted(Attention):
    """Which apply_lorafa would not group: see test_group_windows.py."""

    def forward(self, x, mask=None):
        q = self.q(x)
        self.between[0](x)
        k = self.k(x)
        self.between[1](x)
        v = self.v(x)
        return self.o(torch.tanh(q) * k + v)


def interrupted(attention, place, function):
    """Call `function` between q and k, or between k and v, which stay in a group if they are in one."""
    attention.__class__ = Interrupted
    attention.between = [nothing, nothing]
    attention.between[place] = function
    layers = [attention.q, attention.k, attention.v]
    if isinstance(attention.q, members_module.GroupMember):
        for layer in layers:
            members_module.ungroup_layer(layer)
        members_module.group_layers(layers, Interrupted)
    return attention


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH)), 1e-5

    def forward(self, x):
        wide = x.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normal.to(x.dtype)


class ExactNorm(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = Norm(), Attention(), MLP()

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


def adapted(kind=FUSED, dropout=0.0, targets="all-linear", dtype=torch.float32):
    """The same model each time: with blocks in `dtype`, without them in `dtype`, or without them in fp64."""
    torch.manual_seed(1)
    config = LoRAFAConfig(
        r=RANK, lora_alpha=3, target_modules=targets, lora_dropout=dropout, init_lora_weights=False
    )
    fuse = kind == FUSED
    model = apply_lorafa(nn.Sequential(Layer()).to(dtype), config, fuse=fuse, norm=fuse)
    if kind == EXACT:
        model.double()
        model[0].norm.__class__ = ExactNorm
    model.input_dtype = torch.float64 if kind == EXACT else dtype
    return model


def inputs(seed=0, dtype=torch.float32):
    """Numbers that every dtype has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, WIDTH, generator=generator).bfloat16().to(dtype)


def results(model, call=None, seed=0):
    """y, and the gradients of x and of every adapter, None for those without one."""
    torch.manual_seed(seed)
    x = inputs(seed, model.input_dtype).requires_grad_()
    y = (model if call is None else call)(x)
    wanted = (x, *(p for p in model.parameters() if p.requires_grad))
    dx, *dBs = torch.autograd.grad(y, wanted, inputs(seed + 100, y.dtype), allow_unused=True)
    return {"y": y.detach(), "dx": dx, "dB": dBs}


def results_of_backward(model, call):
    """As results, by backward(), which reentrant checkpointing asks for."""
    torch.manual_seed(0)
    x = inputs().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = call(x)
    y.backward(inputs(100))
    return {"y": y.detach(), "dx": x.grad, "dB": [p.grad for p in model.parameters() if p.requires_grad]}


def found_by(run):
    """What `run` returns for each kind of model."""
    return {kind: run(kind) for kind in (PLAIN, EXACT, FUSED)}


def assert_alike(found):
    """The results with blocks have at most twice the error of those without, and a unit roundoff: those of
    all adapters together.
    """
    alike = {}
    for kind, results in found.items():
        alike[kind] = {}
        for name, tensors in (results if isinstance(results, dict) else {"y": results}).items():
            tensors = tensors if isinstance(tensors, list) else [tensors]
            missing = [tensor is None for tensor in tensors]
            if not all(missing):
                alike[kind][name] = torch.cat([t.flatten() for t in tensors if t is not None])
            alike[kind][name, "missing"] = missing
    missing = [{name: of.pop(name) for name in list(of) if "missing" in name} for of in alike.values()]
    assert missing[0] == missing[1] == missing[2]
    check_budget(alike[FUSED], alike[EXACT], alike[PLAIN])


BLOCKS = (
    (members_module, "lorafa_linear_group"),
    (fused_module, "lorafa_gated_mlp"),
    (fused_module, "rms_norm"),
)


def _count_calls(set_attribute):
    """A list that gets the name of each block that is computed at once from now on."""
    made = []
    for module, name in BLOCKS:
        function = getattr(module, name)

        def counting(*args, name=name, function=function, **kwargs):
            made.append(name)
            return function(*args, **kwargs)

        set_attribute(module, name, counting)
    return made


@pytest.fixture
def calls(monkeypatch):
    """Names of the blocks that were computed at once since."""
    return _count_calls(monkeypatch.setattr)


@pytest.fixture
def anywhere(monkeypatch):
    """Outputs wait whoever calls the layers: what else keeps them from being taken is tested by itself."""
    monkeypatch.setattr(members_module, "is_called_by", lambda code: True)


ALL = ["rms_norm", "lorafa_linear_group", "lorafa_gated_mlp"]


def test_blocks_are_computed_at_once_and_the_same(calls):
    found = {kind: results(adapted(kind)) for kind in (PLAIN, EXACT)}
    assert calls == []
    model = adapted()
    found[FUSED] = results(model)
    assert_alike(found)
    assert_same(results(model), found[FUSED])
    assert calls == 2 * ALL


def forward_pre_hook(child, fired):
    child.register_forward_pre_hook(lambda *_: fired.append(1))


def forward_hook(child, fired):
    child.register_forward_hook(lambda *_: fired.append(1))


def forward_hook_with_kwargs(child, fired):
    child.register_forward_hook(lambda *_: fired.append(1), with_kwargs=True)


def changing_hook(child, fired):
    child.register_forward_hook(lambda m, i, y: (fired.append(1), 2 * y)[1])


def full_backward_hook(child, fired):
    child.register_full_backward_hook(lambda *_: fired.append(1))


def full_backward_pre_hook(child, fired):
    child.register_full_backward_pre_hook(lambda *_: fired.append(1))


def patched_forward(child, fired):
    forward = child.forward
    child.forward = lambda *args: (fired.append(1), 3 * forward(*args))[1]


def patched_class(child, fired):
    """What kernel libraries do: another class with the same attributes."""
    kind = type(child)

    class Patched(kind):
        def forward(self, x):
            fired.append(1)
            return kind.forward(self, x) - 1

    child.__class__ = Patched


INTERFERENCES = [
    forward_pre_hook,
    forward_hook,
    forward_hook_with_kwargs,
    changing_hook,
    full_backward_hook,
    full_backward_pre_hook,
    patched_forward,
]


@pytest.mark.parametrize("interfere", INTERFERENCES, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    "path", ["attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.down", "mlp.act"]
)
def test_a_layer_that_is_interfered_with_is_called(path, interfere, calls):
    found, fired = {}, []
    for kind in (PLAIN, EXACT, FUSED):
        model = adapted(kind)
        fired.append([])
        interfere(model[0].get_submodule(path), fired[-1])
        found[kind] = results(model)
    assert_alike(found)
    assert fired == 3 * [[1]]
    alone = "lorafa_linear_group" if path.startswith("attention") else "lorafa_gated_mlp"
    assert calls == [name for name in ALL if name != alone]


@pytest.mark.parametrize("interfere", INTERFERENCES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("path", ["norm", "attention", "mlp", ""])
def test_hooks_of_the_blocks_themselves_are_called(path, interfere, calls):
    found, fired = {}, []
    for kind in (PLAIN, EXACT, FUSED):
        model = adapted(kind)
        fired.append([])
        interfere(model[0].get_submodule(path), fired[-1])
        found[kind] = results(model)
    assert_alike(found)
    assert fired == 3 * [[1]] and calls == ALL


def test_a_hook_of_all_modules_is_called_for_each(calls):
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: names.append(type(m).__name__))
    try:
        results(adapted())
    finally:
        handle.remove()
    assert names.count("SiLU") == 1 and len(names) == 7 + 1 + 5
    assert calls == ["rms_norm"]


@pytest.mark.parametrize("path", ["attention.k", "mlp.up", "mlp.act"])
def test_a_class_put_in_later_is_called(path, calls):
    found, fired = {}, []
    for kind in (PLAIN, EXACT, FUSED):
        model = adapted(kind)
        fired.append([])
        patched_class(model[0].get_submodule(path), fired[-1])
        found[kind] = results(model)
    assert fired == 3 * [[1]]
    assert_alike(found)


def replaced_layer(model):
    torch.manual_seed(3)
    model[0].attention.k = nn.Linear(WIDTH, INNER).to(model.input_dtype).requires_grad_(False)
    model[0].mlp.up = nn.Bilinear(WIDTH, WIDTH, INNER).to(model.input_dtype).requires_grad_(False)
    model[0].mlp.up.forward = lambda x: nn.Bilinear.forward(model[0].mlp.up, x, x)


def replaced_activation(model):
    model[0].mlp.act = nn.ReLU()


def one_disabled(model):
    model[0].attention.v.adapter_enabled = False
    model[0].mlp.down.adapter_enabled = False


def one_merged(model):
    model.eval()
    model[0].attention.q.merge()
    model[0].mlp.gate.merge()


def frozen_adapters(model):
    for layer in lorafa_layers(model).values():
        layer.lora_B.requires_grad_(False)
    model[0].attention.o.lora_B.requires_grad_(True)


def changed_scaling(model):
    for layer in lorafa_layers(model).values():
        layer.scaling = 0.25


def changed_dtype(model):
    model.bfloat16()
    model.to(model.input_dtype)


def new_parameters(model):
    for layer in lorafa_layers(model).values():
        layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


def eval_mode(model):
    model.eval()


CHANGES = [
    replaced_layer,
    replaced_activation,
    one_disabled,
    one_merged,
    frozen_adapters,
    changed_scaling,
    changed_dtype,
    new_parameters,
    eval_mode,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda function: function.__name__)
def test_a_changed_model_computes_the_same(change):
    def run(kind):
        model = adapted(kind)
        results(model)
        change(model)
        return results(model)

    assert_alike(found_by(run))


def test_different_implementations_are_kept_apart(calls):
    def run(kind):
        model = adapted(kind)
        model[0].attention.q.impl = model[0].mlp.up.impl = "reference"
        return results(model)

    assert_alike(found_by(run))
    assert calls == ["rms_norm"]


def in_no_grad(model, x):
    with torch.no_grad():
        return model(x)


def in_inference_mode(model, x):
    with torch.inference_mode():
        return model(x)


def of_an_inference_tensor(model, x):
    with torch.inference_mode():
        x = x.clone()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    "call", [in_no_grad, in_inference_mode, of_an_inference_tensor], ids=lambda function: function.__name__
)
def test_without_gradients_it_is_the_original_bit_by_bit(call, calls):
    assert torch.equal(call(adapted(), inputs()), call(adapted(PLAIN), inputs()))
    assert calls == []


def test_tensors_of_inference_mode_have_no_version_and_work_all_the_same():
    x = inputs()
    with torch.inference_mode():
        made = x.clone()
        assert adapted(dropout=0.5)[0].attention(made).shape == x.shape
    y = adapted()[0].attention(made)
    assert_same(y, adapted(PLAIN)[0].attention(x))
    assert y.requires_grad


def test_an_input_without_gradient(calls):
    def run(kind):
        model = adapted(kind)
        y = model(inputs(dtype=model.input_dtype))
        return {"dB": list(torch.autograd.grad(y.sum(), lorafa_parameters(model)))}

    assert_alike(found_by(run))
    assert calls == ["lorafa_linear_group", "lorafa_gated_mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, calls):
    def run(kind):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != EXACT):
            return results(adapted(kind, dtype=dtype))

    found = found_by(run)
    for name in ("y", "dx"):
        assert found[FUSED][name].dtype == found[PLAIN][name].dtype
    assert [dB.dtype for dB in found[FUSED]["dB"]] == [dB.dtype for dB in found[PLAIN]["dB"]]
    assert_alike(found)
    assert calls == ALL


@pytest.mark.parametrize("name", ["weight", "lora_A"])
@pytest.mark.parametrize("path", ["attention.k", "mlp.gate"])
def test_a_thawed_tensor_is_refused_by_name(path, name):
    model = adapted()
    model[0].get_submodule(path)._parameters[name].requires_grad_(True)
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        results(model)


def on_meta(layer):
    layer.to("meta")


def of_another_dtype(layer):
    layer.to(torch.float64)


def emptied(layer):
    layer.weight.data = torch.empty(0)


@pytest.mark.parametrize(
    "change", [on_meta, of_another_dtype, emptied], ids=lambda function: function.__name__
)
@pytest.mark.parametrize("path", ["attention.v", "mlp.down", "norm"])
def test_a_layer_that_does_not_fit_is_left_to_its_own_forward(path, change, calls):
    """It raises or not as it does without blocks. Weights on meta beside x on the CPU may not raise."""
    found = []
    for kind in (PLAIN, FUSED):
        model = adapted(kind)
        change(model[0].get_submodule(path))
        try:
            y, dx, dBs = results(model).values()
            found.append([result is not None and result.device for result in (y, dx, *dBs)])
        except (ValueError, TypeError, RuntimeError) as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]
    block = {"attention.v": "lorafa_linear_group", "mlp.down": "lorafa_gated_mlp", "norm": "rms_norm"}[path]
    # A norm may have a weight of another dtype.
    assert (block in calls) == (path == "norm" and change is of_another_dtype)


class Sharded(torch.Tensor):
    """Stands for a parameter of a subclass, a DTensor say."""


@pytest.mark.parametrize("path", ["attention.k", "mlp.down"])
def test_parameters_of_a_subclass_are_left_to_their_layer(path, calls):
    found = {kind: results(adapted(kind)) for kind in (PLAIN, EXACT)}
    model = adapted()
    results(model)
    layer = model[0].get_submodule(path)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Sharded), requires_grad=False)
    assert type(layer.weight) is not nn.Parameter
    del calls[:]
    y, dx, dBs = results(model).values()
    got = [tensor.as_subclass(torch.Tensor) for tensor in (y, dx, *dBs)]
    found[FUSED] = {"y": got[0], "dx": got[1], "dB": got[2:]}
    assert_alike(found)
    assert ("lorafa_linear_group" if "attention" in path else "lorafa_gated_mlp") not in calls


def new_weight(model):
    model.v.weight = nn.Parameter(model.v.weight * 2, requires_grad=False)


def doubled_forward(model):
    model.v.forward = lambda x: 2 * LoRAFALinear.forward(model.v, x)


def another_layer(model):
    model.v = nn.Linear(WIDTH, INNER, False, dtype=model.v.weight.dtype)
    nn.init.ones_(model.v.weight)


BETWEEN = {
    "input in place": lambda model, x: x.mul_(2),
    "adapter in place": lambda model, x: model.v.lora_B.mul_(2),
    "weight in place": lambda model, x: model.v.weight.mul_(2),
    "new weight": lambda model, x: new_weight(model),
    "scaling": lambda model, x: setattr(model.v, "scaling", 2.5),
    "merged": lambda model, x: model.v.merge(),
    "disabled": lambda model, x: setattr(model.v, "adapter_enabled", False),
    "forward": lambda model, x: doubled_forward(model),
    "hook": lambda model, x: model.v.register_forward_hook(lambda m, i, y: 2 * y),
    "layer": lambda model, x: another_layer(model),
    "class": lambda model, x: patched_class(model.v, []),
    "other call": lambda model, x: model.q(x.clone()),
    "same call": lambda model, x: model.q(x),
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("place", [0, 1])
def test_a_waiting_output_is_not_taken_after_a_change(change, place):
    def run(kind):
        model = adapted(kind)
        attention = model[0].attention.eval()

        @torch.no_grad()
        def between(x):
            BETWEEN[change](attention, x)

        interrupted(attention, place, between)
        x = inputs(dtype=model.input_dtype)
        return {"y": attention(x).detach(), "x": x}

    assert_alike(found_by(run))


@pytest.mark.usefixtures("anywhere")
def test_a_waiting_output_is_of_its_autocast_and_gradient_mode():
    attention = adapted(dtype=torch.float32)[0].attention
    x = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        attention.q(x)
    assert attention.k(x).dtype is torch.float32
    attention.q(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.v(x).dtype is torch.bfloat16
    attention.q(x)
    with torch.no_grad():
        assert not attention.k(x).requires_grad
    assert attention.v(x).requires_grad


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("order", ["kqv", "vkq", "vqk"])
def test_any_layer_may_come_first(order, calls):
    def run(kind):
        model = adapted(kind)
        x = inputs(dtype=model.input_dtype)
        return [{name: getattr(model[0].attention, name)(x).detach() for name in order} for _ in range(2)]

    found = found_by(run)
    for call in range(2):
        assert_alike({kind: calls[call] for kind, calls in found.items()})
    assert calls == 2 * ["lorafa_linear_group"]


def test_only_adapted_layers_are_grouped(calls):
    model = adapted(targets=["q", "v"])
    assert [b.layers for b in model.lorafa_report.blocks if b.kind == "shared input"] == [("q", "v")]
    assert_alike(found_by(lambda kind: results(adapted(kind, targets=["q", "v"]))))
    assert calls == ALL
    (block,) = (b for b in adapted(targets=["q"]).lorafa_report.blocks if b.kind == "shared input")
    assert block.reason == "none of its adapted layers share an input"


@pytest.mark.usefixtures("anywhere")
def test_after_an_exception_in_between_the_next_call_is_right():
    def failing(x):
        raise KeyError

    for place in (0, 1):

        def run(kind, place=place):
            model = adapted(kind)
            attention, x = model[0].attention, inputs(dtype=model.input_dtype)
            interrupted(attention, place, failing)
            with pytest.raises(KeyError):
                attention(x)
            attention.between[place] = nothing
            with torch.no_grad():
                attention.v.lora_B.mul_(2)
            # The one whose output was left waiting goes first.
            return {"v": attention.v(x).detach(), "y": attention(x).detach()}

        assert_alike(found_by(run))


class Held:
    """A packed tensor whose end can be seen."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.usefixtures("anywhere")
def test_what_was_not_taken_goes_with_its_input():
    attention, held = adapted()[0].attention, []

    def pack(tensor):
        held.append(weakref.ref(packed := Held(tensor)))
        return packed

    def abandoned(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            attention.q(x)

    x = inputs().requires_grad_() * 1
    abandoned(x)
    assert len(held) > 0 and all(ref() is not None for ref in held)
    del x
    assert all(ref() is None for ref in held)


@pytest.mark.usefixtures("anywhere")
def test_what_was_not_taken_goes_with_the_next_call():
    attention = adapted()[0].attention
    first, second = inputs(), inputs(1)
    attention.q(first)
    (waiting,) = (w.outputs for w in [attention.q._lorafa_group._local.waiting])
    kept = [weakref.ref(output.y) for output in waiting.values()]
    assert len(kept) == 2
    del waiting
    attention(second)
    assert all(ref() is None for ref in kept)
    assert attention.q._lorafa_group._local.waiting is None


def test_threads_do_not_take_each_others_outputs():
    model, rounds, failures = adapted(), 30, []
    xs = [inputs(seed) for seed in range(4)]
    wanted = [results(model, seed=seed) for seed in range(4)]
    barrier = threading.Barrier(5)

    def run(seed):
        barrier.wait()
        try:
            for _ in range(rounds):
                assert_same(results(model, seed=seed), wanted[seed])
        except BaseException as error:
            failures.append(error)

    def run_with_one_input():
        barrier.wait()
        try:
            for _ in range(rounds):
                assert_same(model(xs[0]), wanted[0]["y"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    threads += [threading.Thread(target=run_with_one_input) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.usefixtures("anywhere")
def test_an_output_is_not_handed_to_another_thread(calls):
    attention, x, found = adapted()[0].attention, inputs(), []
    other = adapted()[0].attention
    wanted = other.k(x)
    attention.q(x)
    thread = threading.Thread(target=lambda: found.append(attention.k(x)))
    thread.start()
    thread.join()
    assert calls == 3 * ["lorafa_linear_group"]
    assert_same(found[0], wanted)


def shallow(model):
    other = copy.copy(model[0])
    other._modules = dict(other._modules, attention=copy.copy(other.attention), mlp=copy.copy(other.mlp))
    other.norm = copy.copy(other.norm)
    whole = nn.Sequential(other)
    whole.input_dtype = model.input_dtype
    return whole


@pytest.mark.parametrize("copying", [copied, pickled, shallow], ids=lambda function: function.__name__)
def test_copies_have_blocks_of_their_own(copying, calls):
    model = adapted()
    wanted = results(model)
    other = copying(model)
    del calls[:]
    assert_same(results(other), wanted)
    assert calls == ALL
    for (name, module), (other_name, its_copy) in zip(
        model.named_modules(), other.named_modules(), strict=True
    ):
        assert name == other_name and type(module) is type(its_copy)
    with torch.no_grad():
        for parameter in [] if copying is shallow else other.parameters():
            parameter.zero_()
    assert_same(results(model), wanted)
    del other
    gc.collect()
    del calls[:]
    assert_same(results(model), wanted)
    assert calls == ALL


@pytest.mark.usefixtures("anywhere")
def test_a_layer_that_is_copied_alone_takes_no_other_along(calls):
    attention, x = adapted()[0].attention, inputs()
    wanted = LoRAFALinear.forward(attention.k, x)
    for copying in (copied, pickled, copy.copy):
        alone = copying(attention.k)
        assert len(list(alone.modules())) == 1 and isinstance(alone, LoRAFALinear)
        del calls[:]
        assert_same(alone(x), wanted)
        assert calls == []
    attention(x)
    assert calls == ["lorafa_linear_group"]


def test_pickles_name_the_original_classes():
    buffer = io.BytesIO()
    torch.save(adapted()[0].mlp, buffer)
    mlp = fused_module._subclass(MLP, fused_module.FusedMLP)
    fused_module._subclass.cache_clear()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is not mlp and isinstance(loaded, MLP) and isinstance(loaded, fused_module.FusedMLP)
    assert (type(loaded).__name__, type(loaded).__module__) == (MLP.__name__, MLP.__module__)


def test_keys_classes_and_attributes_stay():
    model, plain = adapted(), adapted(PLAIN)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(one, type(other))
        assert {n for n in vars(one) if not n.startswith("_lorafa")} == set(vars(other))
    assert repr(plain) == repr(model).replace("GroupMember", "LoRAFALinear")


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_takes_the_blocks_out(merge):
    model, plain = adapted(), adapted(PLAIN)
    for one in (model, plain):
        unload_adapter(one, merge=merge)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not [n for m in model.modules() for n in vars(m) if "lorafa" in n]
    assert torch.equal(model(inputs()), plain(inputs()))
    apply_lorafa(model, LoRAFAConfig(target_modules="all-linear"))
    assert sum(block.fused for block in model.lorafa_report.blocks) == 3


def test_merging_and_disabling():
    model, plain = adapted(), adapted(PLAIN)
    for one in (model, plain):
        merge_adapter(one.eval())
    assert torch.equal(model(inputs()), plain(inputs()))
    for one in (model, plain):
        unmerge_adapter(one)
    with disable_adapter(model), disable_adapter(plain):
        assert torch.equal(model(inputs()), plain(inputs()))
    assert_same(results(model), results(adapted()))
    assert_same(results(plain), results(adapted(PLAIN)))


def checkpointed(model, reentrant):
    return lambda x: checkpoint(model, x, use_reentrant=reentrant)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True], ids=["early stop", "reentrant"])
def test_checkpointing_repeats_what_it_repeats(reentrant, dropout, calls):
    """The output and gradients are those of the same seed without checkpointing: with dropout the masks of
    the forward without gradients are those of the one that is repeated.
    """
    model = adapted(dropout=dropout)
    wanted = results(model)
    if reentrant and not dropout:
        # Its forward runs without gradients, where each layer computes by itself.
        wanted["y"] = results(adapted(PLAIN))["y"]
    del calls[:]
    assert_same(results_of_backward(model, checkpointed(model, reentrant)), wanted)
    blocks = ALL[1:] if dropout else []
    assert calls == (blocks if reentrant else ALL) + ALL
    assert_same(results_of_backward(model, checkpointed(model, reentrant)), wanted)


@pytest.mark.usefixtures("anywhere")
def test_checkpointing_of_the_attention_alone_stops_early_and_leaves_nothing(calls):
    attention = adapted()[0].attention
    x = inputs().requires_grad_()
    wanted = torch.autograd.grad(attention(x).sum(), x)[0]
    del calls[:]

    def stopping(x):
        return attention.q(x), attention.k(x), attention.v(x)

    for _ in range(2):
        ys = checkpoint(stopping, x, use_reentrant=False)
        total = attention.o(torch.tanh(ys[0]) * ys[1] + ys[2]).sum()
        assert_same(torch.autograd.grad(total, x)[0], wanted)
    assert calls == 4 * ["lorafa_linear_group"]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_drawn_by_the_blocks(training):
    model = adapted(dropout=0.5).train(training)
    y, again = results(model)["y"], results(model)["y"]
    assert torch.equal(y, again)
    torch.manual_seed(5)
    other = model(inputs())
    assert torch.equal(y, other) != training


@pytest.mark.parametrize(
    "path",
    ["0", *(pytest.param(part, marks=pytest.mark.slow) for part in ("0.mlp", "0.attention", "0.norm"))],
)
def test_compiled_in_one_graph(path):
    def run(kind, compiled):
        model = adapted(kind)
        module = model.get_submodule(path)
        if not compiled:
            return results(model, module)
        torch._dynamo.reset()
        return results(model, torch.compile(module, fullgraph=True, backend="aot_eager"))

    assert_alike({kind: run(kind, compiled=kind == FUSED) for kind in (PLAIN, EXACT, FUSED)})


@pytest.mark.usefixtures("anywhere")
def test_backward_through_one_output_leaves_the_others_alone(calls):
    """Its node is used up then: outputs that wait could not be differentiated any more."""
    attention, x = adapted()[0].attention, inputs().requires_grad_()
    for shape in (x.shape, (-1, WIDTH)):
        rows = x.detach().view(shape).requires_grad_()
        attention.q(rows).sum().backward()
        attention.v(rows).sum().backward()
        (attention.q(rows) * attention.k(rows) * attention.v(rows)).sum().backward()
    assert calls == 6 * ["lorafa_linear_group"]


def test_another_forward_put_into_the_class_later_is_called(monkeypatch, calls):
    models = {kind: adapted(kind) for kind in (PLAIN, EXACT, FUSED)}
    before = {kind: results(model) for kind, model in models.items()}
    del calls[:]
    monkeypatch.setattr(MLP, "forward", lambda self, x: 2 * self.down(self.act(self.gate(x)) * self.up(x)))
    found = {kind: results(model) for kind, model in models.items()}
    assert calls == ["rms_norm", "lorafa_linear_group"]
    assert not torch.equal(found[FUSED]["y"], before[FUSED]["y"])
    assert_alike(found)


ENGINES = ("ddp", "fsdp2", "fsdp2 of blocks")


def _wrapped(model, engine):
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    if engine == "fsdp2 of blocks":
        for block in (model[0].norm, model[0].mlp, model[0].attention):
            fully_shard(block)
    return fully_shard(model)


def _train_through_engines(rank, world, folder, made):
    """Write the gradients of all processes together, and the blocks that were computed, for each engine."""
    found = {}
    for engine in ENGINES:
        del made[:]
        model = adapted()
        wrapped = _wrapped(model, engine)
        x, dy = (inputs(seed).chunk(world)[rank] for seed in (0, 100))
        # Engines average over the processes, autograd adds.
        wrapped(x.clone().requires_grad_()).backward(world * dy)
        grads = [p.grad for p in lorafa_parameters(model)]
        grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        found[engine] = grads, made[:]
    if rank == 0:
        torch.save(found, f"{folder}/result")


def _worker(rank, world, folder):
    _train_through_engines(rank, world, folder, _count_calls(setattr))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_engines_train_through_the_blocks(tmp_path):
    start(_worker, 2, tmp_path)
    found = {kind: {"dB": results(adapted(kind))["dB"]} for kind in (PLAIN, EXACT)}
    for grads, made in torch.load(tmp_path / "result").values():
        assert_alike({**found, FUSED: {"dB": grads}})
        assert made == ALL


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_engines_of_one_process_train_through_the_blocks(tmp_path, calls):
    with group(0, 1, tmp_path):
        _train_through_engines(0, 1, str(tmp_path), calls)
    want = results(adapted())["dB"]
    for engine, (grads, made) in torch.load(tmp_path / "result").items():
        assert_same(grads, want, name=engine)
        assert made == ALL


@pytest.mark.usefixtures("anywhere")
def test_an_output_that_waits_is_not_taken_for_another_input():
    def run(kind):
        model = adapted(kind)
        attention, first, second = model[0].attention, *(inputs(s, model.input_dtype) for s in (0, 1))
        attention.q(first)
        return {"k": attention.k(second).detach(), "v": attention.v(first).detach()}

    assert_alike(found_by(run))


@pytest.mark.parametrize("path", ["attention", "mlp"])
def test_an_input_of_another_dtype_is_refused_as_without_blocks(path, calls):
    messages = []
    for kind in (PLAIN, FUSED):
        with pytest.raises(TypeError, match="dtype") as error:
            adapted(kind)[0].get_submodule(path)(inputs(dtype=torch.float64))
        messages.append(str(error.value))
    assert messages[0] == messages[1] and calls == []
