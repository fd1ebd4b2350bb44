"""What waits for what among launches, by the streams that they are on, events, and waits of the host."""

from __future__ import annotations

from collections.abc import Sequence

from . import Launch, Mark


def waits_for(steps: Sequence[Launch | Mark], later: Launch, earlier: Launch) -> bool:
    """Whether one of the launches among `steps` (recording(marks=True)) begins after another has ended.

    A stream keeps its order, but for a dependent launch, which may begin early (that its code waits then is
    judged elsewhere). A default stream waits for none of torch.cuda.Stream, nor these for it. What a thread
    launches behind a wait of its own comes after what it waited for.
    """
    return earlier.order in _before(steps)[later.order]


def _before(steps: Sequence[Launch | Mark]) -> dict[int, set[int]]:
    """Return {order of a step: those of all steps that it comes after, and its own}."""
    before: dict[int, set[int]] = {}
    of_stream: dict[tuple[int, int], set[int]] = {}
    of_thread: dict[int, set[int]] = {}
    for step in sorted(steps, key=lambda one: one.order):
        stream = step.device, step.stream
        host = of_thread.setdefault(step.thread, set())
        if isinstance(step, Mark) and step.what == "synchronize":
            if step.host == "stream":
                host |= of_stream.get(stream, set())
            elif step.host == "event":
                host |= before.get(step.of, set())
            else:
                for (device, _), found in of_stream.items():
                    host |= found if device == step.device else set()
            continue
        found = of_stream.get(stream, set()) | host | {step.order}
        if isinstance(step, Mark) and step.what == "wait":
            found |= before.get(step.of, set())
        before[step.order] = of_stream[stream] = found
    return before
