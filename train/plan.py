"""Whether a training run fits into memory: `python -m train.plan --model meta-llama/Llama-3.2-1B --gpu-memory 24`.

Nothing is loaded: shapes come from a folder's config.json, or for well-known models from shapes.toml beside this file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from train.config import add_settings, parse, settings_from

EXAMPLES = """examples:
  python -m train.plan --model runs/base-ja --gpu-memory 80 --ranks 8 --compute-dtype bfloat16 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m train.plan", description="Predict the memory of a training run.", epilog=EXAMPLES)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder, config.json, or a well-known hub id")
    parser.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of one device")
    parser.add_argument("--ranks", type=int, default=1, help="devices that share the weights (1)")
    parser.add_argument("--positions", type=int, metavar="N", help="of a forward pass (default: full sequences)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--json", action=yes_no, default=False, help="the figures in bytes, as a JSON object")
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    add_settings(parser, packing="epoch")
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    settings = settings_from(arguments)
    if not arguments.gpu_memory > 0 or arguments.ranks < 1 or (arguments.positions or 1) < 1:
        raise InputError("--gpu-memory, --ranks and --positions must be above 0")

    from train.memory import GIB, memory_of, shape_of

    share = -(-settings.batch_size // arguments.ranks)  # of the step's sequences
    positions = arguments.positions or min(settings.micro_batch_size or share, share) * settings.sequence_length
    memory = memory_of(shape_of(arguments.model), settings, positions, positions, arguments.ranks, arguments.device)
    fits = memory.peak <= arguments.gpu_memory * GIB
    if arguments.json:
        print(json.dumps({**asdict(memory), "positions": positions, "fits": fits}))
        return 0
    print(f"{arguments.model}: {positions:,} positions in a forward pass, {arguments.ranks} rank(s)\n{memory}")
    print(f"It {'fits' if fits else 'does not fit'} into {arguments.gpu_memory:g} GiB.")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
