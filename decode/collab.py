"""`python -m decode.collab`: translate with an ensemble of Llamas. Without arguments, the built-in demo."""

import sys
from collections.abc import Sequence

from decode.arguments import collab_parser
from minillama.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        from decode.demo import demo

        return demo()
    arguments = collab_parser().parse_args(argv)
    # Imported here, with PyTorch, so that --help and a mistyped option are answered at once.
    from decode.pipeline.run import run
    from minillama.tensor_parallel import PeerLost

    try:
        return run(arguments)
    except PeerLost as lost:
        print(f"error: {lost}; finished sentences are kept, --resume does the rest", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(exit_code(main))
