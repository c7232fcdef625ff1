"""A plain step as one CUDA graph: every member's forward pass, sampling, and the copy of tokens to the host.

A step in which every slot reads one token is some hundreds of small kernels a member. Launched one by one from Python
they take longer than the weights take to be read; a graph is launched as a whole, and small members run beside the
large one on a stream of their own.

What differs from step to step lies in buffers at fixed addresses, which the host fills before each replay: every slot's
last token, its position in each member's cache, and its sampling parameters and weights. Shapes are constant in a
graph, so there is one for each number of slots (1, 2, 4, 8 … up to all) and, where attention is PyTorch's, for each
number of keys that a member reads (64, 128, 256 …, at most the whole cache). Slots of a graph that are not in use read
token 0 at position 0 of their own slot, which is overwritten when the slot is allocated. Nothing in a step waits for
the host: tokens, log-probabilities and flags are read once at its end.

The function that a graph replays can be run without one, on any device (a CPU has no graphs).
"""

# N members  B slots of a graph, in use or not  I integer inputs  F float inputs  V vocabulary

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decode.engine.ensemble import Ensemble
from decode.engine.kv_slots import Slot
from decode.model.batch import KEYS_MULTIPLE, DecodeBatch, DecodeTables
from kernels import FusedLogits, Sampling, fused_logits
from minillama import KVCache

# Rows of the integer inputs, followed by a row of positions for each member; rows of the float inputs, followed by a
# row of weights for each member.
TOKEN, SEED, KEY, POSITION, TOP_K, POSITIONS = range(6)
TEMPERATURE, TOP_P, WEIGHTS = range(3)
# Runs before a capture: the first compiles kernels, and libraries choose theirs.
WARM_UPS = 2
# Streams that members are divided among: one kernel's start and end overlap with another's.
STREAMS = 2


@dataclass(frozen=True)
class Shape:
    """What is constant in a graph. keys: that attention reads, for each member."""

    slots: int
    keys: tuple[int, ...]
    own_weights: bool
    sampled: bool
    truncated: bool


@dataclass
class Buffers:
    """The tensors of one shape: results of sampling, logits of each member, and on a GPU the graph over them."""

    out: FusedLogits | None = None
    logits: list[Tensor] = field(default_factory=list)
    graph: Any = None


