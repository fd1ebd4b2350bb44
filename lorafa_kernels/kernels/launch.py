"""Launches of compiled kernels that are repeated: what `kernel[grid](…)` works out anew in each call, once.

Triton binds the arguments of a call by name, looks at each of them for what the code is specialised on, and
finds the compiled kernel by that: most of a launch's time on the host. A Launch, which serves one shape,
keeps the compiled kernel with every argument that stays, and hands it to the driver with those that move.
Its first call finds the kernel by what it is specialised on, if any shape has had it compiled before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .tile import describe

try:
    # By which Triton tells the arguments of a call apart.
    from triton._C.libtriton import native_specialize_impl as specialise
except ImportError:
    specialise = None

# Versions of Triton whose own way from a call to the driver is the one of this file; others are left to it.
TRIED = "3.6.", "3.7."
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

    __slots__ = ("_latest", "_ready", "blocks", "fixed", "grid", "kernel", "make_descriptor", "moving")

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
        # The one for addresses that are not all aligned.
        self._latest: Ready | None = None

    def __call__(self, *values: Any) -> None:
        key = None
        if not _hooked():
            for ready in (self._ready, self._latest):
                if ready is not None and ready.launch(values):
                    return
            key = specialisation(self, values)
        compiled = None if key is None else _COMPILED.get(key)
        if compiled is not None:
            ready = Ready(compiled, self, values)
            ready.launch(values)
        else:
            compiled = self.kernel[self.grid](**self.arguments(values))
            # An interpreted kernel has no code to keep.
            if key is None or not isinstance(compiled, CompiledKernel):
                return
            ready = Ready(_COMPILED.keep(key, compiled), self, values)
        if ready.lasting and ready.aligned:
            self._ready = ready
        elif ready.lasting:
            self._latest = ready

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call."""
        found = dict(zip(self.moving, values, strict=True))
        for name, block in self.blocks.items():
            matrix = found[name].t() if block.transposed else found[name]
            found[name] = self.make_descriptor(matrix, block.rows, block.columns)
        return self.fixed | found


class Ready:
    """A compiled kernel with its arguments in order, for the device that is current, and for addresses that
    are aligned where those of `values` are.
    """

    __slots__ = (
        "_alignment",
        "_arguments",
        "_descriptors",
        "_device",
        "_others",
        "_pointers",
        "_run",
        "_tuples",
        "compiled",
        "grid",
        "lasting",
        "of",
    )

    def __init__(self, compiled: Any, of: Launch, values: Sequence[Any]) -> None:
        self.of = of
        self.compiled = compiled
        self.grid = (*of.grid, 1, 1)[:3]
        self._run: Callable = compiled.run
        self._device = driver.active.get_current_device()
        parameters = signature_of(of.kernel).parameters
        self._arguments = [of.fixed.get(name, one.default) for name, one in parameters.items()]
        self._pointers, self._tuples, self._descriptors, self._others = [], [], [], []
        # Code may be specialised on a number that moves: it serves this call alone.
        self.lasting = True
        for index, (name, value) in enumerate(zip(of.moving, values, strict=True)):
            parameter = parameters[name]
            place = parameter.num
            if name in of.blocks:
                shape, strides = tuple(value.shape), value.stride()
                if of.blocks[name].transposed:
                    shape, strides = shape[::-1], strides[::-1]
                self._descriptors.append((index, place, shape, strides))
            elif type(value) is tuple:
                self._tuples.append((index, place, not parameter.do_not_specialize))
            elif isinstance(value, Tensor) and not parameter.do_not_specialize:
                self._pointers.append((index, place))
            elif value is not None:
                self._others.append((index, place))
            if not parameter.do_not_specialize:
                self.lasting &= int not in map(type, value if type(value) is tuple else (value,))
        self._alignment = None
        if self.filled(values) is None:
            self._alignment = self._alignment_of(values)

    @property
    def aligned(self) -> bool:
        """Whether it is for addresses that are all aligned."""
        return self._alignment is None

    def launch(self, values: Sequence[Any]) -> bool:
        """Launch on the current stream, or return False where filled() returns None."""
        arguments = self.filled(values)
        if arguments is None:
            return False
        stream = driver.active.get_current_stream(self._device)
        compiled = self.compiled
        self._run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )
        return True

    def filled(self, values: Sequence[Any]) -> list[Any] | None:
        """Return all arguments in order, or None for another device or addresses that need other code."""
        if driver.active.get_current_device() != self._device:
            return None
        arguments = self._arguments.copy()
        addresses = 0
        for index, place in self._pointers:
            arguments[place] = address = values[index].data_ptr()
            addresses |= address
        for index, place, shape, strides in self._descriptors:
            arguments[place] = Descriptor(values[index], shape, strides)
        for index, place, specialised in self._tuples:
            arguments[place], address = _flat(values[index])
            if specialised:
                addresses |= address
        for index, place in self._others:
            arguments[place] = values[index]
        if self._alignment is None:
            return None if addresses % ALIGNMENT else arguments
        return arguments if self._alignment_of(values) == self._alignment else None

    def _alignment_of(self, values: Sequence[Any]) -> tuple[bool, ...]:
        """Of each address that the code is specialised on, whether it is aligned."""
        tensors = [values[index] for index, _ in self._pointers]
        for index, _, specialised in self._tuples:
            if specialised:
                tensors += [one for one in values[index] if isinstance(one, Tensor)]
        return tuple([tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors])


class Signature:
    """The parameters of a kernel, by name: one object for each kernel."""

    __slots__ = ("kernel", "parameters")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.parameters = {parameter.name: parameter for parameter in kernel.params}


def signature_of(kernel: Any) -> Signature:
    """Return the signature of a kernel."""
    # A kernel's own hash takes a lock.
    found = _SIGNATURES.get(id(kernel))
    return _SIGNATURES.keep(id(kernel), Signature(kernel)) if found is None else found


_SIGNATURES = Launches()
_COMPILED = Launches()
_TELLS = specialise is not None and triton.__version__.startswith(TRIED)


def specialisation(of: Launch, values: Sequence[Any]) -> Hashable:
    """Return what Triton would find the compiled kernel of a call by, on the current device, or None where it
    must be asked: for what is no kernel of its own, for one with hooks or annotated parameters, and in a
    version that has not been TRIED.
    """
    kernel = of.kernel
    runtime = triton.knobs.runtime
    if not (_TELLS and isinstance(kernel, JITFunction)):
        return None
    if kernel.pre_run_hooks or runtime.add_stages_inspection_hook is not None:
        return None
    device = driver.active.get_current_device()
    *_, backend, _ = kernel.device_caches[device]
    signature = signature_of(kernel)
    parameters = signature.parameters
    how = kernel.debug or runtime.debug, triton.knobs.compilation.instrumentation_mode
    found: list[Hashable] = [signature, device, how]
    for names, numbers in ((of.fixed, of.fixed.values()), (of.moving, values)):
        for name, value in zip(names, numbers, strict=True):
            parameter = parameters.get(name)
            if parameter is None or parameter.is_constexpr:
                # 1 and True are equal, and other constants.
                found += name, type(value), value
            elif name in of.blocks:
                found += name, value.dtype, of.blocks[name], of.make_descriptor
            elif parameter.annotation_type:
                return None
            else:
                kind = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
                found += name, specialise(backend, value, parameter.is_const, *kind)
    return tuple(found)


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
