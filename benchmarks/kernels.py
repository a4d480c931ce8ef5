"""Compiles every Triton kernel for every architecture, without a GPU: ``python -m benchmarks.kernels``.

Per kernel, tile and architecture: registers, spills, shared memory, and the matrix instructions in the machine code.
Writes ``kernels.csv`` beside the other results; ``python -m tools.tables`` writes it into ``docs/kernels.md``. Exit
status 1 if a kernel spills, does not fit, or multiplies without the instructions that it should use.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# Kernels compiled for real, whatever the caller's environment says.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.record import RESULTS
from real_kernels.tiles import BRANCHES, FLOAT32, NARROW, SCORES, TILES, Tile
from real_kernels.triton_gemm import logits_kernel
from real_kernels.triton_reward import reward_kernel
from real_kernels.triton_rows import combine_kernel, dlogits_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a program may have. sm_86 and sm_89 run what is compiled for sm_80, and have 99 KiB.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_DEFAULT = {**SHARED, "sm_80": 99 * 1024}
# What 16-bit matrix products must come out as.
MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
_PATTERN = {
    "mma.sync": r"\bmma\.sync\.",
    "wgmma": r"\bwgmma\.mma_async\.",
    "tcgen05.mma": r"\btcgen05\.mma\.",
    "v_mfma": r"\bv_mfma_",
}
EPILOGUES = {"log-sum-exp": 0, "kept logits": 1, "dlogits": 2}


@dataclass(frozen=True)
class Case:
    """One thing to compile."""

    arch: str
    kernel: str
    variant: str
    dtype: str
    tile: str
    default: bool
    source: Any
    options: dict[str, Any]
    descriptors: bool = False

    @property
    def products(self) -> bool:
        """Whether it must use matrix instructions."""
        return self.kernel == "logits" and self.dtype != "fp32"


@dataclass(frozen=True)
class Resources:
    """A line of the table; `registers` per thread (vector registers on AMD), `spills` and `shared` in bytes."""

    arch: str
    kernel: str
    variant: str
    dtype: str
    tile: str
    warps: int
    registers: int
    spills: int
    shared: int
    matrix_instructions: str
    copies: str
    triton: str
    verdict: str


def gemm(arch: str, dtype: str, tile: Tile, default: bool, variant: str, **flags: bool) -> Case:
    """The GEMM with one epilogue; descriptors (TMA) where the launcher would use them."""
    store = EPILOGUES[variant.split(",")[0]]
    descriptors = arch in ("sm_90", "sm_100") and dtype != "fp32" and not flags.get("pointers", False)
    constants: dict[str, Any] = {
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "GROUP": tile.group,
        "DESCRIPTORS": descriptors,
        "EVEN_D": flags.get("even", True),
        "BIAS": flags.get("bias", False),
        "CAP": flags.get("cap", False),
        "SHARED": flags.get("shared", False),
        "ENTROPY": flags.get("entropy", False),
        "STORE": store,
        "BRANCHES": arch in BRANCHES,
        "PRECISION": "ieee",
        "WIDEN": False,
    }
    half = f"*{dtype}"
    types = dict.fromkeys(
        ("tile_max", "tile_sum", "tile_ez", "selected", "row_max", "log_sum", "dlogp", "logp"), "*fp32"
    ) | {
        "h": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>" if descriptors else half,
        "w": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>" if descriptors else half,
        "bias": half,
        "ids": "*i64",
        "out": half,
        "inverse_temperature": "fp32",
        "cap": "fp32",
    }
    # As the launcher specialises them: multiples of 16 where real shapes are.
    divisible = {"h", "w", "bias", "out", "D", "stride_h", "stride_w", "stride_out", "width", "first"}
    if not flags.get("even", True):
        divisible -= {"D", "stride_h", "stride_w"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    name = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.stages} stages"
    source = _source(logits_kernel, types, constants, divisible)
    return Case(arch, "logits", variant, dtype, name, default, source, options, descriptors)


def cases(arch: str) -> Iterator[Case]:
    """Every kernel and configuration of an architecture."""
    for tile in TILES[arch]:
        default = tile == TILES[arch][0]
        for variant in EPILOGUES:
            yield gemm(arch, "bf16", tile, default, variant)
        if default:
            yield gemm(arch, "fp16", tile, default, "kept logits")
            yield gemm(arch, "bf16", tile, default, "log-sum-exp, entropy", entropy=True)
    for variant in EPILOGUES:
        yield gemm(arch, "bf16", SCORES[arch], True, f"{variant}, score tokens", shared=True)
    for variant in ("log-sum-exp", "dlogits"):
        yield gemm(arch, "bf16", NARROW[arch], True, f"{variant}, bias, soft-cap", bias=True, cap=True)
        yield gemm(arch, "bf16", NARROW[arch], True, f"{variant}, pointers, odd D", pointers=True, even=False)
    few = SCORES[arch]
    yield gemm(arch, "bf16", few, True, "dlogits, score tokens, bias, soft-cap", shared=True, bias=True, cap=True)
    for tile in FLOAT32[arch]:
        for variant in EPILOGUES:
            yield gemm(arch, "fp32", tile, True, variant)
    columns = sorted({tile.columns for tile in (*TILES[arch], SCORES[arch])})
    for bn in columns:
        types = {"saved": "*bf16", "ids": "*i64", "inverse_temperature": "fp32"} | dict.fromkeys(
            ("tile_max", "row_max", "log_sum", "dlogp", "logp"), "*fp32"
        )
        constants = {"SHARED": False, "BLOCK_ROWS": 16, "BN": bn}
        source = _source(dlogits_kernel, types, constants, {"saved", "stride", "width"})
        yield Case(arch, "dlogits", "in place", "bf16", f"16x{bn}", True, source, {"num_warps": 8})
    types = dict.fromkeys(
        ("tile_max", "tile_sum", "tile_ez", "selected", "row_max", "log_sum", "logp", "entropy"), "*fp32"
    )
    types["inverse_temperature"] = "fp32"
    constants = {"ENTROPY": True, "BLOCK_TILES": 32, "BLOCK_ROWS": 32}
    yield Case(arch, "combine", "entropy", "fp32", "32x32", True, _source(combine_kernel, types, constants, set()), {})
    floats = ("logp", "engine_score_logprobs", "values", "labels", "counts", "y_hat", "reward", "advantages")
    types = dict.fromkeys((*floats, "coefficient", "refinement", "dlogp"), "*fp32") | {
        "group": "*i64",
        "rollout_valid": "*u8",
    }
    types |= dict.fromkeys(("lam", "beta", "clip"), "fp32")
    flags = {"RENORMALIZE": True, "LEAVE_ONE_OUT": True, "NORMALIZE": True, "TOKEN_MEAN": False}
    for reference in (False, True):
        constants = {**flags, "REFERENCE": reference, "BLOCK": 32, "KP": 16}
        source = _source(reward_kernel, types, constants, set())
        name = "reference reward" if reference else "paper reward"
        yield Case(arch, "reward", name, "fp32", "32", True, source, {})


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any], divisible: set[str]) -> Any:
    """The kernel with its arguments' types; integers are i32 where nothing else is said."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        pointer_or_integer = signature[name][0] == "*" or signature[name] == "i32"
        if name in divisible and pointer_or_integer:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def compile_case(case: Case) -> Resources:
    """Compile, and read the machine code's resources."""
    compiled = triton.compile(case.source, target=TARGETS[case.arch], options=case.options)
    metadata = compiled.metadata
    if case.arch == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)") + _number(text, r"\.agpr_count:\s+(\d+)")
        # Scalar registers spill into lanes of vector registers; what reaches memory is the private segment.
        spills = _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
    else:
        text = compiled.asm["ptx"]
        registers, spills = _cubin_resources(compiled, int(TARGETS[case.arch].arch))
    found = [name for name, pattern in _PATTERN.items() if re.search(pattern, text)]
    copies = [name for name in ("cp.async.bulk.tensor", "cp.async.cg") if name in text]
    problems = []
    if spills:
        problems.append(f"spills {spills} bytes")
    limit = (SHARED_DEFAULT if case.default else SHARED)[case.arch]
    if metadata.shared > limit:
        problems.append(f"needs {metadata.shared} bytes of shared memory, and there are {limit}")
    if case.products and MATRIX[case.arch] not in found:
        problems.append(f"multiplies without {MATRIX[case.arch]}")
    if case.descriptors and "cp.async.bulk.tensor" not in copies:
        problems.append("does not fetch its tiles by the bulk copy engine")
    return Resources(
        case.arch,
        case.kernel,
        case.variant,
        case.dtype,
        case.tile,
        metadata.num_warps,
        registers,
        spills,
        metadata.shared,
        " ".join(found) or "-",
        " ".join(copies) or "-",
        triton.__version__,
        "; ".join(problems) or "fine",
    )


def _cubin_resources(compiled: Any, capability: int) -> tuple[int, int]:
    """Registers per thread, and bytes spilled."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        text = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        registers, stack = _number(text, r"REG:(\d+)"), _number(text, r"STACK:(\d+)") + _number(text, r"LOCAL:(\d+)")
        if not stack:
            return registers, 0
        # A stack may hold other things than spilled registers: the assembler says which.
        ptx.write_text(compiled.asm["ptx"])
        assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
        name = re.search(r"\.target (\w+)", compiled.asm["ptx"])
        assert name is not None
        text = _run(assembler.path, "-v", f"--gpu-name={name[1]}", str(ptx), "-o", str(cubin))
        return registers, _number(text, r"(\d+) bytes spill stores") + _number(text, r"(\d+) bytes spill loads")


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
        for case in cases(arch):
            if arguments.default and not case.default:
                continue
            line = compile_case(case)
            lines.append(line)
            print(
                f"{line.arch:7} {line.kernel:8} {line.variant:40} {line.dtype} {line.tile:22} "
                f"{line.registers:4} registers {line.shared:7} B shared  {line.matrix_instructions:12} {line.verdict}",
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
