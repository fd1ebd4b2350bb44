"""Promise: a pure function gives every device and shape a configuration that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafa_kernels.plan.config import (
    DIRECT_BLOCKS,
    INTERPRETER,
    KNOWN_DEVICES,
    MIN_BLOCK,
    OPS,
    DeviceLimits,
    KernelConfig,
    bytes_in_flight,
    low_rank_block,
    row_chunks,
    shared_memory,
    split_size,
)
from lorafa_kernels.plan.defaults import (
    MAX_BLOCK_R,
    OVERLAP_SHARED_MEMORY,
    SPLIT_ROWS,
    SPLITS,
    all_default_configs,
    default_config,
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


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans(), st.booleans(), st.booleans())
def test_any_device_and_shape_gets_a_config_that_fits(
    op, limits, operand_bytes, M, R, aligned, recompute, dropout
):
    config = default_config(op, limits, operand_bytes, M, R, aligned, recompute, dropout)
    assert shared_memory(op, config, operand_bytes, limits, dropout) <= limits.shared_memory
    assert config.num_warps in (4, 8)
    assert config.num_stages >= 1
    assert config.GROUP_M >= 1
    # Powers of two, and never less than tl.dot can contract.
    assert all(size >= MIN_BLOCK and size & (size - 1) == 0 for size in blocks(config))
    assert len(blocks(config)) == (4 if op == "expand" else 3)
    assert config.BLOCK_R <= MAX_BLOCK_R


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans(), st.booleans(), st.booleans())
def test_rank_block_covers_the_rank_up_to_its_cap(
    op, limits, operand_bytes, M, R, aligned, recompute, dropout
):
    config = default_config(op, limits, operand_bytes, M, R, aligned, recompute, dropout)
    cap = default_config(op, limits, operand_bytes, M, 1 << 20, aligned, recompute, dropout).BLOCK_R
    assert min(R, cap) <= config.BLOCK_R < 2 * max(R, MIN_BLOCK)


@given(ops, devices, operand_bytes, sizes, ranks, st.booleans(), st.booleans(), st.booleans())
def test_equal_arguments_give_equal_configs(op, limits, operand_bytes, M, R, aligned, recompute, dropout):
    first, second = (
        default_config(op, replace(limits), operand_bytes, M, R, aligned, recompute, dropout)
        for _ in range(2)
    )
    assert first == second


@settings(deadline=None)
@given(ops, devices, operand_bytes, sizes, ranks, st.booleans(), st.booleans(), st.booleans())
def test_all_default_configs_lists_every_config(op, limits, operand_bytes, M, R, aligned, recompute, dropout):
    config = default_config(op, limits, operand_bytes, M, R, aligned, recompute, dropout)
    listed = all_default_configs(op, limits, operand_bytes, dropout)
    assert config in listed
    assert default_config(op, limits, operand_bytes, *listed[config], dropout) == config


@given(devices, operand_bytes, sizes, sizes, ranks)
def test_row_chunks_are_between_one_and_the_row_blocks(limits, operand_bytes, M, N, R):
    config = default_config("grad", limits, operand_bytes, M, R)
    chunks = row_chunks(config, limits, M, N)
    row_blocks = -(-M // config.BLOCK_M)
    assert 1 <= chunks <= row_blocks
    if row_blocks <= DIRECT_BLOCKS:
        assert chunks == 1, "few rows: dB needs no second kernel"
        return
    strips = -(-N // config.BLOCK_N)
    if config.variant == "tma":
        assert chunks == 1 or chunks * strips <= config.ctas_per_sm * limits.num_sms, "all run at once"
        return
    # Enough blocks for the device unless the rows run out, and no more partial sums than that takes.
    assert chunks * strips >= 4 * limits.num_sms or chunks == row_blocks
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


@given(st.integers(1, 64), st.sampled_from((16, 32, 64, 128)), st.integers(0, 1 << 20))
def test_parts_of_a_contraction_cover_it(SPLIT_K, BLOCK_K, K):
    size = split_size(KernelConfig(64, 0, BLOCK_K, 16, 1, 4, 3, SPLIT_K=SPLIT_K), K)
    parts = -(-K // size)
    assert size >= BLOCK_K and size % BLOCK_K == 0
    assert parts <= SPLIT_K
    assert parts <= 1 or size >= 2 * BLOCK_K


@pytest.mark.parametrize(
    ("arch", "M", "R", "aligned", "variant"),
    [
        ("sm_90", 8192, 16, True, "tma"),
        ("sm_90", 300, 256, True, "tma"),
        ("sm_90", 8192, 16, False, "portable"),
        ("sm_90", 1, 16, True, "recompute"),
        ("sm_90", 128, 64, True, "recompute"),
        ("sm_90", 128, 65, True, "tma"),
        ("sm_90", 129, 64, True, "tma"),
        ("sm_80", 8192, 16, True, "portable"),
        ("sm_80", 1, 16, True, "recompute"),
        ("sm_100", 8192, 16, True, "portable"),
        ("gfx942", 8192, 16, True, "portable"),
        ("gfx942", 1, 16, True, "portable"),
    ],
)
def test_variant_of_expand(arch, M, R, aligned, variant):
    limits = KNOWN_DEVICES[arch]
    assert default_config("expand", limits, 2, M, R, aligned).variant == variant
    assert default_config("expand", limits, 2, M, R, aligned, recompute=False).variant != "recompute"
    assert default_config("expand", limits, 4, M, R, aligned).variant == "portable", "fp32"


@pytest.mark.parametrize(("M", "splits"), [(1, SPLITS), (SPLIT_ROWS, SPLITS), (SPLIT_ROWS + 1, 1), (8192, 1)])
def test_shrink_splits_for_few_rows(M, splits):
    for arch, operand_bytes in (("sm_80", 2), ("sm_90", 4), ("gfx942", 2)):
        config = default_config("shrink", KNOWN_DEVICES[arch], operand_bytes, M, 16)
        assert splits == config.SPLIT_K


@pytest.mark.parametrize(
    ("M", "splits"), [(1, 16), (512, 16), (1024, 8), (2048, 4), (4096, 2), (7872, 2), (7873, 1), (1 << 20, 1)]
)
def test_shrink_on_hopper_splits_until_its_blocks_fill_the_device(M, splits):
    for R in (1, 16, 64, 300):
        assert splits == default_config("shrink", KNOWN_DEVICES["sm_90"], 2, M, R).SPLIT_K
    # With half as many multiprocessors half as many parts do.
    half = default_config("shrink", replace(KNOWN_DEVICES["sm_90"], num_sms=66), 2, M, 16)
    wanted = splits if M <= SPLIT_ROWS else max(1, splits // 2)
    assert wanted == half.SPLIT_K


@pytest.mark.parametrize("K", [2048, 4096, 14336])
@pytest.mark.parametrize("R", [16, 64])
def test_shrink_has_30_kb_under_way_on_hopper(R, K):
    limits = KNOWN_DEVICES["sm_90"]
    for M in range(1024, 32769):
        config = default_config("shrink", limits, 2, M, R)
        assert bytes_in_flight(config, limits, 2, M, K, R) >= 30 * KB, M
        assert shared_memory("shrink", config, 2, limits) <= OVERLAP_SHARED_MEMORY


def test_bytes_under_way_counted_by_hand():
    limits = DeviceLimits("sm_90", 227 * KB, 100)
    # Two blocks of 64 × (64 + 16) elements of two bytes are under way in each.
    config = KernelConfig(64, 0, 64, 16, 1, 4, 3)
    of_block = 2 * 64 * 80 * 2
    assert bytes_in_flight(config, limits, 2, 50 * 64, 4096, 16) == of_block / 2
    assert bytes_in_flight(config, limits, 2, 50 * 64, 4096, 17) == of_block
    assert bytes_in_flight(replace(config, SPLIT_K=4), limits, 2, 50 * 64, 4096, 16) == 2 * of_block
    # Seven of 30 KB and one more fit a multiprocessor.
    assert bytes_in_flight(config, limits, 2, 1 << 20, 4096, 16) == 7 * of_block
    # A part of 64 columns has no two blocks.
    assert bytes_in_flight(config, limits, 2, 50 * 64, 64, 16) == of_block / 4


def test_low_rank_factors_by_pointers_take_the_least_rank_block():
    wide, narrow = (KernelConfig(128, 256, 64, BLOCK_R, 8, 8, 3, "tma") for BLOCK_R in (64, 16))
    assert low_rank_block(wide, True) == 64
    assert low_rank_block(wide, False) == low_rank_block(narrow, True) == low_rank_block(narrow, False) == 16


@given(ranks, sizes)
def test_shrink_leaves_room_for_expand_on_hopper(R, M):
    limits = KNOWN_DEVICES["sm_90"]
    assert shared_memory("shrink", default_config("shrink", limits, 2, M, R), 2, limits) <= 45 * KB


@pytest.mark.parametrize(
    ("arch", "able"),
    [
        ("sm_80", False),
        ("sm_89", False),
        ("sm_90", True),
        ("sm_100", True),
        ("sm_120", True),
        ("gfx942", False),
        ("cpu", False),
    ],
)
def test_dependent_launch_needs_hopper_or_newer(arch, able):
    assert DeviceLimits(arch, 64 * KB, 1).dependent_launch == able


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
