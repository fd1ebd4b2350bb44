"""The C oracle through ctypes: section 2 of the mathematics in double, sharing no line with torch or Triton.

    forward    z  = round( s/(1 − p) · ((x keep) Aᵀ) )  A, B = lora_A, lora_B rounded to `dtype`
               y  = round( x weightᵀ + z Bᵀ + bias )
    backward   dz = round( s/(1 − p) · (dy B) )
               dB = dyᵀ z                               rounded to `lora_B_dtype`
               dx = round( dy weight + keep (dz A) )

and the blocks made of it, as csrc_reference/lorafa_reference.h has them.

Arrays are float64 and hold values of `dtype` ("fp64", "fp32", "bf16" or "fp16") already; only lora_A and
lora_B may hold others. The library is built on first use by `make -C csrc_reference` (POSIX: it takes flock).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SOURCE_DIR = Path(__file__).resolve().parent.parent / "csrc_reference"
LIBRARY_NAME = "liblorafa_reference.so"
SOURCE_NAMES = ("lorafa_reference.c", "lorafa_reference.h", "Makefile")

# enum lorafa_dtype
DTYPES = {"fp64": 0, "fp32": 1, "bf16": 2, "fp16": 3}
# enum lorafa_status
OK, ERROR_SIZE, ERROR_NULL, ERROR_DTYPE, ERROR_MEMORY, ERROR_DROPOUT, ERROR_SHARED, ERROR_KIND = range(8)
ERROR_SINGULAR = 8
# enum lorafa_activation
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
# enum lorafa_norm_form
NORM_FORMS = {"llama": 0, "gemma": 1}


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
    size, word, array, scalar = ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_double
    dtype = kind = flag = ctypes.c_int
    lib.lorafa_strerror.argtypes = [ctypes.c_int]
    lib.lorafa_strerror.restype = ctypes.c_char_p
    lib.lorafa_round.argtypes = [scalar, dtype]
    lib.lorafa_round.restype = scalar
    lib.lorafa_activate.argtypes = lib.lorafa_activate_derivative.argtypes = [kind, scalar]
    lib.lorafa_activate.restype = lib.lorafa_activate_derivative.restype = scalar
    lib.lorafa_philox4x32.argtypes = [array] * 3
    lib.lorafa_philox4x32.restype = None
    lib.lorafa_threshold.argtypes = [scalar]
    lib.lorafa_threshold.restype = ctypes.c_uint32
    lib.lorafa_keep.argtypes = [word] * 4 + [ctypes.c_uint32]
    lib.lorafa_keep.restype = ctypes.c_int
    with_status = {
        "lorafa_round_array": [size, array, dtype, array],
        "lorafa_keep_mask": [size, size, word, scalar, word, array],
        "lorafa_forward": [size] * 4 + [array] * 5 + [scalar, scalar, word, dtype] + [array] * 2,
        "lorafa_backward": [size] * 4 + [array] * 5 + [scalar, scalar, word, dtype, dtype] + [array] * 3,
        "lorafa_correct": [size] * 3 + [array] * 2 + [scalar] * 2 + [dtype, array],
        "lorafa_group_forward": [size] * 3 + [array] * 2 + [flag, dtype] + [array] * 2,
        "lorafa_group_backward": [size] * 3 + [array] * 3 + [flag, dtype] + [array] * 3,
        "lorafa_gated_product": [size] + [array] * 2 + [kind, dtype, array],
        "lorafa_gated_product_backward": [size] + [array] * 3 + [kind, dtype] + [array] * 2,
        "lorafa_mlp_forward": [size] * 2 + [array] * 2 + [kind, dtype] + [array] * 5,
        "lorafa_mlp_backward": [size] * 2 + [array] * 5 + [kind, dtype] + [array] * 5,
        "lorafa_rms_norm": [size] * 2 + [array] * 2 + [scalar, kind, dtype, array],
        "lorafa_rms_norm_backward": [size] * 2 + [array] * 3 + [scalar, kind, dtype, array],
    }
    for name, arguments in with_status.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = ctypes.c_int
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
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """z (M, R) with the scaling in it, and y (M, N). seed: any int of 64 bits, with a sign or without."""
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
    numbers = (scaling, dropout_p, _word(seed), code)
    _check(library().lorafa_forward(M, N, K, R, *inputs, *numbers, _address(z), _address(y)))
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
    dropout_p: float = 0.0,
    seed: int = 0,
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
    numbers = (scaling, dropout_p, _word(seed), code, lora_B_code)
    _check(library().lorafa_backward(M, N, K, R, *inputs, *numbers, *outputs))
    return dz, dx, dB


def correct(
    dB: np.ndarray,  # (N, R)
    lora_A: np.ndarray,  # (R, K)
    scaling: float,
    lora_B_dtype: str,
    epsilon: float = 1e-8,
) -> np.ndarray:
    """The corrected dB (N, R). RuntimeError where A Aᵀ + εI has no inverse."""
    code = _code("lora_B_dtype", lora_B_dtype)
    dB, lora_A = _rounded_matrix("dB", dB, lora_B_dtype), _matrix("lora_A", lora_A)
    N, R = dB.shape
    _check_shape("lora_A", lora_A, (R, lora_A.shape[1]), "dB's columns")
    corrected = np.empty((N, R))
    numbers = (scaling, epsilon, code)
    sizes = (N, lora_A.shape[1], R)
    _check(library().lorafa_correct(*sizes, _address(dB), _address(lora_A), *numbers, _address(corrected)))
    return corrected


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """The four words of Philox4x32-10 for a counter of four words and a key of two."""
    counter, key = np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32)
    _check_shape("counter", counter, (4,), "Philox4x32")
    _check_shape("key", key, (2,), "Philox4x32")
    word = np.empty(4, dtype=np.uint32)
    library().lorafa_philox4x32(counter.ctypes.data, key.ctypes.data, word.ctypes.data)
    return word.tolist()


def keep_mask(seed: int, dropout_p: float, M: int, K: int, row0: int = 0) -> np.ndarray:
    """What dropout keeps of rows row0 to row0 + M − 1 of an input of K columns: bool (M, K)."""
    keep = np.empty((M, K), dtype=np.bool_)
    _check(library().lorafa_keep_mask(M, K, _word(seed), dropout_p, _word(row0), keep.ctypes.data))
    return keep


@dataclass
class Linear:
    """One linear layer of a block; without lora_A and lora_B a plain frozen one. Shapes as of forward."""

    weight: np.ndarray
    lora_A: np.ndarray | None = None
    lora_B: np.ndarray | None = None
    bias: np.ndarray | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: int = 0
    lora_B_dtype: str = "fp64"

    @property
    def rank(self) -> int:
        return 0 if self.lora_B is None else self.lora_B.shape[1]


def group_forward(
    x: np.ndarray,  # (M, K)
    members: Sequence[Linear],
    dtype: str,
    share_A: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The z (M, R_i) of the members, or with share_A the one z in a list, and their y (M, N_i)."""
    x = _rounded_matrix("x", x, dtype)
    M, K = x.shape
    layers = _Layers([_checked(member, K, dtype) for member in members], share_A)
    zs = [np.empty((M, member.rank)) for member in layers.made_of[: 1 if share_A else None]]
    ys = [np.empty((M, len(member.weight))) for member in layers.made_of]
    z_addresses, y_addresses = _addresses(zs), _addresses(ys)
    numbers = (int(share_A), DTYPES[dtype])
    _check(
        library().lorafa_group_forward(
            M, K, len(ys), _address(x), layers.address, *numbers, z_addresses, y_addresses
        )
    )
    return zs, ys


