"""What the gate asks of Hopper's kernels that are bound by latency: shrink has so many bytes under way that
memory is kept busy, and expand takes its rank-R step in one round.
"""

from __future__ import annotations

from dataclasses import replace

from lorafa_kernels.plan.config import KNOWN_DEVICES, bytes_in_flight

from ..measure.cases import DTYPES

# Of each multiprocessor, from so many rows on, at these ranks: what a copy at 4 TB/s has under way, and as
# much again (bytes_in_flight).
LEAST_UNDER_WAY, FROM_ROWS, RANKS = 30 * 1024, 1024, (16, 64)
# To this rank one rank block is asked for.
ONE_BLOCK = 64


def failures(case, row: dict, K: int) -> list[str]:
    """Name the rules that the row of a LauncherCall breaks; K: how long its contraction is."""
    aligned = case.sizes != "odd" and case.R * DTYPES[case.dtype].itemsize % 16 == 0
    if case.arch != "sm_90" or case.dtype == "fp32" or not aligned:
        return []
    if row["kernel"] == "expand_tma_kernel":
        rounds = -(-case.R // row["config"]["BLOCK_R"])
        return [f"the rank-R step takes {rounds} rounds"] if case.R <= ONE_BLOCK and rounds > 1 else []
    # shrink_total, dz of a shared lora_A, is of the same kernel but sums over members, which are not cut.
    # Where shrink makes masks, their instructions are the time.
    if case.op not in ("shrink", "shrink_group") or row["kernel"].endswith("_sum_kernel") or case.dropout:
        return []
    found = []
    members = case.members_at_once if case.op == "shrink_group" else 1
    # The ranks of the members of a pass lie side by side.
    config = replace(case.config, BLOCK_R=members * case.config.BLOCK_R)
    operand_bytes = DTYPES[case.dtype].itemsize
    if RANKS[0] <= case.R <= RANKS[1]:
        of_call = case.M, K, members * case.R
        under_way = bytes_in_flight(config, KNOWN_DEVICES[case.arch], operand_bytes, *of_call)
        if case.M >= FROM_ROWS and under_way < LEAST_UNDER_WAY:
            found.append(f"{under_way / 1024:.1f} KB under way on each multiprocessor, at least 30")
        # One stage is in use, and behind the wait for the next the rest is under way.
        left = (1 + members) * (config.num_stages - 2)
        if config.num_stages > 2 and (not row["copies_left"] or row["copies_left"][0] < left):
            found.append(f"{row['copies_left'][:1]} copies under way behind a wait, {left} by its stages")
    return found
