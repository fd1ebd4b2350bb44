"""A table or a pin file that holds nonsense is ignored with one warning, and every forward runs."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafa_kernels import LoRAFALinear, files
from lorafa_kernels.plan import choice, pin
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelConfig, KernelPlan, wrong_field
from lorafa_kernels.plan.make import make_plan
from lorafa_kernels.plan.pin import pin_plan, pinned
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, kernel_configs, recipe_to_json
from lorafa_kernels.plan.tables import cache_path, key_of, read_table
from lorafa_kernels.tune.search import STEPS

H200 = Device("NVIDIA H200", KNOWN_DEVICES["sm_90"], "3.6.0")
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
SIZES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_R": 16, "GROUP_M": 1, "num_warps": 4}
SIZES |= {"num_stages": 2}
HUGE = 10**400
DEEP = "[" * 5000 + "]" * 5000

# One field of a configuration of expand, and what is wrong in it.
ABSURD = {
    "zero-block": {"BLOCK_M": 0},
    "negative-block": {"BLOCK_N": -64},
    "block-of-48": {"BLOCK_K": 48},
    "small-block": {"BLOCK_R": 8},
    "wide-block": {"BLOCK_M": 1 << 16},
    "huge-block": {"BLOCK_M": HUGE},
    "block-as-float": {"BLOCK_M": 64.0},
    "block-as-text": {"BLOCK_M": "64"},
    "block-as-flag": {"BLOCK_M": True},
    "block-as-list": {"BLOCK_M": [64]},
    "no-block": {"BLOCK_M": None},
    "three-warps": {"num_warps": 3},
    "many-warps": {"num_warps": 64},
    "huge-warps": {"num_warps": HUGE},
    "no-stages": {"num_stages": 0},
    "many-stages": {"num_stages": 1 << 20},
    "no-group": {"GROUP_M": 0},
    "huge-group": {"GROUP_M": HUGE},
    "negative-split": {"SPLIT_K": -1},
    "three-parts": {"EPILOGUE_SUBTILE": 3},
    "no-blocks-an-sm": {"ctas_per_sm": 0},
    "variant": {"variant": "magic"},
    "variant-of-no-kind": {"variant": ["tma"]},
    "box-over-256": {"variant": "tma", "BLOCK_M": 512},
    "unknown-field": {"BLOCK_Z": 1},
    "huge-name": {"B" * 100_000: 1},
}


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    choice.forget_plans()
    yield
    # The variable is gone again when this runs.
    monkeypatch.undo()
    choice.forget_plans()


def a_plan(config: dict | None = None, **change) -> dict:
    return {"name": "fused", "configs": {"expand": {**SIZES, **(config or {})}}, **change}


def a_table(config: dict | None = None, entry: dict | None = None, **change) -> str:
    plan = {**a_plan(config), "device_us": 1.0, "host_us": 1.0, **change.pop("plan", {})}
    key = {**key_of(PROBLEM).__dict__, "plans": [plan], **(entry or {})}
    return json.dumps({"format": 1, "device": H200.name, "triton": H200.triton, "entries": [key], **change})


def write_table(text: str) -> None:
    cache_path(H200).parent.mkdir(exist_ok=True)
    cache_path(H200).write_text(text)


def assert_ignored_with_one_warning(match: str):
    """The plan for two sizes, the second of which must not warn again."""
    with pytest.warns(UserWarning, match="is ignored: ") as caught:
        assert make_plan(PROBLEM, H200).source == "heuristic"
    assert len(caught) == 1
    said = str(caught[0].message)
    assert match in said and len(said) < 500 and "\n" not in said, said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(Problem("forward", torch.bfloat16, 512, 4096, 4096, 16), H200).source == "heuristic"


def test_what_is_damaged_below_is_sound():
    write_table(a_table())
    assert make_plan(PROBLEM, H200).source == "user cache"


@pytest.mark.parametrize("damage", ABSURD)
def test_a_table_with_absurd_blocks_is_ignored(damage):
    write_table(a_table(ABSURD[damage]))
    assert_ignored_with_one_warning("entry 0: the configuration of expand has")


@pytest.mark.parametrize(
    "table",
    [
        pytest.param({"entry": {"K": HUGE}}, id="huge-size"),
        pytest.param({"entry": {"rows": -1}}, id="negative-rows"),
        pytest.param({"entry": {"N": 4096.0}}, id="size-as-float"),
        pytest.param({"entry": {"op": ["forward"]}}, id="op"),
        pytest.param({"entry": {"rank": True}}, id="rank-as-flag"),
        pytest.param({"entry": {"plans": [DEEP]}}, id="plan-as-text"),
        pytest.param({"plan": {"device_us": HUGE}}, id="huge-time"),
        pytest.param({"plan": {"host_us": -1.0}}, id="negative-time"),
        pytest.param({"plan": {"device_us": float("inf")}}, id="endless-time"),
        pytest.param({"plan": {"configs": {"shrinc": SIZES}}}, id="kernel"),
        pytest.param({"plan": {"configs": HUGE}}, id="configs"),
        pytest.param({"device": "x" * 100_000}, id="device"),
        pytest.param({"triton": [[1] * 10_000]}, id="triton"),
    ],
)
def test_a_table_with_other_absurd_fields_is_ignored(table):
    write_table(a_table(**table))
    assert_ignored_with_one_warning("")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param(DEEP, "nested too deeply", id="deep"),
        pytest.param('{"format": 1, "entries": ' + DEEP + "}", "nested too deeply", id="deep-inside"),
        pytest.param("[" * 900 + "]" * 900, "format 1", id="as-deep-as-is-read"),
        pytest.param(
            '{"format": 1, "device": "d", "triton": "t", "entries": [' + "[" * 900 + "]" * 900 + "]}",
            "entry 0",
            id="deep-entry",
        ),
        pytest.param("9" * 5000, "", id="digits"),
        pytest.param(" " * (files.MOST_BYTES + 1), "larger than", id="large"),
    ],
)
def test_a_table_that_strains_the_reader_is_ignored(text, match):
    write_table(text)
    assert_ignored_with_one_warning(match)


def test_whatever_is_shown_in_a_message_is_one_short_line():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert files.shown(deep) == "something of type list"
    for value in (10**5000, "a\nb" * 1000, {"k" * 1000: [1] * 1000}):
        assert len(files.shown(value)) < 100 and "\n" not in files.shown(value)


def make_special(path, kind: str):
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)


SPECIAL = [
    pytest.param("pipe", "not a regular file", id="pipe"),
    pytest.param("folder", "not a regular file", id="folder"),
    pytest.param("device", "not a regular file", id="endless-device"),
    pytest.param("loop", "", id="link-to-itself"),
]


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize(("kind", "match"), SPECIAL)
def test_what_is_no_file_is_ignored_at_once(kind, match):
    make_special(cache_path(H200), kind)
    assert_ignored_with_one_warning(match)


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_that_takes_the_file_s_place_does_not_block(monkeypatch, tmp_path):
    """Between the look at the path and opening it."""
    path, sound = tmp_path / "pipe", tmp_path / "sound"
    sound.write_text("{}")
    os.mkfifo(path)
    monkeypatch.setattr(files.os, "stat", lambda asked, right=os.stat: right(sound))
    with pytest.raises(ValueError, match="not a regular file"):
        files.read_json(path)


# Pins


def pinned_by(monkeypatch, path) -> None:
    monkeypatch.setenv(pin.PLAN_VARIABLE, str(path))
    pin.forget_environment()


def assert_pin_ignored(match: str) -> None:
    layer, x = LoRAFALinear(8, 8, r=2), torch.randn(2, 8)
    with pytest.warns(UserWarning, match=f"{pin.PLAN_VARIABLE}=.* is ignored: ") as caught:
        layer(x)
    said = [str(one.message) for one in caught if pin.PLAN_VARIABLE in str(one.message)]
    assert len(said) == 1 and match in said[0] and len(said[0]) < 500, said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        assert pinned() is None


@pytest.mark.parametrize("damage", ABSURD)
def test_a_pin_file_with_absurd_blocks_is_ignored(monkeypatch, tmp_path, damage):
    (tmp_path / "pin.json").write_text(json.dumps({"forward": a_plan(ABSURD[damage])}))
    pinned_by(monkeypatch, tmp_path / "pin.json")
    assert_pin_ignored("the configuration of expand has")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param("{", "Expecting property name", id="no-json"),
        pytest.param("[]", "expected a JSON object", id="list"),
        pytest.param('{"sideways": {"name": "fused"}}', "unknown operations sideways", id="op"),
        pytest.param(json.dumps({"s" * 9999: {"name": "fused"}}), "unknown operations sss", id="long-op"),
        pytest.param('{"forward": {"name": "magic"}}', "name is 'fused' or 'library'", id="name"),
        pytest.param('{"forward": {"name": "fused", "pdl": 1}}', "pdl is true or false", id="flag"),
        pytest.param('{"forward": 5}', "a plan is an object", id="number"),
        pytest.param(DEEP, "nested too deeply", id="deep"),
        pytest.param('{"forward": ' + "[" * 900 + "]" * 900 + "}", "a plan is an object", id="deep-plan"),
        pytest.param(" " * (files.MOST_BYTES + 1), "larger than", id="large"),
        pytest.param("\udcff", "decode", id="binary"),
    ],
)
def test_a_pin_file_that_holds_no_plans_is_ignored(monkeypatch, tmp_path, text, match):
    (tmp_path / "pin.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    pinned_by(monkeypatch, tmp_path / "pin.json")
    assert_pin_ignored(match)


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize(("kind", "match"), SPECIAL)
def test_a_pin_that_is_no_file_is_ignored_at_once(monkeypatch, tmp_path, kind, match):
    make_special(tmp_path / "pin", kind)
    pinned_by(monkeypatch, tmp_path / "pin")
    assert_pin_ignored(match)


def config(**change) -> KernelConfig:
    return KernelConfig(**{**SIZES, **change})


@pytest.mark.parametrize(
    "damage", [name for name, wrong in ABSURD.items() if set(wrong) <= set(KernelConfig.__dataclass_fields__)]
)
def test_pinning_absurd_blocks_by_code_is_an_error_that_names_them(damage):
    """Who writes code is told: nothing is pinned."""
    plan = {"forward": Recipe("fused", KernelPlan(expand=config(**ABSURD[damage])))}
    named = "BLOCK_M" if damage == "box-over-256" else next(iter(ABSURD[damage]))
    expected = f"the plan of forward: the configuration of expand has {named}="
    with pytest.raises(ValueError, match=expected), pin_plan(plan):
        pass
    assert pinned() is None


@pytest.mark.parametrize("plan", [5, None, ["fused"], {"forward": "fused"}, {"forward": None}], ids=repr)
def test_pinning_what_is_no_plan_is_a_type_error(plan):
    with pytest.raises(TypeError, match="expected a"), pin_plan(plan):
        pass


# What is sound stays so


def test_every_configuration_that_the_heuristics_and_the_search_take_is_accepted():
    """A table of this version's own must not be refused by it."""
    problems = [
        Problem(op, dtype, M, N, 4096, R, dropout=dropout)
        for op in ("forward", "backward", "backward_input", "backward_lora_B")
        for dtype in (torch.bfloat16, torch.float32)
        for M in (1, 64, 128, 512, 8192)
        for N in (4096, 4100)
        for R in (1, 16, 64, 128, 256)
        for dropout in (False, True)
    ]
    for limits in (*KNOWN_DEVICES.values(), INTERPRETER):
        for problem in problems:
            for kernel, found in kernel_configs(Recipe("fused"), problem, limits).items():
                assert wrong_field(kernel, found) is None, (kernel, found)
    blocks = {"shrink": config(BLOCK_N=0), "expand": config(), "grad": config(BLOCK_K=0)}
    for kernel, axes in STEPS.items():
        for name, values in axes.items():
            for value in values:
                if name != "SPLIT_K" or kernel == "shrink":
                    changed = KernelConfig(**{**blocks[kernel].__dict__, name: value})
                    assert wrong_field(kernel, changed) is None, (kernel, changed)


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([0, -1, 3, 16, 64, HUGE, 1 << 40]),
        st.floats(allow_nan=False),
        st.text(max_size=8),
        st.sampled_from(["fused", "library", "tma", "recompute"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["entry", "plan", "config", "table"]), st.data())
