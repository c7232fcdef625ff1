"""The engine: sequences in, tokens out. One interface for files, streams, beam search, forced decoding and a server.

A step selects what each KV slot computes (scheduler.py), runs all members (model_runner.py), chooses the next tokens
from the weighted sum of their logits, and records them. Greedy, sampled and beam sequences and sequences to be scored
share a step. One thread calls the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

import torch

from decode.engine.attribution import Explanation, explain
from decode.engine.beam import BeamSearch
from decode.engine.ensemble import Ensemble
from decode.engine.expression import weight_fault
from decode.engine.likelihood import score_targets
from decode.engine.model_runner import ModelRunner, SamplerOutput, SlotInput
from decode.engine.scheduler import Scheduler
from decode.engine.sequence import Completion, Sequence, Stats, Update
from decode.engine.speculative import Draft, Speculation, check_mode
from kernels import describe_flag
from kernels.types import MAX_TARGETS, MAX_TOP_K
from minillama import InputError

# A token that a step led to: the row of its logits, the sequence, where its explanation goes, token, log-probability.
Sampled = tuple[int, Sequence, list[Explanation], int, float]


class Engine:
    """Decodes any number of sequences together: `add` at any time, `step` until `has_work` is false.

    slots: KV slots, allocated here, for as many sequences at once (a beam search needs one for each beam).
    max_positions: of a slot, prompt and new tokens together, one number or one for each member.   speculate: "off",
    "auto" or the number of tokens to draft (speculative.py); the tokens are the same.   prefix: for each member what
    prompts begin with; it is computed once.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        slots: int,
        max_positions: int | SequenceOf[int],
        speculate: str | int = "off",
        prefix: SequenceOf[list[int]] | None = None,
    ) -> None:
        members = range(len(ensemble.members))
        capacity = [max_positions for _ in members] if isinstance(max_positions, int) else max_positions
        if slots < 1 or min(capacity) < 1:
            raise InputError(f"{slots} slots of {min(capacity)} positions: both must be at least 1")
        mode = check_mode(speculate)
        self.ensemble, self.slots, self.stats = ensemble, slots, Stats()
        self.runner = ModelRunner(ensemble, slots, capacity, prefix or [[] for _ in members])
        self.scheduler = Scheduler(self.runner.slots)
        self.speculation = None if mode == "off" else Speculation(self.runner, mode)
        self._updates: list[Update] = []  # of sequences that were cancelled since the last step
        self._next_id = 0

    @classmethod
    def fitting(
        cls, ensemble: Ensemble, sequences: SequenceOf[Sequence], batch_size: int, speculate: str | int = "off"
    ) -> Engine:
        """An engine of the right size for these sequences, with at most `batch_size` slots if each needs one.

        Raises InputError for a sequence that fits no member's context.
        """
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size} must be at least 1")
        members = range(len(ensemble.members))
        for number, sequence in enumerate(sequences, 1):
            _prepare(ensemble, sequence, f"prompt {number}")
        beams = max((sequence.params.beams for sequence in sequences), default=1)
        needed = sum(sequence.params.beams for sequence in sequences)
        slots = max(beams, min(batch_size, needed) // beams * beams)
        capacity = [max((sequence.positions(n) for sequence in sequences), default=1) for n in members]
        prefix = [_shared_prefix([sequence.prompts[n] for sequence in sequences]) for n in members]
        return cls(ensemble, slots, capacity, speculate, prefix)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running or self._updates)

    def fits(self, sequences: Iterable[Sequence]) -> bool:
        """Whether a slot is long enough for each of these sequences, and there are enough for its beams."""
        return not any(self._refusal(sequence) for sequence in sequences)

    def add(self, sequence: Sequence) -> int:
        """Queue a sequence; returns its id. Raises InputError for one that fits no context or no slot."""
        number = self._next_id
        if sequence.id >= 0:
            raise InputError("the sequence was added before; make a new one")
        if refusal := self._refusal(sequence):
            raise InputError(f"the sequence {refusal}")
        self._next_id += 1
        sequence.id = number
        if sequence.key is None:
            sequence.key = number
        if sequence.params.is_search:
            sequence.search = BeamSearch(sequence.params, sequence.stops, sequence.limit)
        members = range(len(self.ensemble.members))
        sequence.member_logprobs = [[] for _ in members] if sequence.targets is not None else []
        sequence.hidden = [[] for _ in members] if sequence.keep_hidden else []
        self.scheduler.add(sequence)
        return number

    def cancel(self, sequence_id: int) -> None:
        """Stop a sequence: its slots are free before the next step, which returns its completion."""
        waiting = (sequence for sequence in self.scheduler.waiting if sequence.id == sequence_id)
        sequence = self.scheduler.running.get(sequence_id) or next(waiting, None)
        if sequence is not None:
            sequence.finish_reason = "cancelled"
            self.scheduler.finish(sequence)
            self._updates.append(Update(sequence_id, [], [], completion=sequence.completion()))

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Compute one batch; the new tokens of every sequence that advanced."""
        inputs = self.scheduler.schedule()
        draft = self.speculation.propose(inputs) if self.speculation else None
        output = self._run(inputs, draft)
        if self.speculation:
            self.speculation.update(inputs, draft, output)
        return self._update(inputs, draft, output)

    def generate(self, sequences: SequenceOf[Sequence]) -> Iterator[tuple[int, Completion]]:
        """Decode sequences to their ends: yields (index, completion) as they end, longest prompts started first.

        Raises FloatingPointError where a member's logits are NaN or infinite.
        """
        longest_last = sorted(range(len(sequences)), key=lambda index: _cost(sequences[index]))
        index_of = {self.add(sequences[index]): index for index in reversed(longest_last)}
        while index_of:
            for update in self.step():
                if update.completion is not None and update.id in index_of:
                    index = index_of.pop(update.id)
                    if update.completion.finish_reason == "error":
                        raise FloatingPointError(f"prompt {index + 1}: {update.completion.error}")
                    yield index, update.completion

    def _run(self, inputs: SequenceOf[SlotInput], draft: Draft | None) -> SamplerOutput:
        """All members' forward passes, the scores of targets, and sampling at every other position."""
        runner = self.runner
        self.stats.steps += bool(inputs)
        if runner.graphs is not None and draft is None and inputs and all(map(_is_plain, inputs)):
            return runner.replay(inputs)
        scored = [entry for entry in inputs if entry.sequence.targets is not None]
        if scored:
            score_targets(runner, scored, runner.forward(scored))
        sampled = [entry for entry in inputs if entry.sequence.targets is None] if scored else inputs
        hidden = runner.forward(sampled, None if draft is None else draft.member)
        rows = [entry for entry in sampled for _ in range(entry.num_logits)]
        if not rows:
            return SamplerOutput([], [], [], [], [])
        logits = runner.all_logits(hidden, rows)
        if draft is not None and draft.member is not None:
            assert draft.logits is not None
            logits[draft.member] = draft.logits
        positions = [(entry.sequence, ahead) for entry in sampled for ahead in range(entry.num_logits)]
        num_top = max(_num_top(sequence) for sequence, _ in positions)
        return runner.sample(logits, positions, min(num_top, logits[0].shape[1]))

    def _update(self, inputs: SequenceOf[SlotInput], draft: Draft | None, output: SamplerOutput) -> list[Update]:
        """Record the sampled tokens, and finish the sequences that end."""
        updates, self._updates = self._updates, []
        sampled: list[Sampled] = []
        before = {entry.sequence.id: len(entry.sequence.tokens) for entry in inputs}
        searched: dict[int, dict[int, int]] = {}  # by sequence and beam the row of its logits
        row = 0
        for entry in inputs:
            sequence = entry.sequence
            if sequence.targets is not None or not entry.num_logits:
                continue
            if sequence.search is not None:
                searched.setdefault(sequence.id, {})[entry.slot.number] = row
            else:
                sampled += self._accept(entry, draft, output, row)
            row += entry.num_logits
        for number, rows in searched.items():
            sampled += self._extend_beams(self.scheduler.running[number], rows, output)
        _explain(self.ensemble, self.runner, output, sampled)
        for sequence in {entry.sequence.id: entry.sequence for entry in inputs}.values():
            new = slice(before[sequence.id], None)
            completion = None
            if sequence.finish_reason is not None:
                self.scheduler.finish(sequence)
                completion = sequence.completion()
                if sequence.search is not None:
                    self.stats.tokens += len(completion.tokens)
            if completion is not None or len(sequence.tokens) > new.start:
                tokens = completion.tokens if completion is not None and sequence.search else sequence.tokens[new]
                logprobs = completion.logprobs if completion is not None and sequence.search else sequence.logprobs[new]
                updates.append(Update(sequence.id, tokens, logprobs, sequence.top[new], completion))
        if self.stats.first_token_time is None and self.stats.tokens:
            self.stats.first_token_time = time.perf_counter()
        return updates

    def _accept(self, entry: SlotInput, draft: Draft | None, output: SamplerOutput, row: int) -> list[Sampled]:
        """The accepted prefix of a draft, and the token sampled after it; the KV positions of the rest are dropped."""
        sequence, proposed = entry.sequence, entry.draft
        accepted = next((at for at, token in enumerate(proposed) if output.tokens[row + at] != token), len(proposed))
        if proposed:
            assert draft is not None
            assert self.speculation is not None
            failed = any(output.flags[row + accepted + 1 : row + len(proposed) + 1])
            self.runner.slots.truncate(entry.slot, len(proposed) - accepted, clear=failed)
            self.stats.add_draft(self.speculation.name(draft), len(proposed), accepted)
        sampled: list[Sampled] = []
        for at in range(row, row + accepted + 1):
            token, logprob = output.tokens[at], output.logprobs[at]
            if output.flags[at]:
                sequence.finish_reason = "error"
                sequence.error = describe_flag(output.flags[at], self.ensemble.names)
                break
            count = len(sequence.tokens)
            sequence.append(token, logprob, output.top[at] if output.top else [])
            self.stats.tokens += len(sequence.tokens) - count
            sampled.append((at, sequence, sequence.explanations, token, logprob))
            if sequence.finish_reason is not None:
                break
        return sampled

    def _extend_beams(self, sequence: Sequence, rows: dict[int, int], output: SamplerOutput) -> list[Sampled]:
        """One token more for every beam. rows: by beam the row of its logits."""
        search = sequence.search
        assert search is not None
        flag = max(output.flags[row] for row in rows.values())
        if flag:
            sequence.finish_reason, sequence.error = "error", describe_flag(flag, self.ensemble.names)
            return []
        numbers = range(sequence.params.beams)
        copies = search.extend([output.top[rows[n]][: search.num_candidates] if n in rows else [] for n in numbers])
        for source, target, common in copies:
            slot = sequence.slots[target]
            held = slot.prefix if common < 0 else [len(prompt) + common for prompt in sequence.prompts]
            self.runner.slots.copy(sequence.slots[source], slot, held)
        if search.over:
            sequence.finish_reason = search.finished[0].finish_reason if search.finished else "stop"
        return [
            (rows[beam.parent], sequence, beam.explanations, beam.tokens[-1], beam.logprobs[-1])
            for beam in search.latest
        ]

    def _refusal(self, sequence: Sequence) -> str:
        """Why this engine cannot decode a sequence; empty if it can. Raises InputError where no engine could."""
        _prepare(self.ensemble, sequence, "the sequence's prompt")
        if sequence.params.beams > self.slots:
            return f"needs {sequence.params.beams} slots, one for each beam; there are {self.slots}"
        return self.runner.slots.check_room(sequence)


