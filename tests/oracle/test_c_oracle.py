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
import torch.nn.functional as F
from c_oracle import Linear

pytestmark = pytest.mark.numerics
HERE = Path(__file__).resolve().parents[1]

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


# ---- dropout ----


def plain_philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 as its paper draws it: (4, count) words of the counters, the key being the seed.

    Two multiplications by odd constants a round, their halves swapped and mixed with key and counter.
    """
    left, right = counter[[0, 2]].astype(np.uint64), counter[[1, 3]].astype(np.uint64)
    multiplier = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    for i in range(10):
        key = [[(seed + i * 0x9E3779B9) % 2**32], [((seed >> 32) + i * 0xBB67AE85) % 2**32]]
        product = multiplier * left
        left = (product >> np.uint64(32))[::-1] ^ right ^ np.array(key, dtype=np.uint64)
        right = (product & low)[::-1]
    return np.stack([left[0], right[0], left[1], right[1]])


def plain_keep(seed: int, p: float, M: int, K: int, row0: int = 0) -> np.ndarray:
    seed %= 2**64
    threshold = min(round(p * 2**32), 2**32 - 1)
    calls = [(row * -(-K // 4) + column // 4) % 2**64 for row in range(row0, row0 + M) for column in range(K)]
    counter = np.array([[c % 2**32, c >> 32, 0, 0] for c in calls], dtype=np.uint64).reshape(-1, 4).T
    words = plain_philox(counter, seed)
    return words[np.arange(M * K) % K % 4, np.arange(M * K)].reshape(M, K) >= threshold


KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "digits-of-pi"])
def test_philox_gives_the_published_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert c_oracle.philox(counter, key) == words
    seed = key[0] + (key[1] << 32)
    assert plain_philox(np.array(counter, dtype=np.uint64)[:, None], seed)[:, 0].tolist() == words


SEEDS = [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (5, 7), (2, 130)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_mask_is_what_a_second_writing_of_it_gives(shape, seed):
    for p in (0.0, 0.1, 0.5, 0.999):
        np.testing.assert_array_equal(c_oracle.keep_mask(seed, p, *shape), plain_keep(seed, p, *shape))


@pytest.mark.parametrize("K", [1, 4, 5, 1023])
@pytest.mark.parametrize("row0", [2**31, 2**32 - 1, 2**33 + 5, 2**62 - 1, 2**63 + 3])
def test_the_counter_has_64_bits(row0, K):
    """Rows whose counter passes 2³², and, at the end, 2⁶⁴."""
    mask = c_oracle.keep_mask(7, 0.4, 3, K, row0)
    np.testing.assert_array_equal(mask, plain_keep(7, 0.4, 3, K, row0))
    if row0 + 1 < 2**63:
        np.testing.assert_array_equal(mask[1:], c_oracle.keep_mask(7, 0.4, 2, K, row0 + 1))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    whole = c_oracle.keep_mask(-3, 0.3, 9, 21)
    for row in range(9):
        np.testing.assert_array_equal(c_oracle.keep_mask(-3, 0.3, 1, 21, row)[0], whole[row])


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        *[(0.0, 0), (2.0**-34, 0), (2.0**-33, 0), (3 * 2.0**-33, 2)],
        *[(0.1, 429496730), (0.5, 2**31), (1 - 2.0**-32, 2**32 - 1), (1 - 2.0**-53, 2**32 - 1)],
    ],
)
def test_the_threshold_is_rounded_and_stays_below_two_to_the_32(p, threshold):
    assert c_oracle.library().lorafa_threshold(p) == threshold == min(round(p * 2**32), 2**32 - 1)
    # The word at the threshold is kept, the one below is not.
    word = c_oracle.philox([0, 0, 0, 0], [0, 0])[0]
    assert [c_oracle.library().lorafa_keep(0, 0, 0, 1, word + i) for i in (0, 1)] == [1, 0]


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
def expected_forward(x, weight, lora_A, lora_B, bias, scaling, dtype, p=0.0, seed=0):
    A, B = nearest_even(lora_A, dtype), nearest_even(lora_B, dtype)
    keep = plain_keep(seed, p, *x.shape).astype(float)
    with np.errstate(invalid="ignore"):
        z = nearest_even(scaling / (1 - p) * np.einsum("mk,rk->mr", x * keep, A), dtype)
        y = np.einsum("mk,nk->mn", x, weight) + np.einsum("mr,nr->mn", z, B) + (0.0 if bias is None else bias)
    return z, nearest_even(y, dtype)


def expected_backward(dy, z, weight, lora_A, lora_B, scaling, dtype, lora_B_dtype, p=0.0, seed=0):
    A, B = nearest_even(lora_A, dtype), nearest_even(lora_B, dtype)
    keep = plain_keep(seed, p, len(dy), A.shape[1]).astype(float)
    with np.errstate(invalid="ignore"):
        dz = nearest_even(scaling * np.einsum("mn,nr->mr", dy, B), dtype)
        dx = np.einsum("mn,nk->mk", dy, weight) + keep / (1 - p) * np.einsum("mr,rk->mk", dz, A)
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


@pytest.mark.parametrize("p", [0.5, 0.75])  # 1/(1 − p) is a power of two, so that sums stay exact
@pytest.mark.parametrize(("dtype", "lora_B_dtype"), PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_masks_the_input_of_lora_A_and_its_gradient(shape, dtype, lora_B_dtype, p):
    layer = exact_layer(*shape)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    seed = -(2**40) - 3
    z, y = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, dtype, p, seed)
    assert_all_same((z, y), expected_forward(x, weight, lora_A, lora_B, bias, 0.5, dtype, p, seed))
    arguments = (dy, z, weight, lora_A, lora_B, 0.5, dtype, lora_B_dtype, p, seed)
    assert_all_same(c_oracle.backward(*arguments), expected_backward(*arguments))
    if x.size > 20:
        plain = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, dtype)[0]
        assert not np.array_equal(plain, z)


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


@pytest.mark.parametrize("dropout", [(), (0.5, 11)], ids=["", "dropout"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (2, 3, 1, 4), (1, 1, 1, 1)], ids=["R=2", "R>K", "ones"])
def test_backward_is_the_difference_quotient_of_forward(shape, dropout):
    layer = exact_layer(*shape)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    scaling = 0.5

    def loss(x, lora_B):
        return np.sum(dy * c_oracle.forward(x, weight, lora_A, lora_B, bias, scaling, "fp64", *dropout)[1])

    def quotient(of, at):
        gradient = np.empty_like(at)
        for i in np.ndindex(at.shape):
            step = np.zeros_like(at)
            step[i] = 1.0
            gradient[i] = (of(at + step) - of(at - step)) / 2
        return gradient

    z, _ = c_oracle.forward(x, weight, lora_A, lora_B, bias, scaling, "fp64", *dropout)
    _, dx, dB = c_oracle.backward(dy, z, weight, lora_A, lora_B, scaling, "fp64", "fp64", *dropout)
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


@pytest.mark.parametrize("dtype", c_oracle.DTYPES)
def test_nan_and_inf_spread_from_dropped_elements_too(dtype):
    layer = exact_layer(7, 13, 11, 3)
    x, weight, lora_A, lora_B, bias, dy = layer.values()
    keep = c_oracle.keep_mask(1, 0.5, 7, 11)
    row, column = np.argwhere(~keep)[0]
    x[row, column], dy[row, 4] = np.nan, np.inf
    z, y = c_oracle.forward(x, weight, lora_A, lora_B, bias, 0.5, dtype, 0.5, 1)
    assert np.isnan(z[row]).all() and np.isnan(y[row]).all()
    clean_z = np.zeros_like(z)
    arguments = (dy, clean_z, weight, lora_A, lora_B, 0.5, dtype, dtype, 0.5, 1)
    _, dx, _ = c_oracle.backward(*arguments)
    assert not np.isfinite(dx[row]).any()
    assert_same(dx + 0.0, expected_backward(*arguments)[1] + 0.0)


# ---- groups ----


def exact_member(rng, N: int, K: int, R: int, **rest) -> Linear:
    layer = Linear(multiples(rng, 20, 1.0, N, K), bias=multiples(rng, 100, 1.0, N), **rest)
    if R:
        layer.lora_A = multiples(rng, 2**13, 2.0**-12, R, K)
        layer.lora_B = multiples(rng, 2**13, 2.0**-12, N, R)
    return layer


def exact_group(name: str, dtype: str, lora_B_dtype: str) -> tuple[list[Linear], np.ndarray, list, bool]:
    """Members, x, their dy, and whether they share lora_A."""
    rng = np.random.default_rng(len(name))
    M, K = 6, 11
    drop = dict(scaling=0.5, dropout_p=0.5, seed=5)
    ranks_and_rest = {
        "one": [(3, {})],
        "no adapter": [(0, {}), (0, {})],
        "mixed": [(3, dict(scaling=-2.0)), (0, {}), (1, dict(scaling=0.5))],
        "masks": [(3, drop), (2, drop | dict(seed=-6)), (0, {}), (4, drop | dict(dropout_p=0.0))],
        "shared": [(3, dict(scaling=0.5)), (3, dict(scaling=0.5)), (0, {})],
        "shared mask": [(3, drop), (0, {}), (3, drop)],
    }[name]
    widths = [5, 1, 7, 4]
    members = [
        exact_member(rng, N, K, R, lora_B_dtype=lora_B_dtype, **rest)
        for N, (R, rest) in zip(widths, ranks_and_rest, strict=False)
    ]
    share_A = name.startswith("shared")
    if share_A:
        for member in members:
            member.lora_A = members[0].lora_A if member.rank else None
    dys = [multiples(rng, 9, 1.0, M, len(member.weight)) for member in members]
    return members, multiples(rng, 9, 1.0, M, K), dys, share_A


def expected_group_backward(dys, zs, members, dtype, share_A):
    """Every intermediate is exact, so that the sum over members may be taken in any order."""
    M, K = len(zs[0]), members[0].weight.shape[1]
    dzs, dx = [], np.zeros((M, K))
    for dy, member in zip(dys, members, strict=True):
        dx = dx + (0.0 if dy is None else dy @ member.weight)
    for i, maker in enumerate(members[:1] if share_A else members):
        dz = np.zeros((M, maker.rank))
        for dy, member in zip(dys, members, strict=True) if share_A else [(dys[i], maker)]:
            if dy is not None and member.rank:
                dz = dz + dy @ nearest_even(member.lora_B, dtype)
        dz = nearest_even(maker.scaling * dz, dtype)
        if maker.rank:
            keep = plain_keep(maker.seed, maker.dropout_p, M, K)
            dx = dx + keep / (1 - maker.dropout_p) * (dz @ nearest_even(maker.lora_A, dtype))
        dzs.append(dz)
    dBs = []
    for i, (dy, member) in enumerate(zip(dys, members, strict=True)):
        z = zs[0 if share_A else i][:, : member.rank]
        dB = np.zeros((len(member.weight), member.rank)) if dy is None else dy.T @ z
        dBs.append(nearest_even(dB, member.lora_B_dtype))
    return dzs, nearest_even(dx, dtype), dBs


GROUPS = ["one", "no adapter", "mixed", "masks", "shared", "shared mask"]


@pytest.mark.parametrize(("dtype", "lora_B_dtype"), PRECISIONS)
@pytest.mark.parametrize("name", GROUPS)
def test_members_of_a_group_give_what_they_give_alone_and_one_dx(name, dtype, lora_B_dtype):
    members, x, dys, share_A = exact_group(name, dtype, lora_B_dtype)
    zs, ys = c_oracle.group_forward(x, members, dtype, share_A)
    for i, member in enumerate(members):
        no_A, no_B = np.zeros((0, x.shape[1])), np.zeros((len(member.weight), 0))
        A, B = (member.lora_A, member.lora_B) if member.rank else (no_A, no_B)
        rest = (member.bias, member.scaling, dtype, member.dropout_p, member.seed)
        z, y = c_oracle.forward(x, member.weight, A, B, *rest)
        assert_same(ys[i], y)
        assert_same(zs[0 if share_A else i][:, : member.rank], z)
    assert len(zs) == (1 if share_A else len(members))

    for used in (dys, [*dys[:-1], None]):
        got = c_oracle.group_backward(used, zs, members, dtype, share_A)
        expected = expected_group_backward(used, zs, members, dtype, share_A)
        assert_all_same(got[0], expected[0])
        assert_all_same(got[1:2], expected[1:2])
        assert_all_same(got[2], expected[2])


def test_a_group_of_one_is_the_layer():
    (member,), x, (dy,), _ = exact_group("one", "bf16", "fp32")
    operands = (member.weight, member.lora_A, member.lora_B)
    z, y = c_oracle.forward(x, *operands, member.bias, 1.0, "bf16")
    dz, dx, dB = c_oracle.backward(dy, z, *operands, 1.0, "bf16", "fp32")
    for share_A in (False, True):
        (got_z,), (got_y,) = c_oracle.group_forward(x, [member], "bf16", share_A)
        assert_all_same((got_z, got_y), (z, y))
        (got_dz,), got_dx, (got_dB,) = c_oracle.group_backward([dy], [z], [member], "bf16", share_A)
        assert_all_same((got_dz, got_dx, got_dB), (dz, dx, dB))


def assert_near(got: np.ndarray, exact: torch.Tensor, roundings: int) -> None:
    """As near as a double result is after so many roundings in a row, in the norm."""
    exact = exact.detach().numpy()
    assert got.shape == exact.shape
    assert np.linalg.norm(got - exact) <= roundings * 2.0**-53 * np.linalg.norm(exact)


def normal_member(rng, N: int, K: int, R: int, **rest) -> Linear:
    def draw(*shape):
        return rng.standard_normal(shape) / max(shape[-1], 1) ** 0.5

    layer = Linear(draw(N, K), bias=rng.standard_normal(N), **rest)
    if R:
        layer.lora_A, layer.lora_B = draw(R, K), draw(N, R)
    return layer


def torch_linear(x: torch.Tensor, layer: Linear, lora_B: torch.Tensor | None) -> torch.Tensor:
    """The formula that people write, in float64, with the mask of the oracle."""
    y = F.linear(x, torch.tensor(layer.weight), torch.tensor(layer.bias))
    if lora_B is None:
        return y
    keep = torch.tensor(c_oracle.keep_mask(layer.seed, layer.dropout_p, *x.shape))
    low_rank = F.linear(x * keep / (1 - layer.dropout_p), torch.tensor(layer.lora_A))
    return y + layer.scaling * F.linear(low_rank, lora_B)


def parameters(layers: list[Linear]) -> list[torch.Tensor | None]:
    return [torch.tensor(layer.lora_B, requires_grad=True) if layer.rank else None for layer in layers]


@pytest.mark.parametrize("share_A", [False, True])
def test_a_group_has_the_derivatives_of_the_formula(share_A):
    rng = np.random.default_rng(3)
    M, K, R = 9, 17, 4
    drop = dict(scaling=0.7, dropout_p=0.3, seed=41)
    members = [
        normal_member(rng, 12, K, R, **drop),
        normal_member(rng, 5, K, 0),
        normal_member(rng, 8, K, R, **drop | ({} if share_A else dict(seed=42))),
    ]
    if share_A:
        members[2].lora_A = members[0].lora_A
    x = torch.tensor(rng.standard_normal((M, K)), requires_grad=True)
    lora_Bs = parameters(members)
    ys = [torch_linear(x, member, lora_B) for member, lora_B in zip(members, lora_Bs, strict=True)]
    dys = [rng.standard_normal(y.shape) for y in ys]
    wanted = [x, *(lora_B for lora_B in lora_Bs if lora_B is not None)]
    dx, *dBs = torch.autograd.grad(ys, wanted, [torch.tensor(dy) for dy in dys])

    zs, got_ys = c_oracle.group_forward(x.detach().numpy(), members, "fp64", share_A)
    _, got_dx, got_dBs = c_oracle.group_backward(dys, zs, members, "fp64", share_A)
    for got, y in zip(got_ys, ys, strict=True):
        assert_near(got, y, K + R + 3)
    assert_near(got_dx, dx, sum(len(member.weight) for member in members) + R + 3)
    for got, dB in zip([got_dBs[0], got_dBs[2]], dBs, strict=True):
        assert_near(got, dB, M + K + 3)


# ---- the gated MLP ----


TORCH_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
activations = pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)


@activations
def test_activations_and_their_derivatives_are_torchs(activation):
    g = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -1e-9, 1e-9, -300, 300])]).double()
    g.requires_grad_()
    value = TORCH_ACTIVATIONS[activation](g)
    (slope,) = torch.autograd.grad(value.sum(), g)
    got = np.array([c_oracle.activate(activation, v) for v in g.tolist()])
    # Both take differences of numbers near 1; a millionth of what fp32 could tell is far enough.
    size = 1e-6 * 2.0**-24 * np.maximum(1, np.abs(g.detach().numpy()))
    assert (np.abs(got[:, 0] - value.detach().numpy()) <= size).all()
    assert (np.abs(got[:, 1] - slope.numpy()) <= size).all()


@activations
@pytest.mark.parametrize("dtype", c_oracle.DTYPES)
def test_the_activated_product_is_rounded_once_each_way(activation, dtype):
    rng = np.random.default_rng(4)
    dh, g, u = (nearest_even(3 * rng.standard_normal((13, 7)), dtype) for _ in range(3))
    value, slope = np.vectorize(lambda v: c_oracle.activate(activation, v))(g)
    assert_same(c_oracle.gated_product(g, u, activation, dtype), nearest_even(value * u, dtype))
    dg, du = c_oracle.gated_product_backward(dh, g, u, activation, dtype)
    assert_same(dg, nearest_even(dh * u * slope, dtype))
    assert_same(du, nearest_even(dh * value, dtype))


def normal_mlp(dtype: str = "fp64", dropout_p: float = 0.0) -> tuple[np.ndarray, list[Linear], np.ndarray]:
    """x (M, K), the layers gate, up and down, and dy (M, N), rounded to `dtype` but for lora_A and lora_B."""
    rng = np.random.default_rng(5)
    M, K, wide, N = 9, 15, 22, 12
    layers = [
        normal_member(rng, wide, K, 4, scaling=0.7, dropout_p=dropout_p, seed=1),
        normal_member(rng, wide, K, 0),
        normal_member(rng, N, wide, 3, scaling=1.5, dropout_p=dropout_p, seed=-2),
    ]
    for layer in layers:
        layer.weight, layer.bias = nearest_even(layer.weight, dtype), nearest_even(layer.bias, dtype)
    x, dy = (nearest_even(rng.standard_normal(shape), dtype) for shape in ((M, K), (M, N)))
    return x, layers, dy


@activations
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_mlp_has_the_derivatives_of_the_formula(activation, dropout_p):
    x_array, layers, dy = normal_mlp(dropout_p=dropout_p)
    x = torch.tensor(x_array, requires_grad=True)
    lora_Bs = parameters(layers)
    g, u = (torch_linear(x, layers[i], lora_Bs[i]) for i in (0, 1))
    h = TORCH_ACTIVATIONS[activation](g) * u
    y = torch_linear(h, layers[2], lora_Bs[2])
    dx, dB_gate, dB_down, dh, dg, du = torch.autograd.grad(
        y, (x, lora_Bs[0], lora_Bs[2], h, g, u), torch.tensor(dy)
    )

    kept = c_oracle.mlp_forward(x_array, *layers, activation, "fp64")
    got = c_oracle.mlp_backward(dy, kept, *layers, activation, "fp64")
    roundings = 100  # of the longest path, dx: sums of 12 + 3, 22 + 4 and 22 terms, activations beside them
    for found, exact in (
        *((kept.g, g), (kept.u, u), (kept.h, h), (kept.y, y)),
        *((got.dh, dh), (got.dg, dg), (got.du, du), (got.dx, dx)),
        *((got.dBs[0], dB_gate), (got.dBs[2], dB_down)),
    ):
        assert_near(found, exact, roundings)
    assert got.dBs[1].shape == (22, 0)


@activations
@pytest.mark.parametrize("dtype", NARROW)
def test_the_mlp_rounds_what_lies_between_its_parts(activation, dtype):
    x, (gate, up, down), dy = normal_mlp(dtype, 0.25)
    kept = c_oracle.mlp_forward(x, gate, up, down, activation, dtype)
    zs, (g, u) = c_oracle.group_forward(x, [gate, up], dtype)
    h = c_oracle.gated_product(g, u, activation, dtype)
    (z,), (y,) = c_oracle.group_forward(h, [down], dtype)
    assert_all_same([*kept.zs, *kept[1:]], (*zs, z, g, u, h, y))

    got = c_oracle.mlp_backward(dy, kept, gate, up, down, activation, dtype)
    _, dh, (dB,) = c_oracle.group_backward([dy], [z], [down], dtype)
    dg, du = c_oracle.gated_product_backward(dh, g, u, activation, dtype)
    _, dx, dBs = c_oracle.group_backward([dg, du], zs, [gate, up], dtype)
    assert_all_same([*got[:4], *got.dBs], (dh, dg, du, dx, *dBs, dB))


# ---- RMS norm ----


NORM_SHAPES = [
    pytest.param(shape, id=f"{shape[0]}x{shape[1]}") for shape in [(5, 19), (1, 1), (3, 64), (0, 4)]
]


@pytest.mark.parametrize("form", c_oracle.NORM_FORMS)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_the_norm_and_its_derivative_are_those_of_the_formula(shape, form):
    rng = np.random.default_rng(6)
    x = torch.tensor(rng.standard_normal(shape), requires_grad=True)
    weight, dy = rng.standard_normal(shape[1]), rng.standard_normal(shape)
    factor = torch.tensor(weight) + (1 if form == "gemma" else 0)
    y = F.rms_norm(x, shape[1:], eps=1e-3) * factor
    (dx,) = torch.autograd.grad(y, x, torch.tensor(dy))
    assert_near(c_oracle.rms_norm(x.detach().numpy(), weight, 1e-3, form, "fp64"), y, shape[1] + 5)
    got = c_oracle.rms_norm_backward(dy, x.detach().numpy(), weight, 1e-3, form, "fp64")
    # dx is a difference; where K is 1 it is a small one, of (1 − n²) dn.
    size = 2.0**-53 * (2 * shape[1] + 10) * np.linalg.norm(dy * factor.numpy()) / 1e-3**0.5
    assert np.linalg.norm(got - dx.numpy()) <= size


@pytest.mark.parametrize("dtype", NARROW)
def test_llamas_norm_rounds_twice_and_gemmas_once(dtype):
    rng = np.random.default_rng(7)
    x, dy = (nearest_even(rng.standard_normal((9, 33)), dtype) for _ in range(2))
    weight = nearest_even(rng.standard_normal(33), dtype)
    n = c_oracle.rms_norm(x, np.ones(33), 1e-5, "llama", "fp64")
    assert_same(
        c_oracle.rms_norm(x, weight, 1e-5, "llama", dtype),
        nearest_even(weight * nearest_even(n, dtype), dtype),
    )
    assert_same(c_oracle.rms_norm(x, weight, 1e-5, "gemma", dtype), nearest_even((1 + weight) * n, dtype))
    for form in c_oracle.NORM_FORMS:
        exact = c_oracle.rms_norm_backward(dy, x, weight, 1e-5, form, "fp64")
        assert_same(c_oracle.rms_norm_backward(dy, x, weight, 1e-5, form, dtype), nearest_even(exact, dtype))


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


def group_arguments() -> dict:
    members, x, _, _ = exact_group("mixed", "bf16", "fp32")
    return dict(x=x, members=members, dtype="bf16")


WRONG_MEMBER = {
    "weight": (np.zeros((5, 3)), r"weight has shape \(5, 3\), expected \(5, 11\)"),
    "lora_A": (np.zeros((3, 5)), r"lora_A has shape \(3, 5\), expected \(3, 11\)"),
    "lora_B": (np.zeros((4, 3)), r"lora_B has shape \(4, 3\), expected \(5, 3\)"),
    "bias": (np.zeros(4), r"bias has shape \(4,\), expected \(5,\)"),
    "lora_B_dtype": ("float32", "lora_B_dtype is 'float32'"),
    "seed": (2**64, "18446744073709551616 has more than 64 bits"),
}


@pytest.mark.parametrize("name", WRONG_MEMBER)
def test_a_group_names_the_operand_that_does_not_fit(name):
    value, message = WRONG_MEMBER[name]
    arguments = group_arguments()
    setattr(arguments["members"][0], name, value)
    with pytest.raises(ValueError, match=message):
        c_oracle.group_forward(**arguments)


def test_half_an_adapter_is_refused():
    arguments = group_arguments()
    arguments["members"][0].lora_A = None
    with pytest.raises(ValueError, match="given both or neither"):
        c_oracle.group_forward(**arguments)


def test_a_shared_lora_A_is_one():
    members, x, _, _ = exact_group("shared", "fp32", "fp32")
    members[1].lora_A = members[1].lora_A + 1
    with pytest.raises(ValueError, match="every member that has a lora_A has that of the first"):
        c_oracle.group_forward(x, members, "fp32", True)
    members[1].lora_A = members[0].lora_A
    members[1].seed = 3
    with pytest.raises(RuntimeError, match="share lora_A disagree"):
        c_oracle.group_forward(x, members, "fp32", True)


@pytest.mark.parametrize("p", [1.0, -0.1, np.nan])
def test_dropout_outside_0_to_1_is_refused(p):
    with pytest.raises(RuntimeError, match=r"dropout_p is not in \[0, 1\)"):
        c_oracle.forward(**forward_arguments(), dropout_p=p)
    with pytest.raises(RuntimeError, match=r"dropout_p is not in \[0, 1\)"):
        c_oracle.backward(**backward_arguments(), dropout_p=p)
    with pytest.raises(RuntimeError, match=r"dropout_p is not in \[0, 1\)"):
        c_oracle.keep_mask(0, p, 1, 1)


def test_unknown_activations_and_forms_are_refused():
    one = np.ones((1, 1))
    with pytest.raises(ValueError, match="activation is 'relu', expected one of silu, gelu, gelu_tanh"):
        c_oracle.gated_product(one, one, "relu", "fp32")
    with pytest.raises(ValueError, match="form is 't5', expected one of llama, gemma"):
        c_oracle.rms_norm(one, one[0], 1e-6, "t5", "fp32")


def test_an_mlp_whose_layers_do_not_fit_is_refused():
    x, (gate, up, down), _ = normal_mlp()
    with pytest.raises(ValueError, match=r"up's weight has shape \(12, 15\), expected \(22, 15\)"):
        c_oracle.mlp_forward(x, gate, Linear(np.zeros((12, 15))), down, "silu", "fp64")
    with pytest.raises(ValueError, match=r"weight has shape \(12, 21\), expected \(12, 22\)"):
        c_oracle.mlp_forward(x, gate, up, Linear(np.zeros((12, 21))), "silu", "fp64")


def test_complex_input_is_refused():
    with pytest.raises(TypeError):
        c_oracle.round_to(np.array([1j]), "fp32")


BUFFER = np.zeros(64)
ADDRESS = BUFFER.ctypes.data
FORWARD = [2, 3, 4, 1, *[ADDRESS] * 4, None, 1.0, 0.0, 0, 1, *[ADDRESS] * 2]
BACKWARD = [2, 3, 4, 1, *[ADDRESS] * 5, 1.0, 0.0, 0, 1, 1, *[ADDRESS] * 3]
ROUND_ARRAY = [1, ADDRESS, 1, ADDRESS]


@pytest.mark.parametrize(
    ("function", "arguments", "changed", "status"),
    [
        *[("lorafa_forward", FORWARD, {i: -1}, c_oracle.ERROR_SIZE) for i in range(4)],
        *[("lorafa_forward", FORWARD, {i: None}, c_oracle.ERROR_NULL) for i in range(4, 8)],
        *[("lorafa_backward", BACKWARD, {i: -1}, c_oracle.ERROR_SIZE) for i in range(4)],
        *[("lorafa_backward", BACKWARD, {i: None}, c_oracle.ERROR_NULL) for i in range(4, 9)],
        ("lorafa_forward", FORWARD, {0: 2**60}, c_oracle.ERROR_SIZE),
        ("lorafa_forward", FORWARD, {10: 1.0}, c_oracle.ERROR_DROPOUT),
        ("lorafa_backward", BACKWARD, {10: 1.0}, c_oracle.ERROR_DROPOUT),
        ("lorafa_forward", FORWARD, {12: 4}, c_oracle.ERROR_DTYPE),
        ("lorafa_forward", FORWARD, {12: -1}, c_oracle.ERROR_DTYPE),
        ("lorafa_backward", BACKWARD, {12: 4}, c_oracle.ERROR_DTYPE),
        ("lorafa_backward", BACKWARD, {13: 4}, c_oracle.ERROR_DTYPE),
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
    words = [c_oracle.library().lorafa_strerror(s) for s in range(-1, c_oracle.ERROR_SINGULAR + 2)]
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


def test_the_c_tests_notice_a_wrong_round_of_philox(sources):
    break_source(sources, "round < 10", "round < 7")
    done = make(sources, "test")
    assert done.returncode != 0
    assert "word 0 is" in done.stdout


def test_the_sanitizers_notice_a_read_out_of_bounds(sources, sanitizers):
    break_source(sources, "sum += bias[n]", "sum += bias[n] + 0 * bias[N]")
    done = make(sources, "sanitize")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr


def test_the_python_side_of_the_oracle_does_not_need_torch():
    program = "import sys; sys.modules['torch'] = None; import c_oracle; c_oracle.library()"
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
