"""Fine-tuning on sentence pairs: `python -m train.sft --model DIR --train pairs.tsv --valid pairs.tsv --output DIR`.

The loss is on the response alone. Prompt and chat format are saved with the model (`prompt.toml`) for decoding.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from corpora import Pairs, Prompt, language_name, read_pairs
from minillama import InputError
from minillama.chat import chat_format
from minillama.cli import Parser
from minillama.errors import exit_code
from train.config import parse
from train.data import Example, responses
from train.distributed import World, started
from train.run import load_start, prepare, shorter_than, train_and_save
from train.settings import Settings, add_arguments, settings_from

EXAMPLES = """examples:
  python -m train.sft --model runs/base-ja --train alt:ja-en:train --source ja --target en --output runs/S_src
  python -m train.sft --model DIR --train pairs.tsv --valid v.tsv --source de --target en --prompt plain --output O
  python -m train.sft --model DIR --train train.ja.gz train.en.gz --source ja --target en --both-directions --output DIR
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m train.sft",
        description="Fine-tuning on sentence pairs, loss on the response alone.",
        epilog=EXAMPLES,
    )
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
    language_name(arguments.source), language_name(arguments.target)
    prompt = Prompt.load(arguments.prompt)
    with started(arguments.device) as world:
        if not world.first(lambda: prepare(arguments, settings)):
            world.say(f"{arguments.output}: already finished")
            return 0
        return run(arguments, settings, prompt, world)


def run(arguments: argparse.Namespace, settings: Settings, prompt: Prompt, world: World) -> int:
    pairs = read_pairs(arguments.train, arguments.source, arguments.target)
    held_out = read_pairs(arguments.valid, arguments.source, arguments.target) if arguments.valid else None
    start = load_start(arguments, world)
    chat = chat_format(arguments.chat, start.tokenizer)
    bos, eos, limit = start.config.bos_token_id, start.end_token, start.longest(settings)
    world.say(pairs.describe())

    def examples_of(some: Pairs) -> list[Example]:
        languages = (arguments.source, arguments.target)
        examples = responses(some, languages, prompt, chat, start.tokenizer, bos, eos)
        if arguments.both_directions:
            back = Pairs(some.target, some.source, some.dropped, some.origin)
            examples += responses(back, (languages[1], languages[0]), prompt, chat, start.tokenizer, bos, eos)
        kept = shorter_than(examples, limit)
        if len(kept) < len(examples):
            world.say(f"{some.origin}: {len(examples) - len(kept)} examples over {limit} tokens left out")
        return kept

    if not pairs.source:
        raise InputError(f"{pairs.origin}: no pair has two sides; there is nothing to train on")
    examples, valid = examples_of(pairs), examples_of(held_out) if held_out else []
    if not examples:
        raise InputError(f"{pairs.origin}: every example is over {limit} tokens; raise --max-length")
    notes = {
        "train": pairs.describe(),
        "valid": held_out.describe() if held_out else None,
        "source": arguments.source,
        "target": arguments.target,
        "both_directions": arguments.both_directions,
        "prompt": prompt.name,
        "chat": chat.name,
    }
    prompt = replace(prompt, chat=chat.name)
    return train_and_save(arguments, settings, world, start, examples, valid, notes, prompt)


if __name__ == "__main__":
    sys.exit(exit_code(main))
