"""Which adapter each sample of a batch takes, and which rows of x (M, K) are whose.

A batch has B samples, x (B, ..., K) is made of M = B·S rows, and row m belongs to sample m // S. The index
has a number for each sample: that of its adapter, or −1 for the base layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

BASE = -1
_DTYPES = (torch.int32, torch.int64)


class Rows:
    """The index of a batch, checked: `places`, a number for each sample, on the host, and the same as an
    int32 tensor (B,) on each device that asks for it. `device`: where the caller's tensor was, None for a
    list.
    """

    def __init__(self, places: tuple[int, ...], device: torch.device | None = None) -> None:
        self.places = places
        self.device = device
        self._tensors: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, index: Tensor | Iterable[int], count: int) -> Rows:
        """Check `index`, an int32 or int64 tensor (B,) or integers, against `count` adapters.

        The values of a tensor are read, once. Raises ValueError for another shape or dtype and for a number
        that is not in [−1, count); TypeError for what is neither.
        """
        device = None
        if isinstance(index, Tensor):
            if index.dtype not in _DTYPES or index.dim() != 1:
                raise ValueError(
                    f"index is {index.dtype} of shape {tuple(index.shape)}, expected int32 or int64 of shape "
                    "(B,), a number for each sample of the batch"
                )
            device, places = index.device, index.tolist()
        else:
            if isinstance(index, (str, bytes)) or not isinstance(index, Iterable):
                raise TypeError(f"index must be a tensor or a sequence, got {type(index).__name__}")
            places = list(index)
            for place in places:
                if isinstance(place, bool) or not isinstance(place, Integral):
                    raise ValueError(f"index holds {place!r:.80}, expected integers")
        for sample, place in enumerate(places):
            if not BASE <= place < count:
                raise ValueError(
                    f"index[{sample}] is {place}, expected a number from -1 (no adapter) to {count - 1}"
                )
        return cls(tuple(map(int, places)), device)

    def on(self, device: torch.device) -> Tensor:
        """Return the index as an int32 tensor (B,) on `device`, one object for all who ask."""
        if device not in self._tensors:
            # An inference tensor could not be kept for backward.
            with torch.inference_mode(False):
                self._tensors[device] = torch.tensor(self.places, dtype=torch.int32, device=device)
        return self._tensors[device]

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is (B, ..., K), on the device of the index."""
        if x.dim() < 2 or x.shape[0] != len(self.places):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, the index has {len(self.places)} entries: the first "
                "dimension of x must be the samples of the batch"
            )
        if self.device is not None and self.device != x.device:
            raise ValueError(f"index is on {self.device}, x on {x.device}: both must be on one device")


def rows_of(index: Tensor, places: Sequence[int], number: int, M: int) -> slice | Tensor | None:
    """Return the rows of x (M, K) that adapter `number` has: a slice where they follow each other, else their
    numbers, int64 in ascending order; None if there is none. index and places as in Rows.
    """
    count = places.count(number)
    if not count or not M:
        return None
    size = M // len(places)
    first = places.index(number)
    if all(place == number for place in places[first : first + count]):
        return slice(first * size, (first + count) * size)
    # Stable, so that the rows of an adapter keep their order: sums over them are the same in every run.
    before = sum(place < number for place in places)
    samples = torch.argsort(index, stable=True)[before : before + count]
    return (samples[:, None] * size + torch.arange(size, device=index.device)).reshape(-1)


class SortedRows:
    """The rows of x (M, K) sorted by adapter, as kernels/mixed.py reads them: tables on a device, made on the
    host when they are first asked for.

    ranks: of each entry of numbers. order: the samples by adapter, those without one first, in the order of
    the batch within each, int32 (B,). adapters: the places in numbers of those that have rows.
    """

    def __init__(
        self,
        device: torch.device,
        places: Sequence[int],
        numbers: Sequence[int],
        ranks: Sequence[int],
        M: int,
    ) -> None:
        place_of = {number: place for place, number in enumerate(numbers)}
        of_samples = [place_of.get(number, BASE) for number in places]
        samples = sorted(range(len(places)), key=of_samples.__getitem__)
        size = M // len(places)
        self._device = device
        self._tables: dict[tuple, Tensor] = {}
        self._tiles: dict[int, Tensor] = {}
        # As a tile of all its rows: adapter, first, count, rank.
        self._runs: dict[int, tuple[int, int, int, int]] = {}
        first = 0
        for place in sorted(set(of_samples)):
            count = of_samples.count(place) * size
            self._runs[place] = place, first, count, 0 if place == BASE else ranks[place]
            first += count
        self.adapters = tuple(place for place in self._runs if place != BASE)
        self.order = self._table(samples, torch.int32)

    def tiles(self, block: int) -> Tensor:
        """Return tiles of at most `block` rows, int32 (T, 4)."""
        if block not in self._tiles:
            found = [
                (place, first + start, min(block, count - start), rank)
                for place, first, count, rank in self._runs.values()
                for start in range(0, count, block)
            ]
            self._tiles[block] = self._table(found, torch.int32)
        return self._tiles[block]

    def runs(self, adapters: Sequence[int]) -> Tensor:
        """Return the whole of the rows of some adapters, int32 (n, 4)."""
        return self._table([self._runs[place] for place in adapters], torch.int32)

    def reals(self, values: Sequence[float]) -> Tensor:
        """Return numbers as an fp32 tensor."""
        return self._table(values, torch.float32)

    def integers(self, values: Sequence[int]) -> Tensor:
        """Return numbers as an int32 tensor."""
        return self._table(values, torch.int32)

    def _table(self, values: Sequence, dtype: torch.dtype) -> Tensor:
        key = dtype, tuple(values)
        if key not in self._tables:
            self._tables[key] = torch.tensor(values, dtype=dtype, device=self._device)
        return self._tables[key]


# By index, as long as that lives: all layers of a forward and its backward share what is made of it.
_sorted: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sorted_rows(
    index: Tensor, places: Sequence[int], numbers: Sequence[int], ranks: Sequence[int], M: int
) -> SortedRows:
    """Return the rows of x (M, K) sorted by adapter, one object for all who ask with the same index."""
    of_index = _sorted.setdefault(index, {})
    key = tuple(numbers), tuple(ranks), M
    if key not in of_index:
        of_index[key] = SortedRows(index.device, places, numbers, ranks, M)
    return of_index[key]
