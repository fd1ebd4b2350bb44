"""The check of a recipe against fp64 before it is timed.

A recipe that is written into a table serves a bucket of problems (plan/tables.py), with bias or without, with
a lora_B in fp32 or in the dtype of x, with a weight stored by rows or by columns, and of several ranks and
numbers of rows:

    every recipe         as it is timed, on CHECKED_ROWS rows at most, or so many that grad cuts them into as
                         many chunks as the timed ones, of TILES blocks each or as many as those have
    a persistent expand  as it is timed, on so many rows that each of its blocks walks TILES tiles of the
                         result: what a block carries from one tile to the next is wrong from the second on;
                         and once more, with all of that the other way
    specialised warps    so, and besides for what else the entry serves, whose kernels are compiled apart
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks.budget import (
    Operands,
    allowed_error,
    draw_operands,
    lorafa_results,
    plain_formula,
    relative_error,
)
from ..plan.config import WS_SUMS, DeviceLimits, KernelConfig, row_chunks
from ..plan.pin import pin_plan
from ..plan.recipe import Device, Problem, Recipe, kernel_configs
from ..plan.tables import key_of, most_rows

# Rows of the check of what is not persistent: enough to fill blocks, few enough to be quick (estimate).
CHECKED_ROWS = 512
# Tiles that each block of a persistent kernel walks at least: from the third on, phases of barriers repeat.
TILES = 3
PERSISTENT = ("tma", *WS_SUMS)
# Dropout probability in measurements; the time does not depend on it.
DROPOUT_P = 0.1
# The operations that are searched, and their outputs. The cost model plans the other operations.
OUTPUTS = {"forward": ("y",), "backward": ("dx", "dB")}
# Exact results that are kept: those of one recipe's cases, and of the others' one.
KEPT = 8
# Share of the device's free memory that operands and exact results may take (estimate).
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Rows:
    """How many rows of x are checked.

    sixteens: a multiple of 16, odd: one that is not, since Triton compiles them apart; where more than one
    block of rows is needed, no block divides either. fewer: why there are fewer than TILES tiles for a block,
    or None.
    """

    sixteens: int
    odd: int
    fewer: str | None = None

    def like(self, M: int) -> int:
        """That of both for which the same is compiled as for M."""
        return self.odd if M % 16 else self.sixteens


@dataclass(frozen=True)
class Case:
    """What a recipe is checked on: rows of x, rank, with a bias or without, the dtype of lora_B, and whether
    the weight is stored by columns, as that of transformers' Conv1D is.
    """

    rows: int
    R: int
    bias: bool
    factor_dtype: torch.dtype
    by_columns: bool = False

    def __str__(self) -> str:
        dtype = str(self.factor_dtype).removeprefix("torch.")
        stored = ", a weight stored by columns" if self.by_columns else ""
        return f"{self.rows} rows, R = {self.R}, lora_B in {dtype}, {'a' if self.bias else 'no'} bias{stored}"


@dataclass(frozen=True)
class Reference:
    """Operands of a case, the exact outputs, and the plain formula's errors."""

    operands: Operands
    exact: dict[str, Tensor]
    plain: dict[str, float]


