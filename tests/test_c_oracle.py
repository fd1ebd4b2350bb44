"""The C oracle is right: against exact arithmetic, torch's casts, difference quotients and the sanitizers.

Most cases hold short multiples of a power of two, so that every sum is exact in double in any order: what
comes out is then compared bit for bit. The one bound, for real numbers, is the textbook one on a double sum.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import c_oracle
import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent

# M, N, K, R
SHAPES = [
    pytest.param((0, 5, 7, 3), id="M=0"),
    pytest.param((1, 1, 1, 1), id="ones"),
    pytest.param((6, 4, 9, 1), id="R=1"),
    pytest.param((5, 3, 2, 6), id="R>K"),
    pytest.param((7, 13, 11, 3), id="primes"),
    pytest.param((33, 24, 40, 8), id="larger"),
]
PRECISIONS = [
    pytest.param("fp64", "fp64", id="fp64"),
    pytest.param("fp32", "fp32", id="fp32"),
    pytest.param("bf16", "bf16", id="bf16"),
    pytest.param("bf16", "fp32", id="bf16-fp32-lora_B"),
    pytest.param("fp16", "fp16", id="fp16"),
    pytest.param("fp16", "fp32", id="fp16-fp32-lora_B"),
]
NARROW = ["fp32", "bf16", "fp16"]
INFINITY_PATTERN = {"fp32": 0x7F800000, "bf16": 0x7F80, "fp16": 0x7C00}


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """The same bits, except that one NaN is as good as another."""
    assert got.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.int64), expected[~nan].view(np.int64))


# ---- rounding, from the bit patterns of the formats ----


def from_patterns(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers that have these bits, as float64; those of a format's positive numbers ascend with them."""
    if dtype == "fp16":
        return patterns.astype(np.uint16).view(np.float16).astype(np.float64)
    bits = patterns.astype(np.uint32)
    if dtype == "bf16":
        bits = bits << 16
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bits.view(np.float32).astype(np.float64)


