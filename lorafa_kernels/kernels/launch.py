"""Launches of compiled kernels that are repeated: what `kernel[grid](…)` works out anew in each call, once.

Triton binds the arguments of a call by name, looks at each of them for what the code is specialised on, and
finds the compiled kernel by that: most of a launch's time on the host. A Launch, which serves one shape,
keeps the compiled kernel with every argument that stays, and hands it to the driver with those that move.
Its first call finds the kernel by what it is specialised on, if any shape has had it compiled before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton import knobs
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
# Launches that a launcher keeps, 2 KiB each: some shapes of each layer of a model (estimate).
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

    __slots__ = (
        "__weakref__",
        "_latest",
        "_ready",
        "blocks",
        "fixed",
        "grid",
        "kernel",
        "make_descriptor",
        "moving",
    )

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
        if not _watched():
            for ready in (self._ready, self._latest):
                if ready is not None and ready.launch(values):
                    return
            key = specialisation(self, values)
        code = None if key is None else _CODES.get(key)
        ready = None if code is None else Ready(code, self, values)
        if ready is None or not ready.launch(values):
            compiled = self.kernel[self.grid](**self.arguments(values))
            # An interpreted kernel has no code to keep.
            if key is None or not isinstance(compiled, CompiledKernel):
                return
            code = _CODES.keep(key, Code(compiled, self, values))
            ready = Ready(code, self, values)
        if code.lasting and code.aligned:
            self._ready = ready
        elif code.lasting:
            self._latest = ready

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the keyword arguments of a call."""
        found = dict(zip(self.moving, values, strict=True))
        for name, block in self.blocks.items():
            matrix = found[name].t() if block.transposed else found[name]
            found[name] = self.make_descriptor(matrix, block.rows, block.columns)
        return self.fixed | found


class Code:
    """A compiled kernel on a device, and where the values of the calls that it serves go among its arguments.

    The numbers are indices of values, with the place of each in the kernel's signature. pointers: tensors
    whose alignment the code is specialised on. tuples: and whether it is on the alignment of their tensors.
    matrices: what descriptors are made of, and whether of the transpose. others: the rest. alignment: which
    addresses are aligned, None where all are. lasting: whether it serves calls with other numbers too, not
    so where it is specialised on integers. hooks: those of the kernel itself, which may get some yet.
    """

    __slots__ = (
        "alignment",
        "compiled",
        "device",
        "driver",
        "hooks",
        "lasting",
        "matrices",
        "others",
        "places",
        "pointers",
        "run",
        "tuples",
    )

    def __init__(self, compiled: Any, of: Launch, values: Sequence[Any]) -> None:
        self.compiled = compiled
        self.run: Callable = compiled.run
        self.driver = driver.active
        self.device = self.driver.get_current_device()
        self.hooks = of.kernel.pre_run_hooks
        self.lasting = True
        signature = signature_of(of.kernel)
        self.places = signature.places
        self.pointers, self.tuples, self.matrices, self.others = [], [], [], []
        for index, (name, value) in enumerate(zip(of.moving, values, strict=True)):
            place, (_, specialised, by_alignment) = signature.places[name], signature.kinds[name]
            on_alignment = specialised and by_alignment
            if name in of.blocks:
                self.matrices.append((index, place, of.blocks[name].transposed))
            elif type(value) is tuple:
                self.tuples.append((index, place, on_alignment))
            elif on_alignment and isinstance(value, Tensor):
                self.pointers.append((index, place))
            elif value is not None:
                self.others.append((index, place))
            if specialised:
                # A bool is an integer, too.
                of_value = value if type(value) is tuple else (value,)
                self.lasting &= not any(isinstance(one, int) for one in of_value)
        alignment = self.alignment_of(values)
        self.alignment = None if all(alignment) else alignment

    @property
    def aligned(self) -> bool:
        """Whether it is for addresses that are all aligned."""
        return self.alignment is None

    def alignment_of(self, values: Sequence[Any]) -> tuple[bool, ...]:
        """Of each address that the code is specialised on, whether it is aligned."""
        tensors = [values[index] for index, _ in self.pointers]
        for index, _, on_alignment in self.tuples:
            if on_alignment:
                tensors += [one for one in values[index] if isinstance(one, Tensor)]
        return tuple([tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors])


