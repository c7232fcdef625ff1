"""A plain step as one CUDA graph: every member's pass, the combined choice, and the chosen tokens written back.

A step that gives every row one token is some hundreds of small kernels a member. Launched one by one from Python they
take longer than the weights take to be read; a graph is launched as a whole, and small members run beside the large one
on a stream of their own.

What differs from step to step lies in buffers at fixed addresses: every row's last token, its position in each member's
cache, what its draw hangs on. Shapes are constant in a graph, so there is one for each number of rows (1, 2, 4, 8 … up
to the caches'); where attention is PyTorch's also, for each member, of keys that it reads (64, 128, 256 …: less than
twice what is filled, and no more than the cache has). Rows of a graph that are not in use take part with token 0 at
position 0 and write to their own row of the cache, which whoever starts a row overwrites. Drafts, prompts and beams are
not of this shape and never come here.

Nothing in a step waits for the host: tokens, log-probabilities and flags are read once behind it. The device then holds
already what the next step reads, unless rows ended, moved or were decoded in another way meanwhile: the host knows what
the device holds, compares, and writes only what differs.

Graphs hold the addresses of the caches, so the caches are theirs too and outlive a call of `translate`. The function
that a graph replays can be run without one (`capture=False`), on any device.
"""

# N members  B rows of a graph, in use or not  I inputs of a step  V vocabulary

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decode.draws import Draws
from decode.engine.ensemble import Ensemble
from decode.model.batch import KEYS_MULTIPLE, RowsPass, RowsPlaces
from kernels import FusedLogits, Sampling, fused_logits

# Lines of the input buffer; behind them stands a line of positions for each member. What follows ACTIVE advances with
# every step, in rows that are in use.
TOKEN, KEY, ACTIVE, DRAWN = range(4)
# Runs before a capture: the first compiles kernels, and libraries choose theirs.
WARM_UPS = 2
# Streams that members are divided among: one kernel's beginning and end are filled by another's, and as long as the
# chains are about equally long, to the end of the step.
CHAINS = 2


@dataclass(frozen=True)
class Shape:
    """What is constant in a graph. truncation: top-k and top-p of a draw; None: the best token."""

    rows: int
    keys: tuple[int, ...]
    truncation: tuple[int, float] | None


@dataclass
class Static:
    """One shape's fixed tensors: results of the choice, logits of each member, and on a GPU the graph over them."""

    out: FusedLogits | None = None
    logits: list[Tensor] = field(default_factory=list)
    graph: Any = None


@dataclass(frozen=True)
class Chosen:
    """A step's results on the host, and each member's logits (rows, V), to be read before the next step."""

    tokens: list[int]
    logprobs: list[float]
    flags: list[int]
    logits: list[Tensor]


