"""Run beside a stub driver of two devices by test_streams_of_launches.py: prints what it found, as JSON.

{operation: {call: [[kernel, whether it was a kept launch, device, stream, faults], …]}}, where a stream has
the name that it has here.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator

import torch

from lorafa_kernels import lorafa_linear
from lorafa_kernels.base.frozen import quantised
from lorafa_kernels.group.api import lorafa_linear_group
from lorafa_kernels.group.operands import LinearOperands
from lorafa_kernels.kernels.expand import expand
from lorafa_kernels.kernels.grad import grad
from lorafa_kernels.kernels.group import expand_total
from lorafa_kernels.kernels.launch import forget_launches
from lorafa_kernels.kernels.shrink import shrink
from lorafa_kernels.linear.quantised import quantised_linear
from lorafa_kernels.mixed.api import lorafa_linear_mixed
from lorafa_kernels.mixed.rows import Rows
from lorafa_kernels.mlp.api import lorafa_gated_mlp
from lorafa_kernels.plan.config import KernelConfig, KernelPlan
from lorafa_kernels.plan.pin import pin_plan
from lorafa_kernels.plan.recipe import Recipe
from tests import stub_gpu
from tests.stub_gpu.tensors import redirected

PORTABLE = KernelConfig(64, 64, 32, 16, 4, 4, 2)
TMA = KernelConfig(128, 128, 64, 16, 8, 8, 3, "tma", EPILOGUE_SUBTILE=2)
WS = KernelConfig(128, 128, 64, 16, 8, 8, 3, "ws", EPILOGUE_SUBTILE=2)
WS_Z = KernelConfig(128, 128, 64, 16, 8, 8, 2, "ws_z", EPILOGUE_SUBTILE=2)
CODES = KernelConfig(16, 32, 128, 64, 1, 4, 4, "codes")
SHRINK = KernelConfig(64, 0, 64, 16, 1, 4, 3)
GRAD = KernelConfig(64, 64, 0, 16, 4, 4, 2)
K, N, R = 256, 512, 16
# On two devices.
THREADS = 4


def bf16(*shape: int, device: str, **more) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, device=device, **more)


# Of kernels' launchers. A function makes its operands on a device, and returns what launches.


def of_shrink(device: str) -> Callable[[], object]:
    rows, factor = bf16(128, K, device=device), bf16(R, K, device=device)
    return lambda: shrink(rows, factor.t(), 2.0, config=SHRINK)


def of_expand(config: KernelConfig) -> Callable[[str], Callable[[], object]]:
    def of(device: str) -> Callable[[], object]:
        P, Q = bf16(256, K, device=device), bf16(K, N, device=device)
        L, F = bf16(256, R, device=device), bf16(R, N, device=device)
        return lambda: expand(P, Q, L, F, config=config, unaligned=PORTABLE)

    return of


def of_total(config: KernelConfig) -> Callable[[str], Callable[[], object]]:
    def of(device: str) -> Callable[[], object]:
        P, Q = bf16(256, K, device=device), bf16(K, N, device=device)
        L, F = bf16(256, R, device=device), bf16(R, N, device=device)
        return lambda: expand_total([P, P], [Q, Q], [L], [F], config=config, unaligned=PORTABLE)

    return of


def of_grad(device: str) -> Callable[[], object]:
    dy, z, lora_B = bf16(1024, N, device=device), bf16(1024, R, device=device), bf16(N, R, device=device)
    return lambda: grad(dy, z, lora_B, 2.0, torch.float32, config=GRAD)


# Of autograd nodes. A function makes its operands on a device, and returns what computes y.


def member(device: str, n: int = N, k: int = K) -> LinearOperands:
    lora_B = torch.zeros(n, R, device=device).requires_grad_()
    return LinearOperands(bf16(n, k, device=device), None, bf16(R, k, device=device), lora_B)


def of_layer(M: int) -> Callable[[str], Callable[[], torch.Tensor]]:
    def of(device: str) -> Callable[[], torch.Tensor]:
        x, one = bf16(M, K, device=device).requires_grad_(), member(device)
        return lambda: lorafa_linear(x, one.weight, one.lora_A, one.lora_B, impl="triton")

    return of


def of_group(device: str) -> Callable[[], torch.Tensor]:
    x, members = bf16(256, K, device=device).requires_grad_(), [member(device) for _ in range(3)]
    return lambda: torch.cat(lorafa_linear_group(x, members, impl="triton"))


def of_mlp(device: str) -> Callable[[], torch.Tensor]:
    x = bf16(256, K, device=device).requires_grad_()
    gate, up, down = member(device), member(device), member(device, K, N)
    return lambda: lorafa_gated_mlp(x, gate, up, down, impl="triton")


def of_mixed(device: str) -> Callable[[], torch.Tensor]:
    x, one = bf16(4, 64, K, device=device).requires_grad_(), member(device)
    adapters = {number: member(device)._replace(weight=one.weight, bias=one.bias) for number in range(2)}
    rows = Rows.of((0, 1, -1, 0), len(adapters))
    return lambda: lorafa_linear_mixed(x, adapters, rows, impl="triton")


def of_quantised(device: str) -> Callable[[], torch.Tensor]:
    x, one = bf16(16, K, device=device).requires_grad_(), member(device)
    base = quantised(one.weight, "nf4")
    return lambda: quantised_linear(x, base, one.lora_A, one.lora_B)


LAUNCHERS = {
    "shrink": of_shrink,
    "expand by pointers": of_expand(PORTABLE),
    "expand by TMA": of_expand(TMA),
    "expand_total by pointers": of_total(PORTABLE),
    "expand_total by TMA": of_total(TMA),
    "grad": of_grad,
}
NODES = {
    "a layer": of_layer(300),
    "a layer of few rows": of_layer(16),
    "a layer, dB beside dx": of_layer(1100),
    "a layer of specialised warps": of_layer(320),
    "a layer whose specialised warps make z": of_layer(320),
    "a group": of_group,
    "a gated MLP": of_mlp,
    "a mixed batch": of_mixed,
    "a quantised layer": of_quantised,
    "a quantised layer whose codes are read": of_quantised,
}
PINS = {
    "a quantised layer": {"forward": Recipe("fused"), "backward": Recipe("fused")},
    "a quantised layer whose codes are read": {
        "forward": Recipe("fused", KernelPlan(expand=CODES, pdl=False)),
        "backward": Recipe("fused"),
    },
    "a layer, dB beside dx": {"backward": Recipe("fused", KernelPlan(one_pass=False, beside=True))},
    "a layer of specialised warps": {
        op: Recipe("fused", KernelPlan(expand=WS)) for op in ("forward", "backward")
    },
    "a layer whose specialised warps make z": {
        op: Recipe("fused", KernelPlan(expand=WS_Z, one_pass=False, pdl=False))
        for op in ("forward", "backward")
    },
}

NAMES = {(device, 0): f"default of {device}" for device in (0, 1)}


def stream(name: str, device: int) -> torch.cuda.Stream:
    made = torch.cuda.Stream(device)
    NAMES[device, made.cuda_stream] = name
    return made


A, B, C, D = stream("a", 0), stream("b", 0), stream("c", 1), stream("d", 1)


def shown(launched: list[stub_gpu.Launch]) -> list:
    return [
        [one.kernel, one.repeated, one.device, NAMES.get((one.device, one.stream)), one.faults]
        for one in launched
    ]


@contextlib.contextmanager
def noted(into: dict, call: str) -> Iterator[None]:
    # What the driver refuses is among the faults of a launch.
    with stub_gpu.recording() as launched, contextlib.suppress(RuntimeError):
        yield
    into[call] = shown(launched)


def backward(y: torch.Tensor) -> None:
    y.backward(torch.zeros_like(y))


def one_after_another(operation: Callable[[str], Callable[[], object]], node: bool) -> dict:
    """The same call on one stream after another, and on one device after the other."""

    def run(call: Callable[[], object]) -> None:
        result = call()
        if node:
            backward(result)

    found: dict = {}
    first, second = operation("cuda:0"), operation("cuda:1")
    with noted(found, "first, on a"), torch.cuda.stream(A):
        run(first)
    with noted(found, "kept, on b"), torch.cuda.stream(B):
        run(first)
    with noted(found, "kept, on the default stream"):
        run(first)
    with noted(found, "first on device 1, on c"), torch.cuda.stream(C):
        run(second)
    with noted(found, "kept, on d"), torch.cuda.stream(D):
        run(second)
    with noted(found, "kept, on the default stream of 1"), torch.cuda.device(1):
        run(second)
    torch.cuda.set_stream(A)
    with noted(found, "kept, on a again"):
        run(first)
    torch.cuda.set_stream(torch.cuda.default_stream(0))
    return found


def unplaced(operation: Callable[[str], Callable[[], object]]) -> dict:
    """Operands that do not say where they lie: what was kept for one device must not serve the other."""
    found: dict = {}
    call = operation("cpu")
    for times in ("", ", again"):
        with noted(found, f"operands of no device, on a{times}"), torch.cuda.stream(A):
            call()
        with noted(found, f"operands of no device, on c{times}"), torch.cuda.stream(C):
            call()
    return found


def across(operation: Callable[[str], Callable[[], torch.Tensor]]) -> dict:
    """Backward called while another stream is current than forward's, and tensors of a device that is not."""
    found: dict = {}
    first, second = operation("cuda:0"), operation("cuda:1")
    for times in ("", ", again"):
        with torch.cuda.stream(A):
            y = first()
        with noted(found, f"backward of a forward on a, called on b{times}"), torch.cuda.stream(B):
            backward(y)
    with torch.cuda.device(1):
        torch.cuda.set_stream(C)
    torch.cuda.set_stream(B)
    for times in ("", ", again"):
        with noted(found, f"on c, while device 0 is current{times}"):
            backward(second())
    found["current afterwards"] = [
        torch.cuda.current_device(),
        NAMES[0, torch.cuda.current_stream().cuda_stream],
    ]
    torch.cuda.set_stream(torch.cuda.default_stream(1))
    torch.cuda.set_stream(torch.cuda.default_stream(0))
    return found


