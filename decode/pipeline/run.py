"""A run of `decode.collab`: lines from a file or standard input, through the engine, to the outputs.

`prepare` refuses all that can be refused before weights are loaded. The lines of a file are shared by the processes of
torchrun, and each finished sentence goes to a journal; standard input is translated by one process as it arrives.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.sequence import Completion, Sequence
from decode.explain.page import ExplainedRun, PageWriter
from decode.explain.text import TextWriter
from decode.pipeline.config import DEFAULT_BATCH_SIZE, Options, named_folders
from decode.pipeline.distributed import Distributed, chunks
from decode.pipeline.input import GROUP_BATCHES, not_aligned, read_available_lines, read_texts
from decode.pipeline.journal import (
    Journal,
    JournalFollower,
    fingerprint,
    journal_path,
    open_journal,
    rank_path,
    read_records,
    remove_journal,
)
from decode.pipeline.members import EncodedInput, MemberSpec, encode_lines, load_ensemble, open_members
from decode.pipeline.memory import MemoryBudget
from decode.pipeline.output import Outputs, check_outputs, nbest_path
from decode.pipeline.placement import Placement, per_member, placements, tp_sizes
from decode.pipeline.record import Record
from decode.pipeline.report import RunStats, describe_plan, describe_run, summary, write_report
from decode.pipeline.weights_file import combination
from minillama import InputError
from minillama.errors import Interrupted
from minillama.tensor_parallel import PeerLost, check_divides

# How often the main process reads what the others have finished.
POLL_SECONDS = 0.5


@dataclass
class TranslationRun:
    """A checked run, and its progress. `file` is None for standard input, `done` are lines of an earlier run.

    Without a journal (an output that is no file, or in a folder that takes no new file) a run cannot be resumed; of the
    processes that share a model only the leader has one.
    """

    arguments: argparse.Namespace
    options: Options
    folders: dict[str, str]
    weights: dict[str, float]
    members: list[MemberSpec]
    placements: dict[str, Placement]
    budget: MemoryBudget
    distributed: Distributed
    references: list[str] | None
    file: EncodedInput | None = None
    memory: str = ""
    journal: Journal | None = None
    done: set[int] = field(default_factory=set)
    stats: RunStats = field(default_factory=RunStats)
    ensemble: Ensemble | None = None
    engine: Engine | None = None
    engine_batch_size: int = 0
    outputs: Outputs | None = None
    followers: list[JournalFollower] = field(default_factory=list)
    polled: float = 0.0

    def load(self) -> None:
        """Load the weights. Processes that share a member agree on the batch size."""
        first = self.placements[self.members[0].name].device
        if first.type == "cuda":
            torch.cuda.set_device(first)
        tp = self.distributed.join_group(any(place.device.type == "cuda" for place in self.placements.values()))
        if tp is not None:
            self.budget.reduce_min(tp)
            smallest = int(tp.all_reduce_min(torch.tensor(self.options.batch_size)))
            self.options = replace(self.options, batch_size=smallest)
        self.ensemble, self.stats.load_seconds = load_ensemble(
            self.members, self.weights, self.placements, self.arguments.invariant, tp
        )

    def translate(self) -> None:
        """Write every line. After a signal or a lost process what is finished is written, and the message says so."""
        resumable = " (--resume continues from there)" if self.journal else ""
        with ExitStack() as stack:
            if self.distributed.is_main:
                self.outputs = stack.enter_context(self._open_outputs())
            try:
                if self.file is None:
                    self._translate_stream()
                else:
                    self._translate_file(self.file)
            except KeyboardInterrupt:
                if self.outputs is None:
                    where = f"in {self.journal.path}{resumable}" if self.journal else "in its group's journal"
                    message = f"rank {self.distributed.process}: interrupted; what it finished is {where}"
                else:
                    several = " (by a signal, or because another process ended)" if self.distributed.processes > 1 else ""
                    message = f"interrupted{several}: {self.outputs.write_finished(resumable)}"
                raise Interrupted(message) from None
            except PeerLost as lost:
                if self.outputs is None:
                    raise
                raise PeerLost(f"{lost}: {self.outputs.write_finished(resumable)}") from None

    def _translate_file(self, file: EncodedInput) -> None:
        """Take chunks of the lines that are left; the main process then collects what the others finish."""
        self.stats.add_input(file)
        if self.outputs:
            if self.journal:
                self.followers = [
                    JournalFollower(rank_path(self.journal.path, rank)) for rank in range(1, self.distributed.world)
                ]
                for record in read_records(self.journal.path):
                    self.outputs.put(record, file.texts[record.line], resumed=True)
            for line in file.empty:
                self.outputs.put_empty(line)
        try:
            if self.ensemble is not None:
                remaining = file.remaining(self.done)
                costs = [sum(map(len, prompt)) for prompt in remaining.prompts]
                work = chunks(costs, self.distributed.world, self.options.batch_size)
                for chunk in self.distributed.take_chunks(work):
                    self._decode(remaining.select(chunk))
            if self.outputs:
                for _ in self.distributed.wait_for_others():
                    self._collect(file)
            elif self.journal:
                self.journal.end(self.stats.to_json())
                self.distributed.report_finished()
        finally:
            if self.outputs:
                self._collect(file)  # what other ranks have finished is kept after an interruption too
        for follower in self.followers:
            if follower.stats is not None:
                self.stats.merge(**follower.stats)

    def _collect(self, file: EncodedInput) -> None:
        """Output what the other ranks have written to their journals."""
        assert self.outputs is not None
        self.polled = time.monotonic()
        for follower in self.followers:
            for record in follower.new_records():
                self.outputs.put(record, file.texts[record.line])

    def _translate_stream(self) -> None:
        """Standard input in groups of the lines that are there."""
        assert self.outputs is not None
        for group in self._arriving():
            self.stats.add_input(group)
            for line in group.empty:
                self.outputs.put_empty(line)
            self._decode(group)

    def _arriving(self) -> Iterator[EncodedInput]:
        """Encoded groups of lines; the lines before one that is refused come first."""

        def encode(lines: list[str]) -> EncodedInput:
            return encode_lines(lines, self.members, self.options, "standard input", self.stats.lines)

        for lines in read_available_lines(sys.stdin.fileno(), GROUP_BATCHES * self.options.batch_size):
            try:
                yield encode(lines)
            except InputError as error:
                refused = error
            else:
                continue
            for line in lines:  # one at a time, up to the line at fault
                yield encode([line])
            raise refused

    def _decode(self, group: EncodedInput) -> None:
        """Translate the prompts of a group; each finished sentence goes to the journal and the outputs."""
        sequences = group.sequences(self.options)
        if not sequences:
            return
        engine = self._engine_for(group, sequences)
        steps, started = engine.stats.steps, time.perf_counter()
        for index, completion in engine.generate(sequences):
            self.stats.seconds += time.perf_counter() - started
            record = self._record(group.lines[index], completion)
            if self.journal:
                self.journal.write(record)
            if self.outputs:
                self.outputs.put(record, group.texts[record.line - group.first])
            if self.followers and time.monotonic() - self.polled > POLL_SECONDS:
                assert self.file is not None
                self._collect(self.file)
            started = time.perf_counter()
        self.stats.seconds += time.perf_counter() - started
        self.stats.steps += engine.stats.steps - steps
        if self.stats.first_token_seconds is None and engine.stats.first_token_time is not None:
            self.stats.first_token_seconds = engine.stats.first_token_time - self.stats.started

    def _engine_for(self, group: EncodedInput, sequences: list[Sequence]) -> Engine:
        """The last group's engine where its slots suffice, else a new one that fits the memory."""
        assert self.ensemble is not None
        requested = min(self.options.batch_size, len(sequences))
        batch_size, _ = self.budget.fit(
            group.prompts, self.options.max_new_tokens, requested, self.arguments.batch_size is None
        )
        if self.engine is None or self.engine_batch_size < batch_size or not self.engine.fits(sequences):
            self.engine = None  # its memory is free before more is allocated
            self.engine = Engine.fitting(self.ensemble, sequences, batch_size, self.options.speculate)
            self.engine_batch_size = batch_size
        return self.engine

    def _record(self, line: int, completion: Completion) -> Record:
        text = self.members[0].text
        nbest = [[text(found.tokens), sum(found.logprobs), found.score] for found in completion.hypotheses]
        explanations = [list(explanation) for explanation in completion.explanations]
        tokens = completion.tokens
        return Record(line, text(tokens), tokens, completion.logprobs, completion.finish_reason, nbest, explanations)

    def _open_outputs(self) -> Outputs:
        arguments = self.arguments
        explanations: PageWriter | TextWriter | None = None
        output = arguments.output
        if arguments.explain is not None:
            pieces = self.members[0].tokenizer.pieces()
            explained = ExplainedRun(self.weights, self.options, pieces, self.references or ())
            if arguments.explain == "-":
                explanations = TextWriter(explained)
                output = os.devnull if output == "-" else output  # in place of the translations
            else:
                explanations = PageWriter(arguments.explain, explained)
        return Outputs(
            output,
            arguments.details,
            nbest_path(arguments),
            explanations,
            name="on standard output" if arguments.output == "-" else f"in {arguments.output}",
            total=None if self.file is None else len(self.file.texts),
            keep_texts=self.references is not None,
        )


