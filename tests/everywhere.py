"""Run the tests of values on other instruction sets, with other numbers of threads and in other orders.

    python tests/everywhere.py                       every configuration that this machine has, and a table
    python tests/everywhere.py --only two-threads    one of them again
    python tests/everywhere.py --by-commit HASH      the one that falls to this commit (CI)
    python tests/everywhere.py --only mkl-compatible -- tests/nn/test_layer.py -k bias

A configuration is an environment and arguments of pytest, each run in a process of its own. A restriction of
instruction sets counts only where it can be seen to act: a first process tells what torch, oneDNN and MKL
report under it, and a configuration that is not obeyed here is listed as not run, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "numerics and not slow and not gate and not gate_all"
WORKERS = ("-n", "2", "--dist", "worksteal")
# ATEN_CPU_CAPABILITY for torch's own kernels, its name in torch's report, and the processor's flag for it:
# torch takes the variable at its word, and dies of an instruction that is not there.
ATEN = {"default": ("DEFAULT", None), "avx2": ("AVX2", "avx2"), "avx512": ("AVX512", "avx512f")}
# MKL_ENABLE_INSTRUCTIONS acts on some processors only and shows nowhere; MKL_CBWR is reported with each call.
MKL = {"compatible": "COMPATIBLE", "avx2": "AVX2"}
ONEDNN = {"sse41": "SSE4.1", "avx2": "AVX2"}


@dataclass(frozen=True)
class Configuration:
    """expected: what the first process must report, by the names of `report_of`."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    flag: str | None = None
    expected: dict[str, str] = field(default_factory=dict)


def configurations(seed: int) -> list[Configuration]:
    order = ("--shuffle", str(seed))
    found = [
        Configuration("one-process"),
        Configuration("two-processes", arguments=WORKERS),
        Configuration("two-threads", arguments=("--threads", "2")),
        Configuration("random-order", arguments=order),
        Configuration("random-order-two-processes", arguments=(*order, *WORKERS)),
    ]
    for name, (shown, flag) in ATEN.items():
        variables = {"ATEN_CPU_CAPABILITY": name}
        found.append(Configuration(f"aten-{name}", variables, WORKERS, flag, {"torch": shown}))
    for name, shown in MKL.items():
        variables = {"MKL_CBWR": shown}
        found.append(Configuration(f"mkl-{name}", variables, WORKERS, expected={"MKL": shown}))
    for name, shown in ONEDNN.items():
        variables = {"ONEDNN_MAX_CPU_ISA": name.upper()}
        found.append(Configuration(f"onednn-{name}", variables, WORKERS, expected={"oneDNN": shown}))
    return found


# One product by MKL and one operation by oneDNN, each of which says in what mode it runs.
PROBE = """
import torch
print("torch", torch.backends.cpu.get_cpu_capability())
torch.ones(64, 64) @ torch.ones(64, 64)
torch.ones(8, 8).to_mkldnn().relu()
"""


def report(environment: dict[str, str]) -> dict[str, str]:
    """What torch, MKL and oneDNN report in a process with these variables."""
    variables = {**os.environ, **environment, "MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    if done.returncode:
        return {"torch": f"ended with code {done.returncode}"}
    return report_of(done.stdout)


def report_of(text: str) -> dict[str, str]:
    patterns = {
        "torch": r"^torch (\S+)",
        "MKL": r"^MKL_VERBOSE .*\bCNR:(\S+)",
        "oneDNN": r"^onednn_verbose,.*\bcpu,isa:(?:Intel )?(\S+)",
    }
    matches = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in matches.items() if match}


def processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(re.findall(r"^flags\s*:(.*)$", text, re.MULTILINE)[0].split()) if "flags" in text else set()


def obstacle(configuration: Configuration, flags: set[str], reported: dict[str, str]) -> str | None:
    """Say why a configuration cannot run here, or None. reported: by `report` in its environment."""
    if configuration.flag and configuration.flag not in flags:
        return f"this processor has no {configuration.flag}"
    for name, wanted in configuration.expected.items():
        if reported.get(name) != wanted:
            return f"{name} does not obey: it reports {reported.get(name, 'nothing')}, not {wanted}"
    return None


def obstacle_here(configuration: Configuration) -> str | None:
    flags = processor_flags()
    if obstacle(configuration, flags, configuration.expected):
        return obstacle(configuration, flags, {})
    if not configuration.expected:
        return None
    return obstacle(configuration, flags, report(configuration.environment))


def command_of(configuration: Configuration, tests: Sequence[str]) -> list[str]:
    options = ("-q", "-m", MARKERS, *configuration.arguments)
    return [sys.executable, "-m", "pytest", *options, *tests]


def run(configuration: Configuration, tests: Sequence[str]) -> tuple[bool, str, float]:
    """Run its tests and return whether all passed, the last line of pytest, and the seconds."""
    begin = time.perf_counter()
    command = command_of(configuration, tests)
    variables = " ".join(f"{name}={value}" for name, value in configuration.environment.items())
    print(f"{configuration.name}: {variables} {shlex.join(['python', *command[1:]])}".replace("  ", " "))
    environment = {**os.environ, **configuration.environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()
    # Nothing collected (5) is no success either.
    if done.returncode:
        print("\n".join(lines[-200:]))
    return done.returncode == 0, lines[-1].strip("= ") if lines else "no output", time.perf_counter() - begin


def table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows)


def chosen_by(commit: str, names: list[str]) -> tuple[str, int]:
    """The configuration that falls to a commit, and its seed: any hexadecimal hash gives one of each."""
    number = int(commit, 16)
    return names[number % len(names)], number % 10_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/everywhere.py", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    names = [configuration.name for configuration in configurations(0)]
    which.add_argument("--only", metavar="NAME", choices=names, help=f"one of {', '.join(names)}")
    which.add_argument("--by-commit", metavar="HASH", help="one, chosen by a commit's hash")
    parser.add_argument("--seed", type=int, default=1, help="of the random orders (default 1)")
    parser.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args(argv)
    seed = options.seed
    if options.by_commit:
        try:
            int(options.by_commit, 16)
        except ValueError:
            parser.error(f"argument --by-commit: {options.by_commit!r} is no hexadecimal hash")
    candidates = configurations(seed)
    if options.only:
        candidates = [one for one in candidates if one.name == options.only]
    reasons = {one.name: obstacle_here(one) for one in candidates}
    if options.by_commit:
        able = [name for name, reason in reasons.items() if reason is None]
        name, seed = chosen_by(options.by_commit, able)
        candidates = [one for one in configurations(seed) if one.name == name]
        print(f"Chosen by commit {options.by_commit}. The same again:")
        print(f"    python tests/everywhere.py --only {name} --seed {seed}", flush=True)
    rows = [("configuration", "seconds", "verdict")]
    failed = False
    for configuration in candidates:
        if reason := reasons[configuration.name]:
            rows.append((configuration.name, "-", f"not run: {reason}"))
            continue
        passed, summary, seconds = run(configuration, options.tests)
        failed |= not passed
        rows.append((configuration.name, f"{seconds:.0f}", f"{'ok' if passed else 'FAILED'}: {summary}"))
        print(f"    {rows[-1][2]}", flush=True)
    print(f"\n{table(rows)}")
    print(json.dumps({"this machine reports": report({})}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
