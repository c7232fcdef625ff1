"""The rows in flight: for every member a cache, and how many positions of each row it holds.

Rows always are 0..n-1 of every cache: the scheduler (translate.py) fills up behind them and closes gaps. A member may
be ahead of another in the same row, as one that drafts is. Nothing here knows what tokens mean or who chose them.
"""

# R positions of a pass  V vocabulary

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from decode.draws import Draws
from decode.engine.ensemble import Ensemble
from decode.model.batch import Pass, Span
from decode.engine.cuda_graph import Chosen, StepGraphs

Result = TypeVar("Result")


class Rows:
    """Up to `batch_size` rows; `lengths[row][member]` positions are in that member's cache.

    capacity: positions per row, for each member.   prefix: for each member what every row begins with: read once, here,
    and copied to a row when it starts.   `graphs`: where it is not None, `step` may be called.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        batch_size: int,
        capacity: Sequence[int],
        prefix: Sequence[list[int]] | None = None,
    ) -> None:
        self.ensemble = ensemble
        self.batch_size = batch_size
        self.prefix_lengths = [0] * len(capacity) if prefix is None else [len(tokens) for tokens in prefix]
        self.shared = any(self.prefix_lengths)
        self.graphs = self._borrowed(capacity)
        # What rows share stands in a row of its own, the last.
        if self.graphs is not None:
            self.caches = self.graphs.caches
        else:
            models = [member.model for member in ensemble.members]
            self.caches = [model.cache(batch_size + self.shared, places) for model, places in zip(models, capacity)]
        self.shared_row = self.caches[0].batch_size - 1
        self.lengths: list[list[int]] = []
        for number, tokens in enumerate(prefix or ()):
            if tokens:
                self._read(number, [tokens], [Span(self.shared_row, 1, len(tokens))], [0])

    def __len__(self) -> int:
        return len(self.lengths)

    @torch.inference_mode()
    def start(self) -> int:
        """A new row, which begins with the prefix; returns its number."""
        row = len(self)
        for cache, length in zip(self.caches, self.prefix_lengths):
            if length:
                cache.copy_row(self.shared_row, row, length)
        self.lengths.append(list(self.prefix_lengths))
        return row

    def restart(self, row: int) -> None:
        """A row begins anew. What all rows begin with is never overwritten and still stands in it."""
        self.lengths[row] = list(self.prefix_lengths)

    def step(self, tokens: Sequence[int], drawn: Sequence[tuple[int, int]], draws: Draws | None) -> Chosen:
        """Append a token to every row, for all members at once, and choose the next ones: see `StepGraphs.step`."""
        assert self.graphs is not None
        chosen = self.graphs.step(tokens, self.lengths, drawn, draws)
        self.lengths = [[length + 1 for length in lengths] for lengths in self.lengths]
        return chosen

    def each(self, work: Callable[[int], Result], positions: int) -> list[Result]:
        """`work(number)` for every member: side by side where so many positions make that faster (decode/lanes.py)."""
        lanes = self.ensemble.lanes(positions)
        return [work(number) for number in range(len(self.caches))] if lanes is None else lanes.run(work)

    def forward(self, number: int, tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor | None:
        """Append each row's tokens (perhaps none) to member `number`; logits (sum of wanted, V) of each row's last
        `wanted` positions, row after row; None if nothing is wanted.
        """
        hidden_RD = self.hidden(number, tokens, wanted)
        return None if hidden_RD is None else self.logits(number, hidden_RD)

    def logits(self, number: int, hidden_RD: Tensor) -> Tensor:
        """(R, V) on the ensemble's device, for what `hidden` returned."""
        with torch.inference_mode():
            return self.ensemble.members[number].model.logits(hidden_RD).to(self.ensemble.device)

    def hidden(self, number: int, tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> Tensor | None:
        """What `forward` does but for the output layer: hidden states (sum of wanted, D)."""
        spans: list[Span] = []
        starts = []
        for row, new in enumerate(tokens):
            if not new:
                continue
            starts.append(self.lengths[row][number])
            self.lengths[row][number] += len(new)
            last = spans[-1] if spans else None
            if last is not None and last.count == len(new) and last.first + last.rows == row:
                spans[-1] = Span(last.first, last.rows + 1, last.count)
            else:
                spans.append(Span(row, 1, len(new)))
        if not spans:
            return None
        hidden_RD = self._read(number, tokens, spans, starts)
        kept: list[int] = []
        end = 0
        for new, count in zip(tokens, wanted):
            end += len(new)
            kept += range(end - count, end)
        if not kept:
            return None
        if len(kept) < len(hidden_RD):
            hidden_RD = hidden_RD[torch.tensor(kept, device=hidden_RD.device)]
        return hidden_RD

    def _borrowed(self, capacity: Sequence[int]) -> StepGraphs | None:
        """The ensemble's graphs and caches of an earlier call, where they are large enough and nobody uses them now."""
        ensemble = self.ensemble
        if not ensemble.graphs or (ensemble.step_graphs is not None and ensemble.step_graphs.in_use):
            return None
        if ensemble.step_graphs is None or not ensemble.step_graphs.fits(self.batch_size, capacity):
            ensemble.step_graphs = None  # its memory comes back before the next is taken
            ensemble.step_graphs = StepGraphs(ensemble, self.batch_size, capacity, ensemble.device.type == "cuda")
        ensemble.step_graphs.user = weakref.ref(self)
        return ensemble.step_graphs

    @torch.inference_mode()
    def _read(self, number: int, tokens: Sequence[Sequence[int]], spans: list[Span], starts: list[int]) -> Tensor:
        model, cache = self.ensemble.members[number].model, self.caches[number]
        flat_R = torch.tensor([token for new in tokens for token in new], device=model.device)
        return model.hidden(flat_R, Pass(model.config, spans, starts, cache), cache)

    def forget(self, row: int, count: int) -> None:
        """Drop the last `count` positions of a row, for every member."""
        self.lengths[row] = [length - count for length in self.lengths[row]]

    @torch.inference_mode()
    def remove(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Drop rows; the last active ones move into the gaps. Returns the moves made as (from, to)."""
        moves = []
        for row in sorted(rows, reverse=True):
            last = len(self) - 1
            if row != last:
                for number, cache in enumerate(self.caches):
                    cache.copy_row(last, row, self.lengths[last][number])
                self.lengths[row] = self.lengths[last]
                moves.append((last, row))
            self.lengths.pop()
        return moves

    @torch.inference_mode()
    def branch(self, source: int, target: int, equal: Sequence[int]) -> None:
        """Row `target` becomes what row `source` is: how a beam goes on in two ways.

        equal: for each member how many positions the two rows have in common already; only the others are copied.
        """
        for cache, first, length in zip(self.caches, equal, self.lengths[source]):
            entries_LBSEKC = cache.entries_LBSEKC
            entries_LBSEKC[:, target, first:length] = entries_LBSEKC[:, source, first:length]
        self.lengths[target] = list(self.lengths[source])
