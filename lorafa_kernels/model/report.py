"""What apply_lorafa did to a model, for people to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .placing.place import Block


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: weight (out_features, in_features), rank r, scaling as LoRAFALinear applies it."""

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float


@dataclass(frozen=True)
class AdapterReport:
    """What `apply_lorafa` did; `str()` of it is a short table. A shared parameter counts once.

    blocks: the modules that hold a fused block now, and those that were considered and why they hold none.
    doubts: adapters that may not act everywhere, and why.
    """

    layers: tuple[AdaptedLayer, ...]
    modules_to_save: tuple[str, ...]
    trained_parameters: int
    total_parameters: int
    blocks: tuple[Block, ...] = ()
    doubts: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds: dict[tuple[str, int, int, int, float], int] = {}
        for layer in self.layers:
            kind = (
                layer.name.rsplit(".", 1)[-1],
                layer.in_features,
                layer.out_features,
                layer.r,
                layer.scaling,
            )
            kinds[kind] = kinds.get(kind, 0) + 1
        share = 100 * self.trained_parameters / max(1, self.total_parameters)
        lines = [
            f"LoRA-FA: {len(self.layers)} layers adapted, {self.trained_parameters:,} of "
            f"{self.total_parameters:,} parameters trained ({share:.2f} %)"
        ]
        lines += [
            f"  {count:4d} x {leaf}: {k} -> {n}, r={r}, scaling={scaling:g}"
            for (leaf, k, n, r, scaling), count in kinds.items()
        ]
        lines += [f"  trained whole, without an adapter: {name}" for name in self.modules_to_save]
        lines += [f"  may have no effect: {text}" for text in self.doubts]
        for title, fused in (("fused", True), ("not fused, computed as before", False)):
            alike = Counter(str(block) for block in self.blocks if block.fused == fused)
            lines += [f"  {title}:"] if alike else []
            lines += [f"  {count:4d} x {text}" for text, count in alike.items()]
        return "\n".join(lines)
