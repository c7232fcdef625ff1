"""What the compiler makes of every kernel, on a machine without a GPU: `python -m kernels.resources [--json]`.

Each variant is compiled ahead of time for NVIDIA sm_80 (A100), sm_90 (H100, H200), sm_100 (B200) and AMD gfx942
(MI300X), specialised for the arguments of a recorded launch. Registers and spills are read from the cubin or the AMD
metadata, the width of the main loop's global loads from the instructions.
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
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kernels.triton.launch import SHORT, Launch, Variant

EXAMPLES = """examples:
  python -m kernels.resources                                   a table of all kernels, variants and targets
  python -m kernels.resources --json > resources.json
  python -m kernels.resources --kernel fused_logits --target sm_90
"""
# Triton's backend, its name for the architecture, threads of a warp
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
KERNEL_FILES = ("fused_logits", "top_k_top_p", "softmax_minus_target", "layer", "gemv", "attention")
POINTERS = {dtype: f"*{name}" for dtype, name in SHORT.items()} | {torch.int64: "*i64", torch.int32: "*i32"}
AMD_LOADS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short_d16": 2, "short_d16_hi": 2}
AMD_LOADS |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def variants() -> Iterator[Variant]:
    """Those of every kernel file."""
    for name in KERNEL_FILES:
        yield from importlib.import_module(f"kernels.triton.{name}").variants()


def measure(variant: Variant, target: str) -> dict[str, Any]:
    """One row of the table; spills and shared memory in bytes."""
    compiled = compile_launch(variant.launch, target)
    nvidia = "cubin" in compiled.asm
    registers, spills = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    return {
        "kernel": variant.kernel,
        "variant": variant.name,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "load_bytes": load_bytes(compiled.asm["ptx" if nvidia else "amdgcn"]),
        "warps": variant.launch.options["num_warps"],
        "aligned": variant.aligned,
    }


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel, specialised as a launch with these arguments would be."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}
    positional = dict(zip(launch.function.arg_names, launch.positional, strict=False))
    for position, name in enumerate(launch.function.arg_names):
        value = positional.get(name, launch.switches.get(name))
        if name in launch.switches or (isinstance(value, int) and value == 1):
            signature[name], constants[(position,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, signature, constants, attributes)
    return compile_kernel(source, target=GPUTarget(*TARGETS[target]), options=dict(launch.options))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """The same from the metadata of the AMD code object."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])


def load_bytes(assembly: str) -> int:
    """Width of the main loop's global loads: the narrowest that carries a fifth of the bytes that one thread loads.

    The joining of partial results reads past L1 (.cg, sc1) and does not count.
    """
    carried: Counter[int] = Counter()
    for vector, bits in re.findall(r"ld\.global(?:\.v(\d))?\.[bfus](\d+)", assembly):
        width = int(vector or 1) * int(bits) // 8
        carried[width] += width
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (\w+)", assembly):
        carried[int(size, 0)] += int(size, 0)
    for kind, rest in re.findall(r"(?:global|buffer)_load_(\w+)([^\n]*)", assembly):
        if kind in AMD_LOADS and " sc1" not in rest and " nt" not in rest:
            carried[AMD_LOADS[kind]] += AMD_LOADS[kind]
    return min((width for width, size in carried.items() if size >= carried.total() / 5), default=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.resources",
        description="Registers, spills, shared memory and load width of every kernel, without a GPU.",
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
    selected = [v for v in variants() if options.kernel in (None, v.kernel) and options.variant in v.name]
    if not selected:
        print(f"no kernel {options.kernel or ''} has a variant named '{options.variant}'", file=sys.stderr)
        return 2
    rows = (measure(variant, target) for variant in selected for target in options.target or TARGETS)
    if options.json:
        print(json.dumps(list(rows), indent=1))
        return 0
    widths = {
        "kernel": 21,
        "variant": 36,
        "target": 8,
        "registers": 11,
        "spills": 8,
        "shared_bytes": 14,
        "load_bytes": 10,
    }
    print("".join(f"{name:{width}}" for name, width in widths.items()))
    for row in rows:
        print("".join(f"{row[name]:<{width}}" for name, width in widths.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
