"""Fine-tuning on sentence pairs: `python -m train.sft --model DIR --train pairs.tsv --valid pairs.tsv --output DIR`.

The loss is on the response only. Prompt and chat format are saved with the model (`prompt.toml`) for decoding.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from corpora import Pairs, Prompt, language_name, read_pairs
from minillama.cli import Parser
from minillama.errors import exit_code
from train.config import Settings, add_arguments, parse, settings_from

if TYPE_CHECKING:
    from train.distributed import DistributedContext
    from train.packing import Example
    from train.run import Data, Start

EXAMPLES = """examples:
  python -m train.sft --model runs/base-ja --train alt:ja-en:train --source ja --target en --output runs/S_src
  python -m train.sft --model DIR --train pairs.tsv --valid v.tsv --source de --target en --prompt plain --output O
  python -m train.sft --model DIR --train train.ja.gz train.en.gz --source ja --target en --both-directions --output DIR
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m train.sft", description="Fine-tuning on sentence pairs.", epilog=EXAMPLES)
    files = "one TSV, JSON lines or parquet file, two line-aligned files, or a split such as alt:ja-en:train"
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help=files)
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="held-out pairs for the validation loss, likewise")
    parser.add_argument("--source", default="ja", help="language code of the source side (default ja)")
    parser.add_argument("--target", default="en", help="language code of the target side (default en)")
    yes_no = argparse.BooleanOptionalAction
    parser.add_argument("--both-directions", action=yes_no, default=False, help="train each pair in both directions")
    parser.add_argument("--prompt", default="paper", help="a built-in prompt's name or a TOML file (default paper)")
    parser.add_argument("--chat", default="auto", help="llama3, chatml, plain; auto: from the tokenizer")
    add_arguments(parser, epochs=3)
    arguments = parse(parser, sys.argv[1:] if argv is None else argv)
    settings = settings_from(arguments)
    for language in (arguments.source, arguments.target):
        language_name(language)  # raises InputError if it is unknown
    prompt = Prompt.load(arguments.prompt)

    from train.run import run

    return run(arguments, settings, lambda start, world: _read(arguments, settings, prompt, start, world))


def _read(
    arguments: argparse.Namespace, settings: Settings, prompt: Prompt, start: "Start", world: "DistributedContext"
) -> "Data":
    from minillama.chat import chat_format
    from train.data import responses
    from train.run import Data

    pairs = read_pairs(arguments.train, arguments.source, arguments.target)
    held_out = read_pairs(arguments.valid, arguments.source, arguments.target) if arguments.valid else None
    chat = chat_format(arguments.chat, start.tokenizer)
    bos, eos, limit = start.config.bos_token_id, start.end_token, start.longest(settings)
    world.log(pairs.describe())

    def examples_of(some: Pairs) -> "list[Example]":
        languages = (arguments.source, arguments.target)
        examples = responses(some, languages, prompt, chat, start.tokenizer, bos, eos)
        if arguments.both_directions:
            back = Pairs(some.target, some.source, some.dropped, some.origin)
            examples += responses(back, (languages[1], languages[0]), prompt, chat, start.tokenizer, bos, eos)
        fitting = [example for example in examples if len(example.tokens) <= limit]
        if len(fitting) < len(examples):
            world.log(f"{some.origin}: {len(examples) - len(fitting)} examples over {limit} tokens left out")
        return fitting

    examples, valid = examples_of(pairs), examples_of(held_out) if held_out else []
    notes = {
        "train": pairs.describe(),
        "valid": held_out.describe() if held_out else None,
        "source": arguments.source,
        "target": arguments.target,
        "both_directions": arguments.both_directions,
        "prompt": prompt.name,
        "chat": chat.name,
    }
    return Data(examples, valid, notes, replace(prompt, chat=chat.name))


if __name__ == "__main__":
    sys.exit(exit_code(main))