class Check:
    """Compares a recipe's outputs on `problem` with fp64 (checks/budget.py).

    fewer: by the variant and blocks of a persistent expand, why it was checked on fewer than TILES tiles a
    block.
    """

    def __init__(self, problem: Problem, device: torch.device, target: Device) -> None:
        self.problem, self.device, self.limits = problem, device, target.limits
        # Once: what is kept of other cases must not change the numbers of rows.
        self.room = self._rows_that_fit()
        self.fewer: dict[str, str] = {}
        # The one that was asked for last is the last.
        self._kept: dict[Case, Reference] = {}

    def __call__(self, recipe: Recipe) -> str | None:
        """Say which output is wrong, or None. Raises what the recipe raises."""
        # Configurations are named: for fewer rows the defaults could differ from those that are timed.
        configs = kernel_configs(recipe, self.problem, self.limits)
        op, expand = self.problem.op, configs.get("expand")
        least = rows_of_chunks(configs.get("grad"), self.problem, self.limits)
        rows = rows_to_check(expand, self.problem, self.limits.num_sms, self.room, least)
        if rows.fewer:
            self.fewer[f"{expand.variant} {expand.BLOCK_M}x{expand.BLOCK_N}"] = rows.fewer
        with pin_plan({op: replace(recipe, kernels=replace(recipe.kernels, **configs))}):
            for case in cases(expand, self.problem, rows):
                if why := self._wrong_with_room(case):
                    return why
        return None

    def reference(self, case: Case) -> Reference:
        """Return what a case is compared with, at most KEPT of which are kept."""
        found = self._kept.pop(case, None)
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[case] = found = found or self._reference(case)
        return found

    def _wrong_with_room(self, case: Case) -> str | None:
        try:
            return self._wrong(case)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        # Of this case alone there may be room, behind the error, which holds on to what was there.
        self._kept.clear()
        return self._wrong(case)

    def _wrong(self, case: Case) -> str | None:
        right = self.reference(case)
        got = lorafa_results(right.operands, "auto")
        for name, plain in right.plain.items():
            error, allowed = (
                relative_error(got[name], right.exact[name]),
                allowed_error(plain, got[name].dtype),
            )
            if not error <= allowed:
                return f"{name} has a relative error of {error:.2e}, allowed is {allowed:.2e}, at {case}"
        return None

    def _reference(self, case: Case) -> Reference:
        p = self.problem
        # On a GPU drawn there: a hundred million numbers take seconds on a CPU.
        generator = torch.Generator(self.device).manual_seed(0) if self.device.type == "cuda" else None
        operands = draw_operands(
            case.rows,
            p.K,
            p.N,
            case.R,
            p.dtype,
            self.device,
            bias=case.bias,
            factor_dtype=case.factor_dtype,
            dropout_p=DROPOUT_P if p.dropout else 0.0,
            generator=generator,
        )
        if case.by_columns:
            operands = replace(operands, weight=operands.weight.t().contiguous().t())
        names = OUTPUTS[p.op]
        exact, plain = plain_formula(operands, torch.float64), plain_formula(operands)
        exact = {name: exact[name] for name in names}
        return Reference(operands, exact, {name: relative_error(plain[name], exact[name]) for name in names})

    def _rows_that_fit(self) -> int | None:
        """How many rows the device's memory has room for; None where that is not known."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return rows_that_fit(self.problem, free)


def rows_of_chunks(grad: KernelConfig | None, problem: Problem, limits: DeviceLimits) -> int:
    """Return how many rows, at most those of the problem, are cut by a recipe's grad into as many chunks as
    those, with TILES blocks of rows in each or as many as there. grad: None where it calls none, and no rows.
    A pure function.
    """
    if grad is None:
        return 0
    return min(problem.M, TILES * grad.BLOCK_M * row_chunks(grad, limits, problem.M, max(1, problem.N)))


def rows_to_check(
    expand: KernelConfig | None, problem: Problem, num_sms: int, room: int | None = None, least: int = 0
) -> Rows:
    """Return how many rows of x to check on.

    expand: the configuration of a recipe's, or None where it calls none. room: how many rows fit into memory;
    None: any number. least: what the recipe's other kernels want, at most the problem's. A pure function.
    """
    few = min(problem.M, CHECKED_ROWS)
    if expand is None or expand.variant not in PERSISTENT:
        number = max(few, least if room is None else min(room, least))
        if number < problem.M:
            # Of the same code: rows that 16 divides are compiled apart.
            number = number // 16 * 16 - (5 if problem.M % 16 else 0)
        return Rows(number, number)
    block = expand.BLOCK_M
    columns = -(-problem.out_width // expand.BLOCK_N)
    blocks = max(-(-TILES * num_sms * expand.ctas_per_sm // columns), -(-least // block))
    wanted = (blocks - 1) * block + max(16, block // 2)
    served = most_rows(key_of(problem))
    most = served if room is None else max(min(room, served), few)
    if wanted + 5 <= most:
        return Rows(wanted, wanted + 5)
    why = "its entry serves no more" if most == served else "memory has no room for more"
    sixteens = most // 16 * 16
    if sixteens % block == 0:
        sixteens -= 16
    odd = most - 1 + most % 2
    return Rows(sixteens if sixteens > 0 else most, odd, f"{odd} rows instead of {wanted}: {why}")


def rows_that_fit(problem: Problem, free: int) -> int:
    """Return for how many rows MEMORY_SHARE of `free` bytes has room, beside the weight. A pure function.

    At most so many matrices of fp64 are there at once: four like x or dx, six like y or dy.
    """
    weight = (8 + problem.dtype.itemsize) * problem.N * problem.K
    row = 8 * (4 * problem.K + 6 * problem.N)
    return max(0, int((MEMORY_SHARE * free - weight) / row))


def cases(expand: KernelConfig | None, problem: Problem, rows: Rows) -> list[Case]:
    """Return what a recipe is checked on, first what is timed. A pure function.

    For specialised warps each two of these occur together, in as few cases as that takes: with and without a
    bias, lora_B in fp32 and in the dtype of x, a weight stored by rows and by columns, the largest rank of
    the entry and a ragged one. That is 1 in one case, where the entry serves it: Triton compiles for
    arguments that are 1.
    """
    wide, own = torch.float32, problem.dtype
    timed = Case(rows.like(problem.M), problem.R, problem.bias, wide)
    if expand is None or expand.variant not in PERSISTENT:
        return [timed]
    key = key_of(problem)
    bias = problem.op == "forward"
    if expand.variant not in WS_SUMS:
        other = rows.sixteens if timed.rows == rows.odd else rows.odd
        return [timed, Case(other, max(1, key.rank - 3), bias and not problem.bias, own, by_columns=True)]
    full = min(key.rank, expand.BLOCK_R)
    least = 1 if key.rank == key_of(replace(problem, R=1)).rank else full - 3
    found = [
        timed,
        Case(rows.odd, full, bias, wide),
        Case(rows.odd, full, False, own, by_columns=True),
        Case(rows.sixteens, full - 3, bias, own, by_columns=True),
        Case(rows.odd, full - 3, False, wide, by_columns=True),
        Case(rows.odd, least, False, own),
    ]
    return list(dict.fromkeys(found))


def refusal(check: Callable[[], str | None]) -> str | None:
    """Say what check() says, or what it raises."""
    try:
        return check()
    except Exception as error:
        if "CUDA error" in str(error):
            raise  # The CUDA context is broken: every later call would fail, too.
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
