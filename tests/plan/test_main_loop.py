"""The measured rate of expand's main loop: kept in the table of a device, and followed by plans for sizes
that nobody measured.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from dataclasses import replace

import pytest
import torch

from lorafa_kernels import explain
from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.cost import MAIN_LOOP_SHARE
from lorafa_kernels.plan.make import make_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe
from lorafa_kernels.plan.tables import (
    Entry,
    Measured,
    cache_path,
    key_of,
    measured_main_loop,
    read_table,
    shipped_path,
    update_table,
)

HOPPER = KNOWN_DEVICES["sm_90"]
H100 = Device("NVIDIA H100 80GB HBM3", HOPPER, "3.7.1")
PROBLEM = Problem("forward", torch.bfloat16, 8192, 4096, 4096, 16)
ABOUT = {"torch": "2.11.0"}


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """An empty cache and no shipped table."""
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    choice.forget_plans()
    yield
    monkeypatch.undo()
    choice.forget_plans()


def plant(share: float, variant: str = "tma", device: Device = H100) -> None:
    update_table(cache_path(device), device, (), ABOUT, {variant: share})


def entry(M: int) -> Entry:
    return Entry(key_of(replace(PROBLEM, M=M)), (Measured(Recipe("library"), 1.0, 0.5),))


def write_as(measured: object, *entries: Entry) -> None:
    """A table whose field `measured` is this."""
    update_table(cache_path(H100), H100, entries, ABOUT, {"tma": 0.5})
    found = json.loads(cache_path(H100).read_text())
    cache_path(H100).write_text(json.dumps({**found, "measured": measured}))


# Plans


@pytest.mark.parametrize("op", ["forward", "backward", "backward_input"])
def test_a_slow_main_loop_takes_the_library_s_plan(op):
    problem = replace(PROBLEM, op=op)
    plant(0.97)
    assert make_plan(problem, H100).name == "fused"
    plant(0.7)
    plan = make_plan(problem, H100)
    assert (plan.name, plan.source) == ("library", "heuristic")
    assert plan.predicted_us == min(us for _, us in plan.predicted)


def test_the_predictions_of_a_measured_plan_follow_it_too():
    def predicted() -> float:
        (found,) = (us for name, us in make_plan(PROBLEM, H100).predicted if name == "fused, PDL")
        return found

    plans = (Measured(Recipe("library"), 9.0, 0.5), Measured(Recipe("fused"), 1.0, 0.5))
    update_table(cache_path(H100), H100, [Entry(key_of(PROBLEM), plans)], ABOUT)
    assumed = predicted()
    plant(0.7)
    assert make_plan(PROBLEM, H100).source == "user cache"
    assert predicted() > 1.2 * assumed


def test_the_user_s_own_measurement_comes_before_the_shipped_one():
    update_table(shipped_path(H100), replace(H100, triton="3.6.0"), (), ABOUT, {"tma": 0.7, "portable": 0.6})
    words = "measured on a device of this name"
    assert measured_main_loop(H100) == {"tma": (0.7, words), "portable": (0.6, words)}
    assert make_plan(PROBLEM, H100).name == "library"
    plant(0.97)
    assert measured_main_loop(H100) == {"tma": (0.97, "measured on this device"), "portable": (0.6, words)}
    assert make_plan(PROBLEM, H100).name == "fused"


def test_it_is_for_its_device_and_triton():
    plant(0.7)
    for other in (replace(H100, triton="3.6.0"), replace(H100, name="NVIDIA H200")):
        assert measured_main_loop(other) == {}
        assert make_plan(PROBLEM, other).name == "fused"


def test_wider_operands_and_other_variants_keep_what_is_assumed():
    fp32 = replace(PROBLEM, dtype=torch.float32)
    before = make_plan(fp32, H100)
    plant(0.7, "portable")
    assert make_plan(fp32, H100) == before and before.main_loop == (MAIN_LOOP_SHARE["portable"], "assumed")
    assert make_plan(PROBLEM, H100).main_loop == (MAIN_LOOP_SHARE["tma"], "assumed")


def test_explain_says_where_it_is_from(fake_gpu):
    triton = pytest.importorskip("triton").__version__
    fake_gpu(HOPPER, H100.name, (9, 0))
    sizes = (8192, 4096, 4096, 16)
    assumed = f"expand's main loop: at {MAIN_LOOP_SHARE['tma']:.2f} of the library's rate (assumed)"
    assert str(explain(sizes)).count(assumed) == 2
    plant(0.93, device=replace(H100, triton=triton))
    choice.forget_plans()
    told = str(explain(sizes))
    assert told.count("expand's main loop: at 0.93 of the library's rate (measured on this device)") == 2
    assert "assumed" not in told


def test_doctor_says_which_there_is(fake_gpu):
    from lorafa_kernels.checks.doctor import _describe_tables

    triton = pytest.importorskip("triton").__version__
    fake_gpu(HOPPER, H100.name, (9, 0))
    device = torch.device("cuda")
    assert "expand's main loop: assumed, tune measures it" in _describe_tables(device)
    plant(0.93, device=replace(H100, triton=triton))
    line = "expand's main loop: 0.93 of the library's rate (tma, measured on this device)"
    assert line in _describe_tables(device)


# Files


def test_it_is_read_as_it_was_written_beside_the_entries():
    update_table(cache_path(H100), H100, [entry(8192)], ABOUT, {"tma": 0.93127})
    table = read_table(cache_path(H100))
    assert table.main_loop == (("tma", 0.9313),) and table.entries == (entry(8192),)
    assert "measured" not in dict(table.about)


def test_a_later_write_keeps_the_entries_and_the_other_variant():
    plant(0.9)
    update_table(cache_path(H100), H100, [entry(8192)], ABOUT)
    plant(0.8, "portable")
    plant(0.95)
    table = read_table(cache_path(H100))
    assert dict(table.main_loop) == {"tma": 0.95, "portable": 0.8} and table.entries == (entry(8192),)


def test_two_writers_keep_both():
    path = cache_path(H100)

    def shares() -> None:
        for number in range(1, 21):
            plant(number / 20)

    def entries() -> None:
        for number in range(20):
            update_table(path, H100, [entry(1 << number)], ABOUT)

    threads = [threading.Thread(target=work) for work in (shares, entries)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = read_table(path)
    assert table.main_loop == (("tma", 1.0),) and len(table.entries) == 20


def test_a_table_without_it_is_as_before():
    update_table(cache_path(H100), H100, [entry(512)], ABOUT)
    assert "measured" not in json.loads(cache_path(H100).read_text())
    assert make_plan(PROBLEM, H100).main_loop == (MAIN_LOOP_SHARE["tma"], "assumed")


@pytest.mark.parametrize(
    "measured",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"main_loop_share": {}}, id="no-variant"),
        pytest.param({"main_loop_share": {"gluon": "fast"}}, id="variant-of-another-version"),
        pytest.param({"clock": 1980}, id="field-of-another-version"),
    ],
)
def test_what_another_version_writes_there_is_no_damage(measured):
    write_as(measured, entry(512))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(PROBLEM, H100).main_loop == (MAIN_LOOP_SHARE["tma"], "assumed")


@pytest.mark.parametrize(
    "measured",
    [
        *(
            pytest.param({"main_loop_share": {"tma": share}}, id=f"share-{share!r:.12}")
            for share in (0, -0.9, 2.01, 10**400, math.nan, math.inf, True, "0.9", None, [0.9])
        ),
        pytest.param({"main_loop_share": {"portable": 0.9, "tma": 3}}, id="one-of-two"),
        pytest.param({"main_loop_share": 0.9}, id="number"),
        pytest.param({"main_loop_share": None}, id="null"),
        pytest.param([], id="list"),
        pytest.param("[" * 500, id="text"),
    ],
)
def test_a_damaged_or_absurd_share_is_ignored_with_one_warning(measured):
    """The entries beside it count all the same."""
    write_as(measured, entry(8192))
    with pytest.warns(UserWarning) as caught:
        assert make_plan(PROBLEM, H100).source == "user cache"
        assert make_plan(replace(PROBLEM, M=512), H100).main_loop == (MAIN_LOOP_SHARE["tma"], "assumed")
    (said,) = (str(one.message) for one in caught)
    assert f"the field measured of {cache_path(H100)} is ignored: " in said and len(said) < 500
    plant(0.9)
    assert read_table(cache_path(H100)).entries == (entry(8192),)
    assert measured_main_loop(H100) == {"tma": (0.9, "measured on this device")}


@pytest.mark.parametrize("share", [2, 2.0, 1e-3], ids=repr)
def test_the_bounds(share):
    write_as({"main_loop_share": {"tma": share}})
    assert measured_main_loop(H100)["tma"][0] == share


def test_that_of_a_stub_driver_is_marked_and_never_used():
    stub = replace(H100, name="STUB sm_90")
    plant(0.7, device=stub)
    assert json.loads(cache_path(stub).read_text())["stub"] is True
    with pytest.warns(UserWarning, match="stub driver"):
        assert measured_main_loop(stub) == {}
    # Nor where somebody renames the device.
    write = json.loads(cache_path(stub).read_text()) | {"device": H100.name}
    cache_path(H100).write_text(json.dumps(write))
    with pytest.warns(UserWarning, match="stub driver"):
        assert measured_main_loop(H100) == {}
