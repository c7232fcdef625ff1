"""A run of `decode.collab`: lines from a file or standard input, through the engine, to the outputs.

The lines of a file are shared by the processes of torchrun, and each finished sentence goes to a journal. Standard
input is translated by one process as it arrives.
"""

import argparse
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import replace

import torch

from corpora import read_lines
from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.sequence import Completion, Sequence
from decode.pipeline import journal
from decode.pipeline.config import DEFAULT_BATCH_SIZE, Options
from decode.pipeline.distributed import Distributed
from decode.pipeline.input import EncodedLine, check_aligned, encode_lines, group_available, open_lines, sequences_of
from decode.pipeline.journal import Record
from decode.pipeline.members import EnsembleSpec
from decode.pipeline.memory import MemoryBudget
from decode.pipeline.output import OrderedWriter, Outputs, check_outputs
from decode.pipeline.report import RunStats, describe_plan, describe_run, summary, write_report
from minillama.errors import InputError, Interrupted
from minillama.tensor_parallel import check_divides


def run(arguments: argparse.Namespace, explain: "Callable[[TranslationRun], OrderedWriter]") -> int:
    """The whole command after its options are parsed; returns the exit code.

    explain: makes the writer of explanations, where they are requested. Raises PeerLost or torch.distributed.DistError
    if a process is lost.
    """
    distributed = Distributed()
    with ExitStack() as stack:
        try:
            translation = TranslationRun(arguments, distributed, stack)
        except InputError as error:
            distributed.share_done(None)
            raise error if distributed.is_main else InputError(f"rank {distributed.process}: {error}") from None
        distributed.log(describe_plan(translation))
        if translation.file is None or translation.remaining():
            translation.load()
            distributed.log(f"loaded in {translation.stats.load_seconds:.1f} s")
        translation.translate(explain(translation) if arguments.explain and distributed.is_main else None)
        distributed.leave_group()
        if not distributed.is_main:
            return 0
        report = describe_run(translation)
        for line in summary(report):
            distributed.log(line)
        if arguments.report:
            write_report(arguments.report, report)
        if translation.journal is not None:
            journal.remove_journal(translation.journal.path)
    if arguments.reference:  # for standard input; files are compared before
        check_aligned("standard input", translation.stats.lines, arguments.reference, len(translation.references))
    return 0


