"""What the compile gate asks of Gluon kernels whose warps are specialised: expand_ws.py, expand_ws_z.py.

Their loops are written by hand, and so are the registers of each kind of warp, the barriers in shared memory
and the wait for the kernel before. No interpreter runs them, so what can be read off their code is: that the
registers are dealt out, that a product stays in flight, that no warp gives a buffer on before all threads of
its kind are through, that z or dz is waited for before it is read, and how flags are raised and read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton

# How many products may be in flight at each wait, in the order of the code. expand_ws: behind the first of a
# tile, in the K loop, behind the rank-R step, and behind the tile. expand_ws_z: in the K loop, in that of the
# first column, which has two products a step, behind that, then as before.
WAITS = {"expand_ws_kernel": [1, 1, 1, 0], "expand_ws_z_kernel": [1, 2, 0, 1, 0]}
CONSUMERS = 256  # threads
SM_REGISTERS = 65536
WAIT = "griddepcontrol.wait"
THREADS = re.compile(r"\.reqntid (\d+)")
# The consumers give registers back where the warps part, the others take some.
GIVEN, TAKEN = (
    re.compile(rf"USETMAXREG\.{way}\.CTAPOOL (?:UP\d, )?(0x[0-9a-f]+)") for way in ("DEALLOC", "TRY_ALLOC")
)
# What a thread does between the barriers of its kind of warp.
EVENTS = re.compile(
    r"bar(?:\.warp)?\.sync|fence\.proxy\.async|mbarrier\.arrive\.shared|mbarrier\.try_wait"
    r"|gpu\.release|gpu\.acquire|st\.global"
    # Which kind of warp is to run what is stored at a fixed place.
    r"|st\.shared\S*\s+\[\s*%|stmatrix|ld\.shared|wgmma\.mma_async|wgmma\.wait_group"
)


def code(compiled) -> dict:
    """Return what specialised warps are judged by, from one compiled kernel."""
    ptx, sass = compiled.asm["ptx"], disassembled(compiled.asm["cubin"])
    return {
        "threads": int(THREADS.search(ptx)[1]),
        "dealt": dealt(sass),
        "waits": [int(n, 16) for n in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", sass)],
        "local_memory": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "unguarded": unguarded(ptx),
        "flags": [len(re.findall(rf"\.gpu\.{order}\.", ptx)) for order in ("release", "acquire")],
        # misplaced_wait of the gate knows kernels whose warps all do the same.
        "misplaced_wait": misplaced_wait(compiled.asm["ttgir"]),
    }


def dealt(sass: str) -> dict[str, int]:
    """Return the registers of a thread of each kind while the kinds run; {} where none are dealt out."""
    given, taken = ([int(count, 16) for count in one.findall(sass)] for one in (GIVEN, TAKEN))
    return {"consumers": max(given), "others": min(taken)} if given and taken else {}


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def unguarded(ptx: str) -> list[str]:
    """Name arrivals that one thread makes before the others are through: what it gives on may still be read
    or written; and stores for the tensor cores that are not fenced.
    """
    found, before, stored = [], "", False
    for event in EVENTS.findall(ptx):
        if event.startswith("st.shared"):
            stored = True
        elif event == "fence.proxy.async":
            stored = False
        elif event == "mbarrier.arrive.shared":
            if before not in ("bar.sync", "bar.warp.sync"):
                found.append(f"a warp arrives after {before or 'nothing'}, not after a barrier of its kind")
            # What one warp hands out, the tensor cores do not read.
            if stored and before == "bar.sync":
                found.append("stores into shared memory are passed on without a fence")
            stored = False
        elif event == "gpu.release" and before != "bar.sync":
            found.append(f"a flag is raised after {before or 'nothing'}, not after a barrier of its kind")
        before = event
    return found


def misplaced_wait(ttgir: str) -> list[str]:
    """Name what is wrong with where the kernel waits for the one before it, if it does: the loader must wait
    once, before it loads, outside of its loop, and so in every block; the consumers store what they have by
    the loader's leave.
    """
    if WAIT not in ttgir:
        return []
    consumers, *others = re.split(r"^ {4}partition\d+\(", ttgir, flags=re.MULTILINE)
    found = []
    if WAIT in consumers[consumers.find("ttg.warp_specialize") :]:
        found.append("the consumers wait for the kernel before, which holds up their products")
    waiting = [text for text in others if WAIT in text]
    if not waiting:
        found.append("no kind of warp waits for the kernel before")
    for text in waiting:
        wait = text.find(WAIT)
        if "async_tma_copy_global_to_local" in text:
            found.append("the producer waits for the kernel before, which holds up P and Q")
        if 0 <= text.find("tt.load") < wait:
            found.append("the loader reads before it waits")
        if 0 <= text.find("scf.for") < wait:
            found.append("the loader waits within its loop")
    if any("tt.load" in text and WAIT not in text for text in others):
        found.append("z is loaded by warps that do not wait")
    return found


def failures(row: dict) -> list[str]:
    """Name the rules of specialised warps that a row breaks."""
    found = []
    registers, threads = row["registers"], row["threads"]
    if not row["dealt"]:
        found.append("registers are not dealt out (no setmaxnreg)")
    else:
        consumers, others = row["dealt"]["consumers"], row["dealt"]["others"]
        if consumers <= registers:
            found.append(f"consumers have {consumers} registers, no more than the {registers} of all")
        # Who asks for more than the block has waits for ever.
        if consumers * CONSUMERS + others * (threads - CONSUMERS) > registers * threads:
            found.append(f"{consumers} and {others} registers are dealt out, of {registers} a thread")
    if row["waits"] != WAITS[row["kernel"]]:
        found.append(f"products are waited for as {row['waits']}, expected {WAITS[row['kernel']]}")
    if row["flags"] != ([1, 1] if row["kernel"] == "expand_ws_z_kernel" else [0, 0]):
        found.append(f"flags are raised and read at {row['flags']} places")
    if row["local_memory"]:
        found.append(f"{row['local_memory']} instructions on local memory")
    if registers * threads > SM_REGISTERS:
        found.append(f"{registers * threads} registers of {SM_REGISTERS}")
    return found + row["unguarded"]
