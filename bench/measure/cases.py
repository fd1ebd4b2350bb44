"""What is measured: the layers of real models by name, how many rows, which ranks and dtypes, and the grids
made of them.

A case is one projection of a model with M rows of input, rank R, and the dtypes of the base and of lora_B.
Products are written M×K×N: x (M, K), y (M, N).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch

from lorafa_kernels.tune.models import MODELS, distinct_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 16, 128, 512, 2048, 8192, 32768)
RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model, y (N) from x (K), and the names of all that have its shape in that model."""

    name: str
    K: int
    N: int
    bias: bool
    names: tuple[str, ...]


def layers_of(model: str) -> list[Layer]:
    """Return a model's linear layers, one for each shape. Raises ValueError for an unknown model, listing the
    known ones.
    """
    if model not in MODELS:
        raise unknown("model", model, MODELS)
    found = []
    for first in distinct_shapes(model):
        alike = (other.name.removesuffix("_proj") for other in MODELS[model] if other[1:] == first[1:])
        names = tuple(alike)
        found.append(Layer(names[0], *first[1:], names))
    return found


@dataclass(frozen=True)
class Case:
    """One layer: x (M, K), weight (N, K), rank R. dtype: of x and the base; adapter: of lora_B."""

    model: str
    projection: str
    M: int
    K: int
    N: int
    R: int
    bias: bool = False
    dtype: str = "bf16"
    adapter: str = "fp32"
    dropout: float = 0.0

    @property
    def label(self) -> str:
        text = f"{self.model}/{self.projection} {self.M}x{self.K}x{self.N} R={self.R} {self.dtype}"
        if self.adapter != self.dtype:
            text += f" B {self.adapter}"
        return text + (f" dropout={self.dropout:g}" if self.dropout else "")

    def as_record(self) -> dict:
        """Return the case as JSON types, with its label."""
        return {"label": self.label, **asdict(self)}

    def flops(self) -> dict[str, int]:
        """Return the FLOPs (2 a multiply-add) of LoRA-FA: z and y forward; dz, dB and dx backward."""
        product = 2 * self.M * self.N * self.K
        rank_R = 2 * self.M * self.R
        return {
            "forward": product + rank_R * (self.K + self.N),
            "backward": product + rank_R * (self.K + 2 * self.N),
        }

    def least_bytes(self) -> dict[str, int]:
        """Return the fewest bytes that each direction moves: every operand read once, every result written
        once.
        """
        wide, narrow = DTYPES[self.dtype].itemsize, DTYPES[self.adapter].itemsize
        M, K, N, R = self.M, self.K, self.N, self.R
        weights = (N * K + R * K) * wide + N * R * narrow
        return {
            "forward": weights + (M * K + M * N + M * R + (N if self.bias else 0)) * wide,
            "backward": weights + (M * N + M * R + M * K) * wide + N * R * narrow,
        }

    def floor_ms(self, flops_per_s: float | None, bytes_per_s: float | None) -> dict[str, float] | None:
        """Return the least time in ms on these ceilings, or None where one was not measured."""
        if not flops_per_s or not bytes_per_s:
            return None
        flops, moved = self.flops(), self.least_bytes()
        floor = {part: 1e3 * max(flops[part] / flops_per_s, moved[part] / bytes_per_s) for part in flops}
        return {**floor, "both": floor["forward"] + floor["backward"]}


# So small that a call's time is Python's and the dispatcher's.
HOST_CASES = tuple(
    Case("host", "tiny", 8, 64, 64, 8, True, dtype, adapter)
    for dtype, adapter in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
)


def layers(models: Iterable[str] = MODELS) -> list[tuple[str, Layer]]:
    """Return (model, layer) of these models, every distinct shape once, under the first model that has it."""
    found: dict[tuple, tuple[str, Layer]] = {}
    for model in models:
        for layer in layers_of(model):
            found.setdefault((layer.K, layer.N, layer.bias), (model, layer))
    return list(found.values())


