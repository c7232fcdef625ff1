"""`python -m decode.collab`: translate with an ensemble of Llamas. Without arguments, the built-in demo.

Everything that can be refused is refused before weights are loaded (`prepare`). A file's sentences are the work of one
process or of several under torchrun; standard input is translated as it arrives, by one.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from decode.explain.page import Explained, PageWriter
from decode.explain.text import TextWriter
from decode.engine.expression import spell
from decode.pipeline.fingerprint import fingerprint
from decode.pipeline.journal import journal_path, remove
from decode.pipeline.members import Options, Reader, Sentences, encode_sentences, load_ensemble, open_readers
from decode.pipeline.memory import Budget, capacities
from decode.options import check_files, decoding_options, named_folders, not_aligned, parser, read_texts
from decode.pipeline.placement import Place, listed, per_member, places, splits
from decode.pipeline.distributed import Ranks
from decode.pipeline.report import describe_run, device_name, scores, summary, write_report
from decode.pipeline.results import Results
from decode.search_options import nbest_path
from decode.pipeline.session import Session, TooLong
from decode.pipeline.input import windows
from decode.pipeline.weights_file import combination
from decode.pipeline.work import Done, Work
from minillama import InputError
from minillama.errors import Interrupted, exit_code
from minillama.tensor_parallel import PeerLost, check_divides

# Batches of standard input that are taken together at most: a large window keeps rows busy, a small one streams.
WINDOW_BATCHES = 16


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        from decode.demo import demo

        return demo()
    started = time.perf_counter()
    arguments = parser().parse_args(argv)
    try:
        ranks = Ranks()
        try:
            return run(arguments, ranks, started)
        finally:
            ranks.leave()
    except PeerLost as lost:
        print(f"error: {lost}; finished sentences are kept, --resume does the rest", file=sys.stderr)
        return 1


@dataclass(frozen=True)
class Job:
    """A checked run: all that is known before weights are loaded. `work` is None for standard input."""

    arguments: argparse.Namespace
    weights: dict[str, float]
    folders: dict[str, str]
    readers: list[Reader]
    places: dict[str, Place]
    options: Options
    budget: Budget
    references: list[str] | None
    work: Work | None

    def session(self, ranks: Ranks) -> tuple[Session, float]:
        """Load the weights; also returns the seconds that took. Processes that share a member agree on the rows."""
        first = self.places[self.readers[0].name].device
        if first.type == "cuda":
            torch.cuda.set_device(first)
        part = ranks.join_group(any(place.device.type == "cuda" for place in self.places.values()))
        budget, options = self.budget.least(part), self.options
        if part is not None:
            rows = int(part.all_reduce_min(torch.tensor(options.batch_size)))
            options = replace(options, batch_size=rows)
        ensemble, seconds = load_ensemble(self.readers, self.weights, self.places, self.arguments.invariant, part)
        may_lower = self.arguments.batch_size is None
        return Session(ensemble, self.readers, options, budget, may_lower), seconds


def prepare(arguments: argparse.Namespace, ranks: Ranks, opened: ExitStack) -> Job:
    """Everything cheap, and everything that can be refused; the journal is open when this returns (`opened` closes)."""
    folders = named_folders(arguments.model)
    weights = combination(arguments, list(folders))
    options = decoding_options(arguments)
    split = splits(arguments.tensor_parallel, list(folders))
    everywhere = places(arguments.device, arguments.dtype, list(folders), options.batch_size, split)
    where = {name: everywhere[name] for name in weights}
    ranks.group_by(max(place.parts for place in where.values()))
    sentences, references = read_texts(arguments)
    check_files(arguments, ranks.processes)
    prompts = per_member(arguments.prompt, list(folders), "--prompt")
    chats = per_member(arguments.chat, list(folders), "--chat")
    readers = open_readers({name: folders[name] for name in weights}, prompts, chats)
    for reader in readers:
        check_divides(reader.checkpoint.config, where[reader.name].parts, reader.name)
    budget = Budget.of(readers, where, arguments.memory, ranks.local_world)
    fits = ""
    work = None
    if sentences is not None:
        prepared = encode_sentences(sentences, readers, options, arguments.input)
        if prepared.prompts:
            positions = capacities(prepared.prompts, readers, options.max_new_tokens)
            rows = budget.rows(positions, options.batch_size, may_lower=arguments.batch_size is None)
            if rows < options.batch_size or arguments.memory:
                fits = f", {budget.describe(positions, rows)}"
            options = replace(options, batch_size=rows)
        run = fingerprint(sentences, readers, weights, options, where)
        work = Work.plan(prepared, ranks, journal_path(arguments.output), run, _resume(arguments))
        if work.part is not None:
            opened.enter_context(work.part)
    job = Job(arguments, weights, folders, readers, where, options, budget, references, work)
    _announce(job, ranks, fits)
    return job


def run(arguments: argparse.Namespace, ranks: Ranks, started: float) -> int:
    with ExitStack() as opened:
        with ranks.refusing_together():
            job = prepare(arguments, ranks, opened)
        session, load_seconds = None, 0.0
        if job.work is None or job.work.left:
            session, load_seconds = job.session(ranks)
            ranks.tell(f"loaded in {load_seconds:.1f} s")
        if not ranks.first:
            return _help_rank_0(job, ranks, session, started)
        results, done, lines, too_long = _translate(job, session, started)
        ranks.leave_group()
        report = describe_run(results, done, lines, job.options, job.readers, job.places, too_long)
        report |= {
            "load_seconds": round(load_seconds, 4),
            "combine": arguments.combine or spell(job.weights),
            "weights": job.weights,
            "models": {name: job.folders[name] for name in job.weights},
            "processes": ranks.processes,
            "tensor_parallel": ranks.size,
        }
        references = job.references
        if references and results.texts is not None and len(references) == lines:
            report |= scores([results.texts[line] for line in range(lines)], references, job.options.target)
        for text in summary(report):
            ranks.tell(text)
        if arguments.report:
            write_report(arguments.report, report)
        if job.work is not None and job.work.part is not None:
            remove(job.work.part.path)
    if references is not None and len(references) != lines:  # only standard input: files are compared before
        raise not_aligned("standard input", lines, arguments.reference, len(references))
    return 0


def _translate(job: Job, session: Session | None, started: float) -> tuple[Results, Done, int, dict[str, TooLong]]:
    """Write every line; returns what came of it. After a signal or a lost process what is finished is written."""
    work, kept = job.work, ""
    if work is not None and work.part is not None:
        kept = " (--resume goes on from there)"
    total = None if work is None else work.prepared.count
    files = job.arguments.output, job.arguments.details, nbest_path(job.arguments)
    with Results(*files, total, job.references is not None, _explain_writer(job)) as results:
        try:
            if work is not None:
                results.sentences = work.prepared
                work.translate(session, results, started)
                skipped, truncated = TooLong(), TooLong()
                skipped.add(work.prepared.skipped)
                truncated.add(work.prepared.truncated)
                return results, work.summary, work.prepared.count, {"skipped": skipped, "truncated": truncated}
            assert session is not None
            _stream(session, results)
        except KeyboardInterrupt:
            several = " (by a signal, or because another process died)" if work and work.ranks.processes > 1 else ""
            raise Interrupted(f"interrupted{several}: {results.put_what_is_finished(kept)}") from None
        except PeerLost as lost:
            raise PeerLost(f"{lost}: {results.put_what_is_finished(kept)}") from None
    done = Done()
    first = session.counters.first_token
    done.add(session.seconds, session.counters.steps, first and first - started)
    return results, done, session.lines, {"skipped": session.skipped, "truncated": session.truncated}


def _explain_writer(job: Job) -> PageWriter | TextWriter | None:
    if job.arguments.explain is None:
        return None
    explained = Explained(job.weights, job.options, job.readers[0].tokenizer.pieces(), job.references or ())
    return TextWriter(explained) if job.arguments.explain == "-" else PageWriter(job.arguments.explain, explained)


def _help_rank_0(job: Job, ranks: Ranks, session: Session | None, started: float) -> int:
    assert job.work is not None
    part = job.work.part
    try:
        job.work.translate(session, None, started)
    except KeyboardInterrupt:
        where = f"in {part.path}, --resume goes on from there" if part else "in its group's journal"
        raise Interrupted(f"rank {ranks.process}: interrupted; what it finished is {where}") from None
    ranks.leave_group()
    return 0


def _stream(session: Session, results: Results) -> None:
    """Standard input in groups of the lines that are there; lines before one that is refused are still translated."""
    for prepared in _arriving(session):
        results.sentences = prepared
        for line, text, translation in session.translate(prepared):
            if translation is None:
                results.put_empty(line)
            else:
                results.put(session.record(line, text, translation))


def _arriving(session: Session) -> Iterator[Sentences]:
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


def _resume(arguments: argparse.Namespace) -> bool | None:
    """torchrun starts a group again after a process died (--max-restarts): that run goes on from its own journal."""
    return True if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else arguments.resume


def _announce(job: Job, ranks: Ranks, fits: str) -> None:
    """What will be done, before the long part of it."""
    sizes = ", ".join(f"{reader.name} {reader.checkpoint.parameters / 1e6:,.1f} M" for reader in job.readers)
    work, source, options = job.work, job.arguments.input, job.options
    count = "standard input" if work is None else f"{work.prepared.count:,} sentences of {source}"
    if work is not None and work.done:
        count += f", {len(work.done):,} of them finished by an earlier run"
    where = listed({name: f"{p.storage}, {device_name(p.device)}" for name, p in job.places.items()})
    several = f", {ranks.processes} processes" if ranks.processes > 1 else ""
    several += f" in groups of {ranks.size}" if ranks.size > 1 else ""
    ranks.tell(
        f"{spell(job.weights)} ({sizes}): {count}, {options.source} to {options.target}, "
        f"batches of {options.batch_size}{fits}, {where}{several}"
    )
    if work is not None and work.part is None and Path(job.arguments.output).is_file():
        ranks.tell(f"no journal: {Path(job.arguments.output).parent} takes no new file; this run cannot be resumed")


if __name__ == "__main__":
    sys.exit(exit_code(main))
