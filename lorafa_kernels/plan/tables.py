"""Tables of measured plans: the ones that are shipped, and the user's own, which `tune` writes.

A table is a JSON file for one device:

    {"format": 1, "device": "NVIDIA H200", "triton": "3.6.0", "torch": "2.11.0", "lorafa_kernels": "0.1.0",
     "commit": "…" or null, "date": "…", "measured": {"main_loop_share": {"tma": 0.93}},
     "entries": [ENTRY, …]}

    ENTRY  {"op": "forward", "dtype": "bfloat16", "K": 4096, "N": 14336, "rank": 16, "rows": 8192,
            "dropout": false, "plans": [PLAN, …]}
    PLAN   {"name": "fused", "one_pass": true, "pdl": true, "configs": {"expand": {"BLOCK_M": 128, …}, …},
            "device_us": 1290.1, "host_us": 31.0}

One entry for a problem's bucket: rank is the rank rounded up to a power of two, at least 16; rows is M
rounded to the nearest power of two. It holds the fastest plan of each name, with the medians that were
measured; what decides is the larger of both times. main_loop_share, which need not be there, is for the model
of the cost: by variant of expand, the rate of its main loop over that of the library's product.

Shipped tables lie in measured/, named after the device; the user's in ~/.cache/lorafa_kernels (XDG_CACHE_HOME
instead of ~/.cache where it is set), or where LORAFA_KERNELS_CACHE says, named after device and Triton's
version. A shipped table serves every Triton, but for plans with specialised warps, which count with the one
they were checked with. A user without a home has none. A file that is damaged or not for this device and
Triton is ignored, with a warning that names it; where only its field measured is damaged, that field is.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import one_writer, read_json, replace_file, shown
from .config import VARIANTS, WS_SUMS
from .cost import ASSUMED
from .recipe import OPERATIONS, Device, Problem, Recipe, obstacle, recipe_from_json, recipe_to_json

FORMAT = 1
CACHE_VARIABLE = "LORAFA_KERNELS_CACHE"
SHIPPED = Path(__file__).resolve().parent / "measured"
# How the name of a stub driver's device (tests/stub_gpu) begins.
STUB = "STUB "
LEAST_RANK = 16
DTYPES = ("float32", "bfloat16", "float16")
# Larger sizes, and times in microseconds (11 days), are no measurements.
MOST_SIZE = 1 << 40
MOST_US = 1e12
# No kernel is that much faster than the library's product: such a share is a fault of the measurement.
MOST_SHARE = 2.0


@dataclass(frozen=True)
class Key:
    """A bucket of problems that share an entry: `rank` and `rows` as in the file."""

    op: str
    dtype: str
    K: int
    N: int
    rank: int
    rows: int
    dropout: bool = False

    def __str__(self) -> str:
        return f"M={self.rows} N={self.N} K={self.K} R={self.rank} {self.dtype}"


@dataclass(frozen=True)
class Measured:
    """A recipe, and the medians of its times in microseconds on the device and on the host."""

    recipe: Recipe
    device_us: float
    host_us: float

    @property
    def us(self) -> float:
        return max(self.device_us, self.host_us)


@dataclass(frozen=True)
class Entry:
    key: Key
    plans: tuple[Measured, ...]


@dataclass(frozen=True)
class Table:
    """What a file holds.

    about: its other fields: versions, commit, date. main_loop: the measured shares by variant of expand.
    ignored: what is wrong with the file's field `measured`, which then counts as missing.
    """

    device: str
    triton: str
    entries: tuple[Entry, ...]
    about: tuple[tuple[str, str | None], ...] = ()
    main_loop: tuple[tuple[str, float], ...] = ()
    ignored: str | None = None

    def counts(self, recipe: Recipe, device: Device) -> bool:
        """Whether the table shows that a recipe was checked and timed on this device as it would run there.

        That of specialised warps with this version of Triton, too: no other compiles Gluon alike.
        """
        expand = recipe.kernels.expand
        if expand is None or expand.variant not in WS_SUMS:
            return True
        return (self.device, self.triton) == (device.name, device.triton)

    @functools.cached_property
    def by_key(self) -> dict[Key, Entry]:
        return {entry.key: entry for entry in self.entries}


def key_of(problem: Problem) -> Key:
    """Return the bucket of a problem with at least one row."""
    return Key(
        problem.op,
        str(problem.dtype).removeprefix("torch."),
        problem.K,
        problem.N,
        max(LEAST_RANK, 1 << (problem.R - 1).bit_length()),
        1 << round(math.log2(max(1, problem.M))),
        problem.dropout,
    )


def most_rows(key: Key) -> int:
    """Return the largest M of a bucket: rows · √2, which is between two integers."""
    return math.isqrt(2 * key.rows**2)


def cache_path(device: Device) -> Path | None:
    """Return the file of the user's own table for this device and Triton, which need not exist; None where
    the user has no home and LORAFA_KERNELS_CACHE names no folder.
    """
    folder = os.environ.get(CACHE_VARIABLE) or _user_cache_folder()
    return Path(folder) / f"{_slug(device.name)}-triton-{_slug(device.triton)}.json" if folder else None


def _user_cache_folder() -> Path | None:
    # A relative path would mean another folder wherever the process is started.
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            # No HOME, and a user whom the machine does not know, as in containers.
            return None
    return folder / "lorafa_kernels" if folder.is_absolute() else None


def shipped_path(device: Device) -> Path:
    """Return where a table for this device would be shipped."""
    return SHIPPED / f"{_slug(device.name)}.json"


def user_table(device: Device) -> Table | None:
    """Return the user's table for this device and Triton, or None where there is none to use."""
    path = cache_path(device)
    return None if path is None else _table(path, device.name, device.triton)


