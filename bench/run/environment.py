"""What every result file says about where its numbers come from, and how result files are written."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

from .shell import now, output, write_whole
from .stub import START, stub_name
from .tree import tree_hash

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "peft", "transformers", "lorafa_kernels")
# Parts of bench/ that change no measurement.
PRESENTATION = ("__main__.py", "tables.py", "launch_gate.py", "report/", "gate/", "gpu/", "quality/")
PRESENTATION += ("run/shell.py", "run/stub.py", "run/tree.py")


def environment(with_torch: bool = True) -> dict:
    """Return machine, date (UTC), versions, commit and the hash of the files (tree.py), as JSON types; what
    cannot be found out is None. A run through the stub driver has the mark "stub", and its device's name.

    Call it before measuring: it notes how busy the machine is with other work. with_torch: else nothing of
    it is imported, and what only it knows is None.
    """
    gpu = _gpu(with_torch)
    torch = importlib.import_module("torch") if with_torch else None
    stub = stub_name() is not None or (gpu is not None and gpu["name"].startswith(START))
    return {
        **({"stub": True} if stub else {}),
        "date": now(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads() if torch else None,
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "gpu": gpu,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name, with_torch) for name in PACKAGES},
        },
        **_commit(),
        "tree": tree_hash(ROOT),
    }


def origin(*packages: str, more: tuple[str, ...] = ()) -> dict:
    """Return what the result of a gate says of where it is from: date, commit, and the versions of packages;
    more: other keys of environment().
    """
    now = environment()
    versions = {name: now["versions"][name] for name in packages}
    return {key: now[key] for key in ("date", "commit", "dirty", *more)} | {"versions": versions}


def write_json(path: Path, result: dict) -> None:
    """Write `result` to `path`: all of it, or, after an error or Ctrl-C, the previous file untouched."""
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or None


def _smi(what: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0")


def _gpu(with_torch: bool) -> dict | None:
    name = stub_name()
    if name:
        # Nothing of a GPU that may be there as well.
        return {"name": name, "capability": None, "smi_name": None, **dict.fromkeys(_GPU_STATE.values())}
    if not with_torch:
        name = _smi("name")
        return {"name": name or "an unnamed GPU", "capability": None, "smi_name": name, **gpu_state()}
    import torch

    if not torch.cuda.is_available():
        return None
    limits = torch.cuda.get_device_properties(0)
    return {
        "name": limits.name,
        "capability": f"{limits.major}.{limits.minor}",
        "multiprocessors": limits.multi_processor_count,
        "memory_gib": round(limits.total_memory / 2**30, 1),
        "runtime": torch.version.cuda or torch.version.hip,
        "smi_name": _smi("name"),
        **gpu_state(),
    }


# nvidia-smi's names, and ours.
_GPU_STATE = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "clocks.mem": "memory_clock_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def gpu_state() -> dict:
    """Return driver, clocks (MHz), power limit (W) and temperature (°C) now, as nvidia-smi says them."""
    values = (_smi(",".join(_GPU_STATE)) or "").split(", ")
    if len(values) != len(_GPU_STATE):
        values = [None] * len(_GPU_STATE)
    return dict(zip(_GPU_STATE.values(), values, strict=True))


def device_slug(about: dict) -> str:
    """Return the name of the device's folder of results: "cpu", or the GPU's name ("nvidia-h200")."""
    gpu = about["machine"]["gpu"]
    return re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-") if gpu else "cpu"


def identity(about: dict) -> str:
    """Return what two measurements must share to be parts of one: the measured and the measuring code, the
    versions, and the GPU by name or the CPU with its threads; as a short hash.
    """
    machine = about["machine"]
    chip = machine["gpu"]["name"] if machine["gpu"] else [machine[k] for k in ("cpu", "cores", "threads")]
    parts = [chip, about["versions"]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for folder in ("lorafa_kernels", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(tuple(f"bench/{part}" for part in PRESENTATION)):
                digest.update(name.encode() + b"\0" + path.read_bytes())
        for path in sorted((ROOT / folder).rglob("measured/*.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str, by_import: bool) -> str | None:
    # The package itself first: a checkout need not be installed, and Triton comes under several names.
    with contextlib.suppress(ImportError):
        if by_import and name in ("lorafa_kernels", "triton", "torch"):
            return importlib.import_module(name).__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _commit() -> dict:
    """Return the commit, and whether the tree differs from it elsewhere than in the results."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top and Path(top).resolve() == ROOT and (commit := _output("git", "rev-parse", "HEAD")):
        changes = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
        return {"commit": commit, "dirty": None if changes is None else bool(changes)}
    return {"commit": os.environ.get("BENCH_COMMIT"), "dirty": None}


def _output(*command: str) -> str | None:
    printed = output(*command, cwd=ROOT)
    return None if printed is None else printed.strip()
