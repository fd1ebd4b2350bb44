"""What autograd saves while a block runs, the dense weights that live then, and copies of a model."""

from __future__ import annotations

import copy
import gc
import io

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Saved:
    """Records every tensor that autograd saves inside the context."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __enter__(self) -> Saved:
        def pack(tensor: Tensor) -> Tensor:
            self.tensors.append(tensor)
            return tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._hooks.__exit__(*exc)

    def storages(self) -> set[int]:
        return {tensor.untyped_storage().data_ptr() for tensor in self.tensors}


class DenseWeights(TorchDispatchMode):
    """Counts the storages that operations make, of tensors of these shapes, and that live at a time.

    interpreted: Triton's interpreter runs, which leaves its arguments to the garbage collector.
    """

    def __init__(self, shapes: set[tuple[int, int]], interpreted: bool = False) -> None:
        super().__init__()
        self.shapes, self.alive, self.most, self.interpreted = shapes, {}, 0, interpreted

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in (out,) if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else ():
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage)
        if self.interpreted and len(self.alive) > 1:
            gc.collect()
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        self.most = max(self.most, len(self.alive))
        return out


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    """A copy by way of a file."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
