"""What autograd saves while a block runs, and copies of a model."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn


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


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    """A copy by way of a file."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