class StepGraphs:
    """Caches of `rows` rows for all members, with `capacity` positions each and a row behind them for what all prompts
    share; and the graphs of steps over them, made as they are needed.

    capture: record graphs; without it the same function runs each time (a CPU has no graphs).
    """

    def __init__(self, ensemble: Ensemble, rows: int, capacity: Sequence[int], capture: bool) -> None:
        self.models = [member.model for member in ensemble.members]
        self.weights_N, self.device = ensemble.weights_N, ensemble.device
        self.rows, self.capture = rows, capture
        self.caches = [model.cache(rows + 1, positions) for model, positions in zip(self.models, capacity)]
        self.places = [RowsPlaces(model.config, cache) for model, cache in zip(self.models, self.caches)]
        self.graphs: dict[Shape, Static] = {}
        self.inputs_IB = torch.zeros(DRAWN + 1 + len(self.models), rows, dtype=torch.int64, device=self.device)
        self.results_3B = torch.zeros(3, rows, dtype=torch.float64, device=self.device)
        self.seed_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.temperature_B = torch.ones(rows, device=self.device)
        # What the device holds, as the host knows it: the inputs, seed and temperature of draws.
        self.held: list[list[int]] = []
        self.held_draws: tuple[int, float] | None = None
        self.user: weakref.ref[object] | None = None
        self.chains = chains([model.nbytes for model in self.models])
        if capture:
            self.stream = torch.cuda.Stream(self.device)
            self.beside = [torch.cuda.Stream(self.device) for _ in self.chains[1:]]
            self.pool = torch.cuda.graph_pool_handle()
            self.host_inputs_IB = torch.zeros_like(self.inputs_IB, device="cpu").pin_memory()
            self.host_results_3B = torch.zeros_like(self.results_3B, device="cpu").pin_memory()

    @property
    def in_use(self) -> bool:
        return self.user is not None and self.user() is not None

    def fits(self, rows: int, capacity: Sequence[int]) -> bool:
        return rows <= self.rows and all(cache.capacity >= needed for cache, needed in zip(self.caches, capacity))

    @torch.inference_mode()
    def step(
        self,
        tokens: Sequence[int],
        lengths: Sequence[Sequence[int]],
        drawn: Sequence[tuple[int, int]],
        draws: Draws | None,
    ) -> Chosen:
        """Read each row's last token behind the `lengths[row][member]` positions it has, and choose the next ones.

        drawn: what each row's draw hangs on, its key and how many tokens it has. Raises ValueError for a row at the end
        of a cache.
        """
        rows = len(tokens)
        keys = []
        for model, cache, of_rows in zip(self.models, self.caches, zip(*lengths)):
            if max(of_rows) >= cache.capacity:
                raise ValueError(f"position {max(of_rows)} runs past the end of a cache of {cache.capacity} positions")
            # A kernel that reads what each row has filled does so in one graph, whatever that is.
            keys.append(cache.capacity if model.in_triton else keys_read(max(of_rows) + 1, cache.capacity))
        truncation = None if draws is None else (draws.top_k, draws.top_p)
        shape = Shape(min(_power_of_two(rows), self.rows), tuple(keys), truncation)
        with self._on_device():
            self._hold(tokens, lengths, drawn, draws)
            static = self.graphs.get(shape) or self._made(shape)
            if static.graph is None:
                self._run(shape, static)
            else:
                static.graph.replay()
            results = self._read()
        chosen = [int(token) for token in results[0]]
        self._advance(shape.rows, chosen)
        return Chosen(
            chosen[:rows],
            results[1][:rows],
            [int(flag) for flag in results[2][:rows]],
            [logits_BV[:rows] for logits_BV in static.logits],
        )

    def _made(self, shape: Shape) -> Static:
        """The tensors of a shape that was not met before, and its graph."""
        static = Static()
        if self.capture:
            try:
                self._capture(shape, static)
            except RuntimeError as error:
                raise RuntimeError(f"no CUDA graph of a step ({error}); COLLAB_GRAPHS=off decodes without") from error
        self.graphs[shape] = static
        return static

    def _capture(self, shape: Shape, static: Static) -> None:
        """Record the step. Before that it runs on the same streams, where nothing is recorded: kernels are compiled,
        libraries choose theirs and take their working memory. Each run writes to the caches what the replay will write,
        and the inputs are put back behind it.
        """
        current = torch.cuda.current_stream()
        self._write(torch.tensor(self.held))
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                self._run(shape, static)
                self.inputs_IB.copy_(self.host_inputs_IB, non_blocking=True)
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self._run(shape, static)
        static.graph = graph

    def _run(self, shape: Shape, static: Static) -> None:
        """The step: what a graph records. Everything that changes comes from the buffers and goes to them."""
        inputs_IB = self.inputs_IB[:, : shape.rows]
        token_B, key_B, active_B, drawn_B, *positions = inputs_IB.unbind()
        logits: list[Tensor | None] = [None] * len(self.models)

        def forward(number: int) -> None:
            model, cache = self.models[number], self.caches[number]
            positions_of_rows = RowsPass(self.places[number], positions[number], shape.keys[number])
            logits[number] = model.logits(model.hidden(token_B, positions_of_rows, cache))

        for number, members in enumerate(self.chains[1:]):
            with self._forked(number):
                for member in members:
                    forward(member)
        for member in self.chains[0]:
            forward(member)
        self._join()
        static.logits = [of_member for of_member in logits if of_member is not None]
        sample = None
        if shape.truncation is not None:
            temperature_B = self.temperature_B[: shape.rows]
            sample = Sampling(self.seed_B[: shape.rows], key_B, drawn_B, temperature_B, *shape.truncation)
        out = static.out = fused_logits(static.logits, self.weights_N, sample=sample, out=static.out)
        token, logprob = (out.token, out.logprob) if sample is None else (out.sample_token, out.sample_logprob)
        assert token is not None
        assert logprob is not None
        for line_B, result_B in zip(self.results_3B, (token, logprob, out.flag)):
            line_B[: shape.rows].copy_(result_B)
        # A flagged row's token is -1, which no embedding has; the host raises before anybody reads what follows it.
        torch.mul(token.clamp(min=0), active_B, out=token_B)
        inputs_IB[DRAWN:].add_(active_B)

    def _forked(self, number: int) -> AbstractContextManager[Any]:
        """A stream of its own, behind what the present one has done so far."""
        if not self.capture:
            return nullcontext()
        self.beside[number].wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.beside[number])

    def _join(self) -> None:
        if self.capture:
            for stream in self.beside:
                torch.cuda.current_stream().wait_stream(stream)

    def _hold(
        self,
        tokens: Sequence[int],
        lengths: Sequence[Sequence[int]],
        drawn: Sequence[tuple[int, int]],
        draws: Draws | None,
    ) -> None:
        """Bring the buffers to what this step reads, where they do not hold it already."""
        keys, places = zip(*drawn)
        idle = [0] * (self.rows - len(tokens))
        wanted = [[*line, *idle] for line in (tokens, keys, [1] * len(tokens), places, *zip(*lengths))]
        if wanted != self.held:
            self.held = wanted
            self._write(torch.tensor(wanted))
        if draws is not None and self.held_draws != (draws.seed, draws.temperature):
            self.held_draws = (draws.seed, draws.temperature)
            self.seed_B.fill_((draws.seed + 2**63) % 2**64 - 2**63)
            self.temperature_B.fill_(draws.temperature)

    def _write(self, wanted_IB: Tensor) -> None:
        if not self.capture:
            self.inputs_IB.copy_(wanted_IB)
            return
        # The copy before this one is done: results were waited for since.
        self.host_inputs_IB.copy_(wanted_IB)
        self.inputs_IB.copy_(self.host_inputs_IB, non_blocking=True)

    def _advance(self, rows: int, chosen: Sequence[int]) -> None:
        """What the device holds behind a step of `rows` rows."""
        active = self.held[ACTIVE]
        for row in range(rows):
            if active[row]:
                self.held[TOKEN][row] = max(chosen[row], 0)
                for line in self.held[DRAWN:]:
                    line[row] += 1

    def _read(self) -> list[list[float]]:
        if not self.capture:
            return self.results_3B.tolist()
        self.host_results_3B.copy_(self.results_3B, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self.host_results_3B.tolist()

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.capture else nullcontext()


def chains(weights: Sequence[int]) -> list[list[int]]:
    """Members of so many bytes in CHAINS lists of about equal sums, the heaviest list first."""
    found: list[list[int]] = [[] for _ in range(min(CHAINS, len(weights)))]

    def total(members: Sequence[int]) -> int:
        return sum(weights[member] for member in members)

    for member in sorted(range(len(weights)), key=lambda member: -weights[member]):
        min(found, key=total).append(member)
    return sorted(found, key=total, reverse=True)


def keys_read(filled: int, capacity: int) -> int:
    """Keys that attention reads where rows hold up to `filled`: a power of two of its blocks, or the whole cache."""
    return min(KEYS_MULTIPLE * _power_of_two(-(-filled // KEYS_MULTIPLE)), capacity)


def _power_of_two(count: int) -> int:
    """The next one at or above `count`."""
    return 1 << (count - 1).bit_length()
