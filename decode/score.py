"""`python -m decode.score`: log-probabilities of given translations under an ensemble and under each of its members.

Prompts and chat formats are those of decode.collab. A translation is tokenized as it is written: one that a model
generated may have been other tokens.
"""

import argparse
import sys
from collections.abc import Sequence

from decode.arguments import add_model_options
from minillama.cli import Parser
from minillama.errors import exit_code

EXAMPLES = """examples:
  python -m decode.score --model L=demo/L --model S=demo/S_src --combine "L + 0.5*S" --source ja --target en \\
      --input src.txt --translation hyp.txt --output scores.tsv
  paste src.txt hyp.txt | python -m decode.score --model L=demo/L --source ja --target en --input - --json

columns: line (from 1); tokens, with the end of the text as one; logprob, their sum in nats under the combined
distribution; per_token; perplexity; then each member's own logprob. --json has the log-probability of every token too.
Lines that are blank or skipped have no figures.

A plain sum of logits is over-confident: its log-probabilities rank the translations of one sentence, but say little
about how likely each is. Those under weights fitted by decode.tune (--weights) do; see docs/tuning.md.
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.score",
        description="Log-probabilities of given translations under a weighted sum of the logits of several Llamas.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    add = result.add_argument
    text = "a sentence a line, or without --translation sentence, tab, translation; -: standard input, streamed"
    add("--input", required=True, metavar="FILE", help=text)
    add("--translation", metavar="FILE", help="the translations to be scored, line by line; -: standard input")
    add("--output", default="-", metavar="FILE", help="figures, a line each (default -: standard output)")
    add("--json", action="store_true", help="JSON lines, with every token's log-probability (default: columns)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts that are read together (default 16)")
    add("--too-long", default="error", choices=("error", "skip"), help="of a text beyond a context (default error)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from decode.pipeline.scoring import run  # with PyTorch: --help does not wait for it

    return run(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