class TranslationRun:
    """A source, an engine, a journal or None, the outputs, and statistics.

    The source is a `file`, of which the lines `done` are in the journal of an earlier run, or standard input (None).
    Without a journal (an output that is no file, or in a folder that takes no new file) a run cannot be resumed. Of the
    processes that share a model only the leader has a journal, and only the main process has outputs.
    """

    def __init__(self, arguments: argparse.Namespace, distributed: Distributed, stack: ExitStack) -> None:
        """All that is quick, and all that can be refused. `stack` closes the journal."""
        self.arguments, self.distributed, self.stats = arguments, distributed, RunStats()
        self.batch_size = DEFAULT_BATCH_SIZE if arguments.batch_size is None else arguments.batch_size  # requested
        self.options = Options.from_arguments(arguments, self.batch_size)
        if arguments.input == arguments.reference == "-":
            raise InputError("--input and --reference are both standard input; one of them must be a file")
        sentences = None if arguments.input == "-" else read_lines(arguments.input)
        self.references = read_lines(arguments.reference) if arguments.reference else []
        if sentences is not None and arguments.reference:
            check_aligned(arguments.input, len(sentences), arguments.reference, len(self.references))
        self.models = EnsembleSpec.from_arguments(arguments, self.batch_size, arguments.tensor_parallel)
        distributed.form_groups(max(placement.tp_size for placement in self.models.placements.values()))
        for member in self.models.members:
            check_divides(member.checkpoint.config, self.models.placements[member.name].tp_size, member.name)
        check_outputs(arguments, distributed.processes)
        may_lower = arguments.batch_size is None
        self.budget = MemoryBudget(self.models, arguments.memory, distributed.local_world, may_lower)
        self.memory = ""  # described where it decides the batch size
        self.file: list[EncodedLine] | None = None
        self.journal: journal.Journal | None = None
        self.done: set[int] = set()
        self.ensemble: Ensemble | None = None
        self.engine: Engine | None = None
        self.outputs: Outputs | None = None
        if sentences is not None:
            self._open_file(sentences, stack)

    def _open_file(self, sentences: list[str], stack: ExitStack) -> None:
        """Encode the file's lines, and open the journal: the main process first, which shares what is done."""
        arguments, distributed, options = self.arguments, self.distributed, self.options
        self.file = list(encode_lines(([text] for text in sentences), self.models.members, options, arguments.input))
        if any(line.sequence for line in self.file):
            batch_size, memory = self.budget.fit(sequences_of(self.file), options.batch_size)
            self.memory = memory if batch_size < options.batch_size or arguments.memory else ""
            self.options = replace(options, batch_size=batch_size)
        path = journal.journal_path(arguments.output)
        if path is None:
            return
        identity = journal.fingerprint(sentences, self.models, options)
        if distributed.is_main:
            # torchrun starts all processes again after one died (--max-restarts): they continue their own run.
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            self.journal = stack.enter_context(journal.Journal(path))
            self.done = self.journal.open_run(identity, True if restarted else arguments.resume)
        self.done = distributed.share_done(self.done)
        if distributed.is_leader and not distributed.is_main:
            self.journal = stack.enter_context(journal.Journal(journal.rank_path(path, distributed.rank)))
            self.journal.start(identity)

    def remaining(self) -> list[EncodedLine]:
        """The file's lines that are not done."""
        return [line for line in self.file or () if line.sequence and line.number not in self.done]

    def load(self) -> None:
        """Load the weights. Processes that share a member agree on the batch size."""
        devices = [placement.device for placement in self.models.placements.values()]
        if devices[0].type == "cuda":
            torch.cuda.set_device(devices[0])
        tp = self.distributed.join_group(any(device.type == "cuda" for device in devices))
        if tp is not None:
            self.budget.reduce_min(tp)
            smallest = int(tp.all_reduce_min(torch.tensor(self.options.batch_size)))
            self.options = replace(self.options, batch_size=smallest)
        self.ensemble, self.stats.load_seconds = self.models.load(self.arguments.invariant, tp)

    def translate(self, explanations: OrderedWriter | None) -> None:
        """Write every line. After a signal what is finished is written, and the message names where it is."""
        with ExitStack() as stack:
            if self.distributed.is_main:
                total = None if self.file is None else len(self.file)
                self.outputs = Outputs(self.arguments, total, explanations, stack)
            try:
                if self.file is None:
                    self._translate_stream(stack)
                else:
                    self._translate_file(self.file)
            except KeyboardInterrupt:
                resumable = f", and in {self.journal.path}: --resume continues from there" if self.journal else ""
                finished = self.outputs.write_finished() if self.outputs else "finished sentences are saved"
                raise Interrupted(f"interrupted: {finished}{resumable}") from None

    def _translate_file(self, file: list[EncodedLine]) -> None:
        """Translate chunks of the lines that are left; the main process also collects what the others finish."""
        others = []
        self._add_input(file)
        if self.outputs and self.journal:
            path = self.journal.path
            own = [journal.rank_path(path, rank) for rank in range(1, self.distributed.world)]
            files = dict.fromkeys([*own, *journal.rank_files(path)])  # an earlier run may have had more ranks
            others = [journal.JournalReader(name) for name in files]
            self._collect(file, [journal.JournalReader(path), *others])
        try:
            if self.ensemble is not None:
                lines = self.remaining()
                costs = [sum(map(len, sequence.prompts)) for sequence in sequences_of(lines)]
                # The requested batch size: memory may have lowered this process's own, and all must cut alike.
                for chunk in self.distributed.take_chunks(costs, self.batch_size):
                    self._decode([lines[index] for index in chunk])
                    self._collect(file, others)
            if self.outputs:
                for stats in self.distributed.wait_for_others():
                    self._collect(file, others)
                    if stats is not None:
                        self.stats.merge(**stats)
            elif self.journal:
                self.distributed.report_finished(self.stats.shared())
        finally:
            self._collect(file, others)  # after an interruption too

    def _collect(self, file: list[EncodedLine], journals: list[journal.JournalReader]) -> None:
        """Output what is new in these journals, of other ranks or of an earlier run."""
        for reader in journals:
            for record in reader.new_records():
                if self.outputs:
                    self.outputs.put(record.line, file[record.line].text, record, resumed=record.line in self.done)

    def _translate_stream(self, stack: ExitStack) -> None:
        """Standard input in groups of the lines that are there; the lines before one that is refused are translated."""
        texts, ready = open_lines("-", stack)
        lines = encode_lines(([text] for text in texts), self.models.members, self.options, "standard input")
        for group in group_available(lines, self.options.batch_size, ready):
            self._add_input(group)
            self._decode([line for line in group if line.sequence])

    def _add_input(self, lines: list[EncodedLine]) -> None:
        self.stats.add_input(lines)
        for line in lines:
            if self.outputs and line.sequence is None:
                self.outputs.put(line.number, line.text, None)

    def _decode(self, lines: list[EncodedLine]) -> None:
        """Translate lines that have sequences; each finished sentence goes to the journal and the outputs."""
        if not lines:
            return
        sequences = sequences_of(lines)
        engine = self.engine = self._engine_for(sequences)
        steps, started = engine.stats.steps, time.perf_counter()
        for index, completion in engine.generate(sequences):
            self.stats.seconds += time.perf_counter() - started
            record = self._record(lines[index].number, completion)
            if self.journal:
                self.journal.write(record)
            if self.outputs:
                self.outputs.put(record.line, lines[index].text, record)
            started = time.perf_counter()
        self.stats.seconds += time.perf_counter() - started
        self.stats.steps += engine.stats.steps - steps
        if self.stats.first_token_seconds is None and engine.stats.first_token_time is not None:
            self.stats.first_token_seconds = engine.stats.first_token_time - self.stats.started

    def _engine_for(self, sequences: SequenceOf[Sequence]) -> Engine:
        """The last group's engine where its slots suffice, else a new one that memory has room for."""
        assert self.ensemble is not None
        beams = sequences[0].params.beams
        batch_size, _ = self.budget.fit(sequences, min(self.options.batch_size, len(sequences) * beams))
        if self.engine and self.engine.slots >= batch_size // beams * beams and self.engine.fits(sequences):
            return self.engine
        self.engine = None  # its memory is free before more is allocated
        return Engine.fitting(self.ensemble, sequences, batch_size, self.options.speculate)

    def _record(self, line: int, completion: Completion) -> Record:
        text = self.models.members[0].text
        nbest = [[text(found.tokens), sum(found.logprobs), found.score] for found in completion.hypotheses]
        explanations = [list(explanation) for explanation in completion.explanations]
        tokens = completion.tokens
        return Record(line, text(tokens), tokens, completion.logprobs, completion.finish_reason, nbest, explanations)
