"""Promise: a pure function gives every device and shape a configuration that fits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafa_kernels.tuning.config import (
    INTERPRETER,
    KNOWN_DEVICES,
    MAX_BLOCK_R,
    MIN_BLOCK,
    OPS,
    DeviceLimits,
    all_default_configs,
    default_config,
    row_chunks,
    shared_memory,
)

KB = 1024
# Devices without defaults of their own, with their published limits; the last does not exist.
UNKNOWN = [
    DeviceLimits("sm_75", 64 * KB, 40),
    DeviceLimits("sm_87", 163 * KB, 16),
    DeviceLimits("sm_90a", 227 * KB, 114),
    DeviceLimits("sm_103", 227 * KB, 160),
    DeviceLimits("sm_110", 227 * KB, 20),
    DeviceLimits("sm_121", 99 * KB, 48),
    DeviceLimits("gfx90a", 64 * KB, 104),
    DeviceLimits("gfx950", 160 * KB, 256),
    DeviceLimits("gfx1100", 64 * KB, 96),
    DeviceLimits("sm_999", 64 * KB, 1),
]
DEVICES = [*KNOWN_DEVICES.values(), *UNKNOWN, INTERPRETER]

ops = st.sampled_from(OPS)
devices = st.sampled_from(DEVICES)
operand_bytes = st.sampled_from((2, 4))
sizes = st.one_of(st.integers(1, 2048), st.integers(1, 1 << 40))
ranks = st.one_of(st.integers(1, 300), st.integers(1, 1 << 20))


def blocks(config) -> list[int]:
    return [size for size in (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.BLOCK_R) if size]


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans())
def test_any_device_and_shape_gets_a_config_that_fits(op, limits, operand_bytes, M, R, aligned):
    config = default_config(op, limits, operand_bytes, M, R, aligned)
    assert shared_memory(op, config, operand_bytes, limits) <= limits.shared_memory
    assert config.num_warps in (4, 8)
    assert config.num_stages >= 1
    assert config.GROUP_M >= 1
    # Powers of two, and never less than tl.dot can contract.
    assert all(size >= MIN_BLOCK and size & (size - 1) == 0 for size in blocks(config))
    assert len(blocks(config)) == (4 if op == "expand" else 3)
    assert config.BLOCK_R <= MAX_BLOCK_R


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans())
def test_rank_block_covers_the_rank_up_to_its_cap(op, limits, operand_bytes, M, R, aligned):
    config = default_config(op, limits, operand_bytes, M, R, aligned)
    cap = default_config(op, limits, operand_bytes, M, 1 << 20, aligned).BLOCK_R
    assert min(R, cap) <= config.BLOCK_R < 2 * max(R, MIN_BLOCK)


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans())
def test_equal_arguments_give_equal_configs(op, limits, operand_bytes, M, R, aligned):
    first, second = (default_config(op, replace(limits), operand_bytes, M, R, aligned) for _ in range(2))
    assert first == second


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans())
def test_all_default_configs_lists_every_config(op, limits, operand_bytes, M, R, aligned):
    config = default_config(op, limits, operand_bytes, M, R, aligned)
    listed = all_default_configs(op, limits, operand_bytes)
    assert config in listed
    assert default_config(op, limits, operand_bytes, *listed[config]) == config


@given(devices, operand_bytes, sizes, sizes, ranks)
def test_row_chunks_are_between_one_and_the_row_blocks(limits, operand_bytes, M, N, R):
    config = default_config("grad", limits, operand_bytes, M, R)
    chunks = row_chunks(config, limits, M, N)
    assert 1 <= chunks <= -(-M // config.BLOCK_M)
    strips = -(-N // config.BLOCK_N)
    # Enough blocks for the device unless the rows run out, and no more partial sums than that takes.
    assert chunks * strips >= 4 * limits.num_sms or chunks == -(-M // config.BLOCK_M)
    assert (chunks - 1) * strips < 4 * limits.num_sms


@given(ops, devices, operand_bytes, sizes, ranks, st.integers(1, 8))
def test_estimate_grows_with_the_stages(op, limits, operand_bytes, M, R, stages):
    config = replace(default_config(op, limits, operand_bytes, M, R), num_stages=stages)
    more = replace(config, num_stages=stages + 1)
    before, after = (shared_memory(op, c, operand_bytes, limits) for c in (config, more))
    assert 0 < before <= after


@pytest.mark.parametrize("op", OPS)
def test_stages_are_given_up_where_shared_memory_is_short(op):
    roomy = KNOWN_DEVICES["sm_80"]
    needed = shared_memory(op, default_config(op, roomy, 2, 8192, 64), 2, roomy)
    tight = default_config(op, replace(roomy, shared_memory=needed - 1), 2, 8192, 64)
    assert tight.num_stages < default_config(op, roomy, 2, 8192, 64).num_stages


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("sm_75", "ampere"),
        ("sm_86", "ampere"),
        ("sm_90", "hopper"),
        ("sm_90a", "hopper"),
        ("sm_100", "blackwell"),
        ("sm_103", "blackwell"),
        ("sm_121", "ampere"),
        ("gfx90a", "amd"),
        ("gfx1100", "amd"),
        ("cpu", "interpreter"),
    ],
)
def test_architectures_belong_to_the_nearest_family(arch, family):
    assert DeviceLimits(arch, 64 * KB, 1).family == family


def test_unknown_kernel_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match=r"'gemm'.*shrink, expand, grad"):
        default_config("gemm", INTERPRETER, 2, 1, 1)


def test_choosing_needs_neither_triton_nor_a_device():
    code = """
import sys
sys.modules["triton"] = None
from lorafa_kernels.tuning.config import KNOWN_DEVICES, default_config
import torch
assert default_config("expand", KNOWN_DEVICES["sm_90"], 2, 8192, 16).BLOCK_R == 16
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
