"""What users hold of an earlier version goes on working: public names, operators, pickles, exported programs,
adapters, tables of plans. make_fixture.py wrote the files in fixtures/, in a checkout of that version.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafa_kernels
from lorafa_kernels import load_adapter
from lorafa_kernels.plan.config import KernelConfig
from lorafa_kernels.plan.tables import read_table

FOLDER = Path(__file__).resolve().parent / "fixtures" / "45f37c1"
API = json.loads((FOLDER / "api.json").read_text())
MODULES = ("linear", "group", "swiglu", "geglu")


@pytest.fixture(scope="module")
def calls() -> dict:
    return torch.load(FOLDER / "calls.pt", weights_only=True)


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    return torch.load(FOLDER / "modules.pt", weights_only=False)


@pytest.mark.parametrize("name", sorted(API["signatures"]))
def test_public_names_take_what_they_took(name):
    """Every parameter is still there, with its default."""
    today = inspect.signature(getattr(lorafa_kernels, name)).parameters
    for parameter, default in API["signatures"][name].items():
        assert parameter in today, parameter
        own = today[parameter].default
        assert (None if own is inspect.Parameter.empty else repr(own)) == default, parameter


def test_operators_have_the_schemas_they_had():
    today = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("lorafa_kernels::")}
    assert set(API["operators"]) <= today


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_have_the_keys_they_had(modules, name):
    assert sorted(modules[name].state_dict()) == API["state_dict_keys"][name]


@pytest.mark.numerics
@pytest.mark.parametrize("name", MODULES)
def test_a_pickled_module_computes_what_it_computed(modules, calls, name):
    module, call = modules[name], calls[name]
    x = call["x"].clone().requires_grad_()
    y = module(x)
    ys = y if isinstance(y, tuple) else (y,)
    sum(output.square().sum() for output in ys).backward()
    got = {"ys": [output.detach() for output in ys], "dx": x.grad}
    got["dBs"] = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    same_but_for_rounding(got["ys"], call["ys"])
    same_but_for_rounding([got["dx"]], [call["dx"]])
    assert list(got["dBs"]) == list(call["dBs"])
    same_but_for_rounding(got["dBs"].values(), call["dBs"].values())


def same_but_for_rounding(got, want):
    """Sums of at most 64 fp32 products, made on another machine in another order."""
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        bound = 64 * torch.finfo(torch.float32).eps * max(1.0, other.abs().max().item())
        assert (one - other).abs().max().item() <= bound


@pytest.mark.numerics
def test_an_exported_program_runs(calls):
    program = torch.export.load(FOLDER / "exported.pt2")
    call = calls["exported"]
    same_but_for_rounding([program.module()(call["x"])], call["ys"])


@pytest.mark.numerics
def test_an_adapter_loads(calls):
    call = calls["adapter"]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model.load_state_dict(call["base"])
    load_adapter(model, FOLDER / "adapter")
    same_but_for_rounding([model(call["x"]).detach()], call["ys"])


def test_a_table_of_plans_is_read():
    table = read_table(FOLDER / "table.json")
    (entry,) = table.entries
    fused, library = entry.plans
    assert (table.device, table.triton) == ("NVIDIA H200", "3.7.1")
    assert fused.recipe.kernels.shrink == KernelConfig(64, 0, 64, 16, 1, 4, 3)
    assert (fused.recipe.name, library.recipe.name) == ("fused", "library")
    assert (fused.device_us, fused.host_us, library.device_us) == (100.0, 20.0, 120.0)
