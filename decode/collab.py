"""`python -m decode.collab`: translate with an ensemble of Llamas. Without arguments, the built-in demo."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch

from corpora import language_name, read_lines
from decode.expression import parse, spell
from decode.members import TOO_LONG, Options, Reader, Sentences, encode_sentences, load_ensemble, open_readers
from decode.nbest import NBestWriter
from decode.output import OrderedWriter, check_writable
from decode.progress import DecodeProgress
from decode.report import device_name, dtype_name, scores, versions, write_report
from decode.search_options import add_search_options, nbest_path
from decode.session import Session
from decode.stream import windows
from minillama import InputError
from minillama.device import pick_device
from minillama.errors import Interrupted, exit_code

EXAMPLES = """examples:
  python -m decode.collab
  python -m decode.collab --model L=meta-llama/Llama-3.2-3B-Instruct --model S_src=runs/src --model S_tgt=runs/tgt \\
      --combine "L + 0.5*S_src + 0.5*S_tgt" --source ja --target en --input src.txt --reference ref.txt \\
      --output hyp.txt --report run.json
  echo 彼はつらい人生を送った。 | python -m decode.collab --model L=demo/L --source ja --target en --input -

exit codes: 0 done, 2 bad arguments or input, 130 interrupted (what was finished is kept), 1 a fault
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Batches of standard input that are taken together at most: a large window keeps rows busy, a small one streams.
WINDOW_BATCHES = 16


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        from decode.demo import demo

        return demo()
    return run(parser().parse_args(argv))


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m decode.collab",
        description="Translate with a weighted sum of the logits of several Llamas.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(result)
    add = result.add_argument
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
    add("--batch-size", type=int, default=16, metavar="N", help="rows decoded together (default 16)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest translation in tokens (default 256)")
    add(
        "--too-long",
        default="error",
        choices=TOO_LONG,
        help="what to do with a sentence longer than a context (default error)",
    )
    add_search_options(result)
    return result


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which models, how they are summed, where they stand and how each reads a sentence."""
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a member: its name in --combine, and its folder or hub id",
    )
    add("--combine", metavar="EXPR", help='e.g. "L + 0.5*S_src - 0.5*S_base" (default: the plain sum of all models)')
    add("--source", required=True, metavar="LANG", help="language code of the input, such as ja")
    add("--target", required=True, metavar="LANG", help="language code of the output")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 on a CPU, bfloat16 on a GPU")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: the first GPU, else the CPU")
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


def run(arguments: argparse.Namespace) -> int:
    folders = named_folders(arguments.model)
    weights = parse(" + ".join(folders) if arguments.combine is None else arguments.combine, list(folders))
    options = _options(arguments)
    device = pick_device(arguments.device)
    dtype = DTYPES.get(arguments.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    sentences, references = _read_texts(arguments)
    if arguments.report == "-":
        raise InputError("--report -: give a file; standard output is for translations")
    inputs = [file for file in (arguments.input, arguments.reference) if file]
    check_writable(arguments.output, inputs)
    if arguments.report:
        check_writable(arguments.report, [*inputs, arguments.output])
    if lists := nbest_path(arguments):
        check_writable(lists, [*inputs, arguments.output, *([arguments.report] if arguments.report else [])])
    prompts = per_member(arguments.prompt, folders, "--prompt")
    chats = per_member(arguments.chat, folders, "--chat")
    readers = open_readers({name: folders[name] for name in weights}, prompts, chats)
    prepared = None
    if sentences is not None:  # before weights are loaded: a sentence that is too long is refused at once
        prepared = encode_sentences(sentences, readers, options, arguments.input)
    _announce(readers, weights, options, arguments.input, sentences, f"{dtype_name(dtype)}, {device_name(device)}")
    ensemble, load_seconds = load_ensemble(readers, weights, dtype, device)
    print(f"loaded in {load_seconds:.1f} s", file=sys.stderr)
    session = Session(ensemble, readers, options)

    groups = [prepared] if prepared is not None else _arriving(session)
    total = None if sentences is None else len(sentences)
    hypotheses = _decode(session, groups, arguments.output, lists, total)

    report = _report(session, arguments, folders, load_seconds, dtype)
    if references and len(references) == session.lines:
        report |= scores([hypotheses[line] for line in range(session.lines)], references, options.target)
    _summarise(report)
    if arguments.report:
        write_report(arguments.report, report)
    if references is not None and len(references) != session.lines:  # only standard input: files are compared before
        raise _not_aligned("standard input", session.lines, arguments.reference, len(references))
    return 0


def _decode(
    session: Session, groups: Iterable[Sentences], output: str, lists: str | None, total: int | None
) -> dict[int, str]:
    """Write every line of every group; returns them by line. After Ctrl-C or SIGTERM what is finished is written."""
    progress = DecodeProgress(total)
    hypotheses: dict[int, str] = {}
    with OrderedWriter(output) as writer, NBestWriter(lists) as nbest:
        try:
            for prepared in groups:
                for line, text, translation in session.translate(prepared):
                    nbest.put(line, translation, session.text)
                    writer.put(line, text, translated=translation is not None)
                    hypotheses[line] = text
                    progress.add(len(translation.tokens) if translation else 0)
        except KeyboardInterrupt:
            gaps = writer.write_finished()
            nbest.write_finished()
            of = f" of {total:,}" if total is not None else ""
            where = "on standard output" if output == "-" else f"in {output}"
            empty = f"; {gaps:,} empty lines between them stand for sentences that were not" if gaps else ""
            raise Interrupted(
                f"interrupted: {writer.count:,}{of} sentences were finished and are {where}{empty}"
            ) from None
        finally:
            progress.stop()
    return hypotheses


def _arriving(session: Session) -> Iterator[Sentences]:
    """Standard input in groups of the lines that are there; lines before one that is refused are still translated."""
    for window in windows(sys.stdin.fileno(), WINDOW_BATCHES * session.options.batch_size):
        try:
            yield session.encode(window, "standard input")
        except InputError as error:
            refused = error
        else:
            continue
        for line in window:  # one at a time, up to the line at fault
            yield session.encode([line], "standard input")
        raise refused


def _options(arguments: argparse.Namespace) -> Options:
    language_name(arguments.source), language_name(arguments.target)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    return Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})


def _read_texts(arguments: argparse.Namespace) -> tuple[list[str] | None, list[str] | None]:
    """The sentences (None when they come from standard input) and the references (None without --reference)."""
    if arguments.input == arguments.reference == "-":
        raise InputError("--input and --reference are both standard input; one of them must be a file")
    sentences = None if arguments.input == "-" else read_lines(arguments.input)
    references = read_lines(arguments.reference) if arguments.reference else None
    if sentences is not None and references is not None and len(sentences) != len(references):
        raise _not_aligned(arguments.input, len(sentences), arguments.reference, len(references))
    return sentences, references


def _not_aligned(source: str, lines: int, reference: str, others: int) -> InputError:
    return InputError(f"{source} has {lines:,} lines, {reference} has {others:,}; they must be line-aligned")


def _announce(
    readers: Sequence[Reader],
    weights: dict[str, float],
    options: Options,
    source: str,
    sentences: list[str] | None,
    where: str,
) -> None:
    """What will be done, before the long part of it."""
    sizes = ", ".join(f"{reader.name} {reader.checkpoint.parameters / 1e6:,.1f} M" for reader in readers)
    count = "standard input" if sentences is None else f"{len(sentences):,} sentences of {source}"
    print(
        f"{spell(weights)} ({sizes}): {count}, {options.source} to {options.target}, "
        f"batches of {options.batch_size}, {where}",
        file=sys.stderr,
    )


def _report(
    session: Session, arguments: argparse.Namespace, folders: dict[str, str], load_seconds: float, dtype: torch.dtype
) -> dict[str, Any]:
    seconds = max(session.seconds, 1e-9)
    tokens, ensemble = session.counters.tokens, session.ensemble
    return {
        "sentences": session.lines,
        "output_tokens": tokens,
        "seconds": round(session.seconds, 4),
        "load_seconds": round(load_seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2),
        "sentences_per_second": round(session.lines / seconds, 2),
        "steps": session.counters.steps,
        "combine": arguments.combine or ensemble.combine,
        "weights": ensemble.weights,
        "models": {name: folders[name] for name in ensemble.names},
        "prompts": {reader.name: reader.prompt.name for reader in session.readers},
        "chat": {reader.name: reader.chat.name for reader in session.readers},
        **asdict(session.options),
        "skipped_lines": session.skipped,
        "truncated_lines": session.truncated,
        "device": device_name(ensemble.device),
        "dtype": dtype_name(dtype),
        "versions": versions(),
    }


def _summarise(report: dict[str, Any]) -> None:
    for key in ("skipped", "truncated"):
        if lines := report[f"{key}_lines"]:
            print(f"{key}, too long for a context: line {', '.join(map(str, lines))}", file=sys.stderr)
    print(
        f"{report['sentences']:,} sentences, {report['output_tokens']:,} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['sentences_per_second']:,.1f} sentences/s",
        file=sys.stderr,
    )
    for key in report:
        if f"{key}_signature" in report:
            print(f"{key} {report[key]:.2f}  {report[f'{key}_signature']}", file=sys.stderr)


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


def per_member(values: Sequence[str], folders: dict[str, str], option: str) -> dict[str, str | None]:
    """`NAME=VALUE` for one member, `VALUE` for all that are not named."""
    found: dict[str, str] = {}
    general = None
    for text in values:
        name, equals, value = text.partition("=")
        if not equals:
            general = text
        elif name not in folders:
            raise InputError(f"{option} {text}: {name} is no model; the models are {', '.join(folders)}")
        else:
            found[name] = value
    return {name: found.get(name, general) for name in folders}


if __name__ == "__main__":
    sys.exit(exit_code(main))