def middles(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """Halfway between these positive numbers and the next ones; exact, float64 having the bits to spare."""
    below, above = from_patterns(patterns, dtype), from_patterns(patterns + 1, dtype)
    # IEEE 754 rounds as if the exponents went on: above the largest number comes the next power of two.
    beyond = {"fp32": 2.0**128, "bf16": 2.0**128, "fp16": 2.0**16}[dtype]
    return (below + np.where(np.isinf(above), beyond, above)) / 2


@functools.cache
def tables(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    patterns = np.arange(INFINITY_PATTERN[dtype])
    return from_patterns(np.append(patterns, INFINITY_PATTERN[dtype]), dtype), middles(patterns, dtype)


def nearest_even(array: np.ndarray, dtype: str) -> np.ndarray:
    """One rounding of any float64, by looking it up among all numbers of the format."""
    if dtype == "fp64":
        return array
    if dtype == "fp32":
        with np.errstate(over="ignore", invalid="ignore"):
            return array.astype(np.float32).astype(np.float64)
    numbers, middle = tables(dtype)
    magnitude = np.abs(array)
    pattern = np.searchsorted(middle, magnitude, side="left")  # how many middles lie below
    tie = np.append(middle, np.nan)[pattern] == magnitude
    pattern = pattern + (tie & (pattern % 2 == 1))
    return np.where(np.isnan(array), np.nan, np.copysign(numbers[pattern], array))


def some_patterns(dtype: str) -> np.ndarray:
    """All positive finite numbers of a 16-bit format; of fp32 the edges and a random sample."""
    end = INFINITY_PATTERN[dtype]
    if dtype != "fp32":
        return np.arange(end)
    normal = 0x00800000
    edges = [np.arange(300), np.arange(normal - 300, normal + 300), np.arange(end - 300, end)]
    return np.concatenate([*edges, np.random.default_rng(0).integers(0, end, 100_000)])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_of_a_format_are_kept_and_those_between_go_to_the_nearest(dtype, sign):
    patterns = some_patterns(dtype)
    below, above = sign * from_patterns(patterns, dtype), sign * from_patterns(patterns + 1, dtype)
    middle = middles(patterns, dtype)
    assert_same(c_oracle.round_to(below, dtype), below)
    assert_same(c_oracle.round_to(sign * middle, dtype), np.where(patterns % 2 == 0, below, above))
    # Off the middle by one unit of float64: any rounding on the way, to float32 say, makes this a tie.
    assert_same(c_oracle.round_to(sign * np.nextafter(middle, 0), dtype), below)
    assert_same(c_oracle.round_to(sign * np.nextafter(middle, np.inf), dtype), above)


@pytest.mark.parametrize("dtype", NARROW)
def test_random_float64_values_round_once(dtype):
    rng = np.random.default_rng(1)
    any_bits = rng.integers(0, 2**64, 100_000, dtype=np.uint64).view(np.float64)
    in_range = np.ldexp(rng.uniform(-2, 2, 100_000), rng.integers(-160, 130, 100_000))
    values = np.concatenate([any_bits, in_range])
    assert_same(c_oracle.round_to(values, dtype), nearest_even(values, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_agrees_with_torch(dtype):
    # From float32, since torch may reach the 16-bit formats from float64 by way of it, which rounds twice.
    bits = np.random.default_rng(2).integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 3.3895314e38, 3.4028235e38, 1e-45]
    )
    values = torch.cat([torch.from_numpy(bits.view(np.float32)), torch.from_numpy(edges).float()])
    if dtype == "fp32":
        values = values.double() * (1 + 2.0**-20 / 3)
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert_same(c_oracle.round_to(values.double().numpy(), dtype), values.to(target).double().numpy())


@pytest.mark.parametrize("dtype", c_oracle.DTYPES)
def test_zeros_infinities_and_nan_are_kept(dtype):
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    assert_same(c_oracle.round_to(special, dtype), special)
    tiny = np.array([5e-324, -5e-324])
    assert_same(c_oracle.round_to(tiny, dtype), tiny if dtype == "fp64" else np.array([0.0, -0.0]))


# ---- forward and backward ----


def multiples(rng: np.random.Generator, limit: int, unit: float, *shape: int) -> np.ndarray:
    return rng.integers(-limit, limit + 1, size=shape) * unit


def exact_layer(M: int, N: int, K: int, R: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([M, N, K, R])
    return {
        "x": multiples(rng, 9, 1.0, M, K),
        "weight": multiples(rng, 20, 1.0, N, K),
        "lora_A": multiples(rng, 2**13, 2.0**-12, R, K),  # 14 bits: neither in bf16 nor in fp16
        "lora_B": multiples(rng, 2**13, 2.0**-12, N, R),
        "bias": multiples(rng, 100, 1.0, N),
        "dy": multiples(rng, 9, 1.0, M, N),
    }


# einsum and not @: a BLAS need not treat 0 · Inf as a plain loop does.
def expected_forward(x, weight, lora_A, lora_B, bias, scaling, dtype):
    A, B = nearest_even(lora_A, dtype), nearest_even(lora_B, dtype)
    with np.errstate(invalid="ignore"):
        z = nearest_even(scaling * np.einsum("mk,rk->mr", x, A), dtype)
        y = np.einsum("mk,nk->mn", x, weight) + np.einsum("mr,nr->mn", z, B) + (0.0 if bias is None else bias)
    return z, nearest_even(y, dtype)


def expected_backward(dy, z, weight, lora_A, lora_B, scaling, dtype, lora_B_dtype):
    A, B = nearest_even(lora_A, dtype), nearest_even(lora_B, dtype)
    with np.errstate(invalid="ignore"):
        dz = nearest_even(scaling * np.einsum("mn,nr->mr", dy, B), dtype)
        dx = np.einsum("mn,nk->mk", dy, weight) + np.einsum("mr,rk->mk", dz, A)
        dB = np.einsum("mn,mr->nr", dy, z)
    return dz, nearest_even(dx, dtype), nearest_even(dB, lora_B_dtype)


def assert_all_same(got: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert_same(g + 0.0, e + 0.0)  # + 0.0: the sign of a sum that is zero depends on its order


@pytest.mark.parametrize("scaling", [1.0, 0.5, -3.0])
@pytest.mark.parametrize(("dtype", "lora_B_dtype"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_sums_are_rounded_once_and_in_the_right_places(shape, dtype, lora_B_dtype, scaling):
    layer = exact_layer(*shape)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    for b in (bias, None):
        z, y = c_oracle.forward(x, weight, lora_A, lora_B, b, scaling, dtype)
        assert_all_same((z, y), expected_forward(x, weight, lora_A, lora_B, b, scaling, dtype))
    arguments = (dy, z, weight, lora_A, lora_B, scaling, dtype, lora_B_dtype)
    assert_all_same(c_oracle.backward(*arguments), expected_backward(*arguments))


def test_a_batch_of_no_rows_gives_a_zero_gradient():
    _, weight, lora_A, lora_B, _, dy = exact_layer(0, 5, 7, 3).values()
    dz, dx, dB = c_oracle.backward(dy, np.empty((0, 3)), weight, lora_A, lora_B, 1.0, "bf16", "fp32")
    assert (dz.shape, dx.shape) == ((0, 3), (0, 7))
    assert_same(dB, np.zeros((5, 3)))


exact = np.vectorize(Fraction, otypes=[object])
magnitude = np.vectorize(abs, otypes=[object])


def gamma(n: int) -> Fraction:
    """Higham's γ_n for double: the relative error that n roundings on the way of a term can add up to."""
    u = Fraction(1, 2**53)
    return n * u / (1 - n * u)


def assert_within(got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert np.all(magnitude(exact(got) - expected) <= bound)


@pytest.mark.parametrize("seed", range(3))
def test_fp64_is_as_close_to_the_exact_result_as_a_double_sum_can_promise(seed):
    M, N, K, R = 7, 5, 11, 3
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    x, weight, lora_A, lora_B = draw((M, K)), draw((N, K)), draw((R, K)), draw((N, R))
    bias, dy, scaling = draw(N), draw((M, N)), 1 / 3
    z, y = c_oracle.forward(x, weight, lora_A, lora_B, bias, scaling, "fp64")
    dz, dx, dB = c_oracle.backward(dy, z, weight, lora_A, lora_B, scaling, "fp64", "fp64")

    X, W, A, B, b, dY, Z = map(exact, (x, weight, lora_A, lora_B, bias, dy, z))
    s = Fraction(scaling)
    aX, aW, aA, aB, ab, adY, aZ = map(magnitude, (X, W, A, B, b, dY, Z))

    # Roundings a term meets: its product, each addition, s; for y and dx those of z and dz come first.
    assert_within(z, s * (X @ A.T), gamma(K + 1) * (s * (aX @ aA.T)))
    y_exact = X @ W.T + s * (X @ A.T) @ B.T + b
    assert_within(y, y_exact, gamma(K + R + 3) * (aX @ aW.T + s * (aX @ aA.T) @ aB.T + ab))
    assert_within(dz, s * (dY @ B), gamma(N + 1) * (s * (adY @ aB)))
    dx_exact = dY @ W + s * (dY @ B) @ A
    assert_within(dx, dx_exact, gamma(N + R + 2) * (adY @ aW + s * (adY @ aB) @ aA))
    assert_within(dB, dY.T @ Z, gamma(M) * (adY.T @ aZ))


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (2, 3, 1, 4), (1, 1, 1, 1)], ids=["R=2", "R>K", "ones"])
def test_backward_is_the_difference_quotient_of_forward(shape):
    layer = exact_layer(*shape)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    scaling = 0.5

    def loss(x, lora_B):
        return np.sum(dy * c_oracle.forward(x, weight, lora_A, lora_B, bias, scaling, "fp64")[1])

    def quotient(of, at):
        gradient = np.empty_like(at)
        for i in np.ndindex(at.shape):
            step = np.zeros_like(at)
            step[i] = 1.0
            gradient[i] = (of(at + step) - of(at - step)) / 2
        return gradient

    z, _ = c_oracle.forward(x, weight, lora_A, lora_B, bias, scaling, "fp64")
    _, dx, dB = c_oracle.backward(dy, z, weight, lora_A, lora_B, scaling, "fp64", "fp64")
    # The loss is linear in each of the two, so the quotient is the gradient, whatever the step.
    np.testing.assert_array_equal(dx, quotient(lambda v: loss(v, lora_B), x))
    np.testing.assert_array_equal(dB, quotient(lambda v: loss(x, v), lora_B))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", c_oracle.DTYPES)
def test_nan_and_inf_in_x_and_dy_spread_as_in_the_formula(dtype, value):
    layer = exact_layer(7, 13, 11, 3)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    weight[4, 2] = 0.0  # 0 · Inf is NaN too
    clean_z, clean_y = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, dtype)
    clean_dz, clean_dx, _ = c_oracle.backward(dy, clean_z, weight, lora_A, lora_B, 0.5, dtype, dtype)
    x[3, 2] = dy[5, 4] = value

    z, y = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, dtype)
    assert_all_same((z, y), expected_forward(x, weight, lora_A, lora_B, bias, 0.5, dtype))
    assert not np.isfinite(z[3]).any() and not np.isfinite(y[3]).any() and np.isnan(y[3, 4])
    others = np.arange(7) != 3
    assert_all_same((z[others], y[others]), (clean_z[others], clean_y[others]))

    arguments = (dy, clean_z, weight, lora_A, lora_B, 0.5, dtype, dtype)
    dz, dx, dB = c_oracle.backward(*arguments)
    assert_all_same((dz, dx, dB), expected_backward(*arguments))
    assert not np.isfinite(dz[5]).any() and not np.isfinite(dx[5]).any() and not np.isfinite(dB[4]).any()
    others = np.arange(7) != 5
    assert_all_same((dz[others], dx[others]), (clean_dz[others], clean_dx[others]))


def test_strided_arrays_are_read_by_index():
    layer = exact_layer(7, 13, 11, 3)
    strided = [np.asfortranarray(a) if a.ndim == 2 else np.repeat(a, 2)[::2] for a in layer.values()]
    x, weight, lora_A, lora_B, bias, dy = strided
    z, y = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, "fp32")
    assert_all_same((z, y), expected_forward(x, weight, lora_A, lora_B, bias, 0.5, "fp32"))
    arguments = (dy, np.asfortranarray(z), weight, lora_A, lora_B, 0.5, "fp32", "fp32")
    assert_all_same(c_oracle.backward(*arguments), expected_backward(*arguments))


# ---- errors ----


WRONG_FORWARD = {
    "x": (np.zeros(4), r"x has shape \(4,\), expected two dimensions"),
    "weight": (np.zeros((3, 5)), r"weight has shape \(3, 5\), expected \(3, 4\)"),
    "lora_A": (np.zeros((2, 5)), r"lora_A has shape \(2, 5\), expected \(2, 4\)"),
    "lora_B": (np.zeros((3, 1)), r"lora_B has shape \(3, 1\), expected \(3, 2\)"),
    "bias": (np.zeros((3, 1)), r"bias has shape \(3, 1\), expected \(3,\)"),
    "dtype": ("float32", "dtype is 'float32', expected one of fp64, fp32, bf16, fp16"),
}
WRONG_BACKWARD = {
    "dy": (np.zeros((6, 2)), r"dy has shape \(6, 2\), expected \(6, 3\)"),
    "z": (np.zeros((5, 2)), r"z has shape \(5, 2\), expected \(6, 2\)"),
    "weight": (np.zeros((3, 4, 1)), r"weight has shape \(3, 4, 1\), expected two dimensions"),
    "lora_A": (np.zeros((2, 5)), r"lora_A has shape \(2, 5\), expected \(2, 4\)"),
    "lora_B": (np.zeros((2, 3)), r"lora_B has shape \(2, 3\), expected \(3, 2\)"),
    "lora_B_dtype": ("bfloat16", "lora_B_dtype is 'bfloat16', expected one of"),
}


def forward_arguments() -> dict:
    x, weight, lora_A, lora_B, bias, _ = exact_layer(6, 3, 4, 2).values()
    return dict(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, bias=bias, scaling=1.0, dtype="bf16")


def backward_arguments() -> dict:
    _, weight, lora_A, lora_B, _, dy = exact_layer(6, 3, 4, 2).values()
    z = np.ones((6, 2))
    return dict(
        dy=dy,
        z=z,
        weight=weight,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=1.0,
        dtype="bf16",
        lora_B_dtype="fp32",
    )


@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_forward_names_the_argument_that_does_not_fit(name):
    value, message = WRONG_FORWARD[name]
    with pytest.raises(ValueError, match=message):
        c_oracle.forward(**forward_arguments() | {name: value})


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_backward_names_the_argument_that_does_not_fit(name):
    value, message = WRONG_BACKWARD[name]
    with pytest.raises(ValueError, match=message):
        c_oracle.backward(**backward_arguments() | {name: value})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_forward_refuses_an_input_that_was_not_rounded(name):
    arguments = forward_arguments()
    with pytest.raises(ValueError, match=f"{name} holds values that bf16 has not"):
        c_oracle.forward(**arguments | {name: arguments[name] + 2.0**-12})


@pytest.mark.parametrize("name", ["dy", "z", "weight"])
def test_backward_refuses_an_input_that_was_not_rounded(name):
    arguments = backward_arguments()
    with pytest.raises(ValueError, match=f"{name} holds values that bf16 has not"):
        c_oracle.backward(**arguments | {name: arguments[name] + 2.0**-12})


def test_complex_input_is_refused():
    with pytest.raises(TypeError):
        c_oracle.round_to(np.array([1j]), "fp32")


BUFFER = np.zeros(64)
ADDRESS = BUFFER.ctypes.data
FORWARD = [2, 3, 4, 1, *[ADDRESS] * 4, None, 1.0, 1, *[ADDRESS] * 2]
BACKWARD = [2, 3, 4, 1, *[ADDRESS] * 5, 1.0, 1, 1, *[ADDRESS] * 3]
ROUND_ARRAY = [1, ADDRESS, 1, ADDRESS]


@pytest.mark.parametrize(
    ("function", "arguments", "changed", "status"),
    [
        *[("lorafa_forward", FORWARD, {i: -1}, c_oracle.ERROR_SIZE) for i in range(4)],
        *[("lorafa_forward", FORWARD, {i: None}, c_oracle.ERROR_NULL) for i in range(4, 8)],
        *[("lorafa_backward", BACKWARD, {i: -1}, c_oracle.ERROR_SIZE) for i in range(4)],
        *[("lorafa_backward", BACKWARD, {i: None}, c_oracle.ERROR_NULL) for i in range(4, 9)],
        ("lorafa_forward", FORWARD, {0: 2**60}, c_oracle.ERROR_SIZE),
        ("lorafa_forward", FORWARD, {10: 4}, c_oracle.ERROR_DTYPE),
        ("lorafa_forward", FORWARD, {10: -1}, c_oracle.ERROR_DTYPE),
        ("lorafa_backward", BACKWARD, {10: 4}, c_oracle.ERROR_DTYPE),
        ("lorafa_backward", BACKWARD, {11: 4}, c_oracle.ERROR_DTYPE),
        # M = N = 0 and 2^53 bytes of lora_A: more than any address space has.
        ("lorafa_forward", FORWARD, {0: 0, 1: 0, 2: 2**50}, c_oracle.ERROR_MEMORY),
        ("lorafa_backward", BACKWARD, {0: 0, 1: 0, 2: 2**50}, c_oracle.ERROR_MEMORY),
        ("lorafa_round_array", ROUND_ARRAY, {0: -1}, c_oracle.ERROR_SIZE),
        ("lorafa_round_array", ROUND_ARRAY, {1: None}, c_oracle.ERROR_NULL),
        ("lorafa_round_array", ROUND_ARRAY, {2: 4}, c_oracle.ERROR_DTYPE),
        ("lorafa_round_array", ROUND_ARRAY, {3: None}, c_oracle.ERROR_NULL),
    ],
)
def test_impossible_arguments_return_an_error_and_write_nothing(function, arguments, changed, status):
    BUFFER[:] = 7.0
    call = [changed.get(i, argument) for i, argument in enumerate(arguments)]
    assert getattr(c_oracle.library(), function)(*call) == status
    assert (BUFFER == 7.0).all()


def test_every_status_has_its_own_words():
    words = [c_oracle.library().lorafa_strerror(s) for s in range(-1, c_oracle.ERROR_MEMORY + 2)]
    assert words[0] == words[-1] == b"unknown status"
    assert len(set(words)) == len(words) - 1


# ---- the build ----


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy without anything built, so that a test never disturbs the library in use."""
    ignore = shutil.ignore_patterns("*.so", "*.o", "test_lorafa_reference", "test_lorafa_reference_sanitized")
    return Path(shutil.copytree(c_oracle.SOURCE_DIR, tmp_path / "csrc_reference", ignore=ignore))


@pytest.mark.parametrize("name", c_oracle.SOURCE_NAMES)
def test_the_library_is_made_again_when_a_source_is_newer_and_only_then(sources, name):
    library = c_oracle.build(sources)
    long_ago = library.stat().st_mtime_ns - 10**12
    for path in (*(sources / source for source in c_oracle.SOURCE_NAMES), library):
        os.utime(path, ns=(long_ago, long_ago))
    c_oracle.build(sources)
    assert library.stat().st_mtime_ns == long_ago
    (sources / name).touch()
    c_oracle.build(sources)
    assert library.stat().st_mtime_ns > long_ago


def test_a_source_that_does_not_compile_says_so(sources):
    (sources / "lorafa_reference.c").write_text("this is not C\n")
    with pytest.raises(RuntimeError, match=r"(?s)make .* failed:.*lorafa_reference\.c"):
        c_oracle.build(sources)
    assert not (sources / c_oracle.LIBRARY_NAME).exists()


def test_processes_that_build_at_once_share_one_build(sources, tmp_path):
    log, compiler = tmp_path / "log", tmp_path / "slow-cc"
    compiler.write_text(f'#!/bin/sh\necho called >> "{log}"\nsleep 1\nexec cc "$@"\n')
    compiler.chmod(0o755)
    program = (
        "import c_oracle, ctypes, pathlib, sys; ctypes.CDLL(str(c_oracle.build(pathlib.Path(sys.argv[1]))))"
    )
    # MAKEFLAGS would carry a CC given to the make that runs these tests, and it would win.
    environment = os.environ | {"CC": str(compiler), "MAKEFLAGS": "", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", program, str(sources)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0, 0]
    assert log.read_text().splitlines() == ["called"]


def make(directory: Path, target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(directory), target], capture_output=True, text=True)


@pytest.fixture
def sanitizers(tmp_path: Path) -> None:
    (tmp_path / "probe.c").write_text("int main(void) { return 0; }\n")
    compiler = os.environ.get("CC", "cc")
    command = f"{compiler} -fsanitize=address,undefined probe.c -o probe && ./probe"
    if subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} cannot build or run a program with -fsanitize=address,undefined")


def test_the_c_tests_pass_under_the_sanitizers(sources, sanitizers):
    done = make(sources, "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr


def break_source(sources: Path, right: str, wrong: str) -> None:
    source = sources / "lorafa_reference.c"
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))


def test_the_c_tests_notice_a_wrong_number(sources):
    break_source(sources, "sum += bias[n]", "sum -= bias[n]")
    done = make(sources, "test")
    assert done.returncode != 0
    assert "y[0] is" in done.stdout


def test_the_sanitizers_notice_a_read_out_of_bounds(sources, sanitizers):
    break_source(sources, "sum += bias[n]", "sum += bias[n] + 0 * bias[N]")
    done = make(sources, "sanitize")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def test_the_python_side_of_the_oracle_does_not_need_torch():
    program = "import sys; sys.modules['torch'] = None; import c_oracle; c_oracle.library()"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
