"""expand: the large product with the rank-R term added to its accumulator.

    C (M, N) = round( P (M, K) · Q (K, N) + keep (M, N)/(1 − p) ⊙ (L (M, R) · F (R, N)) + bias (N) )

    y  (M, N): P = x,  Q = weightᵀ, L = z,  F = lora_Bᵀ, bias
    dx (M, K): P = dy, Q = weight,  L = dz, F = lora_A, and with dropout keep (philox.py)

One kernel for both, through strides. Reads P once per column of blocks and Q once per row of blocks
(grouped for reuse in L2), L and F once per block, writes C once: the rank-R term costs no pass over C.
2·M·N·(K + R) FLOPs. Bound by arithmetic. With dropout the rank-R step comes first, is multiplied with
keep/(1 − p) in fp32, keep made in registers, and the large product is added to it.

The launcher takes the kernel of expand_tma.py or expand_ws.py where the configuration asks for it and TMA can
address the operands, else a second configuration. Programmatic dependent launch (WAIT, TRIGGER) is explained
in expand_tma.py, and holds here word for word.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import DeviceLimits, KernelConfig
from ..plan.specialised import missing_for_ws
from .expand_tma import expand_tma_launch, storage_order
from .launch import Launch, Launches, aligned, blocks_of
from .tile import (
    by_pointers,
    dependent_launch,
    device_limits,
    drop,
    dropout_arguments,
    emulate_bf16,
    gdc_launch_dependents,
    gdc_wait,
    input_precision,
    keep_scale,
    keep_tile,
    low_rank_step,
    offsets,
    product,
    rounded,
    store,
    tile_start,
)


@triton.jit(do_not_specialize=["seed_ptr", "threshold"])
def _expand_kernel(
    P_ptr,
    Q_ptr,
    L_ptr,
    F_ptr,
    bias_ptr,
    C_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    N,
    K,
    R,
    stride_P_m,
    stride_P_k,
    stride_Q_k,
    stride_Q_n,
    stride_L_m,
    stride_L_r,
    stride_F_r,
    stride_F_n,
    stride_C_m,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = P_ptr.dtype.element_ty
    if TRIGGER:
        gdc_launch_dependents()
    start_m, start_n = tile_start(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    index_m = start_m + tl.arange(0, BLOCK_M)
    index_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DROPOUT:
        if WAIT:
            gdc_wait()
        acc = low_rank_step(
            acc,
            L_ptr,
            F_ptr,
            start_m,
            start_n,
            M,
            N,
            R,
            stride_L_m,
            stride_L_r,
            stride_F_r,
            stride_F_n,
            DTYPE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            TMA=False,
            TRANSPOSED=False,
            STAGES=1,
            INPUT_PRECISION=INPUT_PRECISION,
            EMULATE_BF16=EMULATE_BF16,
        )
        acc = drop(acc, keep_tile(tl.load(seed_ptr), threshold, index_m, start_n, N, BLOCK_N)) * scale
    acc = product(
        acc,
        P_ptr,
        Q_ptr,
        index_m,
        index_n,
        M,
        N,
        K,
        stride_P_m,
        stride_P_k,
        stride_Q_k,
        stride_Q_n,
        BLOCK_K,
        EVEN_K,
        INPUT_PRECISION,
        EMULATE_BF16,
    )

    # After the main loop where that is possible: before it, the compiler no longer overlaps the products of
    # the loop.
    if not DROPOUT:
        if WAIT:
            gdc_wait()
        acc = low_rank_step(
            acc,
            L_ptr,
            F_ptr,
            start_m,
            start_n,
            M,
            N,
            R,
            stride_L_m,
            stride_L_r,
            stride_F_r,
            stride_F_n,
            DTYPE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_R,
            TMA=False,
            TRANSPOSED=False,
            STAGES=1,
            INPUT_PRECISION=INPUT_PRECISION,
            EMULATE_BF16=EMULATE_BF16,
        )

    if HAS_BIAS:
        bias = tl.load(bias_ptr + index_n, mask=index_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    C_ptrs = C_ptr + offsets(index_m, stride_C_m)[:, None] + index_n[None, :]
    store(C_ptrs, acc, (index_m < M)[:, None] & (index_n < N)[None, :], EMULATE_BF16)


_LAUNCHES = Launches()


def expand(
    P: Tensor,
    Q: Tensor,
    L: Tensor,
    F: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    config: KernelConfig,
    unaligned: KernelConfig | None = None,
    pdl: bool = False,
    trigger: bool = False,
) -> Tensor:
    """Return round(P · Q + keep/(1 − p) ⊙ (L · F) + bias) as a contiguous (M, N) tensor in the dtype of P.

    P (M, K), Q (K, N) and L (M, R) of one dtype, fp32, bf16 or fp16; F (R, N) of that dtype, or fp32, which
    takes a launch more; any strides. bias (N,), or None. keep (M, N) is the mask of `seed`, and all true
    where dropout_p, p, is 0.
    `unaligned`: the configuration for operands that TMA cannot address, where `config` is one for TMA; raises
    ValueError where it is missing then.
    `pdl`: start while the kernel that writes L still runs, where the device can; that kernel must be the
    last one launched, and must not have been launched this way itself. `trigger`: let the next kernel start
    early, where the device can.

    Of variant "ws": ValueError with dropout and for R > BLOCK_R, RuntimeError that says what is missing where
    it does not run.
    """
    M, K = P.shape
    N = Q.shape[1]
    R = L.shape[1]
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    if M == 0 or N == 0:
        return C
    if bias is not None:
        bias = bias.contiguous()
    F = rounded(F, P.dtype)
    seed, threshold = dropout_arguments(dropout_p, seed)
    scale = keep_scale(dropout_p)
    precision = input_precision(P.dtype)
    strides = P.stride(), Q.stride(), L.stride(), F.stride()
    dtypes = P.dtype, None if bias is None else bias.dtype
    # Whether P and Q go by TMA, and whether L and F do, is decided apart.
    key = M, N, K, R, strides, dtypes, P.device, aligned(P, Q), aligned(L, F), seed is None, pdl, trigger
    key += precision, config, unaligned
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launch(P, Q, L, F, bias, C, seed is None, pdl, trigger, precision, config, unaligned)
    )
    launch(P, Q, L, F, bias, C, seed, threshold, scale)
    return C


def _launch(
    P: Tensor,
    Q: Tensor,
    L: Tensor,
    F: Tensor,
    bias: Tensor | None,
    C: Tensor,
    keeps_all: bool,
    pdl: bool,
    trigger: bool,
    precision: str,
    config: KernelConfig,
    unaligned: KernelConfig | None,
) -> Callable[..., None]:
    """Return the launch for operands that are like these; keeps_all: there is no dropout."""
    (M, K), N, R = P.shape, Q.shape[1], L.shape[1]
    limits = device_limits(P.device)
    wait = pdl and dependent_launch(limits)
    trigger = trigger and dependent_launch(limits)
    if config.variant in ("tma", "ws"):
        transposed = storage_order(P, Q)
        if transposed is None:
            config = by_pointers(unaligned)
        elif config.variant == "tma":
            how = config, transposed, wait, trigger, limits.num_sms
            return expand_tma_launch(P, Q, L, F, bias, C, keeps_all, *how)
        elif keeps_all:
            expand_ws, how = warp_specialised("expand_ws", limits), (config, transposed, wait, limits.num_sms)
            return lambda P, Q, L, F, bias, C, *_: expand_ws(P, Q, L, F, bias, C, *how)
        else:
            raise ValueError("expand in its variant 'ws' makes no mask: dropout needs another variant")
    return Launch(
        _expand_kernel,
        (blocks_of(M, config.BLOCK_M) * blocks_of(N, config.BLOCK_N),),
        ("P_ptr", "Q_ptr", "L_ptr", "F_ptr", "bias_ptr", "C_ptr", "seed_ptr", "threshold", "scale"),
        dict(
            M=M,
            N=N,
            K=K,
            R=R,
            stride_P_m=P.stride(0),
            stride_P_k=P.stride(1),
            stride_Q_k=Q.stride(0),
            stride_Q_n=Q.stride(1),
            stride_L_m=L.stride(0),
            stride_L_r=L.stride(1),
            stride_F_r=F.stride(0),
            stride_F_n=F.stride(1),
            stride_C_m=C.stride(0),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            GROUP_M=config.GROUP_M,
            EVEN_K=K % config.BLOCK_K == 0,
            HAS_BIAS=bias is not None,
            DROPOUT=not keeps_all,
            WAIT=wait,
            TRIGGER=trigger,
            INPUT_PRECISION=precision,
            EMULATE_BF16=emulate_bf16(P),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **({"launch_pdl": True} if wait else {}),
        ),
    )


@functools.cache
def warp_specialised(name: str, limits: DeviceLimits) -> Callable:
    """Return expand_ws, or expand_ws_z, by its name. Raises RuntimeError that says what this device or this
    Triton lacks for it.

    Imported here: Gluon is experimental, and a Triton without it must not cost the other kernels.
    """
    lacks = missing_for_ws(limits, triton.__version__)
    if lacks is None:
        try:
            return getattr(importlib.import_module(f".{name}", __package__), name)
        except ImportError as error:
            lacks = f"does not find its names in Gluon of Triton {triton.__version__}: {error}"
    raise RuntimeError(f"{name} {lacks}")
