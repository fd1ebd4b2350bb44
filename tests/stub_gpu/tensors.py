"""Tensors of a device that is not there: they lie on the CPU, whatever device is asked for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
# {storage: the number of its device}, of tensors that pass for those of one device among several.
_placed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def device_of(values: Any) -> int | None:
    """Return the number of the device that the first placed tensor among some values lies on, or None."""
    if isinstance(values, torch.Tensor):
        if values.is_meta or not torch._C._has_storage(values):
            return None
        with torch._C.DisableTorchFunction():
            return _placed.get(values.untyped_storage())
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return None
    return next((found for found in map(device_of, values) if found is not None), None)


def place(values: Any, device: int) -> None:
    """Have tensors that lie nowhere else pass for those of a device."""
    if isinstance(values, torch.Tensor):
        if device_of(values) is None and torch._C._has_storage(values) and not values.is_meta:
            with torch._C.DisableTorchFunction():
                _placed[values.untyped_storage()] = device
    elif isinstance(values, (list, tuple)):
        for value in values:
            place(value, device)


def _asked(value: Any) -> int | None:
    """Return the number of a CUDA device that is named, or None."""
    if isinstance(value, str) and re.fullmatch(r"cuda(:\d+)?", value):
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.cuda.current_device() if value.index is None else value.index
    return None


class OnCPU(TorchFunctionMode):
    """Makes on the CPU what is asked for on "cuda". placing: each such tensor, and what is computed of it,
    says that it lies on the device that was asked for. Not so within an operator of torch.library, which
    runs without modes.
    """

    def __init__(self, placing: bool = False) -> None:
        super().__init__()
        self._placing = placing

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self._placing and function in (DEVICE, IS_CUDA):
            device = device_of(args[0])
            if device is not None:
                return torch.device("cuda", device) if function == DEVICE else True
        if self._placing and function is torch.device:
            return function(*args, **kwargs)
        asked = [found for found in map(_asked, (*args, *kwargs.values())) if found is not None]
        if function is torch.Tensor.cuda:
            asked = [args[1] if len(args) > 1 and isinstance(args[1], int) else torch.cuda.current_device()]
            result = args[0]
        else:
            args = tuple("cpu" if _asked(value) is not None else value for value in args)
            kwargs = {key: "cpu" if _asked(value) is not None else value for key, value in kwargs.items()}
            kwargs.pop("pin_memory", None)
            result = function(*args, **kwargs)
        if self._placing:
            device = asked[0] if asked else device_of((args, kwargs))
            if device is not None:
                if device_of(result) not in (None, device):
                    result = result.clone()
                place(result, device)
        return result


@contextlib.contextmanager
def redirected(placing: bool = False) -> Iterator[None]:
    """Make on the CPU what a block asks for on "cuda", in this thread; placing as in OnCPU."""
    with OnCPU(placing):
        yield