class GraphRunner:
    """The graphs of steps over the first `slots` slots of the members' caches, made as they are needed."""

    def __init__(self, ensemble: Ensemble, caches: SequenceOf[KVCache], slots: int) -> None:
        self.ensemble, self.models, self.caches, self.slots = ensemble, ensemble.models, caches, slots
        self.device = ensemble.device
        self.capture = self.device.type == "cuda"
        self.tables = [DecodeTables(model.config, cache) for model, cache in zip(self.models, caches)]
        self.buffers: dict[Shape, Buffers] = {}
        self.logits: list[Tensor] = []  # of the last step, of every member (slots in use, V)
        members = len(self.models)
        self.inputs_IB = torch.zeros(POSITIONS + members, slots, dtype=torch.int64, device=self.device)
        self.inputs_FB = torch.zeros(WEIGHTS + members, slots, dtype=torch.float64, device=self.device)
        self.results_3B = torch.zeros(3, slots, dtype=torch.float64, device=self.device)
        self.members_of_stream = balanced([model.nbytes for model in self.models], STREAMS)
        # The host's side of the three; pinned, so that copies do not wait.
        self.host = [torch.zeros_like(t, device="cpu") for t in (self.inputs_IB, self.inputs_FB, self.results_3B)]
        if self.capture:
            self.host = [tensor.pin_memory() for tensor in self.host]
            self.stream = torch.cuda.Stream(self.device)
            self.side_streams = [torch.cuda.Stream(self.device) for _ in self.members_of_stream[1:]]
            self.pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def step(self, slots: SequenceOf[Slot]) -> tuple[list[int], list[float], list[int]]:
        """Each slot reads its sequence's last token after the positions it holds; tokens, log-probabilities and flags.

        Raises ValueError for a slot that is full.
        """
        keys = []
        for member, (model, cache) in enumerate(zip(self.models, self.caches)):
            longest = max(slot.lengths[member] for slot in slots)
            if longest >= cache.capacity:
                raise ValueError(f"position {longest} runs past the end of a cache of {cache.capacity} positions")
            # Our own attention kernel reads the filled positions of each slot, whatever their number.
            keys.append(cache.capacity if model.in_triton else keys_read(longest + 1, cache.capacity))
        params = [slot.sequence.params for slot in slots]
        shape = Shape(
            min(_power_of_two(len(slots)), self.slots),
            tuple(keys),
            any(slot.sequence.weights for slot in slots),
            any(p.temperature for p in params),
            any(p.truncated for p in params),
        )
        with torch.cuda.device(self.device) if self.capture else nullcontext():
            self._fill(slots)
            buffers = self.buffers.get(shape) or self._make(shape)
            if buffers.graph is None:
                self._run(shape, buffers)
            else:
                buffers.graph.replay()
            tokens, logprobs, flags = self._read(len(slots))
        self.logits = [logits_BV[: len(slots)] for logits_BV in buffers.logits]
        return [int(token) for token in tokens], logprobs, [int(flag) for flag in flags]

    def _fill(self, slots: SequenceOf[Slot]) -> None:
        """Copy what this step reads to the device."""
        default = list(self.ensemble.weights.values())
        integers, floats = [], []
        for slot in slots:
            sequence, params = slot.sequence, slot.sequence.params
            integers.append([sequence.tokens[-1], params.signed_seed, sequence.key, len(sequence.tokens), params.top_k])
            integers[-1] += slot.lengths
            floats.append([params.temperature, params.top_p, *(sequence.weights or default)])
        idle = self.slots - len(slots)
        integers += [[0] * (POSITIONS + len(default))] * idle
        floats += [[0.0, 1.0, *default]] * idle
        host_IB, host_FB, _ = self.host
        host_IB.copy_(torch.tensor(integers).T)
        host_FB.copy_(torch.tensor(floats, dtype=torch.float64).T)
        self.inputs_IB.copy_(host_IB, non_blocking=True)
        self.inputs_FB.copy_(host_FB, non_blocking=True)

    def _make(self, shape: Shape) -> Buffers:
        """The tensors of a new shape, and its graph."""
        buffers = Buffers()
        if self.capture:
            try:
                self._capture(shape, buffers)
            except RuntimeError as error:
                raise RuntimeError(f"no CUDA graph of a step ({error}); COLLAB_GRAPHS=off decodes without") from error
        self.buffers[shape] = buffers
        return buffers

    def _capture(self, shape: Shape, buffers: Buffers) -> None:
        """Record the step. Before that it runs on the same streams without recording: kernels are compiled, libraries
        choose theirs and allocate their workspaces. Each run writes to the caches what the replay will write.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                self._run(shape, buffers)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self._run(shape, buffers)
        buffers.graph = graph

    def _run(self, shape: Shape, buffers: Buffers) -> None:
        """The step: what a graph records. It reads the input buffers and writes the results."""
        inputs_IB, inputs_FB = self.inputs_IB[:, : shape.slots], self.inputs_FB[:, : shape.slots]
        logits: dict[int, Tensor] = {}

        def forward(member: int) -> None:
            model, cache = self.models[member], self.caches[member]
            batch = DecodeBatch(self.tables[member], inputs_IB[POSITIONS + member], shape.keys[member])
            logits[member] = model.logits(model.hidden(inputs_IB[TOKEN], batch, cache))

        for number, members in enumerate(self.members_of_stream[1:]):
            with self._side_stream(number):
                for member in members:
                    forward(member)
        for member in self.members_of_stream[0]:
            forward(member)
        if self.capture:
            for stream in self.side_streams:
                torch.cuda.current_stream().wait_stream(stream)
        buffers.logits = [logits[member] for member in range(len(self.models))]
        sample = None
        if shape.sampled:
            sample = Sampling(
                seed=inputs_IB[SEED],
                row_id=inputs_IB[KEY],
                position=inputs_IB[POSITION],
                temperature=inputs_FB[TEMPERATURE].float(),
                top_k=inputs_IB[TOP_K] if shape.truncated else 0,
                top_p=inputs_FB[TOP_P] if shape.truncated else 1.0,
            )
        weights = inputs_FB[WEIGHTS:].float() if shape.own_weights else self.ensemble.weights_N
        out = buffers.out = fused_logits(buffers.logits, weights, sample=sample, out=buffers.out)
        token, logprob = (out.token, out.logprob) if sample is None else (out.sample_token, out.sample_logprob)
        assert token is not None
        assert logprob is not None
        for row_B, result_B in zip(self.results_3B, (token, logprob, out.flag)):
            row_B[: shape.slots].copy_(result_B)

    def _side_stream(self, number: int) -> AbstractContextManager[Any]:
        """A stream of its own, after what the current one has done so far."""
        if not self.capture:
            return nullcontext()
        self.side_streams[number].wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.side_streams[number])

    def _read(self, slots: int) -> list[list[float]]:
        host_3B = self.host[2]
        host_3B.copy_(self.results_3B, non_blocking=True)
        if self.capture:
            torch.cuda.current_stream().synchronize()
        return host_3B[:, :slots].tolist()


def balanced(weights: SequenceOf[int], streams: int) -> list[list[int]]:
    """Members of so many bytes in lists of about equal sums, the heaviest list first."""
    lists: list[list[int]] = [[] for _ in range(min(streams, len(weights)))]

    def total(members: SequenceOf[int]) -> int:
        return sum(weights[member] for member in members)

    for member in sorted(range(len(weights)), key=lambda member: -weights[member]):
        min(lists, key=total).append(member)
    return sorted(lists, key=total, reverse=True)


def keys_read(filled: int, capacity: int) -> int:
    """Keys that attention reads where slots hold up to `filled`: a power of two of its blocks, or the whole cache."""
    return min(KEYS_MULTIPLE * _power_of_two(-(-filled // KEYS_MULTIPLE)), capacity)


def _power_of_two(count: int) -> int:
    """The next one at or above `count`."""
    return 1 << (count - 1).bit_length()
