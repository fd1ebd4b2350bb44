"""dB's kernel runs beside dx where the model of the cost sees a gain that is worth it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafa_kernels.plan import choice, cost
from lorafa_kernels.plan import tables as lookup
from lorafa_kernels.plan.config import KNOWN_DEVICES, KernelPlan
from lorafa_kernels.plan.cost import ceilings, predict
from lorafa_kernels.plan.make import candidates, make_plan
from lorafa_kernels.plan.recipe import Device, Problem, Recipe, runs_beside
from lorafa_kernels.plan.tables import Entry, Measured, cache_path, key_of, update_table

H100 = Device("NVIDIA H100 80GB HBM3", KNOWN_DEVICES["sm_90"], "3.7.1")
H200 = replace(H100, name="NVIDIA H200")
B200 = Device("NVIDIA B200", KNOWN_DEVICES["sm_100"], "3.7.1")
A100 = Device("NVIDIA A100-SXM4-80GB", KNOWN_DEVICES["sm_80"], "3.7.1")
PROBLEM = Problem("backward", torch.bfloat16, 8192, 4096, 4096, 64)
QKV = replace(PROBLEM, N=6144, widths=(4096, 1024, 1024), makers=3)
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
        pytest.param(replace(PROBLEM, N=8192), H100, id="wider"),
        pytest.param(replace(PROBLEM, R=128), H100, id="R-128"),
        pytest.param(QKV, H100, id="qkv"),
        pytest.param(replace(QKV, M=16384), H100, id="qkv-more-rows"),
        pytest.param(replace(QKV, N=12288, widths=(4096, 4096, 4096)), H100, id="qkv-wide"),
        pytest.param(replace(QKV, N=11264, K=2048, widths=(5632, 5632), makers=2), H100, id="gate-up"),
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
        pytest.param(replace(QKV, R=16), H100, id="qkv-one-pass-is-faster"),
        pytest.param(replace(QKV, M=512), H100, id="qkv-few-rows"),
        pytest.param(QKV, B200, id="qkv-B200"),
        pytest.param(replace(QKV, dropout=True), H100, id="qkv-dropout"),
        pytest.param(replace(QKV, N=28672, widths=(14336, 14336), makers=2), H100, id="gate-up-wide"),
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
        # 224 blocks of dB's kernel, of which 132 run beside dx.
        pytest.param(replace(PROBLEM, N=14336), H100, id="more-blocks-than-fit"),
        # The mask takes the registers.
        pytest.param(replace(PROBLEM, dropout=True), H100, id="dropout"),
    ],
)
def test_off_where_the_gain_is_within_what_the_model_does_not_know(problem, device):
    plan = make_plan(problem, device)
    assert gain(plan) == "little" and not runs_beside(plan.recipe, "backward") and not plan.kernels.beside
    assert plan.reason.endswith("; dB beside dx gains less than 3%, and was not timed")
    # The others by their times.
    rest = [us for name, us in plan.predicted if name != BESIDE]
    assert rest == sorted(rest) and plan.predicted_us == rest[0]


def test_off_where_the_device_launches_no_kernel_early():
    for problem in (PROBLEM, QKV):
        assert not any(recipe.kernels.beside for recipe in candidates(problem, A100))
        assert not any(recipe.kernels.beside for recipe in candidates(replace(problem, op="forward"), H100))


@pytest.mark.parametrize(
    ("widths", "at_once"),
    [
        # 96 blocks of 64 columns are one each, 192 are more than the 132 multiprocessors.
        pytest.param((4096, 1024, 1024), 1.0, id="all-fit"),
        pytest.param((4096, 4096, 4096), 132 / 192, id="some-wait"),
        pytest.param((2048, 1024, 1024, 1024, 1024), 0.0, id="dx-by-pointers"),
    ],
)
def test_what_of_dB_s_pass_is_hidden_in_a_group(monkeypatch, widths, at_once):
    """Of the blocks that run beside dx all but SHOWS_BESIDE; one chunk of rows each, so no parts."""
    problem = replace(PROBLEM, N=sum(widths), widths=widths, makers=len(widths))
    (recipe,) = (one for one in candidates(problem, H100) if one.kernels.beside)
    reached = ceilings(H100.name, H100.limits)
    pass_us = 0.0
    for N in widths:
        elements = problem.M * N + (problem.M + N) * problem.R
        drawn = min(1.0, sum(widths) / 64 / H100.limits.num_sms)
        pass_us += 2 * elements / reached.bytes_per_us / drawn

    def predicted(shows: float) -> float:
        monkeypatch.setattr(cost, "SHOWS_BESIDE", shows)
        return predict(recipe, problem, H100.limits, reached).device_us

    assert round(predicted(1.0) - predicted(0.25), 6) == round(0.75 * at_once * pass_us, 6)


def test_products_of_a_group_overlap_no_kernel_before_them():
    """They are launched in the ordinary way, whatever the recipe says."""
    reached = ceilings(H100.name, H100.limits)
    for op in ("forward", "backward", "backward_input"):
        for one_pass in (True, False):
            recipes = [Recipe("fused", KernelPlan(one_pass=one_pass, pdl=pdl)) for pdl in (True, False)]
            group, layer = (
                [predict(recipe, replace(of, op=op), H100.limits, reached).us for recipe in recipes]
                for of in (QKV, PROBLEM)
            )
            assert group[0] == group[1] and layer[0] < layer[1]


def test_the_library_adds_dx_of_a_group_once_for_each_member():
    reached = ceilings(H100.name, H100.limits)
    wide = replace(QKV, widths=(), makers=1)

    def more(op: str) -> float:
        of_group, of_layer = (
            predict(Recipe("library", KernelPlan(one_pass=False)), replace(one, op=op), H100.limits, reached)
            for one in (QKV, wide)
        )
        return of_group.device_us - of_layer.device_us

    written = 2 * QKV.M * QKV.K / reached.bytes_per_us
    # Each lora_B is rounded by a launch of its own.
    rounded = 2 * cost.GAP_US
    assert round(more("forward"), 6) == rounded
    assert round(more("backward"), 6) == round(rounded + 2 * cost.ACCUMULATE_SHARE * written, 6)


@pytest.mark.parametrize("problem", [replace(PROBLEM, R=16), replace(QKV, R=16)], ids=["layer", "qkv"])
def test_a_measured_gain_counts_whatever_its_size(problem):
    (beside,) = (one for one in candidates(problem, H100) if one.kernels.beside)
    plans = (Measured(beside, 99.0, 0.5), Measured(Recipe("library"), 100.0, 0.5))
    update_table(cache_path(H100), H100, [Entry(key_of(problem), plans)], {})
    plan = make_plan(problem, H100)
    assert (plan.source, plan.recipe) == ("user cache", beside) and plan.kernels.beside
