"""What the compiler makes of every kernel, on a machine without a GPU: `python -m kernels.resources [--json]`.

Each variant is compiled ahead of time for NVIDIA sm_80 (A100), sm_90 (H100, H200), sm_100 (B200) and AMD gfx942
(MI300X), from the same arguments that a launch would pass, specialised as Triton specialises them (16-byte alignment,
divisibility by 16, the value 1). Then the machine code is read: registers and spills from the cubin's resource usage or
the AMD metadata, the width of the main loop's global loads from the instructions, occupancy from the published limits
of each target (CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD CDNA 3 ISA
guide, section on wave resources). Nothing is run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.types import HeadRequest, Request, Sampling
from minillama.cli import Parser
from minillama.errors import exit_code

EXAMPLES = """examples:
  python -m kernels.resources                                   a table of all kernels, variants and targets
  python -m kernels.resources --json > resources.json
  python -m kernels.resources --kernel fused_head --target sm_90
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


@dataclass(frozen=True)
class Variant:
    """One kernel with its arguments; `aligned` says whether rows start at multiples of 16 bytes."""

    kernel: str
    name: str
    function: object
    positional: tuple
    switches: dict
    options: dict
    aligned: bool = True


def variants() -> Iterator[Variant]:
    """Every combination that the launchers meet in practice; features are shown on three members of bf16."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for members in (1, 3, 8):
            yield _logits_variant(f"argmax N={members} {_short(dtype)}", [dtype] * members)
    mixed = [torch.bfloat16, torch.float16, torch.float32]
    yield _logits_variant("argmax N=3 mixed", mixed)
    three = [torch.bfloat16] * 3
    yield _logits_variant("argmax N=3 bf16, rows not aligned", three, vocabulary=50_257)
    yield _logits_variant("members N=3 bf16", three, members=True)
    yield _logits_variant("top_k=16 N=3 bf16", three, top_k=16)
    yield _logits_variant("entropy and given N=3 bf16", three, entropy=True, given=4)
    yield _logits_variant("sample N=3 bf16", three, sample=True)
    yield _logits_variant("verify T=7 N=3 bf16", three, every=8)
    yield _logits_variant("everything N=3 mixed", mixed, members=True, top_k=16, entropy=True, given=4, sample=True)
    yield _logits_variant("everything N=8 fp32", [torch.float32] * 8, members=True, top_k=16, entropy=True, sample=True)
    yield _truncated_variant("digit N=3 bf16", three)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _head_variant(f"argmax N=3 {_short(dtype)}", dtype, [3072, 2048, 2048])
    yield _head_variant("given N=3 bf16", torch.bfloat16, [3072, 2048, 2048], given=1)
    yield _head_variant("argmax N=8 bf16", torch.bfloat16, [2048] * 8)
    for dtype in (torch.bfloat16, torch.float32):
        yield _loss_variant(f"gradient in place {_short(dtype)}", dtype)
    yield _loss_variant("gradient in place bf16, not aligned", torch.bfloat16, vocabulary=50_257)
    yield from _layer_variants()
    yield from _row_linear_variants()
    yield from _attend_variants()


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _sampling(rows: int, **truncation: float) -> Sampling:
    long, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    return Sampling(torch.zeros(1, dtype=torch.int64), long, long, ones, **truncation)  # type: ignore[arg-type]


def _logits_variant(
    name: str,
    dtypes: list,
    vocabulary: int = 128_256,
    every: int = 1,
    given: int = 0,
    sample: bool = False,
    **asked,
) -> Variant:
    from kernels.triton import fused_logits as path

    rows = 4 * every
    request = Request(
        tuple(torch.empty(rows, vocabulary, dtype=dtype) for dtype in dtypes),
        torch.ones(len(dtypes)),
        given=torch.zeros(rows, given, dtype=torch.int64) if given else None,
        sample=_sampling(rows) if sample else None,
        draft=torch.zeros(4, every - 1, dtype=torch.int64) if every > 1 else None,
        every=every,
        **asked,
    )
    verification = path.allocate_verification(request) if every > 1 else None
    out = verification.steps if verification is not None else path.allocate(request)
    positional, switches = path.launch_arguments(request, out, verification)
    aligned = vocabulary % 16 == 0
    return Variant(
        "fused_logits", name, path._fused_logits_kernel, positional, switches, path.launch_options(request), aligned
    )


def _truncated_variant(name: str, dtypes: list) -> Variant:
    from kernels.triton import top_k_top_p as path

    logits = tuple(torch.empty(4, 128_256, dtype=dtype) for dtype in dtypes)
    request = Request(logits, torch.ones(len(dtypes)), sample=_sampling(4, top_k=50, top_p=0.9))
    positional, switches = path.launch_arguments(request, path.allocate(request), digit=1)
    return Variant("truncated_sample", name, path._digit_kernel, positional, switches, path.LAUNCH_OPTIONS)


def _head_variant(name: str, dtype: torch.dtype, widths: list[int], given: int = 0) -> Variant:
    from kernels.triton import fused_head as path

    rows, vocabulary = 64, 128_256
    request = HeadRequest(
        tuple(torch.empty(rows, width, dtype=dtype) for width in widths),
        # never touched, so no memory stands behind it
        tuple(torch.empty(1, width, dtype=dtype).expand(vocabulary, width) for width in widths),
        torch.ones(len(widths)),
        given=torch.zeros(rows, given, dtype=torch.int64) if given else None,
    )
    positional, switches = path.launch_arguments(request, path.allocate(request))
    strides = slice(24, 32)  # the expanded tensors' strides are 0; a real output layer's are its width
    padded = (widths + widths[:1] * 8)[:8]
    positional = (*positional[: strides.start], *padded, *positional[strides.stop :])
    return Variant("fused_head", name, path._fused_head_kernel, positional, switches, path.LAUNCH_OPTIONS)


def _loss_variant(name: str, dtype: torch.dtype, vocabulary: int = 128_256) -> Variant:
    from kernels.triton import softmax_minus_target as path

    logits, target, loss = torch.empty(4, vocabulary, dtype=dtype), torch.zeros(4, dtype=torch.int64), torch.empty(4)
    positional, switches = path.launch_arguments(logits, target, loss)
    aligned = vocabulary % 16 == 0
    kernel = path._cross_entropy_kernel
    return Variant("linear_cross_entropy", name, kernel, positional, switches, path.LAUNCH_OPTIONS, aligned)


def _layer_variants() -> Iterator[Variant]:
    """Llama-3.2-1B's layer in bf16, four rows."""
    from kernels.triton import layer as path

    rows, width, queries, keys, channels = 4, 2048, 32, 8, 64
    stream_RD, scale_D = torch.empty(rows, width + 16)[:, :width], torch.empty(width)
    x_RD = torch.empty(rows, width, dtype=torch.bfloat16)
    gate_up_RO = torch.empty(rows, 2 * 8192, dtype=torch.bfloat16)
    qkv_RO = torch.empty(rows, (queries + 2 * keys) * channels, dtype=torch.bfloat16)
    turn_RHC2 = torch.empty(rows, queries + keys, channels // 2, 2)
    slot_R, entries_PJ = torch.zeros(rows, dtype=torch.int64), torch.empty(256, 2 * keys * channels, dtype=x_RD.dtype)
    turn = path.turn_arguments(qkv_RO, turn_RHC2, slot_R, x_RD, entries_PJ, queries, keys)
    for name, function, (positional, switches, options) in (
        ("norm", path._norm_kernel, path.norm_arguments(stream_RD, scale_D, 1e-5, x_RD, None)),
        ("add and norm", path._norm_kernel, path.norm_arguments(stream_RD, scale_D, 1e-5, x_RD, x_RD)),
        ("turn and store", path._turn_kernel, turn),
        ("silu and multiply", path._silu_kernel, path.silu_arguments(gate_up_RO, gate_up_RO[:, :8192])),
    ):
        yield Variant("layer", name, function, positional, switches, options)


def _row_linear_variants() -> Iterator[Variant]:
    """The products of Llama-3.2-1B's layer in bf16."""
    from kernels.triton import gemv as path

    width, queries, keys, channels = 2048, 32, 8, 64
    x_1D, stream_1D, scale_D = torch.empty(1, width, dtype=torch.bfloat16), torch.empty(1, width), torch.empty(width)

    def weight(outputs: int) -> torch.Tensor:
        return torch.empty(outputs, width, dtype=torch.bfloat16)

    norm = path.Normed(scale_D, 1e-5)
    entries_PJ = torch.empty(256, 2 * keys * channels, dtype=torch.bfloat16)
    slot_1, turn_C2 = torch.zeros(1, dtype=torch.int64), torch.empty(channels // 2, 2)
    turned = path.Turned(turn_C2, slot_1, entries_PJ, queries, keys)
    for name, arguments in (
        ("plain", path.arguments(x_1D, weight(width))),
        ("added", path.arguments(x_1D, weight(width), add_to=stream_1D)),
        ("norm and gated", path.arguments(stream_1D, weight(2 * 8192), norm=norm, gated=True)),
        (
            "norm and turned",
            path.arguments(stream_1D, weight((queries + 2 * keys) * channels), norm=norm, turned=turned),
        ),
    ):
        yield Variant("row_linear", name, path._row_linear_kernel, *arguments[1])


def _attend_variants() -> Iterator[Variant]:
    """Attention of Llama-3.2-1B's and 3B's heads."""
    from kernels.triton import attention as path

    for name, dtype, queries, channels in (
        ("C=64 bf16", torch.bfloat16, 32, 64),
        ("C=128 bf16", torch.bfloat16, 24, 128),
        ("C=128 fp32", torch.float32, 24, 128),
    ):
        query_RQ, entries_PJ = (
            torch.empty(4, queries * channels, dtype=dtype),
            torch.empty(1024, 16 * channels, dtype=dtype),
        )
        slot_R = torch.zeros(4, dtype=torch.int64)
        arguments = path.arguments(query_RQ, entries_PJ, slot_R, 256, 8, channels, torch.empty_like(query_RQ))
        yield Variant("attend", name, path._attend_kernel, *arguments)


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
    parser = Parser(
        prog="python -m kernels.resources",
        description="Registers, spills, shared memory, load width and occupancy of every kernel, without a GPU.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of a table")
    parser.add_argument("--kernel", help="only this kernel, such as fused_head")
    parser.add_argument("--variant", default="", help="only variants whose name holds this text")
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
    if not options.json:
        head = ("registers", "spills", "shared", "load", "occupancy")
        print(f"{'kernel':21}{'variant':36}{'target':8}{head[0]:>10}{head[1]:>8}{head[2]:>8}{head[3]:>6}{head[4]:>11}")
    for variant in chosen:
        for target_name in options.target or TARGETS:
            rows.append(measure(variant, target_name))
            if not options.json:
                print(layout.format(**rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
