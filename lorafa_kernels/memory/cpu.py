"""What the CPU's kernels allocate for the time of a call, which no dispatch mode sees, by operation.

flash attention    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp (cpu_flash_attention and its backward):
                   each thread's block of scores
16-bit products    oneDNN, src/cpu/x64/matmul/brgemm_matmul_utils.cpp (init_scratchpad): each thread's packed
                   blocks of the operands and the fp32 sums; fitted to what the allocator's events show with
                   AVX512-BF16, on torch 2.13. fp32 products go to MKL, which asks PyTorch for nothing.
elementwise        aten/src/ATen/TensorIterator.cpp (compute_types): operands of another dtype than the result
                   are copied into it, whole; CUDA converts them one by one
convolution        backward of 16 bits sums the weight's gradient in fp32
generator          torch/utils/checkpoint.py: its state for each checkpoint
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from .corrections import dense_weights
from .trace import Temporary

# Blocks of a product: rows of the result, of the contraction, columns.
_ROWS, _CONTRACTION, _COLUMNS = 256, 512, 64
_CONTRACTION_OF_A = 672


def _product(rows: int, contraction: int, columns: int, transposed: bool) -> int:
    """Scratch memory of a 16-bit product; transposed: whether the rows of the first operand are strided."""
    block = -(-rows // -(-rows // _ROWS))
    padded = -(-contraction // 32) * 32
    found = min(padded, _CONTRACTION) * _COLUMNS * 2 + block * min(columns, _COLUMNS) * 4 + 1024
    if transposed:
        found += block * min(padded, _CONTRACTION_OF_A) * 2 + 128
    return torch.get_num_threads() * found


def _of_matrices(left: Tensor, right: Tensor) -> int:
    if left.itemsize != 2 or not left.is_floating_point() or not left.numel() or not right.numel():
        return 0
    return _product(left.shape[-2], left.shape[-1], right.shape[-1], left.stride(-1) != 1)


def _mm(args: tuple, kwargs: dict, out: object) -> int:
    return _of_matrices(args[0], args[1])


def _addmm(args: tuple, kwargs: dict, out: object) -> int:
    return _of_matrices(args[1], args[2])


def _splits(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Rows of q and of k that a thread works on at a time."""
    tokens = query.shape[2]
    rows = 256 if tokens >= 768 else 64 if tokens >= 192 else 32
    return min(rows, tokens), min(512, key.shape[2])


def _flash(args: tuple, kwargs: dict, out: object) -> int:
    # (query, key, value, ...): a thread's scores, their maxima and sums, and its rows of the output.
    query, key = args[:2]
    rows, columns = _splits(query, key)
    found = (rows * columns + 2 * rows + rows * query.shape[3]) * 4
    if query.itemsize == 2:
        found += rows * columns * 2
    return torch.get_num_threads() * found


def _flash_backward(args: tuple, kwargs: dict, out: object) -> int:
    # (grad_out, query, key, ...): a copy of grad_out, a thread's scores and their gradient.
    query, key = args[1], args[2]
    rows, columns = _splits(query, key)
    found = 2 * rows * columns * 4 + rows * 4
    products = 0
    if query.itemsize == 2:
        found += 2 * rows * columns * 2
        products = _product(columns, rows, query.shape[3], True)
    return torch.get_num_threads() * found + products + query.numel() * query.itemsize


def _elementwise(args: tuple, kwargs: dict, out: object) -> int:
    operands = [arg for arg in args if isinstance(arg, Tensor) and arg.dim()]
    if len(operands) < 2 or len({operand.dtype for operand in operands}) == 1:
        return 0
    common = functools.reduce(torch.promote_types, (operand.dtype for operand in operands))
    return sum(operand.numel() * common.itemsize for operand in operands if operand.dtype != common)


def _convolution_backward(args: tuple, kwargs: dict, out: object) -> int:
    weight, wanted = args[2], args[-1]
    return weight.numel() * 4 if wanted[1] and weight.itemsize == 2 else 0


def temporaries() -> Mapping[object, Temporary]:
    """Return what kernels allocate inside a call, by operation."""
    aten = torch.ops.aten
    found = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _flash,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
    }
    for name in ("add", "sub", "mul", "div"):
        for packet in (getattr(aten, name), getattr(aten, f"{name}_")):
            found[packet.Tensor] = _elementwise
    found[aten.convolution_backward.default] = _convolution_backward
    found |= dense_weights(on_cpu=True, within=found)
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found |= {aten.mm.default: _mm, aten.bmm.default: _mm}
        found |= {aten.addmm.default: _addmm, aten.addmm_.default: _addmm}
    return found


@contextlib.contextmanager
def generator_state():
    """What activation checkpointing keeps to draw a layer's dropout again: the state of the generator, a
    tensor that no dispatch mode sees. CUDA's is 16 bytes, in the host's memory.
    """
    size = torch.random.default_generator.get_state().numel()
    known = torch.get_rng_state, torch.set_rng_state
    torch.get_rng_state = lambda: torch.empty(size, dtype=torch.uint8)
    torch.set_rng_state = lambda state: None
    try:
        yield
    finally:
        torch.get_rng_state, torch.set_rng_state = known
