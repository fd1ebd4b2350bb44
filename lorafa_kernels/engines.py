"""What engines that shard, offload or wrap a model leave in the place of its parameters, and how to tell.

None of them is imported here: what they leave can only be there if they were imported already.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

# Wrappers that hold the model as their child `module`: by class name and the start of its module's.
_HOLDERS = {
    "DataParallel": "torch.",
    "DistributedDataParallel": "torch.",
    "AveragedModel": "torch.",
    "DeepSpeedEngine": "deepspeed.",
    "PipelineEngine": "deepspeed.",
    "InferenceEngine": "deepspeed.",
}
_PLAIN = (Tensor, nn.Parameter)
# Components that torch.compile, FSDP1 and activation checkpointing put into module names.
_COMPONENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def wrapped_child(module: nn.Module) -> str | None:
    """Name of the child that `module` stands for, if it is a wrapper; names of a model leave it out."""
    for name in _COMPONENTS:
        if name in module._modules:
            return name
    return "module" if _is_a(module, _HOLDERS) and "module" in module._modules else None


def _is_a(module: nn.Module, kinds: dict[str, str]) -> bool:
    return any(
        kind.__name__ in kinds and kind.__module__.startswith(kinds[kind.__name__])
        for kind in type(module).__mro__
    )


def sharding_engine(module: nn.Module) -> str | None:
    """Name of the engine that has made `module` itself one of its units, or None."""
    if _is_a(module, {"FSDPModule": "torch."}):
        return "fully_shard"
    if _is_a(module, {"FullyShardedDataParallel": "torch."}):
        return "FullyShardedDataParallel"
    if _is_a(module, {"DistributedDataParallel": "torch."}):
        return "DistributedDataParallel"
    if _is_a(module, {"DeepSpeedEngine": "deepspeed.", "PipelineEngine": "deepspeed."}):
        return "DeepSpeed"
    return None


def plain_class(module: nn.Module) -> type:
    """The class of `module` without those that fully_shard and fused blocks derive from it."""
    for kind in type(module).__mro__:
        if "lorafa_original" not in vars(kind) and not any(c.__name__ == "FSDPModule" for c in kind.__mro__):
            return kind
    return type(module)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, which full_tensor() gathers with all ranks taking part."""
    return hasattr(tensor, "device_mesh")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter of DeepSpeed's ZeRO-3, which whole() gathers."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, whether or not its values are here."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def whole(tensors: Iterable[Tensor], *, writing: bool = False) -> Iterator[None]:
    """Within this context the tensors that ZeRO-3 has partitioned are complete; all ranks take part.

    writing: what rank 0 has written into them is kept.
    """
    partitioned = [tensor for tensor in tensors if is_partitioned(tensor)]
    with ExitStack() as stack:
        if partitioned:
            zero = sys.modules["deepspeed"].zero
            stack.enter_context(zero.GatheredParameters(partitioned, modifier_rank=0 if writing else None))
        yield


def is_plain_tensor(tensor: object) -> bool:
    """Whether `tensor` is torch's own Tensor or Parameter, or the fake of one (torch._subclasses), which has
    its shape, dtype and device and no data. What else is derived from Tensor holds other tensors, or a part.
    """
    return type(tensor) in _PLAIN or _is_fake(type(tensor))


def is_plain_parameter(tensor: object) -> bool:
    """Whether `tensor` is a Parameter of torch's own class, or the fake of one."""
    return type(tensor) is nn.Parameter or (_is_fake(type(tensor)) and isinstance(tensor, nn.Parameter))


def _is_fake(kind: type) -> bool:
    # By name: a module that is not imported has made no fake.
    return kind.__name__ == "FakeTensor" and kind.__module__ == "torch._subclasses.fake_tensor"


