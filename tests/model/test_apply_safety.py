"""apply_lorafa adapts a model or leaves it untouched, and unload_adapter gives back what was there."""

from __future__ import annotations

import copy
import functools
import gc
import pickle

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
    load_adapter,
    lorafa_parameters,
    save_adapter,
    unload_adapter,
)
from lorafa_kernels.model import adapt
from lorafa_kernels.model.names import lorafa_layers

pytestmark = pytest.mark.numerics


class MLP(nn.Module):
    """A gated MLP that is fused, and whose class refuses to have subclasses."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Final(MLP):
    def __init_subclass__(cls, **kwargs):
        raise RuntimeError("Final has no subclasses")


class Locked(nn.Module):
    """Takes no other child once it is built."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 6)
        self.__dict__["locked"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("locked") and isinstance(value, nn.Module):
            raise KeyError(f"{name} is locked")
        super().__setattr__(name, value)

    def forward(self, x):
        return self.last(x)


def model(end) -> nn.Sequential:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.LSTM(6, 6), MLP(), nn.LayerNorm(6), end)
    for parameter in parts[1].parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    return parts


TARGETS = LoRAFAConfig(target_modules=["gate", "up", "down", "last"], modules_to_save=["0", "2"], r=2)


def state(module):
    return [
        (
            name,
            id(m),
            type(m),
            {k: id(v) for k, v in vars(m).items()},
            {k: id(v) for kind in ("_parameters", "_buffers", "_modules") for k, v in vars(m)[kind].items()},
            {k: p.requires_grad for k, p in m._parameters.items() if p is not None},
            [id(w) for w in vars(m).get("_flat_weights", ())],
            list(m._load_state_dict_pre_hooks.items()),
        )
        for name, m in module.named_modules()
    ]


class Free(nn.Module):
    """As Locked, but takes what it is given."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 6)


@pytest.mark.parametrize("loading", [False, True], ids=["apply", "load"])
@pytest.mark.parametrize("where", ["a child cannot be replaced", "the last block cannot be placed"])
def test_what_raises_midway_leaves_the_model_untouched(where, loading, tmp_path, monkeypatch):
    save_adapter(apply_lorafa(model(Free()), TARGETS), tmp_path)
    if where == "a child cannot be replaced":
        broken, error = model(Locked()), KeyError
    else:
        broken, error = model(Free()), ZeroDivisionError
        place = adapt.place_blocks

        def failing(modules, **options):
            assert any(block.fused for block in place(modules, **options))
            raise ZeroDivisionError

        monkeypatch.setattr(adapt, "place_blocks", failing)
    linear = broken[1].gate
    linear.register_load_state_dict_pre_hook(lambda module, *args: None)
    before, y = state(broken), broken[1](torch.ones(2, 6))
    with pytest.raises(error):
        load_adapter(broken, tmp_path) if loading else apply_lorafa(broken, TARGETS)
    assert state(broken) == before
    assert torch.equal(broken[1](torch.ones(2, 6)), y)
    (hook,) = linear._load_state_dict_pre_hooks.values()
    assert hook.module() is linear


def test_a_model_whose_class_refuses_to_be_subclassed_can_be_adapted_in_its_layers():
    """Either placing gives way, or apply_lorafa raises and nothing has changed: then fuse=False does it."""
    parts = model(Final())
    before = state(parts)
    try:
        apply_lorafa(parts, TARGETS)
    except RuntimeError:
        assert state(parts) == before
        apply_lorafa(parts, TARGETS, fuse=False)
    assert {name.rsplit(".", 1)[0] for name in lorafa_layers(parts)} == {"1", "3"}


# What stands where a plain weight is expected.


class Wrapped(torch.Tensor):
    """A subclass of Tensor such as torchao's, of which nothing is known."""


def with_subclass(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)


def with_subclass_bias(linear):
    linear.bias = nn.Parameter(linear.bias.detach().as_subclass(Wrapped), requires_grad=False)


def with_part(linear):
    linear.weight.data = torch.empty(0)


def with_own_call(linear):
    linear.__class__ = type("Called", (nn.Linear,), {"__call__": lambda self, x: x})


