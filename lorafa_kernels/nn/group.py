"""LoRAFALinearGroup: linear layers that share an input, as one module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..engines import frozen_view
from ..group.api import lorafa_linear_group
from ..group.operands import LinearOperands
from ..group.quantised import quantised_linear_group
from ..operands import check_frozen
from .initialise import seed_for
from .linear import LoRAFALinear, check_seed, is_exported, shown
from .quantised import (
    LoRAFAQuantisedLinear,
    Quantised,
    QuantisedLinear,
    base_operands,
    common_compute_dtype,
    dtype_of,
    is_quantised,
)


def operands_of(module: nn.Module) -> LinearOperands:
    """Return what a block needs of an nn.Linear or LoRAFALinear as it is now, with its active adapter: one
    that is merged or has its adapter disabled is a plain linear layer, and dropout acts while it is in
    training mode. A layer that mixes adapters must be asked itself. Of one on a quantised base the weight is
    that base.

    Raises:
        ValueError: a frozen parameter of a LoRAFALinear that requires grad.
        RuntimeError: a merged layer that is being trained.
        TypeError: another module, or a subclass of nn.Linear with a forward of its own.
    """
    if isinstance(module, LoRAFALinear):
        if module.merged and module.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the adapter is merged into the weight: call unmerge() before training, or eval() for "
                "inference"
            )
        if module.merged and not module.adapter_enabled:
            raise RuntimeError(
                "the adapter is merged into the weight and cannot be disabled: call unmerge() first"
            )
        if module.merged or not module.adapter_enabled:
            weight, lora_A, bias = module.frozen_operands(module)
            check_frozen(weight, lora_A, bias)
            return LinearOperands(weight, bias)
        return module.adapter_operands(module.adapter())
    if isinstance(module, QuantisedLinear):
        return base_operands(module)
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(f"{type(module).__name__} is neither an nn.Linear nor a LoRAFALinear")
    return LinearOperands(
        frozen_view(module, "weight", module.weight), frozen_view(module, "bias", module.bias)
    )


def mixes(module: nn.Module) -> bool:
    """Whether `module` is a layer whose rows take adapters by an index now."""
    return isinstance(module, LoRAFALinear) and module._acting is not None and module.mixes()


def own_adapters(members: Iterable[nn.Module]) -> bool:
    """Whether the layers act with their own adapters, and no further ones."""
    return all(not isinstance(m, LoRAFALinear) or m._acting is None or m.adapter() is m for m in members)


class LoRAFALinearGroup(nn.Module):
    """Linear layers that share an input, each with its own adapter or none: `q, k, v = group(x)`.

    x is (..., in_features), and each output (..., its layer's out_features). All are computed in one autograd
    node, with one pass over x for the adapters and one gradient of x that is written once; for backward
    it keeps M·Σr numbers, with share_A M·r, and not x. The layers are children under the names given here,
    so parameters are called `<name>.weight`, `<name>.lora_B` and so on. Their own forward and its hooks are
    not called. A layer that is merged, or has its adapter disabled, acts as the plain linear layer that it is
    then.

    Args:
        members: nn.Linear and LoRAFALinear modules by name, or a sequence of them, which are then called "0",
            "1", …. The parameters of an nn.Linear are frozen.
        share_A: all LoRAFALinear among them have one lora_A Parameter object, r, scaling, dropout and
            gradient_correction.

    Raises:
        ValueError: no members; members that disagree in in_features, dtype or device, with share_A in
            lora_A, scaling, dropout or gradient_correction; what LoRAFALinear.check_linear raises it for.
        TypeError: members that are no modules in a mapping or a sequence; a member that is neither an
            nn.Linear nor a LoRAFALinear; a share_A that is no bool.

    `impl` (default "auto") chooses the implementation, as in lorafa_linear; that of the members is not looked
    at. Members on quantised bases, of any kind, are one node as well if all are, and have one compute_dtype;
    else each is computed by itself.
    """

    # Of groups that were pickled before there was a choice.
    _by_member = False

    def __init__(
        self, members: Mapping[str, nn.Module] | Iterable[nn.Module], *, share_A: bool = False
    ) -> None:
        super().__init__()
        named = _named("members", members)
        if not isinstance(share_A, bool):
            raise TypeError(f"share_A must be True or False, got {shown(share_A)}")
        if not named:
            raise ValueError("members is empty: a group has at least one linear layer")
        self.share_A = share_A
        self.impl = "auto"
        self._names = tuple(named)
        for name in named:
            if not name or "." in name or hasattr(type(self), name) or name in vars(self):
                raise ValueError(
                    f"a member cannot be called {name!r}: names must not be empty, hold a dot, or be an "
                    "attribute of the group"
                )
        self._by_member = any(isinstance(module, Quantised) for module in named.values())
        for name, module in named.items():
            if not isinstance(module, (LoRAFALinear, Quantised)):
                try:
                    LoRAFALinear.check_linear(module)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"member {name!r}: {error}") from None
        _check_alike(named, share_A)
        for name, module in named.items():
            if not isinstance(module, LoRAFALinear):
                module.requires_grad_(False)
            self.add_module(name, module)
        if share_A:
            self.register_load_state_dict_post_hook(_share_loaded)

    @classmethod
    def from_linears(
        cls,
        linears: Mapping[str, nn.Linear] | Iterable[nn.Linear],
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        init_seed: int | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        gradient_correction: bool = False,
        share_A: bool = False,
        adapt: Collection[str] | None = None,
    ) -> LoRAFALinearGroup:
        """Build a group around nn.Linear modules, whose Parameter objects it shares: no copy of a weight.

        adapt: names of those that get an adapter, None for all; the others stay as they are, frozen. Each
        draws from init_seed and its name. The remaining arguments as in LoRAFALinear. For members of
        different rank or scaling, make each with LoRAFALinear.from_linear and pass them to the class. Raises
        as both, and ValueError for a name in adapt that is not among linears.
        """
        named = _named("linears", linears)
        check_seed(init_seed)
        adapt = named if adapt is None else checked_names(adapt, named)
        members: dict[str, nn.Module] = {}
        shared: nn.Parameter | None = None
        for name, linear in named.items():
            if name not in adapt:
                members[name] = linear
                continue
            kind = LoRAFAQuantisedLinear if is_quantised(linear) else LoRAFALinear
            try:
                members[name] = layer = kind.from_linear(
                    linear,
                    r=r,
                    lora_alpha=lora_alpha,
                    lora_dropout=lora_dropout,
                    use_rslora=use_rslora,
                    init_lora_weights=init_lora_weights,
                    init_seed=seed_for(init_seed, name),
                    adapter_dtype=adapter_dtype,
                    gradient_correction=gradient_correction,
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"member {name!r}: {error}") from None
            if share_A:
                if shared is not None and shared.shape == layer.lora_A.shape:
                    layer.lora_A = shared
                shared = layer.lora_A
        return cls(members, share_A=share_A)

    @property
    def members(self) -> tuple[nn.Module, ...]:
        """The linear layers, in the order of the outputs."""
        modules = self._modules
        return tuple(modules[name] for name in self._names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return one output for each member. Raises as lorafa_linear_group and operands_of."""
        if self._by_member or is_exported() or any(map(mixes, self.members)):
            return self._by_members(x)
        operands = [operands_of(module) for module in self.members]
        share_A = self.share_A and own_adapters(self.members)
        return lorafa_linear_group(x, operands, share_A=share_A, impl=self.impl)

    def _by_members(self, x: Tensor) -> tuple[Tensor, ...]:
        """forward where a member is quantised, or operations must stay those of the members."""
        members = self.members
        common = common_compute_dtype(members) if self._by_member and not is_exported() else None
        if common is None:
            return tuple(module(x) for module in members)
        operands = [operands_of(module) for module in members]
        options = {"share_A": self.share_A, "impl": self.impl, "compute_dtype": common[0]}
        return quantised_linear_group(x, operands, **options)

    def extra_repr(self) -> str:
        """Describe the group in print(model)."""
        return "share_A=True" if self.share_A else ""

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.share_A:
            # Where .to() makes new Parameters (from the meta device, say) each member got one of its own.
            adapted = [module for module in self.members if isinstance(module, LoRAFALinear)]
            for module in adapted[1:]:
                module.lora_A = adapted[0].lora_A
        return self


def _share_loaded(group: LoRAFALinearGroup, _incompatible_keys: object) -> None:
    """After load_state_dict(assign=True) each member has a lora_A object of its own: make it one again."""
    adapted = {n: module for n, module in group.named_children() if isinstance(module, LoRAFALinear)}
    if not adapted:
        return
    (first_name, first), *others = adapted.items()
    for name, module in others:
        if module.lora_A is first.lora_A:
            continue
        if not torch.equal(module.lora_A, first.lora_A):
            raise ValueError(
                f"share_A=True, but the state has another lora_A for member {name!r} than for "
                f"{first_name!r}: load a state of a group with share_A=True"
            )
        module.lora_A = first.lora_A


def _named(argument: str, modules: object) -> dict[str, nn.Module]:
    """{name: module} of a mapping or a sequence. Raises TypeError, naming the argument, for anything else."""
    if isinstance(modules, (Mapping, nn.ModuleDict)):
        named = dict(modules.items())
    elif isinstance(modules, Iterable) and not isinstance(modules, (str, bytes, Tensor, nn.Linear)):
        named = {str(index): module for index, module in enumerate(modules)}
    else:
        raise TypeError(f"{argument} must be a list or a dict of linear layers, got {type(modules).__name__}")
    for name, module in named.items():
        if not isinstance(name, str):
            raise TypeError(f"names in {argument} must be str, got {shown(name)}")
        if not isinstance(module, nn.Module):
            raise TypeError(f"member {name!r} is a {type(module).__name__}, expected a linear layer")
    return named


def checked_names(adapt: object, known: Collection[str]) -> Collection[str]:
    """Return the names in `adapt`. Raises TypeError for what holds no str, ValueError for unknown names."""
    if isinstance(adapt, (str, bytes)) or not isinstance(adapt, Collection) or isinstance(adapt, Tensor):
        raise TypeError(f"adapt must be a collection of names or None, got {shown(adapt)}")
    if wrong := [name for name in adapt if not isinstance(name, str)]:
        raise TypeError(f"adapt must hold str only, got {shown(wrong[0])}")
    if unknown := [name for name in adapt if name not in known]:
        raise ValueError(f"adapt names {unknown}, expected names out of {list(known)}")
    return adapt


def _check_alike(named: Mapping[str, nn.Module], share_A: bool) -> None:
    (first_name, first), *others = named.items()
    for name, module in others:
        for what, value, expected in (
            ("in_features", module.in_features, first.in_features),
            ("dtype", dtype_of(module), dtype_of(first)),
            ("device", module.weight.device, first.weight.device),
        ):
            if value != expected:
                raise ValueError(
                    f"member {name!r} has {what} {value}, {first_name!r} has {expected}: both must be the "
                    "same"
                )
    if not share_A:
        return
    adapted = {name: module for name, module in named.items() if isinstance(module, LoRAFALinear)}
    if not adapted:
        return
    (first_name, first), *others = adapted.items()
    for name, module in others:
        for what in ("r", "scaling", "lora_dropout", "gradient_correction"):
            value, expected = getattr(module, what), getattr(first, what)
            if value != expected:
                raise ValueError(
                    f"share_A=True, but member {name!r} has {what} {value}, {first_name!r} has {expected}"
                )
        if module.lora_A is not first.lora_A:
            raise ValueError(
                f"share_A=True, but members {first_name!r} and {name!r} have different lora_A objects: use "
                "from_linears, or assign one to the other"
            )
