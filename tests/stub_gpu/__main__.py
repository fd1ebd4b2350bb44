"""Run a program beside a GPU that is not there: python -m tests.stub_gpu [--arch ARCH] [-m] PROGRAM …"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from . import DEVICES, VARIABLE, faults, install, launches

parser = argparse.ArgumentParser(prog="python -m tests.stub_gpu", description=__doc__.split(":")[0])
parser.add_argument("--arch", choices=DEVICES, default=os.environ.get(VARIABLE, "sm_90"))
parser.add_argument("--devices", type=int, default=1, help="how many of them (default: %(default)s)")
parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is the name of a module")
parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program is called with")
options = parser.parse_args()

install(options.arch, redirect=True, devices=options.devices)
sys.argv = [options.program, *options.arguments]
status = None
try:
    if options.module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(options.program))
        runpy.run_path(options.program, run_name="__main__")
except SystemExit as error:
    status = error.code
launched = launches()
wrong = faults(launched)
for line in wrong:
    print(line, file=sys.stderr)
print(
    f"STUB {options.arch}: {len(launched)} launches, {len(wrong)} faults; nothing was computed",
    file=sys.stderr,
)
sys.exit(status or (1 if wrong else 0))
