"""bench/measure/cases.py: shapes of real models by name, and what a case must cost at least."""

from __future__ import annotations

import itertools

import pytest

from bench.measure import cases
from bench.measure.cases import Case
from lorafa_kernels.tune.models import MODELS


@pytest.mark.parametrize("name", cases.GRIDS)
def test_grids_have_every_cell_once(name):
    found = cases.grid(name)
    labels = [case.label for case in found]
    assert found
    assert len(set(labels)) == len(labels)
    shapes = {
        (case.M, case.K, case.N, case.R, case.bias, case.dtype, case.adapter, case.dropout) for case in found
    }
    assert len(shapes) == len(found), "a shape that two models share is measured once"


def test_target_grid_is_that_of_the_speed_target():
    found = cases.grid("target")
    assert {case.M for case in found} == {1, 16, 128, 512, 2048, 8192, 32768}
    assert {case.R for case in found} == {16, 64}
    assert {(case.dtype, case.dropout, case.bias) for case in found} == {("bf16", 0.0, False)}
    shapes = {(case.K, case.N) for case in found}
    assert len(shapes) == 12
    assert {(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)} <= shapes
    assert len(found) == 12 * 7 * 2
    assert {case.M for case in found[:24]} == {8192}, "the most telling cells come first"


def test_full_grid_covers_what_it_promises():
    found = cases.grid("full")
    assert {case.model for case in found} == set(MODELS) - {"Mistral-7B"}, "Mistral's shapes are Llama's"
    assert {case.M for case in found} == set(cases.ROWS)
    assert {case.R for case in found} == {8, 16, 32, 64, 128}
    assert {case.dropout for case in found} == {0.0, 0.1}


def test_flops_and_least_bytes_of_a_case():
    case = Case("m", "p", M=2, K=3, N=5, R=7, bias=True, dtype="bf16", adapter="fp32")
    multiply_adds = {
        "forward": 2 * 3 * 7 + 2 * 7 * 5 + 2 * 3 * 5,
        "backward": 2 * 5 * 7 + 5 * 2 * 7 + 2 * 5 * 3 + 2 * 7 * 3,
    }
    assert case.flops() == {part: 2 * count for part, count in multiply_adds.items()}
    weights = 2 * (5 * 3 + 7 * 3) + 4 * 5 * 7
    assert case.least_bytes() == {
        "forward": weights + 2 * (2 * 3 + 2 * 5 + 2 * 7 + 5),
        "backward": weights + 2 * (2 * 5 + 2 * 3 + 2 * 7) + 4 * 5 * 7,
    }


def test_floor_is_the_larger_of_arithmetic_and_bytes():
    case = Case("m", "p", M=64, K=64, N=64, R=4, dtype="fp32", adapter="fp32")
    flops, moved = case.flops(), case.least_bytes()
    by_arithmetic = case.floor_ms(1e6, 1e30)
    assert by_arithmetic["forward"] == pytest.approx(flops["forward"] / 1e3)
    by_bytes = case.floor_ms(1e30, 1e6)
    assert by_bytes["backward"] == pytest.approx(moved["backward"] / 1e3)
    assert by_bytes["both"] == pytest.approx(by_bytes["forward"] + by_bytes["backward"])
    assert case.floor_ms(None, 1e6) is None


def test_layers_are_found_by_model_and_by_any_of_their_names():
    assert len(cases.find_layers(["Llama-3-8B"])) == 4
    for name, (K, N) in {"up": (4096, 14336), "down": (14336, 4096), "k": (4096, 1024)}.items():
        ((model, layer),) = cases.find_layers([f"Llama-3-8B/{name}"])
        assert (model, layer.K, layer.N) == ("Llama-3-8B", K, N)


@pytest.mark.parametrize(
    ("find", "listed"),
    [
        (lambda: cases.find_layers(["Llama-3-8b"]), ["did you mean Llama-3-8B", *MODELS]),
        (lambda: cases.find_layers(["T5-base/gate"]), ["q", "k", "v", "o", "wi", "wo"]),
        (lambda: cases.grid("targt"), ["did you mean target", *cases.GRIDS]),
    ],
    ids=["model", "projection", "grid"],
)
def test_unknown_names_list_the_known_ones(find, listed):
    with pytest.raises(ValueError, match="unknown") as raised:
        find()
    assert all(name in str(raised.value) for name in listed)


def test_labels_differ_wherever_cases_do():
    base = Case("m", "p", 2, 3, 5, 7)
    others = [
        Case("m", "p", *sizes, dtype=dtype, adapter=adapter, dropout=dropout)
        for sizes, dtype, adapter, dropout in itertools.product(
            [(2, 3, 5, 7), (2, 3, 5, 8), (3, 3, 5, 7)], ["bf16", "fp32"], ["bf16", "fp32"], [0.0, 0.1]
        )
    ]
    assert base in others
    assert len({case.label for case in others}) == len(others)
