"""Run beside a stub driver by test_kept_or_new.py: prints what it found, as JSON.

Launchers are called with drawn operands and options, of few values each, so that calls differ in one of them
or in some. Each call is compared with itself while nothing is kept. Nothing is launched.
{launcher: [calls, launches that were kept, [what differs, …]]}
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorafa_kernels.kernels import launch as module
from lorafa_kernels.kernels.dequantise import dequantise
from lorafa_kernels.kernels.expand import expand
from lorafa_kernels.kernels.expand_codes import expand_codes
from lorafa_kernels.kernels.gated import gated, gated_backward
from lorafa_kernels.kernels.grad import grad, grads_beside
from lorafa_kernels.kernels.group import Dropout, expand_total, shrink_group, shrink_total
from lorafa_kernels.kernels.mixed import mixed_expand, mixed_grad, mixed_shrink
from lorafa_kernels.kernels.recompute import recompute
from lorafa_kernels.kernels.shrink import shrink
from lorafa_kernels.plan.config import KernelConfig

SEEDS_OF_CALLS = 16
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PORTABLE = KernelConfig(64, 64, 32, 16, 4, 4, 2)
TMA = KernelConfig(128, 128, 64, 16, 8, 8, 3, "tma", EPILOGUE_SUBTILE=2)
WS, WS_Z = (replace(TMA, variant=variant) for variant in ("ws", "ws_z"))
SHRINK = KernelConfig(64, 0, 64, 16, 1, 4, 3)
CODES = KernelConfig(16, 32, 128, 64, 1, 4, 4, "codes")
WIDTH = 320
M, K, N, R = (64, 80), (128, 192), (256, 264), (8, 16)
SEEDS = torch.zeros(4, dtype=torch.int64)


class Draw:
    """One call's operands and options: those of a seed, of which one choice is another one."""

    def __init__(self, seed: int, changed: int | None = None) -> None:
        self.seed, self.changed, self.choices = seed, changed, 0
        self.dtype = self.choice((BF16, BF16, FP16, FP32))
        self.M, self.K, self.N, self.R = map(self.choice, (M, K, N, R))

    def choice(self, options: Sequence) -> Any:
        random_of_this = random.Random(f"{self.seed} {self.choices}")
        chosen = random_of_this.choice(options)
        if self.choices == self.changed:
            others = [option for option in options if option is not chosen]
            chosen = random_of_this.choice(others or options)
        self.choices += 1
        return chosen

    def flag(self) -> bool:
        return self.choice((False, False, True))

    def matrix(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Whole, part of a wider one by rows or by columns, whose steps say nothing of its size, or at
        another address.
        """
        dtype = dtype or self.dtype
        *more, rows, columns = shape
        how = self.choice(("whole", "whole", "part", "transposed", "offset"))
        if how == "part":
            return torch.empty(*more, rows, WIDTH, dtype=dtype)[..., :columns]
        if how == "transposed":
            return torch.empty(*more, columns, max(rows, WIDTH), dtype=dtype)[..., :rows].mT
        if how == "offset":
            count = torch.Size(shape).numel()
            return torch.empty(count + 4, dtype=dtype)[4:].view(shape)
        return torch.empty(shape, dtype=dtype)

    def factor(self, rows: int, columns: int) -> Tensor:
        return self.matrix(rows, columns, dtype=self.choice((self.dtype, FP32)))

    def bias(self, size: int) -> Tensor | None:
        return torch.zeros(size, dtype=self.choice((self.dtype, FP32))) if self.flag() else None

    def dropout(self) -> dict:
        if not self.flag():
            return {}
        return {"dropout_p": self.choice((0.1, 0.6)), "seed": SEEDS[self.choice((0, 1)) :][:1]}

    def config(self, *configs: KernelConfig) -> KernelConfig:
        chosen = self.choice(configs)
        return replace(chosen, num_stages=chosen.num_stages - self.flag())

    def copy(self) -> tuple[Tensor, Tensor]:
        source = self.matrix(self.choice((32, 40)), self.R, dtype=self.choice((FP32, BF16)))
        return source, torch.zeros(source.shape, dtype=self.choice((BF16, FP16)))


def of_shrink(d: Draw) -> Callable:
    operands = d.matrix(d.M, d.K), d.factor(d.K, d.R), d.choice((1.0, 2.0))
    how = {"config": replace(d.config(SHRINK), SPLIT_K=d.choice((1, 2))), "pdl": d.flag()}
    how |= {"copy": d.copy() if d.flag() else None} | d.dropout()
    return lambda: shrink(*operands, **how)


def of_expand(d: Draw) -> Callable:
    operands = d.matrix(d.M, d.K), d.matrix(d.K, d.N), d.matrix(d.M, d.R), d.factor(d.R, d.N), d.bias(d.N)
    how = {
        "config": d.config(PORTABLE, TMA, TMA, WS),
        "unaligned": d.choice((None, *[d.config(PORTABLE)] * 3)),
    }
    how |= {"pdl": d.flag(), "trigger": d.flag()} | d.dropout()
    return lambda: expand(*operands, **how)


def of_recompute(d: Draw) -> Callable:
    operands = d.matrix(d.M, d.K), d.matrix(d.K, d.N), d.factor(d.K, d.R), d.factor(d.R, d.N), d.bias(d.N)
    scaling = d.choice((1.0, 2.0))
    how = {"config": d.config(PORTABLE, WS_Z), "want_L": not d.flag(), "drop_P": not d.flag()} | d.dropout()
    return lambda: recompute(*operands, scaling, **how)


def of_grad(d: Draw) -> Callable:
    lora_B = None if d.flag() else d.factor(d.N, d.R)
    config = d.config(replace(PORTABLE, BLOCK_K=0), replace(PORTABLE, BLOCK_K=0, variant="tma"))
    rows = d.choice((d.M, WIDTH, 4096))
    operands = d.matrix(rows, d.N), d.matrix(rows, d.R), lora_B, 2.0, d.choice((FP32, BF16))
    how = {"config": config, "pdl": d.flag(), "beside": lora_B is None and d.flag()}
    return lambda: grad(*operands, **how)


def of_grads_beside(d: Draw) -> Callable:
    rows, widths = d.choice((d.M, 1 << 14)), [d.choice(N) for _ in range(d.choice((1, 2, 3)))]
    dys = [d.matrix(rows, width) for width in widths]
    zs = [d.matrix(rows, d.choice(R)) for _ in dys]
    dtypes = [d.choice((FP32, BF16)) for _ in dys]
    config = d.config(replace(PORTABLE, BLOCK_K=0), replace(PORTABLE, BLOCK_K=0, variant="tma"))
    return lambda: grads_beside(dys, zs, dtypes, config=config)


def dropout_of(d: Draw, members: int) -> Dropout | None:
    if not d.flag():
        return None
    offsets = [(d.choice(range(4)) + i) % 4 for i in range(members)]
    return Dropout(SEEDS, offsets, [d.choice((0.0, 0.1, 0.6)) for _ in offsets])


def of_shrink_group(d: Draw) -> Callable:
    count = d.choice((2, 3))
    factors = [d.factor(d.K, d.choice(R)) for _ in range(count)]
    scalings = [d.choice((1.0, 2.0)) for _ in factors]
    how = {"config": replace(d.config(SHRINK), SPLIT_K=d.choice((1, 2))), "members": d.choice((1, count))}
    how |= {"dropout": dropout_of(d, count), "copies": [d.copy() for _ in range(d.choice((0, 0, 1, 2)))]}
    x = d.matrix(d.M, d.K)
    return lambda: shrink_group(x, factors, scalings, **how)


def of_expand_total(d: Draw) -> Callable:
    widths, ranks = [d.choice(K) for _ in range(2)], [d.choice(R) for _ in range(d.choice((1, 2)))]
    Ps, Qs = [d.matrix(d.M, width) for width in widths], [d.matrix(width, d.N) for width in widths]
    Ls, Fs = [d.matrix(d.M, rank) for rank in ranks], [d.factor(rank, d.N) for rank in ranks]
    how = {"config": d.config(PORTABLE, TMA, TMA), "unaligned": d.config(PORTABLE)}
    how |= {"dropout": dropout_of(d, len(ranks)), "trigger": d.flag()}
    return lambda: expand_total(Ps, Qs, Ls, Fs, **how)


def of_shrink_total(d: Draw) -> Callable:
    widths = [d.choice(K) for _ in range(d.choice((1, 2)))]
    rows, factors = [d.matrix(d.M, width) for width in widths], [d.factor(width, d.R) for width in widths]
    scaling, how = d.choice((1.0, 2.0)), {"config": d.config(PORTABLE)}
    return lambda: shrink_total(rows, factors, scaling, **how)


def tables(d: Draw) -> tuple[Tensor, Tensor]:
    samples, tiles = d.choice((2, 4)), d.choice((3, 5))
    return torch.zeros(samples, dtype=torch.int32), torch.zeros(tiles, 4, dtype=torch.int32)


def of_mixed_shrink(d: Draw) -> Callable:
    adapters = d.choice((2, 3))
    operands = d.matrix(d.M, d.K), d.matrix(adapters, d.K, d.R), torch.zeros(adapters), *tables(d)
    how = {"config": d.config(SHRINK)}
    if d.flag():
        how |= {"seed": SEEDS[:1], "thresholds": torch.zeros(adapters, dtype=torch.int32)}
    return lambda: mixed_shrink(*operands, **how)


def of_mixed_expand(d: Draw) -> Callable:
    adapters = d.choice((2, 3))
    operands = d.matrix(d.M, d.K), d.matrix(d.K, d.N), d.matrix(d.M, d.R), d.matrix(adapters, d.R, d.N)
    of = d.bias(d.N), *tables(d)
    how = {"config": d.config(PORTABLE)}
    if d.flag():
        how |= {"seed": SEEDS[:1], "thresholds": torch.zeros(adapters, dtype=torch.int32)}
        how["scales"] = torch.zeros(adapters)
    return lambda: mixed_expand(*operands, *of, **how)


def of_mixed_grad(d: Draw) -> Callable:
    operands = d.matrix(d.M, d.N), d.matrix(d.M, d.R), *tables(d)
    config = d.config(PORTABLE)
    return lambda: mixed_grad(*operands, config=config)


def of_gated(d: Draw) -> Callable:
    operands = d.matrix(d.M, d.N), d.matrix(d.M, d.N), d.choice(("silu", "gelu"))
    return lambda: gated(*operands)


def of_gated_backward(d: Draw) -> Callable:
    u = None if d.flag() else d.matrix(d.M, d.N)
    operands = d.matrix(d.M, d.N), d.matrix(d.M, d.N), u, d.choice(("silu", "gelu")), d.flag()
    return lambda: gated_backward(*operands)


def codes_of(d: Draw, kind: str) -> tuple[Tensor, Tensor, tuple | None]:
    offset = d.choice((0, 4))
    if not kind.startswith("nf4"):
        dtype = torch.int8 if kind == "int8" else torch.uint8
        return torch.zeros(d.N * d.K + offset, dtype=dtype)[offset:].view(d.N, d.K), torch.zeros(d.N), None
    codes = torch.zeros(d.N * d.K // 2 + offset, dtype=torch.uint8)[offset:].view(d.N, d.K // 2)
    if kind == "nf4":
        return codes, torch.zeros(d.N, d.K // 64), None
    nested = torch.zeros(-(-d.N * d.K // 64 // 256)), torch.zeros(256), torch.zeros(1)
    return codes, torch.zeros(d.N, d.K // 64, dtype=torch.uint8), nested


def of_dequantise(d: Draw) -> Callable:
    operands = *codes_of(d, d.choice(("nf4", "nf4-nested"))), d.dtype, d.choice((BF16, FP16, FP32))
    return lambda: dequantise(*operands)


def of_expand_codes(d: Draw) -> Callable:
    d.dtype = d.choice((BF16, FP16))
    kind = d.choice(("nf4", "nf4-nested", "int8", "fp8"))
    low_rank = (None, None) if d.flag() else (d.matrix(d.M, d.R), d.factor(d.R, d.N))
    operands = kind, *codes_of(d, kind), d.choice((BF16, FP32)), *low_rank, d.bias(d.N)
    how = {"config": d.config(CODES), "pdl": d.flag()}
    x = d.matrix(d.M, d.K)
    return lambda: expand_codes(x, *operands, **how)


OF = {name.removeprefix("of_"): make for name, make in list(globals().items()) if name.startswith("of_")}
noted: list[tuple] = []
# By number, with the launch itself: a number is its own as long as that lives.
first_kinds: dict[int, tuple[module.Launch, list]] = {}
wrong: set[str] = set()


def kind_of(value: object, by_descriptor: bool) -> object:
    """What of a moving value must stay."""
    if isinstance(value, tuple):
        return tuple(kind_of(one, False) for one in value)
    if not isinstance(value, Tensor):
        return type(value)
    return (value.dtype, value.shape, value.stride()) if by_descriptor else value.dtype


def note(self: module.Launch, *values: object) -> None:
    """In the place of a launch."""
    fixed = {name: (type(value), value) for name, value in self.fixed.items()}
    how = {"kernel": self.kernel.__name__, "grid": self.grid, "moving": self.moving, "blocks": self.blocks}
    noted.append(how | fixed)
    kinds = [kind_of(value, name in self.blocks) for name, value in zip(self.moving, values, strict=True)]
    _, first = first_kinds.setdefault(id(self), (self, kinds))
    wrong.update(name for name, a, b in zip(self.moving, first, kinds, strict=True) if a != b)


def launched(call: Callable) -> list:
    """What a call launches, or what it raises."""
    noted.clear()
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return [*noted, {"raises": str(error)}]
    return noted.copy()


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    kept = [(cache, dict(cache)) for cache in module._caches]
    module.forget_launches()
    yield
    for cache, entries in kept:
        cache.clear()
        cache.update(entries)


def differences(a: list[dict], b: list[dict]) -> list[str]:
    if len(a) != len(b):
        return [f"{len(a)} launches, not {len(b)}"]
    found = []
    for one, other in zip(a, b, strict=True):
        found += [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
    return found


def compare(seed: int, changed: int | None) -> int:
    """Return how many choices were made."""
    draw = Draw(seed, changed)
    torch.backends.cuda.matmul.fp32_precision = draw.choice(("ieee", "tf32"))
    call = make(draw)
    as_kept = launched(call)
    with nothing_kept():
        fresh = launched(call)
    wrong.update(differences(as_kept, fresh))
    return draw.choices


torch.set_num_threads(1)
module.Launch.__call__ = note
found = {}
for name, make in OF.items():  # noqa: B007
    wrong.clear()
    calls = 0
    for seed in range(SEEDS_OF_CALLS):
        module.forget_launches()
        choices = compare(seed, None)
        calls += choices
        for changed in range(choices):
            compare(seed, changed)
    found[name] = [calls, sorted(wrong)]
print(json.dumps(found))
