"""Promise: every row and exception of the default configurations decides something."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lorafa_kernels.plan import defaults
from lorafa_kernels.plan.config import INTERPRETER, KNOWN_DEVICES, OPS
from lorafa_kernels.plan.defaults import EXCEPTIONS, ROWS, Departure

# One device of each family, and a shape of each class of size.
DEVICES = (*(KNOWN_DEVICES[arch] for arch in ("sm_80", "sm_90", "sm_100", "gfx942")), INTERPRETER)
SHAPES = tuple(itertools.product((2, 4), (16, 32, 64, 128, 512, 8192), (4, 16, 32, 64, 128)))
YES_NO = (False, True)


def calls(kernel: str) -> Iterator[tuple]:
    """The function that picks the configurations of `kernel`, and arguments: the device is the first of them
    or, after the kernel's name, the second.
    """
    for limits, shape, aligned, dropout in itertools.product(DEVICES, SHAPES, YES_NO, YES_NO):
        if kernel == "shrink_group":
            yield from (("shrink_group_config", limits, *shape, members, dropout) for members in (1, 2, 3))
        elif kernel == "shrink_total":
            yield "shrink_total_config", limits, *shape
        elif kernel == "expand_total":
            yield "expand_total_config", limits, *shape, aligned, dropout
        elif kernel.startswith("mixed_"):
            operand_bytes, _, R = shape
            op = kernel.removeprefix("mixed_")
            yield "mixed_config", op, limits, operand_bytes, R, aligned, dropout
        elif kernel == "codes":
            yield "codes_config", limits, *shape, aligned
        elif kernel == "beside":
            yield "beside_config", limits, *shape
        elif kernel == "recompute":
            yield "default_config", "expand", limits, *shape, aligned, True, dropout
        else:
            yield "default_config", kernel, limits, *shape, aligned, False, dropout


def chosen(call: tuple) -> object:
    """What is picked now, without what is remembered; None where no row holds."""
    defaults.default_config.cache_clear()
    try:
        return getattr(defaults, call[0]).__wrapped__(*call[1:])
    except (AttributeError, TypeError):
        return None


@pytest.fixture(scope="module")
def before() -> dict[str, dict[tuple, object]]:
    return {kernel: {call: chosen(call) for call in calls(kernel)} for kernel in {**ROWS, **EXCEPTIONS}}


@pytest.fixture(autouse=True)
def forget():
    yield
    defaults.default_config.cache_clear()


def changes_what_is_picked(known: dict[tuple, object], families: frozenset[str]) -> bool:
    """Whether a call on a device of these families gets another configuration than it did."""
    devices = {limits for limits in DEVICES if limits.family in families}
    return any(chosen(call) != config for call, config in known.items() if devices & {call[1], call[2]})


def without(mapping, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize("kernel", ROWS)
def test_every_row_decides_on_each_of_its_families(kernel, before, monkeypatch):
    rows = ROWS[kernel]
    for index, row in enumerate(rows):
        for family in row.families:
            smaller = replace(row, families=row.families - {family})
            monkeypatch.setitem(ROWS, kernel, (*rows[:index], smaller, *rows[index + 1 :]))
            assert changes_what_is_picked(before[kernel], {family}), f"{row} is not needed on {family}"


def smaller_departures(departure: Departure) -> Iterator[tuple[Departure, frozenset[str]]]:
    """A departure with one family, condition or change less each, and the families whose calls that meets."""
    for family in departure.families:
        yield replace(departure, families=departure.families - {family}), frozenset({family})
    for name in departure.when:
        yield replace(departure, when=without(departure.when, name)), departure.families
    for name in departure.changes:
        yield replace(departure, changes=without(departure.changes, name)), departure.families


@pytest.mark.parametrize("kernel", EXCEPTIONS)
def test_every_exception_decides_with_all_that_it_says(kernel, before, monkeypatch):
    exceptions = EXCEPTIONS[kernel]
    for index, departure in enumerate(exceptions):
        for other, families in smaller_departures(departure):
            monkeypatch.setitem(EXCEPTIONS, kernel, (*exceptions[:index], other, *exceptions[index + 1 :]))
            assert changes_what_is_picked(before[kernel], families), f"{departure} could be {other}"


def test_every_exception_has_a_reason():
    reasons = [departure.reason for of_kernel in EXCEPTIONS.values() for departure in of_kernel]
    assert all(len(reason.split()) > 3 for reason in reasons)


@pytest.mark.parametrize("op", OPS)
def test_every_device_and_operand_has_a_row_for_any_size(op):
    for limits, operand_bytes, aligned in itertools.product(DEVICES, (1, 2, 4, 8), YES_NO):
        assert defaults.default_config(op, limits, operand_bytes, 1 << 40, 1 << 20, aligned)
