"""No plan has an expand with specialised warps unless it is pinned, or from a table that was made on this
device: no heuristic takes what was not checked against fp64 and timed there.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, WS_SUMS, KernelPlan
from lorafa_kernels.plan.kernels import mixed_configs
from lorafa_kernels.plan.make import candidates, config_of_frozen, make_plan
from lorafa_kernels.plan.pin import make_pin
from lorafa_kernels.plan.recipe import NAMES, OPERATIONS, Device, Problem, Recipe, kernel_configs, obstacle
from lorafa_kernels.plan.specialised import ws_configs
from lorafa_kernels.plan.tables import Entry, Measured, cache_path, key_of, shipped_path, update_table

HOPPER = KNOWN_DEVICES["sm_90"]
H200 = Device("NVIDIA H200", HOPPER, "3.7.1")
DEVICES = {
    "NVIDIA H100 80GB HBM3": HOPPER,
    "NVIDIA H100 PCIe": replace(HOPPER, num_sms=114),
    "NVIDIA H200": HOPPER,
    "NVIDIA A100-SXM4-80GB": KNOWN_DEVICES["sm_80"],
    "NVIDIA B200": KNOWN_DEVICES["sm_100"],
    "AMD Instinct MI300X": KNOWN_DEVICES["gfx942"],
    "Unheard-of 9000": HOPPER,
    "Unheard-of 9001": replace(HOPPER, arch="sm_130", num_sms=7),
    "Triton's interpreter": INTERPRETER,
}
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 64)


@pytest.fixture(autouse=True, scope="module")
def no_tables(tmp_path_factory):
    """An empty cache and no shipped table."""
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(lookup.CACHE_VARIABLE, str(folder / "cache"))
        patch.setattr(lookup, "SHIPPED", folder / "shipped")
        choice.forget_plans()
        yield
    choice.forget_plans()


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """An empty cache and no shipped table, for this test alone."""
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    choice.forget_plans()
    yield
    choice.forget_plans()


rows = st.sampled_from((1, 16, 128, 512, 513, 1024, 2048, 8192, 32768)) | st.integers(1, 1 << 17)
features = st.sampled_from((64, 384, 1024, 2048, 4096, 14336)) | st.integers(1, 1 << 15)
ranks = st.sampled_from((1, 8, 16, 32, 64, 128)) | st.integers(1, 300)
layers = st.builds(
    Problem,
    st.sampled_from(OPERATIONS),
    st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    rows,
    features,
    features,
    ranks,
    st.booleans(),
    st.booleans(),
    codes=st.sampled_from(("", "", "nf4", "int8")),
)
groups = st.builds(
    lambda problem, widths, makers: replace(
        problem, N=sum(widths), widths=tuple(widths), makers=makers, codes=""
    ),
    layers,
    st.lists(features, min_size=2, max_size=4),
    st.integers(1, 4),
)
devices = st.builds(
    lambda name, triton: Device(name, DEVICES[name], triton),
    st.sampled_from(sorted(DEVICES)),
    st.sampled_from(("3.6.0", "3.7.1")),
)


def is_specialised(recipe: Recipe) -> bool:
    expand = recipe.kernels.expand
    return expand is not None and expand.variant in WS_SUMS


@settings(max_examples=300)
@example(PROBLEM, H200, ("fused",))
@example(replace(PROBLEM, op="backward"), H200, NAMES)
@given(layers | groups, devices, st.sampled_from((NAMES, ("fused",), ("library",))))
def test_no_heuristic_takes_specialised_warps(problem, device, names):
    plan = make_plan(problem, device, names=names)
    assert plan.source == "heuristic"
    found = candidates(problem, device, names)
    for recipe in (plan.recipe, *found):
        assert not is_specialised(recipe)
        configs = kernel_configs(recipe, problem, device.limits).values()
        assert not {config.variant for config in configs} & WS_SUMS.keys()
    # Everything that may be launched, and all that explain tells.
    told = repr((plan.kernels, mixed_configs(problem, device.limits), plan.predicted, plan.reason))
    assert "'ws" not in told and "specialised" not in told
    frozen = config_of_frozen(problem, device)
    assert frozen is None or frozen.variant not in WS_SUMS


@pytest.mark.parametrize("R", [16, 64, 128])
@pytest.mark.parametrize("M", [64, 513, 2048, 8192])
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", DEVICES)
def test_nor_in_the_usual_sizes(name, op, M, R):
    device = Device(name, DEVICES[name], "3.7.1")
    for dtype in (torch.bfloat16, torch.float32):
        for bias in (False, True):
            problem = replace(PROBLEM, op=op, dtype=dtype, M=M, R=R, bias=bias)
            for names in (NAMES, ("fused",)):
                plan = make_plan(problem, device, names=names)
                assert "'ws" not in repr(plan) and "specialised" not in repr(plan)


# Unless it is pinned, or was measured here

WS = Recipe("fused", KernelPlan(expand=ws_configs(HOPPER, 2, 64)[0]))
ENTRY = Entry(key_of(PROBLEM), (Measured(WS, 1.0, 0.5), Measured(Recipe("library"), 2.0, 0.5)))


def test_a_pin_takes_them():
    assert make_plan(PROBLEM, H200, pin=make_pin({"forward": WS})).recipe == WS


def test_a_table_of_this_device_takes_them(tables):
    update_table(shipped_path(H200), H200, [ENTRY], {})
    plan = make_plan(PROBLEM, H200)
    assert (plan.source, plan.recipe) == ("table", WS)
    update_table(cache_path(H200), H200, [ENTRY], {})
    plan = make_plan(PROBLEM, H200)
    assert (plan.source, plan.recipe) == ("user cache", WS)


@pytest.mark.parametrize("ship", [shipped_path, cache_path])
@pytest.mark.parametrize("made_on", ["NVIDIA H100 80GB HBM3", "NVIDIA-H200", "nvidia h200"])
def test_one_of_another_device_under_this_one_s_name_does_not_count(tables, ship, made_on):
    assert obstacle(WS, PROBLEM, HOPPER) is None
    update_table(ship(H200), replace(H200, name=made_on), [ENTRY], {})
    with pytest.warns(UserWarning, match="is ignored: it is for "):
        plan = make_plan(PROBLEM, H200)
    assert plan.source == "heuristic" and not is_specialised(plan.recipe)


def test_of_another_triton_the_other_plans_of_the_entry_count(tables):
    update_table(shipped_path(H200), replace(H200, triton="3.6.0"), [ENTRY], {})
    plan = make_plan(PROBLEM, H200)
    assert (plan.source, plan.recipe) == ("table", Recipe("library"))
    assert "specialised" not in plan.reason
    plan = make_plan(PROBLEM, H200, names=("fused",))
    assert plan.source == "heuristic" and not is_specialised(plan.recipe)


def test_what_is_shipped_is_of_the_device_that_it_is_named_after():
    """With a Triton and a date, as tune writes it."""
    for path in sorted(lookup.Path(lookup.__file__).parent.glob("measured/*.json")):
        found = json.loads(path.read_text())
        assert shipped_path(Device(found["device"], HOPPER, "")).name == path.name
        assert found["triton"] and found["date"] and not found.get("stub")
