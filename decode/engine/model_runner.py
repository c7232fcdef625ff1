"""Runs all members over the positions of a step, and chooses tokens from the weighted sum of their logits.

It owns the KV slots and, on CUDA, the graphs. Which positions are computed, and what follows from a token, is the
scheduler's and the engine's to decide.
"""

# R positions whose logits are needed  D model width  V vocabulary  N members  K best tokens

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from decode.engine.cuda_graph import GraphRunner
from decode.engine.ensemble import Ensemble
from decode.engine.kv_slots import KVSlots, Slot
from decode.engine.sequence import Sequence, TopLogprobs
from decode.model.batch import ForwardBatch, Segment
from kernels import Sampling, fused_logits

Result = TypeVar("Result")

# Bytes of the smallest member from which on a thread for each member is faster than all threads for one after another.
MEMBER_THREAD_BYTES = 100_000_000


@dataclass
class SlotInput:
    """What one slot computes in a step.

    tokens: for each member the tokens that it reads now, at most one of them sampled and the others drafted, or a chunk
    of the prompt.   num_logits: logits are needed at so many positions, the last ones.   draft: tokens that were
    proposed after the last one.
    """

    slot: Slot
    tokens: list[list[int]]
    num_logits: int
    draft: list[int] = field(default_factory=list)

    @property
    def sequence(self) -> Sequence:
        return self.slot.sequence

    def extend(self, draft: list[int]) -> None:
        """Read drafted tokens too, with logits at each of them."""
        self.draft = draft
        self.tokens = [[*tokens, *draft] if tokens else [] for tokens in self.tokens]
        self.num_logits += len(draft)


@dataclass(frozen=True)
class SamplerOutput:
    """For R positions the sampled token, its log-probability in nats, a flag (kernels.describe_flag), the best tokens
    where requested, and each member's logits (R, V), valid until the next step.
    """

    tokens: list[int]
    logprobs: list[float]
    flags: list[int]
    top: list[TopLogprobs]
    logits: list[Tensor]


