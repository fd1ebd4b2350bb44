"""Launches of compiled kernels that are repeated: what `kernel[grid](…)` works out anew in each call, once.

Triton binds the arguments of a call by name, looks at each of them for what the code is specialised on, and
finds the compiled kernel by that: most of a launch's time on the host. A Launch does so in its first call,
keeps the compiled kernel with every argument that stays, and hands it to the driver with those that move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from .tile import describe

# Addresses that are multiples of so many bytes are what Triton specialises on.
ALIGNMENT = 16
# Launches that a launcher keeps, a few hundred bytes each: some shapes of each layer of a model (estimate).
MOST = 1024

_caches: list[Launches] = []
_lock = threading.Lock()


class Launches(dict):
    """What a launcher keeps of calls that are alike: {all that its launches depend on: what it made of that}.

    At most MOST entries, the oldest of which goes first. Safe among threads.
    """

    def __init__(self) -> None:
        super().__init__()
        _caches.append(self)

    def keep(self, key: Hashable, value: Any) -> Any:
        """Keep `value` and return it."""
        with _lock:
            while len(self) >= MOST:
                del self[next(iter(self))]
            self[key] = value
        return value


def forget_launches() -> None:
    """Drop all that launchers keep."""
    with _lock:
        for cache in _caches:
            cache.clear()


class Block(NamedTuple):
    """Rows and columns of what one instruction moves of a matrix, or of its transpose."""

    rows: int
    columns: int
    transposed: bool = False


class Launch:
    """kernel[grid](**fixed, **moving), called with the values of `moving` in their order.

    A moving value is a tensor, a number, None, or a tuple of these. It may change its address and its number
    from call to call and nothing else: its dtype, its strides, and whether it is None belong to what the
    caller tells launches apart by. blocks: by name the block of each matrix that the kernel takes by a
    descriptor, which make_descriptor(matrix, rows, columns) makes. fixed: the other arguments, and options
    such as num_warps.
    """

    __slots__ = ("_ready", "blocks", "fixed", "grid", "kernel", "make_descriptor", "moving")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        moving: Sequence[str],
        fixed: Mapping[str, Any],
        blocks: Mapping[str, Block] | None = None,
        make_descriptor: Callable[[Tensor, int, int], Any] = describe,
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.moving = tuple(moving)
        self.fixed = dict(fixed)
        self.blocks = dict(blocks or {})
        self.make_descriptor = make_descriptor
        self._ready: Ready | None = None

    def __call__(self, *values: Any) -> None:
        ready = self._ready
        if ready is not None and not _hooked() and ready.launch(values):
            return
        compiled = self.kernel[self.grid](**self.arguments(values))
        # An interpreted kernel has no code to keep.
        if ready is None and isinstance(compiled, CompiledKernel):
            ready = Ready(compiled, self, values)
            # What is specialised on other addresses serves them alone.
            if ready.filled(values) is not None:
                self._ready = ready

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call."""
        found = dict(zip(self.moving, values, strict=True))
        for name in self.blocks:
            found[name] = self.described(name, found[name])
        return self.fixed | found

    def described(self, name: str, matrix: Tensor) -> Any:
        """Return the descriptor of the matrix of that name."""
        rows, columns, transposed = self.blocks[name]
        return self.make_descriptor(matrix.t() if transposed else matrix, rows, columns)


class Ready:
    """A compiled kernel with its arguments in order, for aligned addresses."""

    __slots__ = ("_arguments", "_descriptors", "_others", "_pointers", "_run", "compiled", "grid", "of")

    def __init__(self, compiled: Any, of: Launch, values: Sequence[Any]) -> None:
        self.of = of
        self.compiled = compiled
        self.grid = (*of.grid, 1, 1)[:3]
        self._run: Callable = compiled.run
        bound = of.arguments(values)
        parameters = of.kernel.params
        places = {parameter.name: place for place, parameter in enumerate(parameters)}
        self._arguments = [bound[name] for name in places]
        self._pointers, self._descriptors, self._others = [], [], []
        for index, (name, value) in enumerate(zip(of.moving, values, strict=True)):
            place = places[name]
            if name in of.blocks:
                made = of.described(name, value)
                self._descriptors.append((index, place, tuple(made.shape), tuple(made.strides)))
            elif isinstance(value, Tensor) and not parameters[place].do_not_specialize:
                self._pointers.append((index, place))
            elif value is not None:
                self._others.append((index, place))

    def launch(self, values: Sequence[Any]) -> bool:
        """Launch on the current stream, or return False where an address is not aligned."""
        arguments = self.filled(values)
        if arguments is None:
            return False
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        compiled = self.compiled
        self._run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )
        return True

    def filled(self, values: Sequence[Any]) -> list[Any] | None:
        """Return all arguments in order, or None where an address is not aligned."""
        arguments = self._arguments.copy()
        addresses = 0
        for index, place in self._pointers:
            arguments[place] = address = values[index].data_ptr()
            addresses |= address
        for index, place, shape, strides in self._descriptors:
            arguments[place] = Descriptor(values[index], shape, strides)
        for index, place in self._others:
            value = values[index]
            if type(value) is tuple:
                value, address = _flat(value)
                addresses |= address
            arguments[place] = value
        return None if addresses % ALIGNMENT else arguments


class Descriptor:
    """What a launcher reads off a TensorDescriptor, that of triton.tools.tensor_descriptor or that of Gluon,
    which check their fields each time they are made. Their block and layout are the compiled kernel's.
    """

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, shape: tuple[int, int], strides: tuple[int, int]) -> None:
        self.base = base
        self.shape = shape
        self.strides = strides


def aligned(*tensors: Tensor) -> bool:
    """Whether these tensors begin at multiples of ALIGNMENT."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % ALIGNMENT == 0


def blocks_of(size: int, block: int) -> int:
    """Return how many blocks cover `size`. triton.cdiv, which takes 2.7 µs (estimate)."""
    return -(-size // block)


def _flat(values: tuple) -> tuple[tuple, int]:
    """Return the values with addresses in the place of tensors, and the addresses together, by or."""
    found, addresses = [], 0
    for value in values:
        if isinstance(value, Tensor):
            value = value.data_ptr()
            addresses |= value
        found.append(value)
    return tuple(found), addresses


def _hooked() -> bool:
    """Whether something wants to see launches, such as a profiler."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # A chain without links, or what somebody put in its place.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
