"""A GPU that is not there: Triton compiles for it, builds its launchers, and launches into a stub driver.

    python -m tests.stub_gpu [--arch sm_90] SCRIPT.py [argument …]
    python -m tests.stub_gpu [--arch sm_90] -m MODULE [argument …]

runs a program as it would run beside a GPU, for everything between a Python call and the device: nothing is
computed, and results are whatever lay in memory. In the program torch.cuda reports one device, "STUB sm_90",
tensors asked for on "cuda" lie on the CPU, and the library takes its kernels for them. LORAFA_STUB_GPU names
the architecture there, in processes that the program starts as well (which have no stub of their own).

What was launched is kept as data: each launch with its device, stream, grid, block, shared memory,
attributes, tensor maps and the bytes of every argument, and what is wrong with it, by CUDA's rules
(cuda_stub.c) and against what was asked for: a launch that never reached the driver, arguments that are not
those of the call, a dependent launch without the instruction that waits, or behind a kernel that does not
let its dependent start. Events are kept beside launches, in the order of all threads; order.py says what
waits for what.

Streams and devices are those of torch.cuda, per thread (streams.py). With several devices, a tensor that is
asked for on one of them says that it lies there, in the threads of redirected(placing=True) (tensors.py).

One process has one architecture, and no interpreter: install() must come before anything imports Triton.
Needs Linux, a C compiler and Python's headers, as Triton's launchers do (missing() says what is not there).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "LORAFA_STUB_GPU"
SOURCE = Path(__file__).with_name("cuda_stub.c")
MAP_MAGIC = b"STUBTMAP"
TRIGGERS = "griddepcontrol.launch_dependents"
MOST_DEVICES = 16


@dataclass(frozen=True)
class Device:
    """Limits of a GPU as its driver reports them (CUDA programming guide, tables of compute capabilities)."""

    major: int
    minor: int
    multiprocessors: int
    shared_memory_optin: int
    shared_memory_per_multiprocessor: int
    memory: int
    level_2_cache: int


# A100 (SXM, 80 GB), H100 (SXM) and B200.
DEVICES = {
    "sm_80": Device(8, 0, 108, 163 * 1024, 164 * 1024, 80 << 30, 40 << 20),
    "sm_90": Device(9, 0, 132, 227 * 1024, 228 * 1024, 80 << 30, 50 << 20),
    "sm_100": Device(10, 0, 148, 227 * 1024, 228 * 1024, 180 << 30, 126 << 20),
}


@dataclass
class Launch:
    """One launch of a Triton kernel: what was asked for, what reached the driver, and what is wrong."""

    kernel: str
    grid: tuple[int, ...]
    device: int = -1  # -1: it did not reach the driver
    stream: int = -1  # handle, 0 for the default stream
    order: int = -1  # among launches and events, of all threads
    thread: int = 0
    block: int = 0
    shared_memory: int = 0
    cluster: tuple[int, ...] = (1, 1, 1)
    dependent: bool = False  # launched by programmatic stream serialization
    repeated: bool = False  # by a kernel that was kept (kernels/launch.py), not through Triton's JIT
    waits: bool = False  # has griddepcontrol.wait
    triggers: bool = False  # has griddepcontrol.launch_dependents
    arguments: int = 0  # parameters of the compiled kernel
    constants: dict = field(default_factory=dict)  # the call's constexpr arguments
    maps: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """What is asked of an event or of a stream: "record", "wait" or "synchronize"."""

    what: str
    device: int
    stream: int  # as in Launch
    order: int
    thread: int
    event: int = -1  # its number, of "record" and "wait"
    of: int = -1  # the order of the record that is waited for, or -1
    host: str = ""  # of "synchronize", where the host waits: for "stream", "event" or "device"


_happened: list[Launch | Mark] = []
_keeping = threading.Lock()
_stub: Stub | None = None


def missing() -> str | None:
    """Say what a stub GPU lacks on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return f"the stub driver is for Linux, this is {sys.platform}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (_headers() / "cuda.h").exists():
        return "this triton is not for NVIDIA: it has no cuda.h"
    if not _compiler():
        return "no C compiler: set CC or install gcc or clang"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return f"no headers of Python in {sysconfig.get_paths()['include']}"
    return None


def happened() -> list[Launch | Mark]:
    """Return the launches and the marks since the last call, or that of launches(), in order."""
    with _keeping:
        taken = sorted(_happened, key=lambda one: one.order)
        _happened.clear()
    return taken


def launches() -> list[Launch]:
    """Return the launches since the last call, in order."""
    return [one for one in happened() if isinstance(one, Launch)]


