"""Which plan runs: what is pinned, then what was measured, then what is predicted; and always something."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorafa_kernels import LoRAFALinear, explain
from lorafa_kernels.checks.budget import (
    allowed_error,
    draw_operands,
    lorafa_results,
    plain_formula,
    relative_error,
)
from lorafa_kernels.linear import ops
from lorafa_kernels.plan import choice, pin
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, DeviceLimits, KernelConfig, KernelPlan
from lorafa_kernels.plan.make import SOURCES, make_plan
from lorafa_kernels.plan.pin import Pin, pin_plan, pinned
from lorafa_kernels.plan.recipe import (
    OPERATIONS,
    Device,
    Problem,
    Recipe,
    obstacle,
    recipe_from_json,
    recipe_to_json,
)
from lorafa_kernels.plan.tables import Entry, Key, Measured, cache_path, key_of, read_table

HOPPER = KNOWN_DEVICES["sm_90"]
H200 = Device("NVIDIA H200", HOPPER, "3.6.0")
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
EXPAND = KernelConfig(64, 128, 64, 16, 8, 4, 3)
FUSED = Recipe("fused", KernelPlan(expand=EXPAND, pdl=False))
LIBRARY = Recipe("library")


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """An empty cache and no shipped table."""
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    choice.forget_plans()
    yield
    choice.forget_plans()


def entry(problem: Problem = PROBLEM, fused_us: float = 1.0, library_us: float = 2.0) -> Entry:
    plans = (Measured(LIBRARY, library_us, 0.5), Measured(FUSED, fused_us, 0.5))
    return Entry(key_of(problem), plans)


def write_cache(*entries: Entry, device: Device = H200) -> None:
    lookup.update_table(cache_path(device), device, entries, {"torch": "2.11.0"})


def ship(*entries: Entry, triton: str = "3.6.0") -> None:
    lookup.update_table(lookup.shipped_path(H200), replace(H200, triton=triton), entries, {})


# Lookup order


def test_without_tables_the_least_predicted_time_wins():
    plan = make_plan(PROBLEM, H200)
    assert plan.source == "heuristic"
    assert plan.predicted_us == min(us for _, us in plan.predicted)
    assert len({name for name, _ in plan.predicted}) == len(plan.predicted) >= 3


def test_the_user_s_own_measurement_comes_before_the_shipped_one():
    ship(entry(fused_us=3.0))
    assert make_plan(PROBLEM, H200).source == "table"
    assert make_plan(PROBLEM, H200).name == "library"
    write_cache(entry(fused_us=1.0))
    plan = make_plan(PROBLEM, H200)
    assert (plan.source, plan.recipe) == ("user cache", FUSED)
    assert "fused 1.0 us, library 2.0 us" in plan.reason


def test_the_shipped_entry_serves_where_the_user_has_measured_other_sizes():
    write_cache(entry(replace(PROBLEM, M=2048)))
    assert make_plan(PROBLEM, H200).source == "heuristic"
    ship(entry(fused_us=3.0))
    assert make_plan(PROBLEM, H200).source == "table"


def test_host_time_counts_where_it_is_the_larger():
    plans = (Measured(FUSED, 5.0, 40.0), Measured(LIBRARY, 9.0, 12.0))
    write_cache(Entry(key_of(PROBLEM), plans))
    assert make_plan(PROBLEM, H200).name == "library"


def test_a_shipped_table_serves_every_triton():
    ship(entry(), triton="3.9.9")
    assert make_plan(PROBLEM, H200).source == "table"


def test_impl_triton_takes_fused_plans_alone(fake_gpu):
    write_cache(entry(fused_us=5.0, library_us=2.0), device=Device("NVIDIA H200", HOPPER, _triton_version()))
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    sizes = (8192, 4096, 4096, 16)
    assert explain(sizes).plans["forward"].plan.name == "library"
    fused = explain(sizes, impl="triton").plans["forward"].plan
    assert (fused.recipe, fused.source) == (FUSED, "user cache")
    assert explain(sizes, impl="triton").plans["backward"].plan.name == "fused"


def test_a_measured_plan_that_does_not_fit_the_device_is_passed_over():
    write_cache(entry())
    tight = replace(H200, limits=DeviceLimits("sm_90", 16 * 1024, 132))
    assert obstacle(FUSED, PROBLEM, tight.limits)
    assert make_plan(PROBLEM, tight, names=("fused",)).source == "heuristic"
    assert make_plan(PROBLEM, tight).recipe == LIBRARY


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        pytest.param({"bias": True}, True, id="bias"),
        pytest.param({"M": 2048}, False, id="rows"),
        pytest.param({"N": 14336}, False, id="N"),
        pytest.param({"R": 128}, False, id="rank"),
        pytest.param({"op": "backward"}, False, id="op"),
        pytest.param({"dtype": torch.float16}, False, id="dtype"),
        pytest.param({"dropout": True}, False, id="dropout"),
    ],
)
def test_a_measurement_speaks_for_its_own_bucket_alone(change, measured):
    write_cache(entry(replace(PROBLEM, **change)))
    assert make_plan(PROBLEM, H200).source == ("user cache" if measured else "heuristic")


def test_buckets():
    def bucket(**change) -> Key:
        return key_of(replace(PROBLEM, **change))

    assert bucket(R=1) == bucket(R=16) != bucket(R=17)
    assert bucket(R=33).rank == 64
    assert bucket(M=11585).rows == 8192 and bucket(M=11586).rows == 16384
    assert bucket(M=1).rows == 1 and bucket(M=3).rows == 4


limits = st.sampled_from([*KNOWN_DEVICES.values(), DeviceLimits("sm_990", 40 * 1024, 7), INTERPRETER])
sizes = st.one_of(st.integers(0, 300), st.integers(1, 1 << 20))


@settings(max_examples=300)
@given(
    st.sampled_from(OPERATIONS),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    sizes,
    sizes,
    sizes,
    st.integers(1, 300),
    limits,
    st.booleans(),
)
def test_every_device_and_shape_gets_a_plan_that_can_run(op, dtype, M, N, K, R, limits, fused):
    names = ("fused",) if fused else ("fused", "library")
    problem, device = Problem(op, dtype, M, N, K, R), Device("Unheard-of 9000", limits, "3.6.0")
    plan = make_plan(problem, device, names=names)
    assert plan.name in names and plan.source in SOURCES
    assert obstacle(plan.recipe, replace(problem, M=max(1, M)), limits) is None
    assert plan == make_plan(problem, device, names=names)


# Tables


def test_a_table_is_read_as_it_was_written():
    backward = Entry(
        key_of(replace(PROBLEM, op="backward")),
        (Measured(Recipe("fused", KernelPlan(EXPAND, EXPAND, EXPAND, one_pass=False)), 1.5, 2.25),),
    )
    write_cache(entry(), backward)
    table = read_table(cache_path(H200))
    assert set(table.entries) == {entry(), backward}
    assert dict(table.about)["torch"] == "2.11.0" and table.device == "NVIDIA H200"


def test_an_update_keeps_the_other_entries():
    write_cache(entry(fused_us=1.0), entry(replace(PROBLEM, M=2048)))
    write_cache(entry(fused_us=9.0))
    table = read_table(cache_path(H200))
    assert len(table.entries) == 2 and table.by_key[key_of(PROBLEM)] == entry(fused_us=9.0)


def test_an_interrupted_write_leaves_the_file_as_it_was(monkeypatch):
    write_cache(entry())
    before = cache_path(H200).read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lookup.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cache(entry(fused_us=9.0))
    assert cache_path(H200).read_bytes() == before
    assert list(cache_path(H200).parent.iterdir()) == [cache_path(H200)]


def broken(**change) -> str:
    """A table with one thing changed: in the file, in its entry, in its plan, or in a configuration."""
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "GROUP_M": 1, "num_warps": 4}
    config = {**config, "num_stages": 2, **change.pop("config", {})}
    plan = {"name": "fused", "configs": {"expand": config}, "device_us": 1.0, "host_us": 1.0}
    plan |= change.pop("plan", {})
    key = {**key_of(PROBLEM).__dict__, "plans": [plan], **change.pop("entry", {})}
    table = {"format": 1, "device": H200.name, "triton": H200.triton, "entries": [key], **change}
    return json.dumps(table)


DAMAGED = {
    "no-json": '{"format": 1, "entr',
    "empty": "",
    "binary": "\x00\x01\udcff",
    "list": "[]",
    "nested": "[" * 200_000,
    "format": broken(format=2),
    "device": broken(device="NVIDIA H100"),
    "triton": broken(triton="3.5.0"),
    "no-device": broken(device=None),
    "no-entries": broken(entries={}),
    "entry": broken(entries=[1]),
    "op": broken(entry={"op": "sideways"}),
    "field": broken(entry={"speed": 1}),
    "size": broken(entry={"K": "4096"}),
    "rank": broken(entry={"rank": 0}),
    "no-plans": broken(entry={"plans": []}),
    "plan": broken(plan={"name": "magic"}),
    "flag": broken(plan={"pdl": 1}),
    "time": broken(plan={"device_us": math.nan}),
    "no-time": broken(plan={"host_us": None}),
    "config": broken(config={"BLOCK_Z": 1}),
    "block": broken(config={"BLOCK_M": 48}),
    "small-block": broken(config={"BLOCK_K": 8}),
    "warps": broken(config={"num_warps": 0}),
    "variant": broken(config={"variant": "magic"}),
}


def test_the_undamaged_table_is_one():
    cache_path(H200).parent.mkdir()
    cache_path(H200).write_text(broken())
    assert make_plan(PROBLEM, H200).source == "user cache"


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_cache_is_ignored_with_one_warning(damage):
    path = cache_path(H200)
    path.parent.mkdir()
    path.write_bytes(DAMAGED[damage].encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning) as caught:
        first = make_plan(PROBLEM, H200)
    assert len(caught) == 1 and f"{path} is ignored: " in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(replace(PROBLEM, M=512), H200).source == "heuristic"
    path.unlink()
    lookup.forget()
    assert first == make_plan(PROBLEM, H200)


def test_a_cache_that_cannot_be_read_is_ignored():
    cache_path(H200).mkdir(parents=True)
    with pytest.warns(UserWarning, match="is ignored"):
        assert make_plan(PROBLEM, H200).source == "heuristic"


def test_a_damaged_cache_is_replaced_by_the_next_measurement():
    cache_path(H200).parent.mkdir()
    cache_path(H200).write_text("{")
    write_cache(entry())
    assert make_plan(PROBLEM, H200).source == "user cache"


def test_cache_files_are_named_after_device_and_triton(monkeypatch):
    monkeypatch.delenv(lookup.CACHE_VARIABLE)
    path = cache_path(Device("NVIDIA GeForce RTX 4090 / odd", HOPPER, "3.7.1+git"))
    assert path.name == "NVIDIA-GeForce-RTX-4090-odd-triton-3.7.1-git.json"
    assert "lorafa_kernels" in str(path.parent)


def test_shipped_tables_can_be_read(monkeypatch):
    monkeypatch.undo()
    assert lookup.SHIPPED.is_dir()
    for path in lookup.SHIPPED.glob("*.json"):
        table = read_table(path)
        assert path == lookup.shipped_path(Device(table.device, HOPPER, table.triton))
        assert table.entries and dict(table.about)["date"]


# Pins


def test_a_pinned_name_comes_first_and_takes_its_details_as_always():
    write_cache(entry(fused_us=1.0, library_us=2.0))
    plan = make_plan(PROBLEM, H200, pin=Pin("somebody", "library"))
    assert (plan.name, plan.source) == ("library", "pinned")
    assert "somebody" in plan.reason and "user cache" in plan.reason
    fused = make_plan(PROBLEM, H200, pin=Pin("somebody", "fused"))
    assert fused.recipe == FUSED


def test_a_pinned_recipe_concerns_its_operation_alone():
    only = Pin("somebody", recipes=(("backward", Recipe("library")),))
    assert make_plan(replace(PROBLEM, op="backward"), H200, pin=only).source == "pinned"
    assert make_plan(PROBLEM, H200, pin=only).source == "heuristic"


@pytest.mark.parametrize(
    ("config", "limits", "missing"),
    [
        pytest.param(
            replace(EXPAND, BLOCK_M=256, BLOCK_N=256, num_stages=5), HOPPER, "shared memory", id="memory"
        ),
        pytest.param(
            replace(EXPAND, variant="tma"), KNOWN_DEVICES["sm_80"], "sm_90 or newer, not sm_80", id="tma"
        ),
    ],
)
def test_a_pinned_plan_that_cannot_run_raises(fake_gpu, config, limits, missing):
    fake_gpu(limits, "Some GPU", (9, 0))
    with pin_plan({"forward": Recipe("fused", KernelPlan(expand=config))}):
        with pytest.raises(RuntimeError, match=f"pinned by pin_plan cannot run on Some GPU: .*{missing}"):
            explain((8192, 4096, 4096, 16))
        assert explain((8192, 4096, 4096, 16), impl="torch").impl == "torch"


def test_pins_nest_and_end():
    assert pinned() is None
    with pin_plan("fused"):
        with pin_plan("library"):
            assert pinned().name == "library"
        assert pinned().name == "fused"
    assert pinned() is None
    with pytest.raises(KeyError), pin_plan("fused"):
        raise KeyError
    assert pinned() is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        pytest.param("quick", "unknown plan 'quick', expected one of 'fused', 'library'", id="name"),
        pytest.param({"sideways": FUSED}, "unknown operations sideways, expected some of forward", id="op"),
    ],
)
def test_pins_that_make_no_sense(plan, message):
    with pytest.raises(ValueError, match=message), pin_plan(plan):
        pass


def set_variable(monkeypatch, value: str) -> None:
    monkeypatch.setenv(pin.PLAN_VARIABLE, value)
    choice.forget_plans()


def test_the_variable_pins_a_name(monkeypatch, fake_gpu):
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    set_variable(monkeypatch, "library")
    told = explain((8192, 4096, 4096, 16))
    assert {planned.plan.name for planned in told.plans.values()} == {"library"}
    assert "'library' by LORAFA_KERNELS_PLAN" in str(told)
    with pin_plan("fused"):
        assert explain((8192, 4096, 4096, 16)).plans["forward"].plan.name == "fused"
    # An implementation that is asked for by name is not replaced.
    assert explain((8192, 4096, 4096, 16), impl="triton").plans["forward"].plan.name == "fused"


def test_the_variable_pins_a_file(monkeypatch, fake_gpu, tmp_path):
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"forward": recipe_to_json(FUSED, "forward")}))
    set_variable(monkeypatch, str(file))
    told = explain((8192, 4096, 4096, 16))
    assert told.plans["forward"].plan.recipe == FUSED
    assert told.plans["forward"].configs["expand"] == EXPAND
    assert (told.plans["forward"].plan.source, told.plans["backward"].plan.source) == ("pinned", "heuristic")


@pytest.mark.parametrize("value", ["fussed", "no/such/plan.json", "x" * 300], ids=["word", "path", "long"])
def test_a_variable_that_names_nothing_is_an_error_that_says_so(monkeypatch, value):
    set_variable(monkeypatch, value)
    layer = LoRAFALinear(8, 8, r=2)
    with pytest.raises(ValueError, match="expected 'fused', 'library' or a JSON file") as caught:
        layer(torch.randn(2, 8))
    assert str(caught.value).startswith(f"LORAFA_KERNELS_PLAN={value}: ")
    layer.impl = "torch"
    assert layer(torch.randn(2, 8)).shape == (2, 8)


def test_a_recipe_is_read_as_it_was_written():
    for op in OPERATIONS:
        for recipe in (Recipe("fused"), Recipe("library"), Recipe("fused", KernelPlan(pdl=False))):
            assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe, op)))) == recipe
    one_pass = Recipe("fused", KernelPlan(EXPAND, EXPAND, EXPAND, one_pass=False))
    assert recipe_from_json(recipe_to_json(one_pass, "backward")) == one_pass


# What runs


PLANS = {
    "fused": "fused",
    "library": "library",
    "library-one-pass": {"backward": Recipe("library", KernelPlan(one_pass=True))},
    "library-three-products": {"backward": Recipe("library", KernelPlan(one_pass=False))},
    "fused-two-passes": {op: Recipe("fused", KernelPlan(one_pass=False)) for op in ("forward", "backward")},
}


@pytest.mark.numerics
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_plan_keeps_the_promised_accuracy(triton_device, plan, dtype):
    operands = draw_operands(160, 40, 48, 6, dtype, triton_device, factor_dtype=torch.float32)
    exact, plain = plain_formula(operands, torch.float64), plain_formula(operands)
    with pin_plan(PLANS[plan]):
        got = lorafa_results(operands, "auto")
    for name, tensor in got.items():
        allowed = allowed_error(relative_error(plain[name], exact[name]), tensor.dtype)
        assert relative_error(tensor, exact[name]) <= allowed, name


def test_one_pass_over_dy_runs_the_kernel_and_the_library(triton_device, monkeypatch):
    from lorafa_kernels.kernels import grad as module

    ran = []
    right = module.grad
    monkeypatch.setattr(
        module, "grad", lambda *args, **options: ran.append(options) or right(*args, **options)
    )
    operands = draw_operands(160, 40, 48, 6, torch.float32, triton_device)
    config = KernelConfig(32, 32, 0, 16, 1, 4, 1)
    with pin_plan({"backward": Recipe("library", KernelPlan(grad=config))}):
        lorafa_results(operands, "auto")
    assert [one["config"] for one in ran] == [config]


def test_fake_tensors_with_symbolic_rows_pass_through(triton_device):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    i = draw_operands(10, 12, 14, 3, torch.float32, triton_device)
    with mode, pin_plan("fused"):
        x = mode.from_tensor(i.x, symbolic_context=None, static_shapes=False)
        rest = [mode.from_tensor(t, static_shapes=True) for t in (i.weight, i.lora_A, i.lora_B, i.bias)]
        y, z = ops.forward(x, *rest, 0.5, "auto")
    assert (y.shape[1], z.shape[1]) == (14, 3)


def test_a_plan_is_chosen_once_for_a_shape(fake_gpu):
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    device = torch.device("cuda")
    for M in range(8000, 8193):
        choice.choose_plan("auto", "forward", device, torch.bfloat16, M, 4096, 4096, 16, False)
    # 16 steps an octave: 8000 to 8192 are two of them.
    assert choice._plan.cache_info().misses <= 2
    for M in range(1, 1 << 14, 7):
        choice.choose_plan("auto", "forward", device, torch.bfloat16, M, 4096, 4096, 16, False)
    assert choice._plan.cache_info().currsize < 300
    assert choice._plan.cache_info().maxsize is not None


@pytest.mark.numerics
def test_compiled_and_eager_layers_take_the_plan_that_is_pinned_when_they_run(triton_device):
    torch._dynamo.reset()
    layer = LoRAFALinear(16, 24, r=4, init_lora_weights=False, device=triton_device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(7, 16, device=triton_device)
    with pin_plan("library"):
        assert torch.equal(compiled(x), layer(x))
    with pin_plan("fused"):
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x), layer(x))


def _triton_version() -> str:
    return pytest.importorskip("triton").__version__