class Ready:
    """A compiled kernel with its arguments in order, for the device that is current, and for addresses that
    are aligned where those of `values` are.
    """

    __slots__ = ("_arguments", "_code", "_descriptors", "_of", "compiled", "grid")

    def __init__(self, code: Code, of: Launch, values: Sequence[Any]) -> None:
        # What keeps this: a launch that is dropped must go at once, not when cycles are collected.
        self._of = weakref.ref(of)
        self.compiled = code.compiled
        self.grid = (*of.grid, 1, 1)[:3]
        self._code = code
        self._arguments = list(map(of.fixed.get, code.places))
        self._descriptors = []
        for index, place, transposed in code.matrices:
            shape, strides = tuple(values[index].shape), values[index].stride()
            if transposed:
                shape, strides = shape[::-1], strides[::-1]
            self._descriptors.append((index, place, shape, strides))

    @property
    def of(self) -> Launch | None:
        """The launch that this is for, while it is there."""
        return self._of()

    def launch(self, values: Sequence[Any]) -> bool:
        """Launch on the current stream, or return False where filled() returns None."""
        arguments = self.filled(values)
        if arguments is None:
            return False
        code, compiled = self._code, self.compiled
        stream = code.driver.get_current_stream(code.device)
        code.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )
        return True

    def filled(self, values: Sequence[Any]) -> list[Any] | None:
        """Return all arguments in order, or None for another device, addresses that need other code, and a
        kernel with hooks.
        """
        code = self._code
        if code.hooks or code.driver.get_current_device() != code.device:
            return None
        arguments = self._arguments.copy()
        addresses = 0
        for index, place in code.pointers:
            arguments[place] = address = values[index].data_ptr()
            addresses |= address
        for index, place, shape, strides in self._descriptors:
            arguments[place] = Descriptor(values[index], shape, strides)
        for index, place, on_alignment in code.tuples:
            arguments[place], address = _flat(values[index])
            if on_alignment:
                addresses |= address
        for index, place in code.others:
            arguments[place] = values[index]
        if code.alignment is None:
            return None if addresses % ALIGNMENT else arguments
        return arguments if code.alignment_of(values) == code.alignment else None


# Of nearly every parameter: not const, specialised on its value and on its alignment.
USUAL = False, True, True


class Order:
    """Names of a kernel's arguments and options in the order of a call: one object for each.

    constants: which of them are constexpr or options. usual: which are of the kind USUAL. others: which are
    neither, and kinds, the kinds of those.
    """

    __slots__ = ("constants", "kinds", "others", "usual")

    def __init__(self, kinds: Sequence[tuple[bool, bool, bool] | None]) -> None:
        self.constants = [kind is None for kind in kinds]
        self.usual = [kind is USUAL for kind in kinds]
        self.others = [not (kind is None or kind is USUAL) for kind in kinds]
        self.kinds = tuple(compress(kinds, self.others))


class Signature:
    """What a kernel's own signature says: one object for each kernel.

    kinds: of each parameter whether it is const, whether code is specialised on its value, and whether on its
    alignment, in the object USUAL where that is it; None of a constexpr. plain: no parameter has a default or
    a type.
    """

    __slots__ = ("_orders", "kernel", "kinds", "places", "plain")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.places = {parameter.name: parameter.num for parameter in kernel.params}
        self.kinds: dict[str, tuple[bool, bool, bool] | None] = {}
        for one in kernel.params:
            kind = one.is_const, not one.do_not_specialize, not one.do_not_specialize_on_alignment
            self.kinds[one.name] = None if one.is_constexpr else USUAL if kind == USUAL else kind
        self.plain = not any(one.has_default or one.annotation_type for one in kernel.params)
        self._orders: dict[tuple[str, ...], Order] = {}

    def order(self, names: tuple[str, ...]) -> Order:
        """Return what there is to know of these arguments and options of a call."""
        found = self._orders.get(names)
        if found is None:
            found = self._orders.setdefault(names, Order([self.kinds.get(name) for name in names]))
        return found


def signature_of(kernel: Any) -> Signature:
    """Return the signature of a kernel."""
    # A kernel's own hash takes a lock.
    found = _SIGNATURES.get(id(kernel))
    return _SIGNATURES.keep(id(kernel), Signature(kernel)) if found is None else found


_SIGNATURES = Launches()
_CODES = Launches()
_TELLS = specialise is not None and triton.__version__.startswith(TRIED)


def specialisation(of: Launch, values: Sequence[Any]) -> Hashable:
    """Return what Triton would find the compiled kernel of a call by, on the current device, or None where it
    must be asked: for what is no kernel of its own, for one with hooks or annotated parameters, and in a
    version that has not been TRIED.
    """
    kernel = of.kernel
    if not (_TELLS and isinstance(kernel, JITFunction)) or kernel.pre_run_hooks:
        return None
    signature = signature_of(kernel)
    if not signature.plain:
        return None
    device = driver.active.get_current_device()
    *_, backend, _ = kernel.device_caches[device]
    order = signature.order(tuple(of.fixed))
    kinds, blocks = signature.kinds, of.blocks
    fixed = of.fixed.values()
    constants = tuple(compress(fixed, order.constants))
    # Calls with arguments that are written out take a third of the time of those with a star.
    return (
        order,
        device,
        constants,
        # 1 and True are equal.
        tuple(map(type, constants)),
        tuple([specialise(backend, value, False, True, True) for value in compress(fixed, order.usual)]),
        tuple(
            [
                specialise(backend, value, *kind)
                for value, kind in zip(compress(fixed, order.others), order.kinds, strict=True)
            ]
        ),
        of.moving,
        tuple(
            [
                (value.dtype, blocks[name], of.make_descriptor)
                if name in blocks
                else specialise(backend, value, False, True, True)
                if (kind := kinds[name]) is USUAL
                else specialise(backend, value, *kind)
                for name, value in zip(of.moving, values, strict=True)
            ]
        ),
    )


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


def _watched() -> bool:
    """Whether something wants to see launches, such as a profiler, or to have other code than is kept: both
    are Triton's own call's to serve.
    """
    runtime = knobs.runtime
    if runtime.debug or runtime.add_stages_inspection_hook is not None:
        return True
    if knobs.compilation.instrumentation_mode:
        return True
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # A chain without links, or what somebody put in its place.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