def shipped_table(device: Device) -> Table | None:
    """Return the shipped table for this device, measured with any Triton, or None."""
    return _table(shipped_path(device), device.name, None)


def measured_main_loop(device: Device) -> dict[str, tuple[float, str]]:
    """Return by variant of expand the measured rate of its main loop over that of the library's product, and
    where it is from in words: the user's table, else the shipped one.
    """
    found: dict[str, tuple[float, str]] = {}
    for words, table in (
        ("measured on a device of this name", shipped_table(device)),
        ("measured on this device", user_table(device)),
    ):
        if table is not None:
            found.update((variant, (share, words)) for variant, share in table.main_loop)
    return found


def forget() -> None:
    """Read files again when they are needed next."""
    _table.cache_clear()


@functools.lru_cache(maxsize=64)
def _table(path: Path, device: str, triton: str | None) -> Table | None:
    # Cached, so that a file is read and complained about once in a process.
    try:
        table = read_table(path)
        if table.device != device:
            raise ValueError(f"it is for {shown(table.device)}, not for {device!r}")
        if triton is not None and table.triton != triton:
            raise ValueError(f"it is for Triton {shown(table.triton)}, not {triton}: run tune again")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
        return None
    if table.ignored:
        warnings.warn(f"the field measured of {path} is ignored: {table.ignored}", stacklevel=2)
    return table