def cases(
    chosen: Iterable[tuple[str, Layer]],
    rows: Iterable[int],
    ranks: Iterable[int] = (16,),
    dtypes: Iterable[tuple[str, str]] = (("bf16", "fp32"),),
    dropouts: Iterable[float] = (0.0,),
) -> list[Case]:
    """Return all combinations, layers varying fastest; dtypes are pairs (base, lora_B)."""
    combined = itertools.product(rows, ranks, dtypes, dropouts, chosen)
    return [
        Case(model, layer.name, M, layer.K, layer.N, R, layer.bias, dtype, adapter, dropout)
        for M, R, (dtype, adapter), dropout, (model, layer) in combined
    ]


LLAMA_3 = ("Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B")
TARGET_RANKS = (16, 64)


def target_grid() -> list[Case]:
    """The cells on which the speed target is judged, the most telling first."""
    return cases(layers(LLAMA_3), (8192, 2048, 512, 32768, 128, 16, 1), TARGET_RANKS)


def full_grid() -> list[Case]:
    """Everything: all models, rows, ranks and dtypes, without dropout and with it."""
    dtypes = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32"))
    return cases(layers(), ROWS, RANKS, dtypes, (0.0, 0.1))


def ranks_grid() -> list[Case]:
    """One layer over all ranks, at the size of a training step."""
    return cases(find_layers(["Llama-3-8B/gate"]), (8192,), RANKS)


def first_hour_grid() -> list[Case]:
    """The part of the target grid that fits into a first session on a GPU, most telling first, with the
    other ranks of one layer.
    """
    telling = [case for case in target_grid() if case.M == 8192]
    small = find_layers(["Llama-3-8B"])
    rest = cases(small, (512, 2048, 128, 16, 1), (16,)) + ranks_grid()
    return list(dict.fromkeys(telling + rest))


def cpu_grid() -> list[Case]:
    """Layers that a CPU computes in tens of milliseconds."""
    both = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
    wide = find_layers(["RoBERTa-large/query", "RoBERTa-large/intermediate.dense"])
    return cases(wide, (1024,), (16,), both) + cases(find_layers(["MiniLM/query"]), (256,), (16,), both)


def quick_grid() -> list[Case]:
    """A few layers, small enough for a look at a CPU in a minute."""
    small = find_layers(["MiniLM/query", "MiniLM/intermediate.dense"])
    return cases(small, (256,), (16,), (("fp32", "fp32"), ("bf16", "bf16")))


GRIDS: dict[str, Callable[[], list[Case]]] = {
    "quick": quick_grid,
    "cpu": cpu_grid,
    "target": target_grid,
    "first-hour": first_hour_grid,
    "ranks": ranks_grid,
    "full": full_grid,
}


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not among the known ones: it lists them, close ones first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" (did you mean {', '.join(close)}?)" if close else ""
    return ValueError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


def grid(name: str) -> list[Case]:
    """Return the cases of a grid. Raises ValueError for an unknown name, listing the known ones."""
    if name not in GRIDS:
        raise unknown("grid", name, GRIDS)
    return GRIDS[name]()


def find_layers(names: Iterable[str]) -> list[tuple[str, Layer]]:
    """Return the layers named "model" or "model/layer", by any of the layer's names ("Llama-3-8B/up" is
    "Llama-3-8B/gate").

    Raises ValueError for a name that fits nothing, listing the known ones.
    """
    found = []
    for name in names:
        model, _, wanted = name.partition("/")
        known = layers_of(model)
        fitting = [layer for layer in known if not wanted or wanted.removesuffix("_proj") in layer.names]
        if not fitting:
            raise unknown(f"layer of {model}", wanted, (name for layer in known for name in layer.names))
        found += [(model, layer) for layer in fitting]
    return found


def with_dropout(chosen: Iterable[Case], dropout: float) -> list[Case]:
    """Return the cases with another dropout."""
    return [replace(case, dropout=dropout) for case in chosen]