def _prepare(ensemble: Ensemble, sequence: Sequence, name: str) -> None:
    """Set what follows from the ensemble, the stop tokens and the limit; raises InputError for what does not fit."""
    if len(sequence.prompts) != len(ensemble.members):
        raise InputError(f"{name}: {len(sequence.prompts)} prompts for {len(ensemble.members)} members")
    if sequence.weights is not None:
        if len(sequence.weights) != len(ensemble.members):
            raise InputError(f"{name}: {len(sequence.weights)} weights for {len(ensemble.members)} members")
        for member, weight in zip(ensemble.names, sequence.weights):
            if weight and (fault := weight_fault(member, weight)):
                raise InputError(f"{name}: {fault}")
    used = [n for n in range(len(ensemble.members)) if sequence.uses(n)]
    if not used:
        raise InputError(f"{name}: every weight is zero; at least one member must have another")
    if not all(sequence.prompts[n] for n in used):
        raise InputError(f"{name} is empty; a model needs at least one token to continue from")
    sequence.stops = ensemble.stop_tokens if sequence.stop_tokens is None else sequence.stop_tokens
    vocabulary = ensemble.models[0].config.vocab_size
    for tokens in (*(sequence.prompts[n] for n in used), sequence.targets or []):
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocabulary):
            raise InputError(f"{name}: token ids must be 0 to {vocabulary - 1}, found {min(tokens)} to {max(tokens)}")
    if sequence.key is not None and not 0 <= sequence.key < 2**31:
        raise InputError(f"{name}: key {sequence.key} must be 0 to 2**31 - 1")
    contexts = list(ensemble.context.values())
    room = min(contexts[n] - len(sequence.prompts[n]) for n in used)
    if sequence.targets is not None:
        if room < len(sequence.targets):
            raise InputError(f"{name} and its {len(sequence.targets)} tokens do not fit a member's context")
        if len(sequence.stops) >= MAX_TARGETS:
            raise InputError(
                f"{name}: {len(sequence.stops)} stop tokens; a text is scored with {MAX_TARGETS - 1} at most"
            )
        return
    if sequence.max_new_tokens < 1:
        raise InputError(f"max_new_tokens {sequence.max_new_tokens} must be at least 1")
    if room < 1:
        longest = max(len(sequence.prompts[n]) for n in used)
        raise InputError(f"{name} has {longest} tokens; a member's context has no room after it")
    sequence.limit = min(sequence.max_new_tokens, room)
    needed = sequence.params.beams + len(sequence.stops) if sequence.params.is_search else sequence.top_logprobs
    if needed > MAX_TOP_K:
        raise InputError(
            f"{sequence.params.beams} beams with {len(sequence.stops)} stop tokens, or {sequence.top_logprobs} best "
            f"tokens, need {needed} candidates a position; {MAX_TOP_K} can be had"
        )


