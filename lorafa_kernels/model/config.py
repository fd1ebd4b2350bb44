"""LoRAFAConfig: which linear layers are adapted and how; field names, defaults and matching rules are those
of PEFT 0.21's `LoraConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ..nn.linear import INITIALISATIONS, LARGEST_RANK, as_integer, as_number, check_seed, shown
from .fields import FurtherFields
from .patterns import check_expression, compiled

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAFAConfig(FurtherFields):
    """Which linear layers get an adapter, and what kind (fields, defaults and rules of PEFT 0.21's
    `LoraConfig`).

    r, lora_alpha: rank and numerator of the scaling, lora_alpha / r, or lora_alpha / √r with `use_rslora`.
    target_modules: list: modules whose name is an entry or ends in "." + entry. str: a regular expression for
        the whole name, or "all-linear": every linear layer but the output embedding. None: the default of
        the model's architecture, from PEFT's own table where PEFT is installed, else "all-linear".
    exclude_modules: list or str like target_modules; these modules are left alone all the same.
    modules_to_save: modules whose name ends in an entry are trained whole and saved with the adapter.
    layers_to_transform: int or list: only layers of these indices. Goes with a list of target_modules, and
        does not bind a module that the list names in full.
    layers_pattern: str or list: the name before the index, "layers" say; any name without it.
    rank_pattern, alpha_pattern: {regular expression for the end of a name: r or lora_alpha}; "^" asks for the
        whole name, the first match counts.
    lora_dropout: dropout on the adapter's input, in [0, 1).
    init_lora_weights: as in `LoRAFALinear`: True, False, "gaussian" or "orthogonal".
    init_seed: what each layer draws lora_A from, together with its name: the same values on every device and
        rank, whatever else is adapted; None: from the default generator. Not saved: the file has lora_A.
    gradient_correction: correct lora_B's gradient as LoRA-FA's second version does, as in `LoRAFALinear`. Not
        a field of PEFT's: it is saved only where it is True, and PEFT warns that it ignores it.
    task_type and the other fields of `LoraConfig` are keywords: those that change nothing here are kept and
        written back, of the others the default is accepted. For SEQ_CLS, TOKEN_CLS and QUESTION_ANS the
        model's head (classifier, score, qa_outputs) is trained whole, as by PEFT.
    adapter_dtype: dtype of lora_B.

    Raises ValueError, naming the field, for a value that is none of these.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    gradient_correction: bool = False
    init_seed: int | None = None

    def __post_init__(self, *unsupported: Any) -> None:
        self.check_further(unsupported)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        object.__setattr__(self, "layers_to_transform", _indices(self.layers_to_transform))
        object.__setattr__(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern, _rank))
        object.__setattr__(self, "alpha_pattern", _pattern("alpha_pattern", self.alpha_pattern, _alpha))

        object.__setattr__(self, "r", _rank("r", self.r))
        object.__setattr__(self, "lora_alpha", _alpha("lora_alpha", self.lora_alpha))
        dropout = as_number(self.lora_dropout)
        if dropout is None or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {shown(self.lora_dropout)}")
        object.__setattr__(self, "lora_dropout", dropout)
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be True or False, got {shown(self.use_rslora)}")
        check_seed(self.init_seed)
        if not isinstance(self.gradient_correction, bool):
            raise ValueError(
                f"gradient_correction must be True or False, got {shown(self.gradient_correction)}"
            )
        if self.gradient_correction and 0 in (self.lora_alpha, *self.alpha_pattern.values()):
            raise ValueError("gradient_correction divides by the scaling: lora_alpha must not be 0")
        # By type as well: 1 equals True, and a config file may hold anything.
        if (
            not isinstance(self.init_lora_weights, (bool, str))
            or self.init_lora_weights not in INITIALISATIONS
        ):
            raise ValueError(
                f"init_lora_weights must be one of {INITIALISATIONS}, got {shown(self.init_lora_weights)}"
            )
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                "target_modules must say which layers to adapt: a list of module names, a regular "
                f'expression, or "{ALL_LINEAR}"; got {self.target_modules!r}'
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of module names, got {self.modules_to_save!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs target_modules to be a list, it is a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, the indices of the layers to adapt")

    @property
    def all_linear(self) -> bool:
        """Whether target_modules is "all-linear", in any case."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """(r, lora_alpha) of the module `name`: of the first pattern that matches, else the common ones."""
        return _lookup(self.rank_pattern, name, self.r), _lookup(self.alpha_pattern, name, self.lora_alpha)

    def scaling(self, name: str) -> float:
        """The factor on the adapter of the module `name`."""
        r, lora_alpha = self.rank_and_alpha(name)
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)


def _rank(name: str, value: Any) -> int:
    rank = as_integer(value)
    if rank is None or not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"{name} must be an integer from 1 to 2**31 - 1, got {shown(value)}")
    return rank


def _alpha(name: str, value: Any) -> float:
    alpha = as_number(value)
    if alpha is None:
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    return alpha


# What stands around an expression of each field where it is matched.
_AROUND = {
    "rank_pattern": (r"(.*\.)?(", ")"),
    "alpha_pattern": (r"(.*\.)?(", ")"),
    "modules_to_save": (r"(.*\.)?(?:", r")(\..*)?"),
    "layers_pattern": (r"(.*?\.)??(?:", r")\.(?P<lorafa_index>\d+)\.(?s:.*)"),
}


def expression_of(field: str, source: str) -> str:
    before, after = _AROUND[field]
    return before + source + after


def _strings(name: str, value: Any) -> list[str] | str | None:
    """A checked copy of a field that holds names; a set is sorted, since its order is none."""
    if value is None:
        return None
    if isinstance(value, str):
        check_expression(name, value, *_AROUND.get(name, ()))
        return value
    if not isinstance(value, Iterable) or isinstance(value, (bytes, dict)):
        raise ValueError(f"{name} must be a list of str, got {shown(value)}")
    try:
        entries = list(value)
    except TypeError:
        entries = [None]
    if not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(f"{name} must be a list of non-empty str, got {shown(value)}")
    if name in _AROUND:
        for entry in entries:
            check_expression(name, entry, *_AROUND[name])
    return sorted(entries) if isinstance(value, (set, frozenset)) else entries


def _indices(value: Any) -> list[int] | int | None:
    if value is None:
        return None
    if (index := as_integer(value)) is not None:
        return index
    try:
        entries = [as_integer(entry) for entry in value]
    except TypeError:
        entries = [None]
    if None in entries:
        raise ValueError(f"layers_to_transform must be an int or a list of int, got {shown(value)}")
    return entries


def _pattern(name: str, value: Any, check: Callable[[str, Any], Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a dict from str to numbers, got {shown(value)}")
    for key in value:
        check_expression(name, key, *_AROUND[name])
    return {key: check(f"{name}[{shown(key)}]", entry) for key, entry in value.items()}


def ends_as(name: str, source: str) -> bool:
    return compiled(expression_of("rank_pattern", source)).matches(name)


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if ends_as(name, key)), default)
