"""Continual pre-training on monolingual text: `python -m train.cpt --model DIR --text mono.txt --output DIR`."""

import sys
from collections.abc import Sequence

from corpora import read_texts
from minillama.cli import Parser
from minillama.errors import exit_code
from train.config import add_arguments, parse, settings_from

EXAMPLES = """examples:
  python -m train.cpt --model meta-llama/Llama-3.2-1B --text mono.ja --output runs/base-ja
  python -m train.cpt --init config.json --tokenizer DIR --text a.txt b.txt.gz --lr 1e-3 --epochs 2 --output runs/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m train.cpt", description="Continual pre-training on text.", epilog=EXAMPLES)
    files = "text files, one document a line, or a split"
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help=files)
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="held-out text for the validation loss")
    add_arguments(parser, epochs=5, packing="epoch")
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    settings = settings_from(arguments)

    from train.data import documents
    from train.distributed import DistributedContext
    from train.run import Data, Start, run

    def load(start: Start, world: DistributedContext) -> Data:
        texts = read_texts(arguments.text)
        held_out = read_texts(arguments.valid) if arguments.valid else None
        rules = start.tokenizer, start.config.bos_token_id, start.end_token, start.longest(settings)
        world.log(texts.describe())
        notes = {"text": texts.describe(), "valid": held_out.describe() if held_out else None}
        valid = documents(held_out.documents, *rules) if held_out else []
        return Data(documents(texts.documents, *rules), valid, notes)

    return run(arguments, settings, load)


if __name__ == "__main__":
    sys.exit(exit_code(main))
