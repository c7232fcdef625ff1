"""One step of everything in flight: drafts, a pass of every member, the combined choice, what of it is kept.

Rows that decode and rows whose prompt is still being read share the passes. A row's prompt is read in parts, so that a
long one does not keep the others waiting; members whose prompt is shorter wait for the others with the last parts.
"""

# R positions at which a token is chosen  V vocabulary

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from decode.draws import Draws
from decode.engine.ensemble import Choice, Ensemble
from decode.engine.attribution import Explanation, explain
from decode.engine.kv_slots import Rows
from decode.engine.speculative import CHOICE, LOOKUP, MOST_DRAFTED, STEP, TOGETHER, Copies, Draft, Speculation
from kernels import Sampling

# Positions of prompts that are read in one step, of the member with the longest.
PROMPT_POSITIONS = 512


@dataclass
class InFlight:
    """A row's sentence: its prompts, what of them no member has read yet, and what was chosen so far."""

    index: int
    limit: int
    prompt: tuple[list[int], ...]
    unread: list[list[int]]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    _copies: Copies | None = None

    def copied(self) -> list[int]:
        """What could be copied from the first member's prompt or the output, as far as there is room for it."""
        if self._copies is None:
            self._copies = Copies(self.prompt[0])
        return self._copies.next(self.tokens, min(MOST_DRAFTED, self.limit - len(self.tokens) - 1))


# By row the tokens that a member would write next, and its probability of each.
Guesses = dict[int, tuple[list[int], list[float]]]


class Work(Protocol):
    """What a step counts."""

    steps: int

    def add_draft(self, drafter: str, drafted: int, kept: int) -> None: ...


def step(
    ensemble: Ensemble,
    rows: Rows,
    active: Sequence[InFlight],
    speculation: Speculation,
    draws: Draws | None,
    work: Work,
    explaining: bool = False,
) -> list[list[tuple[int, float]]]:
    """Advance every row; returns for each the tokens it gained, with log-probabilities: none while its prompt is read.

    The last token gained is in no cache yet; all before it are. explaining: an explanation of each goes to the row.
    """
    parts = prompt_parts(active)
    decoding = [row for row, inflight in enumerate(active) if inflight.tokens]
    speculation.steps += 1
    resting = speculation.rests()
    copied = {row: active[row].copied() for row in decoding} if speculation.copies() else {}
    plan = None if resting else _agreed(ensemble, speculation.plan(len(decoding), sum(map(bool, copied.values()))))
    drafts: list[list[int]] = [[] for _ in active]
    guesses: Guesses = {}
    if plan is not None and plan.drafter == LOOKUP:
        for row, tokens in copied.items():
            drafts[row] = tokens[: plan.length]
    of_drafter: Tensor | None = None
    if plan is not None and plan.drafter != LOOKUP:
        of_drafter = _draft(ensemble, rows, active, parts, plan, speculation, draws, drafts, guesses)
    if not resting and not any(drafts):
        speculation.rest(len(decoding))
    if plan is None and rows.graphs is not None and len(decoding) == len(active):
        return _one_token_each(ensemble, rows, active, speculation, draws, work, explaining, copied)

    # A token is chosen behind every drafted one, and behind a prompt that ends here.
    chosen_at = [len(draft) + 1 if row.tokens else int(not any(row.unread)) for row, draft in zip(active, drafts)]

    def read(number: int) -> list[list[int]]:
        return [
            [row.tokens[-1], *draft] if row.tokens else part[number] for row, draft, part in zip(active, drafts, parts)
        ]

    started = time.perf_counter()
    positions = sum(map(len, read(0)))
    together = (plan is None or plan.drafter == LOOKUP) and ensemble.lanes(positions) is not None
    if together:
        logits = rows.each(lambda number: rows.forward(number, read(number), chosen_at), positions)
    else:
        logits = [
            of_drafter
            if plan is not None and number == plan.drafter
            else _timed(rows, number, read(number), chosen_at, speculation)
            for number in range(len(ensemble.members))
        ]
    work.steps += 1
    gained: list[list[tuple[int, float]]] = [[] for _ in active]
    known = [of_member for of_member in logits if of_member is not None]
    if not known:
        return gained
    places = [(row, at) for row, count in enumerate(chosen_at) for at in range(count)]
    choosing = time.perf_counter()
    choice = _choose(ensemble, known, active, places, draws)
    if len(places) == sum(len(draft) + 1 for draft in drafts):
        ended = time.perf_counter()
        speculation.timed(CHOICE, len(places), ended - choosing)
        if together and positions == len(places):
            speculation.timed(TOGETHER, len(places), ended - started)
    if copied and (plan is None or plan.drafter != LOOKUP):
        _watch_copies(speculation, copied, choice, places)
    if plan is None and speculation.watches():
        _watch_members(ensemble, speculation, known, choice)
    picked = iter(zip(choice.tokens, choice.logprobs))
    for row, (draft, count) in enumerate(zip(drafts, chosen_at)):
        pairs = [next(picked) for _ in range(count)]
        kept = next((i for i, token in enumerate(draft) if pairs[i][0] != token), len(draft))
        gained[row] = pairs[: kept + 1]
        if plan is None:
            continue
        # What a member would have written behind its draft is compared too: else only likely tokens ever were.
        tokens, sureness = guesses.get(row, (draft, []))
        speculation.compared(plan.drafter, [a == b for a, (b, _) in zip(tokens, gained[row])], sureness)
        if draft:
            rows.forget(row, len(draft) - kept)
            work.add_draft(speculation.name(plan.drafter, ensemble.names), len(draft), kept)
    if explaining:
        _explain(ensemble, known, active, chosen_at, gained)
    return gained


