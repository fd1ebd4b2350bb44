"""torch.cuda's devices, streams and events over the stub driver.

What torch documents of them is torch's own Python: torch.cuda.device, stream, set_stream, current_stream,
Stream and Event. Here stands what these call of C++, which a build without CUDA lacks: the device and the
streams that are current in a thread, and streams and events, which the driver makes and records.

What is not imitated: PyTorch's own operators on tensors, which run on the CPU at once, on no stream; and of
autograd all but the stream and the device that the backward of a torch.autograd.Function has current. On a
GPU its engine runs that in threads of its own, lets the stream of one node wait for that of another, and in
the end the caller's stream for those of all leaves; here it runs in the caller's thread, and nothing waits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

# torch.cuda.Stream() hands out so many of a device and priority in turn (c10/cuda/CUDAStream.cpp).
POOL = 32
CUDA = 1  # c10::DeviceType

_devices: Devices


class Here(threading.local):
    """What is current in a thread: a device, and of each device the handle of a stream."""

    def __init__(self, devices: int) -> None:
        self.device = 0
        self.streams = [0] * devices


class Devices:
    """Devices of a stub driver. keep: called with the driver's records behind each call that makes some; None
    where nothing is recorded.
    """

    def __init__(self, library: ctypes.CDLL, count: int, keep: Callable[[], list[str]] | None) -> None:
        self._library = library
        self._keep = keep
        self.count = count
        self.here = Here(count)
        self._pools: dict[tuple[int, int], list[int]] = {}
        self._turns: dict[tuple[int, int], itertools.count] = {}
        self._lock = threading.Lock()
        library.stub_devices(count)
        self._contexts = []
        for device in range(count):
            context = ctypes.c_void_p()
            library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
            self._contexts.append(context)

    def set(self, device: int) -> None:
        """Make a device current in this thread."""
        if not 0 <= device < self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal {device}: there are {self.count}")
        self._library.cuCtxSetCurrent(self._contexts[device])
        self.here.device = device

    def exchange(self, device: int) -> int:
        """The same, and return the one before; a negative one stays out of it."""
        if device < 0:
            return -1
        before = self.here.device
        if device != before:
            self.set(device)
        return before

    def call(self, device: int, name: str, *arguments: Any) -> None:
        """Call the driver with the context of a device current, as CUDA's runtime does."""
        self._library.cuCtxSetCurrent(self._contexts[device])
        status = getattr(self._library, name)(*arguments)
        self._library.cuCtxSetCurrent(self._contexts[self.here.device])
        faults = self._keep() if self._keep else []
        if status:
            raise RuntimeError(f"CUDA error {status} of {name}: {', '.join(faults)}")

    @property
    def recorded(self) -> bool:
        """Whether the driver records what streams and events do."""
        return self._keep is not None

    def new_stream(self, device: int, priority: int) -> int:
        """Return the handle of the next stream of a pool."""
        with self._lock:
            pool = self._pools.setdefault((device, priority), [])
            turn = next(self._turns.setdefault((device, priority), itertools.count())) % POOL
            if turn == len(pool):
                handle = ctypes.c_void_p()
                self.call(device, "cuStreamCreate", ctypes.byref(handle), 1)
                pool.append(handle.value)
            return pool[turn]

    def set_stream(self, stream_id: int, device_index: int, device_type: int = CUDA) -> None:
        """Make a stream current on its device, and that device in this thread."""
        self.exchange(device_index)
        self.here.streams[device_index] = stream_id

    def stream_data(self, device: int) -> tuple[int, int, int]:
        """Return id, device and type of the stream that is current on a device."""
        return self.here.streams[device], device, CUDA


class StreamBase:
    """torch._C._CudaStreamBase: a stream of the pool, or that of an id or a handle."""

    def __new__(cls, priority=0, stream_id=None, device_index=None, device_type=CUDA, stream_ptr=0):
        self = object.__new__(cls)
        self.device_index = _devices.here.device if device_index is None else device_index
        self.device_type = device_type
        self.priority = max(-5, min(0, priority))
        if stream_id is None:
            stream_id = stream_ptr or _devices.new_stream(self.device_index, self.priority)
        # In torch an id holds the number in a pool; here it is the handle.
        self.stream_id = self.cuda_stream = stream_id
        return self

    @property
    def device(self):
        # Not what the thread may make of "cuda" (tensors.py).
        with torch._C.DisableTorchFunction():
            return torch.device("cuda", self.device_index)

    def __eq__(self, other) -> bool:
        return (self.cuda_stream, self.device_index) == (other.cuda_stream, other.device_index)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if _devices.recorded:
            _devices.call(self.device_index, "cuStreamSynchronize", ctypes.c_void_p(self.cuda_stream))


