"""The variants "ws" and "ws_z" of expand (kernels/expand_ws.py, expand_ws_z.py): where they run, and with
which blocks to try them.

No heuristic picks one. They run where they are pinned, or where `tune` checked them against fp64 and timed
them.
"""

from __future__ import annotations

from dataclasses import replace

from .config import WS_SIZES, DeviceLimits, KernelConfig, shared_memory, wrong_field

# Of Triton, as major.minor: in these Gluon has the names that the kernel is written with.
GLUON_VERSIONS = ("3.6", "3.7")
MOST_RANK = WS_SIZES["BLOCK_R"][-1]
# Rows, columns and stages of the blocks to try (estimate).
_TRIED = ((128, 256, 3), (256, 128, 3), (128, 128, 4))


def missing_for_ws(limits: DeviceLimits, triton: str | None) -> str | None:
    """Say what a device, or this version of Triton, lacks for these variants, or None if nothing.

    triton: None where the version is not known. Completes a sentence about the kernel.
    """
    if limits.family == "interpreter":
        return "is compiled: Triton's interpreter does not run Gluon"
    if limits.family != "hopper":
        return f"needs the tensor cores of sm_90, not of {limits.arch}"
    if triton is not None and not triton.startswith(tuple(f"{version}." for version in GLUON_VERSIONS)):
        return f"is written for Gluon as Triton {' and '.join(GLUON_VERSIONS)} have it, not {triton}"
    return None


def ws_configs(
    limits: DeviceLimits, operand_bytes: int, R: int, variant: str = "ws"
) -> tuple[KernelConfig, ...]:
    """Return the configurations of a variant with which a search begins, the largest blocks first; none for a
    device, operands or a rank that it does not serve. A pure function.
    """
    if missing_for_ws(limits, None) or operand_bytes != 2 or R > MOST_RANK:
        return ()
    BLOCK_R = min(size for size in WS_SIZES["BLOCK_R"] if size >= R)
    found = []
    for BLOCK_M, BLOCK_N, num_stages in _TRIED:
        config = KernelConfig(BLOCK_M, BLOCK_N, 64, BLOCK_R, 8, 8, num_stages, variant, EPILOGUE_SUBTILE=2)
        # Parts of 64 columns leave through less shared memory; then a stage less.
        if _too_large(config, limits, operand_bytes):
            config = replace(config, EPILOGUE_SUBTILE=BLOCK_N // 64)
        while config.num_stages > 2 and _too_large(config, limits, operand_bytes):
            config = replace(config, num_stages=config.num_stages - 1)
        if not _too_large(config, limits, operand_bytes) and not wrong_field("expand", config):
            found.append(config)
    return tuple(found)


def _too_large(config: KernelConfig, limits: DeviceLimits, operand_bytes: int) -> bool:
    return shared_memory("expand", config, operand_bytes, limits) > limits.shared_memory
