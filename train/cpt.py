"""Continual pre-training on monolingual text: `python -m train.cpt --model DIR --text mono.txt --output DIR`."""

import argparse
import sys
from collections.abc import Sequence

from corpora import read_texts
from minillama.errors import exit_code
from train.data import documents
from train.run import end_token, load_start, longest, prepare, train_and_save
from train.settings import add_arguments, settings_from

EXAMPLES = """examples:
  python -m train.cpt --model meta-llama/Llama-3.2-1B --text mono.ja --output runs/base-ja
  python -m train.cpt --init config.json --tokenizer DIR --text a.txt b.txt.gz --lr 1e-3 --epochs 2 --output runs/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.cpt",
        description="Continual pre-training on text, one document a line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="FILE", help="text files, one document a line, or a split"
    )
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="held-out text for the validation loss")
    add_arguments(parser, epochs=5, packing="epoch")
    arguments = parser.parse_args(argv)
    settings = settings_from(arguments)
    if not prepare(arguments):
        return 0
    texts = read_texts(arguments.text)
    held_out = read_texts(arguments.valid) if arguments.valid else None
    model, tokenizer = load_start(arguments, settings)
    bos, eos, limit = model.config.bos_token_id, end_token(model), longest(model, settings)
    print(texts.describe(), file=sys.stderr)
    examples = documents(texts.documents, tokenizer, bos, eos, limit)
    valid = documents(held_out.documents, tokenizer, bos, eos, limit) if held_out else []
    notes = {"text": texts.describe(), "valid": held_out.describe() if held_out else None}
    return train_and_save(arguments, settings, model, tokenizer, examples, valid, notes, prompt=None)


if __name__ == "__main__":
    sys.exit(exit_code(main))
