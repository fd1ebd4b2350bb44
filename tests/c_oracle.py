"""The C oracle through ctypes: section 2 of the mathematics in double, sharing no line with torch or Triton.

    forward    z  = round( s · (x Aᵀ) )                A, B = lora_A, lora_B rounded to `dtype`
               y  = round( x weightᵀ + z Bᵀ + bias )
    backward   dz = round( s · (dy B) )
               dB = dyᵀ z                              rounded to `lora_B_dtype`
               dx = round( dy weight + dz A )

Arrays are float64 and hold values of `dtype` ("fp64", "fp32", "bf16" or "fp16") already; only lora_A and
lora_B may hold others. The library is built on first use by `make -C csrc_reference` (POSIX: it takes flock).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
from pathlib import Path

import numpy as np

SOURCE_DIR = Path(__file__).resolve().parent.parent / "csrc_reference"
LIBRARY_NAME = "liblorafa_reference.so"
SOURCE_NAMES = ("lorafa_reference.c", "lorafa_reference.h", "Makefile")

# enum lorafa_dtype
DTYPES = {"fp64": 0, "fp32": 1, "bf16": 2, "fp16": 3}
# enum lorafa_status
OK, ERROR_SIZE, ERROR_NULL, ERROR_DTYPE, ERROR_MEMORY = range(5)


def build(source_dir: Path = SOURCE_DIR) -> Path:
    """Path of the shared library, made first if it is missing or older than its sources."""
    path = source_dir / LIBRARY_NAME
    # The lock on the directory makes a second test process wait for the first one's compiler.
    lock = os.open(source_dir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max((source_dir / name).stat().st_mtime_ns for name in SOURCE_NAMES)
        if not path.exists() or path.stat().st_mtime_ns < newest:
            # Named as a target, so that make and this function agree on what is old.
            command = ["make", "-C", str(source_dir), LIBRARY_NAME]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    finally:
        os.close(lock)
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library with its signatures; arrays are addresses, None is NULL."""
    lib = ctypes.CDLL(str(build()))
    size, array, scalar, dtype = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int
    lib.lorafa_strerror.argtypes = [ctypes.c_int]
    lib.lorafa_strerror.restype = ctypes.c_char_p
    lib.lorafa_round.argtypes = [scalar, dtype]
    lib.lorafa_round.restype = scalar
    lib.lorafa_round_array.argtypes = [size, array, dtype, array]
    lib.lorafa_round_array.restype = ctypes.c_int
    lib.lorafa_forward.argtypes = [size] * 4 + [array] * 5 + [scalar, dtype] + [array] * 2
    lib.lorafa_forward.restype = ctypes.c_int
    lib.lorafa_backward.argtypes = [size] * 4 + [array] * 5 + [scalar, dtype, dtype] + [array] * 3
    lib.lorafa_backward.restype = ctypes.c_int
    return lib


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """`array` rounded once to the nearest number of `dtype`, ties to even; float64, the shape kept."""
    code = _code("dtype", dtype)
    values = _float64(array)
    rounded = np.empty_like(values)
    _check(library().lorafa_round_array(values.size, values.ctypes.data, code, rounded.ctypes.data))
    return rounded


def forward(
    x: np.ndarray,  # (M, K)
    weight: np.ndarray,  # (N, K)
    lora_A: np.ndarray,  # (R, K)
    lora_B: np.ndarray,  # (N, R)
    bias: np.ndarray | None,  # (N,)
    scaling: float,
    dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """z (M, R) with the scaling in it, and y (M, N)."""
    code = _code("dtype", dtype)
    x = _matrix("x", x)
    weight = _matrix("weight", weight)
    M, K = x.shape
    N = weight.shape[0]
    lora_A = _matrix("lora_A", lora_A)
    R = lora_A.shape[0]
    lora_B = _matrix("lora_B", lora_B)
    _check_shape("weight", weight, (N, K), "x's last dimension")
    _check_shape("lora_A", lora_A, (R, K), "x's last dimension")
    _check_shape("lora_B", lora_B, (N, R), "weight's rows and lora_A's rank")
    _check_rounded("x", x, dtype)
    _check_rounded("weight", weight, dtype)
    if bias is not None:
        bias = _float64(bias)
        _check_shape("bias", bias, (N,), "weight's rows")
        _check_rounded("bias", bias, dtype)

    z, y = np.empty((M, R)), np.empty((M, N))
    inputs = [_address(a) for a in (x, weight, lora_A, lora_B, bias)]
    _check(library().lorafa_forward(M, N, K, R, *inputs, scaling, code, _address(z), _address(y)))
    return z, y


def backward(
    dy: np.ndarray,  # (M, N)
    z: np.ndarray,  # (M, R), the scaling in it
    weight: np.ndarray,  # (N, K)
    lora_A: np.ndarray,  # (R, K)
    lora_B: np.ndarray,  # (N, R)
    scaling: float,
    dtype: str,
    lora_B_dtype: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dz (M, R) with the scaling in it, dx (M, K), and dB (N, R) in lora_B's dtype."""
    code, lora_B_code = _code("dtype", dtype), _code("lora_B_dtype", lora_B_dtype)
    dy = _matrix("dy", dy)
    weight = _matrix("weight", weight)
    M = dy.shape[0]
    N, K = weight.shape
    lora_A = _matrix("lora_A", lora_A)
    R = lora_A.shape[0]
    z = _matrix("z", z)
    lora_B = _matrix("lora_B", lora_B)
    _check_shape("dy", dy, (M, N), "weight's rows")
    _check_shape("z", z, (M, R), "dy's rows and lora_A's rank")
    _check_shape("lora_A", lora_A, (R, K), "weight's columns")
    _check_shape("lora_B", lora_B, (N, R), "weight's rows and lora_A's rank")
    for name, array in (("dy", dy), ("z", z), ("weight", weight)):
        _check_rounded(name, array, dtype)

    dz, dx, dB = np.empty((M, R)), np.empty((M, K)), np.empty((N, R))
    inputs = [_address(a) for a in (dy, z, weight, lora_A, lora_B)]
    outputs = [_address(a) for a in (dz, dx, dB)]
    _check(library().lorafa_backward(M, N, K, R, *inputs, scaling, code, lora_B_code, *outputs))
    return dz, dx, dB


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def _float64(array: np.ndarray) -> np.ndarray:
    """Contiguous float64; a TypeError for complex and long double, which would lose something."""
    return np.asarray(array).astype(np.float64, order="C", casting="safe", copy=False)


def _matrix(name: str, array: np.ndarray) -> np.ndarray:
    matrix = _float64(array)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {matrix.shape}, expected two dimensions")
    return matrix


def _check_shape(name: str, array: np.ndarray, expected: tuple[int, ...], from_what: str) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected} from {from_what}")


def _check_rounded(name: str, array: np.ndarray, dtype: str) -> None:
    # An input that the operator would never see makes the comparison with the operator meaningless.
    if not np.array_equal(array, round_to(array, dtype), equal_nan=True):
        raise ValueError(f"{name} holds values that {dtype} has not; pass round_to({name}, {dtype!r})")


def _code(name: str, dtype: str) -> int:
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _check(status: int) -> None:
    if status != OK:
        raise RuntimeError(f"lorafa_reference: {library().lorafa_strerror(status).decode()}")
