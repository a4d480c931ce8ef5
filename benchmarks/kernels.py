"""Compiles every launch of every Triton kernel for every architecture, without a GPU: ``python -m benchmarks.kernels``.

Per kernel, tile and architecture: registers, spills, shared memory, programs that fit on a multiprocessor, instructions
of the epilogue, and the matrix instructions in the machine code. Writes ``kernels.csv`` beside the other results;
``python -m tools.tables`` writes it into ``docs/kernels.md``. Exit status 1 if a kernel spills, does not fit, has
not the matrix instructions that it should use, or an epilogue above its budget.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Kernels compiled for real, whatever the caller's environment says.
os.environ.pop("TRITON_INTERPRET", None)

import triton

from benchmarks.launches import TARGETS, Launch, launches
from benchmarks.record import RESULTS
from real_kernels.tiles import TILES

# Bytes a program may have. sm_86 and sm_89 run what is compiled for sm_80, and have 99 KiB.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_DEFAULT = {**SHARED, "sm_80": 99 * 1024}
# Of an NVIDIA multiprocessor; registers are given to a warp by 256.
REGISTERS, SHARED_OF_ALL = 65536, {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
# What 16-bit matrix products must come out as.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
# Instructions behind the products that every tile of sm_90 executes: so many, and so many more for each element of a
# thread: a maximum, a multiply-add, an exponential and an addition, or for dL/dz a multiply-add, an exponential and a
# product. Rounding and storing 16 bits takes the rest. A bias is loaded, widened and added; a soft-cap is a tanh.
BUDGET = {
    "log-sum-exp": (130, 4.3),
    "kept logits, row base": (150, 6.2),
    "dlogits": (140, 6.9),
    "log-sum-exp, bias": (130, 7.3),
    "kept logits, row base, bias": (150, 9.3),
    "dlogits, bias": (140, 9.7),
    "log-sum-exp, bias, soft-cap": (130, 28.0),
    "dlogits, bias, soft-cap": (140, 28.4),
}
_PATTERN = {
    "mma.sync": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05.mma": r"\btcgen05\.mma\.",
    "v_mfma": r"\bv_mfma_",
}


# A tile on its way from shared memory to a tensor.
_STORE = "cp.async.bulk.tensor.2d.global.shared"


@dataclass(frozen=True)
class Resources:
    """A line of the table.

    Attributes:
        registers: Per thread (vector registers on AMD).
        spills: Bytes.
        shared: Bytes of shared memory.
        programs: That fit on an NVIDIA multiprocessor at once.
        instructions: Of the GEMM on sm_90, per thread: what every tile executes behind its products.
    """

    arch: str
    kernel: str
    variant: str
    dtype: str
    tile: str
    warps: int
    registers: int
    spills: int
    shared: int
    programs: int
    instructions: int
    matrix_instructions: str
    copies: str
    triton: str
    verdict: str


def resources(arch: str, launch: Launch) -> Resources:
    """What a launch's machine code takes, and whether that is fine."""
    compiled, tile = launch.compiled, launch.tile
    metadata, warps = compiled.metadata, compiled.metadata.num_warps
    programs, instructions = 0, 0
    if arch == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)") + _number(text, r"\.agpr_count:\s+(\d+)")
        # Scalar registers spill into lanes of vector registers; what reaches memory is the private segment.
        spills = _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        text = compiled.asm["ptx"]
        registers, spills, instructions = _of_cubin(compiled, int(TARGETS[arch].arch))
        if launch.kernel == "persistent":
            instructions = 0  # its loop's last product has the next tile behind it, not the end
        of_program = -(-registers // 8) * 8 * 32 * warps
        # A program's shared memory has a kibibyte of the system's beside it.
        programs = min(REGISTERS // of_program, SHARED_OF_ALL[arch] // (metadata.shared + 1024), 64 // warps)
    found = [name for name, pattern in _PATTERN.items() if re.search(pattern, text)]
    copies = [name for name in ("cp.async.bulk.tensor", "cp.async.cg") if name in text]
    if _STORE in text:
        copies.append("bulk stores")
    half = launch.dtype != "fp32"
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    limit = (SHARED if tile in TILES[arch][1:] else SHARED_DEFAULT)[arch]
    if metadata.shared > limit:
        problems.append(f"needs {metadata.shared} bytes of shared memory, and there are {limit}")
    if tile and half and MATRIX[arch] not in found:
        problems.append(f"multiplies without {MATRIX[arch]}")
    fetched = arch in ("sm_90", "sm_100") and "pointers" not in launch.variant
    if tile and half and fetched and "cp.async.bulk.tensor" not in copies:
        problems.append("does not fetch its tiles by the bulk copy engine")
    if tile and half and programs < (tile.programs if arch != "gfx942" else 0):
        problems.append(f"{programs} programs fit on a multiprocessor, and {tile.programs} should")
    if launch.kernel == "persistent" and "bulk stores" not in copies:
        problems.append("does not store its tiles by the bulk copy engine")
    if launch.kernel == "logits" and half and arch == "sm_90" and launch.variant in BUDGET:
        fixed, each = BUDGET[launch.variant]
        assert tile is not None
        elements = tile.rows * tile.columns // (32 * warps)
        if not 3 * elements < instructions <= fixed + each * elements:
            problems.append(f"{instructions} instructions behind the products, for {elements} elements a thread")
    return Resources(
        arch,
        launch.kernel,
        launch.variant,
        launch.dtype,
        "-" if tile is None else f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.stages} stages",
        warps,
        registers,
        spills,
        metadata.shared,
        programs,
        instructions,
        " ".join(found) or "-",
        " ".join(copies) or "-",
        triton.__version__,
        "; ".join(problems) or "fine",
    )


def _of_cubin(compiled: Any, capability: int) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled, and instructions behind the products that every tile executes."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        registers, stack = _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)") + _number(text, r"LOCAL:(\d+)")
        instructions = behind_products(_run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))) if capability == 90 else 0
        if not stack:
            return registers, 0, instructions
        # A stack may hold other things than spilled registers: the assembler says which.
        ptx.write_text(compiled.asm["ptx"])
        assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
        name = re.search(r"\.target (\w+)", compiled.asm["ptx"])
        assert name is not None
        text = _run(assembler.path, "-v", f"--gpu-name={name[1]}", str(ptx), "-o", str(cubin))
        spilled = _number(text, r"(\d+) bytes spill stores") + _number(text, r"(\d+) bytes spill loads")
        return registers, spilled, instructions