def group_backward(
    dys: Sequence[np.ndarray | None],  # (M, N_i) each, None for an output that nobody used
    zs: Sequence[np.ndarray],  # (M, R_i) each, with share_A one
    members: Sequence[Linear],
    dtype: str,
    share_A: bool = False,
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """dz (M, R_i) of the members, or with share_A the one dz in a list, dx (M, K), and dB (N_i, R_i)."""
    K = _matrix("weight", members[0].weight).shape[1]
    layers = _Layers([_checked(member, K, dtype) for member in members], share_A)
    dys = [None if dy is None else _rounded_matrix("dy", dy, dtype) for dy in dys]
    zs = [_rounded_matrix("z", z, dtype) for z in zs]
    M = zs[0].shape[0]
    makers = layers.made_of[: 1 if share_A else None]
    for dy, member in zip(dys, layers.made_of, strict=True):
        if dy is not None:
            _check_shape("dy", dy, (M, len(member.weight)), "z's rows and weight's rows")
    for z, member in zip(zs, makers, strict=True):
        _check_shape("z", z, (M, member.rank), "lora_A's rank")
    dzs = [np.empty((M, member.rank)) for member in makers]
    dx = np.empty((M, K))
    dBs = [np.empty((len(member.weight), member.rank)) for member in layers.made_of]
    numbers = (int(share_A), DTYPES[dtype])
    outputs = (_addresses(dzs), _address(dx), _addresses(dBs))
    inputs = (_addresses(dys), _addresses(zs), layers.address)
    _check(library().lorafa_group_backward(M, K, len(dys), *inputs, *numbers, *outputs))
    return dzs, dx, dBs


def activate(activation: str, g: float) -> tuple[float, float]:
    """act(g) and act'(g)."""
    code = _code("activation", activation, ACTIVATIONS)
    return library().lorafa_activate(code, g), library().lorafa_activate_derivative(code, g)


def gated_product(g: np.ndarray, u: np.ndarray, activation: str, dtype: str) -> np.ndarray:
    """h = round(act(g) · u), in the shape of g."""
    codes = _code("activation", activation, ACTIVATIONS), _code("dtype", dtype)
    g, u = _same_shape(dtype, g=g, u=u)
    h = np.empty_like(g)
    _check(library().lorafa_gated_product(g.size, _address(g), _address(u), *codes, _address(h)))
    return h


def gated_product_backward(
    dh: np.ndarray, g: np.ndarray, u: np.ndarray, activation: str, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """dg = round(dh · u · act'(g)) and du = round(dh · act(g)), in the shape of dh."""
    codes = _code("activation", activation, ACTIVATIONS), _code("dtype", dtype)
    inputs = _same_shape(dtype, dh=dh, g=g, u=u)
    dg, du = np.empty_like(inputs[0]), np.empty_like(inputs[0])
    addresses = [_address(a) for a in inputs]
    _check(library().lorafa_gated_product_backward(dg.size, *addresses, *codes, _address(dg), _address(du)))
    return dg, du


class MLPResults(NamedTuple):
    zs: list[np.ndarray]  # (M, R) of gate, up and down
    g: np.ndarray  # (M, I)
    u: np.ndarray  # (M, I)
    h: np.ndarray  # (M, I)
    y: np.ndarray  # (M, N)


def mlp_forward(
    x: np.ndarray, gate: Linear, up: Linear, down: Linear, activation: str, dtype: str
) -> MLPResults:
    """What a gated MLP makes of x (M, K)."""
    x = _rounded_matrix("x", x, dtype)
    M, K = x.shape
    layers = _mlp_layers(gate, up, down, dtype)
    codes = _code("activation", activation, ACTIVATIONS), DTYPES[dtype]
    wide, N = layers.made_of[0].weight.shape[0], layers.made_of[2].weight.shape[0]
    zs = [np.empty((M, member.rank)) for member in layers.made_of]
    g, u, h, y = np.empty((M, wide)), np.empty((M, wide)), np.empty((M, wide)), np.empty((M, N))
    outputs = [_address(a) for a in (g, u, h, y)]
    _check(library().lorafa_mlp_forward(M, K, _address(x), layers.address, *codes, _addresses(zs), *outputs))
    return MLPResults(zs, g, u, h, y)


class MLPGradients(NamedTuple):
    dh: np.ndarray  # (M, I)
    dg: np.ndarray  # (M, I)
    du: np.ndarray  # (M, I)
    dx: np.ndarray  # (M, K)
    dBs: list[np.ndarray]  # (N, R) of gate, up and down


def mlp_backward(
    dy: np.ndarray,  # (M, N)
    kept: MLPResults,  # of which g, u and zs are read
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: str,
    dtype: str,
) -> MLPGradients:
    """The gradients of a gated MLP."""
    dy = _rounded_matrix("dy", dy, dtype)
    g, u = _same_shape(dtype, g=kept.g, u=kept.u)
    zs = [_rounded_matrix("z", z, dtype) for z in kept.zs]
    layers = _mlp_layers(gate, up, down, dtype)
    codes = _code("activation", activation, ACTIVATIONS), DTYPES[dtype]
    M, K = len(dy), layers.made_of[0].weight.shape[1]
    N, wide = layers.made_of[2].weight.shape
    _check_shape("dy", dy, (M, N), "down's rows")
    _check_shape("g", g, (M, wide), "dy's rows and down's columns")
    for z, member in zip(zs, layers.made_of, strict=True):
        _check_shape("z", z, (M, member.rank), "dy's rows and lora_A's rank")
    dh, dg, du, dx = np.empty((M, wide)), np.empty((M, wide)), np.empty((M, wide)), np.empty((M, K))
    dBs = [np.empty((len(member.weight), member.rank)) for member in layers.made_of]
    inputs = [_address(a) for a in (dy, g, u)]
    outputs = [_address(a) for a in (dh, dg, du, dx)]
    _check(
        library().lorafa_mlp_backward(
            M, K, *inputs, _addresses(zs), layers.address, *codes, *outputs, _addresses(dBs)
        )
    )
    return MLPGradients(dh, dg, du, dx, dBs)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, form: str, dtype: str) -> np.ndarray:
    """y (M, K) of x (M, K) and weight (K,); form: "llama", T5's too, or "gemma"."""
    codes = _code("form", form, NORM_FORMS), _code("dtype", dtype)
    x, weight = _norm_operands(x, weight, dtype)
    y = np.empty_like(x)
    _check(library().lorafa_rms_norm(*x.shape, _address(x), _address(weight), eps, *codes, _address(y)))
    return y


def rms_norm_backward(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float, form: str, dtype: str
) -> np.ndarray:
    """dx (M, K)."""
    codes = _code("form", form, NORM_FORMS), _code("dtype", dtype)
    x, weight = _norm_operands(x, weight, dtype)
    dy = _rounded_matrix("dy", dy, dtype)
    _check_shape("dy", dy, x.shape, "x")
    dx = np.empty_like(x)
    inputs = [_address(a) for a in (dy, x, weight)]
    _check(library().lorafa_rms_norm_backward(*x.shape, *inputs, eps, *codes, _address(dx)))
    return dx


class _CLinear(ctypes.Structure):
    """struct lorafa_linear"""

    _fields_ = (
        ("N", ctypes.c_int64),
        ("R", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("lora_A", ctypes.c_void_p),
        ("lora_B", ctypes.c_void_p),
        ("scaling", ctypes.c_double),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("lora_B_dtype", ctypes.c_int),
    )


class _Layers:
    """Layers as an array of struct lorafa_linear, and `made_of`, whose arrays it points into."""

    def __init__(self, checked: Sequence[Linear], share_A: bool = False) -> None:
        self.made_of = list(checked)
        first = self.made_of[0].lora_A
        if share_A and not all(np.array_equal(m.lora_A, first) for m in self.made_of if m.rank):
            raise ValueError("with share_A every member that has a lora_A has that of the first")
        self.array = (_CLinear * len(self.made_of))()
        for c, member in zip(self.array, self.made_of, strict=True):
            c.N, c.R = len(member.weight), member.rank
            for name in ("weight", "bias", "lora_A", "lora_B"):
                setattr(c, name, _address(getattr(member, name)))
            c.scaling, c.dropout_p, c.seed = member.scaling, member.dropout_p, _word(member.seed)
            c.lora_B_dtype = DTYPES[member.lora_B_dtype]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.array)


def _checked(member: Linear, K: int, dtype: str) -> Linear:
    """The same layer with contiguous float64 arrays of the right shapes."""
    weight = _rounded_matrix("weight", member.weight, dtype)
    N = len(weight)
    _check_shape("weight", weight, (N, K), "its input's columns")
    lora_A, lora_B, bias = member.lora_A, member.lora_B, member.bias
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B are given both or neither")
    if lora_A is not None:
        lora_A, lora_B = _matrix("lora_A", lora_A), _matrix("lora_B", lora_B)
        R = len(lora_A)
        _check_shape("lora_A", lora_A, (R, K), "its input's columns")
        _check_shape("lora_B", lora_B, (N, R), "weight's rows and lora_A's rank")
    if bias is not None:
        bias = _float64(bias)
        _check_shape("bias", bias, (N,), "weight's rows")
        _check_rounded("bias", bias, dtype)
    _code("lora_B_dtype", member.lora_B_dtype)
    numbers = (member.scaling, member.dropout_p, member.seed, member.lora_B_dtype)
    return Linear(weight, lora_A, lora_B, bias, *numbers)


def _mlp_layers(gate: Linear, up: Linear, down: Linear, dtype: str) -> _Layers:
    K = _matrix("weight", gate.weight).shape[1]
    checked = [_checked(gate, K, dtype), _checked(up, K, dtype)]
    wide = len(checked[0].weight)
    _check_shape("up's weight", checked[1].weight, (wide, K), "gate's weight")
    return _Layers([*checked, _checked(down, wide, dtype)])


def _norm_operands(x: np.ndarray, weight: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    x, weight = _rounded_matrix("x", x, dtype), _float64(weight)
    _check_shape("weight", weight, x.shape[1:], "x's columns")
    _check_rounded("weight", weight, dtype)
    return x, weight


def _same_shape(dtype: str, **arrays: np.ndarray) -> list[np.ndarray]:
    found = [_float64(array) for array in arrays.values()]
    for name, array in zip(arrays, found, strict=True):
        _check_shape(name, array, found[0].shape, next(iter(arrays)))
        _check_rounded(name, array, dtype)
    return found


def _rounded_matrix(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    _code("dtype", dtype)
    matrix = _matrix(name, array)
    _check_rounded(name, matrix, dtype)
    return matrix


def _addresses(arrays: Sequence[np.ndarray | None]) -> ctypes.Array:
    """An array of pointers, for a `double *const *`."""
    return (ctypes.c_void_p * len(arrays))(*(_address(array) for array in arrays))


def _word(number: int) -> int:
    """A 64-bit integer without its sign, which is two's complement: the bits of an int64."""
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{number} has more than 64 bits")
    return number % 2**64


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


def _code(name: str, value: str, codes: dict[str, int] = DTYPES) -> int:
    if value not in codes:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(codes)}")
    return codes[value]


def _check(status: int) -> None:
    if status != OK:
        raise RuntimeError(f"lorafa_reference: {library().lorafa_strerror(status).decode()}")
