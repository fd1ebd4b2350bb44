"""Run beside a stub driver of two devices by test_stub_streams.py: prints what it found, as JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import torch

from lorafa_kernels.kernels.shrink import shrink
from lorafa_kernels.plan.config import KernelConfig
from tests import stub_gpu
from tests.stub_gpu.order import waits_for

CONFIG = KernelConfig(64, 0, 64, 16, 1, 4, 3)
found: dict = {}


def current() -> list:
    """The device that is current, and whether its stream is the default one."""
    device = torch.cuda.current_device()
    handle = torch.cuda.current_stream().cuda_stream
    assert handle == torch._C._cuda_getCurrentRawStream(device)
    return [device, handle == 0 and torch.cuda.current_stream() == torch.cuda.default_stream()]


def raised(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "nothing"


a, b, c = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()
on_1 = torch.cuda.Stream(device="cuda:1")
found["at first"] = current()
found["handles"] = len({a.cuda_stream, b.cuda_stream, c.cuda_stream, on_1.cuda_stream, 0})
found["devices of streams"] = [a.device.index, on_1.device.index, torch.cuda.Stream(1).device.index]
with torch.cuda.device(1):
    found["in a block of device 1"] = current()
    found["made there"] = torch.cuda.Stream().device.index
    found["a stream of 0 there"] = torch.cuda.current_stream("cuda:0") == torch.cuda.default_stream(0)
with torch.cuda.stream(a):
    found["in a block of a"] = torch.cuda.current_stream() == a != b
    with torch.cuda.stream(on_1):
        found["in a block of a stream of 1"] = [*current(), torch.cuda.current_stream() == on_1]
        found["a stays that of 0"] = torch.cuda.current_stream(0) == a
    found["behind it"] = [*current(), torch.cuda.current_stream(1) == torch.cuda.default_stream(1)]
    with torch.cuda.stream(None):
        found["None changes nothing"] = torch.cuda.current_stream() == a
    elsewhere: list = []
    thread = threading.Thread(target=lambda: elsewhere.append(current()))
    thread.start()
    thread.join()
    found["in another thread"] = elsewhere[0]
torch.cuda.set_stream(on_1)
found["set to a stream of 1"] = [*current(), torch.cuda.current_stream() == on_1]
torch.cuda.set_stream(torch.cuda.default_stream(1))
torch.cuda.set_device(0)
found["set back"] = current()
pool = [torch.cuda.Stream(priority=-1).cuda_stream for _ in range(33)]
found["of a pool"] = [len(set(pool)), pool[32] == pool[0]]
found["a device too many"] = [raised(lambda: torch.cuda.set_device(2)), torch.cuda.device_count()]
event = a.record_event()
found["an event on another device"] = raised(lambda: event.record(on_1))
found["a time without timing"] = raised(lambda: event.elapsed_time(event))
timed = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
timed[0].record()
timed[1].record()
found["a time"] = timed[0].elapsed_time(timed[1]) >= 0

rows = torch.zeros(64, 64, dtype=torch.bfloat16, device="cuda")
factor = torch.zeros(64, 16, dtype=torch.bfloat16, device="cuda")


def launch(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        shrink(rows, factor, 1.0, config=CONFIG)


def ordered(
    name: str, between: Callable[[], object], first: torch.cuda.Stream, second: torch.cuda.Stream
) -> None:
    """Find whether a launch on `second` waits for one on `first`, with something between their calls."""
    with stub_gpu.recording(marks=True) as steps:
        launch(first)
        between()
        launch(second)
    earlier, later = (one for one in steps if isinstance(one, stub_gpu.Launch))
    assert (earlier.stream, later.stream) == (first.cuda_stream, second.cuda_stream)
    assert not waits_for(steps, earlier, later)
    found[name] = waits_for(steps, later, earlier)


def record_late() -> None:
    late = torch.cuda.Event()
    b.wait_event(late)
    late.record(a)


def record_twice() -> None:
    """b waits for what was recorded last when it was asked to wait."""
    one = torch.cuda.Event()
    one.record(c)
    b.wait_event(one)
    one.record(a)


def by_way_of_c() -> None:
    c.wait_stream(a)
    b.wait_stream(c)


def record_again() -> None:
    again.record(a)
    b.wait_event(again)


early, again = a.record_event(), a.record_event()
stub_gpu.happened()
ordered("one stream", lambda: None, a, a)
ordered("two streams", lambda: None, a, b)
ordered("default stream, then another", lambda: None, torch.cuda.default_stream(), b)
ordered("wait_stream", lambda: b.wait_stream(a), a, b)
ordered("wait_event", lambda: b.wait_event(a.record_event()), a, b)
ordered("an event from before the launch", lambda: b.wait_event(early), a, b)
ordered("an event from before, recorded again", record_again, a, b)
ordered("waited for before it is recorded", record_late, a, b)
ordered("recorded again afterwards", record_twice, a, b)
ordered("the other one waits", lambda: a.wait_stream(b), a, b)
ordered("by way of a third", by_way_of_c, a, b)
ordered("a synchronised stream", a.synchronize, a, b)
ordered("another synchronised stream", c.synchronize, a, b)
ordered("a synchronised event", lambda: a.record_event().synchronize(), a, b)
ordered("a synchronised device", torch.cuda.synchronize, a, b)
print(json.dumps(found))