def behind_products(assembly: str) -> int:
    """Instructions from the last matrix product to the end, without what a branch may skip; 0 without products."""
    count, skipped_to = 0, ""
    for line in assembly.rpartition("HGMMA")[2].splitlines() if "HGMMA" in assembly else ():
        if label := re.match(r"(\.L_\w+):", line):
            if label[1] == skipped_to:
                skipped_to = ""
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) and not skipped_to:
            count += 1
            if re.search(r"\*/\s+EXIT\b", line):  # without a condition
                break
            # Forward alone: the loop's own branch goes back to a label that has been passed.
            if (branch := re.search(r"@!?U?P\d BRA.*`\((\.L_\w+)\)", line)) and _ahead(assembly, line, branch[1]):
                skipped_to = branch[1]
    return count


def _ahead(assembly: str, line: str, label: str) -> bool:
    """Whether a branch skips what is behind it, and not all of that up to the end."""
    target, here = assembly.index(f"{label}:"), assembly.index(line)
    return here < target < here + assembly[here:].index(" EXIT ;")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def main() -> int:
    """Compile all; exit status 1 if one is not fine."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description="Compiles every kernel; needs no GPU.")
    parser.add_argument("--arch", choices=TARGETS, action="append", help="this one alone (may be given again)")
    parser.add_argument("--default", action="store_true", help="default tiles alone")
    parser.add_argument("--csv", type=Path, default=RESULTS / "kernels.csv", help="where the table goes")
    arguments = parser.parse_args()
    lines = []
    for arch in arguments.arch or TARGETS:
        for launch in launches(arch, alternatives=not arguments.default):
            line = resources(arch, launch)
            lines.append(line)
            print(
                f"{line.arch:7} {line.kernel:8} {line.variant:40} {line.dtype} {line.tile:22} "
                f"{line.registers:4} registers {line.shared:7} B shared {line.programs:2} programs "
                f"{line.instructions:5} instructions  {line.matrix_instructions:12} {line.verdict}",
                flush=True,
            )
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
    return int(any(line.verdict != "fine" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