def prepare(arguments: argparse.Namespace, distributed: Distributed, stack: ExitStack) -> TranslationRun:
    """Everything that is quick, and everything that can be refused. The journal is open when this returns; `stack`
    closes it.
    """
    folders = named_folders(arguments.model)
    names = list(folders)
    weights = combination(arguments, names)
    batch_size = DEFAULT_BATCH_SIZE if arguments.batch_size is None else arguments.batch_size
    options = Options.from_arguments(arguments, batch_size=batch_size)
    sizes = tp_sizes(arguments.tensor_parallel, names)
    all_placements = placements(arguments.device, arguments.dtype, names, options.batch_size, sizes)
    where = {name: all_placements[name] for name in weights}
    distributed.form_groups(max(placement.tp_size for placement in where.values()))
    sentences, references = read_texts(arguments.input, arguments.reference)
    check_outputs(arguments, distributed.processes)
    prompts, chats = per_member(arguments.prompt, names, "--prompt"), per_member(arguments.chat, names, "--chat")
    members = open_members({name: folders[name] for name in weights}, prompts, chats)
    for member in members:
        check_divides(member.checkpoint.config, where[member.name].tp_size, member.name)
    budget = MemoryBudget(members, where, arguments.memory, distributed.local_world)
    run = TranslationRun(arguments, options, folders, weights, members, where, budget, distributed, references)
    if sentences is None:
        return run
    run.file = encode_lines(sentences, members, options, arguments.input)
    if run.file.prompts:
        may_lower = arguments.batch_size is None
        batch_size, needed = budget.fit(run.file.prompts, options.max_new_tokens, options.batch_size, may_lower)
        run.memory = needed if batch_size < options.batch_size or arguments.memory else ""
        run.options = replace(options, batch_size=batch_size)
    path = journal_path(arguments.output)
    if path is None:
        return run
    identity = fingerprint(sentences, members, weights, options, where)
    if distributed.is_main:
        # torchrun starts all processes again after one died (--max-restarts): they continue their own run.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        run.journal, run.done = open_journal(path, identity, True if restarted else arguments.resume)
        stack.enter_context(run.journal)
        distributed.share_done(run.done)
    else:
        run.done = distributed.share_done()
        if distributed.is_leader:
            run.journal = stack.enter_context(Journal(rank_path(path, distributed.rank)))
            run.journal.restart(identity)
    return run


def run(arguments: argparse.Namespace) -> int:
    """The whole command after its options are parsed; returns the exit code. Raises PeerLost, see main."""
    stats = RunStats()
    distributed = Distributed()
    with ExitStack() as stack:
        with distributed.checking():
            translation = prepare(arguments, distributed, stack)
        translation.stats = stats
        distributed.log(describe_plan(translation))
        if translation.file is None or translation.file.remaining(translation.done).lines:
            translation.load()
            distributed.log(f"loaded in {stats.load_seconds:.1f} s")
        translation.translate()
        distributed.leave_group()
        if not distributed.is_main:
            return 0
        report = describe_run(translation)
        for line in summary(report):
            distributed.log(line)
        if arguments.report:
            write_report(arguments.report, report)
        if translation.journal is not None:
            remove_journal(translation.journal.path)
    references = translation.references
    if references is not None and len(references) != stats.lines:  # of standard input; files are compared before
        raise not_aligned("standard input", stats.lines, arguments.reference, len(references))
    return 0
