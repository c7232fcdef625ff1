"""`python -m decode.tune`: fit an ensemble's weights to translated text by maximum likelihood.

The fit itself: decode/fitting/.
"""

import argparse
import sys
from collections.abc import Sequence

from decode.arguments import add_model_options
from minillama.cli import Parser
from minillama.errors import exit_code

EXAMPLES = """examples:
  python -m decode.tune --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --source ja --target en \\
      --input dev.ja --reference dev.en --output weights.toml
  python -m decode.collab --model L=demo/L --model S_src=demo/S_src --model S_tgt=demo/S_tgt --weights weights.toml \\
      --source ja --target en --input src.txt --output hyp.txt

Fit on text that neither trained the models nor will test them; a few hundred pairs are enough (docs/tuning.md).
exit codes: 0 done, 2 bad arguments or input, 130 interrupted, 1 a fault
"""


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.tune",
        description="Fit the weights of a sum of logits to translated text, by maximum likelihood.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    add = result.add_argument_group("texts").add_argument
    add("--input", required=True, metavar="FILE", help="the sentences to fit on, one a line; -: standard input")
    add("--reference", required=True, metavar="FILE", help="their translations, line-aligned")
    add("--held-out", nargs=2, metavar=("SRC", "REF"), help="other text; its likelihoods are reported too")
    add("--output", metavar="FILE", help="write the weights here, for decode.collab --weights")
    add("--json", action="store_true", help="print all figures as JSON")
    add("--batch-size", type=int, default=16, metavar="N", help="pairs that are read together (default 16)")
    too_long = "what to do with a pair that does not fit a context (default error)"
    add("--too-long", default="error", choices=("error", "skip"), help=too_long)
    add = result.add_argument_group("fit").add_argument
    l2 = "penalty: LAMBDA/2 times the squared distance to the weights of --combine, in nats per token (default 0)"
    add("--l2", type=float, default=0.0, metavar="LAMBDA", help=l2)
    add("--bounds", metavar="LOW,HIGH", help="keep every weight within these, such as 0,inf (default: no bounds)")
    against = "a fixed expression to compare with; may be repeated (default: that of --combine, the plain sum, the "
    against += "first model with half of each other, each model alone)"
    add("--against", action="append", metavar="EXPR", help=against)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from decode.fitting.tuning import run  # with PyTorch: --help does not wait for it

    return run(arguments)


if __name__ == "__main__":
    sys.exit(exit_code(main))
