"""Faults of the kind that the launch gate is for, planted one after the other: a script for a stub GPU.

    python -m tests.stub_gpu tests/launch_faults.py OUT.json

writes what the gate says of one case with each of them, and of the same case without.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import triton

from bench.gate.launch import Scenario, judge
from lorafa_kernels.kernels import expand_tma, group, group_tma, shrink
from lorafa_kernels.kernels.launch import forget_launches

# What the arguments P_0 to P_3, and so on, of group_tma.py were before.
TUPLES = {"P": "P_descs", "Q": "Q_descs", "L": "Ls", "F": "Fs"}
LAYER = Scenario(bias=False, needs="dx")
GROUP = Scenario("group", bias=False, members=3, needs="dx")


class Changed:
    """A kernel whose launches are changed on their way."""

    def __init__(self, kernel, change):
        self.kernel = kernel
        self.change = change

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            new_grid, args, kwargs = self.change(grid, args, kwargs)
            # Returns no compiled kernel: one that was kept would be launched unchanged.
            self.kernel[new_grid](*args, **kwargs)

        return launch


def change(module, name, changes):
    return mock.patch.object(module, name, Changed(getattr(module, name), changes))


def without(key):
    return lambda grid, args, kwargs: (grid, args, {k: v for k, v in kwargs.items() if k != key})


def tuples_of_descriptors(stack: ExitStack) -> Scenario:
    """The kernel of group_tma.py as it was: descriptors come in tuples."""
    text = Path(group_tma.__file__).read_text()
    for letter, name in TUPLES.items():
        made = f"    {name} = ({letter}_0, {letter}_1, {letter}_2, {letter}_3)\n"
        assert made in text
        text = text.replace(made, "")
        for index in (1, 2, 3):
            text = text.replace(f"    {letter}_{index},\n", "")
        first = f"    {letter}_0,"
        assert first in text
        text = text.replace(first, f"    {name},")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    file = Path(folder) / "group_tma_before.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("lorafa_kernels.kernels.group_tma_before", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    make = group.total_tma_launch

    def make_before(*operands):
        flat = make(*operands)

        def launch(*values):
            arguments = flat.arguments(values)
            for letter, name in TUPLES.items():
                found = (arguments.pop(f"{letter}_{index}") for index in range(4))
                arguments[name] = tuple(one for one in found if one is not None)
            module._total_tma_kernel[flat.grid](**arguments)

        return launch

    stack.enter_context(mock.patch.object(group, "total_tma_launch", make_before))
    return GROUP


def misaligned_tensor(stack: ExitStack) -> Scenario:
    """Descriptors of whatever memory comes."""
    stack.enter_context(mock.patch.object(expand_tma, "addressable", lambda *tensors: True))
    return replace(LAYER, sizes="offset")


def change_maps(stack: ExitStack, changed) -> Scenario:
    """Encode maps of changed(address, box)."""
    utils = triton.runtime.driver.active.utils
    # Named otherwise in Triton 3.6.
    name = next(key for key in vars(utils) if key in ("fill_tma_descriptor_tiled", "fill_tma_descriptor"))
    fill = getattr(utils, name)

    def other(address, swizzle, element_size, element_type, box, *rest):
        address, box = changed(address, box)
        return fill(address, swizzle, element_size, element_type, box, *rest)

    stack.enter_context(mock.patch.object(utils, name, other))
    return LAYER


def misaligned_map(stack: ExitStack) -> Scenario:
    return change_maps(stack, lambda address, box: (address + 8, box))


def map_of_other_memory(stack: ExitStack) -> Scenario:
    return change_maps(stack, lambda address, box: (address + 16, box))


def box_over_256(stack: ExitStack) -> Scenario:
    return change_maps(stack, lambda address, box: (address, [512, *box[1:]]))


def no_dependent_launch(stack: ExitStack) -> Scenario:
    """expand waits for the kernel before it, and is not launched as its dependent."""
    stack.enter_context(change(expand_tma, "_expand_tma_kernel", without("launch_pdl")))
    return LAYER


def dependent_launch_unplanned(stack: ExitStack) -> Scenario:
    def add(grid, args, kwargs):
        return grid, args, {**kwargs, "launch_pdl": True}

    stack.enter_context(change(shrink, "_shrink_kernel", add))
    return LAYER


def argument_missing_in_call(stack: ExitStack) -> Scenario:
    stack.enter_context(change(shrink, "_shrink_kernel", without("stride_factor_r")))
    return LAYER


def argument_missing_in_launcher(stack: ExitStack) -> Scenario:
    """The launcher takes the last argument for a constant, and hands on one less than the kernel has."""
    driver = triton.runtime.driver.active
    launcher = driver.launcher_cls

    def one_less(source, metadata):
        source = copy.copy(source)
        last = [name for name, kind in source.signature.items() if kind != "constexpr"][-1]
        source.signature = {**source.signature, last: "constexpr"}
        return launcher(source, metadata)

    stack.enter_context(mock.patch.object(driver, "launcher_cls", one_less))
    # A kernel that was loaded has its launcher.
    return replace(LAYER, R=3, sizes="odd")


def grid_of_0(stack: ExitStack) -> Scenario:
    stack.enter_context(change(shrink, "_shrink_kernel", lambda grid, args, kwargs: ((0, 1), args, kwargs)))
    return LAYER


PLANTED = {
    function.__name__: function
    for function in (
        misaligned_tensor,
        misaligned_map,
        map_of_other_memory,
        box_over_256,
        no_dependent_launch,
        dependent_launch_unplanned,
        argument_missing_in_call,
        argument_missing_in_launcher,
        grid_of_0,
        tuples_of_descriptors,
    )
}


def main(out: str) -> None:
    found = {}
    for name, plant in PLANTED.items():
        with ExitStack() as stack:
            case = plant(stack)
            forget_launches()
            found[name] = judge(case, "sm_90")["faults"]
    forget_launches()
    for case in (LAYER, replace(LAYER, sizes="offset"), GROUP):
        found[case.name] = judge(case, "sm_90")["faults"]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(0)
