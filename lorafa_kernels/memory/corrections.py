"""Where a step on CUDA keeps or allocates something else than a step on fake CPU tensors shows.

CUDA is the table, each entry with its source. What is kept follows from cuda_rules, what kernels allocate for
the time of a call from temporaries; the workspace is added to the peak.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..base.frozen import making_bytes
from ..base.kinds import has_rows
from ..linear.library import add_dropped, dropped_product
from .trace import INPUTS, LiveStorages, Temporary

MIB = 2**20
# What an entry of the table stands on until a GPU has shown it.
UNCHECKED = "not checked on a GPU"


@dataclass(frozen=True)
class Correction:
    """An entry of the table: what it is about, the rule, its source and what it was checked with."""

    subject: str
    rule: str
    source: str
    checked: str = UNCHECKED


CUDA = (
    Correction(
        "dropout",
        "keeps a mask of bool, one byte an element; a CPU keeps one of the input's dtype",
        "aten/src/ATen/native/Dropout.cpp (is_fused_kernel_acceptable) and cuda/Dropout.cu",
    ),
    Correction(
        "attention (SDPA)",
        "flash attention without a mask, memory-efficient attention with one: both keep q, k, v, the output "
        "and an fp32 logsumexp per head and token, with dropout as well; fp32 with fewer heads of k and v "
        "and no mask falls to the math kernel, which keeps the probabilities",
        "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (select_sdp_backend)",
    ),
    Correction(
        "attention's backward",
        "an fp32 sum for dq (tokens rounded up to 128, head size to 32), an fp32 number per head and token, "
        "and dk and dv of all heads of q where k and v have fewer",
        "aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp (mha_bwd)",
    ),
    Correction(
        "loss",
        "cross entropy over fp32 logits keeps their fp32 log-softmax, as on a CPU: nothing to correct",
        "aten/src/ATen/native/cuda/SoftMax.cu (host_softmax: converts only 16-bit input asked for as fp32)",
    ),
    Correction(
        "kernels of this library",
        "copies of fp32 factors beside 16-bit x, and in backward dz; no chunk of a dropout mask; "
        "the gated activation allocates nothing beside its results",
        "lorafa_kernels/linear/fused.py, group/fused.py, kernels/gated.py; partial sums of split products "
        "for few rows are left out",
    ),
    Correction(
        "AdamW and SGD",
        "the foreach form, torch's default for CUDA tensors: a temporary of the size of all that is trained",
        "torch/optim/optimizer.py (_default_to_fused_or_foreach)",
    ),
    Correction(
        "workspace of cuBLAS",
        "32 MiB, Hopper's; 8.1 MiB on older GPUs",
        "aten/src/ATen/cuda/CublasHandlePool.cpp (getChosenWorkspaceSize)",
    ),
    Correction(
        "allocator",
        "every allocation is a multiple of 512 bytes; fragmentation and the CUDA context (about 0.5 GiB, "
        "which no allocator sees) are not counted",
        "c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize)",
    ),
)
CUDA_GRANULE = 512
CUDA_WORKSPACE = 32 * MIB


@contextlib.contextmanager
def cuda_rules():
    """Makes dropout and attention of CPU tensors keep what CUDA's keep. By torch.nn.functional, where modules
    and models look them up: a mode of torch functions is off where a checkpoint runs forward again.
    """
    known = F.dropout, F.scaled_dot_product_attention
    F.dropout = functools.partial(_dropout, known[0])
    F.scaled_dot_product_attention = functools.partial(_attention, known[1])
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = known


def _dropout(
    original: Callable, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or p == 0 or inplace:
        return original(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    original: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    rest = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if (enable_gqa and query.dtype == torch.float32) or trained_mask:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return original(query, key, value, attn_mask, dropout_p, **rest)
    # Its dropout is drawn again in backward, and keeps 16 bytes.
    return original(query, key, value, attn_mask, 0.0, **rest)


def _flash_backward(args: tuple, kwargs: dict, out: object) -> int:
    # (grad_out, query, key, value, ...), (batch, heads, tokens, head size).
    query, key = args[1], args[2]
    batch, heads, tokens, size = query.shape
    rounded = -(-tokens // 128) * 128
    found = batch * heads * rounded * (-(-size // 32) * 32 + 1) * 4
    if key.shape[1] != heads:
        found += 2 * batch * heads * key.shape[2] * size * query.itemsize
    return found


def _factors(tensors, dtype: torch.dtype) -> int:
    """Bytes of the low-rank factors that are copied into another dtype."""
    copied = [t for t in tensors if t is not None and t.dtype != dtype]
    return sum(t.numel() for t in copied) * dtype.itemsize


def _linear_forward(args: tuple, kwargs: dict, out: object) -> int:
    x, _, *factors = args[:4]
    return _factors(factors, x.dtype)


def _linear_backward(args: tuple, kwargs: dict, out: object) -> int:
    dy, _, _, *factors = args[:5]
    return dy.shape[0] * factors[1].shape[1] * dy.itemsize + _factors(factors, dy.dtype)


def _linear_backward_input(args: tuple, kwargs: dict, out: object) -> int:
    dy, _, *factors = args[:4]
    return dy.shape[0] * factors[1].shape[1] * dy.itemsize + _factors(factors, dy.dtype)


def _group_forward(args: tuple, kwargs: dict, out: object) -> int:
    return _factors([*args[2], *args[3]], args[0].dtype)


def _group_backward(args: tuple, kwargs: dict, out: object) -> int:
    dy = next(dy for dy in args[0] if dy is not None)
    ranks = sum(lora_B.shape[1] for lora_B in args[4] if lora_B is not None)
    need_dx = args[9]
    copies = _factors([*args[3], *args[4]], dy.dtype)
    return dy.shape[0] * ranks * dy.itemsize + copies if need_dx else 0


_NOTHING: Mapping[object, Temporary] = {}


def _masks(within: Mapping[object, Temporary]) -> Callable[..., int]:
    """Return what the library's chunk of a dropout mask takes beside z, or dx and dz, and the factors:
    (forward, rows, K, R, dropout_p) -> bytes.
    """

    @functools.cache
    def bytes_of(forward: bool, M: int, K: int, R: int, dtype: torch.dtype) -> int:
        # Nothing is computed on the meta device.
        tensor = functools.partial(torch.empty, device="meta", dtype=dtype)
        with _disable_current_modes(), torch.no_grad():
            rows, z, A = tensor(M, K), tensor(M, R), tensor(R, K)
            seed = tensor(1, dtype=torch.int64)
            given = rows, z, A, seed
            with LiveStorages(within) as seen:
                for operand in given:
                    seen.add(operand, INPUTS)
                seen.mark("mask")
                if forward:
                    dropped_product(rows, A.t(), 1.0, 0.5, seed)
                else:
                    add_dropped(rows, z, A, 0.5, seed)
        seen.settle("mask")
        found = seen.segments()["mask"].peak - sum(operand.nbytes for operand in given)
        return found - z.nbytes if forward else found

    def found(forward: bool, rows: Tensor, K: int, R: int, dropout_p: float) -> int:
        return bytes_of(forward, rows.shape[0], K, R, rows.dtype) if dropout_p else 0

    return found


def dense_weights(on_cpu: bool, within: Mapping[object, Temporary] = _NOTHING) -> Mapping[object, Temporary]:
    """What operators on a quantised base allocate inside a call: the dense weight, and what takes more of
    making it, of a chunk of dropout's mask, which the library makes on a CPU, and of multiplying by it.

    within: what kernels allocate that are called for the mask, by operation.
    """

    def weight(kind: str, shape: Sequence[int], dtype: torch.dtype, product: int) -> int:
        N, K = shape
        by_kernel = not on_cpu and kind.startswith("nf4") and has_rows(K)
        made = making_bytes(kind, shape, dtype, by_kernel, on_cpu)
        return N * K * dtype.itemsize + max(made, product)

    def taken(first: int, args: tuple, product: int) -> int:
        # args[first:]: a base in four arguments.
        return weight(args[first + 1], args[first + 2], args[0].dtype, product)

    def largest(kinds: Sequence[str], shapes: Sequence[int], dtype: torch.dtype) -> int:
        # Of the weights of a group one is there at a time.
        sizes = zip(kinds, zip(shapes[::2], shapes[1::2], strict=True), strict=True)
        return max(weight(kind, shape, dtype, 0) for kind, shape in sizes)

    def group_forward(args: tuple, kwargs: dict, out: object) -> int:
        x, ranks = args[0], [0 if lora_A is None else lora_A.shape[0] for lora_A in args[5]]
        # z comes before the y_i, and they before the next weight.
        ys = x.shape[0] * sum(args[3][::2]) * x.itemsize
        chunk = masks(True, x, args[3][1], ranks, args[9]) - ys
        return max(chunk, largest(*args[2:4], x.dtype) + _factors(args[6], x.dtype))

    def group_backward(args: tuple, kwargs: dict, out: object) -> int:
        dy = next(dy for dy in args[0] if dy is not None)
        ranks = sum(lora_B.shape[1] for lora_B in args[7] if lora_B is not None)
        K = args[4][1]
        # dz, and lora_A side by side; the kernels make no copy of it, and a dx for each member to be added.
        beside = dy.shape[0] * ranks + (ranks * K if on_cpu else dy.shape[0] * K)
        # The masks come last, when no weight is there.
        each = [0 if lora_A is None else lora_A.shape[0] for lora_A in args[6]]
        return beside * dy.itemsize + max(largest(*args[3:5], dy.dtype), masks(False, dy, K, each, args[9]))

    def masks(forward: bool, rows: Tensor, K: int, ranks: Sequence[int], ps: Sequence[float]) -> int:
        # Of one member at a time.
        found = [mask(forward, rows, K, R, p) for R, p in zip(ranks, ps, strict=True) if R and on_cpu]
        return max(found, default=0)

    def forward(args: tuple, kwargs: dict, out: object) -> int:
        x, (N, K), R = args[0], args[3], args[5].shape[0]
        factors = _factors(args[5:7], x.dtype)
        # y is not there yet.
        chunk = mask(True, x, K, R, dropout(args, kwargs, 10)) - x.shape[0] * N * x.itemsize
        return taken(1, args, factors + max(0, chunk))

    def backward(args: tuple, kwargs: dict, out: object) -> int:
        dy, (_, K), lora_B = args[0], args[4], args[7]
        of_dz = dy.shape[0] * lora_B.shape[1] * dy.itemsize + _factors(args[6:8], dy.dtype)
        # dB is not there yet.
        chunk = (
            mask(False, dy, K, lora_B.shape[1], dropout(args, kwargs, 10)) - lora_B.numel() * lora_B.itemsize
        )
        return taken(2, args, of_dz + max(0, chunk))

    def backward_input(args: tuple, kwargs: dict, out: object) -> int:
        dy, (_, K), lora_B = args[0], args[3], args[6]
        of_dz = dy.shape[0] * lora_B.shape[1] * dy.itemsize + _factors(args[5:7], dy.dtype)
        return taken(1, args, of_dz + mask(False, dy, K, lora_B.shape[1], dropout(args, kwargs, 9)))

    def frozen(args: tuple, kwargs: dict, out: object) -> int:
        return taken(1, args, 0)

    def dropout(args: tuple, kwargs: dict, place: int) -> float:
        """dropout_p of a call, 0 where the kernels make the mask in registers."""
        found = args[place] if len(args) > place else kwargs.get("dropout_p", 0.0)
        return found if on_cpu else 0.0

    mask = _masks(within)
    ours = torch.ops.lorafa_kernels
    return {
        ours.quantised_forward.default: forward,
        ours.quantised_backward.default: backward,
        ours.quantised_backward_input.default: backward_input,
        ours.quantised_group_forward.default: group_forward,
        ours.quantised_group_backward.default: group_backward,
        ours.frozen_product.default: frozen,
        ours.frozen_gradient.default: frozen,
    }


def temporaries() -> Mapping[object, Temporary]:
    """Return what CUDA's kernels allocate inside a call, by the operation that stands for them here."""
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    ours = torch.ops.lorafa_kernels
    return {
        flash_backward.default: _flash_backward,
        ours.forward.default: _linear_forward,
        ours.backward.default: _linear_backward,
        ours.backward_input.default: _linear_backward_input,
        ours.group_forward.default: _group_forward,
        ours.group_backward.default: _group_backward,
        **dense_weights(on_cpu=False),
    }
