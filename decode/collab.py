"""`python -m decode.collab`: translate with an ensemble of Llamas. Without arguments, the built-in demo."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decode.arguments import collab_parser
from minillama.errors import exit_code

if TYPE_CHECKING:
    from decode.pipeline.output import OrderedWriter
    from decode.pipeline.run import TranslationRun


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        from decode.demo import demo

        return demo()
    arguments = collab_parser().parse_args(argv)
    # Imported here, with PyTorch, so that --help and a mistyped option are answered at once.
    from torch.distributed import DistError

    from decode.pipeline.run import run
    from minillama.tensor_parallel import PeerLost

    try:
        return run(arguments, _explanation_writer)
    except (PeerLost, DistError) as lost:
        reason = str(lost).split("\n")[0]
        print(f"error: a process or its store does not answer ({reason}); --resume does the rest", file=sys.stderr)
        return 1


def _explanation_writer(run: "TranslationRun") -> "OrderedWriter":
    """Where `--explain` asks for them: a page, or text on standard output."""
    from decode.explain.page import ExplainedRun, PageWriter
    from decode.explain.text import TextWriter

    pieces = run.models.members[0].tokenizer.pieces()
    explained = ExplainedRun(run.models.weights, run.options, pieces, run.references)
    return TextWriter(explained) if run.arguments.explain == "-" else PageWriter(run.arguments.explain, explained)


if __name__ == "__main__":
    sys.exit(exit_code(main))
