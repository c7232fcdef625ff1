"""The options of the commands that run models. argparse only: `--help` and a mistyped option need no PyTorch."""

import argparse

from corpora.languages import language_code
from decode.engine.sequence import MAX_BEAMS, MAX_DRAFT
from decode.pipeline.config import DEFAULT_BATCH_SIZE, DTYPES, TOO_LONG
from minillama.cli import Parser

EXAMPLES = """examples:
  python -m decode.collab
  python -m decode.collab --model L=meta-llama/Llama-3.2-3B-Instruct --model S_src=runs/src --model S_tgt=runs/tgt \\
      --combine "L + 0.5*S_src + 0.5*S_tgt" --source ja --target en --input src.txt --reference ref.txt \\
      --output hyp.txt --report run.json
  echo 彼はつらい人生を送った。 | python -m decode.collab --model L=demo/L --source ja --target en --input -
  torchrun --nproc-per-node 2 -m decode.collab --model L=demo/L --source ja --target en --input src.txt \\
      --output hyp.txt --resume

exit codes: 0 done, 2 bad arguments or input, 130 interrupted (what was finished is saved), 1 a fault or a lost process
"""
OVERCONFIDENT = "A plain sum of logits is over-confident; weights fitted by decode.tune are not: docs/tuning.md"
SWITCH = argparse.BooleanOptionalAction


def collab_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m decode.collab",
        description="Translate with a weighted sum of the logits of several Llamas. No arguments: the built-in demo.",
        epilog=EXAMPLES,
    )
    add_model_options(parser)

    add = parser.add_argument_group("texts").add_argument
    add("--input", required=True, metavar="FILE", help="a sentence a line, gzipped or not; -: standard input, streamed")
    add("--output", default="-", metavar="FILE", help="translations, line by line (default -: standard output)")
    add("--reference", metavar="FILE", help="line-aligned references: BLEU and chrF with signatures at the end")
    add("--report", metavar="FILE", help="write run.json: counts, speed, models, versions, scores")
    add("--details", metavar="FILE", help="JSON lines: text, tokens, their log-probabilities in nats, why it ended")
    text = "which member decided each token: an HTML page; -: text on standard output, instead of translations there"
    add("--explain", metavar="FILE", help=text)
    text = "continue from OUTPUT.journal if it is there; --no-resume deletes it (default: a journal is refused)"
    add("--resume", action=SWITCH, default=None, help=text)

    add = parser.add_argument_group("decoding").add_argument
    text = f"sequences decoded together (default {DEFAULT_BATCH_SIZE}, or fewer where memory has no room for them)"
    add("--batch-size", type=int, metavar="N", help=text)
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest translation in tokens (default 256)")
    text = "for weights and caches on each device, such as 24G (default: what is free)"
    add("--memory", metavar="SIZE", help=text)
    text = "processes that hold a member together, for all members or one (L=2); torchrun starts a multiple (default 1)"
    add("--tensor-parallel", default="1", metavar="[NAME=]N,…", help=text)
    add("--too-long", default="error", choices=TOO_LONG, help="of a sentence longer than a context (default error)")
    text = (
        f"draft and verify 1 to {MAX_DRAFT} tokens at a time, or auto: where that is faster; same result (default off)"
    )
    add("--speculate", default="off", metavar="auto|off|N", help=text)
    text = "batch-invariant: a sentence's results are the same to the bit in any batch (default: on a CPU)"
    add("--invariant", action=SWITCH, default=None, help=text)

    add = parser.add_argument_group("beam search", OVERCONFIDENT).add_argument
    add("--beam", type=int, default=1, metavar="K", help=f"hypotheses searched, 1 to {MAX_BEAMS} (default 1: greedy)")
    text = "a hypothesis scores its log-probability over its length to this power, its end counted (default 1)"
    add("--length-penalty", type=float, default=1.0, metavar="A", help=text)
    add("--nbest", type=int, default=0, metavar="N", help="list the N best of each sentence, N <= K")
    text = "lines of `line ||| text ||| F0= log-probability ||| score`, lines from 0 (default OUTPUT.nbest)"
    add("--nbest-output", metavar="FILE", help=text)

    add = parser.add_argument_group("sampling", OVERCONFIDENT).add_argument
    add("--sample", action="store_true", help="sample each token instead of the best")
    add("--temperature", type=float, default=1.0, metavar="T", help="logits are divided by it (default 1)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K best tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the best tokens with mass P (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives a line the same translation (default 0)")

    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The models, their weights in the sum, their devices and dtypes, and the languages."""
    add = parser.add_argument_group("models").add_argument
    add("--model", action="append", required=True, metavar="NAME=DIR", help="a member: name, and folder or hub id")
    add("--combine", metavar="EXPR", help='e.g. "L + 0.5*S_src - 0.5*S_base" (default: the plain sum of all models)')
    add("--weights", metavar="FILE", help="the weights that decode.tune wrote, instead of --combine")
    add("--source", required=True, type=language_code, metavar="LANG", help="language code of the input, such as ja")
    add("--target", required=True, type=language_code, metavar="LANG", help="language code of the output")
    text = """of the weights (default float32 on a CPU, bfloat16 on a GPU); int8: CPU only, one scale per row; auto: the
        fastest here: bfloat16 where the processor has it, else int8 for 1 or 2 sequences, float16 for more"""
    add("--dtype", choices=DTYPES, help=text)
    text = "cpu, cuda, cuda:1, or by member L=cuda:0,S=cuda:1; auto: a GPU, of torchrun's LOCAL_RANK, else the CPU"
    add("--device", default="auto", metavar="[NAME=]DEVICE,…", help=text)
    text = "built-in prompt or TOML file, for all members or one (default: the folder's prompt.toml, else paper)"
    add("--prompt", action="append", default=[], metavar="[NAME=]PROMPT", help=text)
    text = "llama3, chatml or plain (default: from the tokenizer)"
    add("--chat", action="append", default=[], metavar="[NAME=]FORMAT", help=text)
