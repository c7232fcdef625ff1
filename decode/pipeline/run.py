"""A run of `decode.collab`: lines from a file or standard input, through the engine, to the outputs.

The lines of a file are shared by the processes of torchrun, and each finished sentence goes to a journal. Standard
input is translated by one process as it arrives.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch

from decode.engine.engine import Engine
from decode.engine.ensemble import Ensemble
from decode.engine.sequence import Completion, Sequence
from decode.pipeline import journal
from decode.pipeline.config import DEFAULT_BATCH_SIZE, Options
from decode.pipeline.distributed import Distributed
from decode.pipeline.input import GROUP_BATCHES, not_aligned, read_available_lines, read_texts
from decode.pipeline.members import EncodedInput, EnsembleSpec, encode_lines
from decode.pipeline.memory import MemoryBudget
from decode.pipeline.output import OrderedWriter, Outputs, check_outputs
from decode.pipeline.record import Record
from decode.pipeline.report import RunStats, describe_plan, describe_run, summary, write_report
from minillama.errors import Interrupted
from minillama.tensor_parallel import check_divides


def run(arguments: argparse.Namespace, explain: "Callable[[TranslationRun], OrderedWriter]") -> int:
    """The whole command after its options are parsed; returns the exit code. Raises PeerLost if a process is lost.

    explain: makes the writer of explanations, where they are requested.
    """
    distributed = Distributed()
    with ExitStack() as stack:
        with distributed.checking():
            translation = TranslationRun(arguments, distributed, stack)
        distributed.log(describe_plan(translation))
        if translation.file is None or translation.file.remaining(translation.done).lines:
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
    references, lines = translation.references, translation.stats.lines
    if references is not None and len(references) != lines:  # of standard input; files are compared before
        raise not_aligned("standard input", lines, arguments.reference, len(references))
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
        sentences, self.references = read_texts(arguments.input, arguments.reference)
        self.models = EnsembleSpec.from_arguments(arguments, self.batch_size, arguments.tensor_parallel)
        distributed.form_groups(self.models.tp_size)
        for member in self.models.members:
            check_divides(member.checkpoint.config, self.models.placements[member.name].tp_size, member.name)
        check_outputs(arguments, distributed.processes)
        self.budget = MemoryBudget(self.models, arguments.memory, distributed.local_world)
        self.memory = ""  # described where it decides the batch size
        self.file: EncodedInput | None = None
        self.journal: journal.Journal | None = None
        self.done: set[int] = set()
        self.ensemble: Ensemble | None = None
        self.engine: Engine | None = None
        self.outputs: Outputs | None = None
        if sentences is not None:
            self._open_file(sentences, stack)

    def _open_file(self, sentences: list[str], stack: ExitStack) -> None:
        """Encode the file's lines, and open the journal: the main process first, which says what is done."""
        arguments, distributed, options = self.arguments, self.distributed, self.options
        self.file = encode_lines(sentences, self.models.members, options, arguments.input).checked()
        if self.file.prompts:
            may_lower = arguments.batch_size is None
            batch_size, memory = self.budget.fit(
                self.file.prompts, options.max_new_tokens, options.batch_size, may_lower
            )
            self.memory = memory if batch_size < options.batch_size or arguments.memory else ""
            self.options = replace(options, batch_size=batch_size)
        path = journal.journal_path(arguments.output)
        if path is None:
            return
        identity = journal.fingerprint(sentences, self.models, options)
        if distributed.is_main:
            # torchrun starts all processes again after one died (--max-restarts): they continue their own run.
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            self.journal, self.done = journal.open_journal(path, identity, True if restarted else arguments.resume)
            stack.enter_context(self.journal)
        self.done = distributed.share_done(self.done)
        if distributed.is_leader and not distributed.is_main:
            self.journal = stack.enter_context(journal.Journal(journal.rank_path(path, distributed.rank)))
            self.journal.start(identity)

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
        """Write every line. After a signal what is finished is written, and the message says where it is."""
        with ExitStack() as stack:
            if self.distributed.is_main:
                total = None if self.file is None else len(self.file.texts)
                self.outputs = stack.enter_context(Outputs(self.arguments, total, explanations))
            try:
                if self.file is None:
                    self._translate_stream()
                else:
                    self._translate_file(self.file)
            except KeyboardInterrupt:
                resumable = f", and in {self.journal.path}: --resume continues from there" if self.journal else ""
                finished = self.outputs.write_finished() if self.outputs else "finished sentences are kept"
                raise Interrupted(f"interrupted: {finished}{resumable}") from None

    def _translate_file(self, file: EncodedInput) -> None:
        """Take chunks of the lines that are left; the main process also collects what the others finish."""
        world, others = self.distributed.world, []
        self.stats.add_input(file)
        if self.outputs:
            self.outputs.put_empty(file.empty)
            if self.journal:
                path = self.journal.path
                files = [*(journal.rank_path(path, rank) for rank in range(1, world)), *journal.rank_files(path)]
                others = [journal.JournalReader(file) for file in dict.fromkeys(files)]
                self._collect(file, [journal.JournalReader(path), *others])
        try:
            if self.ensemble is not None:
                remaining = file.remaining(self.done)
                costs = [sum(map(len, prompt)) for prompt in remaining.prompts]
                # The requested batch size: memory may have lowered this process's own, and all must cut alike.
                for chunk in self.distributed.take_chunks(costs, self.batch_size):
                    self._decode(remaining.select(chunk))
                    self._collect(file, others)
            if self.outputs:
                for _ in self.distributed.wait_for_others():
                    self._collect(file, others)
            elif self.journal:
                self.journal.end(self.stats.to_json())
                self.distributed.report_finished()
        finally:
            self._collect(file, others)  # what other ranks have finished is kept after an interruption too
        for other in others[: world - 1]:
            if other.stats:
                self.stats.merge(**other.stats)

    def _collect(self, file: EncodedInput, journals: list[journal.JournalReader]) -> None:
        """Output what is new in these journals, of other ranks or of an earlier run."""
        for reader in journals:
            for record in reader.new_records():
                assert self.outputs is not None
                self.outputs.put(record, file.text(record.line), resumed=record.line in self.done)

    def _translate_stream(self) -> None:
        """Standard input in groups of the lines that are there; the lines before one that is refused are translated."""
        assert self.outputs is not None
        for lines in read_available_lines(sys.stdin.fileno(), GROUP_BATCHES * self.options.batch_size):
            group = encode_lines(lines, self.models.members, self.options, "standard input", self.stats.lines)
            self.stats.add_input(group)
            self.outputs.put_empty(group.empty)
            self._decode(group)
            group.checked()

    def _decode(self, group: EncodedInput) -> None:
        """Translate the prompts of a group; each finished sentence goes to the journal and the outputs."""
        sequences = group.sequences(self.options)
        if not sequences:
            return
        engine = self.engine = self._engine_for(group, sequences)
        steps, started = engine.stats.steps, time.perf_counter()
        for index, completion in engine.generate(sequences):
            self.stats.seconds += time.perf_counter() - started
            record = self._record(group.lines[index], completion)
            if self.journal:
                self.journal.write(record)
            if self.outputs:
                self.outputs.put(record, group.text(record.line))
            started = time.perf_counter()
        self.stats.seconds += time.perf_counter() - started
        self.stats.steps += engine.stats.steps - steps
        self.stats.add_first_token(engine.stats.first_token_time)

    def _engine_for(self, group: EncodedInput, sequences: list[Sequence]) -> Engine:
        """The last group's engine where its slots suffice, else a new one that memory has room for."""
        assert self.ensemble is not None
        requested = min(self.options.batch_size, len(sequences))
        may_lower = self.arguments.batch_size is None
        batch_size, _ = self.budget.fit(group.prompts, self.options.max_new_tokens, requested, may_lower)
        if self.engine is not None and self.engine.runner.slots.count >= batch_size and self.engine.fits(sequences):
            return self.engine
        self.engine = None  # its memory is free before more is allocated
        return Engine.fitting(self.ensemble, sequences, batch_size, self.options.speculate)

    def _record(self, line: int, completion: Completion) -> Record:
        text = self.models.members[0].text
        nbest = [[text(found.tokens), sum(found.logprobs), found.score] for found in completion.hypotheses]
        explanations = [list(explanation) for explanation in completion.explanations]
        tokens = completion.tokens
        return Record(line, text(tokens), tokens, completion.logprobs, completion.finish_reason, nbest, explanations)
