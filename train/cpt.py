"""Continual pre-training on monolingual text: `python -m train.cpt --model DIR --text mono.txt --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from corpora import read_texts
from minillama.cli import Parser
from minillama.errors import exit_code
from train.config import Settings, add_arguments, parse, settings_from

if TYPE_CHECKING:
    from train.distributed import DistributedContext

EXAMPLES = """examples:
  python -m train.cpt --model meta-llama/Llama-3.2-1B --text mono.ja --output runs/base-ja
  python -m train.cpt --init config.json --tokenizer DIR --text a.txt b.txt.gz --lr 1e-3 --epochs 2 --output runs/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.cpt",
        description="Continual pre-training on text, one document a line.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="text files, one document a line, or a split"
    )
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="held-out text for the validation loss")
    add_arguments(parser, epochs=5, packing="epoch")
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    settings = settings_from(arguments)

    from train.run import started_run

    with started_run(arguments, settings) as world:
        if world is not None:
            train(arguments, settings, world)
    return 0


def train(arguments: argparse.Namespace, settings: Settings, world: "DistributedContext") -> None:
    from train.data import documents
    from train.run import load_start, train_and_save

    texts = read_texts(arguments.text)
    held_out = read_texts(arguments.valid) if arguments.valid else None
    start = load_start(arguments, world)
    bos, eos, limit = start.config.bos_token_id, start.end_token, start.longest(settings)
    world.log(texts.describe())
    examples = documents(texts.documents, start.tokenizer, bos, eos, limit)
    valid = documents(held_out.documents, start.tokenizer, bos, eos, limit) if held_out else []
    notes = {"text": texts.describe(), "valid": held_out.describe() if held_out else None}
    train_and_save(arguments, settings, world, start, examples, valid, notes, prompt=None)


if __name__ == "__main__":
    sys.exit(exit_code(main))
