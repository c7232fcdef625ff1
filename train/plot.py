"""Plot the loss curves of runs: `python -m train.plot RUN… --output loss.png`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from minillama.cli import Parser
from minillama.errors import InputError, exit_code

EXAMPLES = """examples:
  python -m train.plot runs/S_src runs/S_tgt --output loss.png
"""
# Thin lines show the loss of every step, thick ones its mean over about this share of the run.
SMOOTHING = 0.02


def read_curves(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and of validation, from RUN/metrics.jsonl or the file itself. Raises InputError."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a run's --output folder") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # a running training may be writing the last one
                raise InputError(f"{path}:{number}: no record of a step") from None
    train, valid = ([(r["step"], r[key]) for r in records if key in r] for key in ("loss", "valid_loss"))
    if not train:
        raise InputError(f"{path}: no step in it yet")
    return train, valid


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values at each index, of fewer at the start."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        result.append(total / min(index + 1, width))
    return result


def plot(runs: Sequence[Path], names: Sequence[str], output: Path, log: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    for number, (run, name) in enumerate(zip(runs, names)):
        train, valid = read_curves(run)
        steps, losses = zip(*train)
        colour = f"C{number}"
        width = max(1, round(SMOOTHING * len(losses)))
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, smooth(losses, width), color=colour, label=name)
        if valid:
            axes.plot(*zip(*valid), color=colour, linestyle="--", marker="o", markersize=3, label=f"{name}, validation")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per target token", yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {output}: cannot be written ({error})") from None
    finally:
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m train.plot", description="Plot the loss curves of runs.", epilog=EXAMPLES)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output folders of runs, finished or not")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the curves (default: the folders')")
    parser.add_argument("--output", required=True, metavar="FILE", help="PNG, SVG or PDF")
    parser.add_argument("--log", action="store_true", help="logarithmic loss axis")
    arguments = parser.parse_args(argv)
    runs = [Path(run) for run in arguments.runs]
    names = arguments.names or [run.resolve().name for run in runs]
    if len(names) != len(runs):
        raise InputError(f"--names: {len(names)} names for {len(runs)} runs")
    try:
        plot(runs, names, Path(arguments.output), arguments.log)
    except ImportError:
        raise InputError("train.plot needs matplotlib; pip install 'collab-mt[plot]'") from None
    print(f"{arguments.output}: {len(runs)} runs", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