def in_threads(operation: Callable[[str], Callable[[], object]], node: bool) -> dict:
    """The same call in several threads at a time, each with a device and a stream, three times."""
    together = threading.Barrier(THREADS, timeout=60)
    of_thread: dict[int, str] = {}
    raised: list[str] = []

    def work(index: int) -> None:
        with redirected(placing=True):
            device = index % 2
            torch.cuda.set_device(device)
            own = stream(f"of thread {index}", device)
            of_thread[threading.get_ident()] = NAMES[device, own.cuda_stream]
            call = operation(f"cuda:{device}")
            try:
                with torch.cuda.stream(own):
                    for times in range(3):
                        # In the last one each launch has been kept by some thread.
                        if times != 1:
                            together.wait()
                        result = call()
                        if node:
                            backward(result)
            except Exception as error:
                raised.append(f"{type(error).__name__}: {error}")
                together.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    with stub_gpu.recording() as launched:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found: dict = {f"of thread {index}": [] for index in range(THREADS)}
    for one in launched:
        found[of_thread[one.thread]] += shown([one])
    return found | {"raised": raised}


found: dict = {}
for name, operation in (LAUNCHERS | NODES).items():
    node = name in NODES
    pin = PINS.get(name, {})
    forget_launches()
    with pin_plan(pin) if pin else contextlib.nullcontext():
        found[name] = one_after_another(operation, node)
        found[name] |= across(operation) if node else unplaced(operation)
        forget_launches()
        found[name]["threads"] = in_threads(operation, node)
print(json.dumps(found))