def test_whatever_replaces_a_field_the_table_is_read_or_refused(tmp_path, level, data):
    """Read: then a plan comes out of it. Refused: by ValueError in a line."""
    names = {
        "entry": [*key_of(PROBLEM).__dict__, "plans"],
        "plan": ["name", "one_pass", "pdl", "configs", "device_us", "host_us"],
        "config": list(KernelConfig.__dataclass_fields__),
        "table": ["format", "device", "triton", "date", "entries"],
    }[level]
    change = {data.draw(st.sampled_from(names)): data.draw(json_values)}
    text = a_table(**(change if level == "table" else {level: change}))
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        table = read_table(path)
    except ValueError as error:
        assert len(str(error)) < 500
        return
    lookup.forget()
    cached = lookup._table
    lookup._table = lambda *_: table
    try:
        for M in (1, 100, 8192):
            plan = make_plan(Problem("forward", torch.bfloat16, M, 4096, 4096, 16), H200)
            assert recipe_to_json(plan.recipe, "forward")["name"] in ("fused", "library")
    finally:
        lookup._table = cached


@pytest.mark.numerics
def test_a_layer_computes_the_same_beside_an_absurd_table(triton_device):
    device = torch.device(triton_device)
    target = choice.planned_device(device)
    layer = LoRAFALinear(32, 32, r=4, init_lora_weights=False, device=device)
    layer.impl = "triton"
    x = torch.randn(4, 32, device=device)
    right = layer(x)
    entry = {"op": "forward", "dtype": "float32", "K": 32, "N": 32, "rank": 16, "rows": 4}
    path = cache_path(target)
    path.parent.mkdir()
    path.write_text(a_table({"BLOCK_M": 0}, entry, device=target.name, triton=target.triton))
    choice.forget_plans()
    with pytest.warns(UserWarning, match="is ignored: entry 0: .* has BLOCK_M=0") as caught:
        assert torch.equal(layer(x), right)
        assert torch.equal(layer(x), right)
    assert sum("is ignored" in str(one.message) for one in caught) == 1
