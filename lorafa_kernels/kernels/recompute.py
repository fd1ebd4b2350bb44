"""recompute: shrink and expand in one launch, for few rows.

    L (M, R) = round( scaling · ((P (M, K) ⊙ keep) · D (K, R)) )
    C (M, N) = round( P (M, K) · Q (K, N) + keep/(1 − p) ⊙ (L (M, R) · F (R, N)) + bias (N) )

    z, y   (M, N): P = x,  D = lora_Aᵀ, Q = weightᵀ, F = lora_Bᵀ, bias
    dz, dx (M, K): P = dy, D = lora_B,  Q = weight,  F = lora_A

keep is the dropout mask (philox.py), made in registers, of the shape of x. Forward (DROP_P): it multiplies P
in the product with D only, 1/(1 − p) is in scaling. Backward (DROP_LF): it multiplies L · F. Else all true.

Every block makes the rows of L that it needs, beside its tile of C and from the same tiles of P; the first
column of blocks writes L. Reads P and D once per column of blocks (from L2, but for the first), Q once per
row of blocks, F once per block; writes C and L once. 2·M·N·(K + R) + 2·M·K·R·⌈N/BLOCK_N⌉ FLOPs. Bound by
reading Q, so with few rows the repeated products hide behind it, and a launch would not. R ≤ BLOCK_R.

For many rows the launcher takes the kernel of expand_ws_z.py where the configuration asks for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan.config import KernelConfig
from .expand import warp_specialised
from .expand_tma import storage_order
from .launch import Launch, Launches, aligned, blocks_of
from .tile import (
    device_limits,
    drop,
    dropout_arguments,
    emulate_bf16,
    input_precision,
    keep_scale,
    keep_tile,
    load,
    offsets,
    round_as,
    store,
)


@triton.jit(do_not_specialize=["seed_ptr", "threshold"])
def _recompute_kernel(
    P_ptr,
    Q_ptr,
    D_ptr,
    F_ptr,
    bias_ptr,
    L_ptr,
    C_ptr,
    seed_ptr,
    threshold,
    scale,
    scaling,
    M,
    N,
    K,
    R,
    stride_P_m,
    stride_P_k,
    stride_Q_k,
    stride_Q_n,
    stride_D_k,
    stride_D_r,
    stride_F_r,
    stride_F_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_L: tl.constexpr,
    DROP_P: tl.constexpr,
    DROP_LF: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    DTYPE: tl.constexpr = P_ptr.dtype.element_ty
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block_n = pid // blocks_m
    index_m = (pid % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    index_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    index_k = tl.arange(0, BLOCK_K)
    index_r = tl.arange(0, BLOCK_R)
    in_m = (index_m < M)[:, None]
    in_n = (index_n < N)[None, :]
    in_r = (index_r < R)[None, :]
    if DROP_P or DROP_LF:
        seed = tl.load(seed_ptr)

    P_ptrs = P_ptr + offsets(index_m, stride_P_m)[:, None] + offsets(index_k, stride_P_k)[None, :]
    Q_ptrs = Q_ptr + offsets(index_k, stride_Q_k)[:, None] + offsets(index_n, stride_Q_n)[None, :]
    D_ptrs = D_ptr + offsets(index_k, stride_D_k)[:, None] + offsets(index_r, stride_D_r)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    low_rank = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            P = load(P_ptrs, in_m, EMULATE_BF16)
            Q = load(Q_ptrs, in_n, EMULATE_BF16)
            D = load(D_ptrs, in_r, EMULATE_BF16)
        else:
            in_k = index_k < K - start
            P = load(P_ptrs, in_m & in_k[None, :], EMULATE_BF16)
            Q = load(Q_ptrs, in_k[:, None] & in_n, EMULATE_BF16)
            D = load(D_ptrs, in_k[:, None] & in_r, EMULATE_BF16)
        acc = tl.dot(P, Q, acc, input_precision=INPUT_PRECISION)
        if DROP_P:
            P = drop(P, keep_tile(seed, threshold, index_m, start, K, BLOCK_K))
        D = round_as(D, DTYPE, EMULATE_BF16)
        low_rank = tl.dot(P, D, low_rank, input_precision=INPUT_PRECISION)
        P_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_P_k)
        Q_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_Q_k)
        D_ptrs += offsets(tl.full((), BLOCK_K, tl.int64), stride_D_k)

    L = low_rank * scaling
    if STORE_L and block_n == 0:
        L_ptrs = L_ptr + offsets(index_m, R)[:, None] + index_r[None, :]
        store(L_ptrs, L, in_m & in_r, EMULATE_BF16)
    F_ptrs = F_ptr + offsets(index_r, stride_F_r)[:, None] + offsets(index_n, stride_F_n)[None, :]
    F = round_as(load(F_ptrs, (index_r < R)[:, None] & in_n, EMULATE_BF16), DTYPE, EMULATE_BF16)
    L = round_as(L, DTYPE, EMULATE_BF16)
    if DROP_LF:
        keep = keep_tile(seed, threshold, index_m, block_n * BLOCK_N, N, BLOCK_N)
        acc += drop(tl.dot(L, F, input_precision=INPUT_PRECISION), keep) * scale
    else:
        acc = tl.dot(L, F, acc, input_precision=INPUT_PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + index_n, mask=index_n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    C_ptrs = C_ptr + offsets(index_m, N)[:, None] + index_n[None, :]
    store(C_ptrs, acc, in_m & in_n, EMULATE_BF16)


_LAUNCHES = Launches()
_SPECIALISED = Launches()


def recompute(
    P: Tensor,
    Q: Tensor,
    D: Tensor,
    F: Tensor,
    bias: Tensor | None,
    scaling: float,
    *,
    config: KernelConfig,
    want_L: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    drop_P: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return C (M, N) and L (M, R), contiguous in the dtype of P; L is None unless wanted.

    P (M, K) and Q (K, N) of one dtype, fp32, bf16 or fp16; D (K, R) and F (R, N) of that dtype or fp32; any
    strides. bias (N,), or None. Where dropout_p is above 0, the mask of `seed` is for P, (M, K), or for
    L · F, (M, N), if not drop_P. 1/(1 − dropout_p) multiplies L · F here; for P it is for the caller to have
    in `scaling`.

    Of variant "ws_z": operands that it serves, 16-bit ones that TMA can address; else, and with dropout,
    ValueError, and RuntimeError that says what is missing where it does not run.
    """
    M, K = P.shape
    N = Q.shape[1]
    R = D.shape[1]
    if R > config.BLOCK_R:
        raise ValueError(f"recompute needs R <= BLOCK_R, got R = {R} and BLOCK_R = {config.BLOCK_R}")
    if bias is not None:
        bias = bias.contiguous()
    if config.variant == "ws_z":
        if dropout_p:
            raise ValueError("recompute in its variant 'ws_z' makes no mask: dropout needs another variant")
        key = P.shape, Q.shape, P.stride(), Q.stride(), P.dtype, P.device, aligned(P, Q), config
        run = _SPECIALISED.get(key) or _SPECIALISED.keep(key, _specialised(P, Q, config))
        C, L = run(P, Q, D, F, bias, scaling)
        return C, L if want_L else None
    C = torch.empty((M, N), dtype=P.dtype, device=P.device)
    L = torch.empty((M, R), dtype=P.dtype, device=P.device) if want_L else None
    if M == 0:
        return C, L
    seed, threshold = dropout_arguments(dropout_p, seed)
    drops = None if seed is None else "P" if drop_P else "LF"
    scale = keep_scale(dropout_p) if drops == "LF" else None
    precision = input_precision(P.dtype)
    strides = P.stride(), Q.stride(), D.stride(), F.stride()
    dtypes = P.dtype, D.dtype, F.dtype, None if bias is None else bias.dtype
    key = M, N, K, R, strides, dtypes, P.device, want_L, drops, precision, config
    launch = _LAUNCHES.get(key) or _LAUNCHES.keep(
        key, _launch(P, Q, D, F, bias, want_L, drops, precision, config)
    )
    launch(P, Q, D, F, bias, L, C, seed, threshold, scale, scaling)
    return C, L


