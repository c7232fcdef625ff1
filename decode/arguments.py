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

exit codes: 0 done, 2 bad arguments or input, 130 interrupted (what was finished is kept), 1 a fault or a lost process
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
    _add_text_options(parser.add_argument_group("texts"))
    _add_decoding_options(parser.add_argument_group("decoding"))
    _add_beam_options(parser.add_argument_group("beam search", OVERCONFIDENT))
    _add_sampling_options(parser.add_argument_group("sampling", OVERCONFIDENT))
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The models, their weights in the sum, their devices and dtypes, and the languages."""
    add = parser.add_argument_group("models").add_argument
    text = "a member: its name in --combine, and its folder or hub id"
    add("--model", action="append", required=True, metavar="NAME=DIR", help=text)
    add("--combine", metavar="EXPR", help='e.g. "L + 0.5*S_src - 0.5*S_base" (default: the plain sum of all models)')
    add("--weights", metavar="FILE", help="the weights that decode.tune wrote, in place of --combine")
    add("--source", required=True, type=language_code, metavar="LANG", help="language code of the input, such as ja")
    add("--target", required=True, type=language_code, metavar="LANG", help="language code of the output")
    text = """dtype of the weights (default float32 on a CPU, bfloat16 on a GPU); float16: half the bytes, exact on a
        CPU for a bfloat16 model; int8: CPU only, one scale per row; auto: the fastest here, bfloat16 where the
        processor has the instructions, else int8 for one or two sequences and float16 for more"""
    add("--dtype", choices=DTYPES, help=text)
    text = """cpu, cuda, cuda:1, or by member L=cuda:0,S=cuda:1; auto: the first GPU (under torchrun that of
        LOCAL_RANK), else the CPU"""
    add("--device", default="auto", metavar="[NAME=]DEVICE,…", help=text)
    text = "built-in prompt or TOML file, for all members or one (default: the folder's prompt.toml, else paper)"
    add("--prompt", action="append", default=[], metavar="[NAME=]PROMPT", help=text)
    text = "llama3, chatml or plain, for all members or one (default: from the tokenizer)"
    add("--chat", action="append", default=[], metavar="[NAME=]FORMAT", help=text)


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "a sentence a line, UTF-8, gzipped or not; -: standard input, streamed"
    add("--input", required=True, metavar="FILE", help=text)
    text = "translations, line by line as the input (default -: standard output)"
    add("--output", default="-", metavar="FILE", help=text)
    add("--reference", metavar="FILE", help="line-aligned references: BLEU and chrF with signatures at the end")
    add("--report", metavar="FILE", help="write run.json: counts, speed, models, versions, scores")
    text = "JSON lines in the input's order: text, tokens, their log-probabilities in nats, why it ended"
    add("--details", metavar="FILE", help=text)
    text = """why each token was chosen: one HTML page with every member's probabilities; -: as text on standard output,
        in place of translations that would go there"""
    add("--explain", metavar="FILE", help=text)
    text = """continue from OUTPUT.journal, which holds finished sentences until the output is complete, or start if
        there is none; --no-resume deletes it (default: a journal with sentences in it is refused)"""
    add("--resume", action=SWITCH, default=None, help=text)


def _add_decoding_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = f"sequences decoded together (default {DEFAULT_BATCH_SIZE}, or fewer where memory has no room for them)"
    add("--batch-size", type=int, metavar="N", help=text)
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest translation in tokens (default 256)")
    text = """for weights and caches together, on each device, such as 24G (default: what is free); a run that cannot
        fit is refused before it starts"""
    add("--memory", metavar="SIZE", help=text)
    text = """processes that hold a member together, for all members or by name (L=2), for one too large for a GPU;
        torchrun starts a multiple of N, and every N of them translate the same sentences (default 1)"""
    add("--tensor-parallel", default="1", metavar="[NAME=]N,…", help=text)
    text = "what to do with a sentence longer than a context (default error)"
    add("--too-long", default="error", choices=TOO_LONG, help=text)
    text = f"""draft tokens and verify them together, the translations are the same; auto: where it is expected to be
        faster, N: 1 to {MAX_DRAFT} at a time (default off)"""
    add("--speculate", default="off", metavar="auto|off|N", help=text)
    text = """batch-invariant: a sentence's results are the same to the bit in any batch (default: on a CPU, where it
        costs next to nothing)"""
    add("--invariant", action=SWITCH, default=None, help=text)


def _add_beam_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--beam", type=int, default=1, metavar="K", help=f"hypotheses kept, 1 to {MAX_BEAMS} (default 1: greedy)")
    text = "a hypothesis scores its log-probability over its length to this power, its end counted (default 1)"
    add("--length-penalty", type=float, default=1.0, metavar="A", help=text)
    add("--nbest", type=int, default=0, metavar="N", help="list the N best of each sentence, N <= K")
    text = """where to: lines of `line ||| text ||| F0= log-probability ||| score`, lines counted from 0, as Moses and
        Marian write them (default OUTPUT.nbest)"""
    add("--nbest-output", metavar="FILE", help=text)


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sample", action="store_true", help="sample each token instead of the best")
    add("--temperature", type=float, default=1.0, metavar="T", help="logits are divided by it (default 1)")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K best tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the best tokens with mass P (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives a line the same translation (default 0)")
