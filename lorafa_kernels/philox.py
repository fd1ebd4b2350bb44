"""The dropout mask of a LoRA-FA layer, computed from a seed and never stored.

    keep[m, k] = ( word k mod 4 of Philox4x32-10( counter, key ) ) >= threshold

    counter      m·⌈K/4⌉ + ⌊k/4⌋ in 64 bits, as the words (low, high, 0, 0): one call serves four columns
    key          the seed, an int64, as the words (low, high)
    threshold    min( round(p · 2³²), 2³² − 1 ), compared without a sign

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The mask is a function of the
seed, the row, the column and K alone, so every implementation computes the same bits in whatever order and
blocks it likes, forward and again backward. Here in plain torch, where a 32-bit word is an int64 in [0, 2³²)
and a product of two wraps around in exactly its 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
COLUMNS_PER_CALL = 4
# Counters at a time: 2 MB for each of about ten int64 temporaries.
CHUNK = 1 << 18

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Return the four words of Philox4x32-10 for int64 tensors of words, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0 = c0 * MULTIPLIERS[0]
        product_1 = c2 * MULTIPLIERS[1]
        # The low words keep the rest of their products above them, which these masks drop a round later.
        c0, c1 = ((product_1 >> 32) ^ c1 ^ k0) & WORD, product_1
        c2, c3 = ((product_0 >> 32) ^ c3 ^ k1) & WORD, product_0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def threshold(p: float) -> int:
    """Return the word from which on an element is kept, for dropout of probability p in [0, 1)."""
    return min(round(p * (1 << 32)), WORD)


def keep_mask(seed: Tensor, p: float, M: int, K: int, row0: int = 0) -> Tensor:
    """Return keep (M, K), bool on the device of `seed`: rows row0 to row0 + M of the mask of any x with K
    columns.

    seed: int64 of shape (1,). Elements are kept with probability 1 − p, p in [0, 1).
    """
    keep = torch.empty((M, K), dtype=torch.bool, device=seed.device)
    for rows, chunk in keep_chunks(seed, p, M, K, row0):
        keep[rows] = chunk
    return keep


def keep_chunks(seed: Tensor, p: float, M: int, K: int, row0: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Yield keep_mask in parts: the rows of a part as a slice of 0 to M, and keep (rows, K). Needs memory for
    one part only.
    """
    calls = -(-K // COLUMNS_PER_CALL)
    step = max(1, CHUNK // max(1, calls))
    for first in range(0, M, step):
        last = min(first + step, M)
        counter = torch.arange(
            (row0 + first) * calls, (row0 + last) * calls, dtype=torch.int64, device=seed.device
        )
        yield slice(first, last), _keep(seed, p, counter, last - first, K)


def keep_chunks_of(seed: Tensor, p: float, rows: Tensor, K: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of keep_mask whose numbers are in `rows` (M_i,), int64, in parts as keep_chunks."""
    calls = -(-K // COLUMNS_PER_CALL)
    step = max(1, CHUNK // max(1, calls))
    columns = torch.arange(calls, dtype=torch.int64, device=seed.device)
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        counter = (some[:, None] * calls + columns).reshape(-1)
        yield slice(first, first + len(some)), _keep(seed, p, counter, len(some), K)


def _keep(seed: Tensor, p: float, counter: Tensor, M: int, K: int) -> Tensor:
    """keep (M, K) of the M·⌈K/4⌉ counters of its rows."""
    zero = counter.new_zeros(())
    words = philox4x32((counter & WORD, counter >> 32, zero, zero), (seed & WORD, (seed >> 32) & WORD))
    least = threshold(p)
    keep = torch.stack([word >= least for word in words], dim=-1)
    return keep.view(M, -(-K // COLUMNS_PER_CALL) * COLUMNS_PER_CALL)[:, :K]