def read_table(path: Path, stub: bool = False) -> Table:
    """Read a table. Raises OSError, or ValueError saying what is wrong with the file, such as that it was
    made through a stub driver; stub: which is then right.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not a table of format {FORMAT}")
    entries = found.get("entries")
    if not isinstance(entries, list):
        raise ValueError("its field entries is not a list")
    device, triton = found.get("device"), found.get("triton")
    if not isinstance(device, str) or not isinstance(triton, str):
        raise ValueError("its fields device and triton must both be text")
    if not stub and (found.get("stub") or device.startswith(STUB)):
        raise ValueError("it was made with a stub driver, which computes nothing: its times mean nothing")
    rest = {name: value for name, value in found.items() if name not in ("format", "entries", "measured")}
    about = tuple(
        (name, value if value is None or isinstance(value, str) else shown(value))
        for name, value in sorted(rest.items())
    )
    read = {}
    for index, value in enumerate(entries):
        try:
            entry = _entry_from_json(value)
        except ValueError as error:
            raise ValueError(f"entry {index}: {error}") from error
        read[entry.key] = entry
    try:
        shares, ignored = _shares_from_json(found.get("measured", {})), None
    except ValueError as error:
        shares, ignored = {}, str(error)
    return Table(device, triton, tuple(read.values()), about, tuple(shares.items()), ignored)


def update_table(
    path: Path,
    device: Device,
    entries: Iterable[Entry],
    about: Mapping[str, str | None],
    main_loop: Mapping[str, float] = ASSUMED,
) -> None:
    """Write `entries`, and the shares of `main_loop` by variant of expand, into the table at `path`, beside
    those of other keys and variants that are there already.

    All of it is written, or, after an error or Ctrl-C, the previous file is untouched. Several processes and
    threads can do so at once. A damaged or foreign file is replaced. Raises OSError where it cannot be
    written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(path):
        kept: dict[Key, Entry] = {}
        shares: dict[str, float] = {}
        try:
            old = read_table(path, stub=device.name.startswith(STUB))
            if (old.device, old.triton) == (device.name, device.triton):
                kept, shares = dict(old.by_key), dict(old.main_loop)
        except (OSError, ValueError):
            pass
        kept.update((entry.key, entry) for entry in entries)
        shares.update(main_loop)
        found = {
            "format": FORMAT,
            "device": device.name,
            "triton": device.triton,
            **about,
            **({"stub": True} if device.name.startswith(STUB) else {}),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **({"measured": {"main_loop_share": _rounded(shares)}} if shares else {}),
            "entries": [_entry_to_json(kept[key]) for key in sorted(kept, key=repr)],
        }
        replace_file(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
    forget()


def fits(entry: Entry, problem: Problem, device: Device) -> bool:
    """Whether every plan of an entry can run for `problem` on the device."""
    return all(obstacle(one.recipe, problem, device.limits) is None for one in entry.plans)


def _rounded(shares: Mapping[str, float]) -> dict[str, float]:
    return {variant: float(f"{shares[variant]:.4g}") for variant in sorted(shares)}


def _shares_from_json(value: object) -> dict[str, float]:
    """Read the field `measured`. What it names beside the shares, and variants of other versions, is no
    error.
    """
    shares = value.get("main_loop_share", {}) if isinstance(value, dict) else None
    if not isinstance(shares, dict):
        raise ValueError(f"it must be an object of objects, got {shown(value)}")
    found = {}
    for variant in VARIANTS:
        if variant in shares:
            share = shares[variant]
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= MOST_SHARE:
                raise ValueError(
                    f"main_loop_share of {variant} must be a number above 0, at most {MOST_SHARE:g}, not "
                    f"{shown(share)}"
                )
            found[variant] = float(share)
    return found


def _entry_from_json(value: object) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {shown(value)}")
    plans = value.get("plans")
    names = set(value) - {"plans"}
    expected = set(Key.__dataclass_fields__)
    if names != expected:
        raise ValueError(
            f"expected the fields {', '.join(sorted(expected))} and plans, got {shown(sorted(value))}"
        )
    key = Key(**{name: value[name] for name in expected})
    sizes = (key.K, key.N, key.rank, key.rows)
    if not all(type(size) is int and 0 <= size <= MOST_SIZE for size in sizes):
        raise ValueError(
            f"K, N, rank and rows must be integers from 0 to 2**40, got {', '.join(map(shown, sizes))}"
        )
    if key.op not in OPERATIONS or key.dtype not in DTYPES or not isinstance(key.dropout, bool):
        raise ValueError(
            f"unknown op, dtype or dropout: {shown(key.op)}, {shown(key.dtype)}, {shown(key.dropout)}"
        )
    if min(key.rank, key.rows) < 1:
        raise ValueError(f"rank and rows must be at least 1, got {key.rank} and {key.rows}")
    if not isinstance(plans, list) or not plans:
        raise ValueError("its field plans must be a list with at least one plan")
    return Entry(key, tuple(map(_measured_from_json, plans)))


def _measured_from_json(value: object) -> Measured:
    if not isinstance(value, dict):
        raise ValueError(f"a plan must be a JSON object, got {shown(value)}")
    times = {name: value.get(name) for name in ("device_us", "host_us")}
    for name, time in times.items():
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time <= MOST_US:
            raise ValueError(f"{name} must be a time in microseconds, got {shown(time)}")
    recipe = recipe_from_json({name: found for name, found in value.items() if name not in times})
    return Measured(recipe, **times)


def _entry_to_json(entry: Entry) -> dict:
    plans = [
        {
            **recipe_to_json(one.recipe, entry.key.op),
            "device_us": round(one.device_us, 3),
            "host_us": round(one.host_us, 3),
        }
        for one in entry.plans
    ]
    return {**entry.key.__dict__, "plans": plans}


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "unnamed"
