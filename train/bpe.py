"""A byte-level BPE for models trained from scratch: `python -m train.bpe --text FILE… --vocab-size 8000 --output DIR`.

Llama 3's pre-tokenizer, the tokenizers library's trainer, two control tokens. The result is a `tokenizer.json`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from corpora import read_texts
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_folder
from minillama.tokenizer import LLAMA3_PATTERN

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# A word of --whole is counted this often, so that its merges are always learned.
WHOLE_COUNT = 10_000
FEWEST = 256 + 2
EXAMPLES = """examples:
  python -m train.bpe --text train.ja train.en --vocab-size 8000 --whole Japanese English --output runs/tokenizer
"""


def train_bpe(texts: Sequence[str], vocab_size: int, whole: Sequence[str], output: Path) -> int:
    """Write a folder with `tokenizer.json`; begin and end of text are ids 0 and 1. Returns its number of entries:
    fewer than `vocab_size` if the text has no more to merge.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *(word for word in whole for _ in range(WHOLE_COUNT))], trainer)
    with atomic_folder(output) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m train.bpe", description="Train a byte-level BPE tokenizer.", epilog=EXAMPLES)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files, one document a line")
    parser.add_argument("--vocab-size", type=int, default=8000, help="entries, with 256 bytes and 2 tokens (8000)")
    parser.add_argument("--whole", nargs="*", default=[], metavar="WORD", help="words that become one token each")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for tokenizer.json")
    arguments = parser.parse_args(argv)
    if arguments.vocab_size < FEWEST:
        raise InputError(f"--vocab-size is {arguments.vocab_size}; it must be at least {FEWEST}")
    texts = read_texts(arguments.text)
    entries = train_bpe(texts.documents, arguments.vocab_size, arguments.whole, Path(arguments.output))
    print(f"{arguments.output}: {entries:,} entries from {texts.describe()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