def faults(of: list[Launch]) -> list[str]:
    """Return what is wrong with some launches, in their order."""
    return [f"{launch.kernel}: {fault}" for launch in of for fault in launch.faults]


def install(arch: str = "sm_90", *, redirect: bool = False, watch: bool = True, devices: int = 1) -> Stub:
    """Make this process see so many GPUs of architecture `arch`, one of DEVICES.

    redirect: tensors that are asked for on "cuda" are made on the CPU, so that programs for a GPU run. watch:
    keep launches and events, what is wrong with them, and in backward the stream of forward; without it a
    launch takes its own time alone. Returns the driver.
    """
    global _stub
    if _stub is not None:
        raise RuntimeError("there is a stub GPU in this process already")
    if not 1 <= devices <= MOST_DEVICES:
        raise ValueError(f"devices is {devices}, expected 1 to {MOST_DEVICES}")
    if arch not in DEVICES:
        raise ValueError(f"arch is {arch!r}, expected one of {', '.join(DEVICES)}")
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the stub driver could take the place of libcuda")
    if lacks := missing():
        raise RuntimeError(lacks)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ[VARIABLE] = arch
    folder = cache_folder()
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ["TRITON_LIBCUDA_PATH"] = str(build(folder))
    _stub = Stub(arch, Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1")
    _present(arch)
    from . import streams, tensors

    placing = devices > 1
    streams.present(streams.Devices(_stub.library, devices, _keep_marks if watch else None))
    if watch:
        _watch_launches(_stub)
        streams.follow_in_backward(tensors if placing else None)
    else:
        _stub.library.stub_quiet(1)
    _open_the_library()
    if redirect:
        tensors.OnCPU(placing).__enter__()
    return _stub


class Stub:
    """The stub driver of this process."""

    def __init__(self, arch: str, path: Path, mode: int = ctypes.RTLD_GLOBAL):
        # What is loaded later by the name libcuda.so.1 is this one.
        self.library = ctypes.CDLL(str(path), mode=mode)
        self.library.stub_take.restype = ctypes.c_void_p
        self.library.stub_free.argtypes = (ctypes.c_void_p,)
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.library.stub_declare.argtypes = (pointer, number, ctypes.POINTER(number), number)
        self.library.stub_order.restype = self.library.stub_launched.restype = ctypes.c_longlong
        self.become(arch)

    def become(self, arch: str) -> None:
        """Have the limits of another device."""
        device = DEVICES[arch]
        self.library.stub_device(
            device.major,
            device.minor,
            device.multiprocessors,
            device.shared_memory_optin,
            device.shared_memory_per_multiprocessor,
        )

    def take(self) -> list[dict]:
        """Return the driver's records since the last call, those of this thread."""
        taken = self.library.stub_take()
        text = ctypes.string_at(taken).decode()
        self.library.stub_free(taken)
        return [json.loads(line) for line in text.splitlines()]

    def declare(self, function: int, ptx: str) -> None:
        """Tell what the driver reads off the code of a loaded function."""
        sizes = parameter_sizes(ptx)
        self.library.stub_declare(function, len(sizes), (ctypes.c_int * len(sizes))(*sizes), TRIGGERS in ptx)

    @property
    def launched(self) -> int:
        """How many launches reached the driver, those that are not watched too."""
        return self.library.stub_launched()


def _compiler() -> str | None:
    if named := os.environ.get("CC"):
        return shutil.which(named.split()[0])
    return shutil.which("gcc") or shutil.which("clang")


def _headers() -> Path:
    """The folder with CUDA's headers that come with Triton."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "include"


def cache_folder() -> Path:
    """Where the built driver and what Triton compiled are kept: their names hold what they are made from."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "lorafa_kernels" / "stub_gpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="stub-gpu-"))


def build(folder: Path) -> Path:
    """Return the folder that holds libcuda.so.1, built if it is not there yet."""
    include = _headers()
    key = hashlib.sha256(SOURCE.read_bytes() + (include / "cuda.h").read_bytes()).hexdigest()[:16]
    library = folder / f"driver-{key}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=library.parent)
        os.close(handle)
        options = ("-O1", "-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1", f"-I{include}")
        subprocess.run([_compiler(), *options, "-o", partial, str(SOURCE)], check=True)
        # Two processes may build it at a time.
        os.replace(partial, library)
    return library.parent


