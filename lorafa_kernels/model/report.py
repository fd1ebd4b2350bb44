"""What apply_lorafa did to a model, for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .placing.place import Block


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: weight (out_features, in_features), rank r, scaling as LoRAFALinear applies it;
    base: "dense", or the kind of a quantised one.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float
    base: str = "dense"


@dataclass(frozen=True)
class AdapterReport:
    """What `apply_lorafa` did; `str()` of it is a short table. A shared parameter counts once.

    blocks: the modules that hold a fused block now, and those that were considered and why they hold none.
    doubts: adapters that may not act everywhere, and why. not_adapted: what "all-linear" leaves out though it
    computes like linear layers, such as the experts and routers of mixtures. vocabulary: tokens of the model
    then, or None.
    """

    layers: tuple[AdaptedLayer, ...]
    modules_to_save: tuple[str, ...]
    trained_parameters: int
    total_parameters: int
    blocks: tuple[Block, ...] = ()
    doubts: tuple[str, ...] = ()
    not_adapted: tuple[str, ...] = ()
    vocabulary: int | None = None

    def __str__(self) -> str:
        share = 100 * self.trained_parameters / max(1, self.total_parameters)
        lines = [
            f"LoRA-FA: {len(self.layers)} layers adapted, {self.trained_parameters:,} of "
            f"{self.total_parameters:,} parameters trained ({share:.2f} %)"
        ]
        lines += layer_lines(self.layers)
        lines += [f"  trained whole, without an adapter: {name}" for name in self.modules_to_save]
        lines += [f"  {n:4d} x not adapted: {text}" for text, n in Counter(self.not_adapted).items()]
        lines += [f"  may have no effect: {text}" for text in self.doubts]
        return "\n".join(lines + block_lines(self.blocks))


def layer_lines(layers: Iterable[AdaptedLayer]) -> list[str]:
    """A line for each kind of layer: last name, sizes, rank and scaling, with their number."""
    kinds = Counter(
        f"{layer.name.rsplit('.', 1)[-1]}: {layer.in_features} -> {layer.out_features}, r={layer.r}, "
        f"scaling={layer.scaling:g}{'' if layer.base == 'dense' else f', {layer.base} base'}"
        for layer in layers
    )
    return [f"  {count:4d} x {text}" for text, count in kinds.items()]


def block_lines(blocks: Iterable[Block]) -> list[str]:
    """A line for each kind of block, and of module that is none."""
    lines = []
    for title, fused in (("fused", True), ("not fused, computed as before", False)):
        alike = Counter(str(block) for block in blocks if block.fused == fused)
        lines += [f"  {title}:"] if alike else []
        lines += [f"  {count:4d} x {text}" for text, count in alike.items()]
    return lines
