"""Benchmarks of the kernels on the machine at hand: `python -m kernels.bench [--all] [--json]`.

On a GPU bench_gpu.py runs, on any machine bench_cpu.py and the table of moved bytes. Every run becomes one JSON file
with device, versions and date under kernels/results/, and `--plot` draws all of them: share of the roof over the batch.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path

import torch

from kernels import bench_cpu, moved_bytes
from minillama.cli import Parser
from minillama.errors import exit_code

RESULTS = Path(__file__).parent / "results"
EXAMPLES = """examples:
  python -m kernels.bench                 this machine, some minutes; the figures as a table
  python -m kernels.bench --json          the same as JSON
  python -m kernels.bench --all --json    every shape and dtype: what a machine with a GPU runs unattended
  python -m kernels.bench --plot          draw all results so far to kernels/results/share_of_roof.png
"""


def device_name() -> str:
    """The GPU's name, or the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def processor_name() -> str:
    """The processor's name as the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions that decide the figures; of a package that is not installed, none."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def measure(everything: bool, quick: bool) -> dict:
    """All that this machine can measure."""
    shapes = [(b, 128_256, n, d) for d in (torch.bfloat16, torch.float32) for n in (1, 2, 3) for b in (1, 16)]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": versions(),
        "all": everything,
        "moved_bytes": moved_bytes.table(shapes[:2] if quick else shapes),
    }
    if torch.cuda.is_available():
        from kernels import bench_gpu

        result["gpu"] = bench_gpu.run(everything, quick)
    else:
        result["cpu"] = bench_cpu.run(everything, quick)
    return result


def save(result: dict, folder: Path) -> Path:
    """Writes one run; the name is its date and device."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^A-Za-z0-9]+", "-", result["device"]).strip("-").lower()
    path = folder / f"{result['date'][:19].replace(':', '')}-{device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def show(result: dict) -> None:
    """The figures as tables."""
    print(f"{result['device']}, " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    print("\nbytes moved for the next token and its log-probability, V = 128,256")
    for row in result["moved_bytes"]:
        print(
            f"  B={row['batch']:<4}N={row['members']} {row['dtype']:9} eager {row['eager_bytes'] / 2**20:8.1f} MB in "
            f"{row['eager_operations']:2} operations, fused {row['fused_bytes'] / 2**20:6.1f} MB: "
            f"{row['ratio']:.1f} times fewer"
        )
    kind = "gpu" if "gpu" in result else "cpu"
    print("\nfused_logits: against eager, and share of the roof (device copy, or memory read)")
    for row in result[kind]["fused_logits"]:
        print(
            f"  B={row['batch']:<4}N={row['members']} V={row['vocabulary']:<7} {row['dtype']:9} "
            f"{row['times_eager']:6.2f} times eager, {row['gigabytes_per_second']:8.1f} GB/s, "
            f"{row['share_of_roof']:6.1%} of the roof"
        )
    if kind == "gpu":
        print("\nfused_head: against cuBLAS and the fused kernel")
        for row in result[kind]["fused_head"]:
            print(f"  B={row['batch']:<4} {row['times_unfused']:5.2f} times")
        return
    print("\npacked_linear, median ms")
    for row in result[kind]["packed_linear"]:
        times = ", ".join(f"{name} {values['median_ms']:.2f}" for name, values in row["ms"].items())
        print(f"  B={row['batch']:<3}{row['shape'][0]}->{row['shape'][1]}: {times}")
        print(
            f"      packed float32 {row['float32_times_linear']:.2f} times F.linear, "
            f"{row['float32_times_better_rival']:.2f} times its better rival; "
            f"best packed {row['best_times_linear']:.2f} times F.linear, "
            f"{row['best_times_best_rival']:.2f} times the best rival of any dtype"
        )
    head = result[kind]["fused_head"]
    print(
        f"\nfused_head: {head['rows']} tokens, widths {head['widths']}, V = {head['vocabulary']:,}: "
        f"{head['peak_megabytes_over_weights']:.0f} MB over the weights in {head['seconds']:.1f} s"
    )


def plot(folder: Path) -> Path:
    """Share of the roof over the batch, three members, one line a run and dtype, and the runs' read speeds in the
    legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise ValueError(f"{folder}: no results to draw, run python -m kernels.bench first")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run in runs:
        rows = run["gpu" if "gpu" in run else "cpu"]["fused_logits"]
        for dtype, vocabulary in sorted({(row["dtype"], row["vocabulary"]) for row in rows}):
            mine = [r for r in rows if (r["dtype"], r["vocabulary"], r["members"]) == (dtype, vocabulary, 3)]
            label = f"{run['device']}, {dtype}, V={vocabulary:,} ({run['date'][:10]})"
            axes.plot([r["batch"] for r in mine], [r["share_of_roof"] for r in mine], marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows in the batch (B)")
    axes.set_ylabel("share of the memory's measured speed")
    axes.set_title("fused_logits, three members: bytes per second over the roof")
    axes.legend(fontsize=7)
    path = folder / "share_of_roof.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m kernels.bench",
        description="Benchmarks of the kernels on this machine.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--all", action="store_true", help="every shape and dtype")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plot", action="store_true", help="draw the results in --output instead of measuring")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: kernels/results)")
    options = parser.parse_args(arguments)
    if options.plot:
        try:
            print(plot(options.output))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    print(f"measuring on {device_name()}, {torch.get_num_threads()} threads", file=sys.stderr)
    result = measure(options.all, options.quick)
    path = save(result, options.output)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    print(f"saved as {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
