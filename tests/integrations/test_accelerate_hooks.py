"""Models that accelerate's hooks move are adapted as they are, trained, saved, and given back."""

from __future__ import annotations

import copy

import engine_runs as runs
import pytest
import torch
from accuracy import assert_same
from torch import nn

from lorafa_kernels import (
    LoRAFAConfig,
    LoRAFALinear,
    apply_lorafa,
    lorafa_parameters,
    merge_adapter,
    save_adapter,
    unload_adapter,
    unmerge_adapter,
)
from lorafa_kernels.model.names import lorafa_layers
from lorafa_kernels.nn.hooked import is_patched

accelerate = pytest.importorskip("accelerate", reason="the hooks are its")
hooks = pytest.importorskip("accelerate.hooks")
X = torch.linspace(-1, 1, 18).reshape(3, 6)


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4, bias=False))


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def placed(model):
    for module in list(model):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    return model


WAYS = pytest.mark.parametrize(
    "hooked", [offloaded, dispatched, placed], ids=["offload", "device_map", "placed"]
)


def adapted(model):
    torch.manual_seed(1)
    return apply_lorafa(model, LoRAFAConfig(r=2, target_modules=["0", "2", "4"], init_lora_weights=False))


@pytest.mark.numerics
@WAYS
def test_a_hooked_model_computes_and_trains_as_one_without_hooks(hooked, tmp_path):
    found = []
    for model in (adapted(hooked(toy())), adapted(toy())):
        optimizer = torch.optim.SGD(lorafa_parameters(model), lr=0.1)
        for _ in range(3):
            y = model(X)
            optimizer.zero_grad()
            y.square().sum().backward()
            optimizer.step()
        found.append({"y": y.detach()} | {n: p.data for n, p in model.named_parameters() if "lora_" in n})
        save_adapter(model, tmp_path / str(len(found)))
    assert len(found[0]) == 7
    assert_same(*found)
    if hooked is offloaded:
        layer = adapted(hooked(toy()))[0]
        assert layer.weight.is_meta and not layer.lora_B.is_meta
        with pytest.raises(RuntimeError, match="is on the meta device"):
            merge_adapter(nn.Sequential(layer))


@pytest.mark.numerics
@pytest.mark.parametrize("hooked", [offloaded, dispatched], ids=["offload", "device_map"])
def test_fused_blocks_give_way_to_hooks(hooked):
    """A model with hooks on its layers computes what the model without blocks does, bit for bit."""
    config = LoRAFAConfig(r=runs.RANK, target_modules=runs.TARGETS, init_lora_weights=False)
    x, wanted = runs.batch()
    found = []
    for model_of in (
        lambda model: apply_lorafa(hooked(model), config, norm=False),
        lambda model: hooked(apply_lorafa(model, config, norm=False)),
        lambda model: apply_lorafa(model, config, fuse=False, norm=False),
    ):
        torch.manual_seed(0)
        model = model_of(runs.Model())
        parameters = list(lorafa_parameters(model))
        if not any(parameter.is_meta for parameter in parameters):
            runs.loss_of(model, x, wanted).backward()
        with torch.no_grad():
            found.append([model(x), *(parameter.grad for parameter in parameters)])
    *hooks_on, plain = found
    for got in hooks_on:
        # Hooks that came later offload lora_B, too, which then cannot be trained.
        assert_same(got, plain if got[1] is not None else [plain[0], *(None for _ in plain[1:])])
    assert hooks_on[0][1] is not None


@WAYS
def test_without_their_hooks_they_are_as_ever(hooked):
    model = adapted(hooked(toy()))
    hooks.remove_hook_from_submodules(model)
    plain = adapted(toy())
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert not any(is_patched(layer) for layer in lorafa_layers(model).values())
    unload_adapter(model, merge=False)
    assert [type(m) for m in model] == [type(m) for m in toy()]
    assert_same(model(X), toy()(X))
    again = hooked(toy())
    hooks.remove_hook_from_submodules(again)
    adapted(again)


@pytest.mark.numerics
def test_a_merged_weight_stays_under_a_hook_that_only_places():
    model, plain = adapted(placed(toy())), adapted(toy())
    for one in (model, plain):
        merge_adapter(one.eval())
    assert_same(model(X), plain(X))
    unmerge_adapter(model)
    assert_same(model(X), unmerge_adapter(plain)(X))


@pytest.mark.numerics
def test_a_copy_of_an_offloaded_model_computes_the_same():
    model = adapted(offloaded(toy()))
    assert_same(copy.deepcopy(model)(X), model(X))


def test_another_patched_forward_is_refused():
    linear = nn.Linear(2, 2)
    linear.forward = lambda x: x
    with pytest.raises(ValueError, match="patched on the instance"):
        LoRAFALinear.from_linear(linear)