def _present(arch: str) -> None:
    """Make torch.cuda report GPUs. It keeps its own functions for what needs a real one."""
    import torch

    limits = DEVICES[arch]
    name = f"STUB {arch}"
    properties = types.SimpleNamespace(
        name=name,
        major=limits.major,
        minor=limits.minor,
        multi_processor_count=limits.multiprocessors,
        shared_memory_per_block_optin=limits.shared_memory_optin,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_multiprocessor=limits.shared_memory_per_multiprocessor,
        total_memory=limits.memory,
        L2_cache_size=limits.level_2_cache,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        uuid="stub",
    )
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: (limits.major, limits.minor),
        "get_device_properties": lambda device=None: properties,
        "get_arch_list": lambda: [arch],
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "mem_get_info": lambda device=None: (limits.memory, limits.memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_stats": lambda device=None: {},
    }
    for key, value in replaced.items():
        setattr(torch.cuda, key, value)


def _keep_marks() -> list[str]:
    """Keep what the driver recorded of events and streams in this thread, and return its faults."""
    faults = []
    for record in _stub.take():
        faults += record["faults"]
        if record["call"] in ("record", "wait", "synchronize"):
            more = {key: record[key] for key in ("event", "of") if key in record}
            where = record["device"], record["stream"], record["order"], threading.get_ident()
            with _keeping:
                _happened.append(Mark(record["call"], *where, **more, host=record.get("what", "")))
    return faults


