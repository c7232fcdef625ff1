"""The options of `python -m decode.collab`: the parser, and the checks that need nothing but the arguments."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields

from corpora import language_name, read_lines
from decode.pipeline.journal import journal_path
from decode.pipeline.members import TOO_LONG, Options
from decode.pipeline.output import check_writable
from decode.pipeline.placement import DTYPES
from decode.search_options import add_search_options, nbest_path
from decode.engine.speculative import MOST_DRAFTED, check_mode
from minillama import InputError
from minillama.cli import Parser

DEFAULT_ROWS = 128
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


def parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="python -m decode.collab",
        description="Translate with a weighted sum of the logits of several Llamas. No arguments: the built-in demo.",
        epilog=EXAMPLES,
    )
    add_model_options(result)
    _texts(result.add_argument_group("texts"))
    _decoding(result.add_argument_group("decoding"))
    add_search_options(result)
    return result


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which models, how they are summed, where they stand, and between which languages."""
    add = parser.add_argument_group("models").add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a member: its name in --combine, and its folder or hub id",
    )
    add("--combine", metavar="EXPR", help='e.g. "L + 0.5*S_src - 0.5*S_base" (default: the plain sum of all models)')
    add("--weights", metavar="FILE", help="the weights that decode.tune wrote, in place of --combine")
    add("--source", required=True, metavar="LANG", help="language code of the input, such as ja")
    add("--target", required=True, metavar="LANG", help="language code of the output")
    add(
        "--dtype",
        choices=DTYPES,
        help="how weights are held (default float32 on a CPU, bfloat16 on a GPU); float16: half the bytes, on a CPU "
        "exact for a bfloat16 model; int8: CPU only, one scale a row; auto: the fastest here, bfloat16 where the "
        "processor has the instructions, else int8 for one or two rows and float16 for more",
    )
    add(
        "--device",
        default="auto",
        metavar="[NAME=]DEVICE,…",
        help="cpu, cuda, cuda:1, or by member L=cuda:0,S=cuda:1; auto: the first GPU (under torchrun that of "
        "LOCAL_RANK), else the CPU",
    )
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="[NAME=]PROMPT",
        help="built-in prompt or TOML file, for all members or one (default: the folder's prompt.toml, else paper)",
    )
    add(
        "--chat",
        action="append",
        default=[],
        metavar="[NAME=]FORMAT",
        help="llama3, chatml or plain, for all members or one (default: from the tokenizer)",
    )


def _texts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        required=True,
        metavar="FILE",
        help="a sentence a line, UTF-8, gzipped or not; -: standard input, streamed",
    )
    add(
        "--output",
        default="-",
        metavar="FILE",
        help="translations, line by line as the input (default -: standard output)",
    )
    add("--reference", metavar="FILE", help="line-aligned references: BLEU and chrF with signatures at the end")
    add("--report", metavar="FILE", help="write run.json: counts, speed, models, versions, scores")
    add(
        "--details",
        metavar="FILE",
        help="JSON lines in the input's order: text, tokens, their log-probabilities in nats, why it ended",
    )
    add(
        "--explain",
        metavar="FILE",
        help="why each token was chosen: one HTML page with what every member said of it; -: as text on standard "
        "output, in the place of translations that would go there",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="go on from OUTPUT.journal, where finished sentences stand until the output is whole, or start if there "
        "is none; --no-resume drops it (default: a journal with sentences in it is refused)",
    )


def _decoding(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"rows decoded together (default {DEFAULT_ROWS}, or fewer where memory has no room for them)",
    )
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest translation in tokens (default 256)")
    add(
        "--memory",
        metavar="SIZE",
        help="for weights and caches together, on each device, such as 24G (default: what is free); a run that cannot "
        "fit is refused before it starts",
    )
    add(
        "--tensor-parallel",
        default="1",
        metavar="[NAME=]N,…",
        help="processes that hold a member together, for all members or by name (L=2), for one too large for a GPU; "
        "torchrun starts a multiple of N, and every N of them translate the same sentences (default 1)",
    )
    add(
        "--too-long",
        default="error",
        choices=TOO_LONG,
        help="what to do with a sentence longer than a context (default error)",
    )
    add(
        "--speculate",
        default="off",
        metavar="auto|off|N",
        help="draft tokens and verify them together, the translations are the same; auto: where it is measured to be "
        f"faster, N: 1 to {MOST_DRAFTED} at a time (default off)",
    )
    add(
        "--invariant",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the same bits for a sentence in any company (default: on a CPU, where it costs next to nothing)",
    )


def decoding_options(arguments: argparse.Namespace) -> Options:
    language_name(arguments.source), language_name(arguments.target)
    values = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    values["explain"] = arguments.explain is not None
    if values["batch_size"] is None:
        values["batch_size"] = DEFAULT_ROWS
    for name in ("batch_size", "max_new_tokens"):
        if values[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} {values[name]}: must be at least 1")
    check_mode(values["speculate"])
    if values["speculate"] != "off" and values["beam"] > 1:
        raise InputError("--speculate and --beam exclude one another; give one of them")
    return Options(**values)


def read_texts(arguments: argparse.Namespace) -> tuple[list[str] | None, list[str] | None]:
    """The sentences (None when they come from standard input) and the references (None without --reference)."""
    if arguments.input == arguments.reference == "-":
        raise InputError("--input and --reference are both standard input; one of them must be a file")
    sentences = None if arguments.input == "-" else read_lines(arguments.input)
    references = read_lines(arguments.reference) if arguments.reference else None
    if sentences is not None and references is not None and len(sentences) != len(references):
        raise not_aligned(arguments.input, len(sentences), arguments.reference, len(references))
    return sentences, references


def not_aligned(source: str, lines: int, reference: str, others: int) -> InputError:
    return InputError(f"{source} has {lines:,} lines, {reference} has {others:,}; they must be line-aligned")


def check_files(arguments: argparse.Namespace, processes: int) -> None:
    """Raise InputError for outputs that cannot be written or replace one another, and for what cannot be resumed."""
    inputs = [file for file in (arguments.input, arguments.reference) if file]
    for option in ("report", "details"):
        if getattr(arguments, option) == "-":
            raise InputError(f"--{option} -: give a file; standard output is for translations")
    check_writable(arguments.output, inputs)
    taken = [*inputs, arguments.output]
    explain = None if arguments.explain == "-" else arguments.explain
    for file in (arguments.report, arguments.details, nbest_path(arguments), explain):
        if file:
            check_writable(file, taken)
            taken.append(file)
    kept = arguments.input != "-" and journal_path(arguments.output) is not None
    if arguments.resume and not kept:
        raise InputError(
            "--resume: needs --input FILE and --output FILE; the journal stands beside the output, and standard input "
            "cannot be read again"
        )
    if processes > 1 and not kept:
        raise InputError(
            f"{processes} processes share the sentences of a file and write one: give --input FILE and --output FILE, "
            "or run one process"
        )


def named_folders(models: Sequence[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not re.fullmatch(r"[^\W\d]\w*", name):
            raise InputError(f"--model {text}: expected NAME=DIR, the name of letters, digits and underscores")
        if name in folders:
            raise InputError(f"--model {text}: {name} is given twice")
        folders[name] = folder
    return folders