class ModelRunner:
    """The members of an ensemble over `slots` KV slots of `max_positions[n]` positions for member n.

    prefix: for each member what prompts begin with; it is computed here, once.
    """

    def __init__(
        self, ensemble: Ensemble, slots: int, max_positions: SequenceOf[int], prefix: SequenceOf[list[int]]
    ) -> None:
        self.ensemble, self.models, self.device = ensemble, ensemble.models, ensemble.device
        self.slots = KVSlots(self.models, slots, max_positions, prefix)
        self.graphs = GraphRunner(ensemble, self.slots.caches, slots) if ensemble.graphs else None
        self.threads = _MemberThreads(len(self.models)) if self._threads_pay() else None
        for member, tokens in enumerate(prefix):
            if tokens:
                segments = [Segment(self.slots.shared, 1, len(tokens))]
                self._run(member, tokens, segments, [0])

    def forward(self, inputs: SequenceOf[SlotInput], skip: int | None = None) -> list[Tensor | None]:
        """Each member reads its tokens; its hidden states (R, D) where logits are needed, input after input.

        skip: a member that has read its tokens already.
        """
        members = range(len(self.models))
        if self.threads is not None and skip is None:
            return self.threads.map(lambda member: self.hidden(member, inputs))
        return [None if member == skip else self.hidden(member, inputs) for member in members]

    @torch.inference_mode()
    def hidden(self, member: int, inputs: SequenceOf[SlotInput]) -> Tensor | None:
        """One member reads its tokens; hidden states (R, D) where logits are needed, None if nowhere."""
        segments: list[Segment] = []
        starts: list[int] = []
        flat: list[int] = []
        selected: list[int] = []
        for entry in inputs:
            tokens, index = entry.tokens[member], entry.slot.index
            if not tokens:
                continue
            starts.append(entry.slot.lengths[member])
            entry.slot.lengths[member] += len(tokens)
            last = segments[-1] if segments else None
            if last is not None and last.count == len(tokens) and last.first + last.slots == index:
                segments[-1] = Segment(last.first, last.slots + 1, last.count)
            else:
                segments.append(Segment(index, 1, len(tokens)))
            flat += tokens
            selected += range(len(flat) - entry.num_logits, len(flat))
        if not flat:
            return None
        hidden_RD = self._run(member, flat, segments, starts)
        if not selected:
            return None
        if len(selected) < len(hidden_RD):
            hidden_RD = hidden_RD[torch.tensor(selected, device=hidden_RD.device)]
        return hidden_RD

    @torch.inference_mode()
    def logits(self, member: int, hidden_RD: Tensor) -> Tensor:
        """(R, V) on the ensemble's device, for hidden states of `forward`."""
        return self.models[member].logits(hidden_RD).to(self.device)

    def all_logits(self, hidden: SequenceOf[Tensor | None], rows: SequenceOf[SlotInput]) -> list[Tensor]:
        """(R, V) of every member. rows: whose position each row is; `hidden` has those that a member has read.

        Rows of sequences that leave a member out are not computed and hold anything.
        """

        def of_member(member: int) -> Tensor:
            hidden_RD = hidden[member]
            width = self.models[member].config.vocab_size
            if hidden_RD is None:
                return torch.empty(len(rows), width, device=self.device)
            logits_RV = self.logits(member, hidden_RD)
            if len(logits_RV) == len(rows):
                return logits_RV
            read = [row for row, entry in enumerate(rows) if entry.tokens[member]]
            whole_RV = torch.empty(len(rows), width, dtype=logits_RV.dtype, device=logits_RV.device)
            return whole_RV.index_copy_(0, torch.tensor(read, device=logits_RV.device), logits_RV)

        members = range(len(self.models))
        return self.threads.map(of_member) if self.threads is not None else [of_member(member) for member in members]

    def sample(
        self,
        logits: list[Tensor],
        positions: SequenceOf[tuple[Sequence, int]],
        num_top: int = 0,
        weights: Tensor | None = None,
    ) -> SamplerOutput:
        """The next token at every position, given as a sequence and how many tokens come after its last one.

        num_top: of so many best tokens the log-probabilities too.   weights: of the given logits, where they are not
        the members'.
        """
        sequences = [sequence for sequence, _ in positions]
        if weights is None:
            weights = self.weights(sequences)
        result = fused_logits(logits, weights, top_k=num_top, sample=self._sampling(positions))
        token_R, logprob_R = result.token, result.logprob
        if result.sample_token is not None and result.sample_logprob is not None:
            token_R, logprob_R = result.sample_token, result.sample_logprob
        top: list[TopLogprobs] = []
        if num_top:
            assert result.top_token is not None
            assert result.top_logprob is not None
            tensors = (token_R, logprob_R, result.flag, result.top_token, result.top_logprob)
            token_R, logprob_R, flag_R, top_token_RK, top_logprob_RK = self._agree(*tensors)
            pairs = zip(top_token_RK.tolist(), top_logprob_RK.tolist())
            top = [[(token, value) for token, value in zip(*row) if token >= 0] for row in pairs]
        else:
            token_R, logprob_R, flag_R = self._agree(token_R, logprob_R, result.flag)
        return SamplerOutput(token_R.tolist(), logprob_R.tolist(), flag_R.tolist(), top, logits)

    def replay(self, inputs: SequenceOf[SlotInput]) -> SamplerOutput:
        """A step in which every slot reads one token and chooses the next, as one CUDA graph."""
        assert self.graphs is not None
        slots = [entry.slot for entry in inputs]
        output = SamplerOutput(*self.graphs.step(slots), [], self.graphs.logits)
        for entry in inputs:
            entry.slot.lengths = [length + bool(new) for length, new in zip(entry.slot.lengths, entry.tokens)]
        return output

    def weights(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """(N,) or, where a sequence has weights of its own, (N, R)."""
        if all(sequence.weights is None for sequence in sequences):
            return self.ensemble.weights_N
        default = tuple(self.ensemble.weights.values())
        columns = [sequence.weights or default for sequence in sequences]
        return torch.tensor(list(zip(*columns)), dtype=torch.float32, device=self.device)

    def _sampling(self, positions: SequenceOf[tuple[Sequence, int]]) -> Sampling | None:
        params = [sequence.params for sequence, _ in positions]
        if not any(p.temperature for p in params):
            return None

        def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        truncated = any(p.truncated for p in params)
        return Sampling(
            seed=tensor([p.signed_seed for p in params]),
            row_id=tensor([sequence.key for sequence, _ in positions]),
            position=tensor([len(sequence.tokens) + ahead for sequence, ahead in positions]),
            temperature=tensor([p.temperature for p in params], torch.float32),
            top_k=tensor([p.top_k for p in params]) if truncated else 0,
            top_p=tensor([p.top_p for p in params], torch.float64) if truncated else 1.0,
        )

    def _agree(self, *results: Tensor) -> SequenceOf[Tensor]:
        """Results of the first process of a tensor-parallel group, in all of its processes, on the host."""
        if self.ensemble.tp is None:
            return [result.cpu() for result in results]
        flat = self.ensemble.tp.broadcast(torch.cat([result.flatten().double() for result in results]))  # loses no bit
        pieces = flat.split([result.numel() for result in results])
        return [piece.view(result.shape).to(result.dtype).cpu() for piece, result in zip(pieces, results)]

    def _run(self, member: int, tokens: list[int], segments: list[Segment], starts: list[int]) -> Tensor:
        model, cache = self.models[member], self.slots.caches[member]
        tokens_R = torch.tensor(tokens, device=model.device)
        with torch.inference_mode():
            return model.hidden(tokens_R, ForwardBatch(model.config, segments, starts, cache), cache)

    def _threads_pay(self) -> bool:
        several = self.ensemble.member_threads and len(self.models) > 1 and torch.get_num_threads() > 1
        return several and min(model.nbytes for model in self.models) >= MEMBER_THREAD_BYTES


class _MemberThreads:
    """Members side by side, a thread each, with the cores divided evenly; those left over run alone on all cores.

    A matmul of few rows is limited by memory, and two threads that share it wait for each other several times a layer;
    two threads with a model each do not. How many threads compute a matmul does not change its bits.
    """

    def __init__(self, members: int) -> None:
        self.members, cores = members, torch.get_num_threads()
        self.workers = min(members, cores)
        self.pool = ThreadPoolExecutor(
            self.workers, "member", initializer=torch.set_num_threads, initargs=(cores // self.workers,)
        )

    def map(self, work: Callable[[int], Result]) -> list[Result]:
        """`work(member)` of every member, in order."""
        side_by_side = self.members // self.workers * self.workers
        futures = [self.pool.submit(work, member) for member in range(side_by_side)]
        wait(futures)  # no thread uses a cache once this returns
        return [future.result() for future in futures] + [work(member) for member in range(side_by_side, self.members)]