class EventBase:
    """torch._C._CudaEventBase: made on the device of the stream that it is first recorded on. Its time is
    the host's: there is no other.
    """

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False, external=False):
        self = object.__new__(cls)
        self._handle = ctypes.c_void_p()
        self._timed = enable_timing
        self._seconds = 0.0
        self.device = None
        return self

    @property
    def cuda_event(self) -> int:
        return self._handle.value or 0

    def record(self, stream) -> None:
        if self.device is None:
            self.device = stream.device
            if _devices.recorded:
                _devices.call(stream.device_index, "cuEventCreate", ctypes.byref(self._handle), 0)
        if self.device != stream.device:
            raise RuntimeError(
                f"Event device {self.device} does not match recording stream's device {stream.device}."
            )
        if _devices.recorded:
            handle = ctypes.c_void_p(stream.cuda_stream)
            _devices.call(stream.device_index, "cuEventRecord", self._handle, handle)
        self._seconds = time.perf_counter()

    def wait(self, stream) -> None:
        if self._handle:
            handle = ctypes.c_void_p(stream.cuda_stream)
            _devices.call(stream.device_index, "cuStreamWaitEvent", handle, self._handle, 0)

    def synchronize(self) -> None:
        if self._handle:
            _devices.call(self.device.index, "cuEventSynchronize", self._handle)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.device is None or end.device is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1e3 * (end._seconds - self._seconds)


def present(devices: Devices) -> None:
    """Put streams and devices in the place of those that torch was built without."""
    global _devices
    _devices = devices
    here = devices.here
    kept = torch._C._CudaStreamBase, torch._C._CudaEventBase
    torch._C._CudaStreamBase, torch._C._CudaEventBase = StreamBase, EventBase
    try:
        # Once more, for the classes have the bases that there were when torch was imported.
        spec = importlib.util.spec_from_file_location("torch.cuda.streams", torch.cuda.streams.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        torch._C._CudaStreamBase, torch._C._CudaEventBase = kept

    def make(cls, device=None, priority=0, **kwargs):
        # As torch's own, which asks first whether torch was built for CUDA.
        if device is None:
            return StreamBase.__new__(cls, priority=priority, **kwargs)
        with torch.cuda.device(device):
            return StreamBase.__new__(cls, priority=priority, **kwargs)

    module.Stream.__new__ = make
    for name in ("Stream", "ExternalStream", "Event"):
        setattr(torch.cuda, name, getattr(module, name))
        setattr(torch.cuda.streams, name, getattr(module, name))
    index_of = torch.cuda._get_device_index

    def index_of_any(device, optional=False, allow_cpu=False):
        if isinstance(device, str):
            with torch._C.DisableTorchFunction():
                device = torch.device(device)
        # Where tensors lie, whatever device a program has asked for.
        if isinstance(device, torch.device) and device.type == "cpu" and not allow_cpu:
            return here.device
        return index_of(device, optional, allow_cpu)

    torch.cuda._get_device_index = index_of_any
    torch.cuda.device_count = lambda: devices.count
    torch.cuda.current_device = torch._C._cuda_getDevice = lambda: here.device
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = devices.exchange
    torch._C._cuda_setDevice = devices.set
    torch._C._cuda_setStream = devices.set_stream
    torch._C._cuda_getCurrentStream = devices.stream_data
    torch._C._cuda_getDefaultStream = lambda device: (0, device, CUDA)
    torch._C._cuda_getCurrentRawStream = lambda device: here.streams[device]

    def synchronize() -> None:
        if devices.recorded:
            devices.call(here.device, "cuCtxSynchronize")

    torch._C._cuda_synchronize = synchronize


def follow_in_backward(tensors: ModuleType | None) -> None:
    """Run the backward of a torch.autograd.Function with the stream and the device current that its forward
    had, as autograd does where its results lie on a GPU. tensors: the module that says on which device
    arguments lie, and has gradients lie there; None where there is one device.
    """
    function = torch.autograd.function
    node = function.BackwardCFunction
    applied = threading.local()

    def remember(self) -> None:
        # Made by torch.autograd.Function.apply, in the thread of forward.
        self.forward_stream = torch.cuda.current_stream(getattr(applied, "device", None))

    def following(run):
        def run_there(self, *grads):
            with torch.cuda.stream(self.forward_stream):
                if tensors is None:
                    return run(self, *grads)
                # The engine computes on the CPU, and has left the mode where it was called through it.
                tensors.place(grads, self.forward_stream.device_index)
                with tensors.redirected(placing=True):
                    return run(self, *grads)

        return run_there

    node.__init__ = remember
    for name in ("apply", "apply_boxed"):
        if hasattr(node, name):
            setattr(node, name, following(getattr(node, name)))
    if tensors is None:
        return
    begin = torch.autograd.Function.apply.__func__

    def apply(cls, *arguments, **named):
        before = getattr(applied, "device", None)
        applied.device = tensors.device_of(arguments)
        try:
            return begin(cls, *arguments, **named)
        finally:
            applied.device = before

    torch.autograd.Function.apply = classmethod(apply)
