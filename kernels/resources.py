"""What the compiler makes of every kernel, on a machine without a GPU: `python -m kernels.resources [--json]`.

Each variant is compiled ahead of time for NVIDIA sm_80 (A100), sm_90 (H100, H200), sm_100 (B200) and AMD gfx942
(MI300X), from the same arguments that a launch would pass, specialised as Triton specialises them (16-byte alignment,
divisibility by 16, the value 1). Then the machine code is read: registers and spills from the cubin's resource usage or
the AMD metadata, the width of the main loop's global loads from the instructions, occupancy from the published limits
of each target (CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD CDNA 3 ISA
guide, section on wave resources). Nothing is run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kernels.triton.variant import Variant

EXAMPLES = """examples:
  python -m kernels.resources                                   a table of all kernels, variants and targets
  python -m kernels.resources --json > resources.json
  python -m kernels.resources --kernel fused_logits --target sm_90
"""


@dataclass(frozen=True)
class Target:
    """Published limits of one multiprocessor (or compute unit); registers are counted per thread in `step`s."""

    backend: str
    arch: int | str
    warp: int
    warps: int
    registers: int
    step: int
    shared: int
    blocks: int
    reserved_shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 65536, 8, 164 << 10, 32, 1024),
    "sm_90": Target("cuda", 90, 32, 64, 65536, 8, 228 << 10, 32, 1024),
    "sm_100": Target("cuda", 100, 32, 64, 65536, 8, 228 << 10, 32, 1024),
    # 4 SIMDs of 512 vector registers a lane and at most 8 waves each
    "gfx942": Target("hip", "gfx942", 64, 32, 4 * 512 * 64, 8, 64 << 10, 32, 0),
}


KERNEL_FILES = ("fused_logits", "top_k_top_p", "softmax_minus_target", "layer", "gemv", "attention")


def variants() -> Iterator[Variant]:
    """Those of every kernel file."""
    for name in KERNEL_FILES:
        yield from importlib.import_module(f"kernels.triton.{name}").variants()


def compile_variant(variant: Variant, target: Target):
    """The compiled kernel, specialised as a launch with these arguments would be."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        torch.int32: "*i32",
    }
    names = variant.function.arg_names  # type: ignore[attr-defined]
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, name in enumerate(names):
        value = variant.positional[position] if position < len(variant.positional) else variant.switches[name]
        if name in variant.switches or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.function, signature, constants, attributes)
    return compile_kernel(
        source, target=GPUTarget(target.backend, target.arch, target.warp), options=dict(variant.options)
    )


def _nvidia_usage(compiled) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread, from the cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(compiled) -> tuple[int, int]:
    """The same from the metadata of the AMD code object."""
    found = dict(re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s*(\d+)", compiled.asm["amdgcn"]))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])


def load_bytes(assembly: str) -> int:
    """Width of the main loop's global loads: the narrowest that carries a fifth of the bytes that one thread loads.

    The joining of partial results reads past L1 (.cg, sc1) and does not count.
    """
    carried: dict[int, int] = {}
    for vector, bits in re.findall(r"ld\.global(?:\.v(\d))?\.[bfus](\d+)", assembly):
        width = int(vector or 1) * int(bits) // 8
        carried[width] = carried.get(width, 0) + width
    for width in (int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (\w+)", assembly)):
        carried[width] = carried.get(width, 0) + width
    sizes = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short_d16": 2, "short_d16_hi": 2, "dword": 4}
    sizes |= {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    for kind, rest in re.findall(r"(?:global|buffer)_load_(\w+)([^\n]*)", assembly):
        if kind in sizes and " sc1" not in rest and " nt" not in rest:
            carried[sizes[kind]] = carried.get(sizes[kind], 0) + sizes[kind]
    total = sum(carried.values())
    return min((width for width, size in carried.items() if size >= total / 5), default=0)


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Resident warps over the most that a multiprocessor holds, from registers, shared memory and block slots."""
    per_thread = -(-registers // target.step) * target.step
    by_registers = target.registers // (per_thread * target.warp * warps)
    by_shared = target.shared // (shared + target.reserved_shared) if shared + target.reserved_shared else target.blocks
    blocks = min(by_registers, by_shared, target.blocks, target.warps // warps)
    return blocks * warps / target.warps


def measure(variant: Variant, target_name: str) -> dict:
    """One row of the table."""
    target = TARGETS[target_name]
    compiled = compile_variant(variant, target)
    registers, spills = _nvidia_usage(compiled) if target.backend == "cuda" else _amd_usage(compiled)
    shared = compiled.metadata.shared
    return {
        "kernel": variant.kernel,
        "variant": variant.name,
        "target": target_name,
        "registers": registers,
        "spills": spills,
        "shared_bytes": shared,
        "load_bytes": load_bytes(compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]),
        "warps": variant.options["num_warps"],
        "occupancy": round(occupancy(target, registers, shared, variant.options["num_warps"]), 3),
        "aligned": variant.aligned,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.resources",
        description="Registers, spills, shared memory, load width and occupancy of every kernel, without a GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--kernel", help="only this kernel, such as fused_logits")
    parser.add_argument("--variant", default="", help="only variants whose name contains this text")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target; may be repeated")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled, unset it", file=sys.stderr)
        return 2
    chosen = [v for v in variants() if options.kernel in (None, v.kernel) and options.variant in v.name]
    if not chosen:
        print(f"no kernel {options.kernel or ''} has a variant named '{options.variant}'", file=sys.stderr)
        return 2
    rows = []
    layout = (
        "{kernel:21}{variant:36}{target:8}{registers:>10}{spills:>8}{shared_bytes:>8}{load_bytes:>6}{occupancy:>11}"
    )
    columns = ("kernel", "variant", "target", "registers", "spills", "shared_bytes", "load_bytes", "occupancy")
    if not options.json:
        print(layout.format(**{name: name.removesuffix("_bytes") for name in columns}))
    for variant in chosen:
        for target_name in options.target or TARGETS:
            rows.append(measure(variant, target_name))
            if not options.json:
                print(layout.format(**rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