def with_lora(linear):
    linear.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 6)))


NOT_PLAIN = {
    "subclass": (with_subclass, ValueError, r"1\.up: weight is a .*Wrapped, a subclass of Tensor"),
    "bias": (with_subclass_bias, ValueError, r"1\.up: bias is a .*Wrapped, a subclass of Tensor"),
    "part": (with_part, ValueError, r"1\.up: weight has shape \(0,\), expected \(8, 6\)"),
    "own call": (with_own_call, TypeError, r"1\.up: .*Called has a forward of its own"),
    "another adapter": (with_lora, ValueError, r"1\.up: the layer already has a lora_A"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_weights_that_are_not_plain_are_refused_with_the_reason(case):
    spoil, error, words = NOT_PLAIN[case]
    parts = model(MLP())
    spoil(parts[1].up)
    before = state(parts)
    config = LoRAFAConfig(target_modules=["gate", "up"])
    with pytest.raises(error, match=words):
        apply_lorafa(parts, config)
    assert state(parts) == before
    with pytest.raises(error):
        LoRAFALinear.from_linear(parts[1].up)
    with pytest.raises(error):
        LoRAFALinearGroup([parts[1].gate, parts[1].up])


def test_sharded_and_wrapped_models_are_refused():
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        config = LoRAFAConfig(target_modules=["gate", "up"])
        parts = model(MLP())
        fully_shard(parts[1], mesh=mesh, reshard_after_forward=False)
        linear = parts[1].up
        with pytest.raises(ValueError, match="1 is under fully_shard already"):
            apply_lorafa(parts, config)
        with pytest.raises(ValueError, match="weight is a DTensor: adapt the model before it is sharded"):
            LoRAFALinear.from_linear(linear)
        parts[1](torch.ones(2, 6))
        with pytest.raises(ValueError, match="1 is under fully_shard already"):
            apply_lorafa(parts, config)
        wrapped = nn.parallel.DistributedDataParallel(model(MLP()))
        with pytest.raises(ValueError, match="under DistributedDataParallel already"):
            apply_lorafa(wrapped, config)
        assert not lorafa_layers(wrapped) and not lorafa_layers(parts)
    finally:
        dist.destroy_process_group()


def test_fake_tensors_are_plain():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = nn.Linear(6, 8)
        adapted = LoRAFALinear.from_linear(layer)
        y = adapted(torch.empty(3, 6))
        y.sum().backward()
        assert adapted.lora_B.grad.shape == (8, 8)
        parts = nn.Sequential(nn.Linear(6, 8))
        apply_lorafa(parts, LoRAFAConfig(target_modules=["0"]), fuse=False, norm=False)
        assert type(parts[0]) is LoRAFALinear


# What comes back from unload_adapter.


class Named(nn.Linear):
    """A subclass with the forward of nn.Linear, an attribute and a buffer."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.tag = ["mine"]
        self.r = "an attribute of this name"
        self.register_buffer("count", torch.tensor(3.0))
        self.register_buffer("scratch", torch.tensor(4.0), persistent=False)

    def twice(self, x):
        return 2 * self(x)


def append(calls, what, *args, **kwargs):
    calls.append(what)


@pytest.mark.parametrize("merge", [True, False])
def test_unload_gives_back_class_hooks_attributes_and_buffers(merge):
    calls = []
    parts = nn.Sequential(Named(6, 6)).eval()
    linear = parts[0]
    hooked = functools.partial(append, calls)
    handles = [
        linear.register_forward_pre_hook(lambda *a: hooked("pre")),
        linear.register_forward_hook(lambda *a: hooked("forward")),
        linear.register_full_backward_pre_hook(lambda *a: hooked("backward pre")),
        linear.register_full_backward_hook(lambda *a: hooked("backward")),
        linear.register_state_dict_pre_hook(lambda *a: hooked("state pre")),
        linear._register_state_dict_hook(lambda *a: hooked("state")),
        linear.register_load_state_dict_pre_hook(lambda module, *a: hooked(("load pre", type(module)))),
        linear.register_load_state_dict_post_hook(lambda module, *a: hooked(("load", type(module)))),
    ]
    keys = list(parts.state_dict())
    calls.clear()
    before = {name: type(value) for name, value in vars(linear).items()}
    apply_lorafa(parts, LoRAFAConfig(target_modules=["0"], init_lora_weights=False))
    del linear
    gc.collect()

    def use(expected):
        x = torch.ones(2, 6, requires_grad=True)
        parts(x).sum().backward()
        parts.load_state_dict(parts.state_dict())
        assert calls == [
            *("pre", "forward", "backward pre", "backward", "state pre", "state"),
            ("load pre", expected),
            ("load", expected),
        ]
        calls.clear()

    assert parts[0].tag == ["mine"] and parts[0].count == 3 and parts[0].r == 8
    assert [key for key in parts.state_dict() if "lora_" not in key] == keys
    calls.clear()
    use(type(parts[0]))
    parts[0].tag.append("added")
    parts[0].later = "set on the adapted layer"
    with torch.no_grad():
        parts[0].count += 1
    y = parts(torch.ones(2, 6))
    calls.clear()
    unload_adapter(parts, merge=merge)
    back = parts[0]
    assert type(back) is Named and back.tag == ["mine", "added"] and not back.training
    assert back.r == "an attribute of this name" and back.count == 4 and back.later.startswith("set on")
    assert {name: type(value) for name, value in vars(back).items() if name != "later"} == before
    assert list(parts.state_dict()) == keys
    assert list(back._non_persistent_buffers_set) == ["scratch"]
    calls.clear()
    use(Named)
    assert torch.equal(back.twice(torch.ones(2, 6)), 2 * back(torch.ones(2, 6)))
    if merge:
        error = (parts(torch.ones(2, 6)) - y).norm() / y.norm()
        assert error <= 8 * torch.finfo(torch.float32).eps
    calls.clear()
    for handle in handles:
        handle.remove()
    parts(torch.ones(2, 6))
    parts.load_state_dict(parts.state_dict())
    assert calls == []


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_knows_what_it_stands_for(copying):
    parts = copying(apply_lorafa(nn.Sequential(Named(6, 6)), LoRAFAConfig(target_modules=["0"])))
    unload_adapter(parts)
    assert type(parts[0]) is Named and parts[0].tag == ["mine"] and parts[0].r == "an attribute of this name"


def test_a_patched_forward_is_not_lost_without_a_word():
    parts = apply_lorafa(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LoRAFAConfig(target_modules=["0", "1"])
    )
    parts[1].forward = lambda x: x
    for merge in (True, False):
        with pytest.raises(RuntimeError, match="forward of 1 was patched"):
            unload_adapter(parts, merge=merge)
        assert len(lorafa_layers(parts)) == 2


# A layer called and built as nn.Linear is.


def test_the_input_can_be_given_by_name():
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 6), torch.randn(2, 6)
    y = linear(input=x)
    layer = LoRAFALinear.from_linear(linear)
    assert torch.equal(layer(input=x), y) and torch.equal(layer(x), y)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.q(input=x) + self.k(input=x)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_model_may_give_the_input_by_name(fuse):
    torch.manual_seed(0)
    module, x = Keywords(), torch.randn(2, 6)
    y = module(x)
    apply_lorafa(nn.Sequential(module), LoRAFAConfig(target_modules=["q", "k"]), fuse=fuse)
    assert torch.equal(module(x), y)


def from_meta(build):
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(float("nan"))
    for inner in module.modules():
        if hasattr(inner, "reset_parameters"):
            inner.reset_parameters()
    return module


MODULES = {
    "layer": lambda: LoRAFALinear(6, 6, r=2),
    "gaussian": lambda: LoRAFALinear(6, 6, bias=False, r=2, init_lora_weights="gaussian"),
    "both drawn": lambda: LoRAFALinear(6, 6, r=2, init_lora_weights=False, dtype=torch.bfloat16),
    "group": lambda: LoRAFALinearGroup([LoRAFALinear(6, 6, r=2), nn.Linear(6, 4)]),
    "shared A": lambda: LoRAFALinearGroup.from_linears([nn.Linear(6, 6), nn.Linear(6, 4)], r=2, share_A=True),
    "SwiGLU": lambda: LoRAFASwiGLU(6, 8, r=2),
    "GeGLU": lambda: LoRAFAGeGLU(6, 8, r=2),
    "model": lambda: apply_lorafa(nn.Sequential(nn.Linear(6, 6)), LoRAFAConfig(target_modules=["0"], r=2)),
}


@pytest.mark.parametrize("case", MODULES)
def test_reset_parameters_initialises_what_to_empty_left(case):
    torch.manual_seed(0)
    module = from_meta(MODULES[case])
    layers = [m for m in module.modules() if isinstance(m, LoRAFALinear)]
    assert layers
    for layer in layers:
        bound = 1 / layer.in_features**0.5
        assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
        assert 0 < layer.weight.abs().max() <= bound
        assert (layer.lora_B.count_nonzero() > 0) == (case == "both drawn")
        assert layer.lora_A.count_nonzero() > 0
        flags = {name: p.requires_grad for name, p in layer.named_parameters()}
        assert {name for name, flag in flags.items() if flag} == {"lora_B"}
    if case == "shared A":
        assert layers[0].lora_A is layers[1].lora_A
    x = torch.randn(3, 6, dtype=layers[0].weight.dtype)
    outputs = module(x)
    for y in outputs if isinstance(outputs, tuple) else (outputs,):
        assert torch.isfinite(y).all()


def test_reset_draws_what_the_constructor_draws():
    torch.manual_seed(0)
    built = LoRAFALinear(6, 4, r=2, init_lora_weights=False)
    torch.manual_seed(0)
    again = LoRAFALinear(6, 4, r=2)
    again.init_lora_weights = False
    torch.manual_seed(0)
    again.reset_parameters()
    for (name, ours), (_, theirs) in zip(built.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_merged_layer_is_not_reset():
    layer = LoRAFALinear(6, 4)
    layer.merge()
    with pytest.raises(RuntimeError, match="merged"):
        layer.reset_parameters()


def shared_group(seed):
    torch.manual_seed(seed)
    linears = {"q": nn.Linear(6, 6), "k": nn.Linear(6, 4), "v": nn.Linear(6, 4)}
    return LoRAFALinearGroup.from_linears(
        linears, r=2, share_A=True, adapt=["q", "v"], init_lora_weights=False
    )


@pytest.mark.parametrize("outer", [False, True], ids=["group", "model with a group"])
@pytest.mark.parametrize("assign", [False, True])
def test_share_A_groups_load_a_state(assign, outer):
    wrap = (lambda group: nn.Sequential(group)) if outer else (lambda group: group)
    one, other, x = wrap(shared_group(0)), wrap(shared_group(1)), torch.randn(3, 6)
    state = {key: value.clone() for key, value in one.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    group = other[0] if outer else other
    assert group.q.lora_A is group.v.lora_A and not group.q.lora_A.requires_grad
    for got, want in zip(other(x), one(x), strict=True):
        assert torch.equal(got, want)
    sum(y.sum() for y in other(x)).backward()
    again = copy.deepcopy(other)
    again.load_state_dict(state, assign=True)
    group = again[0] if outer else again
    assert group.q.lora_A is group.v.lora_A


def test_share_A_groups_refuse_a_state_of_two():
    state = {key: value.clone() for key, value in shared_group(0).state_dict().items()}
    state["v.lora_A"] += 1
    with pytest.raises(ValueError, match="share_A=True, but the state has another lora_A for member 'v'"):
        shared_group(1).load_state_dict(state, assign=True)


def test_lorafa_parameters_are_those_that_train_after_a_failed_and_a_second_apply():
    parts = model(MLP())
    with pytest.raises(ValueError):
        apply_lorafa(parts, LoRAFAConfig(target_modules=["gate", "2"]))
    apply_lorafa(parts, LoRAFAConfig(target_modules=["gate"]))
    assert {id(p) for p in lorafa_parameters(parts)} == {id(p) for p in parts.parameters() if p.requires_grad}