def _watch_launches(stub: Stub) -> None:
    """Keep what each call of a Triton kernel asks for beside what reached the driver."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    ready = importlib.import_module("lorafa_kernels.kernels.launch").Ready
    load, run, repeat = CompiledKernel._init_handles, JITFunction.run, ready.launch

    def load_and_declare(self):
        fresh = self.module is None
        load(self)
        if fresh and self.function is not None:
            stub.declare(self.function, self.asm["ptx"])

    def keep(kernel, grid, kwargs: dict, launch_it, repeated: bool = False):
        """Launch, and keep what was asked for beside what reached the driver. launch_it launches, and returns
        the compiled kernel.
        """
        launch = Launch(kernel.__name__.strip("_"), () if callable(grid) else tuple(grid), repeated=repeated)
        launch.thread = threading.get_ident()
        constants = (parameter.name for parameter in kernel.params if parameter.is_constexpr)
        launch.constants = {name: kwargs[name] for name in constants if name in kwargs}
        stub.take()
        compiled = None
        try:
            compiled = launch_it()
        except Exception as error:
            launch.faults.append(f"{type(error).__name__}: {error}".strip().splitlines()[0])
            raise
        finally:
            records = stub.take()
            launch.maps = [record for record in records if record["call"] == "map"]
            launch.faults += [fault for record in records for fault in record["faults"]]
            reached = [record for record in records if record["call"] == "launch"]
            if reached:
                _describe(launch, reached[0])
            else:
                launch.order = stub.library.stub_order()
            if compiled is not None:
                asked = _flat_arguments(compiled, kernel, kwargs)
                launch.faults += _disagreements(launch, compiled, reached, asked)
            with _keeping:
                _happened.append(launch)
        return compiled

    def run_and_keep(self, *args, grid, warmup, **kwargs):
        if warmup:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        return keep(self, grid, named, lambda: run(self, grid=grid, warmup=False, **named))

    def repeat_and_keep(self, values) -> bool:
        # What it makes of an address that is not aligned goes through the other function.
        if self.filled(values) is None:
            return False
        keep(
            self.of.kernel,
            self.of.grid,
            self.of.arguments(values),
            lambda: repeat(self, values) and self.compiled,
            repeated=True,
        )
        return True

    CompiledKernel._init_handles = load_and_declare
    JITFunction.run = run_and_keep
    ready.launch = repeat_and_keep


def _describe(launch: Launch, record: dict) -> None:
    launch.device, launch.stream, launch.order = record["device"], record["stream"], record["order"]
    launch.block = record["block"][0] * record["block"][1] * record["block"][2]
    launch.shared_memory = record["shared_memory"]
    launch.cluster = tuple(record["cluster"])
    launch.dependent = record["dependent"]
    launch.arguments = len(record["parameters"])


def _disagreements(launch: Launch, compiled, reached: list[dict], asked: list[bytes]) -> list[str]:
    """Say where what reached the driver is not what was asked for, or breaks the order of its stream."""
    if len(reached) != 1:
        return [f"asked for on a grid of {launch.grid} and launched {len(reached)} times"]
    found = []
    record = reached[0]
    if launch.grid:
        wanted = [*launch.grid, 1, 1][:3]
        wanted[0] *= record["cluster"][0]
        if record["grid"] != wanted:
            found.append(f"launched on a grid of {record['grid']}, not {wanted}")
    passed = [None if text is None else bytes.fromhex(text) for text in record["parameters"]]
    # Two more for the memory that a launcher would allocate.
    if len(passed) != len(asked) + 2:
        found.append(f"the kernel has {len(passed)} parameters, the call makes {len(asked)} and two")
    for index, (got, want) in enumerate(zip(passed, asked, strict=False)):
        if got is None or not _same(got, want, launch.maps):
            shown = "unreadable" if got is None else got[:16].hex()
            found.append(f"parameter {index} of {len(passed)} is {shown}, not {want[:16].hex()}")
            break
    ptx = compiled.asm["ptx"]
    launch.waits = "griddepcontrol.wait" in ptx
    launch.triggers = TRIGGERS in ptx
    if launch.waits != launch.dependent:
        is_or_not = "a dependent launch" if launch.dependent else "no dependent launch"
        found.append(f"{is_or_not}, and {'waits' if launch.waits else 'does not wait'} for the kernel before")
    # Of the same stream.
    if launch.dependent and not record["before_triggers"]:
        before = record["before"].strip("_") or "nothing"
        found.append(f"a dependent launch behind {before}, which lets none start early")
    return found


def _same(got: bytes, want: bytes, maps: list[dict]) -> bool:
    if not want.startswith(MAP_MAGIC):
        return got == want
    # A map is known by its number; what it describes must be the descriptor of this argument.
    number = struct.unpack_from("<I", got, 8)[0] if got.startswith(MAP_MAGIC) else -1
    described = next((one for one in maps if one["id"] == number), None)
    return described is not None and _map_key(described) == want


def _map_key(described: dict) -> bytes:
    what = (described["address"], described["dims"][::-1], described["strides"][::-1])
    return MAP_MAGIC + repr(what).encode()


def parameter_sizes(ptx: str) -> list[int]:
    """Return the sizes in bytes of the parameters of the one kernel in a PTX text."""
    declared = re.search(r"\.entry\s+\S+?\s*\((.*?)\)", ptx, re.DOTALL)
    pattern = r"\.param\s+(?:\.align\s+\d+\s+)?\.\w(\d+)\b[^,\n]*?_param_\d+(?:\[(\d+)\])?"
    found = re.findall(pattern, declared[1]) if declared else []
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def _flat_arguments(compiled, kernel, kwargs: dict) -> list[bytes]:
    """Return the bytes that a launcher must pass for a call: those of its arguments that are no constants, in
    order; for a descriptor a key of its map, its shape and its strides.
    """
    named = {key: value for key, value in kwargs.items() if key in kernel.signature.parameters}
    bound = kernel.signature.bind(**named).arguments
    flat: list[bytes] = []
    for name, kind in compiled.src.signature.items():
        _flatten(kind, bound.get(name), flat)
    return flat


_PACKED = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "f32": "f", "fp64": "d"}
_PACKED |= {"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp16": "e"}


def _flatten(kind, value, flat: list[bytes]) -> None:
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            _flatten(one, part, flat)
    elif kind.startswith("*"):
        flat.append(struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else int(value or 0)))
    elif kind.startswith("tensordesc"):
        size = value.base.element_size()
        strides = [stride * size for stride in value.strides[:-1]]
        described = {
            "address": value.base.data_ptr(),
            "dims": list(value.shape)[::-1],
            "strides": strides[::-1],
        }
        flat.append(_map_key(described))
        flat += [struct.pack("<i", length) for length in value.shape]
        flat += [struct.pack("<q", stride) for stride in value.strides]
    elif kind != "constexpr":
        flat.append(struct.pack(f"<{_PACKED[kind]}", value))


def _open_the_library() -> None:
    """Let the library choose for tensors on the CPU as for tensors on the first GPU: they are alike."""
    import torch

    choice = importlib.import_module("lorafa_kernels.plan.choice")
    gpu = torch.device("cuda", 0)

    def elsewhere(device: torch.device) -> torch.device:
        return gpu if device.type == "cpu" else device

    choose, choose_plan = choice.choose, choice.choose_plan
    _replace(choose, lambda impl, device, *rest: choose(impl, elsewhere(device), *rest))
    _replace(
        choose_plan,
        lambda impl, op, device, *rest, **more: choose_plan(impl, op, elsewhere(device), *rest, **more),
    )


def _replace(function, other) -> None:
    """Put `other` in the place of a function of the library, wherever a module of it holds the name."""
    for name in ("cache_clear", "cache_info", "__wrapped__"):
        if hasattr(function, name):
            setattr(other, name, getattr(function, name))
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lorafa_kernels":
            for key, value in list(vars(module).items()):
                if value is function:
                    setattr(module, key, other)


@contextlib.contextmanager
def recording(marks: bool = False) -> Iterator[list]:
    """Collect the launches of a block in the list that it gets, with `marks` those of events as well."""
    happened()
    found: list[Launch | Mark] = []
    try:
        yield found
    finally:
        found += [one for one in happened() if marks or isinstance(one, Launch)]