def _agreed(ensemble: Ensemble, plan: Draft | None) -> Draft | None:
    """The processes of a split member draft alike, though each has a clock of its own."""
    if ensemble.part is None:
        return plan
    drafter, length, least = ensemble.agree((0, 0, 0) if plan is None else (plan.drafter, plan.length, plan.least))
    return Draft(int(drafter), int(length), least) if length else None


def _one_token_each(
    ensemble: Ensemble,
    rows: Rows,
    active: Sequence[InFlight],
    speculation: Speculation,
    draws: Draws | None,
    work: Work,
    explaining: bool,
    copied: Mapping[int, Sequence[int]],
) -> list[list[tuple[int, float]]]:
    """A step in which every row decodes and nobody drafts, as one graph."""
    started = time.perf_counter()
    drawn = [(0 if draws is None else draws.key(row.index), len(row.tokens)) for row in active]
    chosen = rows.step([row.tokens[-1] for row in active], drawn, draws)
    ensemble.check(chosen.flags)
    work.steps += 1
    speculation.timed(STEP, len(active), time.perf_counter() - started)
    choice = Choice(chosen.tokens, chosen.logprobs)
    if copied:
        _watch_copies(speculation, copied, choice, [(row, 0) for row in range(len(active))])
    if speculation.watches():
        _watch_members(ensemble, speculation, chosen.logits, choice)
    gained = [[pair] for pair in zip(choice.tokens, choice.logprobs)]
    if explaining:
        _explain(ensemble, chosen.logits, active, [1] * len(active), gained)
    return gained


class Reading(Protocol):
    """Whose prompt is being read: for each member what is left of it."""

    unread: list[list[int]]


def prompt_parts(active: Sequence[Reading]) -> list[list[list[int]]]:
    """For each row what each member reads of its prompt now; first come, first served. It is unread no longer."""
    parts: list[list[list[int]]] = []
    budget = PROMPT_POSITIONS
    for row in active:
        longest = max(map(len, row.unread))
        if not longest:  # a row that decodes, as most do in most steps
            parts.append([[] for _ in row.unread])
            continue
        left = longest - min(longest, budget)
        budget -= longest - left
        parts.append([tokens[: max(0, len(tokens) - left)] for tokens in row.unread])
        row.unread = [tokens[len(part) :] for tokens, part in zip(row.unread, parts[-1])]
    return parts


