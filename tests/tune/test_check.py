"""On what a recipe is checked before it is timed: on so many rows that the blocks of a persistent kernel walk
several tiles, and, of specialised warps, on all that an entry of a table serves.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, KernelConfig, KernelPlan, row_chunks
from lorafa_kernels.plan.recipe import Device, Problem, Recipe
from lorafa_kernels.plan.tables import key_of, most_rows
from lorafa_kernels.tune.check import (
    CHECKED_ROWS,
    KEPT,
    Case,
    Check,
    Rows,
    cases,
    rows_of_chunks,
    rows_that_fit,
    rows_to_check,
)

SMS = KNOWN_DEVICES["sm_90"].num_sms
FORWARD, BACKWARD = (Problem(op, torch.bfloat16, 8192, 14336, 4096, 16) for op in ("forward", "backward"))
WS = KernelConfig(128, 256, 64, 16, 8, 8, 3, "ws", EPILOGUE_SUBTILE=2)
WS_Z, TMA, PORTABLE = (replace(WS, variant=variant) for variant in ("ws_z", "tma", "portable"))

blocks = st.sampled_from((64, 128, 256))
persistent = st.builds(
    lambda M, N, variant, ctas: replace(WS, BLOCK_M=M, BLOCK_N=N, variant=variant, ctas_per_sm=ctas),
    blocks,
    blocks,
    st.sampled_from(("tma", "ws", "ws_z")),
    st.sampled_from((1, 2)),
)
sizes = st.integers(1, 1 << 15)
problems = st.builds(
    Problem,
    st.sampled_from(("forward", "backward")),
    st.just(torch.bfloat16),
    sizes,
    sizes,
    sizes,
    st.integers(1, 128),
)


def tiles(rows: int, config: KernelConfig, problem: Problem) -> int:
    return -(-rows // config.BLOCK_M) * -(-problem.out_width // config.BLOCK_N)


@given(problems, persistent)
def test_every_block_of_a_persistent_kernel_walks_three_tiles_or_it_is_said_why_not(problem, config):
    rows = rows_to_check(config, problem, SMS)
    most = most_rows(key_of(problem))
    three = 3 * SMS * config.ctas_per_sm
    for number in (rows.sixteens, rows.odd):
        assert 1 <= number <= most
        assert number % config.BLOCK_M or number < 16
        if rows.fewer is None:
            assert tiles(number, config, problem) >= three
    if rows.fewer:
        # Not many more fit, and what is checked is nearly all that the entry serves.
        assert (
            most - 32 <= rows.odd and str(rows.odd) in rows.fewer and "its entry serves no more" in rows.fewer
        )
    if most > 16:
        assert rows.sixteens % 16 == 0 and rows.odd % 2 == 1


@pytest.mark.parametrize("config", [WS, WS_Z, TMA], ids=lambda config: config.variant)
def test_no_more_rows_than_that_takes(config):
    """A tile of 128 rows and 256 columns: 56 columns of tiles of y, 16 of dx."""
    assert rows_to_check(config, FORWARD, SMS) == Rows(7 * 128 + 64, 7 * 128 + 69)
    assert rows_to_check(config, BACKWARD, SMS) == Rows(24 * 128 + 64, 24 * 128 + 69)
    two = replace(TMA, ctas_per_sm=2)
    assert rows_to_check(two, BACKWARD, SMS) == Rows(49 * 128 + 64, 49 * 128 + 69)


@pytest.mark.parametrize("config", [None, PORTABLE, replace(PORTABLE, variant="recompute")], ids=str)
def test_what_is_not_persistent_is_checked_on_few(config):
    for M in (1, 100, 512, 8192):
        few = min(M, CHECKED_ROWS)
        assert rows_to_check(config, replace(FORWARD, M=M), SMS, room=1) == Rows(few, few)


@given(problems, blocks, st.sampled_from(("portable", "tma")), st.sampled_from((None, PORTABLE, TMA)))
# Few rows are many tiles of dx, and few blocks of dB.
@example(Problem("backward", torch.bfloat16, 8192, 1024, 1 << 15, 16), 64, "portable", TMA)
def test_grad_cuts_what_is_checked_as_it_cuts_what_is_timed(problem, block, variant, expand):
    """Its blocks walk several blocks of rows, and what they leave is added, where that is so in what is
    timed.
    """
    grad, limits = KernelConfig(block, 64, 0, 16, 4, 4, 2, variant), KNOWN_DEVICES["sm_90"]
    rows = rows_to_check(expand, problem, SMS, least=rows_of_chunks(grad, problem, limits))
    if rows.fewer is None:
        for number in (rows.sixteens, rows.odd):
            timed, checked = (row_chunks(grad, limits, M, problem.N) for M in (problem.M, number))
            of_timed, of_checked = (-(-M // block) for M in (problem.M, number))
            if timed > 1:
                assert checked >= timed
                assert -(-of_checked // checked) >= min(3, of_timed // timed)


def test_no_grad_wants_no_rows_and_memory_bounds_what_it_wants():
    limits = KNOWN_DEVICES["sm_80"]
    assert rows_of_chunks(None, BACKWARD, limits) == 0
    few_columns = replace(BACKWARD, N=1024, M=1 << 15)
    least = rows_of_chunks(KernelConfig(128, 64, 0, 16, 4, 4, 2), few_columns, limits)
    assert least == 3 * 128 * 27
    assert rows_to_check(None, few_columns, SMS, least=least) == Rows(least, least)
    assert rows_to_check(None, few_columns, SMS, room=1000, least=least) == Rows(992, 992)
    assert rows_to_check(None, few_columns, SMS, room=0, least=least) == Rows(CHECKED_ROWS, CHECKED_ROWS)


@given(problems, st.sampled_from((None, PORTABLE)), st.integers(0, 1 << 15), st.integers(0, 1 << 15))
def test_few_rows_are_those_of_the_code_that_is_timed(problem, expand, room, least):
    rows = rows_to_check(expand, problem, SMS, room, min(least, problem.M))
    assert rows.sixteens == rows.odd
    assert min(problem.M, CHECKED_ROWS - 5) <= rows.odd <= problem.M
    assert (rows.odd % 16 == 0) == (problem.M % 16 == 0) and (rows.odd == 1) == (problem.M == 1)


def test_memory_bounds_the_rows_and_it_is_said():
    rows = rows_to_check(WS, BACKWARD, SMS, room=2000)
    assert (rows.sixteens, rows.odd) == (2000, 1999)
    assert rows.fewer == "1999 rows instead of 3136: memory has no room for more"
    # As few as are checked of anything.
    assert rows_to_check(WS, BACKWARD, SMS, room=0).odd == CHECKED_ROWS - 1


def test_the_more_memory_the_more_rows():
    found = [rows_that_fit(BACKWARD, free) for free in (0, 1 << 30, 1 << 33, 1 << 36)]
    assert found == sorted(found) and found[:2] == [0, 0] and 3136 < found[2] < found[3]


@given(st.integers(1, 1 << 20))
def test_most_rows_is_the_last_of_the_bucket(M):
    problem = replace(FORWARD, M=M)
    most = most_rows(key_of(problem))
    assert most >= M
    assert key_of(replace(problem, M=most)) == key_of(problem) != key_of(replace(problem, M=most + 1))


# Specialised warps

ROWS = Rows(960, 965)


@given(problems, st.booleans(), st.sampled_from((WS, WS_Z)))
def test_each_two_properties_of_what_an_entry_serves_occur_together(problem, bias, config):
    forward = problem.op == "forward"
    problem = replace(problem, bias=bias and forward)
    config = replace(config, BLOCK_R=max(16, key_of(problem).rank))
    found = cases(config, problem, ROWS)
    assert len(found) <= 6
    assert found[0] == Case(965 if problem.M % 16 else 960, problem.R, problem.bias, torch.float32)
    full = key_of(problem).rank
    wanted = (
        [True, False] if forward else [False],
        [torch.float32, torch.bfloat16],
        [True, False],
        [True, False],
    )
    for one, other in itertools.combinations(range(4), 2):
        pairs = set(itertools.product(wanted[one], wanted[other]))
        properties = [(case.bias, case.factor_dtype, case.R % 16 == 0, case.by_columns) for case in found]
        assert pairs <= {(each[one], each[other]) for each in properties}
    assert {case.rows for case in found} == {960, 965}
    # Each of them is of the entry.
    assert {key_of(replace(problem, R=case.R)) for case in found} == {key_of(problem)}
    assert any(case.R == 1 for case in found) == (full == 16)


@given(problems)
def test_other_kernels_are_checked_as_they_are_timed(problem):
    for config in (None, TMA, PORTABLE):
        case, *others = cases(config, problem, ROWS)
        assert (case.rows % 16 == 0) == (problem.M % 16 == 0)
        assert (case.R, case.bias) == (problem.R, problem.bias)
        assert (case.factor_dtype, case.by_columns) == (torch.float32, False)
        assert len(others) == (config is TMA)


@given(problems, st.booleans())
def test_a_persistent_kernel_is_checked_the_other_way_too(problem, bias):
    forward = problem.op == "forward"
    problem = replace(problem, bias=bias and forward)
    timed, other = cases(TMA, problem, ROWS)
    assert {timed.rows, other.rows} == {960, 965}
    assert forward == (timed.bias != other.bias)
    assert (other.factor_dtype, other.by_columns, other.R % 16 != 0) == (torch.bfloat16, True, True)
    assert key_of(replace(problem, R=other.R)) == key_of(problem)


# What cases are compared with: on a GPU each takes hundreds of megabytes.

SMALL = Problem("forward", torch.float32, 4, 8, 8, 2)
CASES = [Case(4, R, False, torch.float32) for R in range(1, KEPT + 3)]


@pytest.fixture
def check() -> Check:
    return Check(SMALL, torch.device("cpu"), Device("none", INTERPRETER, None))


def test_what_is_kept_of_a_problem_goes_with_it(check):
    """The next problem needs its memory, and cycles are collected some day."""
    gc.collect()
    gc.disable()
    try:
        case = Check(SMALL, check.device, Device("none", INTERPRETER, None))
        kept = weakref.ref(case.reference(CASES[0]).operands.x)
        assert kept() is not None
        del case
        assert kept() is None
    finally:
        gc.enable()


def test_those_that_were_asked_for_last_are_kept(check):
    first = check.reference(CASES[0])
    assert check.reference(CASES[0]) is first
    for case in CASES[1:KEPT]:
        check.reference(case)
    assert check.reference(CASES[0]) is first
    second = check.reference(CASES[1])
    check.reference(CASES[KEPT])
    check.reference(CASES[KEPT + 1])
    assert check.reference(CASES[0]) is first and check.reference(CASES[1]) is second
    assert len(check._kept) == KEPT


def test_a_case_that_has_no_room_beside_the_others_is_checked_without_them(check, monkeypatch):
    """A recipe is not wrong because the exact results of others fill the memory."""
    make = check._reference
    left = 2

    def make_in_little_memory(case: Case):
        if len(check._kept) >= left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(case)

    monkeypatch.setattr(check, "_reference", make_in_little_memory)
    monkeypatch.setattr("lorafa_kernels.tune.check.cases", lambda *_: CASES[:5])
    recipe = Recipe("library")
    assert check(recipe) is None
    left = 0
    with pytest.raises(torch.OutOfMemoryError):
        check(recipe)


def test_a_recipe_is_checked_on_the_rows_that_its_grad_wants(monkeypatch):
    """27 chunks of three blocks of 64 rows."""
    problem, limits = Problem("backward", torch.bfloat16, 1 << 15, 1024, 4096, 16), KNOWN_DEVICES["sm_80"]
    check, seen = Check(problem, torch.device("cpu"), Device("none", limits, None)), []
    monkeypatch.setattr(check, "_wrong", lambda case: seen.append(case.rows))
    grad = KernelConfig(64, 64, 0, 16, 4, 4, 2)
    for one_pass in (True, False):
        assert check(Recipe("library", KernelPlan(one_pass=one_pass, grad=grad))) is None
    assert seen == [3 * 64 * 27, CHECKED_ROWS]
