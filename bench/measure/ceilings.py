"""What this machine can do at best, measured: matrix products and copies through PyTorch, on random data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cases import DTYPES
from .timing import WARM_UP, CallTimer, EventTimer, digits, interleave, summary

# Sizes of square products by dtype, of which the best is the ceiling; bytes that are copied.
SIZES = {
    "cuda": ({"bf16": (4096, 8192, 16384), "fp16": (8192,), "fp32": (4096,)}, 2**32),
    "cpu": ({"fp32": (512, 1024, 1536), "bf16": (512, 1024, 1536)}, 2**27),
}
ROUNDS = 15
ESTIMATE = {"cuda": 3.0, "cpu": 8.0}


def measure(device: str, clocks: Callable[[], dict], rounds: int = ROUNDS) -> dict:
    """Return rows: products in TFLOP/s by dtype, the copy in GB/s counting bytes read and written. clocks
    says at which the GPU stands; before any work those are an idle one's.
    """
    sizes, copied = SIZES[device]
    products = [(dtype, size) for dtype, of_dtype in sizes.items() for size in of_dtype]
    generator = torch.Generator(device).manual_seed(0)
    steps = {}
    for dtype, size in products:
        left, right = (
            torch.randn(size, size, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(2)
        )
        out = torch.empty_like(left)
        steps[dtype, size] = lambda left=left, right=right, out=out: torch.mm(left, right, out=out)
    source = torch.randint(0, 127, (copied,), generator=generator, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)
    samples = {}
    # One after the other: these are limits to compare with, not contenders.
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
        timer = EventTimer() if device == "cuda" else CallTimer(cold=True)
        samples |= interleave({name: step}, rounds, timer, lambda: None)[0]
    reached = clocks() if device == "cuda" else None
    raw = {name: [digits(seconds * 1e3) for seconds in found] for name, found in samples.items()}
    rows = [
        {
            "what": "product",
            "dtype": dtype,
            "size": [size] * 3,
            "samples_ms": raw[dtype, size],
            "tflops": summary([2 * size**3 / seconds * 1e-12 for seconds in samples[dtype, size]]),
        }
        for dtype, size in products
    ]
    rate = summary([2 * copied / seconds * 1e-9 for seconds in samples["copy"]])
    copy = {"what": "copy", "bytes": copied, "gb_per_s": rate, "samples_ms": raw["copy"]}
    return {"rows": [*rows, copy], "clocks": reached}


def rates(payload: dict | None, dtype: str) -> dict[str, float | None]:
    """Return "product" in FLOP/s for this dtype and "copy" in bytes/s, None where not measured."""
    found: dict[str, float | None] = {"product": None, "copy": None}
    for row in (payload or {"rows": []})["rows"]:
        if row["what"] == "copy":
            found["copy"] = row["gb_per_s"]["median"] * 1e9
        elif row["dtype"] == dtype:
            found["product"] = max(found["product"] or 0.0, row["tflops"]["median"] * 1e12)
    return found
