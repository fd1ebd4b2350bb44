"""plan/choice.py asks for the plan of the problem that runs: M rounded up, never down, its real alignment."""

from __future__ import annotations

import pytest
import torch

from lorafa_kernels.plan import choice
from lorafa_kernels.plan.config import KNOWN_DEVICES, rows_aligned
from lorafa_kernels.plan.defaults import RECOMPUTE_ROWS
from lorafa_kernels.plan.recipe import Problem, heuristic_config

HOPPER = KNOWN_DEVICES["sm_90"]
GPU = torch.device("cuda")


@pytest.fixture
def asked(fake_gpu, monkeypatch) -> list[Problem]:
    """The problems for which a plan is made."""
    fake_gpu(HOPPER, "NVIDIA H200", (9, 0))
    problems, right = [], choice.make_plan

    def recording(problem, *rest, **options):
        problems.append(problem)
        return right(problem, *rest, **options)

    monkeypatch.setattr(choice, "make_plan", recording)
    return problems


def plan_for(M: int, N: int = 4096, K: int = 4096, dtype: torch.dtype = torch.bfloat16, op: str = "forward"):
    return choice.choose_plan("triton", op, GPU, dtype, M, N, K, 16, False)


def test_a_plan_is_made_for_at_least_the_rows_there_are(asked):
    """And for at most a sixteenth more, so that nothing is planned for half a block too many."""
    rows = [*range(1, 300), 511, 513, 1000, 4095, 4096, 4097, 8191, 8193, 100_003, (1 << 31) + 1]
    for M in rows:
        choice.forget_plans()
        plan_for(M)
        planned = asked[-1].M
        assert M <= planned <= M + M // 16, (M, planned)


def test_zero_rows_are_planned_for_as_one(asked):
    plan_for(0)
    assert asked[-1].M == 0


@pytest.mark.parametrize("rows", [RECOMPUTE_ROWS, 64])
def test_one_row_more_than_a_block_takes_is_not_planned_as_the_block(asked, rows):
    """Rounded down, 129 rows would recompute z in a second block of rows, as if they were 128."""
    at, above = plan_for(rows).kernels.expand, plan_for(rows + 1).kernels.expand
    if rows == RECOMPUTE_ROWS:
        assert (
            heuristic_config("expand", Problem("forward", torch.bfloat16, rows, 4096, 4096, 16), HOPPER) == at
        )
        assert at.variant == "recompute" and (above is None or above.variant != "recompute")
    else:
        assert at.BLOCK_M == 64 and above.BLOCK_M == 128


SIZES = [
    pytest.param(torch.bfloat16, 4096, 4096, True, id="bf16"),
    pytest.param(torch.bfloat16, 4100, 4096, False, id="bf16-N"),
    pytest.param(torch.bfloat16, 4096, 4100, False, id="bf16-K"),
    pytest.param(torch.float32, 4100, 4100, True, id="fp32-of-4"),
    pytest.param(torch.float32, 4098, 4096, False, id="fp32-N"),
    pytest.param(torch.float32, 4096, 4097, False, id="fp32-K"),
    pytest.param(torch.float16, 8, 7, False, id="fp16-small"),
]


@pytest.mark.parametrize(("dtype", "N", "K", "aligned"), SIZES)
def test_rows_are_aligned_where_they_start_at_multiples_of_16_bytes(dtype, N, K, aligned):
    problem = Problem("forward", dtype, 64, N, K, 16)
    # What the promise says, of the addresses themselves.
    starts = [row * size * dtype.itemsize % 16 for size in (N, K) for row in range(4)]
    assert problem.aligned == rows_aligned(dtype.itemsize, N, K) == aligned == (not any(starts))


@pytest.mark.parametrize(("dtype", "N", "K", "aligned"), SIZES)
def test_the_plan_s_blocks_are_for_the_alignment_that_there_is(asked, dtype, N, K, aligned):
    """Many rows on Hopper: by TMA where the rows are aligned, else the small blocks that pass registers."""
    plan_for(8192, N, K, dtype)
    found = heuristic_config("expand", asked[-1], HOPPER)
    if dtype is torch.float32:
        assert found.variant == "portable"
    else:
        assert found.variant == ("tma" if aligned else "portable")
        assert aligned or (found.BLOCK_M, found.BLOCK_N, found.BLOCK_K) == (64, 64, 32)
    few = Problem("forward", dtype, 64, N, K, 16)
    if dtype is not torch.float32:
        # Of few rows, too: a contraction block of 32, which unaligned rows fill through registers.
        contraction = heuristic_config("expand", few, HOPPER).BLOCK_K
        assert contraction == (64 if aligned else 32)
