"""dB's kernel runs beside dx where the model of the cost sees a gain that is worth it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafa_kernels.plan import choice
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, runs_beside
from lorafa_kernels.plan.tables import Entry, Measured, cache_path, key_of, update_table

H100 = Device("NVIDIA H100 80GB HBM3", KNOWN_DEVICES["sm_90"], "3.7.1")
H200 = replace(H100, name="NVIDIA H200")
B200 = Device("NVIDIA B200", KNOWN_DEVICES["sm_100"], "3.7.1")
A100 = Device("NVIDIA A100-SXM4-80GB", KNOWN_DEVICES["sm_80"], "3.7.1")
PROBLEM = Problem("backward", torch.bfloat16, 8192, 4096, 4096, 64)
BESIDE = "fused, dB beside dx"


@pytest.fixture(autouse=True)
def no_tables(monkeypatch, tmp_path):
    """An empty cache and no shipped table."""
    monkeypatch.setenv(lookup.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    choice.forget_plans()
    yield
    choice.forget_plans()


def gain(plan) -> str:
    """What the model says dB beside dx gains over the best of the others: "nothing", "little" or "enough"."""
    times = dict(plan.predicted)
    beside, best = times.pop(BESIDE), min(times.values())
    if beside >= best:
        return "nothing"
    return "enough" if beside < 0.97 * best else "little"


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        pytest.param(PROBLEM, H100, id="H100"),
        pytest.param(PROBLEM, H200, id="H200"),
        pytest.param(replace(PROBLEM, M=32768), H100, id="more-rows"),
        pytest.param(replace(PROBLEM, N=14336), H100, id="wider"),
        pytest.param(replace(PROBLEM, R=128), H100, id="R-128"),
    ],
)
def test_on_where_the_model_sees_a_gain(problem, device):
    plan = make_plan(problem, device)
    assert runs_beside(plan.recipe, "backward") and plan.kernels.beside
    assert gain(plan) == "enough" and plan.reason.startswith("least predicted time")


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        pytest.param(replace(PROBLEM, R=16, M=2048), H100, id="one-pass-is-faster"),
        pytest.param(replace(PROBLEM, R=16, N=14336, M=2048), H100, id="barely-slower"),
        pytest.param(replace(PROBLEM, M=512), H100, id="few-rows"),
        pytest.param(PROBLEM, B200, id="B200"),
    ],
)
def test_off_where_it_sees_none(problem, device):
    plan = make_plan(problem, device)
    assert gain(plan) == "nothing" and not runs_beside(plan.recipe, "backward") and not plan.kernels.beside
    assert "beside" not in plan.reason


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        pytest.param(replace(PROBLEM, R=16), H100, id="H100"),
        pytest.param(replace(PROBLEM, R=16), H200, id="H200"),
        pytest.param(replace(PROBLEM, R=16, N=14336), H100, id="wider"),
        pytest.param(replace(PROBLEM, K=14336), H100, id="large-product"),
    ],
)
def test_off_where_the_gain_is_within_what_the_model_does_not_know(problem, device):
    plan = make_plan(problem, device)
    assert gain(plan) == "little" and not runs_beside(plan.recipe, "backward")
    assert plan.reason.endswith("; dB beside dx gains less than 3%, and was not timed")
    # The others by their times.
    rest = [us for name, us in plan.predicted if name != BESIDE]
    assert rest == sorted(rest) and plan.predicted_us == rest[0]


def test_off_where_the_device_launches_no_kernel_early():
    assert not any(recipe.kernels.beside for recipe in candidates(PROBLEM, A100))
    assert not any(recipe.kernels.beside for recipe in candidates(replace(PROBLEM, op="forward"), H100))


def test_a_measured_gain_counts_whatever_its_size():
    problem = replace(PROBLEM, R=16)
    (beside,) = (one for one in candidates(problem, H100) if one.kernels.beside)
    plans = (Measured(beside, 99.0, 0.5), Measured(Recipe("library"), 100.0, 0.5))
    update_table(cache_path(H100), H100, [Entry(key_of(problem), plans)], {})
    plan = make_plan(problem, H100)
    assert (plan.source, plan.recipe) == ("user cache", beside)