def _launch(
    P: Tensor,
    Q: Tensor,
    D: Tensor,
    F: Tensor,
    bias: Tensor | None,
    want_L: bool,
    drops: str | None,
    precision: str,
    config: KernelConfig,
) -> Launch:
    """Return the launch for operands that are like these; drops: "P", "LF" or None, what the mask is for."""
    (M, K), N, R = P.shape, Q.shape[1], D.shape[1]
    return Launch(
        _recompute_kernel,
        # A block even where N is 0: it writes L.
        (blocks_of(M, config.BLOCK_M) * max(1, blocks_of(N, config.BLOCK_N)),),
        (
            "P_ptr",
            "Q_ptr",
            "D_ptr",
            "F_ptr",
            "bias_ptr",
            "L_ptr",
            "C_ptr",
            "seed_ptr",
            "threshold",
            "scale",
            "scaling",
        ),
        dict(
            M=M,
            N=N,
            K=K,
            R=R,
            stride_P_m=P.stride(0),
            stride_P_k=P.stride(1),
            stride_Q_k=Q.stride(0),
            stride_Q_n=Q.stride(1),
            stride_D_k=D.stride(0),
            stride_D_r=D.stride(1),
            stride_F_r=F.stride(0),
            stride_F_n=F.stride(1),
            BLOCK_M=config.BLOCK_M,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_R=config.BLOCK_R,
            EVEN_K=K % config.BLOCK_K == 0,
            HAS_BIAS=bias is not None,
            STORE_L=want_L,
            DROP_P=drops == "P",
            DROP_LF=drops == "LF",
            INPUT_PRECISION=precision,
            EMULATE_BF16=emulate_bf16(P, D, F),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )


def _specialised(P: Tensor, Q: Tensor, config: KernelConfig) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return expand_ws_z for operands that are like these, to be called with all but what they decide."""
    transposed = storage_order(P, Q)
    if transposed is None:
        raise ValueError("recompute in its variant 'ws_z' takes operands for TMA")
    limits = device_limits(P.device)
    expand_ws_z = warp_specialised("expand_ws_z", limits)
    return lambda *operands: expand_ws_z(*operands, config, transposed, limits.num_sms)


def serves(config: KernelConfig, P: Tensor, Q: Tensor) -> bool:
    """Whether recompute takes P and Q in this configuration: "ws_z" those that TMA can address."""
    return config.variant != "ws_z" or storage_order(P, Q) is not None
