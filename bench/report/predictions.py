"""What the model of the cost says of a measured case, to be printed beside the measurement."""

from __future__ import annotations

from dataclasses import replace

from lorafa_kernels.plan.config import KNOWN_DEVICES, DeviceLimits
from lorafa_kernels.plan.cost import ceilings, predict, predict_step
from lorafa_kernels.plan.make import candidates
from lorafa_kernels.plan.recipe import Device, Problem

from ..measure.cases import DTYPES


def predictions(record: dict) -> dict[str, float] | None:
    """Return the predicted ratio of lorafa_kernels, with its best plan, to the frozen nn.Linear, for
    "forward", "backward" and "both"; None where nothing is predicted: on a CPU, or for an unknown GPU.

    record: of kind "time". Tables and pins of the machine that reads it do not matter.
    """
    device = device_of(record["_run"]["environment"])
    case = record["case"]
    if device is None or "M" not in case:
        return None
    reached = ceilings(device.name, device.limits)
    if reached is None:
        return None
    sizes = (case["M"], case["N"], case["K"], case["R"])
    layer = Problem("forward", DTYPES[case["dtype"]], *sizes, case["bias"], bool(case["dropout"]))
    best = {}
    for op in ("forward", "backward"):
        problem = replace(layer, op=op)
        times = {
            recipe: predict(recipe, problem, device.limits, reached).us
            for recipe in candidates(problem, device)
        }
        best[op] = min(times, key=times.__getitem__)
    step = predict_step(best, layer, device.limits, reached)
    found = {op: step[f"{op}_us"] / step[f"frozen_{op}_us"] for op in best}
    return {**found, "both": 1 + step["overhead"]}


def device_of(about: dict) -> Device | None:
    """Return the GPU that a result file names, or None if it names none that is known."""
    gpu = about["machine"]["gpu"]
    if not gpu:
        return None
    limits: DeviceLimits | None = KNOWN_DEVICES.get("sm_" + str(gpu["capability"]).replace(".", ""))
    if limits is None:
        return None
    if gpu.get("multiprocessors"):
        limits = replace(limits, num_sms=gpu["multiprocessors"])
    return Device(gpu["name"], limits, about["versions"].get("triton") or "")
