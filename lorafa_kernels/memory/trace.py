"""What is allocated while a training step runs, seen by a dispatch mode: every storage once, from the
operation that makes it to its end.

It works on fake tensors (torch._subclasses.FakeTensorMode), where nothing is computed and nothing allocated,
and on real ones. What a kernel allocates inside itself is not seen: a table says it, by operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "weights", "adapters", "gradients", "optimizer"
KEPT, LOSS, TEMPORARIES, INPUTS = "kept activations", "logits and loss", "temporaries", "inputs"
KINDS = (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, KEPT, LOSS, TEMPORARIES, INPUTS)
# What is there before a step and after it.
FIXED = (WEIGHTS, ADAPTERS, OPTIMIZER, INPUTS)
# (operation's arguments, its outputs) -> bytes that its kernel allocates for the time of the call.
Temporary = Callable[[tuple, dict, object], int]


@dataclass
class Segment:
    """The part of a step between two marks: the most bytes that were live in it, and these by kind."""

    peak: int = -1
    kinds: dict[str, int] = field(default_factory=dict)


class LiveStorages(TorchDispatchMode):
    """Follows storages from their allocation to their end.

    temporaries: {operation: Temporary}. granule: allocations are rounded up to multiples of it, in bytes.
    """

    def __init__(self, temporaries: Mapping[object, Temporary] | None = None, granule: int = 1) -> None:
        super().__init__()
        self.stopped_at: str | None = None
        self._temporaries = temporaries or {}
        self._granule = granule
        self._serials: dict[int, int] = {}
        self._sizes: list[int] = []
        self._kinds: list[str | None] = []
        # serial + 1 where a storage begins, −(serial + 1) where it ends.
        self._events: list[int] = []
        self._marks: list[tuple[int, Hashable]] = []
        # What is made now is of this kind; None: kept or temporary, which shows later.
        self.kind: str | None = None

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the storage of `tensor`, of one of KINDS, unless it counts already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._serials:
            if kind is not None:
                self._kinds[self._serials[key]] = kind
            return
        serial = self._serials[key] = self._begin(storage.nbytes(), kind or self.kind)
        weakref.finalize(storage, self._end, key, serial).atexit = False

    def name(self, tensor: Tensor, kind: str) -> None:
        """Make the storage of `tensor` one of `kind` if it is followed."""
        serial = self._serials.get(tensor.untyped_storage()._cdata)
        if serial is not None:
            self._kinds[serial] = kind

    def mark(self, name: Hashable) -> None:
        """Begin a segment."""
        self._marks.append((len(self._events), name))

    def _begin(self, size: int, kind: str | None) -> int:
        serial = len(self._sizes)
        self._sizes.append(-(-size // self._granule) * self._granule)
        self._kinds.append(kind)
        self._events.append(serial + 1)
        return serial

    def _end(self, key: int, serial: int) -> None:
        if self._serials.get(key) == serial:
            del self._serials[key]
        self._events.append(-(serial + 1))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except Exception:
            self.stopped_at = str(func)
            raise
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if (temporary := self._temporaries.get(func)) and (size := temporary(args, kwargs, out)):
            serial = self._begin(size, TEMPORARIES)
            self._events.append(-(serial + 1))
        return out

    def live_at(self, name: Hashable) -> set[int]:
        """Serials of the storages that were live at the mark `name`."""
        end = next(position for position, mark in self._marks if mark == name)
        live: set[int] = set()
        for event in self._events[:end]:
            (live.add if event > 0 else live.discard)(abs(event) - 1)
        return live

    def bytes_at(self, name: Hashable, kinds: tuple[str | None, ...]) -> int:
        """Bytes of these kinds that were live at the mark `name`."""
        return sum(self._sizes[s] for s in self.live_at(name) if self._kinds[s] in kinds)

    def settle(self, kept_at: Hashable) -> None:
        """Give a kind to all that has none: kept if it was live at the mark `kept_at`, else temporary."""
        kept = self.live_at(kept_at)
        for serial, kind in enumerate(self._kinds):
            if kind is None:
                self._kinds[serial] = KEPT if serial in kept else TEMPORARIES

    def segments(self) -> dict[Hashable, Segment]:
        """Return the segments by their marks; marks of one name share one. Call settle first."""
        live = dict.fromkeys(KINDS, 0)
        total, place, found = 0, 0, {}
        current = Segment()
        marks = [*self._marks, (len(self._events), None)]
        for end, name in marks:
            for event in self._events[place:end]:
                serial = abs(event) - 1
                size = self._sizes[serial] if event > 0 else -self._sizes[serial]
                total += size
                live[self._kinds[serial]] += size
                if total > current.peak:
                    current.peak, current.kinds = total, dict(live)
            place = end
            if name is not None:
                current = found.setdefault(name, Segment())
                if total > current.peak:
                    current.peak, current.kinds = total, dict(live)
        return found


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]