def _is_plain(entry: SlotInput) -> bool:
    """Whether a slot reads one generated token and needs no more than the next one: what a CUDA graph computes."""
    sequence = entry.sequence
    return bool(sequence.tokens) and not sequence.top_logprobs and sequence.search is None and sequence.targets is None


def _num_top(sequence: Sequence) -> int:
    """Best tokens that a sequence needs at each position."""
    return sequence.search.num_candidates if sequence.search is not None else sequence.top_logprobs


def _explain(ensemble: Ensemble, runner: ModelRunner, output: SamplerOutput, sampled: SequenceOf[Sampled]) -> None:
    """Why these tokens were sampled, for the sequences that request it."""
    sampled = [entry for entry in sampled if entry[1].explain]
    if not sampled:
        return
    rows, sequences, sinks, tokens, logprobs = zip(*sampled)
    logits = output.logits
    if list(rows) != list(range(len(output.tokens))):
        index_R = torch.tensor(rows, device=ensemble.device)
        logits = [of_member[index_R] for of_member in logits]
    for sink, explanation in zip(sinks, explain(logits, runner.weights(sequences), tokens, logprobs)):
        sink.append(explanation)


def _shared_prefix(prompts: SequenceOf[list[int]]) -> list[int]:
    """The tokens that several prompts all begin with; every prompt keeps one of its own after them."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    shortest = min(map(len, prompts)) - 1
    return first[: next((at for at, (a, b) in enumerate(zip(first, last)) if a != b), shortest)][:shortest]


def _cost(sequence: Sequence) -> int:
    return sum(map(len, sequence.prompts)) + len(sequence.targets or ())