def _draft(
    ensemble: Ensemble,
    rows: Rows,
    active: Sequence[InFlight],
    parts: Sequence[list[list[int]]],
    plan: Draft,
    speculation: Speculation,
    draws: Draws | None,
    drafts: list[list[int]],
    guesses: Guesses,
) -> Tensor:
    """Let a member write its own next tokens into `drafts`; its logits at all places where a token will be chosen.

    guesses: to it goes what the member would have written, up to the token before which a draft ended.

    It reads its own last token too: the logits behind it are needed if the whole draft is kept. Prompts go along. As
    soon as the next token is too unlikely to be kept for what it costs (`Draft.least`) the draft ends before it.
    """
    member = plan.drafter
    decoding = [row for row, inflight in enumerate(active) if inflight.tokens]
    room = {row: min(plan.length, active[row].limit - len(active[row].tokens) - 1) for row in decoding}
    chances = dict.fromkeys(decoding, 1.0)  # that all drafted so far is kept
    alone = torch.ones(1, device=ensemble.device)
    logits, places = [], []
    at = 0
    while at == 0 or any(len(drafts[row]) == at for row in decoding):
        new: list[Sequence[int]] = []
        wanted = []
        for row, inflight in enumerate(active):
            if inflight.tokens:
                going = len(drafts[row]) == at
                new.append([[inflight.tokens[-1], *drafts[row]][at]] if going else [])
                wanted.append(int(going))
            else:
                new.append(parts[row][member] if at == 0 else [])
                wanted.append(int(at == 0 and not any(inflight.unread)))
        found = _timed(rows, member, new, wanted, speculation)
        assert found is not None  # a row that decodes reads its last token
        here = [(row, at) for row, count in enumerate(wanted) if count]
        logits.append(found)
        places += here
        if any(room[row] > at for row, _ in here if row in room):
            own = _choose(ensemble, [found], active, here, draws, alone)
            likely = {}
            for (row, _), token, logprob in zip(here, own.tokens, own.logprobs):
                if room.get(row, 0) > at:
                    sure = math.exp(logprob)
                    tokens, sureness = guesses.setdefault(row, ([], []))
                    tokens.append(token)
                    sureness.append(sure)
                    chances[row] *= speculation.tallies[member].chance(sure)
                    if chances[row] >= plan.least:
                        likely[row] = token
            # A further pass of the drafter is shared by all rows that decode.
            if sum(chances[row] for row in likely) >= plan.least * len(decoding):
                for row, token in likely.items():
                    drafts[row].append(token)
        at += 1
    order = sorted(range(len(places)), key=places.__getitem__)  # row after row, as the other members give them
    return torch.cat(logits)[torch.tensor(order, device=ensemble.device)]


def _choose(
    ensemble: Ensemble,
    logits: Sequence[Tensor],
    active: Sequence[InFlight],
    places: Sequence[tuple[int, int]],
    draws: Draws | None,
    weights: Tensor | None = None,
) -> Choice:
    """The combined choice, or that of given weights, at (row, tokens behind the last one)."""
    sample = None
    if draws is not None:
        device = ensemble.device
        key = torch.tensor([draws.key(active[row].index) for row, _ in places], device=device)
        position = torch.tensor([len(active[row].tokens) + at for row, at in places], device=device)
        sample = Sampling(draws.seed, key, position, draws.temperature, draws.top_k, draws.top_p)
    return ensemble.choose(logits, sample, weights)


def _explain(
    ensemble: Ensemble,
    logits: Sequence[Tensor],
    active: Sequence[InFlight],
    chosen_at: Sequence[int],
    gained: Sequence[Sequence[tuple[int, float]]],
) -> None:
    """Why each row gained its tokens; logits of places behind them, where a draft was wrong, are left out."""
    first = [sum(chosen_at[:row]) for row in range(len(active))]
    kept = [at for start, pairs in zip(first, gained) for at in range(start, start + len(pairs))]
    if len(kept) < len(logits[0]):
        index_R = torch.tensor(kept, device=logits[0].device)
        logits = [of_member[index_R] for of_member in logits]
    tokens, logprobs = zip(*(pair for pairs in gained for pair in pairs))
    found = iter(explain(logits, ensemble.weights_N, tokens, logprobs))
    for row, pairs in zip(active, gained):
        row.explanations += islice(found, len(pairs))


def _timed(
    rows: Rows, number: int, new: Sequence[Sequence[int]], wanted: Sequence[int], speculation: Speculation
) -> Tensor | None:
    started = time.perf_counter()
    logits = rows.forward(number, new, wanted)
    # What a prompt's reading costs says nothing of a step.
    if speculation.mode == "auto" and max(map(len, new)) == max(wanted):
        speculation.timed(number, sum(map(len, new)), time.perf_counter() - started)
    return logits


def _watch_copies(
    speculation: Speculation,
    copied: Mapping[int, Sequence[int]],
    choice: Choice,
    places: Sequence[tuple[int, int]],
) -> None:
    """Compare what a row could have copied with its next token, where it was not drafted."""
    guesses = [
        copied[row][0] == token
        for (row, at), token in zip(places, choice.tokens)
        if at == 0 and copied.get(row)  # nothing is copied behind a prompt that just ended
    ]
    speculation.tallies[LOOKUP].add(sum(guesses), len(guesses))


def _watch_members(ensemble: Ensemble, speculation: Speculation, logits: Sequence[Tensor], choice: Choice) -> None:
    """Compare each member's own choices with the combined ones of a step in which nobody drafted.

    The processes of a split member count alike, though the last bit of their logits may differ.
    """
    members = speculation.drafting_members
    own = [logits[member].argmax(dim=-1).tolist() for member in members]
    counts = ensemble.agree([sum(a == b for a, b in zip(tokens, choice.tokens)) for tokens in own])
    for member, count in zip(members, counts):
        speculation.tallies[member].add(count, len(choice.tokens))
