"""Members of an ensemble, and the step in which they choose a token together.

The engine knows tokens, caches and weights; it does not know texts, prompts' origin or which sentence a row belongs to.
Rows in flight always are rows 0..n-1 of every cache: the scheduler (translate.py) fills up behind them and closes gaps.
"""

# N members  B rows  T prompt positions  D model width  V vocabulary

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from decode.expression import parse, spell
from kernels import describe_flag, fused_logits
from kernels.request import MAX_MEMBERS
from minillama import InputError, KVCache, Llama


@dataclass(frozen=True)
class Member:
    """One model and its weight in the sum. Prompts and positions are its own, generated tokens are shared."""

    name: str
    model: Llama
    weight: float


class Ensemble:
    """`Ensemble({"L": model_l, "S": model_s}, combine="L + S")`: members that choose from one weighted sum of logits.

    Models that the expression gives weight zero are dropped. Raises InputError for an expression that does not parse
    and for vocabularies of different sizes (equal tables are the caller's to check: see decode.vocabulary).
    """

    def __init__(self, models: Mapping[str, Llama], combine: str | Mapping[str, float] | None = None) -> None:
        if combine is None:
            combine = " + ".join(models)
        weights = parse(combine, models) if isinstance(combine, str) else dict(combine)
        if len(weights) > MAX_MEMBERS:
            raise InputError(f"{len(weights)} models in one ensemble; at most {MAX_MEMBERS} can be summed")
        self.members = tuple(Member(name, models[name], weight) for name, weight in weights.items())
        sizes = {member.name: member.model.config.vocab_size for member in self.members}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise InputError(f"the models' vocabularies differ in size ({listed}); members must share one vocabulary")
        self.weights_N = torch.tensor([m.weight for m in self.members], dtype=torch.float32, device=self.device)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    @property
    def weights(self) -> dict[str, float]:
        return {member.name: member.weight for member in self.members}

    @property
    def combine(self) -> str:
        return spell(self.weights)

    @property
    def device(self) -> torch.device:
        """Where logits are summed: the first member's device."""
        return self.members[0].model.device

    @property
    def stop_tokens(self) -> frozenset[int]:
        """What ends a text for any member: to a model that reads a token as the end, nothing behind it makes sense."""
        return frozenset(token for member in self.members for token in member.model.stop_tokens)

    @property
    def context(self) -> dict[str, int]:
        """Positions that each member was made for."""
        return {member.name: member.model.config.max_position_embeddings for member in self.members}


@dataclass(frozen=True)
class Choice:
    """The next token of each row and its log-probability in nats under the combined distribution, on the host."""

    tokens: list[int]
    logprobs: list[float]


class Rows:
    """Up to `batch_size` rows in flight: one cache per member, every length known on the host."""

    def __init__(self, ensemble: Ensemble, batch_size: int, capacity: Sequence[int]) -> None:
        """capacity: positions per row, prompt and new tokens, for each member."""
        self.ensemble = ensemble
        self.capacity = tuple(capacity)
        self.batch_size = batch_size
        self.caches = [
            KVCache(member.model.config, batch_size, positions, member.model.dtype, member.model.device)
            for member, positions in zip(ensemble.members, capacity)
        ]
        self.lengths: list[list[int]] = []  # of each active row, per member

    def __len__(self) -> int:
        return len(self.lengths)

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[list[int]]]) -> Choice:
        """Read new rows' prompts (one per member each) in one padded pass per member; returns their first tokens."""
        first, last = len(self), len(self) + len(prompts)
        lengths = [[len(prompt) for prompt in row] for row in prompts]
        logits = []
        for number, (member, cache) in enumerate(zip(self.ensemble.members, self.caches)):
            device = member.model.device
            counts = [row[number] for row in lengths]
            tokens = torch.zeros(len(prompts), max(counts), dtype=torch.int64)
            for row, prompt in zip(tokens, prompts):
                row[: len(prompt[number])] = torch.tensor(prompt[number], dtype=torch.int64)
            view = cache.rows(first, last, filled=0)
            view.lengths_B.zero_()
            hidden_BTD = member.model.hidden(tokens.to(device), cache=view)
            counts_B = torch.tensor(counts, device=device)
            view.truncate(counts_B)  # forget the padding
            logits.append(self._logits(member, hidden_BTD[torch.arange(len(prompts), device=device), counts_B - 1]))
        self.lengths += lengths
        return self._choose(logits)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Choice:
        """Append one token to every active row; returns the next ones."""
        logits = []
        tokens_B1 = torch.tensor(tokens, dtype=torch.int64)[:, None]
        for number, (member, cache) in enumerate(zip(self.ensemble.members, self.caches)):
            view = cache.rows(0, len(self), filled=max(row[number] for row in self.lengths))
            hidden_B1D = member.model.hidden(tokens_B1.to(member.model.device), cache=view)
            logits.append(self._logits(member, hidden_B1D[:, 0]))
        for row in self.lengths:
            row[:] = [length + 1 for length in row]
        return self._choose(logits)

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

    def _logits(self, member: Member, hidden_BD: Tensor) -> Tensor:
        return F.linear(hidden_BD, member.model.output_weight).to(self.ensemble.device)

    def _choose(self, logits: list[Tensor]) -> Choice:
        chosen = fused_logits(logits, self.ensemble.weights_N)
        flags = chosen.flag.tolist()
        if any(flags):
            row = next(row for row, flag in enumerate(flags) if flag)
            raise FloatingPointError(f"row {row}: {describe_flag(flags[row], self.ensemble.names)}")
        return Choice(chosen.token.tolist(), chosen.logprob.tolist())
