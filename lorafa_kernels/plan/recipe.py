"""What is to be computed, where, and in which way: the words that the cost model, the tables and the plans
share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from ..files import shown
from .config import (
    OPS,
    WS_SUMS,
    DeviceLimits,
    KernelConfig,
    KernelPlan,
    makes_mask,
    row_chunks,
    rows_aligned,
    shared_memory,
    split_size,
    wrong_field,
)
from .defaults import beside_config, default_config
from .specialised import missing_for_ws

OPERATIONS = ("forward", "backward", "backward_input", "backward_lora_B")
NAMES = ("fused", "library")
DEFAULT_KERNELS = KernelPlan()
# The kernels that an operation may call.
_MAY_USE = {
    "forward": ("shrink", "expand"),
    "backward": ("shrink", "expand", "grad"),
    "backward_input": ("shrink", "expand"),
    "backward_lora_B": ("grad",),
}


@dataclass(frozen=True)
class Problem:
    """One operation on x (M, K), weight (N, K) and rank R, or on dy (M, N), in `dtype`.

    op: one of OPERATIONS. K is 0 for backward_lora_B, which does not depend on it. bias: forward adds one.
    dropout: x is dropped out before lora_A. Of a group of layers that share x, widths: the N of each, whose
    sum N is, R being the largest rank; makers: how many z are made of x. () and 1 for a layer. codes: in
    forward the kind of quantised base (base/kinds.py) whose codes a kernel could read; "" for any other.
    """

    op: str
    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    bias: bool = False
    dropout: bool = False
    widths: tuple[int, ...] = ()
    makers: int = 1
    codes: str = ""

    @property
    def width(self) -> int:
        """Columns of the rows that come in: K of x, or N of dy."""
        return self.K if self.op == "forward" else self.N

    @property
    def out_width(self) -> int:
        """Columns of y, or of dx."""
        return self.N if self.op == "forward" else self.K

    @property
    def aligned(self) -> bool:
        """Whether all wide rows start at multiples of 16 bytes."""
        return rows_aligned(self.dtype.itemsize, *(self.widths or (self.N,)), self.K)


@dataclass(frozen=True)
class Device:
    """A device to plan for: its name as the driver gives it, its limits, and the version of Triton there."""

    name: str
    limits: DeviceLimits
    triton: str


@dataclass(frozen=True)
class Recipe:
    """A way to compute an operation.

    name "fused": the kernels compute all of it. "library": PyTorch's products compute y and dx, and dB too
    unless `kernels.one_pass`, which takes dz and dB from one pass of the grad kernel over dy.
    """

    name: str
    kernels: KernelPlan = DEFAULT_KERNELS


def describe(recipe: Recipe, op: str) -> str:
    """Return a recipe in a few words, such as "fused, one pass over dy, PDL"."""
    words, kernels = [recipe.name], recipe.kernels
    if runs_beside(recipe, op):
        return "fused, dB beside dx"
    expand = kernels.expand if recipe.name == "fused" else None
    if expand and expand.variant in ("ws", "ws_z"):
        words.append("specialised warps")
    if expand and expand.reads_codes:
        words.append("codes read in the product")
    if expand and expand.makes_low_rank:
        words.append("one launch for z and y" if op == "forward" else "one launch for dz and dx")
        return ", ".join(words)
    if op == "backward":
        one, many = "one pass over dy", "two passes over dy" if recipe.name == "fused" else "three products"
        words.append(one if kernels.one_pass else many)
    if recipe.name == "fused" and kernels.pdl and op != "backward_lora_B":
        words.append("PDL")
    return ", ".join(words)


def runs_beside(recipe: Recipe, op: str) -> bool:
    """Whether dB's kernel is launched last, beside expand; of a group one for each member.

    Never beside specialised warps, which leave no registers for it, nor where expand makes dz.
    """
    kernels = recipe.kernels
    leaves_room = kernels.expand is None or kernels.expand.variant not in ("recompute", *WS_SUMS)
    plain = op == "backward" and recipe.name == "fused" and leaves_room
    return plain and kernels.beside and kernels.pdl and not kernels.one_pass


def heuristic_config(
    kernel: str, problem: Problem, limits: DeviceLimits, recompute: bool = True
) -> KernelConfig:
    """Return the configuration that the launcher of `kernel` takes where its recipe names none.

    recompute=False: that of an expand which leaves z and dz to the kernels before it.
    """
    aligned = problem.aligned if kernel == "expand" else True
    key = (kernel, limits, problem.dtype.itemsize, problem.M, problem.R, aligned, recompute)
    config = default_config(*key)
    return default_config(*key, dropout=True) if drops(problem, kernel, config) else config


def default_of(kernel: str, recipe: Recipe, problem: Problem, limits: DeviceLimits) -> KernelConfig:
    """Return heuristic_config, but that of a grad beside expand where the recipe runs it so."""
    if kernel == "grad" and runs_beside(recipe, problem.op):
        return beside_config(limits, problem.dtype.itemsize, problem.M, problem.R)
    return heuristic_config(kernel, problem, limits)


def drops(problem: Problem, kernel: str, config: KernelConfig) -> bool:
    """Whether there is dropout, and it is this kernel that makes the mask."""
    return problem.dropout and makes_mask(kernel, problem.op == "forward", config)


def kernel_configs(recipe: Recipe, problem: Problem, limits: DeviceLimits) -> dict[str, KernelConfig]:
    """Return the configuration of each kernel that a recipe calls for `problem`, in no order of launching."""
    given = recipe.kernels

    def config(kernel: str) -> KernelConfig:
        return getattr(given, kernel) or default_of(kernel, recipe, problem, limits)

    if recipe.name == "library":
        return {"grad": config("grad")} if problem.op == "backward" and given.one_pass else {}
    configs = {kernel: config(kernel) for kernel in _MAY_USE[problem.op]}
    recompute = "expand" in configs and configs["expand"].makes_low_rank
    if recompute or (problem.op == "backward" and given.one_pass):
        del configs["shrink"]
    return configs


def launches(recipe: Recipe, problem: Problem, limits: DeviceLimits) -> tuple[str, ...]:
    """Return the kernels that a recipe launches for `problem`, in order: "shrink", "shrink_sum", "expand",
    "expand_codes" (expand that reads codes), "recompute" (expand that makes z or dz itself), "grad" and
    "grad_sum"; of a group each of them for all members.
    """
    configs = kernel_configs(recipe, problem, limits)
    gradients: list[str] = []
    last = runs_beside(recipe, problem.op) and not configs["expand"].makes_low_rank
    if grad := configs.get("grad"):
        gradients.append("grad")
        cut = any(chunks > 1 for _, chunks in grad_chunks(grad, problem, limits, last))
        if cut or grad_makes_dz(problem, configs):
            gradients.append("grad_sum")
    found = [] if last else list(gradients)
    if shrink := configs.get("shrink"):
        found.append("shrink")
        if split_size(shrink, problem.width) < problem.width:
            found.append("shrink_sum")
    if expand := configs.get("expand"):
        name = "expand_codes" if expand.reads_codes else "expand"
        found.append("recompute" if expand.makes_low_rank else name)
    return tuple(found + gradients if last else found)


def grad_chunks(
    config: KernelConfig, problem: Problem, limits: DeviceLimits, beside: bool
) -> list[tuple[int, int]]:
    """Return the columns of the dy of each member, of a layer its own, and into how many chunks of rows the
    grad kernel cuts it. beside: the blocks of all members run at a time, as beside expand.
    """
    widths = problem.widths or (problem.N,)
    return [(N, row_chunks(config, limits, problem.M, *(widths if beside else (N,)))) for N in widths]


def grad_makes_dz(problem: Problem, configs: Mapping[str, KernelConfig]) -> bool:
    """Whether the grad kernel of these configurations makes dz too: neither shrink nor expand does."""
    recompute = "expand" in configs and configs["expand"].makes_low_rank
    return problem.op == "backward" and "shrink" not in configs and not recompute


def obstacle(recipe: Recipe, problem: Problem, limits: DeviceLimits, triton: str | None = None) -> str | None:
    """Say what keeps a recipe's kernels from running on a device, or None if nothing does.

    triton: the version there, where it is known.
    """
    for kernel, config in kernel_configs(recipe, problem, limits).items():
        if config.reads_codes and not (problem.codes and problem.dtype.itemsize == 2):
            return (
                f"{kernel} in its variant 'codes' computes y of 16-bit x on a quantised weight whose codes a "
                "kernel reads, which this is not"
            )
        of_ws = config.variant in ("ws", "ws_z")
        if of_ws and (missing := _missing_for_ws(problem, config, limits, triton)):
            return f"{kernel} in its variant {config.variant!r} {missing}"
        itemsize = problem.dtype.itemsize
        needed = shared_memory(kernel, config, itemsize, limits, drops(problem, kernel, config))
        if needed > limits.shared_memory:
            return (
                f"{kernel} needs {needed} bytes of shared memory in this configuration, {limits.arch} has "
                f"{limits.shared_memory}"
            )
        if config.variant == "recompute" and problem.R > config.BLOCK_R:
            return f"{kernel} in its variant 'recompute' has BLOCK_R = {config.BLOCK_R} for R = {problem.R}"
        # The interpreter emulates TMA; devices have it from the same architecture on as dependent launch.
        if config.variant == "tma" and not limits.dependent_launch and limits.family != "interpreter":
            return f"{kernel} in its variant 'tma' needs a GPU of sm_90 or newer, not {limits.arch}"
    return None


def _missing_for_ws(
    problem: Problem, config: KernelConfig, limits: DeviceLimits, triton: str | None
) -> str | None:
    if missing := missing_for_ws(limits, triton):
        return missing
    if problem.dtype.itemsize != 2:
        return f"takes 16-bit operands, not {problem.dtype}"
    if problem.R > config.BLOCK_R:
        return f"has BLOCK_R = {config.BLOCK_R} for R = {problem.R}"
    if drops(problem, "expand", config):
        return f"makes no mask, which {problem.op} has with dropout"
    return None


def recipe_to_json(recipe: Recipe, op: str) -> dict:
    """Return what a table holds of a recipe; recipe_from_json reads it back."""
    found: dict = {"name": recipe.name, "configs": {}}
    if op == "backward":
        found["one_pass"] = recipe.kernels.one_pass
        if recipe.kernels.beside:
            found["beside"] = True
    if recipe.name == "fused":
        found["pdl"] = recipe.kernels.pdl
    for kernel in _MAY_USE[op]:
        if config := getattr(recipe.kernels, kernel):
            found["configs"][kernel] = asdict(config)
    return found


def recipe_from_json(value: object) -> Recipe:
    """Read a recipe: an object with `name`, and if need be `one_pass`, `pdl`, `beside` and `configs`.

    Raises ValueError naming what is wrong with it.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a plan is an object, not {shown(value)}")
    if unknown := value.keys() - {"name", "one_pass", "pdl", "beside", "configs"}:
        raise ValueError(f"a plan has no {shown(sorted(unknown))}")
    if value.get("name") not in NAMES:
        raise ValueError(f"a plan's name is 'fused' or 'library', not {shown(value.get('name'))}")
    kernels = KernelPlan()
    for name in ("one_pass", "pdl", "beside"):
        if name in value:
            if not isinstance(value[name], bool):
                raise ValueError(f"{name} is true or false, not {shown(value[name])}")
            kernels = replace(kernels, **{name: value[name]})
    configs = value.get("configs", {})
    if not isinstance(configs, dict) or configs.keys() - set(OPS):
        raise ValueError(f"configs is an object with some of {', '.join(OPS)}, not {shown(configs)}")
    return Recipe(
        value["name"],
        replace(kernels, **{kernel: _config_from_json(kernel, found) for kernel, found in configs.items()}),
    )


def _config_from_json(kernel: str, value: object) -> KernelConfig:
    if not isinstance(value, dict):
        raise ValueError(f"the configuration of {kernel} is an object, not {shown(value)}")
    try:
        config = KernelConfig(**value)
    except TypeError as error:
        raise ValueError(f"the configuration of {kernel} has unknown fields or lacks some") from error
    check_config(kernel, config)
    return config


def check_config(kernel: str, config: KernelConfig) -> None:
    """Raise ValueError, naming the field, for a configuration that no device can launch `kernel` with."""
    if name := wrong_field(kernel, config):
        raise ValueError(f"the configuration of {kernel} has {name}={shown(getattr(config, name))}")