def not_plain(tensor: Tensor) -> str | None:
    """Why `tensor` is none that the operations compute with, or None. A fake tensor, which stands for a
    plain one, is plain.
    """
    kind = type(tensor)
    if is_dtensor(tensor):
        return "a DTensor: adapt the model before it is sharded (fully_shard, parallelize_module)"
    if is_plain_tensor(tensor):
        return None
    return (
        f"a {kind.__module__}.{kind.__name__}, a subclass of Tensor that is not supported: quantise or wrap "
        "the weights after adapting the model, or leave this layer out"
    )


def manager_of(module: nn.Module, name: str) -> str | None:
    """Name of the engine that puts its own tensor into the place of module.<name> at each forward, so that
    an assignment to it is lost; None if there is none.
    """
    parameter = getattr(module, name)
    if getattr(parameter, "_fsdp_flattened", False) or name not in module._parameters:
        return "FullyShardedDataParallel"
    if is_partitioned(parameter):
        return "DeepSpeed's ZeRO-3"
    if _is_fully_sharded(module):
        return "fully_shard"
    return "a device mesh (parallelize_module, distribute_tensor)" if is_dtensor(parameter) else None


def frozen_view(module: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
    """`tensor`, which stands for module.<name>; detached where the parameter itself is frozen.

    FSDP1 (use_orig_params=True) shows views of one flat parameter during forward. These all require grad if
    one parameter among them does, and the flat parameter keeps the others.
    """
    if tensor is None or not tensor.requires_grad or tensor.grad_fn is None:
        return tensor
    node = tensor.grad_fn
    while node.next_functions and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    flat = getattr(node, "variable", None)
    kept = [
        *zip(getattr(flat, "_param_infos", ()), getattr(flat, "_params", None) or (), strict=False),
        *zip(
            getattr(flat, "_shared_param_infos", ()),
            getattr(flat, "_shared_params", None) or (),
            strict=False,
        ),
    ]
    for info, parameter in kept:
        if info.module is module and info.param_name == name:
            return tensor if parameter.requires_grad else tensor.detach()
    return tensor


def is_managed(tensor: Tensor) -> bool:
    """Whether `tensor` is a parameter that FSDP1 or ZeRO-3 gives other memory in each forward, with nothing
    that tells whether the values are others, too.
    """
    return bool(getattr(tensor, "_fsdp_flattened", False)) or is_partitioned(tensor)


class GatheredFrom(NamedTuple):
    """The sharded parameter that fully_shard gathers a tensor from, as it was at some time."""

    # What fully_shard keeps of the parameter.
    holder: weakref.ref
    sharded: weakref.ref
    versions: tuple[int, int]

    def is_unchanged(self) -> bool:
        """Whether it is the same parameter, and has not been written into since."""
        holder = self.holder()
        sharded = None if holder is None else holder.sharded_param
        return sharded is not None and sharded is self.sharded() and _versions(sharded) == self.versions


def gathered_from(tensor: Tensor) -> GatheredFrom | None:
    """Of a tensor that fully_shard has gathered, what it was gathered from; None for any other."""
    for holder in _fully_sharded_parameters():
        if getattr(holder, "_unsharded_param", None) is tensor:
            sharded = holder.sharded_param
            return GatheredFrom(weakref.ref(holder), weakref.ref(sharded), _versions(sharded))
    return None


def _versions(sharded: Tensor) -> tuple[int, int]:
    """Of a DTensor and its shard: an operation on the one does not count in the other."""
    return sharded._version, sharded._local_tensor._version


def _fully_sharded_parameters() -> Iterator[Any]:
    """What the parameter groups of fully_shard keep of each parameter."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in filter(None, groups):
            yield from getattr(group, "fsdp_params", ())


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether a parameter group of fully_shard holds parameters of `module`. Between a forward and the next
    one these can be plain tensors, so the groups are asked.
    """
    for parameter in _fully_sharded_parameters():
        info = getattr(parameter, "_module_info", None)
        if module is getattr(info, "module", None):
            return True
        if any(module is other for other in getattr(info, "shared_modules", ())):
            return True
    return False
