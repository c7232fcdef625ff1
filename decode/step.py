"""One step of everything in flight: drafts, a pass of every member, the combined choice, what of it is kept.

Rows that decode and rows whose prompt is still being read share the passes. A row's prompt is read in parts, so that a
long one does not keep the others waiting; members whose prompt is shorter wait for the others with the last parts.
"""

# R positions at which a token is chosen  V vocabulary

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from decode.draws import Draws
from decode.ensemble import Choice, Ensemble
from decode.explain import Explanation, explain
from decode.rows import Rows
from decode.speculate import CHOICE, LOOKUP, STEP, TOGETHER, Draft, Speculation, lookup
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
    plan = _agreed(ensemble, speculation.plan(len(decoding)), speculation)
    drafts: list[list[int]] = [[] for _ in active]
    if plan is not None and plan.drafter == LOOKUP:
        for row in decoding:
            inflight = active[row]
            room = inflight.limit - len(inflight.tokens) - 1
            drafts[row] = lookup(inflight.prompt[0], inflight.tokens, min(plan.length, room))
        if not any(drafts):
            plan = _agreed(ensemble, speculation.instead_of_lookup(), speculation)
    if plan is None and rows.graphs is not None and len(decoding) == len(active):
        return _one_token_each(ensemble, rows, active, speculation, draws, work, explaining)
    of_drafter = None
    if plan is not None and plan.drafter != LOOKUP:
        of_drafter = _draft(ensemble, rows, active, parts, plan, speculation, draws, drafts)

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
        if together:
            speculation.timed(TOGETHER, len(places), ended - started)
    if plan is None and speculation.watches():
        _watch(speculation, known, choice, active, decoding, places)
    picked = iter(zip(choice.tokens, choice.logprobs))
    for row, (draft, count) in enumerate(zip(drafts, chosen_at)):
        pairs = [next(picked) for _ in range(count)]
        kept = next((i for i, token in enumerate(draft) if pairs[i][0] != token), len(draft))
        gained[row] = pairs[: kept + 1]
        if draft and plan is not None:
            rows.forget(row, len(draft) - kept)
            speculation.drafted(plan.drafter, len(draft), kept)
            work.add_draft(speculation.name(plan.drafter, ensemble.names), len(draft), kept)
    if explaining:
        _explain(ensemble, known, active, chosen_at, gained)
    return gained


def _agreed(ensemble: Ensemble, plan: Draft | None, speculation: Speculation) -> Draft | None:
    """The processes of a split member draft alike, though each has a clock of its own."""
    if ensemble.part is None or speculation.mode == "off":
        return plan
    drafter, length = ensemble.agree((0, 0) if plan is None else (plan.drafter, plan.length))
    return Draft(drafter, length) if length else None


def _one_token_each(
    ensemble: Ensemble,
    rows: Rows,
    active: Sequence[InFlight],
    speculation: Speculation,
    draws: Draws | None,
    work: Work,
    explaining: bool,
) -> list[list[tuple[int, float]]]:
    """A step in which every row decodes and nobody drafts, as one graph."""
    started = time.perf_counter()
    drawn = [(0 if draws is None else draws.key(row.index), len(row.tokens)) for row in active]
    chosen = rows.step([row.tokens[-1] for row in active], drawn, draws)
    ensemble.check(chosen.flags)
    work.steps += 1
    speculation.timed(STEP, len(active), time.perf_counter() - started)
    choice = Choice(chosen.tokens, chosen.logprobs)
    if speculation.watches():
        every = range(len(active))
        _watch(speculation, chosen.logits, choice, active, every, [(row, 0) for row in every])
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
) -> Tensor | None:
    """Let a member write its own next tokens into `drafts`; its logits at all places where a token will be chosen.

    It reads its own last token too: the logits behind it are needed if the whole draft is kept. Prompts go along.
    """
    member = plan.drafter
    wanted_tokens = [min(plan.length, row.limit - len(row.tokens) - 1) if row.tokens else 0 for row in active]
    alone = torch.ones(1, device=ensemble.device)
    logits, places = [], []
    for at in range(max(wanted_tokens) + 1):
        new, wanted = [], []
        for row, inflight in enumerate(active):
            if inflight.tokens:
                going = at <= wanted_tokens[row]
                new.append([[inflight.tokens[-1], *drafts[row]][at]] if going else [])
                wanted.append(int(going))
            else:
                new.append(parts[row][member] if at == 0 else [])
                wanted.append(int(at == 0 and not any(inflight.unread)))
        found = _timed(rows, member, new, wanted, speculation)
        if found is None:
            continue
        here = [(row, at) for row, count in enumerate(wanted) if count]
        logits.append(found)
        places += here
        if at < max(wanted_tokens):
            own = _choose(ensemble, [found], active, here, draws, alone)
            for (row, _), token in zip(here, own.tokens):
                if at < wanted_tokens[row]:
                    drafts[row].append(token)
    if not logits:
        return None
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


def _watch(
    speculation: Speculation,
    logits: Sequence[Tensor],
    choice: Choice,
    active: Sequence[InFlight],
    decoding: Sequence[int],
    places: Sequence[tuple[int, int]],
) -> None:
    """Compare each drafter's next token with the combined choice of a step in which nobody drafted."""
    chosen = {row: token for (row, _), token in zip(places, choice.tokens)}
    for drafter, tally in speculation.tallies.items():
        if drafter == LOOKUP:
            guesses = {row: lookup(active[row].prompt[0], active[row].tokens, 1)[:1] for row in decoding}
            tally.add(sum(guess == [chosen[row]] for row, guess in guesses.items()), len(guesses))
        else:
            own = logits[drafter].argmax(dim=-1).tolist()
            tally.add(sum(token == mixed for token, mixed in zip(own, choice.tokens)), len(own))
