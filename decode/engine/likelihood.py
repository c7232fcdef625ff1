"""Log-probabilities of texts that are given: prompt and text are read, and nothing is chosen.

The probability of a text is that of its tokens and of its end: that any stop token of the ensemble follows. Logits of
a few positions at a time are made and forgotten; a member's hidden states of one pass are the most that is held. A
text's result has the same bits whatever it is scored beside.
"""

# R positions of a pass whose next token is asked for  G tokens asked for at each

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from decode.engine.ensemble import Ensemble
from decode.engine.kv_slots import Rows
from decode.step import prompt_parts
from decode.translate import room, shared_prefix
from minillama import InputError

# Rows of logits that exist at once: 16 MB a member with a vocabulary of 128,256.
ROWS_AT_ONCE = 32


@dataclass
class Given:
    """A text's log-probabilities in nats under the combined distribution: its tokens' and, last, its end's.

    members: the same under each member's own distribution. Without stop tokens in the ensemble a text has no end.
    reached: how many of the places asked for have been read; only `given_logprobs` fills the two lists.
    """

    index: int
    target: list[int]
    unread: list[list[int]]
    reached: int = 0
    logprobs: list[float] = field(default_factory=list)
    members: list[list[float]] = field(default_factory=list)


# What is done with a pass: the rows, the texts with the tokens asked for at their new places (-1: any stop token), and
# each member's hidden states of those places, text after text.
Take = Callable[[Rows, Sequence[tuple[Given, list[int]]], Sequence[Tensor]], None]


def given_logprobs(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    targets: Sequence[list[int]],
    batch_size: int = 16,
) -> Iterator[Given]:
    """Yield a result for each prompt (per member) and text (token ids, without a stop token) as it is done.

    Raises InputError for a prompt that is empty and for one that with its text does not fit a member's context,
    FloatingPointError for NaN or infinite logits.
    """
    yield from read_given(ensemble, prompts, targets, batch_size, partial(_logprobs, ensemble))


def read_given(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    targets: Sequence[list[int]],
    batch_size: int,
    take: Take,
) -> Iterator[Given]:
    """Read every prompt and its text, giving `take` what each pass brings; yields as texts are done."""
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        if not all(prompt):
            raise InputError(f"prompt {index + 1} is empty; a model needs at least one token to go on from")
        if room(ensemble, prompt) < len(target):
            raise InputError(f"prompt {index + 1} and its {len(target)} tokens do not fit a member's context")
    if not prompts:
        return
    stops = sorted(ensemble.stop_tokens)
    members = range(len(ensemble.members))
    capacity = [max(len(prompt[n]) + len(target) for prompt, target in zip(prompts, targets)) for n in members]
    prefix = [shared_prefix([prompt[n] for prompt in prompts]) for n in members]
    rows = Rows(ensemble, min(batch_size, len(prompts)), capacity, prefix)
    waiting = sorted(range(len(prompts)), key=lambda index: sum(map(len, prompts[index])) + len(targets[index]))

    def begin() -> Given:
        index = waiting.pop()
        # Without stop tokens nobody asks what follows the last one.
        text = targets[index] if stops else targets[index][:-1]
        unread = [[*prompt[len(read) :], *text] for prompt, read in zip(prompts[index], prefix)]
        return Given(index, targets[index], unread, members=[[] for _ in members])

    active: list[Given] = []
    while len(rows) < rows.batch_size:
        rows.start()
        active.append(begin())
    while active:
        _read(rows, active, bool(stops), take)
        done = [row for row, given in enumerate(active) if not any(given.unread)]
        finished = [active[row] for row in done]
        empty = []
        for row in done:
            if waiting:
                active[row] = begin()
                rows.restart(row)
            else:
                empty.append(row)
        for source, gap in rows.remove(empty):
            active[gap] = active[source]
        del active[len(rows) :]
        yield from finished


def _read(rows: Rows, active: Sequence[Given], ends: bool, take: Take) -> None:
    """One pass of every member; of the positions read, those at which the text or its end is predicted count."""
    parts = prompt_parts(active)
    asked: list[tuple[Given, list[int]]] = []
    for given in active:
        # All members end together, so they are equally far in the text.
        places = [*given.target, -1] if ends else given.target
        reached = max(0, len(places) - max(map(len, given.unread)))
        asked.append((given, places[given.reached : reached]))
        given.reached = max(given.reached, reached)
    wanted = [len(new) for _, new in asked]
    positions = sum(max(map(len, part)) for part in parts)
    every = rows.each(lambda number: rows.hidden(number, [part[number] for part in parts], wanted), positions)
    hidden = [of_member for of_member in every if of_member is not None]
    if hidden:
        take(rows, asked, hidden)


def _logprobs(
    ensemble: Ensemble, rows: Rows, asked_of: Sequence[tuple[Given, list[int]]], hidden: Sequence[Tensor]
) -> None:
    """Logits of a few places at a time, and of them the log-probabilities asked for."""
    stops = sorted(ensemble.stop_tokens)
    asked = [[token, *stops] for _, new in asked_of for token in new]
    owners = [given for given, new in asked_of for _ in new]
    for first in range(0, len(asked), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        logits = [rows.logits(number, of_member[here]) for number, of_member in enumerate(hidden)]
        token_RG = torch.tensor(asked[here], device=ensemble.device)
        combined_RG, own_NRG = ensemble.logprobs(logits, token_RG)
        combined = _token_or_end(combined_RG, asked[here]).tolist()
        of_members = [_token_or_end(own_RG, asked[here]).tolist() for own_RG in own_NRG]
        for given, logprob, own in zip(owners[here], combined, zip(*of_members)):
            given.logprobs.append(logprob)
            for values_of_member, value in zip(given.members, own):
                values_of_member.append(value)


def _token_or_end(logprob_RG: Tensor, asked: Sequence[Sequence[int]]) -> Tensor:
    """The first column, or where that is no token the probability of all others together, float64."""
    ends_R = torch.tensor([tokens[0] < 0 for tokens in asked])
    if not ends_R.any():
        return logprob_RG[:, 0].double()
    return torch.where(ends_R, logprob_RG[:, 1:].double().logsumexp(dim=1), logprob_RG[:, 0].double())
